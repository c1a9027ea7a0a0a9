"""LLaVA-1.5: one square a picture, whatever the language model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch

from vtprune.errors import ModelError
from vtprune.models import llava_next, preprocess, prompt
from vtprune.models.base import Files, Inputs, Plan, Prepared, Sampling, Turn, VisionInputs
from vtprune.tokens.layout import CLS, Grid, box, join, single

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

TOKENS = {"image": "<image>"}
CLIP = llava_next.DEFAULTS
SIGLIP: Mapping[str, object] = {
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}


class Llava:
    """A picture is resized and cropped to a square, also beside others; no video."""

    name = "LLaVA-1.5"
    model_types = ("llava",)
    modalities = ("image",)

    def placeholders(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        return {"image": (config.image_token_id,)}

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> dict[str, list[Grid]]:
        """side x side patches, the tower's first token too where the config keeps it.

        With a Pixtral tower, each picture's own rows and columns; its row ends are text.
        """
        if "image" not in vision:
            return {}
        given = vision["image"]
        if given.get("image_sizes") is not None:
            patch = config.vision_config.patch_size
            sizes = torch.as_tensor(given["image_sizes"]).tolist()
            return {"image": [box(1, rows // patch, cols // patch) for rows, cols in sizes]}
        strategy = given.get("vision_feature_select_strategy")
        strategy = strategy or config.vision_feature_select_strategy
        grid = square(config, whole=strategy == "full")
        return {"image": [grid] * len(cast(torch.Tensor, given["pixel_values"]))}

    def largest(self, files: Files) -> tuple[int, int]:
        return preprocess.whole_size(_recipe(files))

    def plan(self, files: Files, source: Source, sampling: Sampling, num_media: int) -> Plan:
        """Resized and cropped; max_tiles does not apply."""
        if source.kind != "image":
            raise llava_next.no_video(source, self.name)
        if files.config.vision_config.model_type == "pixtral":
            raise ModelError(
                "pictures for a Pixtral tower are not prepared here",
                "prepare them with the checkpoint's own processor and prune with vtprune.pruning",
            )
        padded = bool(files.image.get("do_pad")) and _kind(files).startswith("Llava")
        return Plan((0,), functools.partial(_square, recipe=_recipe(files), padded=padded))

    def encode(self, files: Files, media: Sequence[Prepared], turns: Sequence[Turn]) -> Inputs:
        vision: dict[str, dict[str, torch.Tensor]] = {}
        if media:
            recipe = _recipe(files)
            pixels = torch.cat([preprocess.normalize(one.pixels, recipe) for one in media])
            vision["image"] = {"pixel_values": pixels}
        text = prompt.render(files, media, turns, TOKENS, llava_next.template_of(files))
        grids = self.grids(files.config, vision)
        tensors = prompt.encode(files, text, TOKENS, self.placeholders(files.config), grids)
        tensors |= vision.get("image", {})
        return Inputs(tensors, text, (1,) * len(media))


def square(config: PreTrainedConfig, whole: bool) -> Grid:
    """The tokens of one square picture.

    Args:
        whole: all of the tower's tokens, its CLS token included where it has one; else all but the
            first, as LLaVA's "default" takes them.
    """
    tower = config.vision_config
    side = tower.image_size // tower.patch_size
    patches = box(1, side, side)
    if str(tower.model_type).startswith("siglip"):  # has no CLS: "default" loses the first patch
        return patches if whole else patches.take(torch.arange(1, side**2))
    return join([single(CLS), patches]) if whole else patches


def _square(pixels: torch.Tensor, recipe: preprocess.Recipe, padded: bool) -> torch.Tensor:
    """(1, 3, H, W) uint8 -> (1, 3, h, w)."""
    if padded:
        edge = max(pixels.shape[-2:])
        background = [int(value * 255) for value in recipe.mean or (0.0, 0.0, 0.0)]
        pixels = preprocess.pad_to(pixels, (edge, edge), background)
    return preprocess.finish(pixels, recipe)


def _kind(files: Files) -> str:
    return str(files.image.get("image_processor_type", ""))


def _recipe(files: Files) -> preprocess.Recipe:
    """By the preprocessor's class: LLaVA's and CLIP's have the same defaults."""
    defaults = SIGLIP if _kind(files).startswith("Siglip") else CLIP
    return preprocess.read_recipe(preprocess.merged(files.image, defaults))
