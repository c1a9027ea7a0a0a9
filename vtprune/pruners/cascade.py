"""Keep visual tokens that are far from each other, ever fewer of them as the layers go on.

Idea: DivPrune's choice three times, at the input, after a third of the layers and after 70 % of
them: each later cut leaves half as many tokens as the one before, and chooses anew by the states
that they have there.

Why it works: at the input, two equal things in two places are copies of each other, and one of them
goes; a few layers on, states tell where and which a token is, so that a second choice can be far
harder. And deep layers need few tokens, so what they are spared pays for more in the early ones.

Paper: none; the choice is DivPrune's, arXiv 2503.02175, the falling counts are PyramidDrop's idea,
arXiv 2410.17247. Ratios and depths were chosen on the embedded model's dev split; see
docs/results.md.
Official code: none.
Differences: none. Where the budget lets the first cut keep everything, the later ones get the rest.
At a place of its own (`at:`) there is one cut, which is `divprune`.

Options:
    states: "hidden" (default), "query", "key" or "value".
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.pruners.divprune import DivPrune
from vtprune.schedule import Profile

DEPTHS = (0.0, 1 / 3, 0.7)
RATIO = 2.0


def schedule() -> Profile:
    """Each cut leaves half of what the one before leaves, until that is everything."""

    def fractions(t: float) -> tuple[float, ...]:
        last = len(DEPTHS) - 1
        return tuple(min(1.0, t * RATIO ** (last - part)) for part in range(len(DEPTHS)))

    return Profile(DEPTHS, fractions)


@dataclass(frozen=True)
class Cascade(DivPrune):
    pass
