"""Where visual tokens sit, as far as the runs of their placeholders and a few sizes tell it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from vtprune.models import splitting
from vtprune.tokens.layout import NEWLINE, SEPARATOR, Grid, box, join, single

APART = 4
"""The most other tokens between two runs of one media item; more are text between two items."""


def grids_of_patches(
    shapes: Sequence[tuple[int, int, int]], count: int, merge: int
) -> list[Grid] | None:
    """Return the grids of media items, or of tiles, whose patches are merged to tokens.

    Args:
        shapes: steps, rows and columns of the patches of each.
        count: the tokens of all of them.
        merge: patches along a side of a token, as the config has it.

    Returns:
        None where the tokens are not those patches.
    """
    patches = sum(math.prod(shape) for shape in shapes)
    if not count or not patches:
        return None
    sides = dict.fromkeys((merge, max(1, round(math.sqrt(patches / count)))))
    for side, up in itertools.product(sides, (True, False)):
        rest = side - 1 if up else 0  # of patches at the edge, which are a token or left out
        sizes = [(t, (rows + rest) // side, (cols + rest) // side) for t, rows, cols in shapes]
        if sum(math.prod(size) for size in sizes) == count:
            return [box(*size) for size in sizes]
        lines = sum(time * rows * (cols + 1) for time, rows, cols in sizes)
        around = (count - lines) // len(shapes)
        single_steps = all(time == 1 for time, _, _ in sizes)
        if single_steps and around in (0, 1, 2) and lines + around * len(shapes) == count:
            return [_with_newlines(rows, cols, around) for _, rows, cols in sizes]
    return None


def _with_newlines(rows: int, cols: int, around: int) -> Grid:
    """Return rows that each end in a newline, and one token behind, or before and behind them."""
    grid = box(1, rows, cols + 1)
    kind = torch.where(grid.col == cols, NEWLINE, grid.kind)
    parts = [Grid(grid.frame, grid.tile, grid.row, grid.col, kind)]
    if around:
        parts.append(single(SEPARATOR, row=rows))
    if around > 1:
        parts.insert(0, single(SEPARATOR))
    return join(parts)


def grid_of_runs(
    ids: torch.Tensor,
    columns: torch.Tensor,
    frames: int = 0,
    tiles: int = 1,
    size: tuple[int, int] | None = (1, 1),
) -> Grid:
    """Return the grid of a media item from its runs of placeholders.

    Runs with the same single token between all of them are the rows of a picture; others are its
    tiles, or the frames of a video. A run of a square number of tokens has as many rows as columns.

    Args:
        ids: (S,) of the prompt.
        columns: (n,) ascending columns of the item's placeholders.
        frames: of a video, or steps of several; 0 for a picture.
        tiles: of a picture, for one whose tiles share a run.
        size: (height, width) of what a tile or frame shows, or anything in that proportion; None:
            its tokens are no places in it.
    """
    lengths = splitting.runs(columns)
    if not frames and _are_rows(ids, columns, lengths):
        return box(1, len(lengths), lengths[0])
    parts = len(lengths) if len(lengths) > 1 else frames or tiles
    if frames and len(lengths) > frames and len(lengths) % frames == 0:  # several runs a frame
        runs = len(lengths) // frames
        lengths = [sum(lengths[at : at + runs]) for at in range(0, len(lengths), runs)]
    elif len(lengths) != parts:
        total = len(columns)
        lengths = [total // parts] * parts if total % parts == 0 else [total]
    blocks = [_block(length, size) for length in lengths]
    if frames and len(blocks) > 1:
        return join([block.at_frame(number) for number, block in enumerate(blocks)])
    return below_each_other(blocks)


def is_flat(grid: Grid) -> bool:
    """Return whether every frame and tile of a grid is one row of tokens."""
    frame_and_tile = torch.unique(torch.stack([grid.frame, grid.tile]), dim=1).shape[1]
    rows = torch.unique(torch.stack([grid.frame, grid.tile, grid.row]), dim=1).shape[1]
    return len(grid) > frame_and_tile == rows


def split_items(ids: torch.Tensor, columns: torch.Tensor, count: int | None) -> list[torch.Tensor]:
    """Return the columns of each media item of a prompt.

    Args:
        ids: (S,) of the prompt.
        columns: (n,) ascending columns of the placeholders of all of them.
        count: how many items there are; None: runs with little between them are one item's.
    """
    lengths = splitting.runs(columns)
    if not lengths:
        return []
    runs = columns.split(lengths)
    gaps = [int(after[0] - before[-1]) - 1 for before, after in itertools.pairwise(runs)]
    if count is None:
        borders = [number for number, gap in enumerate(gaps) if gap > APART]
    else:  # the widest gaps
        widest = sorted(range(len(gaps)), key=lambda number: gaps[number], reverse=True)
        borders = sorted(widest[: count - 1])
    edges = [0, *(border + 1 for border in borders), len(runs)]
    return [torch.cat(runs[start:end]) for start, end in itertools.pairwise(edges)]


def _are_rows(ids: torch.Tensor, columns: torch.Tensor, lengths: Sequence[int]) -> bool:
    """Return whether runs are of one length, and one and the same token is between all of them."""
    if len(lengths) < 2 or len(set(lengths)) > 1:
        return False
    after = columns[lengths[0] - 1 :: lengths[0]][:-1] + 1
    apart = columns[lengths[0] :: lengths[0]] - after
    return bool((apart == 1).all()) and len(set(ids[after].tolist())) == 1


def _block(count: int, size: tuple[int, int] | None) -> Grid:
    """Return the grid of one tile or frame: as many rows as its proportions say, else one."""
    if size is None:
        return box(1, 1, count)
    height, width = size
    rows = math.isqrt(count * height // width)
    for down in (rows, rows + 1):
        if down and count % down == 0 and down * width == count // down * height:
            return box(1, down, count // down)
    return box(1, 1, count)


def below_each_other(tiles: Sequence[Grid]) -> Grid:
    """Return tiles, numbered from 1 on, one below the other: how else they lie is not known."""
    if len(tiles) == 1:
        return tiles[0]
    laid, top = [], 0
    for number, tile in enumerate(tiles, start=1):
        which = torch.full_like(tile.tile, number)
        laid.append(Grid(tile.frame, which, tile.row + top, tile.col, tile.kind))
        top += int(tile.row.max()) + 1
    return join(laid)
