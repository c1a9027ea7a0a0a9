"""Where the answer to a question about a scene is: boxes of things and numbers, and moments."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vtprune.demo.draw import place_number, place_shape
from vtprune.demo.questions import Question
from vtprune.demo.world import PLACES, Event, Scene, describe_event, numbers_at, things_at

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of the scene."""


@dataclass(frozen=True)
class SceneRegion:
    """What an answer, or a part of it, rests on.

    Args:
        things: numbers of the scene's things.
        numbers: likewise.
        span: from when to when in [0, 1] it is to be seen; None: whenever they are in view.
    """

    things: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    span: tuple[float, float] | None = None


def find_region(scene: Scene, question: Question) -> list[SceneRegion] | None:
    """Return the region of a question; of "what happens?" one an event, in order.

    None where the answer rests on nothing in particular: that there is none of something, or that
    nothing happens.
    """
    finder = FINDERS.get(question.kind)
    regions = finder(scene, question) if finder else None
    if not regions or not all(region.things or region.numbers for region in regions):
        return None
    return regions


def boxes_at(scene: Scene, region: SceneRegion, time: float) -> list[Box]:
    """Return the boxes of a region at a time in [0, 1]."""
    boxes: list[Box] = []
    for thing in things_at(scene, time):
        numbers = [(one.shape, one.radius) for one in scene.things]
        if numbers.index((thing.shape, thing.radius)) in region.things:
            mask, top, left = place_shape(thing, scene.height, scene.width)
            boxes.append((left, top, left + mask.shape[1], top + mask.shape[0]))
    for index, number in enumerate(numbers_at(scene, time)):
        if index in region.numbers:
            plate, _, top, left = place_number(number, scene.height, scene.width)
            boxes.append((left, top, left + plate.shape[1], top + plate.shape[0]))
    return boxes


def _named(scene: Scene, text: str) -> list[int]:
    """Return the things whose colour and shape a text names, also those they have later."""
    names: list[set[str]] = [{thing.name} for thing in scene.things]
    for event in scene.events:
        if event.verb == "turns":
            names[event.thing].add(f"{event.detail} {scene.things[event.thing].shape}")
    return [number for number, of_thing in enumerate(names) if any(n in text for n in of_thing)]


def _of_event(scene: Scene, event: Event) -> SceneRegion:
    if event.verb == "flashes":
        return SceneRegion(numbers=(0,), span=(event.start, event.end))
    return SceneRegion(things=(event.thing,), span=(event.start, event.end))


def _attribute(scene: Scene, question: Question) -> list[SceneRegion]:
    place = question.text.removesuffix("?").partition(" at the ")[2]
    words = set(re.findall(r"\w+", question.text))
    if place:
        things = [n for n, t in enumerate(scene.things) if PLACES[t.row][t.column] == place]
    else:
        name = "shape" if question.kind == "colour" else "colour"
        things = [n for n, t in enumerate(scene.things) if getattr(t, name) in words]
    return [SceneRegion(tuple(things))]


def _by_name(scene: Scene, question: Question) -> list[SceneRegion]:
    return [] if question.answer == "no" and question.kind == "existence" else [
        SceneRegion(tuple(_named(scene, question.text)))
    ]  # fmt: skip


def _count(scene: Scene, question: Question) -> list[SceneRegion]:
    words = set(re.findall(r"\w+", question.text.replace("crosses", "cross")))
    words |= {word.removesuffix("s") for word in words}
    every = "how many objects are" in question.text
    things = [n for n, t in enumerate(scene.things) if every or words & {t.colour, t.shape}]
    if not scene.is_clip:
        return [SceneRegion(tuple(things))]
    return [SceneRegion(tuple(things), span=(0.0, 0.1) if "start" in question.text else (0.9, 1.0))]


def _events(scene: Scene, question: Question) -> list[SceneRegion]:
    if question.kind == "what_happens":
        return [_of_event(scene, event) for event in scene.events]
    if question.kind == "order":
        events = [e for e in scene.events if describe_event(scene, e) == question.answer]
    elif "number" in question.text:
        events = [event for event in scene.events if event.verb == "flashes"]
    else:
        named = _named(scene, question.text)
        events = [e for e in scene.events if e.verb != "flashes" and e.thing in named]
        verbs = {"direction": "moves", "change": question.answer.split()[-1]}
        if question.kind == "direction":
            events = [event for event in events if event.verb == verbs["direction"]]
    return [_of_event(scene, events[0])] if events else []


def _number(scene: Scene, question: Question) -> list[SceneRegion]:
    large = question.kind == "number_large"
    return [
        SceneRegion(
            numbers=tuple(n for n, number in enumerate(scene.numbers) if number.large == large)
        )
    ]


FINDERS = {
    "colour": _attribute,
    "shape": _attribute,
    "place": _by_name,
    "existence": _by_name,
    "comparison": _by_name,
    "count": _count,
    "number_large": _number,
    "number_small": _number,
    "direction": _events,
    "order": _events,
    "change": _events,
    "moment": _events,
    "what_happens": _events,
}
"""Kind of question -> what finds its regions."""
