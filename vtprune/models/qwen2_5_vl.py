"""Qwen2.5-VL: Qwen2-VL with a video's seconds, and windows in its vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models import patches, qwen2_vl
from vtprune.models.base import Files, Inputs, Plan, Prepared, Sampling, Turn, VisionInputs
from vtprune.tokens.layout import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

_SAME = qwen2_vl.Qwen2VL()


class Qwen25VL:
    """A grid of merged patches for each picture, and for each pair of a video's frames."""

    name = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
    modalities = ("image", "video")

    def placeholders(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        return _SAME.placeholders(config)

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> dict[str, list[Grid]]:
        return _SAME.grids(config, vision)

    def largest(self, files: Files) -> tuple[int, int]:
        return _SAME.largest(files)

    def plan(self, files: Files, source: Source, sampling: Sampling, num_media: int) -> Plan:
        return _SAME.plan(files, source, sampling, num_media)

    def encode(self, files: Files, media: Sequence[Prepared], turns: Sequence[Turn]) -> Inputs:
        """Qwen2-VL's inputs, and the seconds of a step of each video's grid."""
        inputs = _SAME.encode(files, media, turns)
        videos = [one for one in media if one.source.kind == "video"]
        if videos:
            values = patches.read_values(files, "video", qwen2_vl.DEFAULTS)
            group = cast(int, values["temporal_patch_size"])
            seconds = [group / _sampled_fps(one) for one in videos]
            inputs.tensors["second_per_grid_ts"] = torch.tensor(seconds)
        return inputs


def _sampled_fps(video: Prepared) -> float:
    """Frames taken a second: of the whole clip as the official processor counts them, where it is
    sampled like that; else by the times of the frames."""
    source, count = video.source, len(video.index)
    seconds = video.timestamps[-1] - video.timestamps[0]
    official = qwen2_vl.even_parts(list(range(source.num_frames)), count)
    if seconds <= 0 or list(video.index) == official:
        return count / source.num_frames * source.fps
    # Rounded, since transformers before 5.23 cuts 0.9999 seconds off to 0.
    return 1 / round(seconds / (count - 1), 6)
