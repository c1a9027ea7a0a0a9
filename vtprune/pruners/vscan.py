"""Keep what the vision tower attends to early, window by window, and at its end; merge the rest.

Idea: half of the budget goes to the tokens that an early layer of the vision tower attends to most,
equally many in each of 4 x 4 windows of a picture; the other half to those that its last layer
attends to most among the rest. Every dropped token is averaged into the kept one that is most alike
to it. Half-way down the decoder a third of the kept tokens stay, by the attention of the prompt's
last token.

Why it works: early layers of a tower attend to details where they are, its last layer to the few
patches that stand for the whole picture; windows keep something of every region. In the first
layers of a decoder attention favours late places; half-way down it goes to what is asked about.

Paper: VScan, arXiv 2505.22654.
Official code: Tencent/SelfEvolvingAgent, VScan, MIT (a copy of its first part).
Differences: the early layer is the sixth of 24, the paper's for CLIP, and as far down in towers of
other depths; where most layers of a tower attend in windows, the nearest that does not. A tower
without a CLS token gives the attention that patches receive in the mean. The budget is over all
pictures and frames together unless the stage says `per: tile` or `per: frame`; every frame or tile
has its own windows, and a token is merged into one of its own group. Windows are 6 x 6 tokens in
the paper's 24 x 24; here a grid of any size has up to 4 x 4. As in the authors' code, tokens are
compared and merged behind the projector, and the local half is rounded down; where the windows
can't share it equally, some have one more, where their code keeps fewer tokens than it is asked
for. The second cut is `fastv`, before layer 16 of 32, and where the budget lets the first keep
everything, it gets the rest; at a place of its own there is the first cut alone. Positions are
kept, where theirs are renumbered. Ties go to the earlier token. Float32.

Options:
    local: 0.5 (default), the part of the budget that is kept window by window; from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.device import send
from vtprune.pruners.base import (
    Budget,
    Selection,
    VisualTokens,
    checked,
    keep_best,
    merged_into,
)
from vtprune.pruners.similarity import most_alike, unit_rows
from vtprune.tokens.layout import PATCH, Layout
from vtprune.tokens.quotas import quotas
from vtprune.tokens.schedule import SLACK, CutProfile, falling_once

SIDE = 4  # windows along each side of a frame or tile
DEEP = 1 / 3  # of the tokens that the first cut leaves


def schedule() -> CutProfile:
    """A third of what the first cut leaves from half of the depth on, more where all are left."""
    return falling_once((0.0, 0.5), DEEP)


@dataclass(frozen=True)
class VScan:
    local: float = 0.5

    needs = ("tower_early_attention", "tower_attention", "hidden")

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        early, last = (tokens.states[name] for name in self.needs[:2])
        rows = unit_rows(tokens.states["hidden"])
        by_window = share_over_windows(tokens.layout, budget, self.local)
        first = torch.zeros(len(tokens), device=last.device)
        first.index_fill_(0, keep_best(early, by_window), 1.0)
        # A score by the last layer is at most 1 after this, a local token's above.
        scores = (last - last.min()) / (last.max() - last.min()).clamp_min(SLACK)
        index = keep_best(scores + 2 * first, budget)
        target = most_alike(rows, index, send(budget.group, rows.device))
        values = torch.cat([early, last, rows.sum(dim=1)])
        return checked(merged_into(target, index, last), values, "vscan")


def share_over_windows(layout: Layout, budget: Budget, local: float) -> Budget:
    """Return the part `local` of every group's quota, shared equally over the group's windows."""
    window = torch.stack([budget.group, *windows(layout)])
    window, number = torch.unique(window, dim=1, return_inverse=True)
    sizes = torch.bincount(number)
    quota = torch.zeros_like(sizes)
    for group, count in enumerate((budget.quota * local + SLACK).long().tolist()):
        part = (window[0] == group).nonzero().squeeze(1)
        quota[part] = torch.tensor(quotas(count, sizes[part].tolist()), dtype=torch.long)
    return Budget(number, quota)


def windows(layout: Layout) -> tuple[torch.Tensor, ...]:
    """Return each token's frame or tile, and the row and the column of its window there.

    A newline token is of the last window of its row.

    Returns:
        Three times (N,) int64; windows from 0 to 3.
    """
    grid, patch = layout.grid, layout.grid.kind == PATCH
    unit = torch.stack([layout.items(), grid.frame, grid.tile])
    unit = torch.unique(unit, dim=1, return_inverse=True)[1]
    places = []
    for place in (grid.row, grid.col):
        ends = place.new_zeros(int(unit.max()) + 1)
        low, high = (
            ends.scatter_reduce(0, unit[patch], place[patch], way, include_self=False)[unit]
            for way in ("amin", "amax")
        )
        inside = (place - low).clamp_min(0).minimum(high - low)
        places.append(inside * SIDE // (high - low + 1).clamp_min(SIDE))
    return unit, *places
