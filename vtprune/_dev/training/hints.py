"""What a scene tells of each name in a question and of each visual token: hints in training alone.

A question that takes two looks ("is the red star above the blue ring?") is not learned from its yes
or no: the looks have to be there first. So small heads, thrown away later, ask the decoder's middle
layers what they should know by then: of a thing, at the word that completes its name; of what has
happened to it and how many like it came before, at its visual tokens. And heads of attention are
told where to look from a name: at the tokens that show what it names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vtprune.demo.world import COLOURS, DIRECTIONS, Event, Scene, Thing, numbers_at, things_at

IGNORED = -100
VERBS = ("none", "moves", "appears", "vanishes", "turns", "flashes")
DETAILS = ("", *DIRECTIONS, *COLOURS)
MOST = 8  # ordinals 0 to 7
# Classes of each label: of a name its cell, size, verb, third of the clip and detail, then, of a
# number, its two digits, and how it lies to the name before; of a visual token the verb and third
# of what has happened there, and its thing's number among those of its colour, of its shape and
# among all.
NAME_CLASSES = (9, 2, len(VERBS), 4, len(DETAILS))
DIGIT_CLASSES = (10, 10)
RELATION_CLASSES = (3, 3, 3)
# Where a name's labels have its digits, the number of its thing, relations, and whether the one
# that is asked for holds.
DIGITS = len(NAME_CLASSES)
THING = DIGITS + len(DIGIT_CLASSES)
RELATION = THING + 1
HOLDS = RELATION + len(RELATION_CLASSES)
# Which gap from the thing named first to the second a relation is about, and its sign.
ASKED = {
    "above": (0, 1), "below": (0, -1), "left": (1, 1), "right": (1, -1), "larger": (2, -1),
    "smaller": (2, 1),
}  # fmt: skip
TOKEN_CLASSES = (len(VERBS), 4, MOST, MOST, MOST)
Grid = tuple[int, int]  # rows and columns of visual tokens

Names = dict[tuple[str, str], tuple[int, ...]]


def names_of(scene: Scene) -> Names:
    """The labels of every colour and shape that names one thing of the scene, and of its numbers.

    The last label is the place of what is named among the scene's things and then its numbers.
    """
    done: dict[int, Event] = {e.thing: e for e in scene.events if e.verb != "flashes"}
    labels_of_name: Names = {}
    shared: set[tuple[str, str]] = set()
    for i, thing in enumerate(scene.things):
        event = done.get(i)
        labels = (*_name_labels(thing, event, scene.is_clip), IGNORED, IGNORED, i)
        names = [(thing.colour, thing.shape)]
        if event is not None and event.verb == "turns":
            names.append((event.detail, thing.shape))
        for name in names:
            if name in labels_of_name:
                shared.add(name)
            labels_of_name[name] = labels
    for i, number in enumerate(scene.numbers, start=len(scene.things)):
        labels = number.row * 3 + number.column, *[IGNORED] * 4, *map(int, number.digits), i
        labels_of_name["large" if number.large else "small", "number"] = labels
    return {name: labels for name, labels in labels_of_name.items() if name not in shared}


def _name_labels(thing: Thing, event: Event | None, is_clip: bool) -> tuple[int, ...]:
    cell = thing.row * 3 + thing.column
    if not is_clip:
        return cell, int(thing.size == "large"), IGNORED, IGNORED, IGNORED
    if event is None:
        return cell, IGNORED, 0, 0, 0
    return cell, IGNORED, VERBS.index(event.verb), event.slot + 1, DETAILS.index(event.detail)


def name_labels(
    words: Sequence[str], segments: Sequence[int], names: Names
) -> list[tuple[int, ...]]:
    """Labels (L, 12) of a row of tokens: at each word that ends a name.

    After those of `names_of` comes how a picture's thing lies to the one that its question named
    before: in a row above, the same or below; a column left, the same or right; smaller, of one
    size or larger; and whether the relation that is asked for between the two holds.
    """
    unknown = (IGNORED,) * (len(RELATION_CLASSES) + 1)
    rows = [(IGNORED,) * RELATION + unknown] * len(words)
    before: dict[int, tuple[int, ...]] = {}
    asked: dict[int, tuple[int, int]] = {}
    for i in range(1, len(words)):
        if words[i] in ASKED:
            asked[segments[i]] = ASKED[words[i]]
        labels = names.get((words[i - 1], words[i]))
        if labels is None:
            continue
        relation, first = unknown, before.get(segments[i])
        if first is not None and IGNORED not in (first[1], labels[1]):
            (row, column), (own_row, own_column) = divmod(first[0], 3), divmod(labels[0], 3)
            gaps = own_row - row, own_column - column, labels[1] - first[1]
            axis, sign = asked.get(segments[i], (0, 0))
            holds = IGNORED if sign * gaps[axis] == 0 else int(sign * gaps[axis] > 0)
            relation = *((gap > 0) - (gap < 0) + 1 for gap in gaps), holds
        rows[i] = labels + relation
        before[segments[i]] = labels
    return rows


def things_of_tokens(scene: Scene, times: Sequence[float], grid: Grid) -> NDArray[np.int64]:
    """What each token (N,) of the grids at `times` shows, as `names_of` counts it."""
    out = np.full((len(times), *grid), IGNORED)
    for picture, time in zip(out, times, strict=True):
        there = _in_view(scene, float(time))
        for i, thing in enumerate(scene.things):
            seen = there.get((thing.shape, thing.radius))
            if seen is not None:
                picture[_covered(seen.x, seen.y, *_radii(scene, seen.radius), grid)] = i
        numbers = numbers_at(scene, float(time))
        for i, number in enumerate(scene.numbers, start=len(scene.things)):
            if number in numbers:
                wide, tall = _radii(scene, number.height / 2)
                picture[_covered(number.x, number.y, 1.2 * wide, tall, grid)] = i
    return out.reshape(-1)


def sizes(scene: Scene, things: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of what each token of a picture shows: 0 of a small thing, 1 of a large one."""
    large = [int(thing.size == "large") for thing in scene.things]
    out = np.full_like(things, IGNORED)
    of_things = (things != IGNORED) & (things < len(large))
    if not scene.is_clip:
        out[of_things] = np.array(large)[things[of_things]]
    return out


