"""Keep what the vision tower attends to half-way and at its end, and what lies beside it.

Idea: a middle layer of a vision tower attends to the objects of a picture, its last layer to the
few patches in which it has gathered what the whole picture shows. A small part of the budget goes
to the tokens that the middle layer attends to most (anchors) and to their four neighbours each
(buffers), the rest to those that the last layer attends to most (registers).

Why it works: anchors and their neighbours keep an object's details at their places, which registers
have lost; registers say what the picture is about. No CLS token is needed.

Paper: HiPrune, arXiv 2508.00553.
Official code: Danielement321/HiPrune (a copy of it).
Differences: the middle layer is the ninth of 24, the paper's for CLIP, and as far down in towers of
other depths; where most layers of a tower attend in windows, the nearest that does not, which is
the paper's sixteenth of 32 for Qwen2.5-VL. As in the authors' code, the last layer is the one that
the projector is given, and the number of anchors is rounded to the nearest. The budget is over all
pictures and frames together unless the stage says `per: tile` or `per: frame`. Neighbours are those
of the same frame or tile, where their code counts places: a patch at an edge has one at the other
end of the row before or behind, and past the corners the corner itself. Where a model joins patches
into one token, a token is attended to as its patches are in the mean, and neighbours are tokens.
Where anchors and neighbours coincide, registers take their places, also as in their code. Positions
are kept, where theirs are renumbered. Ties go to the earlier.

Options:
    objects: 0.1 (default), the part of the budget for anchors and buffers; from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.device import send
from vtprune.pruners.base import Budget, Selection, VisualTokens, checked, keep_best
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
        num_anchors = (budget.quota * self.objects / (1 + len(CROSS))).round().long()
        anchors = keep_best(middle, Budget(budget.group, num_anchors))
        first = with_neighbours(send(neighbours(tokens.layout), anchors.device), anchors)
        # A register's score is at most 1 after this, a buffer's and then an anchor's above.
        scores = (last - last.min()) / (last.max() - last.min()).clamp_min(SLACK)
        rank = first.float().index_fill_(0, anchors, 2.0)
        selection = Selection(keep_best(scores + 2 * rank, budget), scores=last)
        return checked(selection, torch.cat([middle, last]), "hiprune")


def with_neighbours(beside: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return which of all tokens are among some or beside them, (N,) bool.

    Args:
        beside: (N, 4) as `neighbours` gives it.
        tokens: (k,) int64.
    """
    wanted = torch.cat([tokens, beside[tokens].flatten()])
    among = torch.zeros(len(beside) + 1, dtype=torch.bool, device=beside.device)
    return among.index_fill_(0, wanted, True)[:-1]  # the last one for no neighbour


def neighbours(layout: Layout) -> torch.Tensor:
    """Return (N, 4) int64 the patches beside each in its frame or tile; N for none.

    What is no patch has no neighbours.
    """
    grid = layout.grid
    axes = [layout.items(), grid.frame, grid.tile, grid.row + 1, grid.col + 1]
    sizes = [int(axis.max()) + 2 for axis in axes]

    def number(row: int, col: int) -> torch.Tensor:
        code = torch.zeros_like(grid.row)
        for place, size in zip([*axes[:3], axes[3] + row, axes[4] + col], sizes, strict=True):
            code = code * size + place
        return code

    codes, order = torch.where(grid.kind == PATCH, number(0, 0), -1).sort(stable=True)
    found = []
    for row, col in CROSS:
        wanted = number(row, col)
        place = torch.searchsorted(codes, wanted).clamp_max(len(codes) - 1)
        there = (codes[place] == wanted) & (grid.kind == PATCH)
        found.append(torch.where(there, order[place], len(codes)))
    return torch.stack(found, dim=1)
