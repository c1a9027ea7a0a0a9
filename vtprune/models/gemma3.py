"""Gemma 3: pictures of one size, each pooled to the same number of tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models import preprocess, prompt
from vtprune.models.base import Files, Inputs, Plan, Prepared, Sampling, Turn, VisionInputs
from vtprune.models.llava_next import no_video
from vtprune.tokens.layout import Grid, box

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

START, TOKEN, END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"
TOKENS = {"image": START}
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


class Gemma3:
    """A square grid for each picture, whose tokens see each other both ways; no video."""

    name = "Gemma 3"
    model_types = ("gemma3",)
    modalities = ("image",)

    def placeholders(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        return {"image": (config.image_token_id,)}

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> dict[str, list[Grid]]:
        """One square a picture. Crops of a picture are pictures of their own: the model is not
        told which belong together."""
        if "image" not in vision:
            return {}
        side = math.isqrt(config.mm_tokens_per_image)
        pixels = cast(torch.Tensor, vision["image"]["pixel_values"])
        return {"image": [box(1, side, side)] * len(pixels)}

    def largest(self, files: Files) -> tuple[int, int]:
        values = preprocess.merged(files.image, DEFAULTS)
        return preprocess.whole_size(preprocess.read_recipe(values))

    def plan(self, files: Files, source: Source, sampling: Sampling, num_media: int) -> Plan:
        """The whole picture, and its crops where the checkpoint asks for pan and scan (no official
        one does); max_tiles is the most crops."""
        if source.kind != "image":
            raise no_video(source, self.name)
        values = preprocess.merged(files.image, DEFAULTS)
        crops = _crops(source.height, source.width, values, sampling.max_tiles)
        recipe = preprocess.read_recipe(values)
        return Plan((0,), functools.partial(_cut, crops=crops, recipe=recipe))

    def encode(self, files: Files, media: Sequence[Prepared], turns: Sequence[Turn]) -> Inputs:
        """The inputs, `token_type_ids` included, which say where pictures are seen both ways."""
        for one in media:
            if one.source.kind != "image":
                raise no_video(one.source, self.name)
        vision: dict[str, dict[str, torch.Tensor]] = {}
        if media:
            recipe = preprocess.read_recipe(preprocess.merged(files.image, DEFAULTS))
            pixels = [preprocess.normalize(one.pixels, recipe) for one in media]
            vision["image"] = {"pixel_values": torch.cat(pixels)}
        text = prompt.render(files, media, turns, TOKENS, TEMPLATE)
        ids = self.placeholders(files.config)
        grids = self.grids(files.config, vision)
        written = [_sequence(files.config, len(one.pixels) - 1) for one in media]
        tensors = prompt.encode(files, text, TOKENS, ids, grids, {"image": written})
        tensors["token_type_ids"] = (tensors["input_ids"] == ids["image"][0]).long()
        tensors |= vision.get("image", {})
        return Inputs(tensors, text, tuple(len(one.pixels) for one in media))


def _sequence(config: PreTrainedConfig, num_crops: int) -> str:
    """A picture, and its crops, in the prompt."""
    one = f"\n\n{START}{TOKEN * config.mm_tokens_per_image}{END}\n\n"
    if not num_crops:
        return one
    crops = " ".join([one] * num_crops)
    return (
        f"Here is the original image {one} and here are some crops to help you see better {crops}"
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
    wanted = min(math.floor(ratio + 0.5), max(height, width) // least)
    count = min(max(wanted, 2), most)
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
