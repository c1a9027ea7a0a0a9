"""Cut a video where its frames change; keep attended tokens of every frame, and merge the rest.

Idea: a video is cut into segments where neighbouring frames differ most. In every segment three
fifths of what is kept are the tokens that the vision tower attends to most, frame by frame. The
others are anchors: in the segment's last frame, and in every fourth before it, the tokens that are
dense and far from what is denser. All other tokens of the segment are merged into the most similar
anchor.

Why it works: inside a segment frames show nearly the same, so that a few anchors stand for what is
there, while attended tokens hold the details; and nothing is merged across a change of scene.

Paper: FastVID, arXiv 2503.11187 (NeurIPS 2025).
Official code: LunarShen/FastVID.
Differences: frames are compared by the mean of their tokens behind the projector, where the authors
use the tower's own feature of a frame; a tower without a CLS token gives the attention that its
patches receive in the mean, as the paper does for Qwen, and no head is added to SigLIP. Tokens are
merged into one anchor of the segment, where the authors assign them anew for each anchor frame: the
same in segments of up to four frames. As in their code, attended tokens stay as they are; an anchor
keeps 0.6 of itself and takes 0.4 from the mean of all that join it, itself included; each frame's
part for anchors is rounded down; squared distances are divided by the width of the states, and the
density counts the nearest 4, the token itself included. Where theirs adds noise to the density, of
equal ones none is the denser. Counts are exact, where theirs rounds each frame down: frames share
the budget equally, and where too few anchors fit into their frames, attended tokens take their
places. Several videos share one budget, and each has its own segments. With `per: frame` each frame
is a segment of its own. Tokens that are not patches (newlines) go first. Positions are kept, as in
their code. Ties go to the earlier token. Float32.

Options:
    contextual: 0.4 (default), the part of the budget for anchors; from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vtprune.device import send
from vtprune.pruners.base import (
    Budget,
    Selection,
    VisualTokens,
    keep_best,
    merged_into,
    read_checked,
    true_places,
)
from vtprune.pruners.similarity import BLOCK, SAME, cosines, density_peaks, unit_rows
from vtprune.tokens.layout import PATCH, Layout
from vtprune.tokens.quotas import quotas
from vtprune.tokens.schedule import SLACK

# As published.
SEGMENTS = 8  # at least, in a video of as many frames
SIMILAR = 0.9  # cosine of neighbouring frames below which a segment ends
ANCHOR_STEP = 4  # frames from one with anchors to the next
NEIGHBOURS = 4  # of a token's density, itself included
OWN_SHARE = 0.6  # of an anchor, beside its part in the mean of all that join it


@dataclass(frozen=True)
class FastVid:
    contextual: float = 0.4

    needs = ("tower_attention", "hidden")

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        return select_patches(tokens, budget, self.merge)

    def merge(self, video: FrameSegments, patches: Patches) -> Merged:
        """Return what each patch is merged into, and its share there."""
        states = patches.states
        video = replace(video, segment=patches.read(video.segment, "fastvid"))
        num_anchors, num_attended = self.share(video)
        attended = keep_best(patches.attention, Budget(video.frame, num_attended))
        target = torch.full((len(states),), -1, device=states.device)
        target[attended] = attended
        for frames in video.frames_of_segments():
            rest = send(torch.cat([video.tokens[frame] for frame in frames]), states.device)
            free = len(rest) - int(num_attended[frames].sum())
            rest = rest[true_places(target[rest] < 0, free)]
            anchors = [rest[:0]]
            for frame in with_anchors(frames):
                if num_anchors[frame]:
                    members = send(video.tokens[frame], states.device)
                    free = len(members) - int(num_attended[frame])
                    members = members[true_places(target[members] < 0, free)]
                    rows = states[members].float() / states.shape[1] ** 0.5
                    count = int(num_anchors[frame])
                    anchors.append(members[density_peaks(rows, count, NEIGHBOURS)[0]])
            aims = torch.cat(anchors)
            if len(aims):
                rows = unit_rows(states[aims])
                for part in rest.split(BLOCK):
                    target[part] = aims[cosines(unit_rows(states[part]), rows).argmax(dim=1)]
                target[aims] = aims
        return target, anchor_shares(target)

    def share(self, video: FrameSegments) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (F,) int64 how many anchors, and how many attended tokens, each frame has."""
        sizes, shares = torch.bincount(video.frame), video.shares()
        anchors, attended = torch.zeros_like(sizes), torch.zeros_like(sizes)
        for frames in video.frames_of_segments():
            anchor_frames, shared = with_anchors(frames), shares[frames].tolist()
            contextual = sum(math.floor(self.contextual * share + SLACK) for share in shared)
            contextual = min(contextual, int(sizes[anchor_frames].sum()))
            if sum(shared) == int(sizes[frames].sum()):
                contextual = 0
            anchors[anchor_frames] = torch.tensor(quotas(contextual, sizes[anchor_frames].tolist()))
            left = (sizes - anchors)[frames].tolist()
            attended[frames] = torch.tensor(quotas(sum(shared) - contextual, left))
        return anchors, attended


def with_anchors(frames: list[int]) -> list[int]:
    """Return the frames of a segment that have anchors: its last one, and every fourth before."""
    return frames[(len(frames) - 1) % ANCHOR_STEP :: ANCHOR_STEP]


def anchor_shares(target: torch.Tensor) -> torch.Tensor:
    """Return (N,) float32 share of every token in the one that it is merged into.

    Args:
        target: (N,) int64, its own number for an anchor or an attended token, -1 for none.
    """
    used = (target >= 0).float()
    into = target.clamp_min(0)
    sizes = torch.zeros_like(used).index_add_(0, into, used)[into]
    itself = target == torch.arange(len(target), device=target.device)
    return used * ((1 - OWN_SHARE) / sizes.clamp_min(1) + OWN_SHARE * itself)


