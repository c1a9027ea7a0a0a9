"""Keep the visual tokens that the vision tower attends to most, and of the rest no copies.

Idea: a part of the budget goes to the tokens that the vision tower attends to most. The rest are
thinned out: in each round they are split in two by even and odd rank, at first of attention, and
those of the first half that are most alike to one of the second go, until what is left fits the
budget.

Why it works: attention inside the tower says better what a picture shows than the attention of the
text does; but it stays on the main object, and thinning out the rest keeps something of all that
stands beside it, once.

Paper: VisPruner, arXiv 2412.01818.
Official code: Theia-4869/VisPruner.
Differences: tokens are compared behind the projector, as they enter the language model, where the
authors compare what the tower gives. A tower without a CLS token gives the attention that its
patches receive in the mean. The budget is over all pictures and frames together unless the stage
says `per: tile` or `per: frame`; the authors handle each tile by itself. As in their code, ranks
are by attention in the first round alone: in the next one what is left of the first half comes
first, the most similar ahead, and the other half behind it. Any number of tokens can be thinned
out, where their code fails at odd ones, and no more go in a round than the first half holds.
Positions are kept, where theirs are renumbered. Of equal cosines the less attended token goes
first; a state that is zero is like no other. Float32.

Options:
    important: 0.5 (default), the part of the budget that is kept by attention; from 0 to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vtprune.device import send
from vtprune.pruners.base import Budget, Selection, VisualTokens, best_first, checked
from vtprune.pruners.similarity import BLOCK, cosines, is_small, unit_rows
from vtprune.tokens.schedule import SLACK

ROUND = 8  # tokens that go in a round, as published
NEAREST = 16  # most similar tokens of each that are noted


@dataclass(frozen=True)
class VisPruner:
    important: float = 0.5

    needs = ("tower_attention", "hidden")

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        scores = tokens.states["tower_attention"]
        rows = unit_rows(tokens.states["hidden"])
        ranked = best_first(scores, send(budget.group, scores.device))
        sizes = torch.bincount(budget.group, minlength=len(budget.quota)).tolist()
        kept = []
        for members, quota in zip(ranked.split(sizes), budget.quota.tolist(), strict=True):
            num_important = math.floor(self.important * quota + SLACK)
            kept.append(members[:num_important])
            others = members[num_important:]
            kept.append(others[thin_out(rows[others], quota - num_important)])
        selection = Selection(torch.cat(kept).sort().values)
        return checked(selection, torch.cat([scores, rows.sum(dim=1)]), "vispruner")


def thin_out(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return the rows that are left, (count,) int64 in the order that another round would have.

    Of each row the most similar ones are noted, so that a round need not compare all with all; they
    are noted anew whenever half of the rows are gone.

    Args:
        rows: (n, d) of unit length, or zero, the most attended first.
    """
    left = torch.arange(len(rows), device=rows.device)
    if not count:
        return left[:0]
    if is_small(len(rows), rows.device):
        similar = cosines(rows, rows)
        while len(left) > count:
            even, odd = left[::2], left[1::2]
            left = _without(left, similar[even][:, odd].amax(dim=1), count)
    while len(left) > count:
        left = left[_thin_out_by_half(rows[left], count)]
    return left


def _without(left: torch.Tensor, similarity: torch.Tensor, count: int) -> torch.Tensor:
    """Return the rows that a round leaves, of which `count` are to stay, in the next one's order.

    Args:
        similarity: of every second row, from the first on, to the nearest of the others.
    """
    num_dropped = min(ROUND, len(left) - count, len(similarity))
    falling = similarity.argsort(stable=True).flip(0)
    return torch.cat([left[::2][falling[num_dropped:]], left[1::2]])


def _thin_out_by_half(rows: torch.Tensor, count: int) -> torch.Tensor:
    nearest, similarity = most_similar(rows, NEAREST)
    left = torch.arange(len(rows), device=rows.device)
    is_odd = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    while len(left) > max(count, len(rows) // 2):
        even, odd = left[::2], left[1::2]
        is_odd.zero_()[odd] = True
        hit = is_odd[nearest[even]]  # (E, NEAREST), falling similarity
        first = hit.byte().argmax(dim=1, keepdim=True)
        best = similarity[even].gather(1, first)[:, 0]
        unknown = (~hit.any(dim=1)).nonzero()[:, 0]
        if len(unknown):  # none that was noted is left among the odd ones: note others
            which = even[unknown]
            similar = cosines(rows[which], rows[left])
            best[unknown] = similar[:, 1::2].amax(dim=1)
            similar[torch.arange(len(which)), 2 * unknown] = -torch.inf
            noted = similar.topk(min(nearest.shape[1], len(left) - 1), dim=1)
            num_noted = noted.indices.shape[1]
            nearest[which, :num_noted] = left[noted.indices]
            similarity[which, :num_noted] = noted.values
        left = _without(left, best, count)
    return left


def most_similar(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` most similar others of every row, and their cosines, falling: (n, count).

    Fewer where there are not so many.

    Args:
        rows: (n, d) of unit length, or zero.
    """
    count = min(count, len(rows) - 1)
    parts = []
    for first in range(0, len(rows), BLOCK):
        block = cosines(rows[first : first + BLOCK], rows)
        block.diagonal(first).fill_(-torch.inf)
        parts.append(block.topk(count, dim=1))
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
