"""Give unusual frames of a video more tokens, and keep each frame's most unusual tokens.

Idea: a token is unusual if it is far from the mean token of its video and from that of its frame; a
frame, if its tokens are far from the video's mean on average. Frames share the budget by how
unusual they are, and each keeps its most unusual tokens.

Why it works: what makes a frame different from the rest of the video is lost if every frame is cut
to the same share.

Paper: VidCom2, arXiv 2505.14454 (EMNLP 2025).
Official code: xuyang-liu16/VidCom2 (Apache-2.0).
Differences: the shares of the frames add up to the budget exactly (the authors' code rounds each,
to at least one), and what a full frame can't use goes to the others; states that enter the layer of
the cut are compared, the projected features at the input; several videos share one budget, and each
frame is compared within its own video; tokens that are not patches (newlines) are in no mean and go
first (in LLaVA-Video the authors' code keeps all of them). Positions are kept, as in the authors'
code for Qwen; for LLaVA it renumbers them (`positions: renumber`). With `per: frame` or `per: tile`
the budget's own shares hold, and only the choice inside a frame is VidCom2's. As in the authors'
code: the half of the channels that vary least, unit rows, and the sum of five Gaussian kernels.

Options: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.device import send, with_float64
from vtprune.pruners.base import Budget, Selection, VisualTokens, checked, select_best
from vtprune.pruners.similarity import unit_rows
from vtprune.tokens.layout import PATCH, Layout
from vtprune.tokens.quotas import quotas

# Of the released code.
STEADY = 0.5  # share of the channels, those that vary least
WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)  # of the Gaussian kernels
TEMPERATURE = 0.01  # of the frames' shares
LAST = -100.0  # score of what is no patch; of patches it is from -10 to 0


@dataclass(frozen=True)
class VidCom2:
    needs = ("hidden",)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        layout = tokens.layout
        rows = steady_rows(tokens.states["hidden"].flatten(1))
        patch = send(layout.grid.kind == PATCH, rows.device)
        frame = layout.groups("frame")
        video = layout.items()
        to_video, to_frame = (likeness(rows, group, patch) for group in (video, frame))
        if len(budget.quota) == 1:
            weights = frame_weights(layout, frame, to_video, patch)
            quota = frame_quotas(budget.count, torch.bincount(frame).tolist(), weights)
            budget = Budget(frame, quota, budget.count)
        scores = -(to_video + to_frame)
        scores = scores.masked_fill(~patch, LAST)
        return checked(select_best(scores, budget), scores, "vidcom2")


def steady_rows(states: torch.Tensor) -> torch.Tensor:
    """(N, d') float32 unit rows of the channels that vary least; equal ones: the earlier.

    Args:
        states: (N, d).
    """
    rows = states.float()
    count = max(1, int(rows.shape[1] * STEADY))
    channels = rows.var(dim=0, unbiased=False).argsort(stable=True)[:count]
    return unit_rows(rows[:, channels])


def likeness(rows: torch.Tensor, group: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """(N,) in (0, 5]: the sum of Gaussian kernels between each row and the mean of its group.

    Args:
        rows: (N, d).
        group: (N,) int64, from 0, on the CPU.
        counted: (N,) bool, the rows that the means are taken over.
    """
    weight, num_groups = counted.to(rows.dtype), len(torch.bincount(group))
    group = send(group, rows.device)
    total = rows.new_zeros(num_groups, rows.shape[1]).index_add_(0, group, rows * weight[:, None])
    counts = rows.new_zeros(num_groups).index_add_(0, group, weight).clamp_min(1)
    apart = (rows - (total / counts[:, None])[group]).square().sum(dim=1)
    return sum(((-apart / (2 * width)).exp() for width in WIDTHS), torch.zeros_like(apart))


def frame_weights(
    layout: Layout, frame: torch.Tensor, to_video: torch.Tensor, patch: torch.Tensor
) -> torch.Tensor:
    """Return (F,) float64 weight of every frame: its tokens, times 1 + p - 1/T.

    p is the softmax over the T frames of its video of how unusual each is. The weights are on the
    states' device, or on the CPU where that has no float64.

    Args:
        frame: (N,) int64 number of each token's frame.
        to_video, patch: (N,) likeness to the video's mean, and whether it is a patch.
    """
    sizes = torch.bincount(frame)
    index, weight = send(frame, to_video.device), patch.to(to_video.dtype)
    zero = to_video.new_zeros(len(sizes))
    num_patches = zero.index_add(0, index, weight)
    mean = zero.index_add(0, index, to_video * weight) / num_patches.clamp_min(1)
    unusual = (-mean / TEMPERATURE).to(with_float64(mean.device)).double()
    weights = send(sizes.double(), unusual.device)
    item = torch.zeros(len(sizes), dtype=torch.long).scatter_(0, frame, layout.media)
    for number in item.unique().tolist():
        frames = send((item == number).nonzero().squeeze(1), weights.device)
        weights[frames] *= 1 + unusual[frames].softmax(dim=0) - 1 / len(frames)
    return weights


def frame_quotas(count: int, sizes: list[int], weights: torch.Tensor) -> torch.Tensor:
    """Return (F,) int64 tokens to keep in each frame, on the weights' device, which is not read.

    As `weighted_quotas` shares them, but for the last bit of sums, which may decide between
    remainders that are equal. None goes without, as far as the count allows; where the weights see
    to that, they alone say the shares.

    Args:
        count: of them all.
        sizes: tokens of every frame.
        weights: (F,) float64, above 0.
    """
    size = send(torch.tensor(sizes), weights.device)
    scarce = count * weights.min() < weights.sum()
    least = scarce.long().expand_as(size)
    room, unshared = size - least, count - least.sum()
    # Frames are filled in the order in which a growing budget fills them, as far as this one does.
    order = (room / weights).argsort(stable=True)
    weight, rooms = weights[order], room[order]
    total = weight.flip(0).cumsum(0).flip(0)  # of the frames not yet filled
    left = unshared - (rooms.cumsum(0) - rooms)
    filled = (left * (weight / total) >= rooms).long().cummin(0).values
    full = torch.zeros_like(size).scatter_(0, order, filled).bool()
    total = weights.masked_fill(full, 0.0).sum()
    left = unshared - room.masked_fill(~full, 0).sum()
    exact = (left * (weights / total)).masked_fill(full, 0.0)
    whole = exact.floor()
    share = least + torch.where(full, room, whole.long())
    by_remainder = (exact - whole).masked_fill(full, -1.0).argsort(descending=True, stable=True)
    places = torch.arange(len(sizes), device=size.device)
    first = (places < count - share.sum()).long()
    share = share + torch.zeros_like(size).scatter_(0, by_remainder, first)
    if count >= len(sizes):
        return share
    return torch.where(scarce, send(torch.tensor(quotas(count, sizes)), size.device), share)
