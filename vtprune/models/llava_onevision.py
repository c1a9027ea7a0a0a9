"""LLaVA-OneVision: tiled pictures, several pictures, pooled video frames."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models import anyres, frames, llava_next, preprocess, prompt
from vtprune.models.base import Files, Inputs, Plan, Prepared, Sampling, Turn, VisionInputs
from vtprune.tokens.layout import NEWLINE, Grid, box, join, single
from vtprune.tokens.units import Region

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

TOKENS = {"image": "<image>", "video": "<video>"}
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


class LlavaOnevision:
    """One picture is cut into tiles, several are not; a video's frames are pooled 2 x 2."""

    name = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    modalities = ("image", "video")

    def placeholders(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        return {"image": (config.image_token_id,), "video": (config.video_token_id,)}

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> dict[str, list[Grid]]:
        """A picture that is alone in its prompt is tiled; a video ends in one newline."""
        tile = config.vision_config.image_size
        side = tile // config.vision_config.patch_size
        grids: dict[str, list[Grid]] = {}
        if "image" in vision:
            sizes = torch.as_tensor(vision["image"]["image_sizes"]).tolist()
            asked = vision["image"].get("vision_aspect_ratio") or config.vision_aspect_ratio
            most = _most_tiles(cast(str, asked))
            grids["image"] = [
                anyres.tiled_grid(size, config.image_grid_pinpoints, tile, side, most)
                if tiled
                else anyres.plain_grid(side)
                for size, tiled in zip(sizes, _tiled(vision["image"], len(sizes)), strict=False)
            ]
        if "video" in vision:
            videos = cast(torch.Tensor, vision["video"]["pixel_values_videos"])
            num_videos, num_frames = videos.shape[:2]
            half = -(-side // 2)
            newline = single(NEWLINE, frame=num_frames - 1, row=half - 1, col=half)
            grid = join([box(num_frames, half, half), newline])
            grids["video"] = [grid] * num_videos
        return grids

    def planes(
        self, config: PreTrainedConfig, given: Mapping[str, object]
    ) -> list[anyres.Plane | None] | None:
        """A picture that is alone in its prompt is tiled."""
        planes = llava_next.picture_planes(config, given)
        if planes is None:
            return None
        tiled = _tiled(given, len(planes))
        return [plane if own else None for plane, own in zip(planes, tiled, strict=False)]

    def largest(self, files: Files) -> tuple[int, int]:
        tile, resolutions = llava_next.tiling_of(files)
        return anyres.largest(resolutions, tile)

    def plan(self, files: Files, source: Source, sampling: Sampling, num_media: int) -> Plan:
        """Without frames or fps, the official sampling, after start and end.

        That is the checkpoint's own `num_frames`, each the first of an equal part (transformers'
        video processor); else 32 frames from the first to the last (the authors' inference code).
        A picture beside others is squared and not tiled, so max_tiles says nothing about it.
        """
        if source.kind == "video":
            own = files.video.get("num_frames")
            spread = frames.starts_of_parts if own else frames.first_to_last
            recipe = _video_recipe(files)
            return frames.plan_parts(source, sampling, files.video, OFFICIAL_FRAMES, recipe, spread)
        recipe = _image_recipe(files)
        if num_media > 1:
            return Plan((0,), functools.partial(_square, recipe=recipe))
        tile, resolutions = llava_next.tiling_of(files)
        size = (source.height, source.width)
        told = anyres.limited_size(size, resolutions, tile, sampling.max_tiles)
        return Plan(
            (0,),
            functools.partial(
                anyres.cut, told=told, resolutions=resolutions, tile=tile, recipe=recipe
            ),
            _regions(files, told, resolutions, tile),
        )

    def encode(self, files: Files, media: Sequence[Prepared], turns: Sequence[Turn]) -> Inputs:
        """The inputs; several videos of a prompt must have the same number of frames."""
        vision: dict[str, dict[str, torch.Tensor]] = {}
        pictures = [one for one in media if one.source.kind == "image"]
        videos = [one for one in media if one.source.kind == "video"]
        if pictures:
            recipe = _image_recipe(files)
            pixels = [preprocess.normalize(one.pixels, recipe) for one in pictures]
            vision["image"] = {
                "pixel_values": torch.stack(pixels),
                "image_sizes": torch.tensor([_told(files, one, len(pictures)) for one in pictures]),
                "batch_num_images": torch.tensor([len(pictures)]),
            }
        if videos:
            frames_of_all = frames.stacked(videos, _video_recipe(files), self.name)
            vision["video"] = {"pixel_values_videos": frames_of_all}
        text = prompt.render(files, media, turns, TOKENS, TEMPLATE)
        grids = self.grids(files.config, vision)
        tensors = prompt.encode(files, text, TOKENS, self.placeholders(files.config), grids)
        for made in vision.values():
            tensors |= made
        return Inputs(tensors, text, tuple(len(one.pixels) for one in pictures))


def _tiled(vision: Mapping[str, object], num_images: int) -> list[bool]:
    """Whether each picture is cut into tiles: where it is the only one of its prompt."""
    together = vision.get("batch_num_images")
    if together is None:
        return [True] * num_images
    counts = torch.as_tensor(together).tolist()
    return [count == 1 for count in counts for _ in range(count)]


def _square(pixels: torch.Tensor, recipe: preprocess.Recipe) -> torch.Tensor:
    """(1, 3, H, W) uint8 -> (1, 3, h, w): a picture beside others, padded to a square."""
    edge = max(pixels.shape[-2:])
    mean = recipe.mean or (0.0, 0.0, 0.0)
    background = [int(value * 255) for value in mean]
    return preprocess.finish(preprocess.pad_to(pixels, (edge, edge), background), recipe)


def _image_recipe(files: Files) -> preprocess.Recipe:
    return preprocess.read_recipe(preprocess.merged(files.image, DEFAULTS))


def _video_recipe(files: Files) -> preprocess.Recipe:
    return preprocess.read_recipe(preprocess.merged(files.video or files.image, DEFAULTS))


def _most_tiles(aspect_ratio: str) -> int:
    """N of "anyres_max_N": with more tiles' worth of tokens, they are interpolated to fewer."""
    return int(aspect_ratio.removeprefix("anyres_max_"))


def _regions(
    files: Files, told: anyres.Size, resolutions: list[list[int]], tile: int
) -> tuple[Region, ...]:
    """The part of a picture that each tile shows; empty where tokens are interpolated."""
    side = tile // files.config.vision_config.patch_size
    most = _most_tiles(files.config.vision_aspect_ratio)
    if anyres.is_shrunk(told, resolutions, tile, side, most):
        return ()
    return anyres.regions(told, resolutions, tile)


def _told(files: Files, picture: Prepared, num_pictures: int) -> anyres.Size:
    """The size that the model is told of a picture: its own, or a smaller one for fewer tiles."""
    if num_pictures > 1:
        return picture.source.height, picture.source.width
    return llava_next.told(files, picture)
