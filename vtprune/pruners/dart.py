"""Keep the visual tokens that are least similar to a few pivot tokens.

Idea: take as pivots the few visual and text tokens with the largest keys, then share the budget
over them: each pivot keeps the tokens that are least similar to it.

Why it works: tokens are often copies of each other, and dropping a copy costs less than dropping
what some score finds unimportant; a handful of pivots is enough to tell copies, so the cost is
linear in the tokens and no attention map is read.

Paper: DART, arXiv 2502.11494.
Official code: ZichenWen1/DART (Apache-2.0).
Differences: keys are read before rotary positions, which leave a key's Euclidean norm but change
its L1 norm, so other pivots may come out. Pivots take turns in the order of their keys' norms; in
the authors' code the order is that of a Python set. The count is met exactly: visual pivots are
kept, longest first, as far as their group's quota allows; the rest of every quota is shared equally
over all pivots, remainders to the first; visual pivots take their turns before text pivots, longest
first, and each takes what none before it took. Pivots are those of the sample, whatever the groups;
text is what follows the last visual token, the template's tokens included. As in the authors' code,
cosines are of the states that enter the layer of the cut after the language model's final norm,
whose weights change them; tiles are chosen from as a whole, and positions are kept. Cosines within
1e-6 of 1 count as equal, a state that is zero counts as a copy of every pivot, and ties go to the
earlier token. Cosines are taken in float32, where the authors' code has the model's dtype.

Options:
    visual_pivots: "4" (default), "1", "2", "8" or "16".
    text_pivots: "4" (default), "0", "1", "2", "8" or "16"; with "0" no text is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.device import send
from vtprune.pruners.base import Budget, Selection, VisualTokens, checked
from vtprune.pruners.similarity import cosines, unit_rows


@dataclass(frozen=True)
class Dart:
    visual_pivots: str = "4"
    text_pivots: str = "4"

    @property
    def needs(self) -> tuple[str, ...]:
        text = ("text_key", "text_normed") if int(self.text_pivots) else ()
        return ("key", "normed", *text)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        rows = unit_rows(tokens.states["normed"])
        visual = longest(tokens.states["key"], int(self.visual_pivots))
        pivots = rows[visual]
        if int(self.text_pivots):
            text = longest(tokens.states["text_key"], int(self.text_pivots))
            pivots = torch.cat([pivots, unit_rows(tokens.states["text_normed"])[text]])
        similarity = cosines(pivots, rows)  # (P, N)
        similarity = torch.where(rows.any(dim=1), similarity, 1.0)
        index = least_alike(similarity, visual, budget)
        return checked(Selection(index), similarity, "dart")


def longest(keys: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) int64 tokens with the largest L1 norm of the key, largest first; all if fewer.

    Args:
        keys: (n, H, D).
    """
    norms = keys.flatten(1).float().abs().sum(dim=1)
    return norms.argsort(descending=True, stable=True)[:count]


def least_alike(similarity: torch.Tensor, pivots: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Return the index, (K,) ascending, of the pivots and the tokens least similar to each.

    Args:
        similarity: (P, N) cosine of every token with every pivot.
        pivots: (V,) int64 the pivots among the tokens, to be kept first, best first.
    """
    device = similarity.device
    num = similarity.shape[1]
    sizes = torch.bincount(budget.group)
    # Of each group, in the order of the groups.
    first = send(sizes.cumsum(0) - sizes, device)
    group, quota = (send(counts, device) for counts in (budget.group, budget.quota))
    place = group.sort().values  # group at each place of that order
    rank = torch.full((1, num), float(num), device=device)
    rank[0, pivots] = torch.arange(len(pivots), dtype=rank.dtype, device=device)
    order = torch.cat([rank, similarity]).argsort(dim=1, stable=True)
    order = order.gather(1, group[order].argsort(dim=1, stable=True))  # by group, best first
    num_pivots = torch.zeros_like(quota).scatter_add_(0, group[pivots], torch.ones_like(pivots))
    num_pivots = torch.minimum(num_pivots, quota)
    turns = torch.arange(len(similarity), device=device)[:, None]
    num_others = quota - num_pivots
    shares = num_others // len(similarity) + (turns < num_others % len(similarity))
    kept = torch.zeros(num, dtype=torch.bool, device=device)
    for best, share in zip(order, torch.cat([num_pivots[None], shares]), strict=True):
        free = ~kept[best]
        count = free.cumsum(0)
        count = count - (count - free.long())[first][place]  # free ones of the group up to here
        kept[best] = kept[best] | (free & (count <= share[place]))
    return (~kept).long().argsort(stable=True)[: budget.count].sort().values
