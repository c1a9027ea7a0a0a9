"""From what a vision tower's patches receive to what the visual tokens made of them receive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from vtprune.models.anyres import Plane
from vtprune.tokens.layout import CLS, PATCH, Grid, Layout

Maps = Sequence[torch.Tensor] | torch.Tensor
"""What the tokens of each row of a tower receive, (S,) float32; (0,) for a row that did not run."""


class MisfitError(Exception):
    """The rows of a tower are not those of the visual tokens."""


class Footprint(Protocol):
    """How a tower's rows become the tokens of a media item."""

    def count(self, number: int, grid: Grid) -> int:
        """How many rows item `number` takes.

        Raises:
            MisfitError: there is no such item.
        """
        ...

    def spread(self, number: int, grid: Grid, maps: Maps) -> torch.Tensor:
        """(n,) float32 of the item's tokens, from its rows."""
        ...


@dataclass(frozen=True)
class Panes:
    """Each frame or tile is a row; its patches are pooled to its grid of tokens.

    Args:
        has_cls: each row begins with a CLS token.
    """

    has_cls: bool

    def count(self, number: int, grid: Grid) -> int:
        return len(_panes(grid))

    def spread(self, number: int, grid: Grid, maps: Maps) -> torch.Tensor:
        panes = zip(_panes(grid), maps, strict=True)
        return torch.cat([self.of_pane(grid.take(index), one) for index, one in panes])

    def of_pane(self, grid: Grid, received: torch.Tensor) -> torch.Tensor:
        """(n,) of one row's tokens.

        A CLS token gets the most that any of the row gets; what no patch stands behind, nothing.
        """
        found = received.new_zeros(len(grid))
        if not len(received):
            return found
        patch = (grid.kind == PATCH).nonzero().squeeze(1)
        row, col = grid.row[patch], grid.col[patch]
        shape = int(row.max() - row.min()) + 1, int(col.max() - col.min()) + 1
        pooled = pool(unflatten(received[int(self.has_cls) :], shape), shape)
        found[patch.to(found.device)] = _look_up(pooled, row - row.min(), col - col.min())
        cls = (grid.kind == CLS).to(found.device)
        return torch.where(cls, received.max(), found)


@dataclass(frozen=True)
class Tiles:
    """A base picture, and tiles that are laid together, cut to the picture, perhaps made smaller.

    Args:
        planes: how each item's tiles lie; None for one that has none.
    """

    has_cls: bool
    planes: Sequence[Plane | None]

    def count(self, number: int, grid: Grid) -> int:
        if number >= len(self.planes):
            raise MisfitError
        plane = self.planes[number]
        return 1 + (plane.rows * plane.cols if plane else 0)

    def spread(self, number: int, grid: Grid, maps: Maps) -> torch.Tensor:
        plane, panes = self.planes[number], Panes(self.has_cls)
        if plane is None:
            return panes.of_pane(grid, maps[0])
        base = (grid.tile == 0).nonzero().squeeze(1)
        inside = ((grid.tile > 0) & (grid.kind == PATCH)).nonzero().squeeze(1)
        found = maps[0].new_zeros(len(grid))
        found[base.to(found.device)] = panes.of_pane(grid.take(base), maps[0])
        row, col = grid.row[inside], grid.col[inside]
        if not len(row):  # a picture so narrow that all of it is cut off
            return found
        shape = int(row.max()) + 1, int(col.max()) + 1
        found[inside.to(found.device)] = _look_up(pool(self.lay(plane, maps[1:]), shape), row, col)
        return found

    def lay(self, plane: Plane, maps: Maps) -> torch.Tensor:
        """(R, C) patches of the tiled picture, its padding cut off."""
        tiles = torch.stack(filled(maps))[:, int(self.has_cls) :]
        side = math.isqrt(tiles.shape[1])
        if side**2 != tiles.shape[1]:
            raise MisfitError
        whole = tiles.view(plane.rows, plane.cols, side, side).transpose(1, 2)
        whole = whole.reshape(plane.rows * side, plane.cols * side)
        rows, cols = whole.shape
        return whole[plane.above : rows - plane.above, plane.before : cols - plane.before]


@dataclass(frozen=True)
class Blocks:
    """Each time step is a row, in which the patches of one token follow one another.

    Args:
        size: patches of one token.
        window: side in tokens of the windows that the tower goes through one by one; 0: it goes
            row by row.
    """

    size: int
    window: int = 0

    def count(self, number: int, grid: Grid) -> int:
        return len(grid.frame.unique())

    def spread(self, number: int, grid: Grid, maps: Maps) -> torch.Tensor:
        parts = []
        for frame, received in zip(grid.frame.unique().tolist(), maps, strict=True):
            index = (grid.frame == frame).nonzero().squeeze(1)
            found = received.new_zeros(len(index))
            if len(received) not in (0, len(index) * self.size):
                raise MisfitError
            if len(received):
                order = self.order(grid.take(index))
                found[order.to(found.device)] = received.view(-1, self.size).mean(1)
            parts.append(found)
        return torch.cat(parts)

    def order(self, grid: Grid) -> torch.Tensor:
        """(n,) index of one step's tokens as the tower goes through them."""
        if not self.window:
            return torch.arange(len(grid))
        row, col = grid.row // self.window, grid.col // self.window
        return (row * (int(col.max()) + 1) + col).argsort(stable=True)


