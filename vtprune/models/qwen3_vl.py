"""Qwen3-VL: pictures and videos of any size, a time before every pair of frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from vtprune.models import cost, frames, preprocess
from vtprune.models.base import Contents, Files, Grids, Media
from vtprune.models.patches import MergedPatches, Values, clip_size, limits, token_side, tower_shape
from vtprune.models.qwen2_vl import SPECIAL_TOKENS, TOKENS
from vtprune.tokens.layout import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

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
DEEPSTACK = "deepstack_visual_indexes"
"""The tower's field that lists the layers whose features go to the decoder."""


class Qwen3VL(MergedPatches):
    """A grid of merged patches for each picture, and for each pair of a video's frames."""

    name = "Qwen3-VL"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
    tokens = TOKENS
    special_tokens = SPECIAL_TOKENS
    template = TEMPLATE
    defaults = DEFAULTS

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        """A merger of its own for every layer whose features go to the decoder (deepstack)."""
        tower = getattr(config, "vision_config", None)
        hidden = cost.size_of(tower, "hidden_size")
        intermediate = cost.size_of(tower, "intermediate_size")
        shape = tower_shape(config, hidden, intermediate, cost.size_of(tower, "out_hidden_size"))
        deep = {index for index in cost.list_of(tower, DEEPSTACK) if index < shape.layers}
        return replace(shape, projector=shape.projector * (1 + len(deep)))

    def frame_size(self, source: Source, values: Values, num_frames: int) -> tuple[int, int]:
        """The limits of a video's pixels are for all frames together.

        Each frame has at most an even share of them and 768 tokens, as in qwen-vl-utils.
        """
        side = token_side(values)
        least, most = limits(values)
        if source.kind == "image":
            return preprocess.smart_resize(source.height, source.width, side, least, most)
        num_frames = max(num_frames, cast(int, values["temporal_patch_size"]))
        if values["cap_pixels_per_frame"]:
            frame_limit = min(cast(int, values["max_video_tokens"]) * side**2, most // num_frames)
            most = max(frame_limit, int(least * 1.05)) * num_frames
        return clip_size(num_frames, source.height, source.width, values, least, most)

    def official_frames(
        self, between: list[int], source: Source, values: Values, most: int | None
    ) -> list[int]:
        """2 frames a second, at least 4 and at most 768, from the first to the last."""
        total = len(between)
        count = cast("int | None", values.get("num_frames"))
        if not count:
            count = int(total / source.fps * cast(float, values["fps"]))
            count = max(count, cast(int, values["min_frames"]))
            count = min(count, cast(int, values["max_frames"]))
        count = min(count, total, most or total)
        step = (total - 1) / max(count - 1, 1)
        return [between[round(number * step)] for number in range(count)]

    def placeholder_texts(self, files: Files, media: Media, grids: Grids) -> dict[str, list[str]]:
        """A video is a block for each pair of frames, the pair's mean time before it.

        The blocks stand between the start and end that the template writes around a video, as in
        the official processor.
        """
        videos = [item for item in media if item.source.kind == "video"]
        group = cast(int, self.values(files, "video")["temporal_patch_size"])
        pairs = zip(grids.get("video", ()), videos, strict=True)
        return {"video": [_blocks(grid, frames.seconds(video), group) for grid, video in pairs]}

    def published_files(self, side: int) -> Contents:
        return {"image": {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}}

    def shorten_tower(self, config: PreTrainedConfig) -> None:
        """As many layers as go to the decoder."""
        read = list(range(len(getattr(config.vision_config, DEEPSTACK))))
        setattr(config.vision_config, DEEPSTACK, read)
        self.set_tower_depth(config, len(read))


def _blocks(grid: Grid, seconds: list[float], group: int) -> str:
    """A video in the prompt: the mean of a group's first and last time, then its tokens."""
    seconds = seconds + seconds[-1:] * (-len(seconds) % group)
    pads = TOKENS["video"] * (len(grid) * group // len(seconds))
    times = [(seconds[at] + seconds[at + group - 1]) / 2 for at in range(0, len(seconds), group)]
    return "".join(f"<{time:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for time in times)
