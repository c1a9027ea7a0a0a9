"""What a scene tells of each name in a question and of each visual token: hints in training alone.

A question that takes two looks ("is the red star above the blue ring?") is not learned from its yes
or no: the looks have to be there first. So small heads, thrown away later, ask the decoder's middle
layers what they should know by then: of a thing, at the word that completes its name; of what has
happened to it and how many like it came before, at its visual tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vtprune._dev.training.checkpoint import vocabulary
from vtprune.demo.world import COLOURS, DIRECTIONS, SHAPES, Event, Scene, Thing, things_at

IGNORED = -100
VERBS = ("none", "moves", "appears", "vanishes", "turns", "flashes")
DETAILS = ("", *DIRECTIONS, *COLOURS)
MOST = 8  # ordinals 0 to 7
# Classes of each label: of a name its cell, size, verb, third of the clip and detail; of a visual
# token the verb and third of what has happened there, and its thing's number among those of its
# colour, of its shape and among all.
NAME_CLASSES = (9, 2, len(VERBS), 4, len(DETAILS))
TOKEN_CLASSES = (len(VERBS), 4, MOST, MOST, MOST)
CLIP_SIDE, PICTURE_SIDE = 4, 8  # tokens along a side of a pooled frame, of a base picture

_WORDS = vocabulary()
_COLOUR_IDS = {_WORDS[colour]: colour for colour in COLOURS}
_SHAPE_IDS = {_WORDS[shape]: shape for shape in SHAPES}
Names = dict[tuple[str, str], tuple[int, ...]]


def names_of(scene: Scene) -> Names:
    """The labels of every colour and shape that names one thing of the scene."""
    done: dict[int, Event] = {e.thing: e for e in scene.events if e.verb != "flashes"}
    labels_of_name: Names = {}
    shared: set[tuple[str, str]] = set()
    for i, thing in enumerate(scene.things):
        event = done.get(i)
        labels = _name_labels(thing, event, scene.is_clip)
        names = [(thing.colour, thing.shape)]
        if event is not None and event.verb == "turns":
            names.append((event.detail, thing.shape))
        for name in names:
            if name in labels_of_name:
                shared.add(name)
            labels_of_name[name] = labels
    return {name: labels for name, labels in labels_of_name.items() if name not in shared}


def _name_labels(thing: Thing, event: Event | None, is_clip: bool) -> tuple[int, ...]:
    cell = thing.row * 3 + thing.column
    if not is_clip:
        return cell, int(thing.size == "large"), IGNORED, IGNORED, IGNORED
    if event is None:
        return cell, IGNORED, 0, 0, 0
    return cell, IGNORED, VERBS.index(event.verb), event.slot + 1, DETAILS.index(event.detail)


def name_labels(tokens: list[int], names: Names) -> list[tuple[int, ...]]:
    """Labels (L, 5) of a row of tokens: at each shape that follows its colour."""
    rows = [(IGNORED,) * len(NAME_CLASSES)] * len(tokens)
    for i in range(1, len(tokens)):
        colour, shape = _COLOUR_IDS.get(tokens[i - 1]), _SHAPE_IDS.get(tokens[i])
        if colour is not None and shape is not None and (colour, shape) in names:
            rows[i] = names[colour, shape]
    return rows


def token_labels(scene: Scene, times: NDArray[np.float64]) -> NDArray[np.int64]:
    """Labels (N, 5) of a clip's pooled tokens, or of the 64 of a picture's base picture."""
    if not scene.is_clip:
        return _ordinals(scene)
    out = np.full((len(times), CLIP_SIDE, CLIP_SIDE, len(TOKEN_CLASSES)), IGNORED)
    for number, time in enumerate(float(time) for time in times):
        _mark_events(out[number], scene, time)
    return out.reshape(-1, len(TOKEN_CLASSES))


def _mark_events(out: NDArray[np.int64], scene: Scene, time: float) -> None:
    """What has happened so far, at the tokens of each thing, and where it was if it is gone."""
    moved = {(t.shape, t.radius): t for t in things_at(scene, time)}
    done = {e.thing: e for e in scene.events if e.verb != "flashes" and e.middle <= time}
    for i, thing in enumerate(scene.things):
        event, there = done.get(i), moved.get((thing.shape, thing.radius))
        if there is None and (event is None or event.verb != "vanishes"):
            continue
        mark = (0, 0) if event is None else (VERBS.index(event.verb), event.slot + 1)
        shown = there or thing
        out[_covered(shown.x, shown.y, shown.radius, CLIP_SIDE), :2] = mark
    for event in scene.events:
        if event.verb == "flashes" and event.start <= time:
            number = scene.numbers[0]
            where = _covered(number.x, number.y, number.height / 2, CLIP_SIDE)
            out[where, :2] = VERBS.index("flashes"), event.slot + 1


def _ordinals(scene: Scene) -> NDArray[np.int64]:
    """Each thing's number, in reading order of the cells, among things like it."""
    out = np.full((PICTURE_SIDE, PICTURE_SIDE, len(TOKEN_CLASSES)), IGNORED)
    before: list[Thing] = []
    shorter = min(scene.height, scene.width)
    for thing in sorted(scene.things, key=lambda t: (t.row, t.column)):
        before.append(thing)
        wide = thing.radius * shorter / scene.width, thing.radius * shorter / scene.height
        where = _covered(thing.x, thing.y, min(wide), PICTURE_SIDE)
        out[where, 2:] = (
            sum(other.colour == thing.colour for other in before),
            sum(other.shape == thing.shape for other in before),
            len(before),
        )
    return out.reshape(-1, len(TOKEN_CLASSES))


def _covered(x: float, y: float, radius: float, side: int) -> NDArray[np.bool_]:
    """The tokens (side, side) whose centre is in the disc, and the one that its centre is in."""
    centres = (np.arange(side) + 0.5) / side
    inside: NDArray[np.bool_] = np.hypot(centres[:, None] - y, centres - x) < radius
    inside[min(int(y * side), side - 1), min(int(x * side), side - 1)] = True
    return inside
