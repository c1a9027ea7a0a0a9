"""Keep a regular sub-grid of the visual tokens.

Idea: spread what is kept evenly over rows and columns of each picture, tile or frame.

Why it works: neighbouring patches look alike; a regular sample loses resolution but no region.

Paper: none; a baseline.
Official code: none.
Differences: none. Positions are kept. The count is met exactly: rows are shared evenly, then
columns in each row. Tokens without a place (newlines, or a layout that is not known) are taken as
one more row.

Options: none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vtprune.pruners.base import Budget, Selection, VisualTokens
from vtprune.tokens.layout import PATCH, Grid
from vtprune.tokens.quotas import quotas


@dataclass(frozen=True)
class Uniform:
    needs = ()

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        panes = tokens.layout.groups("tile")
        kept = []
        for group, quota in enumerate(budget.quota.tolist()):
            members = (budget.group == group).nonzero().squeeze(1)
            numbers, pane = panes[members].unique(return_inverse=True)
            sizes = torch.bincount(pane, minlength=len(numbers)).tolist()
            for number, share in enumerate(quotas(quota, sizes)):
                inside = members[pane == number]
                kept.append(inside[sub_grid(tokens.layout.grid.take(inside), share)])
        return Selection(torch.cat(kept).sort().values)


def spaced(count: int, total: int) -> list[int]:
    """`count` indices spread evenly over `total`, each in the middle of its share."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def sub_grid(grid: Grid, count: int) -> torch.Tensor:
    """Index, (count,) int64, of a regular sub-grid of one picture's tokens."""
    row = torch.where(grid.kind == PATCH, grid.row, grid.row.max() + 1 if len(grid) else 0)
    rows = [(row == number).nonzero().squeeze(1) for number in row.unique().tolist()]
    num_cols = max((len(members) for members in rows), default=1)
    num_rows = min(len(rows), max(1, round(math.sqrt(count * len(rows) / num_cols))))
    chosen = [rows[i] for i in spaced(num_rows, len(rows))] if count else []
    if sum(len(members) for members in chosen) < count:
        chosen = rows
    shares = quotas(count, [len(members) for members in chosen]) if chosen else []
    picked = [
        members[spaced(share, len(members))]
        for members, share in zip(chosen, shares, strict=True)
        if share
    ]
    return torch.cat(picked) if picked else torch.zeros(0, dtype=torch.long)
