"""Qwen2-VL: pictures and videos of any size, frames merged two by two."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models import patches, preprocess, prompt
from vtprune.models.base import Files, Inputs, Plan, Prepared, Sampling, Turn, VisionInputs
from vtprune.tokens.layout import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

TOKENS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
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
DEFAULTS = {"image": IMAGE, "video": VIDEO}

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


class Qwen2VL:
    """A grid of merged patches for each picture, and for each pair of a video's frames."""

    name = "Qwen2-VL"
    model_types = ("qwen2_vl",)
    modalities = ("image", "video")

    def placeholders(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        return {"image": (config.image_token_id,), "video": (config.video_token_id,)}

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> dict[str, list[Grid]]:
        """merge x merge patches are one token; a frame of the grid is a pair of the video's."""
        return patches.grids(config, vision)

    def largest(self, files: Files) -> tuple[int, int]:
        return patches.largest(patches.read_values(files, "image", DEFAULTS))

    def plan(self, files: Files, source: Source, sampling: Sampling, num_media: int) -> Plan:
        """Without frames or fps, the official sampling, after start and end.

        That is 2 frames a second, at least 4 and at most 768, an even number, each the first of an
        equal part (transformers' Qwen2VLVideoProcessor; qwen-vl-utils takes as many, but from the
        first to the last). A video's frames share a budget of pixels, as in qwen-vl-utils.
        max_tiles does not apply: there are no tiles, and a picture's own limits are in pixels.
        """
        values = patches.read_values(files, source.kind, DEFAULTS)
        return patches.plan_source(source, sampling, values, _official, _size)

    def encode(self, files: Files, media: Sequence[Prepared], turns: Sequence[Turn]) -> Inputs:
        """The inputs, `mm_token_type_ids` included, without which positions are silently wrong."""
        vision = patches.vision_inputs(
            media, functools.partial(patches.read_values, files, defaults=DEFAULTS)
        )
        text = prompt.render(files, media, turns, TOKENS, TEMPLATE)
        ids = self.placeholders(files.config)
        tensors = prompt.encode(files, text, TOKENS, ids, self.grids(files.config, vision))
        tensors["mm_token_type_ids"] = patches.type_ids(tensors["input_ids"], ids)
        for given in vision.values():
            tensors |= given
        pictures = sum(one.source.kind == "image" for one in media)
        return Inputs(tensors, text, (1,) * pictures)


def _size(source: Source, values: Mapping[str, object], num_frames: int) -> tuple[int, int]:
    """(height, width) of each frame, or of a picture."""
    factor = patches.factor(values)
    least, most = patches.limits(values)
    if source.kind == "video" and values["cap_pixels_per_frame"]:
        budget = int(cast(int, values["max_video_tokens"]) * factor * factor * 0.9)
        share = budget * cast(int, values["temporal_patch_size"]) // num_frames
        most = max(min(most, share), int(least * 1.05))
    return preprocess.smart_resize(source.height, source.width, factor, least, most)


def _official(
    between: list[int], source: Source, values: Mapping[str, object], most: int | None
) -> list[int]:
    """`fps` frames a second within the limits, rounded down to whole groups; short clips whole."""
    group = cast(int, values["temporal_patch_size"])
    total = len(between)
    own = cast("int | None", values.get("num_frames"))
    if own:
        count = round(own / group) * group
    else:
        limit = min(cast(int, values["max_frames"]), total) // group * group
        wanted = total / source.fps * cast(float, values["fps"])
        count = math.floor(min(max(wanted, cast(int, values["min_frames"])), limit) / group) * group
    if most is not None:
        count = min(count, max(most // group * group, min(most, group)))
    return between if count < 1 else even_parts(between, count)


def even_parts(between: list[int], count: int) -> list[int]:
    """The first frame of each of `count` equal parts, in torch's float32, as the official one."""
    if count >= len(between):
        return between
    positions = torch.arange(0, len(between), len(between) / count).int()
    return [between[position] for position in positions.tolist()]
