"""Keep the visual tokens that the layer before the cut changed most; drop the others step by step.

Idea: three cuts, about a tenth, half and two thirds down the decoder. Each keeps the tokens whose
state the layer before has changed most, by the Euclidean length of the difference.

Why it works: a token that a layer leaves nearly as it is takes no part in what is worked out there,
whatever is asked. The length of a difference favours no place in the prompt, as attention does,
and needs no attention map.

Paper: V2Drop, arXiv 2509.01552.
Official code: xuyang-liu16/V2Drop.
Differences: the published cuts, before layers 3, 17 and 22 of 32, to 1/2, 1/4 and one token, are a
layer average of 0.352. A smaller budget keeps their ratio; at a larger one, from half of the tokens
after the first cut on, the later cuts rise in proportion to all. Their depths are those of 32
layers in decoders of others. Tokens of all pictures and frames are ranked together unless the stage
says otherwise; at a place of its own (`at:`) there is one cut by the same score. Positions are
kept, as in the authors' code, of which another version ranks by cosine. Where a decoder carries
several streams of states, the one that other methods read counts. Ties go to the earlier token.
Float32.

Options: none.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.device import send
from vtprune.pruners.base import Budget, Selection, VisualTokens, checked, select_best
from vtprune.tokens.schedule import CutProfile

LAYERS = (3, 17, 22)  # of 32


def schedule() -> CutProfile:
    """The published cuts, and what is between them and all tokens in proportion."""
    return CutProfile(tuple(layer / 32 for layer in LAYERS), fractions)


def fractions(t: float) -> tuple[float, ...]:
    """The fraction that each cut leaves, where t is that of the first; 0 stands for one token."""
    if t <= 0.5:
        return t, t / 2, 0.0
    return t, 1.5 * t - 0.5, 2 * t - 1


@dataclass(frozen=True)
class V2Drop:
    needs = ("hidden", "previous")

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        after = tokens.states["hidden"].flatten(1).float()  # (N, d)
        before = send(tokens.states["previous"].flatten(1).float(), after.device)
        scores = (after - before).norm(dim=1)
        return checked(select_best(scores, budget), scores, "v2drop")
