"""Pictures cut into tiles beside a base picture: LLaVA's "any resolution"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vtprune.errors import ModelError
from vtprune.models.preprocess import Recipe, finish, pad_to, resize
from vtprune.tokens.layout import NEWLINE, PATCH, Grid, box, join, single
from vtprune.tokens.units import WHOLE, Region

Size = tuple[int, int]
"""(height, width)"""


@dataclass(frozen=True)
class Plane:
    """The tiles of a picture, laid together, and the padding around the picture in them.

    Args:
        rows, cols: of tiles.
        above, before: rows of patches at the top (and bottom), columns on the left (and right),
            that are padding and become no tokens.
    """

    rows: int
    cols: int
    above: int = 0
    before: int = 0


def best_resolution(size: Size, resolutions: Sequence[Sequence[int]]) -> Size:
    """Return the resolution that keeps most of a picture's pixels, and of equals wastes least."""
    height, width = size
    best: Size | None = None
    most, least = 0, math.inf
    for rows, cols in resolutions:
        scale = min(cols / width, rows / height)
        useful = min(int(width * scale) * int(height * scale), width * height)
        wasted = rows * cols - useful
        if useful > most or (useful == most and wasted < least):
            most, least, best = useful, wasted, (rows, cols)
    assert best is not None, "a checkpoint has at least one resolution"
    return best


def fit_inside(size: Size, resolution: Size) -> Size:
    """Return the largest size of a picture's aspect inside `resolution`."""
    across, down = resolution[1] / size[1], resolution[0] / size[0]
    if across < down:
        return min(math.ceil(size[0] * across), resolution[0]), resolution[1]
    return resolution[0], min(math.ceil(size[1] * down), resolution[1])


