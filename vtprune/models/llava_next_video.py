"""LLaVA-NeXT-Video: LLaVA-NeXT's tiled pictures, and pooled video frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models import anyres, frames, llava_next, preprocess, prompt
from vtprune.models.base import Files, Inputs, Plan, Prepared, Sampling, Turn, VisionInputs
from vtprune.tokens.layout import Grid, box

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

TOKENS = {"image": "<image>", "video": "<video>"}
OFFICIAL_FRAMES = 8


class LlavaNextVideo:
    """A picture is a base picture and its tiles; a video's frames are pooled, without newlines."""

    name = "LLaVA-NeXT-Video"
    model_types = ("llava_next_video",)
    modalities = ("image", "video")

    def placeholders(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        return {"image": (config.image_token_id,), "video": (config.video_token_id,)}

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> dict[str, list[Grid]]:
        """Pictures as in LLaVA-NeXT; stride x stride patches of a frame are one token."""
        grids: dict[str, list[Grid]] = {}
        if "image" in vision:
            grids["image"] = llava_next.picture_grids(config, vision["image"])
        if "video" in vision:
            tower = config.vision_config
            side = tower.image_size // tower.patch_size // config.spatial_pool_stride
            videos = cast(torch.Tensor, vision["video"]["pixel_values_videos"])
            num_videos, num_frames = videos.shape[:2]
            grids["video"] = [box(num_frames, side, side)] * num_videos
        return grids

    def planes(
        self, config: PreTrainedConfig, given: Mapping[str, object]
    ) -> list[anyres.Plane | None] | None:
        """Every picture is tiled."""
        return llava_next.picture_planes(config, given)

    def largest(self, files: Files) -> tuple[int, int]:
        tile, resolutions = llava_next.tiling_of(files)
        return anyres.largest(resolutions, tile)

    def plan(self, files: Files, source: Source, sampling: Sampling, num_media: int) -> Plan:
        """Without frames or fps, the checkpoint's own `num_frames`, after start and end; else 8.

        Each is the first of an equal part, as in the model card's own code. (Training had 32, which
        at 144 tokens each do not fit into the 4096 positions of the Vicuna checkpoints.)
        """
        if source.kind == "image":
            return llava_next.plan_picture(files, source, sampling)
        return frames.plan_parts(source, sampling, files.video, OFFICIAL_FRAMES, _recipe(files))

    def encode(self, files: Files, media: Sequence[Prepared], turns: Sequence[Turn]) -> Inputs:
        """The inputs; several videos of a prompt must have the same number of frames."""
        vision: dict[str, dict[str, torch.Tensor]] = {}
        pictures = [one for one in media if one.source.kind == "image"]
        videos = [one for one in media if one.source.kind == "video"]
        if pictures:
            vision["image"] = llava_next.picture_inputs(files, pictures)
        if videos:
            pixels = frames.stacked(videos, _recipe(files), self.name)
            vision["video"] = {"pixel_values_videos": pixels}
        text = prompt.render(files, media, turns, TOKENS, llava_next.template_of(files))
        grids = self.grids(files.config, vision)
        tensors = prompt.encode(files, text, TOKENS, self.placeholders(files.config), grids)
        for given in vision.values():
            tensors |= given
        return Inputs(tensors, text, tuple(len(one.pixels) for one in pictures))


def _recipe(files: Files) -> preprocess.Recipe:
    return preprocess.read_recipe(
        preprocess.merged(files.video or files.image, llava_next.DEFAULTS)
    )
