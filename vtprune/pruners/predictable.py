"""Drop the frames and tiles whose pixels the kept ones before them predict.

Idea: a frame is dropped if it repeats the last kept frame of its video; a tile of a picture is
dropped if it is one plain colour, or if the enlarged base picture shows the same. Frames and tiles
are dropped whole, before the vision tower encodes them.

Why it works: still scenes, slides and page margins come again and again, and the tower, most of the
time to the first token of a video, encodes each of them anew.

Paper: none for whole frames and tiles; for patches PixelPrune, which is exact at tolerance 0.
Official code: not looked at.
Differences: PixelPrune predicts a patch from its neighbours and runs the tower on the rest, which
changes what the rest attends to. Here only what the tower encodes on its own goes, so that the rest
is as if its tokens had been dropped after the tower. Positions are kept. The first frame of a video
and the base picture always stay. Where a budget asks for more, what is most predictable goes next,
each frame compared with the kept one before it, until the tokens fit; then what still fits comes
back, least predictable first.

Options:
    tolerance: 2 (default); the most levels, of 255, by which what goes may differ, on average over
        the block of 16 x 16 pixels and the colour where it differs most. 0 drops only what is equal
        bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from vtprune.tokens.units import Region, Units, count_tokens

BLOCK = 16
"""Pixels along a side of a block: a small moving object fills a block, but little of a frame."""


@dataclass(frozen=True)
class Predictable:
    tolerance: float = 2.0

    def keep(self, units: Units) -> list[int]:
        kept: list[int] = []
        for number in range(len(units)):
            if error(units, number, kept) > self.tolerance:
                kept.append(number)
        return kept

    def shrink(
        self,
        media: Sequence[Units],
        kept: Sequence[Sequence[int]],
        sizes: Sequence[Sequence[int]],
        most: int,
    ) -> list[list[int]]:
        remaining = [list(numbers) for numbers in kept]
        total = count_tokens(remaining, sizes)
        errors = {
            (item, number): error(media[item], number, numbers[:place])
            for item, numbers in enumerate(remaining)
            for place, number in enumerate(numbers)
        }
        dropped: list[tuple[int, int]] = []
        while total > most:
            item, number = min(errors, key=lambda unit: errors[unit])
            if errors.pop((item, number)) == math.inf:
                break
            place = remaining[item].index(number)
            remaining[item].remove(number)
            for after in remaining[item][place : place + 1]:
                errors[item, after] = error(media[item], after, remaining[item][:place])
            dropped.append((item, number))
            total -= sizes[item][number]
        for item, number in reversed(dropped):
            if total + sizes[item][number] <= most:
                remaining[item].append(number)
                total += sizes[item][number]
        return [sorted(numbers) for numbers in remaining]


def error(units: Units, number: int, before: Sequence[int]) -> float:
    """Return by how many levels a unit differs from its prediction, in its worst block.

    Args:
        before: the kept units before it, ascending.

    Returns:
        Infinity for the unit that always stays.
    """
    if number == units.base:
        return math.inf
    pixels = units.unit(number)
    if units.modality == "video":
        return largest_block(pixels.int() - units.unit(before[-1]).int())
    plain = largest_block(pixels.float() - middle(pixels))
    enlarged = enlarge(units.unit(units.base), units.regions[number], pixels.shape[-2:])
    return min(plain, largest_block(pixels.float() - enlarged))


def largest_block(differences: torch.Tensor) -> float:
    """Return the mean absolute difference of the block and colour where it is largest.

    Args:
        differences: (G, 3, h, w); blocks at the right and lower edge may be smaller.
    """
    means = functional.avg_pool2d(
        differences.abs().float(), BLOCK, ceil_mode=True, count_include_pad=False
    )
    return float(means.max())


def middle(pixels: torch.Tensor) -> torch.Tensor:
    """(1, 3, 1, 1) float: the middle of each colour; of one plain colour that colour itself."""
    return (pixels.amax((-2, -1), keepdim=True).float() + pixels.amin((-2, -1), keepdim=True)) / 2


def enlarge(base: torch.Tensor, region: Region, size: Sequence[int]) -> torch.Tensor:
    """Return a part of the base picture at the size of a tile, in whole levels.

    Args:
        base: (1, 3, h, w).
        region: what of the picture it shows; black past the picture's edges.
        size: (height, width) of the tile.

    Returns:
        (1, 3, *size) float, bilinear.
    """
    top, left, bottom, right = region
    down = top + (torch.arange(size[0]) + 0.5) / size[0] * (bottom - top)
    across = left + (torch.arange(size[1]) + 0.5) / size[1] * (right - left)
    rows, cols = torch.meshgrid(down, across, indexing="ij")
    points = torch.stack([cols, rows], dim=-1)[None]  # (1, H, W, 2) in 0..1
    sampled = functional.grid_sample(
        base.float(), 2 * points - 1, padding_mode="border", align_corners=False
    )
    inside = ((points >= 0) & (points <= 1)).all(-1)
    return torch.where(inside, sampled.round(), 0.0)
