"""Qwen3-VL: pictures and videos of any size, a time before every pair of frames."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from vtprune.models import frames, patches, preprocess, prompt
from vtprune.models.base import Files, Inputs, Plan, Prepared, Sampling, Turn, VisionInputs
from vtprune.tokens.layout import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

TOKENS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
COMMON: Mapping[str, object] = {
    "resample": 3,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
DEFAULTS: Mapping[str, Mapping[str, object]] = {
    # A picture's processor is Qwen2-VL's; these are the values of the official checkpoints.
    "image": {**COMMON, "size": {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}},
    "video": {
        **COMMON,
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
        "fps": 2.0,
        "min_frames": 4,
        "max_frames": 768,
        "cap_pixels_per_frame": True,
        "max_video_tokens": 768,
    },
}

# The chat format of the official checkpoints; no default system prompt.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Qwen3VL:
    """A grid of merged patches for each picture, and for each pair of a video's frames."""

    name = "Qwen3-VL"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
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

        That is 2 frames a second, at least 4 and at most 768, from the first to the last. The
        limits of a video's pixels are for all frames together, and each frame has at most an even
        share of them and 768 tokens, as in the authors' qwen-vl-utils. max_tiles does not apply.
        """
        values = patches.read_values(files, source.kind, DEFAULTS)
        return patches.plan_source(source, sampling, values, _official, _size)

    def encode(self, files: Files, media: Sequence[Prepared], turns: Sequence[Turn]) -> Inputs:
        """The inputs; a video is a block for each pair of frames, the pair's mean time before it.

        The blocks stand between the start and end that the template writes around a video, as in
        the official processor.
        """
        values_of = functools.partial(patches.read_values, files, defaults=DEFAULTS)
        vision = patches.vision_inputs(media, values_of)
        text = prompt.render(files, media, turns, TOKENS, TEMPLATE)
        ids = self.placeholders(files.config)
        grids = self.grids(files.config, vision)
        videos = [one for one in media if one.source.kind == "video"]
        group = cast(int, values_of("video")["temporal_patch_size"])
        written = [
            _blocks(grid, frames.seconds(one), group)
            for grid, one in zip(grids.get("video", ()), videos, strict=True)
        ]
        tensors = prompt.encode(files, text, TOKENS, ids, grids, {"video": written})
        tensors["mm_token_type_ids"] = patches.type_ids(tensors["input_ids"], ids)
        for given in vision.values():
            tensors |= given
        pictures = sum(one.source.kind == "image" for one in media)
        return Inputs(tensors, text, (1,) * pictures)


def _blocks(grid: Grid, seconds: list[float], group: int) -> str:
    """A video in the prompt: the mean of a group's first and last time, then its tokens."""
    seconds = seconds + seconds[-1:] * (-len(seconds) % group)
    pads = TOKENS["video"] * (len(grid) * group // len(seconds))
    times = [(seconds[at] + seconds[at + group - 1]) / 2 for at in range(0, len(seconds), group)]
    return "".join(f"<{time:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for time in times)


def _size(source: Source, values: Mapping[str, object], num_frames: int) -> tuple[int, int]:
    """(height, width) of each frame, or of a picture."""
    side = patches.factor(values)
    least, most = patches.limits(values)
    if source.kind == "image":
        return preprocess.smart_resize(source.height, source.width, side, least, most)
    num_frames = max(num_frames, cast(int, values["temporal_patch_size"]))
    if values["cap_pixels_per_frame"]:
        each = min(cast(int, values["max_video_tokens"]) * side**2, most // num_frames)
        most = max(each, int(least * 1.05)) * num_frames
    return patches.clip_size(num_frames, source.height, source.width, values, least, most)


def _official(
    between: list[int], source: Source, values: Mapping[str, object], most: int | None
) -> list[int]:
    """`fps` frames a second within the limits, from the first to the last, to the nearest."""
    total = len(between)
    count = cast("int | None", values.get("num_frames"))
    if not count:
        count = int(total / source.fps * cast(float, values["fps"]))
        count = max(count, cast(int, values["min_frames"]))
        count = min(count, cast(int, values["max_frames"]))
    count = min(count, total, most or total)
    step = (total - 1) / max(count - 1, 1)
    return [between[round(number * step)] for number in range(count)]
