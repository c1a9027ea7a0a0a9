"""Pictures split into tiles with the whole picture last, and their tokens in a prompt."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from vtprune.tokens.layout import Grid, box, join
from vtprune.tokens.units import WHOLE, Region


def split_grid(rows: int, cols: int, side: int) -> Grid:
    """Return the coordinates of rows x cols tiles, row by row, then of the base picture (tile 0).

    Args:
        rows, cols: of tiles; 1 x 1 or 0 x 0 is a picture that was not split.
        side: of a tile in tokens.
    """
    base = box(1, side, side)
    if rows * cols <= 1:
        return base
    tiles = []
    for number in range(rows * cols):
        top, left = number // cols * side, number % cols * side
        tile = box(1, side, side, tile=1 + number)
        tiles.append(Grid(tile.frame, tile.tile, tile.row + top, tile.col + left, tile.kind))
    return join([*tiles, base])


def squarest(most: int) -> tuple[int, int]:
    """Return the rows and columns of `most` tiles: nearest to a square, rather wide than high."""
    rows = next(rows for rows in range(math.isqrt(most), 0, -1) if most % rows == 0)
    return rows, most // rows


def cut(pixels: torch.Tensor, edge: int) -> torch.Tensor:
    """(1, 3, rows x edge, cols x edge) -> (rows x cols, 3, edge, edge), row by row."""
    height, width = pixels.shape[-2:]
    tiles = pixels.reshape(3, height // edge, edge, width // edge, edge)
    return tiles.permute(1, 3, 0, 2, 4).reshape(-1, 3, edge, edge)


def regions(rows: int, cols: int) -> tuple[Region, ...]:
    """Return the part of a picture that each tile shows, row by row, then the whole.

    Args:
        rows, cols: of tiles; 1 x 1 or 0 x 0 is a picture that was not split.
    """
    if rows * cols <= 1:
        return (WHOLE,)
    tiles = [
        (row / rows, col / cols, (row + 1) / rows, (col + 1) / cols)
        for row in range(rows)
        for col in range(cols)
    ]
    return (*tiles, WHOLE)


def tokens_of_prompts(ids: torch.Tensor, token: int, total: int) -> list[torch.Tensor] | None:
    """Return the columns of a placeholder in each prompt, repeated prompts once.

    Args:
        ids: (B, S) of the batch, where beams and several answers repeat a prompt.
        total: how many tokens were encoded.

    Returns:
        None where they are no multiple of that.
    """
    visual = ids == token
    have = int(visual.sum())
    if not total or not have or have % total or len(ids) % (have // total):
        return None
    return [row.nonzero().squeeze(1) for row in visual[:: have // total]]


def runs(columns: torch.Tensor) -> list[int]:
    """Return the lengths of the unbroken runs of ascending columns."""
    if not len(columns):
        return []
    breaks = (columns.diff() > 1).nonzero().squeeze(1) + 1
    edges = [0, *breaks.tolist(), len(columns)]
    return [end - start for start, end in itertools.pairwise(edges)]


def arrangements(pictures: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Return the rows and columns of the tiles of pictures, (n, 3, H, W) with the whole one last.

    No input says it, so it is the arrangement that looks most like the whole picture. All pictures
    are read from the device at once.
    """
    possible = [_shapes(max(len(pixels) - 1, 1)) for pixels in pictures]
    apart = [
        _apart_from_whole(pixels, *shape)
        for pixels, shapes in zip(pictures, possible, strict=True)
        for shape in shapes
        if len(shapes) > 1
    ]
    read = iter(torch.stack(apart).tolist() if apart else ())
    return [
        min(shapes, key=lambda _: float(next(read))) if len(shapes) > 1 else shapes[0]
        for shapes in possible
    ]


def _shapes(num_tiles: int) -> list[tuple[int, int]]:
    """Return all rows and columns that so many tiles can be in."""
    rows = range(1, num_tiles + 1)
    return [(count, num_tiles // count) for count in rows if not num_tiles % count]


def _apart_from_whole(pixels: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Return how far tiles in so many rows and columns are from the whole picture: () float32."""
    small = functional.adaptive_avg_pool2d(pixels[:-1].float(), 4)  # (n, 3, 4, 4)
    joined = small.view(rows, cols, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(3, rows * 4, -1)
    base = functional.adaptive_avg_pool2d(pixels[-1].float(), (rows * 4, cols * 4))
    return (joined - base).square().mean()


def parse_markers(ids: Sequence[int], columns: Sequence[int], unit: int) -> list[tuple[int, int]]:
    """Return the rows and columns of each picture's tiles, from the markers of a prompt.

    A tile is a marker's name, written after a token that also closes a picture; a row ends in a
    line break. So between two tiles of a row there is one such token, and it comes first; at the
    end of a row it does not; and between two pictures there are two or more.

    Args:
        ids: of the prompt.
        columns: of its placeholders, ascending.
        unit: placeholders a tile.

    Returns:
        One a picture; (0, 0) for one that was not split.
    """
    starts, ends = columns[::unit], columns[unit - 1 :: unit]
    close = ids[ends[-1] + 1] if ends[-1] + 1 < len(ids) else -1
    pictures: list[tuple[int, int]] = []
    count, across = 1, 0  # tiles of this picture so far, and in its first row

    def finish() -> None:
        rows = (count - 1) // across if across else 0
        pictures.append((rows, across) if rows * across == count - 1 else (1, count - 1))

    for end, start in zip(ends, starts[1:], strict=False):
        between = list(ids[end + 1 : start])
        if between.count(close) > 1 or not between:
            finish()
            count, across = 1, 0
            continue
        if between[0] != close and not across:
            across = count
        count += 1
    finish()
    return [(rows, cols) if rows * cols else (0, 0) for rows, cols in pictures]
