"""Idefics3: pictures split into tiles, each behind a marker of its row and column."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models import cost, preprocess, splitting
from vtprune.models.base import (
    Contents,
    Family,
    Files,
    Grids,
    Media,
    PreparedMedia,
    ReadPlan,
    Sampling,
    VisionInputs,
    VisionTensors,
)
from vtprune.tokens.layout import box

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

TOKENS = {"image": "<image>"}
AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"
LANCZOS = 1
LARGEST = 4096
"""Pixels along a side that no picture is resized beyond."""
DEFAULTS: Mapping[str, object] = {
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "resample": LANCZOS,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "do_image_splitting": True,
}

# The chat format of the official checkpoints, after their start token.
MESSAGES = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<' + part['type'] + '>' }}{% endif %}{% endfor %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TEMPLATE = "{{ '<|begin_of_text|>' }}" + MESSAGES


class Idefics3(Family):
    """Tiles row by row, then the whole picture, each a block of its own; no video."""

    name = "Idefics3"
    model_types = ("idefics3",)
    tokens = TOKENS
    template = TEMPLATE
    lists_media = True

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> Grids:
        """Which tiles are one picture is told from the markers between them in `input_ids`.

        As a video, all blocks of a prompt are its frames.
        """
        grids: Grids = {}
        for modality, inputs in vision.items():
            pixels = cast(torch.Tensor, inputs["pixel_values"])  # (B, tiles, 3, H, W), zeros behind
            side = token_side(config, pixels.shape[-1])
            num_blocks = max(int(pixels.flatten(0, 1).flatten(1).any(1).sum()), 1)
            ids = cast("torch.Tensor | None", inputs.get("input_ids"))
            token = config.image_token_id
            rows = None
            if ids is not None:
                rows = splitting.tokens_of_prompts(ids, token, num_blocks * side**2)
            if rows is None or ids is None:
                grids[modality] = [box(1, side, side)] * num_blocks
            elif modality == "video":
                grids[modality] = [box(len(row) // side**2, side, side) for row in rows if len(row)]
            else:
                repeat = len(ids) // len(rows)
                grids[modality] = [
                    splitting.split_grid(*shape, side)
                    for row, columns in zip(ids[::repeat].tolist(), rows, strict=True)
                    if len(columns)
                    for shape in splitting.parse_markers(row, columns.tolist(), side**2)
                ]
        return grids

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        """Blocks of patches side by side, then one matrix."""
        shape, merge = cost.plain_tower(config), cost.size_of(config, "scale_factor", 2)
        projector = ((merge**2 * shape.hidden, cost.text_width(config)),)
        return replace(shape, projector=projector, merge=merge)

    def largest(self, files: Files) -> tuple[int, int]:
        edge = edge_of(preprocess.merged(files.image, DEFAULTS), "size")
        return edge, edge

    def plan_image(self, files: Files, source: Source, sampling: Sampling, alone: bool) -> ReadPlan:
        """Enlarged to whole tiles along the longer side; fewer of them for max_tiles.

        The Lanczos is Pillow's, as in `Idefics3ImageProcessorPil`: its values are the same on every
        machine and with every torchvision. Transformers takes torchvision's from torchvision 0.27
        on (before that it was bicubic, so Pillow's was taken), unless it is told backend="pil".
        On 15 photographs and scans the two are up to 2 grey levels apart (once 3), in up to 1.5 %
        of the values; in noise up to 34, because they clip between two passes in another order.
        """
        values = preprocess.merged(files.image, DEFAULTS)
        longest, shape = _resized(source, values, sampling.max_tiles)
        cut = functools.partial(_cut, values=values, longest=longest, rows=shape[0], cols=shape[1])
        return ReadPlan((0,), cut, splitting.regions(*shape))

    def vision_inputs(self, files: Files, media: Media) -> VisionTensors:
        """Return the pixels of all pictures, each normalised alone, joined in one row."""
        if not media:
            return {}
        recipe = recipe_of(preprocess.merged(files.image, DEFAULTS))
        parts = [preprocess.normalize_singly(picture.pixels, recipe) for picture in media]
        return {"image": pixel_inputs(parts)}

    def media_grids(self, files: Files, media: Media, vision: VisionInputs) -> Grids:
        grids = []
        for picture in media:
            side = token_side(files.config, picture.pixels.shape[-1])
            grids.append(splitting.split_grid(*_tiling(files, picture), side))
        return {"image": grids} if grids else {}

    def placeholder_texts(self, files: Files, media: Media, grids: Grids) -> dict[str, list[str]]:
        texts = []
        for picture in media:
            side = token_side(files.config, picture.pixels.shape[-1])
            texts.append(_placeholder_text(*_tiling(files, picture), side**2))
        return {"image": texts}

    def published_files(self, side: int) -> Contents:
        longest, tile = {"longest_edge": 4 * side}, {"longest_edge": side}
        return {"image": {"size": longest, "max_image_size": tile}}


def token_side(config: PreTrainedConfig, edge: int) -> int:
    """Return the tokens along a side of a tile of `edge` pixels."""
    return int(edge // config.vision_config.patch_size // config.scale_factor)


def pixel_inputs(parts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """(n, 3, H, W) each -> pixels of one prompt and their mask, in which all is picture."""
    pixels = torch.cat(list(parts))[None]
    mask = torch.ones(
        (1, pixels.shape[1], *pixels.shape[-2:]), dtype=torch.long, device=pixels.device
    )
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def recipe_of(values: Mapping[str, object]) -> preprocess.Recipe:
    """Return the recipe, Lanczos included."""
    recipe = preprocess.read_recipe({**values, "resample": 3})
    if values["resample"] == LANCZOS:
        return replace(recipe, resample=LANCZOS)
    return preprocess.read_recipe(values)


def longest_to(height: int, width: int, edge: int) -> tuple[int, int]:
    """(height, width) with the longer side `edge` and the other one even."""
    aspect = width / height
    if width >= height:
        short = int(edge / aspect)
        return max(short + short % 2, 1), edge
    short = int(edge * aspect)
    return edge, max(short + short % 2, 1)


def edge_of(values: Mapping[str, object], key: str) -> int:
    return int(cast("Mapping[str, int]", values[key])["longest_edge"])


def _resized(
    source: Source, values: Mapping[str, object], limit: int | None
) -> tuple[int, tuple[int, int]]:
    """Return the longest edge that a picture is resized to, and the rows and columns of its tiles.

    (0, 0) where it is not split. The number of tiles chosen, as a limit, gives the same again.
    """
    longest, tile = edge_of(values, "size"), edge_of(values, "max_image_size")
    if not values["do_image_splitting"]:
        return longest, (0, 0)
    while True:
        height, width = _whole_tiles(*_first_size(source.height, source.width, longest), tile)
        rows, cols = height // tile, width // tile
        if rows * cols == 1:
            return longest, (0, 0)
        if limit is None or rows * cols <= limit:
            return longest, (rows, cols)
        longest = (max(rows, cols) - 1) * tile


def _tiling(files: Files, picture: PreparedMedia) -> tuple[int, int]:
    """Return the rows and columns of the tiles that a picture was split into; (0, 0) for none."""
    values = preprocess.merged(files.image, DEFAULTS)
    return _resized(picture.source, values, len(picture.pixels) - 1)[1]


def _first_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """Return the first of the resizes: to the longest edge, and below the largest size."""
    height, width = longest_to(height, width, longest)
    aspect = width / height
    if width >= height and width > LARGEST:
        height, width = int(LARGEST / aspect), LARGEST
    elif height > width and height > LARGEST:
        height, width = LARGEST, int(LARGEST * aspect)
    return max(height, 1), max(width, 1)


def _whole_tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    """Return the second: both sides up to whole tiles."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        return math.ceil(int(width / aspect) / tile) * tile, width
    height = math.ceil(height / tile) * tile
    return height, math.ceil(int(height * aspect) / tile) * tile


def _cut(
    pixels: torch.Tensor, values: Mapping[str, object], longest: int, rows: int, cols: int
) -> torch.Tensor:
    """(1, 3, H, W) uint8 -> (tiles + 1, 3, h, w): the tiles, then the whole; or it alone."""
    recipe, tile = recipe_of(values), edge_of(values, "max_image_size")
    if recipe.do_resize:
        height, width = pixels.shape[-2:]
        pixels = preprocess.resize_pil(pixels, _first_size(height, width, longest), recipe.resample)
    if not rows:
        return preprocess.resize_pil(pixels, (tile, tile), recipe.resample)
    pixels = preprocess.resize_pil(pixels, (rows * tile, cols * tile), recipe.resample)
    base_picture = preprocess.resize_pil(pixels, (tile, tile), recipe.resample)
    return torch.cat([splitting.cut(pixels, tile), base_picture])


def whole_block(count: int) -> str:
    """Return the text of a picture that was not split, in the prompt."""
    return AROUND + WHOLE + TOKENS["image"] * count + AROUND


def _placeholder_text(rows: int, cols: int, count: int) -> str:
    """Return the text of a picture: a line for each row of tiles, an empty one, then the whole."""
    tokens = TOKENS["image"] * count
    lines = [
        "".join(f"{AROUND}<row_{row + 1}_col_{col + 1}>{tokens}" for col in range(cols)) + "\n"
        for row in range(rows)
    ]
    return "".join(lines) + ("\n" if lines else "") + whole_block(count)
