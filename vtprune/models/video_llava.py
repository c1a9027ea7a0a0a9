"""Video-LLaVA: square pictures, and whole video frames with their CLS tokens."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models import cost, frames, preprocess
from vtprune.models.base import Files, Grids, Media, ReadPlan, Sampling, Tensors, VisionInputs
from vtprune.models.llava import BOTH, BOTH_IDS, CLIP, Llava, square_grid
from vtprune.tokens.layout import join

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

OFFICIAL_FRAMES = 8
PIXELS = ("pixel_values_images", "pixel_values")


class VideoLlava(Llava):
    """A picture is one square; a video's frame is one with the CLS token of its tower in front."""

    name = "Video-LLaVA"
    model_types = ("video_llava",)
    modalities = ("image", "video")
    tokens = BOTH
    special_tokens = BOTH_IDS

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> Grids:
        """side x side patches; all of the tower's tokens for a frame."""
        grids: Grids = {}
        if "image" in vision:
            inputs = vision["image"]
            pixels = next(inputs[key] for key in PIXELS if inputs.get(key) is not None)
            grids = super().grids(config, {"image": {**inputs, "pixel_values": pixels}})
        if "video" in vision:
            videos = cast(torch.Tensor, vision["video"]["pixel_values_videos"])
            num_videos, num_frames = videos.shape[:2]
            frame = square_grid(config, all_tokens=True)
            video = join([frame.at_frame(number) for number in range(num_frames)])
            grids["video"] = [video] * num_videos
        return grids

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        """The CLS token of a frame is projected, whatever becomes of a picture's."""
        shape = super().vision_shape(config, modality)
        if shape is None or modality == "image":
            return shape
        return replace(shape, projects_extra=True)

    def plan_image(self, files: Files, source: Source, sampling: Sampling, alone: bool) -> ReadPlan:
        """Resized by Pillow, as in the only official processor for pictures."""
        return ReadPlan((0,), functools.partial(_square, recipe=self.picture_recipe(files)))

    def plan_video(self, files: Files, source: Source, sampling: Sampling) -> ReadPlan:
        """Without frames or fps, the checkpoint's own `num_frames`, after start and end; else 8.

        Each is the first of an equal part, as in the model card's own code; resized by torch.
        """
        recipe = self.video_recipe(files)
        return frames.plan_parts(source, sampling, files.video, OFFICIAL_FRAMES, recipe)

    def picture_inputs(self, files: Files, pictures: Media) -> Tensors:
        recipe = self.picture_recipe(files)
        pixels = [preprocess.normalize_singly(picture.pixels, recipe) for picture in pictures]
        return {PIXELS[0]: torch.cat(pixels)}

    def picture_recipe(self, files: Files) -> preprocess.Recipe:
        return preprocess.recipe_over(files.image, CLIP)


def _square(pixels: torch.Tensor, recipe: preprocess.Recipe) -> torch.Tensor:
    """(1, 3, H, W) uint8 -> (1, 3, h, w)."""
    if recipe.do_resize:
        height, width = pixels.shape[-2:]
        size = preprocess.output_size(height, width, recipe.size)
        pixels = preprocess.resize_pil(pixels, size, recipe.resample)
    return pixels if recipe.crop is None else preprocess.center_crop(pixels, recipe.crop)
