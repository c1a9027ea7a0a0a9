"""Keep attended and unlike tokens of every frame; chain the rest over time, wherever they move.

Idea: in every frame the tokens that are farthest from each other are kept, their distance weighted
by the attention of the vision tower and by how much they are like the segment's mean frame. Each of
the others is linked to the most similar one of the frame before, at any place, if that is similar
enough; such trees become their means. A deep layer cuts once more, by the attention of the prompt's
last token.

Why it works: what stays the same in a video moves, so that the same place in the next frame is
another thing; and a mean over time loses less than a dropped token. What must not be lost in a mean
is chosen before.

Paper: FlashVID, arXiv 2602.08024 (ICLR 2026).
Official code: Fanziyang-v/FlashVID, MIT.
Differences: the first cut leaves 1.25 times the budget and the second, before layer 20 of 28, 0.3
of that, as published, in decoders of any depth; where the budget lets the first keep everything,
the second gets the rest; at a place of its own (`at: input`) there is the first cut alone. Frames
share the budget equally, and 0.7 of each share, rounded up as in the authors' code, is chosen. Each
segment keeps as many trees as its frames have places left; where it has more, they are shared over
the frames in proportion to the trees that begin there, and density peaks choose, as in `holitom`,
the other trees merged into them; where it has fewer, its weakest links are cut. Counts are exact,
where their code rounds up in every frame of a segment. A tree is the mean of its tokens, as in the
paper, where their code divides the sum of a chain of three or more by fewer. What is chosen is not
clustered once more in a segment of one frame, nor chosen twice, as their code may do. Segments are
those of `fastvid`, whose minimum of 8 and threshold of 0.9 the paper takes over. A relevance below
zero counts as zero. The first token's rule is the paper's own: the largest weighted distance to its
nearest neighbour. Several videos share one budget. With `per: frame` nothing is linked. Tokens that
are not patches (newlines) go first. Positions are kept. Ties go to the earlier token. Float32.

Options:
    similar: 0.8 (default), the least cosine of a link; from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vtprune.device import send
from vtprune.pruners.base import Budget, Selection, VisualTokens
from vtprune.pruners.fastvid import FrameSegments, Merged, Patches, select_patches
from vtprune.pruners.holitom import cluster_heads
from vtprune.pruners.similarity import Similarity, choose_in_groups, cosines, unit_rows
from vtprune.tokens.quotas import weighted_quotas
from vtprune.tokens.schedule import SLACK, CutProfile, falling_once

# As published.
CHOSEN = 0.7  # of a frame's share
DEPTHS = (0.0, 20 / 28)
DEEP = 0.3  # of the tokens that the first cut leaves


def schedule() -> CutProfile:
    """The published cuts: 1.25 times the layer average at the input, 0.3 of that deep down."""
    return falling_once(DEPTHS, DEEP)


@dataclass(frozen=True)
class FlashVid:
    similar: float = 0.8

    needs = ("tower_attention", "hidden")

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        return select_patches(tokens, budget, self.merge)

    def merge(self, video: FrameSegments, patches: Patches) -> Merged:
        """Return what each patch is merged into, and its share there."""
        states, num_chosen = patches.states, chosen_of_frames(video)
        rows, weight = unit_rows(states), patches.attention * relevance(video, patches)
        chosen = choose_by_weight(rows, weight, Budget(video.frame, num_chosen))
        later, before, similar = most_similar_before(video, rows, chosen)
        # The bits of the cosines beside the numbers, so that the host reads all of it at once.
        numbers = [video.segment, chosen, before, similar.view(torch.int32).long()]
        read = patches.read(torch.cat(numbers), "flashvid")
        segment, taken, before, bits = read.split([len(part) for part in numbers])
        video = replace(video, segment=segment)
        num_trees = trees_of_segments(video, num_chosen)
        free = torch.ones(len(states), dtype=torch.bool)
        free[taken] = False
        similarity = torch.zeros(len(states))
        similarity[later] = bits.int().view(torch.float32)
        parent = torch.full((len(states),), -1)
        parent[later] = before
        together = video.segment[video.frame] == video.segment[video.frame - 1]
        parent[~(free & together & (similarity >= self.similar))] = -1
        cut_weakest(video, parent, similarity, free, num_trees)
        head = torch.arange(len(states))
        for tokens in video.tokens:  # the frame before comes first
            linked = tokens[parent[tokens] >= 0]
            head[linked] = head[parent[linked]]
        parts = parts_of(video, free & (parent < 0), num_trees)
        _, into = cluster_heads(parts, states, head)
        head = send(head, states.device)
        into[chosen] = chosen
        return into[head], tree_shares(head, into)


def chosen_of_frames(video: FrameSegments) -> torch.Tensor:
    """Return (F,) int64 tokens to choose in each frame."""
    return (video.shares() * CHOSEN - SLACK).ceil().long()


def trees_of_segments(video: FrameSegments, chosen: torch.Tensor) -> list[int]:
    """Return how many trees each segment keeps, beside the tokens `chosen` in each frame, (F,)."""
    trees = torch.zeros(int(video.segment.max()) + 1, dtype=torch.long)
    return trees.index_add_(0, video.segment, video.shares() - chosen).tolist()


def relevance(video: FrameSegments, patches: Patches) -> torch.Tensor:
    """Return (N,) float32 mean product of each patch with the mean patches of its segment's frames.

    Negative ones are 0.

    Args:
        video: its segments may be on the device.
    """
    states = patches.states
    same = (video.segment[:, None] == video.segment).float()  # (F, F)
    means = send(same, states.device) @ patches.means
    means = means / send(same.sum(dim=1, keepdim=True), states.device)
    weight = states.new_zeros(len(states), dtype=torch.float32)
    for tokens, mean in zip(video.tokens, means, strict=True):
        members = send(tokens, states.device)
        weight[members] = states[members].float() @ mean
    return weight.clamp_min_(0)


def most_similar_before(
    video: FrameSegments, rows: torch.Tensor, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (P,) the tokens with a frame before theirs, and of each the most similar one there.

    Args:
        rows: (N, d) from `unit_rows`.
        chosen: (K,) tokens that none is linked to.

    Returns:
        The tokens, on the CPU; and on the device those of the frame before, and the cosines: -inf
        where all of that frame are chosen.
    """
    barred = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    barred.index_fill_(0, chosen, True)
    later, best, cosine = [torch.zeros(0, dtype=torch.long)], [chosen[:0]], [rows[:0, 0]]
    for number in (video.group[1:] == video.group[:-1]).nonzero().squeeze(1).tolist():
        before, tokens = (send(video.tokens[n], rows.device) for n in (number, number + 1))
        similar = cosines(rows[tokens], rows[before]).masked_fill_(barred[before], -torch.inf)
        most, place = similar.max(dim=1)
        later.append(video.tokens[number + 1])
        best.append(before[place])
        cosine.append(most)
    return torch.cat(later), torch.cat(best), torch.cat(cosine)