def _in_view(scene: Scene, time: float) -> dict[tuple[str, float], Thing]:
    """The things in view, by what an event leaves as it is."""
    return {(thing.shape, thing.radius): thing for thing in things_at(scene, time)}


def _radii(scene: Scene, radius: float) -> tuple[float, float]:
    """A radius, a fraction of the shorter side, as fractions of width and height."""
    shorter = min(scene.height, scene.width)
    return radius * shorter / scene.width, radius * shorter / scene.height


def token_labels(scene: Scene, times: Sequence[float], grid: Grid) -> NDArray[np.int64]:
    """Labels (N, 5) of a clip's tokens, a grid at each time, or of the grid of a whole picture."""
    if not scene.is_clip:
        return _ordinals(scene, grid)
    out = np.full((len(times), *grid, len(TOKEN_CLASSES)), IGNORED)
    for number, time in enumerate(times):
        _mark_events(out[number], scene, float(time))
    return out.reshape(-1, len(TOKEN_CLASSES))


def _mark_events(out: NDArray[np.int64], scene: Scene, time: float) -> None:
    """What has happened so far, at the tokens of each thing, and where it was if it is gone."""
    grid = out.shape[0], out.shape[1]
    moved = _in_view(scene, time)
    done = {e.thing: e for e in scene.events if e.verb != "flashes" and e.middle <= time}
    for i, thing in enumerate(scene.things):
        event, there = done.get(i), moved.get((thing.shape, thing.radius))
        if there is None and (event is None or event.verb != "vanishes"):
            continue
        mark = (0, 0) if event is None else (VERBS.index(event.verb), event.slot + 1)
        shown = there or thing
        out[_covered(shown.x, shown.y, shown.radius, shown.radius, grid), :2] = mark
    for event in scene.events:
        if event.verb == "flashes" and event.start <= time:
            number = scene.numbers[0]
            where = _covered(number.x, number.y, number.height / 2, number.height / 2, grid)
            out[where, :2] = VERBS.index("flashes"), event.slot + 1


def _ordinals(scene: Scene, grid: Grid) -> NDArray[np.int64]:
    """Each thing's number, in reading order of the cells, among things like it."""
    out = np.full((*grid, len(TOKEN_CLASSES)), IGNORED)
    before: list[Thing] = []
    for thing in sorted(scene.things, key=lambda t: (t.row, t.column)):
        before.append(thing)
        wide, tall = _radii(scene, thing.radius)
        if grid[0] == grid[1]:  # the base picture of a tiled one is square, whatever the picture is
            wide = tall = min(wide, tall)
        where = _covered(thing.x, thing.y, wide, tall, grid)
        out[where, 2:] = (
            sum(other.colour == thing.colour for other in before),
            sum(other.shape == thing.shape for other in before),
            len(before),
        )
    return out.reshape(-1, len(TOKEN_CLASSES))


def _covered(x: float, y: float, wide: float, tall: float, grid: Grid) -> NDArray[np.bool_]:
    """The tokens (rows, columns) whose centre is in the ellipse, and the one its centre is in."""
    rows, columns = grid
    down = (np.arange(rows) + 0.5) / rows - y
    across = (np.arange(columns) + 0.5) / columns - x
    inside: NDArray[np.bool_] = np.hypot(down[:, None] * (wide / tall), across) < wide
    inside[min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)] = True
    return inside
