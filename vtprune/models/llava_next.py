"""LLaVA-NeXT (1.6): tiled pictures, whatever the language model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional

from vtprune.models import anyres, preprocess
from vtprune.models.base import (
    Files,
    Grids,
    Media,
    PreparedMedia,
    ReadPlan,
    Sampling,
    Tensors,
    VisionInputs,
)
from vtprune.models.llava import CLIP, Llava
from vtprune.tokens.units import Region

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source


class LlavaNext(Llava):
    """Every picture is a base picture and its tiles, also beside others; no video."""

    name = "LLaVA-NeXT"
    model_types = ("llava_next",)
    original_kinds = Llava.original_kinds | {"llava_mistral", "LlavaMistralForCausalLM"}

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> Grids:
        """Base picture, then the unpadded picture, every row of which ends in a newline."""
        if "image" not in vision:
            return {}
        tile, side, sizes = tile_sizes(config, vision["image"])
        tilings = config.image_grid_pinpoints
        return {"image": [anyres.tiled_grid(size, tilings, tile, side) for size in sizes]}

    def planes(
        self, config: PreTrainedConfig, arguments: Mapping[str, object]
    ) -> list[anyres.Plane | None] | None:
        """Every picture is tiled."""
        if arguments.get("image_sizes") is None or arguments.get("pixel_values_videos") is not None:
            return None
        tile, side, sizes = tile_sizes(config, arguments)
        return [anyres.plane_of(size, config.image_grid_pinpoints, tile, side) for size in sizes]

    def largest(self, files: Files) -> tuple[int, int]:
        tile, resolutions = tiling_of(files)
        return anyres.largest(resolutions, tile)

    def plan_image(self, files: Files, source: Source, sampling: Sampling, alone: bool) -> ReadPlan:
        """A base picture and the tiles of the best resolution, of those with at most max_tiles."""
        tile, resolutions = tiling_of(files)
        size = (source.height, source.width)
        input_size = anyres.limited_size(size, resolutions, tile, sampling.max_tiles)
        cut = functools.partial(
            anyres.cut, input_size=input_size, resolutions=resolutions, tile=tile,
            recipe=self.picture_recipe(files),
        )  # fmt: skip
        return ReadPlan((0,), cut, self.regions(files, input_size))

    def regions(self, files: Files, input_size: anyres.Size) -> tuple[Region, ...]:
        """Return the part of a picture that each tile shows; () where tokens mix tiles.

        Args:
            input_size: the size that the model is given of the picture.
        """
        tile, resolutions = tiling_of(files)
        return anyres.regions(input_size, resolutions, tile)

    def picture_inputs(self, files: Files, pictures: Media) -> Tensors:
        """Pictures with fewer tiles than others are filled up with zeros."""
        recipe = self.picture_recipe(files)
        pixels = [preprocess.normalize(picture.pixels, recipe) for picture in pictures]
        most = max(map(len, pixels))
        padded = [functional.pad(tiles, (0, 0) * 3 + (0, most - len(tiles))) for tiles in pixels]
        sizes = torch.tensor([given_size(files, picture) for picture in pictures])
        return {"pixel_values": torch.stack(padded), "image_sizes": sizes}

    def picture_recipe(self, files: Files) -> preprocess.Recipe:
        return preprocess.recipe_over(files.image, CLIP)


def tile_sizes(
    config: PreTrainedConfig, arguments: Mapping[str, object]
) -> tuple[int, int, list[anyres.Size]]:
    """Return the side of a tile in pixels and in tokens, and the sizes of a call's pictures."""
    tower = config.vision_config
    sizes = torch.as_tensor(arguments["image_sizes"]).tolist()
    return tower.image_size, tower.image_size // tower.patch_size, sizes


def tiling_of(files: Files) -> tuple[int, list[list[int]]]:
    """Return the side of a tile, and the resolutions to choose from."""
    resolutions = files.image.get("image_grid_pinpoints") or files.config.image_grid_pinpoints
    return files.config.vision_config.image_size, cast("list[list[int]]", resolutions)


def given_size(files: Files, picture: PreparedMedia) -> anyres.Size:
    """Return the size that the model is given of a picture: smaller for fewer tiles."""
    tile, resolutions = tiling_of(files)
    size = (picture.source.height, picture.source.width)
    return anyres.limited_size(size, resolutions, tile, len(picture.pixels) - 1)
