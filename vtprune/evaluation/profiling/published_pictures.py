"""Pictures for published models whose families have no file of their own, by sizes alone.

Such a model's inputs are made by its checkpoint's own processor, which is not there without the
checkpoint. A profile needs no pixels, only how many tiles or patches a picture becomes, and where
their tokens lie; that follows from a few sizes of the processor.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import cast

import torch

from vtprune.errors import ModelError
from vtprune.media import Source
from vtprune.models.base import Files, Inputs, PreparedMedia, ReadPlan, Sampling, Turn
from vtprune.models.generic import GenericFamily
from vtprune.models.placeholder_runs import below_each_other
from vtprune.tokens.layout import Grid, box

WORD, MARKER = "word", "<marker>"
"""Texts of the tokens that are not visual."""


class PublishedPictures(GenericFamily):
    """A model type whose pictures become tiles of one size, or one tile of any size.

    Args:
        model_type: `config.model_type`.
        sizes: `token`: pixels along a side of what becomes a token; `tile`: of a tile; `most`: the
            most tiles of a picture, beside the small one of all of it that several have; without
            `tile`, `longest`: pixels of a picture's longer side, whose rows of tokens then end
            with one of text.
    """

    def __init__(self, model_type: str, sizes: Mapping[str, int]) -> None:
        super().__init__(model_type)
        self.sizes = sizes

    def largest(self, files: Files) -> tuple[int, int]:
        """Return the size of a square picture of as many tiles as there may be."""
        side = self.sizes.get("longest") or int(self.sizes["most"] ** 0.5) * self.sizes["tile"]
        return side, side

    def plan_image(self, files: Files, source: Source, sampling: Sampling, alone: bool) -> ReadPlan:
        """Plan to read a picture as it is: only its size counts."""
        return ReadPlan((0,), _unchanged)

    def encode(self, files: Files, media: Sequence[PreparedMedia], turns: Sequence[Turn]) -> Inputs:
        """Return inputs of the right sizes, whose pixels are 0."""
        if not media:
            raise ModelError(f"{self.name}: a profile needs a picture", "give --image 1344x1344")
        self.check_media(media)
        word, marker = (
            cast(int, files.tokenizer.convert_tokens_to_ids(text)) for text in (WORD, MARKER)
        )
        (visual,) = self.placeholders(files.config)["image"]
        ids, tiles, grids = [word], [], []
        pixels: list[torch.Tensor] = []
        for item in media:
            height, width = self._fit(*item.pixels.shape[-2:])
            blocks = self._blocks(height, width)
            for block in blocks:
                rows, cols = block if "longest" in self.sizes else (1, block[0] * block[1])
                ids += [marker, *[visual] * cols] * rows
            ids.append(marker)
            tiles.append(len(blocks))
            grids.append(below_each_other([box(1, *block) for block in blocks]))
            side = self.sizes.get("tile", 0)
            pixels.append(torch.zeros(len(blocks), 3, side or height, side or width))
        input_ids = torch.tensor([[*ids, word]])
        tensors = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        sizes = [tuple(part.shape[-2:]) for part in pixels for _ in part]
        highest, widest = (max(size[side] for size in sizes) for side in (0, 1))
        padded = [
            torch.nn.functional.pad(part, (0, widest - part.shape[-1], 0, highest - part.shape[-2]))
            for part in pixels
        ]
        tensors["pixel_values"] = torch.cat(padded)
        if "longest" in self.sizes:
            tensors["image_sizes"] = torch.tensor(sizes)
        laid: tuple[tuple[str, Grid], ...] = tuple(("image", part) for part in grids)
        return Inputs(tensors, "", tuple(tiles), laid)

    def _fit(self, height: int, width: int) -> tuple[int, int]:
        """Return the size that a picture is made, in whole tokens or tiles."""
        if "longest" in self.sizes:
            ratio = max(height / self.sizes["longest"], width / self.sizes["longest"], 1.0)
            token = self.sizes["token"]
            return tuple(-(-int(side / ratio) // token) * token for side in (height, width))  # type: ignore[return-value]
        tile, most = self.sizes["tile"], self.sizes["most"]
        canvases = [
            (rows, cols)
            for rows, cols in itertools.product(range(1, most + 1), repeat=2)
            if rows * cols <= most
        ]
        scales = {one: min(one[0] * tile / height, one[1] * tile / width) for one in canvases}
        enough = [scale for scale in scales.values() if scale >= 1]
        best = min(enough) if enough else max(scales.values())
        rows, cols = min(
            (one for one, scale in scales.items() if scale == best), key=lambda one: one[0] * one[1]
        )
        return rows * tile, cols * tile

    def _blocks(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the rows and columns of tokens of each tile, that of the whole picture first."""
        token = self.sizes["token"]
        if "longest" in self.sizes:
            return [(height // token, width // token)]
        side = self.sizes["tile"]
        count = height * width // side**2
        return [(side // token, side // token)] * (count + (count > 1))


def _unchanged(pixels: torch.Tensor) -> torch.Tensor:
    return pixels
