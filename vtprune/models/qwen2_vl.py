"""Qwen2-VL: pictures and videos of any size, frames merged two by two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models import cost, preprocess
from vtprune.models.base import Contents
from vtprune.models.patches import MergedPatches, Values, limits, token_side, tower_shape

if TYPE_CHECKING:
    from vtprune.media import Source

TOKENS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
SPECIAL_TOKENS = {
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
}
COMMON: Mapping[str, object] = {
    "resample": 3,
    "image_mean": preprocess.CLIP_MEAN,
    "image_std": preprocess.CLIP_STD,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
IMAGE = {**COMMON, "size": {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}}
VIDEO = {
    **COMMON,
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
    "fps": 2.0,
    "min_frames": 4,
    "max_frames": 768,
    "cap_pixels_per_frame": True,
    "max_video_tokens": 128_000,
}
DEFAULTS: Mapping[str, Values] = {"image": IMAGE, "video": VIDEO}

# The chat format of the official checkpoints, their default system prompt included.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Qwen2VL(MergedPatches):
    """A grid of merged patches for each picture, and for each pair of a video's frames."""

    name = "Qwen2-VL"
    model_types = ("qwen2_vl",)
    earlier_kinds = frozenset({"qwen", "QWenLMHeadModel"})
    tokens = TOKENS
    special_tokens = SPECIAL_TOKENS
    template = TEMPLATE
    defaults = DEFAULTS

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        tower = getattr(config, "vision_config", None)
        hidden = cost.size_of(tower, "embed_dim")
        intermediate = int(hidden * getattr(tower, "mlp_ratio", 4))
        return tower_shape(config, hidden, intermediate, cost.size_of(tower, "hidden_size"))

    def frame_size(self, source: Source, values: Values, num_frames: int) -> tuple[int, int]:
        """A video's frames share a budget of pixels, as in qwen-vl-utils."""
        side = token_side(values)
        least, most = limits(values)
        if source.kind == "video" and values["cap_pixels_per_frame"]:
            budget = int(cast(int, values["max_video_tokens"]) * side * side * 0.9)
            share = budget * cast(int, values["temporal_patch_size"]) // num_frames
            most = max(min(most, share), int(least * 1.05))
        return preprocess.smart_resize(source.height, source.width, side, least, most)

    def official_frames(
        self, between: list[int], source: Source, values: Values, most: int | None
    ) -> list[int]:
        """2 frames a second, at least 4 and at most 768, an even number; short clips whole.

        Each is the first of an equal part (transformers' Qwen2VLVideoProcessor; qwen-vl-utils takes
        as many, but from the first to the last).
        """
        group = cast(int, values["temporal_patch_size"])
        total = len(between)
        counted = cast("int | None", values.get("num_frames"))
        if counted:
            count = round(counted / group) * group
        else:
            limit = min(cast(int, values["max_frames"]), total) // group * group
            frames_at_fps = total / source.fps * cast(float, values["fps"])
            frames_at_fps = min(max(frames_at_fps, cast(int, values["min_frames"])), limit)
            count = math.floor(frames_at_fps / group) * group
        if most is not None:
            count = min(count, max(most // group * group, min(most, group)))
        return between if count < 1 else even_parts(between, count)

    def published_files(self, side: int) -> Contents:
        return {"image": {"min_pixels": 3136, "max_pixels": 12845056}}


def even_parts(between: list[int], count: int) -> list[int]:
    """Return the first frame of each of `count` equal parts, in torch's float32 as upstream."""
    if count >= len(between):
        return between
    positions = torch.arange(0, len(between), len(between) / count).int()
    return [between[position] for position in positions.tolist()]
