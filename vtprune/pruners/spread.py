"""Keep the visual tokens that are farthest from each other in features, time and position.

Idea: DivPrune's farthest-point selection, with a similarity that includes time and position: the
cosine of two tokens' states, plus `time` times the cosine of the distance of their frames, plus
`space` times the mean of the cosines of the distances of their rows and of their columns, where the
distance of first and last is half a turn. It selects twice: at the input, and after 70 % of the
layers a quarter of those, by the states there.

Why it works: the vision tower sees one frame or tile at a time, so one thing in two frames gives
two states that hardly differ. A selection by states alone takes them for copies and keeps one:
what the thing does over time is lost, and so is how much of the picture it fills. With time in the
similarity both stay, unless a token between them is nearer to both. Deep layers need few tokens, so
the budget that they save goes to the early ones.

Paper: none; the selection is DivPrune's, arXiv 2503.02175, the falling count is PyramidDrop's idea,
arXiv 2410.17247. Weights, depth and count were chosen on the embedded model's dev split; see
docs/results.md.
Official code: none.
Differences: frames count over all that is cut together, so that several pictures are apart as
frames are; where a model gives crops of a picture as pictures of their own, they are too. Rows and
columns are those of the whole picture, whichever tile shows them. After an earlier cut, the last
frame, row and column are those of what is left. Where the budget lets the first cut keep
everything, the second gets the rest; at a place of its own (`at: input`) there is one cut.
Positions are kept. Otherwise as in `divprune`.

Options:
    time: 1 (default), the weight of time beside the states' cosine; from 0 to 4.
    space: 0.1 (default), the weight of rows and columns; from 0 to 4.
    states: "hidden" (default), "query", "key" or "value".
    segment: "none" (default) or the most tokens that are chosen from together, as in `divprune`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vtprune.device import send
from vtprune.pruners.base import Budget, Selection, VisualTokens
from vtprune.pruners.divprune import choose_farthest
from vtprune.pruners.similarity import WHOLE, unit_rows
from vtprune.tokens.layout import PATCH, Layout
from vtprune.tokens.schedule import CutProfile, falling_once

DEPTHS = (0.0, 0.7)
DEEP = 1 / 4  # of the tokens that the first cut leaves


def schedule() -> CutProfile:
    """A quarter of what the first cut leaves from 70 % of the depth on, more where all are left."""
    return falling_once(DEPTHS, DEEP)


@dataclass(frozen=True)
class Spread:
    time: float = 1.0
    space: float = 0.1
    states: str = "hidden"
    segment: str | float = WHOLE

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.states,)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        states = unit_rows(tokens.states[self.states])
        weights = self.time, self.space / 2, self.space / 2
        circles = [circle(*axis) for axis in zip(turns(tokens.layout), weights, strict=True)]
        position = send(torch.cat(circles, dim=1), states.device)
        # A state that is zero shows nothing, wherever it stands: the whole row is zero.
        rows = unit_rows(torch.cat([states, position], dim=1) * states.any(dim=1)[:, None])
        return choose_farthest(rows, budget, "spread", self.segment)


def circle(turn: torch.Tensor, weight: float) -> torch.Tensor:
    """(N, 2) float32 rows whose products are `weight` x the cosine of the turns' difference."""
    return math.sqrt(weight) * torch.stack([turn.cos(), turn.sin()], dim=1)


def turns(layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Time, row and column of the N tokens as angles from 0 to pi, each (N,) float32.

    Time: the frame's number among all frames and pictures that are there. Row and column: of the
    whole picture; a base picture has its own, coarser ones.
    """
    grid = layout.grid
    if not len(layout):
        none = torch.zeros(0)
        return none, none, none
    item = layout.items()
    frames = torch.zeros(int(item.max()) + 1, dtype=torch.long)
    frames = frames.scatter_reduce(0, item, grid.frame, "amax") + 1
    moment = (frames.cumsum(0) - frames)[item] + grid.frame
    picture = 2 * item + (grid.tile == 0).long()
    patch = grid.kind == PATCH
    every = torch.ones_like(patch)
    time = _share(moment, torch.zeros_like(item), every)
    row, column = (_share(place, picture, patch) for place in (grid.row, grid.col))
    return time * math.pi, row * math.pi, column * math.pi


def _share(place: torch.Tensor, group: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """(N,) in [0, 1]: each place among those of its group; 0 where all are at one.

    Args:
        counted: (N,) bool, the tokens that say where the last place is; others are at most there.
    """
    last = torch.zeros(int(group.max()) + 1, dtype=torch.long)
    last = last.scatter_reduce(0, group, place * counted, "amax")[group]
    return (place / last.clamp_min(1)).clamp_max(1)
