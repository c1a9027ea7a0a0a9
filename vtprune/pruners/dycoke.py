"""Keep one frame of every four whole, and of the others what changed most.

Idea: the frames of a video go in fours. The first of them stays whole; the second loses the tokens
that are most similar to the first at their place, the third as well, and the fourth those most
similar to the third: an equal share of each.

Why it works: most of a frame is in the frame before it; a whole frame in every four keeps errors
from adding up over a long video.

Paper: DyCoke, arXiv 2411.15024 (CVPR 2025), its first part, token temporal merging. Its second
part, cutting the cache while decoding, is `decode` of a preset; see docs/methods.md.
Official code: KD-TAO/DyCoke.
Differences: the share that goes is solved from the budget (the paper's 70 % keep 0.475 of the
tokens). Less than the first frames of all fours is past the method: then these share the budget
equally, and each keeps a regular sub-grid. What goes is dropped, as the paper's text and formulas
say, although it calls that merging. In the authors' code the second and the fourth frame lose
tokens by the similarities of the pair of frames before theirs, the first pair by those of the last,
and the last four keep their third frame whole; here each frame is compared as the paper says. Where
a model merges frames in time, its steps are the frames. States that enter the layer of the cut are
compared, the projected features at the input. Tokens that are not patches (newlines) go first; a
place that is not in the frame that it is compared with counts as wholly changed. Several videos
share one budget. With `per: frame` the budget's own shares hold, and only the choice inside a frame
is DyCoke's. Positions are kept, where theirs are renumbered. Ties go to the earlier.

Options: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.device import send
from vtprune.pruners.base import Budget, Selection, VisualTokens, checked, select_best
from vtprune.pruners.evs import changes
from vtprune.pruners.uniform import sub_grid
from vtprune.tokens.layout import PATCH, Layout
from vtprune.tokens.quotas import weighted_quotas

WINDOW = 4
"""Frames that go together, as published."""
COMPARED_WITH = (0, 0, 0, 2)
"""For every frame of a window, the one that it is compared with; the first with none."""
# Scores beside the changes, which are from 0 to 2.
FIRST, LATER, NO_PATCH = 4.0, -1.0, -2.0


@dataclass(frozen=True)
class DyCoke:
    needs = ("hidden",)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        layout = tokens.layout
        patch = layout.grid.kind == PATCH
        step = steps(layout)
        place = step % WINDOW
        changed = changes(tokens.states["hidden"].flatten(1), references(layout, step))
        if len(budget.quota) == 1:
            budget = share_by_window(budget.count, layout, place == 0, patch)
        fixed = torch.full((len(layout),), float("nan"))
        fixed[~patch] = NO_PATCH
        whole = (place == 0) & patch
        fixed[whole] = LATER
        for group, quota in enumerate(budget.quota.tolist()):
            members = (whole & (budget.group == group)).nonzero().squeeze(1)
            picked = sub_grid(layout.grid.take(members), min(quota, len(members)))
            fixed[members[picked]] = FIRST
        fixed = send(fixed, changed.device)
        scores = torch.where(fixed.isnan(), changed, fixed)
        return checked(select_best(scores, budget), changed, "dycoke")


def steps(layout: Layout) -> torch.Tensor:
    """Return (N,) int64 number of each token's frame among those of its video that are there."""
    step = torch.zeros(len(layout), dtype=torch.long)
    for number in layout.media.unique().tolist():
        tokens = layout.media == number
        step[tokens] = layout.grid.frame[tokens].unique(return_inverse=True)[1]
    return step


def references(layout: Layout, step: torch.Tensor) -> torch.Tensor:
    """Return (N,) int64 index of the token that each is compared with; -1 for none.

    Args:
        step: (N,) int64 number of each token's frame in its video.
    """
    grid = layout.grid
    key = torch.stack([layout.media, grid.tile, grid.row, grid.col, grid.kind])
    place = torch.unique(key, dim=1, return_inverse=True)[1]
    table = torch.full((int(step.max()) + 1, int(place.max()) + 1), -1)
    table[step, place] = torch.arange(len(layout))
    within = step % WINDOW
    found = table[step - within + torch.tensor(COMPARED_WITH)[within], place]
    return torch.where(within > 0, found, -1)


def share_by_window(count: int, layout: Layout, first: torch.Tensor, patch: torch.Tensor) -> Budget:
    """Share `count` tokens over the frames: first the whole ones', then an equal part of others.

    What is no patch has what is left.

    Args:
        first: (N,) bool, the tokens of every window's first frame.
        patch: (N,) bool.
    """
    frame = layout.groups("frame")
    quota = torch.zeros(int(frame.max()) + 1, dtype=torch.long)
    for part in (first & patch, ~first & patch, ~patch):
        sizes = torch.bincount(frame[part], minlength=len(quota))
        frames = sizes.nonzero().squeeze(1)
        there = sizes[frames].tolist()
        shared = min(count, sum(there))
        quota[frames] += torch.tensor(weighted_quotas(shared, there, there), dtype=torch.long)
        count -= shared
    return Budget(frame, quota)
