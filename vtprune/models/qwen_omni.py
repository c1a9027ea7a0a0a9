"""Qwen2.5-Omni and Qwen3-Omni: the part that sees, hears and writes, asked about what it sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, cast

import torch

from vtprune.models import cost
from vtprune.models.base import (
    Files,
    Media,
    PreparedMedia,
    ReadPlan,
    Sampling,
    Tensors,
    VisionTensors,
)
from vtprune.models.patches import Values
from vtprune.models.qwen2_5_vl import Qwen25VL
from vtprune.models.qwen2_vl import IMAGE, SPECIAL_TOKENS, TEMPLATE, TOKENS, VIDEO
from vtprune.models.qwen3_vl import TEMPLATE as PLAIN_TEMPLATE
from vtprune.models.qwen3_vl import Qwen3VL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

SIXTEENS: Values = {
    "patch_size": 16,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
OMNI_TOKENS = {"image": "<|IMAGE|>", "video": "<|VIDEO|>"}
OMNI_SPECIAL_TOKENS = {
    "<|IMAGE|>": "image_token_id",
    "<|VIDEO|>": "video_token_id",
    "<|vision_bos|>": "vision_start_token_id",
    "<|vision_eos|>": "vision_end_token_id",
}
OMNI_TEMPLATE = (
    TEMPLATE.replace("'<|vision_start|><|'", "'<|vision_bos|><|'")
    .replace("part['type'] + '_pad|><|vision_end|>'", "part['type'] | upper + '|><|vision_eos|>'")
)  # fmt: skip


class Qwen25Omni(Qwen25VL):
    """Qwen2.5-VL's pictures and videos; a video's sound is left out.

    Attributes:
        official_fps: the frames a second that the official processor takes a video to have, unless
            it is told another number, whatever was sampled.
    """

    name = "Qwen2.5-Omni"
    model_types = ("qwen2_5_omni_thinker",)
    tokens = OMNI_TOKENS
    special_tokens = OMNI_SPECIAL_TOKENS
    template = OMNI_TEMPLATE
    part_of_another = True
    official_fps: ClassVar[float] = 2.0

    def values(self, files: Files, modality: str) -> dict[str, object]:
        """A video's limits are the official processor's, whatever the checkpoint's file says."""
        values = super().values(files, modality)
        limits = self.defaults["video"]["size"]
        return {**values, "size": limits} if modality == "video" else values

    def plan_video(self, files: Files, source: Source, sampling: Sampling) -> ReadPlan:
        note = f"{source.path.name}: its sound, if any, is left out; {self.name} sees the frames"
        return replace(super().plan_video(files, source, sampling), warnings=(note,))

    def vision_inputs(self, files: Files, media: Media) -> VisionTensors:
        vision = super().vision_inputs(files, media)
        if "video" in vision:
            values = self.values(files, "video")
            videos = [item for item in media if item.source.kind == "video"]
            seconds = [self._seconds_per_step(video, values) for video in videos]
            del vision["video"]["second_per_grid_ts"]
            vision["video"]["video_second_per_grid"] = torch.tensor(seconds)
        return vision

    def _seconds_per_step(self, video: PreparedMedia, values: Values) -> float:
        """Return the seconds of a pair of frames: the official number for the official frames."""
        group, source = cast(int, values["temporal_patch_size"]), video.source
        between = list(range(source.num_frames))
        seconds = video.timestamps[-1] - video.timestamps[0]
        official = self.official_frames(between, source, values, None)
        if seconds <= 0 or list(video.index) == official:
            return group / self.official_fps
        return group * round(seconds / (len(video.index) - 1), 6)

    def token_types(self, files: Files, input_ids: torch.Tensor, media: Media) -> Tensors:
        """None: the model finds its media by their start tokens."""
        return {}


class Qwen3Omni(Qwen25Omni):
    """Qwen3-VL's tower behind Qwen2-VL's videos, without times in the prompt."""

    name = "Qwen3-Omni"
    model_types = ("qwen3_omni_moe_thinker",)
    tokens = TOKENS
    special_tokens = SPECIAL_TOKENS
    template = PLAIN_TEMPLATE
    official_fps = 1.0
    defaults: ClassVar[Mapping[str, Values]] = {
        "image": {**IMAGE, **SIXTEENS},
        "video": {
            **VIDEO,
            **SIXTEENS,
            "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
        },
    }

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        return Qwen3VL().vision_shape(config, modality)

    def tower_kinds(self, config: PreTrainedConfig) -> list[str]:
        return Qwen3VL().tower_kinds(config)

    def shorten_tower(self, config: PreTrainedConfig) -> None:
        Qwen3VL().shorten_tower(config)