def count_tiles(resolution: Size, tile: int) -> int:
    """Tiles of `resolution`, the base picture not counted."""
    return -(-resolution[0] // tile) * -(-resolution[1] // tile)


def largest(resolutions: Sequence[Sequence[int]], tile: int) -> Size:
    """Return the resolution with the most tiles; of equals, the one nearest to a square."""
    sizes = [(rows, cols) for rows, cols in resolutions]
    return max(sizes, key=lambda size: (count_tiles(size, tile), min(size)))


def limited_size(
    size: Size, resolutions: Sequence[Sequence[int]], tile: int, max_tiles: int | None
) -> Size:
    """Return the size to give the model so that it cuts a picture into at most `max_tiles` tiles.

    The model chooses the resolution from the size alone, so a limit has to be a smaller size: the
    picture shrunk to fit the best of the allowed resolutions. All others waste more on it, so the
    model chooses that one too; and the number of its tiles as a limit gives the same size again. A
    picture within the limit keeps its own size.

    Raises:
        ModelError: every resolution has more tiles than that.
    """
    if max_tiles is None or count_tiles(best_resolution(size, resolutions), tile) <= max_tiles:
        return size
    counts = [count_tiles((rows, cols), tile) for rows, cols in resolutions]
    if max_tiles < min(counts):
        raise ModelError(
            f"at most {max_tiles} tiles a picture; this model takes {min(counts)} or more",
            f"ask for at least {min(counts)} tiles",
        )
    pairs = zip(resolutions, counts, strict=True)
    allowed = [resolution for resolution, count in pairs if count <= max_tiles]
    return fit_inside(size, best_resolution(size, allowed))


def cut(
    pixels: torch.Tensor,
    input_size: Size,
    resolutions: Sequence[Sequence[int]],
    tile: int,
    recipe: Recipe,
) -> torch.Tensor:
    """(1, 3, H, W) uint8 -> (1 + tiles, 3, h, w) uint8: the base picture, then its tiles.

    Args:
        input_size: the size that the model is given, from `limited_size`.
        tile: side of a tile.
        recipe: `size` (the base picture's) and `crop` hold for every tile.
    """
    resolution = best_resolution(input_size, resolutions)
    inner = resize(pixels, fit_inside(input_size, resolution), recipe.resample)
    canvas = pad_to(inner, resolution, (0, 0, 0))
    tiles = [
        canvas[..., top : top + tile, left : left + tile]
        for top in range(0, resolution[0], tile)
        for left in range(0, resolution[1], tile)
    ]
    edge = recipe.size.get("shortest_edge", 0)
    base = (recipe.size.get("height", edge), recipe.size.get("width", edge))
    parts = [resize(pixels, base, recipe.resample), *tiles]
    return torch.cat([finish(part, recipe) for part in parts])


def regions(
    input_size: Size, resolutions: Sequence[Sequence[int]], tile: int
) -> tuple[Region, ...]:
    """Return the part of a picture that each of `cut`'s rows shows: the whole, then each tile."""
    resolution = best_resolution(input_size, resolutions)
    height, width = fit_inside(input_size, resolution)
    above, before = (resolution[0] - height) // 2, (resolution[1] - width) // 2
    tiles = [
        (
            (top - above) / height,
            (left - before) / width,
            (top + tile - above) / height,
            (left + tile - before) / width,
        )
        for top in range(0, resolution[0], tile)
        for left in range(0, resolution[1], tile)
    ]
    return (WHOLE, *tiles)


def tiled_grid(
    size: Size,
    resolutions: Sequence[Sequence[int]],
    tile: int,
    side: int,
    max_tiles: int | None = None,
) -> Grid:
    """Return the grid of a tiled picture: the base picture, then rows that end in a newline.

    Padding is cut off, so the first row may lie inside its tile; above `max_tiles` tiles' worth of
    tokens the rest is interpolated to fewer, and a token belongs to the tile its centre lies in.

    Args:
        size: (height, width) that the model was given.
        tile: side of a tile in pixels.
        side: side of a tile in tokens.
        max_tiles: N of "anyres_max_N"; None never interpolates.
    """
    plane = plane_of(size, resolutions, tile, side)
    across, above, before = plane.cols, plane.above, plane.before
    rows, cols = plane.rows * side - 2 * above, across * side - 2 * before
    num_rows, num_cols = _shrunk(rows, cols, side, max_tiles)
    row, col = torch.meshgrid(
        torch.arange(num_rows), torch.arange(num_cols + 1), indexing="ij"
    )  # (R, C + 1), the last column newlines
    inner_col = col.clamp(max=max(num_cols - 1, 0))
    # Centres: (index + 1/2) * old / new, in whole numbers.
    in_row = above + (2 * row + 1) * rows // (2 * max(num_rows, 1))
    in_col = before + (2 * inner_col + 1) * cols // (2 * max(num_cols, 1))
    number = 1 + in_row // side * across + (in_col // side).clamp(max=across - 1)
    kind = torch.where(col == num_cols, NEWLINE, PATCH)
    packed = [part.reshape(-1) for part in (torch.zeros_like(row), number, row, col, kind)]
    return join([box(1, side, side), Grid(*packed)])


def plane_of(size: Size, resolutions: Sequence[Sequence[int]], tile: int, side: int) -> Plane:
    """Return how a picture's tiles are laid together; arguments as for `tiled_grid`."""
    resolution = best_resolution(size, resolutions)
    rows, cols = resolution[0] // tile, resolution[1] // tile
    return Plane(rows, cols, *_padding(size, rows * side, cols * side))


def is_shrunk(
    size: Size, resolutions: Sequence[Sequence[int]], tile: int, side: int, max_tiles: int
) -> bool:
    """Return whether a picture's tokens are interpolated to fewer, across its tiles' borders."""
    plane = plane_of(size, resolutions, tile, side)
    rows = plane.rows * side - 2 * plane.above
    cols = plane.cols * side - 2 * plane.before
    return _shrunk(rows, cols, side, max_tiles) != (rows, cols)


def _shrunk(rows: int, cols: int, side: int, max_tiles: int | None) -> tuple[int, int]:
    """Return the rows and columns of tokens that are left of a picture's own."""
    if max_tiles is None:
        return rows, cols
    ratio = math.sqrt(rows * cols / (max_tiles * side**2))
    return (int(rows // ratio), int(cols // ratio)) if ratio > 1.1 else (rows, cols)


def plain_grid(side: int) -> Grid:
    """Return the coordinates of an untiled picture's tokens: side x side and one newline."""
    return join([box(1, side, side), single(NEWLINE, row=side - 1, col=side)])


def _padding(size: Size, rows: int, cols: int) -> tuple[int, int]:
    """Return the rows of padding above (and below), and the columns before (and after)."""
    height, width = size
    if width / height > cols / rows:
        return (rows - int(round(height * (cols / width), 7))) // 2, 0
    return 0, (cols - int(round(width * (rows / height), 7))) // 2