# -- patches and segments of videos ----------------------------------------------------------------

Merged = tuple[torch.Tensor, torch.Tensor]
"""(N,) int64 token that each is merged into, its own number for a kept one, -1 for none; and (N,)
float32 its share there."""


@dataclass(frozen=True, eq=False)
class FrameSegments:
    """The patches of videos, by frame and segment; frames of two groups of the budget are apart.

    Args:
        frame: (N,) int64 number of each patch's frame, ascending by group, video and time.
        segment: (F,) int64 number of each frame's segment, ascending; on the device, until it is
            read.
        group: (F,) int64 group of the budget that each frame is in.
        quota: (G,) int64 patches to keep in each group.
        tokens: of every frame, the numbers of its patches, ascending.
    """

    frame: torch.Tensor
    segment: torch.Tensor
    group: torch.Tensor
    quota: torch.Tensor
    tokens: tuple[torch.Tensor, ...]

    def shares(self) -> torch.Tensor:
        """Return (F,) int64 equal shares of the frames in their groups' quotas."""
        sizes = torch.bincount(self.frame)
        shared = torch.zeros_like(sizes)
        for number, quota in enumerate(self.quota.tolist()):
            frames = (self.group == number).nonzero().squeeze(1)
            shared[frames] = torch.tensor(quotas(quota, sizes[frames].tolist()), dtype=torch.long)
        return shared

    def frames_of_segments(self) -> list[list[int]]:
        """Return the frames of every segment."""
        sizes = torch.bincount(self.segment).tolist()
        return [part.tolist() for part in torch.arange(len(self.segment)).split(sizes)]


@dataclass(frozen=True, eq=False)
class Patches:
    """The N patches of videos, on their device.

    Args:
        states: (N, d).
        attention: (N,) of the tower.
        means: (F, d) float32 mean state of every frame.
    """

    states: torch.Tensor
    attention: torch.Tensor
    means: torch.Tensor

    def read(self, numbers: torch.Tensor, method: str) -> torch.Tensor:
        """Return (n,) numbers that follow from them on the CPU.

        Raises:
            ModelError: states or attention that are not finite.
        """
        values = torch.cat([self.attention, self.means.sum(dim=1)])
        return read_checked(numbers, values, method)


Merge = Callable[[FrameSegments, Patches], Merged]
"""(segments not yet read, patches) -> what the patches become."""


def select_patches(tokens: VisualTokens, budget: Budget, merge: Merge) -> Selection:
    """Keep and merge patches; what is none (newlines) is kept where the budget has room for it.

    Raises:
        ModelError: states that are not finite.
    """
    states = tokens.states["hidden"].flatten(1)
    attention = send(tokens.states["tower_attention"], states.device)
    is_patch = tokens.layout.grid.kind == PATCH
    patch = is_patch.nonzero().squeeze(1)
    sizes = torch.bincount(budget.group[patch], minlength=len(budget.quota))
    quota = budget.quota.minimum(sizes)
    others = keep_best(-is_patch.float(), Budget(budget.group, budget.quota - quota))
    target = torch.full((len(tokens),), -1, device=states.device)
    weight = torch.zeros(len(tokens), device=states.device)
    others = send(others, states.device)
    target[others] = others
    weight.index_fill_(0, others, 1.0)
    if len(patch):
        layout, place = tokens.layout.take(patch), send(patch, states.device)
        states, group = states[place], budget.group[patch]
        into, weight[place] = merge(*find_segments(layout, states, attention[place], group, quota))
        target[place] = torch.where(into >= 0, place[into], -1)
    itself = target == torch.arange(len(target), device=target.device)
    index = true_places(itself, budget.count)
    return replace(merged_into(target, index), weight=weight)


def find_segments(
    layout: Layout,
    states: torch.Tensor,
    attention: torch.Tensor,
    group: torch.Tensor,
    quota: torch.Tensor,
) -> tuple[FrameSegments, Patches]:
    """Return the frames of the videos, in segments that are still on the device.

    A segment ends where the next frame of its video and group is less than `SIMILAR` to it, and
    where that is least, until the video has `SEGMENTS`.

    Args:
        layout: of patches alone.
        states: (N, d).
        attention: (N,) of the tower.
        group: (N,) int64.
        quota: (G,) int64.
    """
    key = torch.stack([group, layout.groups("frame")])
    (of_group, _), frame = torch.unique(key, dim=1, return_inverse=True)
    tokens = frame.argsort(stable=True).split(torch.bincount(frame).tolist())
    means = torch.stack([states[send(part, states.device)].float().mean(dim=0) for part in tokens])
    rows = unit_rows(means)
    similar = (rows[1:] * rows[:-1]).sum(dim=1)
    similar = similar.masked_fill(similar > SAME, 1.0)
    video = torch.stack([layout.media[part[0]] for part in tokens])
    same = (video[1:] == video[:-1]) & (of_group[1:] == of_group[:-1])
    ends = send(~same, states.device) | (similar < SIMILAR)
    stretch = torch.cat([torch.zeros(1, dtype=torch.long), (~same).long().cumsum(0)])
    for number in stretch.unique().tolist():
        inside = send((same & (stretch[1:] == number)).nonzero().squeeze(1), states.device)
        least = similar[inside].argsort(stable=True)[: SEGMENTS - 1]
        ends.index_fill_(0, inside[least], True)
    segment = torch.cat([ends.new_zeros(1, dtype=torch.long), ends.long().cumsum(0)])
    segments = FrameSegments(frame, segment, of_group, quota, tokens)
    return segments, Patches(states, attention, means)
