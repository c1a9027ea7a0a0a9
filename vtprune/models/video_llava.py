"""Video-LLaVA: square pictures, and whole video frames with their CLS tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models import frames, llava, llava_next, preprocess, prompt
from vtprune.models.base import Files, Inputs, Plan, Prepared, Sampling, Turn, VisionInputs
from vtprune.tokens.layout import Grid, join

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

TOKENS = {"image": "<image>", "video": "<video>"}
OFFICIAL_FRAMES = 8
PIXELS = ("pixel_values_images", "pixel_values")


class VideoLlava:
    """A picture is one square; a video's frame is one with the CLS token of its tower in front."""

    name = "Video-LLaVA"
    model_types = ("video_llava",)
    modalities = ("image", "video")

    def placeholders(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        return {"image": (config.image_token_id,), "video": (config.video_token_id,)}

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> dict[str, list[Grid]]:
        """side x side patches; all of the tower's tokens for a frame."""
        grids: dict[str, list[Grid]] = {}
        if "image" in vision:
            given = vision["image"]
            strategy = given.get("vision_feature_select_strategy")
            strategy = strategy or config.vision_feature_select_strategy
            pictures = next(given[key] for key in PIXELS if given.get(key) is not None)
            grid = llava.square(config, whole=strategy == "full")
            grids["image"] = [grid] * len(cast(torch.Tensor, pictures))
        if "video" in vision:
            videos = cast(torch.Tensor, vision["video"]["pixel_values_videos"])
            num_videos, num_frames = videos.shape[:2]
            frame = llava.square(config, whole=True)
            whole = [frame.at_frame(number) for number in range(num_frames)]
            grids["video"] = [join(whole)] * num_videos
        return grids

    def largest(self, files: Files) -> tuple[int, int]:
        return preprocess.whole_size(_image_recipe(files))

    def plan(self, files: Files, source: Source, sampling: Sampling, num_media: int) -> Plan:
        """Without frames or fps, the checkpoint's own `num_frames`, after start and end; else 8.

        Each is the first of an equal part, as in the model card's own code. max_tiles does not
        apply. Pictures are resized by Pillow, as in the only official processor for them, and the
        frames of a video by torch.
        """
        if source.kind == "image":
            return Plan((0,), functools.partial(_square, recipe=_image_recipe(files)))
        recipe = _video_recipe(files)
        return frames.plan_parts(source, sampling, files.video, OFFICIAL_FRAMES, recipe)

    def encode(self, files: Files, media: Sequence[Prepared], turns: Sequence[Turn]) -> Inputs:
        """The inputs; several videos of a prompt must have the same number of frames."""
        vision: dict[str, dict[str, torch.Tensor]] = {}
        pictures = [one for one in media if one.source.kind == "image"]
        videos = [one for one in media if one.source.kind == "video"]
        if pictures:
            recipe = _image_recipe(files)
            pixels = torch.cat(
                [preprocess.normalize_singly(one.pixels, recipe) for one in pictures]
            )
            vision["image"] = {PIXELS[0]: pixels}
        if videos:
            pixels = frames.stacked(videos, _video_recipe(files), self.name)
            vision["video"] = {"pixel_values_videos": pixels}
        text = prompt.render(files, media, turns, TOKENS, llava_next.template_of(files))
        grids = self.grids(files.config, vision)
        tensors = prompt.encode(files, text, TOKENS, self.placeholders(files.config), grids)
        for given in vision.values():
            tensors |= given
        return Inputs(tensors, text, (1,) * len(pictures))


def _square(pixels: torch.Tensor, recipe: preprocess.Recipe) -> torch.Tensor:
    """(1, 3, H, W) uint8 -> (1, 3, h, w)."""
    if recipe.do_resize:
        height, width = pixels.shape[-2:]
        size = preprocess.output_size(height, width, recipe.size)
        pixels = preprocess.resize_pil(pixels, size, recipe.resample)
    return pixels if recipe.crop is None else preprocess.center_crop(pixels, recipe.crop)


def _image_recipe(files: Files) -> preprocess.Recipe:
    return preprocess.read_recipe(preprocess.merged(files.image, llava.CLIP))


def _video_recipe(files: Files) -> preprocess.Recipe:
    return preprocess.read_recipe(preprocess.merged(files.video or files.image, llava.CLIP))
