"""InternVL3 and 3.5: tiled pictures, and video frames as blocks of the same placeholder."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models import cost, frames, preprocess, splitting
from vtprune.models.base import (
    Contents,
    Family,
    Files,
    Grids,
    Media,
    ReadPlan,
    Sampling,
    VisionInputs,
    VisionTensors,
)
from vtprune.tokens.layout import Grid, box

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

TOKENS = {"image": "<IMG_CONTEXT>", "video": "<video>"}
SPECIAL_TOKENS: Mapping[str, str | None] = {"<IMG_CONTEXT>": "image_token_id"}
DEFAULTS: Mapping[str, object] = {
    "size": {"height": 384, "width": 384},
    "resample": 3,
    "image_mean": preprocess.CLIP_MEAN,
    "image_std": preprocess.CLIP_STD,
    "min_patches": 1,
    "max_patches": 12,
}
OFFICIAL_FRAMES = 8

# The chat format of the official checkpoints.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class InternVL(Family):
    """Tiles row by row, then the whole picture; a video's frame is a picture of one tile."""

    name = "InternVL"
    model_types = ("internvl",)
    original_kinds = frozenset({"internvl_chat", "InternVLChatModel"})
    modalities: tuple[str, ...] = ("image", "video")
    tokens = TOKENS
    special_tokens = SPECIAL_TOKENS
    template = TEMPLATE
    shares_placeholder = True
    lists_media = True

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> Grids:
        """An unbroken run of placeholders is a picture; as a video, all of a prompt are frames.

        What a prompt's ids don't say: the rows and columns of a picture's tiles, which are told
        from the pixels, and where one video of a prompt ends and the next begins.
        """
        grids: Grids = {}
        for modality, tower_inputs in vision.items():
            pixels = cast(torch.Tensor, tower_inputs["pixel_values"])
            side = self.tile_side(config, pixels.shape[-1])
            ids = cast("torch.Tensor | None", tower_inputs.get("input_ids"))
            rows = None
            if ids is not None:
                total = len(pixels) * side**2
                rows = splitting.tokens_of_prompts(ids, config.image_token_id, total)
            if rows is None or ids is None:
                grids[modality] = [box(1, side, side)] * len(pixels)
            elif modality == "video":
                grids[modality] = [box(len(row) // side**2, side, side) for row in rows if len(row)]
            else:
                prompts = zip(ids[:: len(ids) // len(rows)], rows, strict=True)
                counts = [
                    length // side**2
                    for prompt, columns in prompts
                    for length in self.picture_lengths(prompt, columns)
                ]
                tiles = pixels[: sum(counts)].split(counts)
                shapes = splitting.arrangements(tiles)
                grids[modality] = [splitting.split_grid(*shape, side) for shape in shapes]
        return grids

    def tile_side(self, config: PreTrainedConfig, edge: int) -> int:
        """Return the tokens along a side of a tile of `edge` pixels."""
        patch = config.vision_config.patch_size
        patch = patch[0] if isinstance(patch, Sequence) else patch
        return int(edge // patch * config.downsample_ratio)

    def picture_lengths(self, prompt: torch.Tensor, columns: torch.Tensor) -> list[int]:
        """Return the number of placeholders of each picture of a prompt.

        Args:
            prompt: (S,) its token ids.
            columns: (n,) of its placeholders, ascending.
        """
        return splitting.runs(columns)

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        """CLS is dropped; blocks of patches side by side, then two matrices."""
        shape, out = cost.plain_tower(config, extra=1), cost.text_width(config)
        merge = int(1 / getattr(config, "downsample_ratio", 0.5))
        projector = ((merge**2 * shape.hidden, out), (out, out))
        return replace(shape, projector=projector, merge=merge)

    def largest(self, files: Files) -> tuple[int, int]:
        values = preprocess.merged(files.image, DEFAULTS)
        rows, cols = splitting.squarest(cast(int, values["max_patches"]))
        size = cast("Mapping[str, int]", values["size"])
        return rows * size["height"], cols * size["width"]

    def plan_image(self, files: Files, source: Source, sampling: Sampling, alone: bool) -> ReadPlan:
        """Tiles in the shape nearest the picture's, at most max_tiles and the checkpoint's own."""
        values = preprocess.merged(files.image, DEFAULTS)
        rows, cols = _tiles(source, values, sampling.max_tiles)
        recipe = preprocess.read_recipe(values)
        cut = functools.partial(_cut, rows=rows, cols=cols, recipe=recipe)
        return ReadPlan((0,), cut, splitting.regions(rows, cols))

    def plan_video(self, files: Files, source: Source, sampling: Sampling) -> ReadPlan:
        """Without frames or fps, after start and end, the checkpoint's own `num_frames`, else 8.

        Each is from the middle of an equal part; 8 as in the authors' example.
        """
        recipe = _recipe(files, "video")
        return frames.plan_parts(source, sampling, files.video, OFFICIAL_FRAMES, recipe, _middles)

    def vision_inputs(self, files: Files, media: Media) -> VisionTensors:
        """Tiles and frames in one tensor, in the order of the prompt."""
        if not media:
            return {}
        recipes = {kind: _recipe(files, kind) for kind in self.modalities}
        parts = [preprocess.normalize(item.pixels, recipes[item.source.kind]) for item in media]
        return {"image": {"pixel_values": torch.cat(parts)}}

    def media_grids(self, files: Files, media: Media, vision: VisionInputs) -> Grids:
        grids: Grids = {}
        for item in media:
            side = self.tile_side(files.config, item.pixels.shape[-1])
            grid = box(len(item.pixels), side, side)
            if item.source.kind == "image":
                values = preprocess.merged(files.image, DEFAULTS)
                shape = _tiles(item.source, values, len(item.pixels) - 1)
                grid = splitting.split_grid(*shape, side)
            grids.setdefault(item.source.kind, []).append(grid)
        return grids

    def placeholder_texts(self, files: Files, media: Media, grids: Grids) -> dict[str, list[str]]:
        return {
            kind: [_placeholder_text(kind, grid) for grid in items] for kind, items in grids.items()
        }

    def published_files(self, side: int) -> Contents:
        size: dict[str, object] = {"size": {"height": side, "width": side}}
        return {"image": {**size, "min_patches": 1, "max_patches": 12}, "video": size}


def _placeholder_text(kind: str, grid: Grid) -> str:
    """Return the text of a picture or a video in the prompt."""
    token = TOKENS["image"]
    if kind == "image":
        return f"<img>{token * len(grid)}</img>"
    num_frames = int(grid.frame[-1]) + 1
    block = f"<img>{token * (len(grid) // num_frames)}</img>"
    return "\n".join(f"Frame{number}: {block}" for number in range(1, num_frames + 1))


def _tiles(source: Source, values: Mapping[str, object], limit: int | None) -> tuple[int, int]:
    """Return the (rows, columns) of tiles whose shape is nearest the picture's.

    Of equal shapes, the larger where the picture has more than half of its pixels. The number of
    tiles chosen, as a limit, gives the same choice again.
    """
    least, most = cast(int, values["min_patches"]), cast(int, values["max_patches"])
    if limit is not None:
        most = max(min(most, limit), 1)
        least = min(least, most)
    size = cast("Mapping[str, int]", values["size"])
    pairs = [(rows, cols) for cols in range(1, most + 1) for rows in range(1, most // cols + 1)]
    pairs = sorted((pair for pair in pairs if pair[0] * pair[1] >= least), key=_area)
    aspect = source.width / source.height
    best, nearest = (1, 1), float("inf")
    for rows, cols in pairs:
        distance = abs(aspect - cols / rows)
        pixels = size["height"] * size["width"] * rows * cols
        larger = distance == nearest and source.width * source.height > 0.5 * pixels
        if distance < nearest or larger:
            best, nearest = (rows, cols), distance
    return best


def _area(pair: tuple[int, int]) -> int:
    return pair[0] * pair[1]


def _cut(pixels: torch.Tensor, rows: int, cols: int, recipe: preprocess.Recipe) -> torch.Tensor:
    """(1, 3, H, W) uint8 -> (tiles + 1, 3, h, w): the tiles, then the whole; or it alone."""
    height, width = recipe.size["height"], recipe.size["width"]
    thumbnail = preprocess.resize(pixels, (height, width), recipe.resample)
    if rows * cols == 1:
        return thumbnail
    large = preprocess.resize(pixels, (rows * height, cols * width), recipe.resample)
    return torch.cat([splitting.cut(large, height), thumbnail])


def _middles(between: list[int], count: int) -> list[int]:
    """Return the frame in the middle of each of `count` equal parts, in torch's float32."""
    if count >= len(between):
        return between
    part = len(between) / count
    positions = torch.arange(part / 2, len(between), part).int().tolist()
    return [between[position] for position in positions[:count]]


def _recipe(files: Files, kind: str) -> preprocess.Recipe:
    """A checkpoint without a file for videos has that for pictures serve both."""
    values = files.video or files.image if kind == "video" else files.image
    return preprocess.recipe_over(values, DEFAULTS)
