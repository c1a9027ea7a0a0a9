"""LLaVA-NeXT (1.6): tiled pictures, whatever the language model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional

from vtprune.errors import ModelError
from vtprune.models import anyres, preprocess, prompt
from vtprune.models.base import Files, Inputs, Plan, Prepared, Sampling, Turn, VisionInputs
from vtprune.tokens.layout import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

TOKENS = {"image": "<image>"}
DEFAULTS: Mapping[str, object] = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "resample": 3,
    "image_mean": preprocess.CLIP_MEAN,
    "image_std": preprocess.CLIP_STD,
}

# The chat formats of the official checkpoints, one a language model; pictures, videos, then text.
_PARTS = (
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
)
VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    + _PARTS
    + "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<<SYS>>\n' }}" + _PARTS + "{{ '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}" + _PARTS + "{{ ' [/INST]' }}"
    "{% else %}{{ ' ' }}" + _PARTS + "{{ '</s> ' }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    + _PARTS
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class LlavaNext:
    """Every picture is a base picture and its tiles, also beside others; no video."""

    name = "LLaVA-NeXT"
    model_types = ("llava_next",)
    modalities = ("image",)

    def placeholders(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        return {"image": (config.image_token_id,)}

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> dict[str, list[Grid]]:
        """Base picture, then the unpadded picture, every row of which ends in a newline."""
        return {"image": picture_grids(config, vision["image"])} if "image" in vision else {}

    def planes(
        self, config: PreTrainedConfig, given: Mapping[str, object]
    ) -> list[anyres.Plane | None] | None:
        """Every picture is tiled."""
        return picture_planes(config, given)

    def largest(self, files: Files) -> tuple[int, int]:
        tile, resolutions = tiling_of(files)
        return anyres.largest(resolutions, tile)

    def plan(self, files: Files, source: Source, sampling: Sampling, num_media: int) -> Plan:
        """The whole picture; max_tiles leaves out the resolutions with more tiles."""
        if source.kind != "image":
            raise no_video(source, self.name)
        return plan_picture(files, source, sampling)

    def encode(self, files: Files, media: Sequence[Prepared], turns: Sequence[Turn]) -> Inputs:
        """The inputs; pictures with fewer tiles than the others are filled up with zeros."""
        for one in media:
            if one.source.kind != "image":
                raise no_video(one.source, self.name)
        vision = {"image": picture_inputs(files, media)} if media else {}
        text = prompt.render(files, media, turns, TOKENS, template_of(files))
        grids = self.grids(files.config, vision)
        tensors = prompt.encode(files, text, TOKENS, self.placeholders(files.config), grids)
        tensors |= vision.get("image", {})
        return Inputs(tensors, text, tuple(len(one.pixels) for one in media))


def picture_grids(config: PreTrainedConfig, given: Mapping[str, object]) -> list[Grid]:
    """Base picture, then the unpadded picture, every row of which ends in a newline."""
    tile = config.vision_config.image_size
    side = tile // config.vision_config.patch_size
    sizes = torch.as_tensor(given["image_sizes"]).tolist()
    return [anyres.tiled_grid(size, config.image_grid_pinpoints, tile, side) for size in sizes]


def picture_planes(
    config: PreTrainedConfig, given: Mapping[str, object]
) -> list[anyres.Plane | None] | None:
    """How the tiles of each picture lie; None for a call that encodes videos."""
    if given.get("image_sizes") is None or given.get("pixel_values_videos") is not None:
        return None
    tile = config.vision_config.image_size
    side = tile // config.vision_config.patch_size
    sizes = torch.as_tensor(given["image_sizes"]).tolist()
    return [anyres.plane_of(size, config.image_grid_pinpoints, tile, side) for size in sizes]


def plan_picture(files: Files, source: Source, sampling: Sampling) -> Plan:
    """A base picture and the tiles of the best resolution, of those with at most max_tiles."""
    tile, resolutions = tiling_of(files)
    size = (source.height, source.width)
    told = anyres.limited_size(size, resolutions, tile, sampling.max_tiles)
    return Plan(
        (0,),
        functools.partial(
            anyres.cut, told=told, resolutions=resolutions, tile=tile, recipe=_recipe(files)
        ),
        anyres.regions(told, resolutions, tile),
    )


def picture_inputs(files: Files, pictures: Sequence[Prepared]) -> dict[str, torch.Tensor]:
    """The model's inputs; pictures with fewer tiles than others are filled up with zeros."""
    recipe = _recipe(files)
    pixels = [preprocess.normalize(one.pixels, recipe) for one in pictures]
    most = max(map(len, pixels))
    padded = [functional.pad(one, (0, 0) * 3 + (0, most - len(one))) for one in pixels]
    sizes = torch.tensor([told(files, one) for one in pictures])
    return {"pixel_values": torch.stack(padded), "image_sizes": sizes}


def told(files: Files, picture: Prepared) -> anyres.Size:
    """The size that the model is told of a picture: its own, or a smaller one for fewer tiles."""
    tile, resolutions = tiling_of(files)
    size = (picture.source.height, picture.source.width)
    return anyres.limited_size(size, resolutions, tile, len(picture.pixels) - 1)


def no_video(source: Source, family: str) -> ModelError:
    return ModelError(
        f"{source.path} is a video; {family} takes pictures only",
        "take a model for videos, such as LLaVA-OneVision or Qwen2.5-VL",
    )


def _recipe(files: Files) -> preprocess.Recipe:
    return preprocess.read_recipe(preprocess.merged(files.image, DEFAULTS))


def tiling_of(files: Files) -> tuple[int, list[list[int]]]:
    """Side of a tile, and the resolutions to choose from."""
    resolutions = files.image.get("image_grid_pinpoints") or files.config.image_grid_pinpoints
    return files.config.vision_config.image_size, cast("list[list[int]]", resolutions)


def template_of(files: Files) -> str:
    """The official format of the language model, for a checkpoint without a chat template."""
    if "<|im_start|>" in files.tokenizer.get_vocab():
        return CHATML
    return MISTRAL if files.config.text_config.model_type == "mistral" else VICUNA
