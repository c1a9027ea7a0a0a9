"""Keep the visual tokens that the vision tower attends to most; merge the rest into a few.

Idea: in its last layers a vision tower gathers what it has seen in a few patches. Those are kept
("dominant"); the others, similar ones together, become a few "contextual" tokens.

Why it works: the few dominant patches hold most of the attention, and so most of what the projector
is given to say; the contextual ones hold what is small and was not gathered.

Paper: VisionZip, arXiv 2412.04467.
Official code: dvlab-research/VisionZip.
Differences: tokens are merged at the language model's input, behind the projector, where the
authors' code merges before it; their similarity is the cosine of those states, where the authors'
is that of the tower's keys, averaged over the heads. A contextual token is the mean of its own and
those that are merged into it; the authors' code adds the mean of the others to it, which doubles
its length. Kept tokens stay at their places and positions are kept, where the authors' code
renumbers them (`positions: renumber`). The published 54 dominant tokens are the CLS token and 53
patches. The budget and its dominant part are over all pictures and frames together unless the stage
says `per: tile` or `per: frame`; the authors' code handles each tile by itself. A tower's own CLS
token can be kept only where the model has it among its visual tokens, and there it counts as the
most attended to of its frame; a newline, which no patch stands behind, counts as the least. Where a
model joins patches into one token (pixel shuffle, merging, pooling), a token is attended to as its
patches are in the mean. Ties go to the earlier token.

Options:
    contextual: the part of the budget for contextual tokens: "10/64" (default) as published (54
        dominant and 10 contextual ones), "20/64", "32/64", or "none".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vtprune.device import send
from vtprune.pruners.base import (
    Budget,
    Selection,
    VisualTokens,
    checked,
    keep_best,
    merged_into,
    select_best,
)
from vtprune.pruners.similarity import cosines, unit_rows


@dataclass(frozen=True)
class VisionZip:
    contextual: str = "10/64"

    needs = ("tower_attention", "hidden")

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        scores = tokens.states["tower_attention"]
        if self.contextual == "none":
            return checked(select_best(scores, budget), scores, "visionzip")
        sizes = torch.bincount(budget.group, minlength=len(budget.quota))
        contextual = budget.quota * int(self.contextual.removesuffix("/64")) // 64
        contextual = torch.where(budget.quota < sizes, contextual, 0)
        dominant = budget.quota - contextual
        kept = keep_best(scores, Budget(budget.group, dominant))
        states = unit_rows(tokens.states["hidden"])
        merged = merge_rest(states, kept, budget.group, (sizes - dominant).tolist(),
                            contextual.tolist())  # fmt: skip
        return checked(replace(merged, scores=scores), scores, "visionzip")


def merge_rest(
    states: torch.Tensor,
    dominant: torch.Tensor,
    group: torch.Tensor,
    others: list[int],
    contextual: list[int],
) -> Selection:
    """Keep the dominant tokens, and contextual ones that all others are merged into.

    Targets lie evenly among a group's other tokens; each of those goes to its most similar target.

    Args:
        states: (N, d) float32 of unit length.
        dominant: (k,) int64 ascending.
        group: (N,) int64 of each token, from 0.
        others: of every group, how many tokens are not dominant.
        contextual: of every group, how many of those are targets.
    """
    target = torch.full((len(states),), -1, device=states.device)  # what each is merged into
    target[dominant] = dominant
    kept = [dominant]
    order = send(group.argsort(stable=True), states.device)
    sizes = torch.bincount(group).tolist()
    for members, num_others, count in zip(order.split(sizes), others, contextual, strict=True):
        if not count:
            continue
        other_tokens = members[(target[members] >= 0).argsort(stable=True)[:num_others]]
        aims = other_tokens[torch.arange(count, device=other_tokens.device) * (num_others // count)]
        target[other_tokens] = aims[cosines(states[other_tokens], states[aims]).argmax(dim=1)]
        target[aims] = aims
        kept.append(aims)
    return merged_into(target, torch.cat(kept).sort().values)
