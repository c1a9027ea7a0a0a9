"""Average the visual tokens of rectangular windows.

Idea: cut the grid of each picture, tile or frame into windows, and put the mean of its tokens in
the place of each window.

Why it works: neighbouring patches look alike, so their mean says most of what they say; it is what
encoding a smaller picture would do, at the price of the larger one.

Paper: none; a baseline.
Official code: none.
Differences: none. The windows are the smallest whose number fits the quota, so fewer tokens than
the budget may be kept: a picture of R x C is cut into ceil(R / h) x ceil(C / w) windows, as even as
whole tokens allow, for the least w and h >= 1 that fit, where h is w or the next smaller side that
makes a difference; they are the same in all pictures, tiles and frames of a group. Tokens that are
not patches are averaged among their own kind: the newlines of one row of windows become one
newline. Where a quota is too small for a window a picture, they are dropped; where it still is,
pictures or frames that follow each other are averaged too. A mean takes the place, and the
position, of the token nearest its window's centre (the earlier of two); features that a model adds
in later layers (Qwen3-VL) are that token's alone.

Options: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from vtprune.pruners.base import Budget, Selection, VisualTokens, best_first
from vtprune.tokens.layout import KINDS, PATCH, Layout


@dataclass(frozen=True)
class Pool:
    needs = ()

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        panes = pane_coordinates(tokens.layout)
        window = torch.full((len(tokens),), -1)
        windows_of: dict[object, torch.Tensor] = {}  # frames are mostly alike
        num_windows = 0
        for group, quota in enumerate(budget.quota.tolist()):
            if not quota:
                continue
            members = (budget.group == group).nonzero().squeeze(1)
            coordinates = panes[:, members]
            coordinates[0] = coordinates[0].unique(return_inverse=True)[1]
            key = (quota, coordinates.numpy().tobytes())
            if key not in windows_of:
                windows_of[key] = smallest_windows(coordinates, quota)
            windows = windows_of[key]
            window[members] = torch.where(windows >= 0, windows + num_windows, -1)
            num_windows += int(windows.max()) + 1
        return average(window, panes)


def pane_coordinates(layout: Layout) -> torch.Tensor:
    """(4, N) int64: pane (a picture, tile or frame), row and column in it, kind of token.

    Rows and columns start at 0 in every pane; in one without patches all tokens count as patches.
    """
    grid, pane = layout.grid, layout.groups("tile")
    patch = grid.kind == PATCH
    has_patches = torch.zeros_like(pane).index_add_(0, pane, patch.long())[pane] > 0
    kind = torch.where(has_patches, grid.kind, PATCH)
    rows = [
        at - torch.zeros_like(at).scatter_reduce(0, pane, at, "amin", include_self=False)[pane]
        for at in (grid.row, grid.col)
    ]
    return torch.stack([pane, *rows, kind])


def smallest_windows(panes: torch.Tensor, quota: int) -> torch.Tensor:
    """(n,) int64 window of each token, from 0 and at most `quota` of them; -1 for no window.

    Args:
        panes: (4, n) from `pane_coordinates`, of one group; its panes numbered from 0.
        quota: at least 1.
    """
    pane, row, col, kind = panes
    num = pane.shape[0]
    if quota >= num:
        return torch.arange(num)
    patch = kind == PATCH
    num_panes = int(pane.max()) + 1
    extents = torch.stack(
        [
            torch.zeros(num_panes, dtype=torch.long).scatter_reduce(
                0, pane, torch.where(patch, at + 1, 1), "amax"
            )
            for at in (row, col)
        ]
    )  # (2, P) rows and columns of patches
    # The number of windows changes where a side is a whole share of some pane's rows or columns.
    lengths = set(extents.flatten().tolist())
    sides = sorted({length / n for length in lengths for n in range(1, length + 1)})
    shapes = [(1.0, 1.0)]
    for side, after in pairwise(sides):
        shapes += [(side, after), (after, after)]
    low, high = 0, len(shapes)
    while low < high:
        middle = (low + high) // 2
        if int(cut_panes(panes, extents, shapes[middle]).max()) < quota:
            high = middle
        else:
            low = middle + 1
    if low < len(shapes):
        return cut_panes(panes, extents, shapes[low])
    if num_panes > quota:
        pane = pane * quota // num_panes
    return torch.where(patch, pane.unique(return_inverse=True)[1], -1)


def cut_panes(
    panes: torch.Tensor, extents: torch.Tensor, shape: tuple[float, float]
) -> torch.Tensor:
    """(n,) int64 window of each token, numbered from 0 without gaps.

    Args:
        extents: (2, P) rows and columns of every pane.
        shape: height and width of a window.
    """
    pane, row, col, kind = panes
    sides = torch.tensor(shape, dtype=torch.float64)
    bands = (extents / sides[:, None] - 1e-9).ceil().long()  # (2, P) windows down and across
    size = extents[:, pane]
    down, across = (torch.stack([row, col]).minimum(size - 1) * bands[:, pane]) // size
    across = torch.where(kind == PATCH, across, 0)
    most_down, most_across = bands.amax(dim=1)
    key = ((pane * len(KINDS) + kind) * most_down + down) * most_across + across
    return key.unique(return_inverse=True)[1]


def average(window: torch.Tensor, panes: torch.Tensor) -> Selection:
    """Put the mean of every window in the place of the token nearest its centre.

    Args:
        window: (N,) int64 window of each token, from 0 without gaps; -1 for none.
        panes: (4, N) from `pane_coordinates`.
    """
    members = (window >= 0).nonzero().squeeze(1)
    window_of = window[members]
    size = torch.bincount(window_of)
    # Squared, x the window's size squared.
    distance = torch.zeros(len(members), dtype=torch.float64)
    for at in panes[:3, members]:
        total = torch.zeros_like(size).index_add_(0, window_of, at)
        distance += (size[window_of] * at - total[window_of]).double().square()
    order = best_first(-distance, window_of)  # by window, nearest first
    index, place = members[order[size.cumsum(0) - size]].sort()
    assign = torch.full_like(window, -1)
    assign[members] = place.argsort()[window_of]
    weight = torch.zeros(len(window))
    weight[members] = 1 / size[window_of]
    return Selection(index, assign, weight)
