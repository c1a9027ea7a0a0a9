"""Drop what a picture repeats of the picture before it.

Idea: of two pictures of the same size, one after the other in a prompt, the patches of the second
go that show what is at the same place of the first: of screenshots, all but what changed. A tile or
a whole picture of which nothing is left is not encoded.

Why it works: the screens of a session are alike but for a window or a line, and each of them is
thousands of tokens.

Paper: none for pictures one after the other; EVS does so for the frames of a video, by features.
Official code: none.
Differences: pixels are compared before the vision tower, so that nothing is encoded in order to be
dropped. What is compared with is not the picture before but what was last kept at that place, so
that a slow change does not go unseen. A picture of another size is compared with the nearest
earlier one of its own size. Where patches do not fill a picture evenly (384 pixels in 27 patches),
those beside a change stay too. Where tiles overlap or are cut to the picture's shape, a tile goes
whole or not at all. The tower encodes what is left of a picture or a tile in full, since its
patches attend to each other: tokens of single patches go at the language model's input. Positions
are kept. The first picture always stays. A budget takes more, least changed first.

Options:
    tolerance: 2 (default); the most levels, of 255, by which any block of 4 x 4 pixels of what goes
        may differ, on average and in the colour where it differs most. 0 drops only what is equal
        bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from vtprune.tokens.units import Region, Units

BLOCK = 4
"""Pixels along a side of a block: about a stroke of small text."""


@dataclass(frozen=True)
class Repeated:
    tolerance: float = 2.0

    def keep_patches(
        self,
        media: Sequence[Units],
        grids: Sequence[Sequence[tuple[int, int]]],
        sizes: Sequence[Sequence[int]],
        most: int | None,
    ) -> list[list[torch.Tensor]]:
        last: dict[tuple[torch.Size, tuple[Region, ...]], torch.Tensor] = {}
        changes: list[list[torch.Tensor]] = []
        for units, of_item in zip(media, grids, strict=True):
            key = (units.pixels.shape, units.regions)
            if key not in last:
                changes.append([torch.full(grid, math.inf) for grid in of_item])
                last[key] = units.pixels.clone()
                continue
            of_units = []
            for number, grid in enumerate(of_item):
                new, old = (rows_of(units, number, pixels) for pixels in (units.pixels, last[key]))
                change = patch_changes(new, old, grid)
                stays = enlarge(change > self.tolerance, new.shape[-2:])
                old.copy_(torch.where(stays, new, old))
                of_units.append(change)
            changes.append(of_units)
        threshold = self.tolerance
        if most is not None:
            threshold = max(threshold, smallest_threshold(changes, sizes, most))
        return [[change > threshold for change in of_item] for of_item in changes]


def rows_of(units: Units, number: int, pixels: torch.Tensor) -> torch.Tensor:
    """Return the part of a picture's pixels that is one unit, as a view: (r, 3, h, w)."""
    return pixels if units.in_one_piece else pixels[number : number + 1]


def patch_changes(new: torch.Tensor, old: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return (R, C) float32: by how many levels each patch differs, in its worst block.

    Args:
        new, old: (r, 3, h, w) uint8.
        grid: (R, C).
    """
    height, width = new.shape[-2:]
    apart = (new.int() - old.int()).abs().float()
    blocks = functional.avg_pool2d(apart, BLOCK, ceil_mode=True, count_include_pad=False)
    worst = blocks.amax((0, 1))  # (h / BLOCK, w / BLOCK)
    worst = worst.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:height, :width]
    change = functional.adaptive_max_pool2d(worst[None], grid)
    if height % grid[0] or width % grid[1]:
        change = functional.max_pool2d(change, 3, stride=1, padding=1)
    return change[0]


def enlarge(patches: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return (h, w) bool of (R, C): each pixel as the patch that it is in."""
    rows = torch.arange(size[0]) * patches.shape[0] // size[0]
    columns = torch.arange(size[1]) * patches.shape[1] // size[1]
    return patches[rows][:, columns]


def smallest_threshold(
    changes: Sequence[Sequence[torch.Tensor]], sizes: Sequence[Sequence[int]], most: int
) -> float:
    """Return the level above which at most `most` tokens differ, infinity left out.

    Args:
        sizes: tokens of every unit; of one that is not told apart, all go together.
    """
    levels: list[float] = []
    for of_item, of_sizes in zip(changes, sizes, strict=True):
        for change, size in zip(of_item, of_sizes, strict=True):
            alone = change.numel() == 1
            levels += change.flatten().tolist() * (size if alone else 1)
    levels.sort(reverse=True)
    if len(levels) <= most:
        return 0.0
    return next((level for level in levels[most:] if level < math.inf), 0.0)
