"""Keep the visual tokens that the question's relevant words attend to; recycle part of the rest.

Idea: text tokens that relate to the picture ("raters") score the visual tokens by the attention
they pay them. Of those that are dropped, the better part is clustered, and each cluster goes on as
one token.

Why it works: "the" and "is" attend to whatever is there; words that resemble visual tokens attend
to what they name. And what many dropped tokens share costs one token, not none.

Paper: SparseVLM, arXiv 2410.04417.
Official code: Gumpest/SparseVLMs.
Differences: raters are chosen at every cut, from the states that enter its layer; the paper chooses
them once, from the input embeddings. Recycled tokens count in the budget, where the published
counts leave them out; a cluster's token stays at the place of its centre and positions are kept,
where the authors' code moves all of them behind the kept ones and renumbers
(`positions: renumber`). As in the authors' code, the tiles of a picture are ranked together. The
names of the published budgets of LLaVA-1.5-7B are no layer averages: "192", "128", "96" and "64"
average 206.5, 145.4, 114.1 and 82.3 tokens with the clusters, 202.8, 140.8, 110.3 and 79.2 without;
at each of these averages the counts are the published ones, and between them the schedule
interpolates. This is version 1 of the authors' code; its version 2.0 is `sparsevlm-plus`. Dropped
tokens of a group with fewer than two places are not recycled, and no more than half of a group's
places go to clusters. Where the authors' code adds noise, the first of
the densest tokens counts as denser than they, and others of equal density as no denser than each
other; ties go to the earlier token. With `ratio: rank` the factor that the paper sets by hand is
solved so that an attention matrix of full rank keeps the budget; the budget stays the upper bound.

Options:
    ratio: "budget" (default) keeps the whole budget; "rank" drops more where the attention of the
        raters has a lower rank than their number: fewer tokens than the budget.
    recycle: "clusters" (default) merges the best 3 of 10 dropped tokens, about ten into one;
        "none" drops them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from vtprune.device import send
from vtprune.pruners.base import (
    Budget,
    Selection,
    VisualTokens,
    best_first,
    checked,
    merged_into,
    read_checked,
    select_best,
)
from vtprune.pruners.similarity import density_peaks
from vtprune.tokens.schedule import CutProfile

LAYERS = (3, 7, 16)  # of 32: the released code ranks by layers 2, 6 and 15 and cuts what they leave
BUDGETS = (
    (0, (0, 0, 0)),
    (64, (66, 30, 17)), (68, (82, 32, 18)),
    (96, (238, 48, 26)), (100, (249, 55, 27)),
    (128, (303, 110, 36)), (132, (312, 117, 39)),
    (192, (300, 200, 110)), (196, (309, 204, 113)),
    (576, (576, 576, 576)),
)  # fmt: skip
"""The published tokens after each cut, of 576, by the budget's name; and, four after the name, with
those of the clusters."""


def schedule() -> CutProfile:
    """The published cuts, between the published budgets in proportion."""
    return CutProfile(tuple(layer / 32 for layer in LAYERS), fractions)


def fractions(t: float) -> tuple[float, ...]:
    """The fraction that each cut leaves, where t is the budget's name as a fraction of 576."""
    return fractions_between(BUDGETS, t)


