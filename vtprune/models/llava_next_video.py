"""LLaVA-NeXT-Video: LLaVA-NeXT's tiled pictures, and pooled video frames."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models import cost, frames
from vtprune.models.base import Files, Grids, ReadPlan, Sampling, VisionInputs
from vtprune.models.llava import BOTH, BOTH_IDS, Llava
from vtprune.models.llava_next import LlavaNext
from vtprune.tokens.layout import box

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

OFFICIAL_FRAMES = 8


class LlavaNextVideo(LlavaNext):
    """A picture is a base picture and its tiles; a video's frames are pooled, without newlines."""

    name = "LLaVA-NeXT-Video"
    model_types = ("llava_next_video",)
    original_kinds = Llava.original_kinds
    modalities = ("image", "video")
    tokens = BOTH
    special_tokens = BOTH_IDS

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> Grids:
        """Pictures as in LLaVA-NeXT; stride x stride patches of a frame are one token."""
        grids = super().grids(config, vision)
        if "video" in vision:
            tower = config.vision_config
            side = tower.image_size // tower.patch_size // config.spatial_pool_stride
            videos = cast(torch.Tensor, vision["video"]["pixel_values_videos"])
            num_videos, num_frames = videos.shape[:2]
            grids["video"] = [box(num_frames, side, side)] * num_videos
        return grids

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        """Frames are pooled before they are projected, by a convolution if the config says so."""
        shape = super().vision_shape(config, modality)
        if shape is None or modality == "image":
            return shape
        stride, hidden = cost.size_of(config, "spatial_pool_stride", 2), shape.hidden
        if getattr(config, "spatial_pool_mode", "average") == "conv":
            pooled = cost.size_of(config, "spatial_pool_out_channels", hidden)
            shape = replace(shape, projector=((stride**2 * hidden, pooled), *shape.projector))
        return replace(shape, merge=stride)

    def plan_video(self, files: Files, source: Source, sampling: Sampling) -> ReadPlan:
        """Without frames or fps, the checkpoint's own `num_frames`, after start and end; else 8.

        Each is the first of an equal part, as in the model card's own code. (Training had 32, which
        at 144 tokens each do not fit into the 4096 positions of the Vicuna checkpoints.)
        """
        recipe = self.video_recipe(files)
        return frames.plan_parts(source, sampling, files.video, OFFICIAL_FRAMES, recipe)
