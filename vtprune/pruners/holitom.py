"""Merge what stays the same over a stretch of a video, then cluster what is left in each frame.

Idea: cut the video into stretches of frames so that as many tokens as possible repeat from frame to
frame at their place throughout a stretch, and merge each such run into its first token. What is
left gets an equal ratio in every frame: cluster centres by density peaks stay, each token that goes
is merged into the nearest of them.

Why it works: stretches chosen over the whole video find more that repeats than windows of fixed
length; a mean loses less than a dropped token.

Paper: HoliTom, arXiv 2505.21334 (NeurIPS 2025); it reports 99.1 % of LLaVA-OneVision-7B's quality
at 6.9 % of the FLOPs.
Official code: cokeshao/HoliTom (Apache-2.0).
Differences: the budget is met exactly: where more tokens are kept than repeat, those of the runs
that changed most stay on their own (the authors' code then keeps less than asked); every part of a
frame keeps a token where the budget allows, where the authors' code rounds the count of every part.
Of the tokens that do not repeat, the authors' code keeps those with the most attention in the
vision tower and drops the rest; here they are clustered like the others, since not every tower
shows its attention. Of tokens of equal density none is the denser, and ties go to the earlier,
where the authors' code adds noise. Tokens that are not patches (newlines) go first, where the
authors' code makes a newline for every row that keeps a token. Positions are kept, where the
authors' code renumbers them (`positions: renumber`). Videos of one prompt share one budget. The
published 99.1 % is with a second part: at layer 18 of 28 half of the tokens stay, those that the
prompt's last token attends to most, and the others are merged into those most similar to them. With
`at: schedule` both are done from one budget, whose layer average is 23/28 of what is left at the
input; the second cut is a stage of `fastv` with `rest: merge`, which merges by plain means, where
the authors' code halves a token with each that joins it, in order: the same where no more than one
does. As in the authors' code: a run is clustered by its mean over its frames; the density of a
token is exp(-d^2 / D), d^2 the mean squared distance to its nearest 7 and D the width of the
states, which are not scaled, so that it is the densest tokens that stay, however alike, where
states are long (in the embedded model d^2 / D is above 500); a centre keeps 0.6 of itself and takes
0.4 from the mean of its cluster; frames share one ratio, and pictures are left alone.

Options:
    similar: "budget" (default) or a number from 0 to 1: a run is merged where every step of it is
        more similar (cosine) than that; 1 merges no run. "budget" is what the authors run: 0.65
        where at most a tenth of the tokens stay, 0.8 above.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from vtprune.device import send
from vtprune.pruners.base import Budget, Selection, VisualTokens, keep_best, read_checked
from vtprune.pruners.evs import changes
from vtprune.pruners.similarity import density_peaks
from vtprune.tokens.layout import PATCH, Layout
from vtprune.tokens.quotas import weighted_quotas
from vtprune.tokens.schedule import CutProfile, falling_once

# Of the released code.
OWN_SHARE = 0.6  # of a centre, in what its cluster is merged into
NEIGHBOURS = 7  # of a token's density, itself included
FEW = 0.1  # the largest kept fraction at which SIMILAR_OF_FEW holds
SIMILAR_OF_FEW, SIMILAR = 0.65, 0.8
DEPTHS = (0.0, 18 / 28)
DEEP = 1 / 2  # of the tokens that the first cut leaves


def schedule() -> CutProfile:
    """Both published parts; half of what the first leaves stays at the second."""
    return falling_once(DEPTHS, DEEP)


@dataclass(frozen=True)
class HoliTom:
    similar: float | str = "budget"

    needs = ("hidden",)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        layout, states = tokens.layout, tokens.states["hidden"].flatten(1)
        changed = changes(states, layout.previous())
        changed = read_checked(changed, changed, "holitom")
        head = run_heads(layout, changed < 1 - self.least_similar(budget))
        alone = stay_alone(layout, head, changed, budget)
        token_index = torch.arange(len(layout))
        parts = parts_of(layout, head, budget)
        head = torch.where(alone, token_index, head)
        centres, into = cluster_heads(parts, states, head)
        head = send(head, states.device)
        single = send(token_index[alone], states.device)
        into[single] = single
        index = torch.cat([centres, single]).sort().values
        place = torch.full((len(layout) + 1,), -1, device=states.device)  # the last one for none
        place[index] = torch.arange(len(index), device=states.device)
        return Selection(index, place[into[head]], shares(head, into))

    def least_similar(self, budget: Budget) -> float:
        """The cosine above which a token repeats the one before it."""
        if isinstance(self.similar, float):
            return self.similar
        few = budget.count <= FEW * len(budget.group) + 1e-6
        return SIMILAR_OF_FEW if few else SIMILAR


def run_heads(layout: Layout, repeats: torch.Tensor) -> torch.Tensor:
    """Return (N,) int64, the first token of the run that each token is in; itself for no run.

    Args:
        repeats: (N,) bool, whether a token is like the one before it at its place.
    """
    heads, grid = torch.arange(len(layout)), layout.grid
    for number in layout.media.unique().tolist():
        patches = ((layout.media == number) & (grid.kind == PATCH)).nonzero().squeeze(1)
        frames, frame = grid.frame[patches].unique(return_inverse=True)
        key = torch.stack([grid.tile[patches], grid.row[patches], grid.col[patches]])
        places, place = torch.unique(key, dim=1, return_inverse=True)
        table = torch.full((len(frames), places.shape[1]), -1)
        table[frame, place] = patches  # (T, P) tokens
        filled = table >= 0
        still = repeats[table] & filled
        still[1:] &= filled[:-1]
        for first, last in cut_into_stretches(still):
            if first == last:  # nothing repeats, and not every place is in the frame
                continue
            static = still[first + 1 : last + 1].all(dim=0)
            run = table[first : last + 1, static]
            heads[run] = run[:1].expand_as(run)
    return heads


def cut_into_stretches(still: torch.Tensor) -> list[tuple[int, int]]:
    """Return (first, last) frame of the stretches of a video that save the most tokens.

    A stretch saves, for every place that repeats throughout it, all tokens but the first. Found by
    dynamic programming; of equal ones the shorter stretches.

    Args:
        still: (T, P) bool, whether a place repeats the frame before.
    """
    num_frames = len(still)
    best, start = [0] * (num_frames + 1), list(range(num_frames))
    saved = []
    for first in range(num_frames):  # places that repeat from there to each later frame
        lasting = still[first + 1 :].int().cummin(dim=0).values.sum(dim=1)
        saved.append((lasting * torch.arange(1, len(lasting) + 1)).tolist())
    for last in range(num_frames):
        best[last + 1] = best[last]
        for first in range(last - 1, -1, -1):
            total = best[first] + saved[first][last - first - 1]
            if total > best[last + 1]:
                best[last + 1], start[last] = total, first
    stretches, last = [], num_frames - 1
    while last >= 0:
        stretches.append((start[last], last))
        last = start[last] - 1
    return stretches[::-1]


def stay_alone(
    layout: Layout, head: torch.Tensor, changed: torch.Tensor, budget: Budget
) -> torch.Tensor:
    """Return (N,) bool, the tokens that are kept although they repeat, or are no patches.

    Where a budget has room for more than the heads: those that changed most.
    """
    scores = changed.clone()
    is_head = head == torch.arange(len(layout))
    scores[is_head] = 3.0  # more than any change
    scores[layout.grid.kind != PATCH] = -1.0
    kept = torch.zeros(len(layout), dtype=torch.bool)
    kept[keep_best(scores, budget)] = True
    return kept & (scores < 3.0)


def cluster_heads(
    parts: Iterable[tuple[torch.Tensor, int]], states: torch.Tensor, head: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the kept heads, and (N,) the token that each is merged into; -1 for none.

    Args:
        parts: heads that are clustered together, and how many of them are kept.
        states: (N, d).
        head: (N,) int64 head of the run that each token is merged into, on the CPU.
    """
    into = torch.full((len(states),), -1, device=states.device)
    kept = []
    for members, share in parts:
        heads = send(members, states.device)
        if 0 < share < len(members):
            rows = run_means(states, head, members) / states.shape[1] ** 0.5
            chosen, nearest = density_peaks(rows, share, min(NEIGHBOURS, share))
            into[heads] = heads[chosen][nearest]
            kept.append(heads[chosen])
        elif share:
            into[heads] = heads
            kept.append(heads)
    return torch.cat(kept) if kept else into[:0], into