def fractions_between(
    budgets: Sequence[tuple[int, tuple[int, ...]]], t: float
) -> tuple[float, ...]:
    """Return the fraction that each cut leaves at a budget, between the published ones in
    proportion.

    Args:
        budgets: the published names, ascending, each with the tokens after each cut, of 576.
        t: the budget's name as a fraction of 576.
    """
    budget = t * 576
    for (low, below), (high, above) in pairwise(budgets):
        if budget <= high:
            way = (budget - low) / (high - low)
            # 312 falls to 300 late, when the later cuts have long gained more than it loses.
            ways = (way if a < b else way**8 for a, b in zip(below, above, strict=True))
            return tuple(
                (a + w * (b - a)) / 576 for a, b, w in zip(below, above, ways, strict=True)
            )
    return (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class SparseVLM:
    ratio: str = "budget"
    recycle: str = "clusters"

    needs = ("text_attention", "text_hidden", "hidden")

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        visual = tokens.states["hidden"].flatten(1).float()  # (N, d)
        text = tokens.states["text_hidden"].flatten(1).float()  # (M, d)
        attention = tokens.states["text_attention"].float()  # (M, N)
        rates = send(choose_raters(visual, text), attention.device)  # (M,)
        if self.ratio == "rank":
            ranks = torch.stack([*rank_of(attention.nan_to_num(), rates)])
            budget = shrink(budget, *read_checked(ranks, attention, "sparsevlm").tolist())
        scores = rates @ attention / rates.sum()
        if self.recycle == "none":
            selection = select_best(scores, budget)
        else:
            selection = keep_and_recycle(scores, visual, budget)
        return checked(selection, attention, "sparsevlm")


def choose_raters(visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """(M,) float32, 1 for text tokens that relate to the visual ones more than the mean, else 0.

    Every visual token shares itself out over the text by a softmax of their products; a text
    token's relevance is the mean of what it gets. All rate where none stands out.

    Args:
        visual: (N, d) float32.
        text: (M, d) float32.
    """
    relevance = (visual @ text.T).softmax(dim=1).mean(dim=0)
    chosen = relevance > relevance.mean()
    return torch.where(chosen.any(), chosen, True).float()


def rank_of(attention: torch.Tensor, rates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rank of the raters' attention, and how many raters there are."""
    rank = torch.linalg.matrix_rank(attention * rates[:, None])
    return rank, rates.sum().to(rank.dtype)


def shrink(budget: Budget, rank: int, num_raters: int) -> Budget:
    """Return what the paper's rule leaves of a budget: it drops factor x (N - rank) tokens.

    The factor is that which keeps the whole budget at full rank. Every group loses the same
    fraction, and keeps one token where it had any.
    """
    total, count = len(budget.group), budget.count
    full = min(num_raters, total)
    factor = (total - count) / (total - full) if total > full else 1.0
    kept = max(1, int(total - factor * (total - rank) + 1e-6))
    if kept >= count:
        return budget
    quota = (budget.quota * kept // count).clamp_min(1)
    return Budget(budget.group, quota.minimum(budget.quota))


def count_clusters(size: int, quota: int) -> int:
    """Return how many of a group's `quota` places go to clusters of its dropped tokens.

    Three in ten of the dropped tokens, and one, are recycled; one cluster for ten of them, and one.
    """
    if quota >= size:
        return 0
    for clusters in range(quota // 2):
        if count_recycled(size - quota + clusters) // 10 + 1 <= clusters:
            return clusters
    return quota // 2


def count_recycled(dropped: int) -> int:
    return dropped * 3 // 10 + 1


def keep_and_recycle(scores: torch.Tensor, states: torch.Tensor, budget: Budget) -> Selection:
    """Keep the best tokens of every group, and clusters of the best of the others.

    Args:
        scores: (N,).
        states: (N, d) float32.
    """
    device = scores.device
    order = best_first(scores, send(budget.group, device))
    sizes = torch.bincount(budget.group, minlength=len(budget.quota)).tolist()
    kept: list[torch.Tensor] = []
    target = torch.full((len(scores),), -1, device=device)  # the token that each is merged into
    for members, quota in zip(order.split(sizes), budget.quota.tolist(), strict=True):
        clusters = count_clusters(len(members), quota)
        plain, dropped = members[: quota - clusters], members[quota - clusters :]
        kept.append(plain)
        target[plain] = plain
        if clusters:
            recycled = dropped[: count_recycled(len(dropped))].sort().values
            rows = states[recycled] / states.shape[1] ** 0.5
            centres, nearest = density_peaks(rows, clusters, clusters)
            kept.append(recycled[centres])
            target[recycled] = recycled[centres][nearest]
    return merged_into(target, torch.cat(kept).sort().values, scores)
