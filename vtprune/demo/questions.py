"""Questions about a scene, each with one right answer, computed from the scene's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vtprune.demo.world import (
    COLOURS,
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


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, its kind and the template it was made from."""

    text: str
    answer: str
    kind: str
    template: str


Maker = Callable[[Scene, np.random.Generator], Question | None]


def draw_questions(
    scene: Scene,
    rng: np.random.Generator,
    num: int,
    kinds: Sequence[str] = KINDS,
    makers: Mapping[str, Maker] | None = None,
) -> list[Question]:
    """Draw up to `num` different questions about a scene, the kinds evenly from those it has.

    Args:
        makers: what makes a question of each kind; None: those of this file.
    """
    makers = MAKERS if makers is None else makers
    questions: dict[str, Question] = {}
    open_kinds = [kind for kind in kinds if kind in makers]
    for _ in range(4 * num):
        if len(questions) >= num or not open_kinds:
            break
        kind = open_kinds[int(rng.integers(len(open_kinds)))]
        question = makers[kind](scene, rng)
        if question is None:
            open_kinds.remove(kind)
        else:
            questions.setdefault(question.text, question)
    return list(questions.values())


def fill_template(kind: str, template: str, answer: str, **words: str) -> Question:
    return Question(template.format(**words), answer, kind, template)


def _draw(rng: np.random.Generator, options: list[Thing]) -> Thing | None:
    return options[int(rng.integers(len(options)))] if options else None


def _unchanged(scene: Scene) -> list[Thing]:
    """Return the things that nothing happens to: they look the same at all times."""
    touched = {event.thing for event in scene.events if event.verb != "flashes"}
    return [thing for i, thing in enumerate(scene.things) if i not in touched]


def _pairs_in_view(scene: Scene) -> set[tuple[str, str]]:
    """Return every colour and shape in view at some time."""
    return {(t.colour, t.shape) for time in (0.0, 0.5, 1.0) for t in things_at(scene, time)} | {
        (t.colour, t.shape) for t in scene.things
    }


def uniquely_named(scene: Scene) -> list[Thing]:
    """Return the things that nothing happens to and whose colour and shape no other has."""
    names = [thing.name for thing in scene.things]
    return [thing for thing in _unchanged(scene) if names.count(thing.name) == 1]


def _colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    shapes = [thing.shape for thing in scene.things]
    unique = [thing for thing in _unchanged(scene) if shapes.count(thing.shape) == 1]
    return _attribute(scene, rng, "colour", unique, "what colour is the {shape}?")


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    colours = [thing.colour for thing in scene.things]
    if scene.is_clip:
        colours = [colour for colour, _ in _pairs_in_view(scene)]
    unique = [thing for thing in _unchanged(scene) if colours.count(thing.colour) == 1]
    return _attribute(scene, rng, "shape", unique, "what shape is the {colour} object?")


def _attribute(
    scene: Scene, rng: np.random.Generator, kind: str, unique: list[Thing], template: str
) -> Question | None:
    """Ask for the colour or shape of a thing that the other of the two names, or of one's place."""
    thing = _draw(rng, unique)
    if thing is not None and (scene.is_clip or rng.random() < 0.7):
        answer = str(getattr(thing, kind))
        return fill_template(kind, template, answer, colour=thing.colour, shape=thing.shape)
    if scene.is_clip:
        return None
    thing = _draw(rng, list(scene.things))
    assert thing is not None
    place = PLACES[thing.row][thing.column]
    template = f"what {kind} is the object at the {{place}}?"
    return fill_template(kind, template, str(getattr(thing, kind)), place=place)


