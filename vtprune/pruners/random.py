"""Keep a uniform random draw of the visual tokens.

Idea: every token has the same chance, without replacement.

Why it works: past the information horizon of a model, visual tokens have nothing left that the
later layers need, and no published score beats a draw there. Before it, it is the baseline that
every method has to beat.

Paper: information horizon, arXiv 2512.07580.
Official code: YahongWang1/Information-Horizon.
Differences: seeded. A row's draw depends on the seed and the stage alone, so that it is the same
alone, in a batch and in every beam. Positions are kept, where the authors' code renumbers them
after each cut (`positions: renumber`). As in the authors' code, the draw is from all tokens
together, tiles too.

Options: none (the seed is the preset's).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.pruners.base import Budget, Selection, VisualTokens, keep_best


@dataclass(frozen=True)
class Random:
    needs = ()

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        generator = torch.Generator().manual_seed(tokens.seed)
        draw = torch.randperm(len(tokens), generator=generator)  # ranks; equal chance for each
        return Selection(keep_best(draw.float(), budget))
