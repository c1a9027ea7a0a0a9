"""Keep the visual tokens that are farthest from each other.

Idea: choose the tokens one after the other, each time the one whose nearest kept token is farthest
in cosine distance: a greedy answer to the max-min diversity problem. The first is the token whose
nearest neighbour is farthest.

Why it works: what an attention score keeps are often copies of one thing; a set in which no two
tokens are alike still shows something of every region, also at low keeps.

Paper: DivPrune, arXiv 2503.02175.
Official code: vbdi/divprune (CC BY-NC).
Differences: positions are kept, where the authors' code renumbers them (`positions: renumber`). All
tokens of a prompt are chosen from together, tiles too; with `per: frame` or `tile`, each group by
itself. The count is the budget's, and all kept tokens are distinct, where the authors' code may
choose one token again once only copies are left; ties go to the earlier token; cosines within 1e-6
of 1 count as equal; a state that is zero, which has no direction, counts as a copy of every other,
where the authors' code gives NaN; in any layer and of other states too. Float32. The cosines of all
pairs are held at once up to 2,048 tokens on a CPU; past that those of likely choices alone are
worked out. Elsewhere all are held up to 16,384 tokens, and up to 32,768 where a fifth of the
device's memory is enough for them; else each step works out its own. With a `segment`, time and
memory grow with the number of tokens, not its square, and tokens of two segments are not compared.

Options:
    states: "hidden" (default), "query", "key" or "value".
    segment: "none" (default), or the most tokens that are chosen from together, from 64 on: longer
        inputs are cut, in order, into segments of one length, each chooses up to twice its share,
        and those choices that were farthest from the ones before them are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.pruners.base import Budget, Selection, VisualTokens, checked
from vtprune.pruners.lazy_greedy import choose_lazily
from vtprune.pruners.similarity import (
    WHOLE,
    Similarity,
    choose_in_groups,
    cosines,
    is_lazy,
    most_alone,
    unit_rows,
)

TOGETHER = 128  # tokens that are compared with the same chosen ones at once


@dataclass(frozen=True)
class DivPrune:
    states: str = "hidden"
    segment: str | float = WHOLE

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.states,)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        return choose_farthest(
            unit_rows(tokens.states[self.states]), budget, "divprune", self.segment
        )


def choose_farthest(
    rows: torch.Tensor, budget: Budget, method: str, segment: str | float
) -> Selection:
    """Keep the tokens that are farthest from each other, within each group of the budget.

    Args:
        rows: (N, d) of unit length, or zero.
        method: whose states they are, for an error's sake.
        segment: as in `choose_in_groups`.

    Raises:
        ModelError: states that are not finite.
    """
    index = choose_in_groups(
        rows, budget, lambda part, _, count: farthest_first(part, count), segment
    )
    return checked(Selection(index), rows, method)


def farthest_first(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(G, count) int64 tokens of each group, in the order of choice, and how far each was from the
    nearest one chosen before it: (G, count) 1 - cosine, falling; infinity for the first.

    Args:
        rows: (G, n, d) of unit length, or zero.
    """
    zero = ~rows.any(dim=2)
    nearest = zero.float() * 2 - 1  # (G, n) cosine with the nearest kept token; a zero state's is 1
    if is_lazy(rows):
        nearest[0, most_alone(rows[0], zero[0])] = -torch.inf
        chosen, gain = choose_lazily(-nearest[0], count, Distances(rows[0], nearest[0], count))
        return chosen[None], 1 + gain[None]
    similarity = Similarity(rows, hold=True)
    picked = similarity.nearest().masked_fill(zero, 1.0).argmin(dim=1)
    order, distance = [picked], [rows.new_full((len(rows),), torch.inf)]
    for _ in range(count - 1):
        nearest = torch.maximum(nearest, similarity.to(picked))
        nearest.scatter_(1, picked[:, None], torch.inf)
        least, picked = nearest.min(dim=1)
        order.append(picked)
        distance.append(1 - least)
    return torch.stack(order, dim=1), torch.stack(distance, dim=1)


class Distances:
    """How far tokens are from the nearest one chosen, as `Gains`: the cosine with it, negative.

    Args:
        rows: (n, d) of unit length, or zero.
        nearest: (n,) cosine of each with the nearest one chosen, before any is.
        count: how many are chosen at most.
    """

    def __init__(self, rows: torch.Tensor, nearest: torch.Tensor, count: int) -> None:
        self.rows, self.nearest = rows, nearest
        self.seen = torch.zeros(len(rows), dtype=torch.long)  # of those chosen, by each token
        self.chosen = rows.new_empty(count, rows.shape[1])
        self.number = 0
        self.tokens = self.pairs = self.seen[:0]

    def renew(self, tokens: torch.Tensor) -> torch.Tensor:
        seen = self.seen[tokens]
        for part in seen.argsort(stable=True).split(TOGETHER):  # those that lack about as many
            some, first = tokens[part], int(seen[part].min())
            if first < self.number:
                cosine = cosines(self.rows[some], self.chosen[first : self.number])
                self.nearest[some] = torch.maximum(self.nearest[some], cosine.amax(dim=1))
        self.seen[tokens] = self.number
        self.tokens = tokens
        return -self.nearest[tokens]

    def compare(self, places: torch.Tensor) -> None:
        self.tokens = self.tokens[places]
        rows = self.rows[self.tokens]
        self.pairs = cosines(rows, rows)

    def choose(self, place: int) -> torch.Tensor:
        self.chosen[self.number] = self.rows[self.tokens[place]]
        self.number += 1
        nearest = torch.maximum(self.nearest[self.tokens], self.pairs[place])
        self.nearest[self.tokens] = nearest
        self.seen[self.tokens] = self.number
        return -nearest
