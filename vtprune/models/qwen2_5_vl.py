"""Qwen2.5-VL: Qwen2-VL with a video's seconds, and windows in its vision tower."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models import cost
from vtprune.models.base import Files, Media, PreparedMedia, VisionTensors
from vtprune.models.patches import tower_shape
from vtprune.models.qwen2_vl import Qwen2VL, even_parts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FULL = "fullatt_block_indexes"
"""The tower's field that lists its layers with full attention."""


class Qwen25VL(Qwen2VL):
    """Qwen2-VL's inputs, and the seconds of a step of each video's grid."""

    name = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
    earlier_kinds = frozenset()

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        """Windows in most layers, full attention in some."""
        tower = getattr(config, "vision_config", None)
        hidden = cost.size_of(tower, "hidden_size")
        intermediate = cost.size_of(tower, "intermediate_size")
        shape = tower_shape(config, hidden, intermediate, cost.size_of(tower, "out_hidden_size"))
        full = cost.list_of(tower, FULL)
        return replace(
            shape,
            gated=True,
            # As the model rounds it: windows of whole merged tokens.
            window=cost.size_of(tower, "window_size") // shape.merge // shape.patch * shape.merge,
            full_layers=len({index for index in full if index < shape.layers}),
        )

    def vision_inputs(self, files: Files, media: Media) -> VisionTensors:
        vision = super().vision_inputs(files, media)
        if "video" in vision:
            group = cast(int, self.values(files, "video")["temporal_patch_size"])
            videos = [item for item in media if item.source.kind == "video"]
            seconds = [group / _sampled_fps(video) for video in videos]
            vision["video"]["second_per_grid_ts"] = torch.tensor(seconds)
        return vision

    def tower_kinds(self, config: PreTrainedConfig) -> list[str]:
        """Layers with full attention, and with windows."""
        full = getattr(config.vision_config, FULL)
        depth = int(getattr(config.vision_config, self.tower_depth))
        return ["full" if number in full else "" for number in range(depth)]

    def shorten_tower(self, config: PreTrainedConfig) -> None:
        tower = config.vision_config
        kinds = set(self.tower_kinds(config))
        super().shorten_tower(config)
        depth = int(getattr(tower, self.tower_depth))
        setattr(tower, FULL, [depth - 1] if "full" in kinds else [])


def _sampled_fps(video: PreparedMedia) -> float:
    """Return the frames taken a second: of the whole clip as the official processor counts them,
    where it is sampled like that; else by the times of the frames."""
    source, count = video.source, len(video.index)
    seconds = video.timestamps[-1] - video.timestamps[0]
    official = even_parts(list(range(source.num_frames)), count)
    if seconds <= 0 or list(video.index) == official:
        return count / source.num_frames * source.fps
    # Rounded, since transformers before 5.23 cuts 0.9999 seconds off to 0.
    return 1 / round(seconds / (count - 1), 6)
