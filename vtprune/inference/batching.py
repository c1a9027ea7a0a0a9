"""Several prompts as one left-padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import pad

ROWS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
FRAMES = "pixel_values_videos"
POOLED = {"image_token_pooling": "pixel_values", "video_token_pooling": FRAMES}
"""Numbers of patches, counted over the whole batch -> the (tiles or frames, patches, d) they are of
(Molmo2)."""

Tensors = Mapping[str, torch.Tensor]


def group_alike(prompts: Sequence[Tensors], size: int) -> list[list[int]]:
    """Numbers of the prompts that can be one batch, at most `size` in each, order kept inside.

    Videos that a family stacks as (1, frames, 3, h, w) need the same number of frames: a padding
    frame would be looked at. All others are apart from pictures, whose placeholders they may share.
    """
    alike: dict[object, list[int]] = {}
    for number, prompt in enumerate(prompts):
        video = prompt.get(FRAMES)
        shape = () if video is None or video.dim() < 5 else tuple(video.shape[1:])
        alike.setdefault((video is None, shape), []).append(number)
    return [
        numbers[start : start + size]
        for numbers in alike.values()
        for start in range(0, len(numbers), size)
    ]


def collate(prompts: Sequence[Tensors], pad_id: int) -> dict[str, torch.Tensor]:
    """One batch of prompts of batch 1.

    Token rows are padded on the left to the longest; pixel tensors are joined along their first
    dimension, smaller ones filled up with zeros (tiles that the models cut off by the sizes that
    they are given).
    """
    if len(prompts) == 1:
        return dict(prompts[0])
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt):
        parts = [prompt[name] for prompt in prompts if name in prompt]
        if name in ROWS:
            fill = pad_id if name == "input_ids" else 0
            rows = [pad(part, (longest - part.shape[1], 0), value=fill) for part in parts]
            batch[name] = torch.cat(rows)
        elif name in POOLED:
            own = [prompt for prompt in prompts if name in prompt]
            batch[name] = torch.cat(count_on(parts, [one[POOLED[name]] for one in own]))
        else:
            batch[name] = torch.cat(fill_up(parts))
    return batch


def count_on(parts: Sequence[torch.Tensor], pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Numbers of patches, each part's own, as numbers among those of all parts; -1 is none.

    Args:
        pixels: (tiles or frames, patches, d) of each part.
    """
    counted, before = [], 0
    for part, own in zip(parts, pixels, strict=True):
        counted.append(torch.where(part >= 0, part + before, part))
        before += own.shape[0] * own.shape[1]
    return counted


def fill_up(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors with zeros behind, so that they agree in all dimensions but the first."""
    sizes = [max(part.shape[dim] for part in parts) for dim in range(1, parts[0].dim())]
    filled = []
    for part in parts:
        missing = [size - have for size, have in zip(sizes, part.shape[1:], strict=True)]
        ends = [end for gap in reversed(missing) for end in (0, gap)]
        filled.append(pad(part, ends) if any(missing) else part)
    return filled
