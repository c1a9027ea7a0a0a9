"""Gemma 3: pictures of one size, each pooled to the same number of tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models import cost, preprocess
from vtprune.models.base import (
    Contents,
    Family,
    Files,
    Grids,
    Media,
    ReadPlan,
    Sampling,
    Tensors,
    VisionInputs,
    VisionTensors,
)
from vtprune.tokens.layout import box

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

START, TOKEN, END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"
TOKENS, SPECIAL_TOKENS = {"image": START}, {TOKEN: "image_token_id"}
DEFAULTS: Mapping[str, object] = {
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "do_pan_and_scan": False,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}

# The chat format of the official checkpoints; a system prompt begins the first message.
TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(prefix='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% set ns.prefix = message['content'][0]['text'] + '\n\n' %}{% else %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + ns.prefix }}{% set ns.prefix = '' %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


class Gemma3(Family):
    """A square grid for each picture, whose tokens see each other both ways; no video."""

    name = "Gemma 3"
    model_types = ("gemma3",)
    tokens = TOKENS
    special_tokens = SPECIAL_TOKENS
    template = TEMPLATE

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> Grids:
        """One square a picture. Crops of a picture are pictures of their own: the model is not
        told which belong together."""
        if "image" not in vision:
            return {}
        side = math.isqrt(config.mm_tokens_per_image)
        pixels = cast(torch.Tensor, vision["image"]["pixel_values"])
        return {"image": [box(1, side, side)] * len(pixels)}

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        """Averages over blocks of patches, then one matrix."""
        shape = cost.clip_or_siglip(config)
        if shape is None:
            return None
        tower = getattr(config, "vision_config", None)
        side = cost.size_of(tower, "image_size") // shape.patch
        merge = side // math.isqrt(cost.size_of(config, "mm_tokens_per_image", 256))
        projector = ((shape.hidden, cost.text_width(config)),)
        return replace(shape, projector=projector, merge=merge)

    def largest(self, files: Files) -> tuple[int, int]:
        return preprocess.unchanged_size(preprocess.recipe_over(files.image, DEFAULTS))

    def plan_image(self, files: Files, source: Source, sampling: Sampling, alone: bool) -> ReadPlan:
        """The whole picture, and its crops where the checkpoint asks for pan and scan (no official
        one does); max_tiles is the most crops."""
        values = preprocess.merged(files.image, DEFAULTS)
        crops = _crops(source.height, source.width, values, sampling.max_tiles)
        recipe = preprocess.read_recipe(values)
        return ReadPlan((0,), functools.partial(_cut, crops=crops, recipe=recipe))

    def vision_inputs(self, files: Files, media: Media) -> VisionTensors:
        if not media:
            return {}
        recipe = preprocess.recipe_over(files.image, DEFAULTS)
        pixels = [preprocess.normalize(picture.pixels, recipe) for picture in media]
        return {"image": {"pixel_values": torch.cat(pixels)}}

    def placeholder_texts(self, files: Files, media: Media, grids: Grids) -> dict[str, list[str]]:
        """Each picture, its crops included."""
        tokens = TOKEN * files.config.mm_tokens_per_image
        return {"image": [_placeholder_text(tokens, len(picture.pixels) - 1) for picture in media]}

    def token_types(self, files: Files, input_ids: torch.Tensor, media: Media) -> Tensors:
        """`token_type_ids`, which say where pictures are seen both ways."""
        return {"token_type_ids": (input_ids == files.config.image_token_id).long()}

    def published_files(self, side: int) -> Contents:
        return {"image": {"size": {"height": side, "width": side}}}


def _placeholder_text(tokens: str, num_crops: int) -> str:
    """A picture, and its crops, in the prompt."""
    picture = f"\n\n{START}{tokens}{END}\n\n"
    if not num_crops:
        return picture
    crops = " ".join([picture] * num_crops)
    return (
        f"Here is the original image {picture} and here are some crops to help you see better "
        f"{crops}"
    )


Crop = tuple[slice, slice]


def _crops(
    height: int, width: int, values: Mapping[str, object], max_tiles: int | None
) -> list[Crop]:
    """Pan and scan: the parts of a long picture along its longer side; of others none."""
    least = cast(int, values["pan_and_scan_min_crop_size"])
    most = cast(int, values["pan_and_scan_max_num_crops"])
    most = most if max_tiles is None else min(most, max_tiles)
    ratio = max(height, width) / min(height, width)
    activated = ratio >= cast(float, values["pan_and_scan_min_ratio_to_activate"])
    if not values["do_pan_and_scan"] or not activated or most < 2:
        return []
    num_by_aspect = min(math.floor(ratio + 0.5), max(height, width) // least)
    count = min(max(num_by_aspect, 2), most)
    down, across = (1, count) if width >= height else (count, 1)
    rows, cols = math.ceil(height / down), math.ceil(width / across)
    if min(rows, cols) < least:
        return []
    return [
        (slice(rows * row, rows * (row + 1)), slice(cols * col, cols * (col + 1)))
        for row in range(down)
        for col in range(across)
    ]


def _cut(pixels: torch.Tensor, crops: list[Crop], recipe: preprocess.Recipe) -> torch.Tensor:
    """(1, 3, H, W) uint8 -> (1 + crops, 3, h, w) uint8: the whole picture, then its crops."""
    parts = [pixels, *(pixels[..., rows, cols] for rows, cols in crops)]
    return torch.cat([preprocess.finish(part, recipe) for part in parts])
