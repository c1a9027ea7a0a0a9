"""Questions about a scene that are asked in training alone."""

from __future__ import annotations

import numpy as np

from vtprune.demo.questions import (
    MAKERS,
    RELATIONS,
    Maker,
    Question,
    fill_template,
    holds,
    uniquely_named,
)
from vtprune.demo.world import HELD_OUT, PLACES, Scene, things_at

# Asked all through training: they make a picture's every object answerable. Those of the later part
# ask for the single facts that comparisons and events are made of.
EXTRA_KINDS = ("describe",)
BETWEEN = (0.33, 0.6)  # times after one third's events and before the next one's


def _describe(scene: Scene, rng: np.random.Generator) -> Question | None:
    if scene.is_clip:
        when = ("start", "end")[int(rng.integers(2))]
        things = things_at(scene, 0.0 if when == "start" else 1.0)
        row = int(rng.integers(3))
        names = [t.name for t in sorted(things, key=lambda t: t.column) if t.row == row]
        line = ("top", "middle", "bottom")[row]
        template = "what is in the {line} row at the {when}?"
        return fill_template(
            "describe", template, ", ".join(names) or "nothing", line=line, when=when
        )
    cells = {(t.row, t.column): f"{t.size} {t.name}" for t in scene.things}
    cells |= {
        (n.row, n.column): f"{'large' if n.large else 'small'} number {n.digits}"
        for n in scene.numbers
    }
    row, column = int(rng.integers(3)), int(rng.integers(3))
    if cells and rng.random() < 0.6:
        row, column = list(cells)[int(rng.integers(len(cells)))]
    answer = cells.get((row, column), "nothing")
    return fill_template("describe", "what is at the {place}?", answer, place=PLACES[row][column])


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """All of `holds` at once: "left above larger", "no" where nothing differs."""
    named = uniquely_named(scene)
    if len(named) < 2 or scene.is_clip:
        return None
    i, j = (int(n) for n in rng.choice(len(named), size=2, replace=False))
    words = [relation.split()[0] for relation in RELATIONS if holds(relation, named[i], named[j])]
    template = "where is the {one} to the {other}?"
    answer = " ".join(words) or "no"
    return fill_template("relation", template, answer, one=named[i].name, other=named[j].name)


def _places(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Where each of two things is: what a comparison has to look at."""
    named = uniquely_named(scene)
    if len(named) < 2 or scene.is_clip:
        return None
    i, j = (int(n) for n in rng.choice(len(named), size=2, replace=False))
    one, other = named[i], named[j]
    answer = f"{PLACES[one.row][one.column]} {PLACES[other.row][other.column]}"
    return fill_template("places", "{one} and {other}?", answer, one=one.name, other=other.name)


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
    return fill_template(kind, template, answer, name=name, when=words[which])


def names_held_out(question: Question) -> bool:
    """Whether the question or its answer names a colour and shape that training never shows."""
    words = f" {question.text} {question.answer} "
    return any(f" {colour} {shape}" in words for colour, shape in HELD_OUT)


TRAINING_MAKERS: dict[str, Maker] = {
    **MAKERS,
    "describe": _describe,
    "relation": _relation,
    "places": _places,
    "whereabouts": _whereabouts,
    "between": _between,
}
