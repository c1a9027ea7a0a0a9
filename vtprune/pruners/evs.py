"""Keep the video tokens that differ most from the same place in the frame before.

Idea: the first frame whole, then, of all later frames together, the tokens least similar (cosine)
to the token at the same tile, row and column of the previous frame.

Why it works: most of a scene stays as it was from frame to frame, and was shown already.

Paper: Efficient Video Sampling (EVS), arXiv 2510.14624.
Official code: by its authors in vLLM (Apache-2.0); it compares the projected features (summaries of
the paper speak of patches of pixels).
Differences: states that enter the layer of the cut are compared, the projected features at the
input; the authors' code keeps the first frame whole whatever the budget, here it is kept whole only
if it fits: else a regular sub-grid of it, as large as each frame's equal share; a place that has
lost its earlier tokens to an earlier cut is compared with the nearest frame that has it, and counts
as wholly changed where none has; tokens that are not patches (newlines) go first; two rows of zeros
are alike. The authors' code gives every video a count of its own; here the videos of a prompt share
one budget. Positions are kept, those of the text too; the authors' code keeps the visual tokens'
own in Qwen2.5-VL, and lets the text go on where a video of one frame would end.

Options: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.device import send
from vtprune.pruners.base import Budget, Selection, VisualTokens, checked, select_best
from vtprune.pruners.similarity import unit_rows
from vtprune.pruners.uniform import sub_grid
from vtprune.tokens.layout import PATCH, Layout
from vtprune.tokens.quotas import quotas

# Scores beside the changes, which are from 0 to 2.
FIRST, NEW, LATER, NO_PATCH = 4.0, 2.0, -1.0, -2.0


@dataclass(frozen=True)
class Evs:
    needs = ("hidden",)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        layout = tokens.layout
        changed = changes(tokens.states["hidden"].flatten(1), layout.previous())
        fixed = send(fixed_scores(layout, budget), changed.device)
        scores = torch.where(fixed.isnan(), changed, fixed)
        return checked(select_best(scores, budget), changed, "evs")


def changes(states: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """(N,) float32 in 0..2: one minus the cosine of every token and its previous one.

    A token without a previous one is NEW.

    Args:
        states: (N, d).
        previous: (N,) int64 index, -1 for none.
    """
    now = (previous >= 0).nonzero().squeeze(1)
    changed = torch.full((len(states),), NEW, device=states.device)
    for part in now.split(1024):  # in float32 all of them would be gigabytes of a long video
        current, before = send(part, states.device), send(previous[part], states.device)
        # Half the squared distance of unit rows is that, and 0, not noise, where both are equal.
        apart = unit_rows(states[current]) - unit_rows(states[before])
        changed[current] = apart.square().sum(dim=1) / 2
    return changed


def fixed_scores(layout: Layout, budget: Budget) -> torch.Tensor:
    """Return (N,) scores of the tokens that change does not rank; NaN for those it ranks."""
    scores = torch.full((len(layout),), float("nan"))
    patch = layout.grid.kind == PATCH
    first = layout.in_first_frame() & patch
    frame = layout.groups("frame")
    scores[first], scores[~patch] = LATER, NO_PATCH
    for group, quota in enumerate(budget.quota.tolist()):
        in_group = budget.group == group
        in_first_frame = (first & in_group).nonzero().squeeze(1)
        if len(in_first_frame) <= quota:
            scores[in_first_frame] = FIRST
            continue
        numbers, place = frame[in_group].unique(return_inverse=True)
        shares = quotas(quota, torch.bincount(place).tolist())
        for number, share in zip(numbers.tolist(), shares, strict=True):
            inside = in_first_frame[frame[in_first_frame] == number]
            picked = sub_grid(layout.grid.take(inside), min(share, len(inside)))
            scores[inside[picked]] = FIRST
    return scores
