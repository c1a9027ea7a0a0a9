"""What each pixel of a frame shows: the labels that training teaches the vision tower."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vtprune.demo.draw import Mask, place_number, place_shape
from vtprune.demo.world import COLOURS, SHAPES, Scene, numbers_at, things_at


def labels(scene: Scene, time: float, height: int = 0, width: int = 0) -> NDArray[np.int64]:
    """What each pixel shows, as (6, H, W); 0 is none.

    Colour, shape, a number's tens and units, small (1) or large (2), and the cell of what is there.
    """
    height, width = height or scene.height, width or scene.width
    out = np.zeros((6, height, width), dtype=np.int64)
    for thing in things_at(scene, time):
        mask, top, left = place_shape(thing, height, width)
        part, mask = _window(out, mask, top, left)
        part[0][mask > 0.5] = 1 + list(COLOURS).index(thing.colour)
        part[1][mask > 0.5] = 1 + SHAPES.index(thing.shape)
        part[4][mask > 0.5] = 1 + (thing.size == "large")
        part[5][mask > 0.5] = 1 + 3 * thing.row + thing.column
    for number in numbers_at(scene, time):
        plate, _, top, left = place_number(number, height, width)
        part, plate = _window(out, plate, top, left)
        part[2][plate > 0.5] = 1 + int(number.digits[0])
        part[3][plate > 0.5] = 1 + int(number.digits[1])
        part[4][plate > 0.5] = 1 + number.large
        part[5][plate > 0.5] = 1 + 3 * number.row + number.column
    return out


def _window(
    canvas: NDArray[np.int64], mask: Mask, top: int, left: int
) -> tuple[NDArray[np.int64], Mask]:
    """The part of (C, H, W) under a mask laid at (top, left), and the mask's part inside it."""
    height, width = canvas.shape[1:]
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + mask.shape[0], height), min(left + mask.shape[1], width)
    return canvas[:, y0:y1, x0:x1], mask[y0 - top : y1 - top, x0 - left : x1 - left]
