"""Questions about a scene, each with one right answer, computed from the scene's state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .world import (
    COLOURS,
    HELD_OUT,
    MOMENTS,
    PLACES,
    SHAPES,
    Scene,
    Thing,
    describe_event,
    things_at,
    what_happens,
    with_article,
)

PICTURE_KINDS = (
    "colour", "shape", "place", "existence", "count", "comparison", "number_large", "number_small"
)  # fmt: skip
CLIP_KINDS = ("direction", "order", "change", "moment", "what_happens")
KINDS = PICTURE_KINDS + CLIP_KINDS
# Asked in training alone: they make a picture's every object answerable.
EXTRA_KINDS = ("describe",)
# Asked in training's later part alone: the single looks that comparisons and events are made of.
BETWEEN = (0.33, 0.6)  # times after one third's events and before the next one's


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, its kind and the template it was made from."""

    text: str
    answer: str
    kind: str
    template: str


Maker = Callable[[Scene, np.random.Generator], Question | None]


def draw_questions(
    scene: Scene, rng: np.random.Generator, num: int, kinds: tuple[str, ...] = KINDS
) -> list[Question]:
    """Up to `num` different questions about a scene, the kinds drawn evenly from those it has."""
    found: dict[str, Question] = {}
    open_kinds = [kind for kind in kinds if kind in MAKERS]
    for _ in range(4 * num):
        if len(found) >= num or not open_kinds:
            break
        kind = open_kinds[int(rng.integers(len(open_kinds)))]
        question = MAKERS[kind](scene, rng)
        if question is None:
            open_kinds.remove(kind)
        else:
            found.setdefault(question.text, question)
    return list(found.values())


def _fill(kind: str, template: str, answer: str, **words: str) -> Question:
    return Question(template.format(**words), answer, kind, template)


def _pick(rng: np.random.Generator, options: list[Thing]) -> Thing | None:
    return options[int(rng.integers(len(options)))] if options else None


def _still(scene: Scene) -> list[Thing]:
    """The things nothing happens to: how they are does not depend on the time."""
    touched = {event.thing for event in scene.events if event.verb != "flashes"}
    return [thing for i, thing in enumerate(scene.things) if i not in touched]


def _ever(scene: Scene) -> set[tuple[str, str]]:
    """Every colour and shape that is to be seen at some time."""
    return {(t.colour, t.shape) for time in (0.0, 0.5, 1.0) for t in things_at(scene, time)} | {
        (t.colour, t.shape) for t in scene.things
    }


def _named(scene: Scene) -> list[Thing]:
    """Still things whose colour and shape no other has."""
    names = [thing.name for thing in scene.things]
    return [thing for thing in _still(scene) if names.count(thing.name) == 1]


def _colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    shapes = [thing.shape for thing in scene.things]
    unique = [thing for thing in _still(scene) if shapes.count(thing.shape) == 1]
    thing = _pick(rng, unique)
    if thing is not None and (scene.is_clip or rng.random() < 0.7):
        return _fill("colour", "what colour is the {shape}?", thing.colour, shape=thing.shape)
    if scene.is_clip:
        return None
    thing = _pick(rng, list(scene.things))
    assert thing is not None
    place = PLACES[thing.row][thing.column]
    return _fill("colour", "what colour is the object at the {place}?", thing.colour, place=place)


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    colours = (
        [colour for colour, _ in _ever(scene)]
        if scene.is_clip
        else [t.colour for t in scene.things]
    )
    thing = _pick(rng, [thing for thing in _still(scene) if colours.count(thing.colour) == 1])
    if thing is not None and (scene.is_clip or rng.random() < 0.7):
        return _fill(
            "shape", "what shape is the {colour} object?", thing.shape, colour=thing.colour
        )
    if scene.is_clip:
        return None
    thing = _pick(rng, list(scene.things))
    assert thing is not None
    place = PLACES[thing.row][thing.column]
    return _fill("shape", "what shape is the object at the {place}?", thing.shape, place=place)


