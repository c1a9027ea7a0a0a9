"""LLaVA-OneVision: tiled pictures, several pictures, pooled video frames."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models import anyres, frames, preprocess
from vtprune.models.base import (
    Contents,
    Files,
    Grids,
    Media,
    ReadPlan,
    Sampling,
    Tensors,
    VisionInputs,
)
from vtprune.models.llava import BOTH, BOTH_IDS
from vtprune.models.llava_next import LlavaNext, given_size, tile_sizes, tiling_of
from vtprune.tokens.layout import NEWLINE, box, join, single
from vtprune.tokens.units import Region

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

DEFAULTS: Mapping[str, object] = {
    "size": {"height": 384, "width": 384},
    "resample": 3,
    "image_mean": preprocess.CLIP_MEAN,
    "image_std": preprocess.CLIP_STD,
}
OFFICIAL_FRAMES = 32

# The chat format of the official checkpoints: pictures, then videos, then the text.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ '\n' + part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class LlavaOnevision(LlavaNext):
    """One picture is cut into tiles, several are not; a video's frames are pooled 2 x 2."""

    name = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    original_kinds = frozenset({"llava_qwen", "LlavaQwenForCausalLM"})
    modalities = ("image", "video")
    tokens = BOTH
    special_tokens = BOTH_IDS
    template = TEMPLATE

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> Grids:
        """A picture that is alone in its prompt is tiled; a video ends in one newline."""
        grids: Grids = {}
        if "image" in vision:
            tile, side, sizes = tile_sizes(config, vision["image"])
            aspect_ratio = vision["image"].get("vision_aspect_ratio") or config.vision_aspect_ratio
            most = _most_tiles(cast(str, aspect_ratio))
            grids["image"] = [
                anyres.tiled_grid(size, config.image_grid_pinpoints, tile, side, most)
                if tiled
                else anyres.plain_grid(side)
                for size, tiled in zip(sizes, _tiled(vision["image"], len(sizes)), strict=False)
            ]
        if "video" in vision:
            tower = config.vision_config
            half = -(-(tower.image_size // tower.patch_size) // 2)
            videos = cast(torch.Tensor, vision["video"]["pixel_values_videos"])
            num_videos, num_frames = videos.shape[:2]
            newline = single(NEWLINE, frame=num_frames - 1, row=half - 1, col=half)
            grid = join([box(num_frames, half, half), newline])
            grids["video"] = [grid] * num_videos
        return grids

    def planes(
        self, config: PreTrainedConfig, arguments: Mapping[str, object]
    ) -> list[anyres.Plane | None] | None:
        """A picture that is alone in its prompt is tiled."""
        planes = super().planes(config, arguments)
        if planes is None:
            return None
        tiled = _tiled(arguments, len(planes))
        return [plane if cut else None for plane, cut in zip(planes, tiled, strict=False)]

    def plan_image(self, files: Files, source: Source, sampling: Sampling, alone: bool) -> ReadPlan:
        """A picture beside others is squared and not tiled, so max_tiles says nothing about it."""
        if not alone:
            recipe = self.picture_recipe(files)
            return ReadPlan((0,), functools.partial(preprocess.finish_square, recipe=recipe))
        return super().plan_image(files, source, sampling, alone)

    def regions(self, files: Files, input_size: anyres.Size) -> tuple[Region, ...]:
        """() where tokens are interpolated to fewer."""
        tile, resolutions = tiling_of(files)
        side = tile // files.config.vision_config.patch_size
        most = _most_tiles(files.config.vision_aspect_ratio)
        if anyres.is_shrunk(input_size, resolutions, tile, side, most):
            return ()
        return super().regions(files, input_size)

    def plan_video(self, files: Files, source: Source, sampling: Sampling) -> ReadPlan:
        """Without frames or fps, the official sampling, after start and end.

        That is the checkpoint's own `num_frames`, each the first of an equal part (transformers'
        video processor); else 32 frames from the first to the last (the authors' inference code).
        """
        counted = files.video.get("num_frames")
        spread = frames.starts_of_parts if counted else frames.first_to_last
        recipe = self.video_recipe(files)
        return frames.plan_parts(source, sampling, files.video, OFFICIAL_FRAMES, recipe, spread)

    def picture_inputs(self, files: Files, pictures: Media) -> Tensors:
        """A single picture's size may be smaller than its own, for fewer tiles."""
        recipe = self.picture_recipe(files)
        pixels = [preprocess.normalize(picture.pixels, recipe) for picture in pictures]
        sizes = [(picture.source.height, picture.source.width) for picture in pictures]
        if len(pictures) == 1:
            sizes = [given_size(files, pictures[0])]
        return {
            "pixel_values": torch.stack(pixels),
            "image_sizes": torch.tensor(sizes),
            "batch_num_images": torch.tensor([len(pictures)]),
        }

    def picture_recipe(self, files: Files) -> preprocess.Recipe:
        return preprocess.recipe_over(files.image, DEFAULTS)

    def video_recipe(self, files: Files) -> preprocess.Recipe:
        return preprocess.recipe_over(files.video or files.image, DEFAULTS)

    def template_for(self, files: Files) -> str:
        return self.template

    def published_files(self, side: int) -> Contents:
        size: dict[str, object] = {"size": {"height": side, "width": side}}
        return {"image": size, "video": size}


def _tiled(vision: Mapping[str, object], num_images: int) -> list[bool]:
    """Return whether each picture is cut into tiles: where it is the only one of its prompt."""
    together = vision.get("batch_num_images")
    if together is None:
        return [True] * num_images
    counts = torch.as_tensor(together).tolist()
    return [count == 1 for count in counts for _ in range(count)]


def _most_tiles(aspect_ratio: str) -> int:
    """Return N of "anyres_max_N": the tokens of more than N tiles are interpolated to fewer."""
    return int(aspect_ratio.removeprefix("anyres_max_"))