@dataclass(frozen=True)
class Gathered:
    """Each token says which patches it is made of; a row here is one token: `gather_patches`."""

    def count(self, number: int, grid: Grid) -> int:
        return len(grid)

    def spread(self, number: int, grid: Grid, maps: Maps) -> torch.Tensor:
        assert isinstance(maps, torch.Tensor)
        return maps


def gather_patches(maps: Maps, pooling: torch.Tensor) -> torch.Tensor:
    """(n,) float32 of the tokens made of the patches `pooling`, (n, p), -1 for none.

    Patches are counted over all rows of the tower one after the other.
    """
    patches = torch.cat(filled(maps))
    if int(pooling.max()) >= len(patches):
        raise MisfitError
    pooling = pooling.to(patches.device)
    used = pooling >= 0
    total = (patches[pooling.clamp_min(0)] * used).sum(1)
    return (total / used.sum(1).clamp_min(1))[used.any(1)]


def filled(maps: Maps) -> list[torch.Tensor]:
    """The rows, zeros in place of those that did not run."""
    size = max((len(one) for one in maps), default=0)
    return [one if len(one) else one.new_zeros(size) for one in maps]


def distribute(
    layouts: Sequence[Layout], own: Sequence[torch.Tensor], maps: Maps, footprint: Footprint
) -> list[torch.Tensor]:
    """For every sample the scores of its tokens at `own`, (n,) float32 each.

    Samples may be repeated, each as often (beams, several return sequences).

    Raises:
        MisfitError: the rows are not those of the tokens.
    """
    for repeat in range(1, len(layouts) + 1):
        if len(layouts) % repeat:
            continue
        items = [_items(layout.take(index)) for layout, index in zip(layouts, own, strict=True)]
        firsts = items[::repeat]
        alike = all(
            [len(grid) for grid in one] == [len(grid) for grid in firsts[number // repeat]]
            for number, one in enumerate(items)
        )
        scores = _score(firsts, maps, footprint) if alike else None
        if scores is not None:
            return [scores[number // repeat] for number in range(len(layouts))]
    raise MisfitError


def _score(
    samples: Sequence[Sequence[Grid]], maps: Maps, footprint: Footprint
) -> list[torch.Tensor] | None:
    """Scores of every sample's items; None where they do not take up all rows."""
    grids = [grid for items in samples for grid in items]
    try:
        counts = [footprint.count(number, grid) for number, grid in enumerate(grids)]
    except MisfitError:
        return None
    if sum(counts) != len(maps):
        return None
    found, at = [], 0
    for number, (grid, count) in enumerate(zip(grids, counts, strict=True)):
        found.append(footprint.spread(number, grid, maps[at : at + count]))
        at += count
    scores = []
    for items in samples:
        own, found = found[: len(items)], found[len(items) :]
        scores.append(torch.cat(own) if own else torch.zeros(0))
    return scores


def _items(layout: Layout) -> list[Grid]:
    """The grid of every media item, in order."""
    numbers = layout.media.unique().tolist()
    return [layout.grid.take((layout.media == one).nonzero().squeeze(1)) for one in numbers]


def _panes(grid: Grid) -> list[torch.Tensor]:
    """Index of the tokens of every frame or tile, in the order of the prompt."""
    key = torch.stack([grid.frame, grid.tile])
    sizes = torch.unique_consecutive(key, dim=1, return_counts=True)[1].tolist()
    return list(torch.arange(len(grid)).split(sizes))


def _look_up(values: torch.Tensor, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    return values[row.to(values.device), col.to(values.device)]


def unflatten(patches: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """(R, C) of patches (R x C,), which a grid of `shape` was made of by joining squares of them.

    Raises:
        MisfitError: that can't be.
    """
    joined = math.isqrt(len(patches) // (shape[0] * shape[1]))
    if joined and shape[0] * shape[1] * joined**2 == len(patches):
        return patches.view(shape[0] * joined, shape[1] * joined)
    side = math.isqrt(len(patches))
    if side**2 != len(patches) or side < max(shape):
        raise MisfitError
    return patches.view(side, side)


def pool(patches: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """(R, C) patches as a grid of `shape`: the mean of squares of them, cut off at the right and
    below; else bilinear, as models interpolate what is no multiple."""
    rows, cols = patches.shape
    side = max(rows // shape[0], 1)
    if (rows // side, cols // side) == shape:
        return functional.avg_pool2d(patches[None], side)[0]
    return functional.interpolate(patches[None, None], shape, mode="bilinear")[0, 0]
