"""Keep the visual tokens that relevant words attend to, less what positions alone would give.

Idea: as `sparsevlm`, text tokens that relate to the picture ("raters") score the visual tokens by
the attention they pay them. That attention is divided by what rotary positions alone would give it,
the products of queries and keys that are all ones, and read in the heads where the raters then pay
most.

Why it works: rotary positions favour what lies near, so that late tokens of a picture, its lower
rows, are attended to whatever they show; and most heads hardly attend to pictures at all.

Paper: SparseVLM+, the version 2.0 of December 2025 of SparseVLM, arXiv 2410.04417.
Official code: Gumpest/SparseVLMs, its version 2.0.
Differences: raters are as in `sparsevlm`, chosen at every cut, where the authors' code chooses them
once. As in their code, attention is divided by the products of queries and keys of ones, not by
what a softmax makes of them; heads are then ranked by all that the raters pay in them; nothing is
recycled and positions are kept. Far apart the products are near zero or below, where their code
divides all the same: here what is less than 1/32 of the product at one place counts as that, which
is never so in LLaVA-1.5. The published 14 heads are of 32; here 14/32 of all, rounded. The names of
the published budgets are no layer averages: "192", "128", "96" and "64" average 206.8, 144.1, 113.9
and 81.8 tokens; at each of these averages the counts are the published ones, and between them the
schedule interpolates. A layer without rotary positions divides by the same everywhere. Ties go to
the earlier token. Float32.

Options: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.device import send
from vtprune.pruners.base import Budget, Selection, VisualTokens, checked, select_best
from vtprune.pruners.sparsevlm import LAYERS, choose_raters, fractions_between
from vtprune.tokens.schedule import CutProfile

BUDGETS = (
    (0, (0, 0, 0)),
    (64, (66, 34, 20)),
    (96, (246, 54, 28)),
    (128, (238, 108, 60)),
    (192, (300, 200, 118)),
    (576, (576, 576, 576)),
)
"""The published tokens after each cut, of 576, by the budget's name."""
HEADS = 14 / 32  # of all
LEAST = 1 / 32  # of the product of queries and keys of ones at one place


def schedule() -> CutProfile:
    """The published cuts, between the published budgets in proportion."""
    depths = tuple(layer / 32 for layer in LAYERS)
    return CutProfile(depths, lambda t: fractions_between(BUDGETS, t))


@dataclass(frozen=True)
class SparseVLMPlus:
    needs = ("text_attention_by_head", "text_hidden", "hidden", "rotary", "text_rotary")

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        attention, *_ = states = [tokens.states[name].float() for name in self.needs]
        _, text, visual, rotary, text_rotary = (send(state, attention.device) for state in states)
        raters = choose_raters(visual.flatten(1), text.flatten(1))  # (M,)
        by_position = text_rotary @ rotary.T  # (M, N)
        by_position = by_position.maximum(LEAST * rotary.square().sum(dim=1))
        by_position = by_position.where(by_position != 0, 1.0)  # nothing is turned, nothing to undo
        scores = score(attention, raters, by_position)
        values = torch.cat([scores, by_position.sum(dim=1)])
        return checked(select_best(scores, budget), values, "sparsevlm-plus")


def score(attention: torch.Tensor, raters: torch.Tensor, by_position: torch.Tensor) -> torch.Tensor:
    """Return (N,) float32 scores of the visual tokens.

    Args:
        attention: (M, H, N) of the text to the visual tokens, head by head.
        raters: (M,) 1 for the text tokens that rate, else 0.
        by_position: (M, N) what positions alone would give, above 0.
    """
    rated = attention / by_position[:, None] * raters[:, None, None]
    paid = rated.sum(dim=(0, 2))  # (H,)
    count = max(1, round(HEADS * len(paid)))
    heads = paid.argsort(descending=True, stable=True)[:count]
    return rated[:, heads].mean(dim=1).sum(dim=0) / raters.sum()