def _place(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _draw(rng, uniquely_named(scene))
    if thing is None:
        return None
    place = PLACES[thing.row][thing.column]
    return fill_template("place", "where is the {name}?", place, name=thing.name)


def _existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    template = "is there {name}?"
    pairs = _pairs_in_view(scene)
    if rng.random() < 0.5:
        colour, shape = sorted(pairs)[int(rng.integers(len(pairs)))]
        return fill_template("existence", template, "yes", name=with_article(f"{colour} {shape}"))
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
            return fill_template(
                "existence", template, "no", name=with_article(f"{colour} {shape}")
            )
    return None


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    if scene.is_clip:
        when = ("start", "end")[int(rng.integers(2))]
        count = len(things_at(scene, 0.0 if when == "start" else 1.0))
        return fill_template(
            "count", "how many objects are there at the {when}?", str(count), when=when
        )
    choice = rng.random()
    if choice < 0.2:
        return fill_template("count", "how many objects are there?", str(len(scene.things)))
    some = scene.things[int(rng.integers(len(scene.things)))]
    absent = rng.random() < 0.12
    if choice < 0.6:
        colour = list(COLOURS)[int(rng.integers(len(COLOURS)))] if absent else some.colour
        count = sum(thing.colour == colour for thing in scene.things)
        return fill_template(
            "count", "how many {colour} objects are there?", str(count), colour=colour
        )
    shape = SHAPES[int(rng.integers(len(SHAPES)))] if absent else some.shape
    count = sum(thing.shape == shape for thing in scene.things)
    plural = "crosses" if shape == "cross" else f"{shape}s"
    return fill_template("count", "how many {shapes} are there?", str(count), shapes=plural)


RELATIONS = ("left of", "right of", "above", "below", "larger than", "smaller than")


def holds(relation: str, first: Thing, second: Thing) -> bool | None:
    """Whether the relation holds between two things; None where they are level or of one size."""
    if relation in ("larger than", "smaller than"):
        if first.size == second.size:
            return None
        return (first.size == "large") == (relation == "larger than")
    if relation in ("left of", "right of"):
        distance, towards_start = first.column - second.column, relation == "left of"
    else:
        distance, towards_start = first.row - second.row, relation == "above"
    return None if distance == 0 else (distance < 0) == towards_start


def _comparison(scene: Scene, rng: np.random.Generator) -> Question | None:
    named = uniquely_named(scene)
    if len(named) < 2 or scene.is_clip:
        return None
    is_yes = bool(rng.integers(2))
    for _ in range(20):
        i, j = (int(n) for n in rng.choice(len(named), size=2, replace=False))
        relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
        if holds(relation, named[i], named[j]) is is_yes:
            template = "is the {one} " + relation + " the {other}?"
            answer = "yes" if is_yes else "no"
            return fill_template(
                "comparison", template, answer, one=named[i].name, other=named[j].name
            )
    return None


def _number_large(scene: Scene, rng: np.random.Generator) -> Question | None:
    for number in scene.numbers:
        if number.large and not scene.is_clip:
            return fill_template("number_large", "what is the large number?", number.digits)
    return None


def _number_small(scene: Scene, rng: np.random.Generator) -> Question | None:
    for number in scene.numbers:
        if not number.large:
            return fill_template("number_small", "what is the small number?", number.digits)
    return None


def _direction(scene: Scene, rng: np.random.Generator) -> Question | None:
    moves = [event for event in scene.events if event.verb == "moves"]
    if not moves:
        return None
    event = moves[int(rng.integers(len(moves)))]
    name = scene.things[event.thing].name
    return fill_template("direction", "which way does the {name} move?", event.detail, name=name)


def _order(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.events) < 2:
        return None
    words = [describe_event(scene, event) for event in scene.events]
    if rng.random() < 0.25:
        first = bool(rng.integers(2))
        template = "what happens first?" if first else "what happens last?"
        return fill_template("order", template, words[0 if first else -1])
    i, j = sorted(int(n) for n in rng.choice(len(words), size=2, replace=False))
    pair = (words[i], words[j]) if rng.random() < 0.5 else (words[j], words[i])
    template = "what happens first, {one} or {other}?"
    return fill_template("order", template, words[i], one=pair[0], other=pair[1])


def _change(scene: Scene, rng: np.random.Generator) -> Question | None:
    if not scene.is_clip:
        return None
    turns = [event for event in scene.events if event.verb == "turns"]
    if turns and rng.random() < 0.6:
        event = turns[int(rng.integers(len(turns)))]
        name = scene.things[event.thing].name
        return fill_template("change", "what colour does the {name} turn?", event.detail, name=name)
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
    return fill_template("change", template, answer, name=scene.things[index].name)


def _moment(scene: Scene, rng: np.random.Generator) -> Question | None:
    if not scene.events:
        return None
    event = scene.events[int(rng.integers(len(scene.events)))]
    if event.verb == "flashes":
        if rng.random() < 0.5:
            return fill_template("moment", "when does a number flash?", MOMENTS[event.slot])
        return fill_template("moment", "what number flashes?", scene.numbers[0].digits)
    verb = {"moves": "move", "appears": "appear", "vanishes": "vanish", "turns": "turn"}[event.verb]
    template = "when does the {name} " + verb + "?"
    name = scene.things[event.thing].name
    return fill_template("moment", template, MOMENTS[event.slot], name=name)


def _what_happens(scene: Scene, rng: np.random.Generator) -> Question | None:
    if not scene.events:
        return None
    return fill_template("what_happens", "what happens?", what_happens(scene))


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
}
