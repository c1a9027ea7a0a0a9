"""Keep the visual tokens that are farthest from each other.

Idea: choose the tokens one after the other, each time the one whose nearest kept token is farthest
in cosine distance: a greedy answer to the max-min diversity problem. The first is the token whose
nearest neighbour is farthest.

Why it works: what an attention score keeps are often copies of one thing; a set in which no two
tokens are alike still shows something of every region, also at low keeps.

Paper: DivPrune, arXiv 2503.02175.
Official code: vbdi/divprune (CC BY-NC; not looked at).
Differences: positions are kept, where the authors' code renumbers them (`positions: renumber`). All
tokens of a prompt are chosen from together, tiles too; with `per: frame` or `tile`, each group by
itself. The count is the budget's, and all kept tokens are distinct, where the authors' code may
choose one token again once only copies are left; ties go to the earlier token; cosines within 1e-6
of 1 count as equal; a state that is zero, which has no direction, counts as a copy of every other,
where the authors' code gives NaN; in any layer and of other states too. Float32. The cosines of all
pairs are held at once up to 16,384 tokens, and up to 32,768 where a fifth of the device's memory is
enough for them; else each step works out its own.

Options:
    states: "hidden" (default), "query", "key" or "value".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.pruners.base import Budget, Selection, VisualTokens, check_finite
from vtprune.pruners.similarity import Similarity, choose_in_groups, unit_rows


@dataclass(frozen=True)
class DivPrune:
    states: str = "hidden"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.states,)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        return choose_farthest(unit_rows(tokens.states[self.states]), budget, "divprune")


def choose_farthest(rows: torch.Tensor, budget: Budget, method: str) -> Selection:
    """Keep the tokens that are farthest from each other, within each group of the budget.

    Args:
        rows: (N, d) of unit length, or zero.
        method: whose states they are, for an error's sake.

    Raises:
        ModelError: states that are not finite.
    """
    index = choose_in_groups(rows, budget, lambda part, _, count: farthest_first(part, count))
    check_finite(rows, method)
    return Selection(index)


def farthest_first(rows: torch.Tensor, count: int) -> torch.Tensor:
    """(G, count) int64 tokens of each group, in the order of choice.

    Args:
        rows: (G, n, d) of unit length, or zero.
    """
    similarity = Similarity(rows, hold=True)
    copies = (~rows.any(dim=2)).float() * 2 - 1  # (G, n) 1 for a zero state, else the least cosine
    picked = torch.maximum(similarity.nearest(), copies).argmin(dim=1)
    order = [picked]
    nearest = copies  # cosine with the nearest kept token
    for _ in range(count - 1):
        nearest = torch.maximum(nearest, similarity.to(picked))
        nearest.scatter_(1, picked[:, None], torch.inf)
        picked = nearest.argmin(dim=1)
        order.append(picked)
    return torch.stack(order, dim=1)