def choose_by_weight(rows: torch.Tensor, weight: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Return the index, (K,) ascending, of the tokens of each group that are farthest apart.

    Args:
        rows: (N, d) from `unit_rows`.
        weight: (N,) at least 0, by which each token's distance counts.
    """

    def choose(
        part: torch.Tensor, numbers: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        by = weight[numbers]  # (G, n)
        similarity = Similarity(part, hold=True)
        value = ((1 - similarity.nearest()) * by).nan_to_num_(nan=0.0)
        nearest = torch.full_like(by, -1.0)  # cosine with the nearest one chosen
        taken = torch.zeros_like(by, dtype=torch.bool)
        order, added = [], []
        for _ in range(count):
            best, picked = value.masked_fill(taken, -1.0).max(dim=1)
            order.append(picked)
            added.append(best)
            taken.scatter_(1, picked[:, None], True)
            nearest = torch.maximum(nearest, similarity.to(picked))
            value = (1 - nearest) * by
        return torch.stack(order, dim=1), torch.stack(added, dim=1)

    return choose_in_groups(rows, budget, choose)


def cut_weakest(
    video: FrameSegments,
    parent: torch.Tensor,
    similarity: torch.Tensor,
    free: torch.Tensor,
    num_trees: list[int],
) -> None:
    """Cut the links of the least similar tokens where a segment has fewer trees than it keeps.

    Args:
        parent: (N,) int64, changed.
        similarity: (N,) with the parent.
        free: (N,) bool, the tokens of the trees.
        num_trees: of every segment.
    """
    segment = video.segment[video.frame]
    for number, count in enumerate(num_trees):
        members = free & (segment == number)
        missing = count - int((members & (parent < 0)).sum())
        if missing > 0:
            linked = (members & (parent >= 0)).nonzero().squeeze(1)
            parent[linked[similarity[linked].argsort(stable=True)[:missing]]] = -1


def parts_of(
    video: FrameSegments, root: torch.Tensor, num_trees: list[int]
) -> list[tuple[torch.Tensor, int]]:
    """Return the trees that begin in each frame, by their roots, and how many of them are kept.

    Args:
        root: (N,) bool.
        num_trees: of every segment.
    """
    parts: list[tuple[torch.Tensor, int]] = []
    for frames, count in zip(video.frames_of_segments(), num_trees, strict=True):
        members = [tokens[root[tokens]] for tokens in (video.tokens[frame] for frame in frames)]
        members = [some for some in members if len(some)]
        sizes = [len(some) for some in members]
        parts += zip(members, weighted_quotas(count, sizes, sizes), strict=True)
    return parts


def tree_shares(head: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """Return (N,) float32 share of each token where it is merged: means of the means of trees.

    Args:
        head: (N,) int64 root of each token's tree.
        into: (N,) int64 root that each root is merged into, -1 for none.
    """
    number = torch.arange(len(head), device=head.device)
    size = torch.zeros(len(head), device=head.device)
    size.index_add_(0, head, torch.ones_like(size))
    counted = ((head == number) & (into >= 0)).float()
    trees = torch.zeros_like(size).index_add_(0, into.clamp_min(0), counted)
    return (counted / trees[into.clamp_min(0)].clamp_min(1) / size.clamp_min(1))[head]