def run_means(states: torch.Tensor, head: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """(n, d) float32 means of the runs whose heads are `members`.

    Args:
        states: (N, d).
        head: (N,) int64 head of each token's run, on the CPU.
        members: (n,) int64, on the CPU.
    """
    place = torch.full_like(head, -1)
    place[members] = torch.arange(len(members))
    place = place[head]
    in_runs = (place >= 0).nonzero().squeeze(1)
    place = place[in_runs]
    sizes = send(torch.bincount(place, minlength=len(members)), states.device)
    rows = torch.zeros(len(members), states.shape[1], device=states.device)
    inside = states[send(in_runs, states.device)].float()
    return rows.index_add_(0, send(place, states.device), inside) / sizes[:, None]


def parts_of(
    layout: Layout, head: torch.Tensor, budget: Budget
) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield the tokens that are clustered together, and how many of them are kept.

    That is, in every group of the budget, each frame's heads with a run, and those without: of all
    these parts the same ratio stays, and at least one token where the budget allows.
    """
    patch = layout.grid.kind == PATCH
    heads = ((head == torch.arange(len(layout))) & patch).nonzero().squeeze(1)
    has_run = torch.bincount(head, minlength=len(layout))[heads] > 1
    group = budget.group[heads]
    key = torch.stack([group, layout.groups("frame")[heads], has_run.long()])
    kinds, part = torch.unique(key, dim=1, return_inverse=True)
    sizes = torch.bincount(part, minlength=kinds.shape[1])
    members = heads[part.argsort(stable=True)].split(sizes.tolist())
    for number, quota in enumerate(budget.quota.tolist()):
        part_numbers = (kinds[0] == number).nonzero().squeeze(1).tolist()
        part_sizes = [int(sizes[part_number]) for part_number in part_numbers]
        total = min(quota, sum(part_sizes))
        counts = weighted_quotas(total, part_sizes, part_sizes) if part_sizes else []
        for part_number, count in zip(part_numbers, counts, strict=True):
            yield members[part_number], count


def shares(head: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """(N,) float32 share of every token in the one that it is merged into.

    A run is a plain mean; a centre keeps OWN_SHARE of itself, and the other heads of its cluster
    have equal parts of the rest.

    Args:
        head: (N,) int64 head of each token's run.
        into: (N,) int64 centre of each head, -1 for none.
    """
    itself = torch.arange(len(head), device=head.device)
    one_each = torch.ones(len(head), device=head.device)
    length = torch.zeros_like(one_each).index_add_(0, head, one_each)
    target = into.clamp_min(0)
    joins = ((head == itself) & (into >= 0) & (into != itself)).float()
    others = torch.zeros_like(one_each).index_add_(0, target, joins)[target]
    share = torch.where(into == itself, OWN_SHARE, (1 - OWN_SHARE) / others.clamp_min(1))
    share = torch.where(others > 0, share, 1.0) * (into >= 0)
    return (share / length.clamp_min(1))[head]
