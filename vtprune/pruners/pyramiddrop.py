"""Keep the most attended visual tokens, fewer after each quarter of the layers.

Idea: three cuts, at L/4, L/2 and 3L/4, to r, r^2 and r^3 of the tokens; each keeps those that the
prompt's last token attends to most at that depth.

Why it works: shallow layers need nearly all visual tokens, deep layers ever fewer, so that what is
dropped late costs the least; and later attention is the better judge of what the question is about.

Paper: PyramidDrop, arXiv 2410.17247.
Official code: Cooperx521/PyramidDrop.
Differences: r is solved from the budget; the published r = 0.5 at layers 8, 16 and 24 of 32 is a
layer average of 0.46875, and each of its counts is truncated. The attention is that of the layer
before each cut, which has run anyway; the authors' code computes queries and keys of the layer
after it once more to rank by them. It also renumbers the positions after each cut, where they are
kept here (`positions: renumber`). As in the authors' code, the tiles of a picture are ranked
together. At a place of its own (`at:`) there is one cut by the same score. Ties go to the earlier
token.

Options: none.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.pruners.base import Budget, Selection, VisualTokens, checked, select_best
from vtprune.tokens.schedule import CutProfile


def schedule() -> CutProfile:
    """Cuts after each quarter of the layers, each to the same fraction of the one before."""
    return CutProfile((0.25, 0.5, 0.75), lambda t: (t, t**2, t**3))


@dataclass(frozen=True)
class PyramidDrop:
    needs = ("attention",)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        attention = tokens.states["attention"]
        return checked(select_best(attention, budget), attention, "pyramiddrop")
