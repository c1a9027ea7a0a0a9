"""Keep what the vision tower attends to half-way and at its end, and what lies beside it.

Idea: a middle layer of a vision tower attends to the objects of a picture, its last layer to the
few patches in which it has gathered what the whole picture shows. A small part of the budget goes
to the tokens that the middle layer attends to most (anchors) and to their four neighbours each
(buffers), the rest to those that the last layer attends to most (registers).

Why it works: anchors and their neighbours keep an object's details at their places, which registers
have lost; registers say what the picture is about. No CLS token is needed.

Paper: HiPrune, arXiv 2508.00553.
Official code: Danielement321/HiPrune (not looked at).
Differences: the middle layer is the one 9/24 down the tower, the paper's for CLIP, counted from 0;
where most layers of a tower attend in windows, the nearest that does not. The last layer is the one
that the projector is given. The budget is over all pictures and frames together unless the stage
says `per: tile` or `per: frame`; neighbours are those of the same frame or tile. Where a model
joins patches into one token, a token is attended to as its patches are in the mean, and neighbours
are tokens. The number of anchors is rounded down, and where anchors and neighbours coincide,
registers take their places, so that counts are exact. Positions are kept. Ties go to the earlier.

Options:
    objects: 0.1 (default), the part of the budget for anchors and buffers; from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.pruners.base import Budget, Selection, VisualTokens, check_finite, keep_best
from vtprune.tokens.layout import PATCH, Layout
from vtprune.tokens.schedule import SLACK

CROSS = ((-1, 0), (0, -1), (0, 1), (1, 0))
"""Rows and columns of the four neighbours."""


@dataclass(frozen=True)
class HiPrune:
    objects: float = 0.1

    needs = ("tower_middle_attention", "tower_mean_attention")

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        middle, last = (tokens.states[name] for name in self.needs)
        check_finite(torch.cat([middle, last]), "hiprune")
        num_anchors = (budget.quota * (self.objects / (1 + len(CROSS))) + SLACK).long()
        anchors = keep_best(middle, Budget(budget.group, num_anchors)).cpu()
        first = with_neighbours(tokens.layout, anchors).to(last.device)
        # A register's score is at most 1 after this, an anchor's or a buffer's above.
        scores = (last - last.min()) / (last.max() - last.min()).clamp_min(SLACK)
        return Selection(keep_best(scores + 2 * first, budget), scores=last)


def with_neighbours(layout: Layout, tokens: torch.Tensor) -> torch.Tensor:
    """Return which of all tokens are among some or beside them in their frame or tile, (N,) bool.

    Args:
        tokens: (k,) int64 of the layout; what is no patch has no neighbours.
    """
    grid = layout.grid
    axes = [layout.items(), grid.frame, grid.tile, grid.row + 1, grid.col + 1]
    sizes = [int(axis.max()) + 2 for axis in axes]

    def number(places: list[torch.Tensor]) -> torch.Tensor:
        code = torch.zeros_like(places[0])
        for place, size in zip(places, sizes, strict=True):
            code = code * size + place
        return code

    patch = grid.kind == PATCH
    places = [axis[tokens[patch[tokens]]] for axis in axes]
    wanted = [number([*places[:3], places[3] + row, places[4] + col]) for row, col in CROSS]
    beside = torch.isin(number(axes), torch.cat(wanted))
    beside &= patch
    beside[tokens] = True
    return beside