def _place(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _pick(rng, _named(scene))
    if thing is None:
        return None
    place = PLACES[thing.row][thing.column]
    return _fill("place", "where is the {name}?", place, name=thing.name)


def _existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    template = "is there {name}?"
    pairs = _ever(scene)
    if rng.random() < 0.5:
        colour, shape = sorted(pairs)[int(rng.integers(len(pairs)))]
        return _fill("existence", template, "yes", name=with_article(f"{colour} {shape}"))
    for _ in range(20):
        # Mostly a colour and a shape that are both there, but not together.
        colour, shape = sorted(pairs)[int(rng.integers(len(pairs)))]
        if rng.random() < 0.5:
            shape = sorted(pairs)[int(rng.integers(len(pairs)))][1]
        if rng.random() < 0.3:
            colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
        if rng.random() < 0.3:
            shape = SHAPES[int(rng.integers(len(SHAPES)))]
        if (colour, shape) not in pairs:
            return _fill("existence", template, "no", name=with_article(f"{colour} {shape}"))
    return None


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    if scene.is_clip:
        when = ("start", "end")[int(rng.integers(2))]
        count = len(things_at(scene, 0.0 if when == "start" else 1.0))
        return _fill("count", "how many objects are there at the {when}?", str(count), when=when)
    choice = rng.random()
    if choice < 0.2:
        return _fill("count", "how many objects are there?", str(len(scene.things)))
    some = scene.things[int(rng.integers(len(scene.things)))]
    absent = rng.random() < 0.12
    if choice < 0.6:
        colour = list(COLOURS)[int(rng.integers(len(COLOURS)))] if absent else some.colour
        count = sum(thing.colour == colour for thing in scene.things)
        return _fill("count", "how many {colour} objects are there?", str(count), colour=colour)
    shape = SHAPES[int(rng.integers(len(SHAPES)))] if absent else some.shape
    count = sum(thing.shape == shape for thing in scene.things)
    plural = "crosses" if shape == "cross" else f"{shape}s"
    return _fill("count", "how many {shapes} are there?", str(count), shapes=plural)


RELATIONS = ("left of", "right of", "above", "below", "larger than", "smaller than")


def holds(relation: str, one: Thing, other: Thing) -> bool | None:
    """Whether `one` is so related to `other`; None where the two are level or of one size."""
    if relation in ("larger than", "smaller than"):
        if one.size == other.size:
            return None
        return (one.size == "large") == (relation == "larger than")
    along, first = (
        (one.column - other.column, "left of")
        if relation in ("left of", "right of")
        else (one.row - other.row, "above")
    )
    return None if along == 0 else (along < 0) == (relation == first)


def _comparison(scene: Scene, rng: np.random.Generator) -> Question | None:
    named = _named(scene)
    if len(named) < 2 or scene.is_clip:
        return None
    wanted = bool(rng.integers(2))
    for _ in range(20):
        i, j = (int(n) for n in rng.choice(len(named), size=2, replace=False))
        relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
        if holds(relation, named[i], named[j]) is wanted:
            template = "is the {one} " + relation + " the {other}?"
            answer = "yes" if wanted else "no"
            return _fill("comparison", template, answer, one=named[i].name, other=named[j].name)
    return None


def _number_large(scene: Scene, rng: np.random.Generator) -> Question | None:
    for number in scene.numbers:
        if number.large and not scene.is_clip:
            return _fill("number_large", "what is the large number?", number.digits)
    return None


def _number_small(scene: Scene, rng: np.random.Generator) -> Question | None:
    for number in scene.numbers:
        if not number.large:
            return _fill("number_small", "what is the small number?", number.digits)
    return None


def _direction(scene: Scene, rng: np.random.Generator) -> Question | None:
    moves = [event for event in scene.events if event.verb == "moves"]
    if not moves:
        return None
    event = moves[int(rng.integers(len(moves)))]
    name = scene.things[event.thing].name
    return _fill("direction", "which way does the {name} move?", event.detail, name=name)


def _order(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.events) < 2:
        return None
    words = [describe_event(scene, event) for event in scene.events]
    if rng.random() < 0.25:
        first = bool(rng.integers(2))
        template = "what happens first?" if first else "what happens last?"
        return _fill("order", template, words[0 if first else -1])
    i, j = sorted(int(n) for n in rng.choice(len(words), size=2, replace=False))
    pair = (words[i], words[j]) if rng.random() < 0.5 else (words[j], words[i])
    template = "what happens first, {one} or {other}?"
    return _fill("order", template, words[i], one=pair[0], other=pair[1])


def _change(scene: Scene, rng: np.random.Generator) -> Question | None:
    if not scene.is_clip:
        return None
    turns = [event for event in scene.events if event.verb == "turns"]
    if turns and rng.random() < 0.6:
        event = turns[int(rng.integers(len(turns)))]
        name = scene.things[event.thing].name
        return _fill("change", "what colour does the {name} turn?", event.detail, name=name)
    done = {event.thing: event for event in scene.events if event.verb != "flashes"}
    # One thing in four is one that nothing happens to.
    still = [i for i in range(len(scene.things)) if i not in done]
    options = still if still and (not done or rng.random() < 0.25) else list(done)
    if not options:
        return None
    index = options[int(rng.integers(len(options)))]
    answer = "nothing"
    if index in done:
        answer = f"it {done[index].verb} {done[index].detail}".rstrip()
    template = "what does the {name} do?"
    return _fill("change", template, answer, name=scene.things[index].name)


def _moment(scene: Scene, rng: np.random.Generator) -> Question | None:
    if not scene.events:
        return None
    event = scene.events[int(rng.integers(len(scene.events)))]
    if event.verb == "flashes":
        if rng.random() < 0.5:
            return _fill("moment", "when does a number flash?", MOMENTS[event.slot])
        return _fill("moment", "what number flashes?", scene.numbers[0].digits)
    verb = {"moves": "move", "appears": "appear", "vanishes": "vanish", "turns": "turn"}[event.verb]
    template = "when does the {name} " + verb + "?"
    name = scene.things[event.thing].name
    return _fill("moment", template, MOMENTS[event.slot], name=name)


def _what_happens(scene: Scene, rng: np.random.Generator) -> Question | None:
    if not scene.events:
        return None
    return _fill("what_happens", "what happens?", what_happens(scene))


def _describe(scene: Scene, rng: np.random.Generator) -> Question | None:
    if scene.is_clip:
        when = ("start", "end")[int(rng.integers(2))]
        things = things_at(scene, 0.0 if when == "start" else 1.0)
        row = int(rng.integers(3))
        names = [t.name for t in sorted(things, key=lambda t: t.column) if t.row == row]
        line = ("top", "middle", "bottom")[row]
        template = "what is in the {line} row at the {when}?"
        return _fill("describe", template, ", ".join(names) or "nothing", line=line, when=when)
    cells = {(t.row, t.column): f"{t.size} {t.name}" for t in scene.things}
    cells |= {
        (n.row, n.column): f"{'large' if n.large else 'small'} number {n.digits}"
        for n in scene.numbers
    }
    row, column = int(rng.integers(3)), int(rng.integers(3))
    if cells and rng.random() < 0.6:
        row, column = list(cells)[int(rng.integers(len(cells)))]
    answer = cells.get((row, column), "nothing")
    return _fill("describe", "what is at the {place}?", answer, place=PLACES[row][column])


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """All of `holds` at once: "left above larger", "no" where nothing differs."""
    named = _named(scene)
    if len(named) < 2 or scene.is_clip:
        return None
    i, j = (int(n) for n in rng.choice(len(named), size=2, replace=False))
    words = [relation.split()[0] for relation in RELATIONS if holds(relation, named[i], named[j])]
    template = "where is the {one} to the {other}?"
    answer = " ".join(words) or "no"
    return _fill("relation", template, answer, one=named[i].name, other=named[j].name)


def _places(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Where each of two things is: what a comparison has to look at."""
    named = _named(scene)
    if len(named) < 2 or scene.is_clip:
        return None
    i, j = (int(n) for n in rng.choice(len(named), size=2, replace=False))
    one, other = named[i], named[j]
    answer = f"{PLACES[one.row][one.column]} {PLACES[other.row][other.column]}"
    return _fill("places", "{one} and {other}?", answer, one=one.name, other=other.name)


def _whereabouts(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Where a thing is at the start or at the end of a clip; "nothing" while it is not there."""
    when = ("start", "end")
    return _place_at(scene, rng, "whereabouts", "where is the {name} at the {when}?", when, (0, 1))


def _between(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Likewise between a clip's thirds: what happens in each is told by its two ends."""
    when, times = ("start to middle", "middle to end"), BETWEEN
    return _place_at(scene, rng, "between", "where is the {name}, {when}?", when, times)


def _place_at(
    scene: Scene,
    rng: np.random.Generator,
    kind: str,
    template: str,
    words: tuple[str, str],
    times: tuple[float, float],
) -> Question | None:
    """Where a thing is at one of two times."""
    if not scene.is_clip:
        return None
    names = [thing.name for thing in scene.things]
    turned = {event.thing for event in scene.events if event.verb == "turns"}
    later = {f"{e.detail} {scene.things[e.thing].shape}" for e in scene.events if e.verb == "turns"}
    options = [
        i
        for i, name in enumerate(names)
        if names.count(name) == 1 and name not in later and i not in turned
    ]
    if not options:
        return None
    name = names[options[int(rng.integers(len(options)))]]
    which = int(rng.integers(2))
    there = [t for t in things_at(scene, times[which]) if t.name == name]
    answer = PLACES[there[0].row][there[0].column] if there else "nothing"
    return _fill(kind, template, answer, name=name, when=words[which])


MAKERS: dict[str, Maker] = {
    "colour": _colour,
    "shape": _shape,
    "place": _place,
    "existence": _existence,
    "count": _count,
    "comparison": _comparison,
    "number_large": _number_large,
    "number_small": _number_small,
    "direction": _direction,
    "order": _order,
    "change": _change,
    "moment": _moment,
    "what_happens": _what_happens,
    "describe": _describe,
    "relation": _relation,
    "places": _places,
    "whereabouts": _whereabouts,
    "between": _between,
}


def names_held_out(question: Question) -> bool:
    """Whether the question or its answer names a colour and shape that training never shows."""
    words = f" {question.text} {question.answer} "
    return any(f" {colour} {shape}" in words for colour, shape in HELD_OUT)
