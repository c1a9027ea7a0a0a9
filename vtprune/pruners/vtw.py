"""Drop every visual token from one layer on.

Idea: from one layer on the language model goes on without any visual token.

Why it works: by then what the pictures say has moved into the text tokens.

Paper: Visual Tokens Withdrawal, arXiv 2405.05803.
Official code: lzhxmu/VTW (no licence).
Differences: the layer comes from the budget (keep x layers, rounded down) or the stage's place. The
authors search it: the first layer, from 5 on, at which the KL divergence of the last position from
the full model's, in the mean over 20 samples, is below 0.003 (7B), 0.0005 (13B) or 0.0001
(LLaVA-NeXT-7B); they publish layer 15 of 32. As in the authors' code, positions are kept; the code
of the information horizon (arXiv 2512.07580) renumbers them (`positions: renumber`).

Options: none. As a stage it leaves `keep: 0`, which no other method may.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.pruners.base import Budget, Selection, VisualTokens


@dataclass(frozen=True)
class Withdraw:
    needs = ()

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        assert budget.count == 0, "a stage that drops all has nothing to choose"
        return Selection(torch.zeros(0, dtype=torch.long))
