"""Molmo2: pictures as a base picture and overlapping tiles, or a video's frames."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional

from vtprune.errors import ModelError
from vtprune.models import cost, frames, preprocess, splitting
from vtprune.models.base import (
    Contents,
    Family,
    Files,
    Grids,
    Media,
    PreparedMedia,
    ReadPlan,
    Sampling,
    Tensors,
    Turn,
    VisionInputs,
    VisionTensors,
)
from vtprune.models.qwen2_vl import even_parts
from vtprune.tokens.layout import PATCH, Grid, box, join
from vtprune.tokens.units import Region

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

TOKENS = {"image": "<|image|>", "video": "<|video|>"}
SPECIAL_TOKENS = {
    "<im_patch>": "image_patch_id",
    "<im_start>": "image_start_token_id",
    "<im_end>": "image_end_token_id",
    "<low_res_im_start>": "low_res_image_start_token_id",
    "<frame_start>": "frame_start_token_id",
    "<frame_end>": "frame_end_token_id",
    "<im_col>": None,
    "<im_low>": None,
}
MARKERS = (
    "<im_patch>",
    "<im_col>",
    "<im_start>",
    "<low_res_im_start>",
    "<frame_start>",
    "<im_end>",
    "<frame_end>",
    "<im_low>",
)
COMMON: Mapping[str, object] = {
    "size": {"height": 378, "width": 378},
    "resample": 2,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "patch_size": 14,
}
IMAGE = {**COMMON, "max_crops": 8, "overlap_margins": (4, 4), "pooling_size": (2, 2)}
VIDEO = {**COMMON, "pooling_size": (3, 3), "num_frames": 64, "max_fps": 2}
PROCESSOR: Mapping[str, object] = {
    "image_use_col_tokens": True,
    "use_single_crop_start_token": True,
    "video_use_col_tokens": False,
    "use_frame_special_tokens": True,
}

# For a checkpoint without a template of its own: that of the language model it is built on.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<|' + part['type'] + '|>' }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Molmo2(Family):
    """Pictures in two resolutions, or one video, pooled; all visual tokens see each other."""

    name = "Molmo2"
    model_types = ("molmo2",)
    earlier_kinds = frozenset({"molmo", "MolmoForCausalLM"})
    modalities = ("image", "video")
    tokens = TOKENS
    special_tokens = SPECIAL_TOKENS
    template = TEMPLATE
    overlapping_tiles = True

    def placeholders(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        return {"image": (config.image_patch_id,), "video": (config.image_patch_id,)}

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> Grids:
        """A picture's base, then its tiles' rows across the whole picture. A token belongs to the
        tile that its first patch comes from; overlaps are cut off, and columns' ends are text."""
        grids: Grids = {}
        if "image" in vision:
            pooling = torch.as_tensor(vision["image"]["image_token_pooling"]).cpu()
            first = torch.where(pooling >= 0, pooling, pooling.max() + 1).amin(1)  # (N,)
            crop = first // config.vision_config.num_position_embeddings
            grids["image"], at = [], 0
            for low, wide, rows, cols in torch.as_tensor(vision["image"]["image_grids"]).tolist():
                base, tiles = box(1, low, wide), box(1, rows, cols)
                number = crop[at + len(base) : at + len(base) + len(tiles)] - crop[at]
                kind = torch.full_like(number, PATCH).long()
                tiles = Grid(tiles.frame, number.long(), tiles.row, tiles.col, kind)
                grids["image"].append(join([base, tiles]))
                at += len(base) + len(tiles)
        if "video" in vision:
            shapes = torch.as_tensor(vision["video"]["video_grids"]).tolist()
            grids["video"] = [box(*shape) for shape in shapes]
        return grids

    def spans(self, files: Files, item: PreparedMedia) -> tuple[Region, Region]:
        """Blocks of patches, filled up around the picture where they don't divide it evenly."""
        values = _values(files, item.source.kind)
        pool = cast("Sequence[int]", values["pooling_size"])
        edge = cast("Mapping[str, int]", values["size"])["height"]
        side = edge // cast(int, values["patch_size"])
        base = _span((side, side), pool)
        if item.source.kind == "video":
            return base, base
        _, _, window = _window(values)
        source = item.source
        tiling = _tiling(source.height, source.width, values, len(item.pixels) - 1)
        rows, cols = ((count - 1) * window + side for count in tiling)
        return base, _span((rows, cols), pool)

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        """One query for each block of patches attends to them; then a gated MLP.

        Blocks are of 2 x 2 patches in pictures and of 3 x 3 in frames, as the checkpoints'
        processor makes them: the config does not say. Those that are filled up cost as much as
        whole ones.
        """
        tower = getattr(config, "vision_config", None)
        adapter = getattr(config, "adapter_config", None)
        shape, size_of = cost.plain_tower(config), cost.size_of
        heads, wide = size_of(tower, "num_attention_heads"), size_of(tower, "head_dim")
        if heads * wide != shape.hidden or size_of(tower, "num_key_value_heads", heads) != heads:
            return None  # of no published checkpoint
        hidden, inner = size_of(adapter, "hidden_size"), size_of(adapter, "intermediate_size")
        heads, wide = size_of(adapter, "num_attention_heads"), size_of(adapter, "head_dim")
        kv_heads = size_of(adapter, "num_key_value_heads", heads)
        merge = 3 if modality == "video" else 2
        features, block = hidden * len(cost.list_of(adapter, "vision_feature_layer")), merge**2
        attention = (
            (features, heads * wide),  # query
            (block * features, 2 * kv_heads * wide),  # keys and values
            (block, 2 * heads * wide),  # scores and their sum
            (heads * wide, hidden),
        )
        mlp = ((hidden, 2 * inner), (inner, size_of(adapter, "text_hidden_size")))
        return replace(shape, projector=(*attention, *mlp), merge=merge, overlapping=True)

    def largest(self, files: Files) -> tuple[int, int]:
        values = _values(files, "image")
        side, _, window = _window(values)
        tiling = splitting.squarest(cast(int, values["max_crops"]))
        rows, cols = (
            ((count - 1) * window + side) * cast(int, values["patch_size"]) for count in tiling
        )
        return rows, cols

    def plan_image(self, files: Files, source: Source, sampling: Sampling, alone: bool) -> ReadPlan:
        """max_tiles is the most tiles of a picture."""
        values = _values(files, "image")
        most = cast(int, values["max_crops"])
        most = most if sampling.max_tiles is None else min(most, max(sampling.max_tiles, 1))
        tiling = _tiling(source.height, source.width, values, most)
        return ReadPlan((0,), functools.partial(_cut, tiling=tiling, values=values))

    def plan_video(self, files: Files, source: Source, sampling: Sampling) -> ReadPlan:
        """Without frames or fps, the official sampling, after start and end.

        That is 2 frames a second and at most 64, each the first of an equal part.
        """
        values = _values(files, "video")
        side = cast("Mapping[str, int]", values["size"])["height"]
        official = functools.partial(
            _official, source=source, values=values, most=sampling.max_frames
        )
        index = frames.choose_frames(source, sampling, official)
        return ReadPlan(index, functools.partial(_resize, size=(side, side)))

    def check_media(self, media: Media) -> None:
        kinds = [item.source.kind for item in media]
        if kinds.count("video") > 1 or len(set(kinds)) > 1:
            counts = f"{kinds.count('image')} pictures and {kinds.count('video')} videos"
            raise ModelError(
                f"{counts} in one question; Molmo2 takes pictures, or one video",
                "ask about each video separately",
            )

    def render(self, files: Files, media: Media, turns: Sequence[Turn]) -> str:
        """The official processor puts a start token before what the template wrote."""
        text = super().render(files, media, turns)
        start = str(files.tokenizer.bos_token or files.tokenizer.eos_token)
        return text if text.startswith(start) else start + text

    def vision_inputs(self, files: Files, media: Media) -> VisionTensors:
        """Patches, which of them each token pools, and grids."""
        if not media:
            return {}
        if media[0].source.kind == "video":
            return {"video": _video(media[0], _values(files, "video"))}
        return {"image": _pictures(media, _values(files, "image"))}

    def placeholder_texts(self, files: Files, media: Media, grids: Grids) -> dict[str, list[str]]:
        flags = preprocess.merged(files.processor, PROCESSOR)
        return {
            "image": [_picture(grid, flags) for grid in grids.get("image", ())],
            "video": [
                _frames(video, grid, flags)
                for video, grid in zip(media, grids.get("video", ()), strict=False)
            ],
        }

    def token_types(self, files: Files, input_ids: torch.Tensor, media: Media) -> Tensors:
        """`mm_token_type_ids`: which tokens, markers included, see each other both ways."""
        markers = files.tokenizer.convert_tokens_to_ids(list(MARKERS))
        return {"mm_token_type_ids": torch.isin(input_ids, torch.tensor(markers)).long()}

    def published_files(self, side: int) -> Contents:
        return {"image": {"max_crops": 8}}

    def shorten_tower(self, config: PreTrainedConfig) -> None:
        """Features come from layers by their number."""
        adapter = config.adapter_config
        read = len(adapter.vision_feature_layer)
        adapter.vision_feature_layer = list(range(read))[::-1]
        self.set_tower_depth(config, read)


def _values(files: Files, kind: str) -> dict[str, object]:
    if kind == "image":
        return preprocess.merged(files.image, IMAGE)
    return preprocess.merged(files.video, VIDEO)


# Pictures


def _window(values: Mapping[str, object]) -> tuple[int, int, int]:
    """In patches: side of a tile, its first margin, and its side without margins."""
    side = cast("Mapping[str, int]", values["size"])["height"] // cast(int, values["patch_size"])
    before, after = cast("Sequence[int]", values["overlap_margins"])
    return side, before, side - before - after


def _tiling(height: int, width: int, values: Mapping[str, object], most: int) -> tuple[int, int]:
    """(rows, columns) of tiles: the least that the picture is not shrunk for; else the largest."""
    patch = cast(int, values["patch_size"])
    side, _, window = _window(values)
    margin = (side - window) * patch
    tilings = [(rows, cols) for rows in range(1, most + 1) for cols in range(1, most // rows + 1)]
    tilings.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))
    # In torch's float32, sizes less than the margins included, as the official one.
    size = torch.tensor([height - margin, width - margin], dtype=torch.float32)
    scale = (torch.tensor(tilings) * (window * patch) / size).amin(1)
    if bool((scale < 1).all()):
        return tilings[int(scale.argmax())]
    return tilings[int(torch.where(scale < 1, 1e10, scale).argmin())]


def _resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(n, 3, H, W) uint8 -> (n, 3, *size) uint8, bilinear without antialiasing, in float."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    floats = functional.interpolate(pixels.float(), size, mode="bilinear", align_corners=False)
    return floats.round_().clamp_(0, 255).to(torch.uint8)


def _cut(
    pixels: torch.Tensor, tiling: tuple[int, int], values: Mapping[str, object]
) -> torch.Tensor:
    """(1, 3, H, W) uint8 -> (1 + tiles, 3, h, w) uint8: the base picture, overlapping tiles."""
    patch = cast(int, values["patch_size"])
    side, _, window = _window(values)
    rows, cols = [((count - 1) * window + side) * patch for count in tiling]
    canvas = _resize(pixels, (rows, cols))
    tiles = [
        canvas[..., top : top + side * patch, left : left + side * patch]
        for top in range(0, tiling[0] * window * patch, window * patch)
        for left in range(0, tiling[1] * window * patch, window * patch)
    ]
    return torch.cat([_resize(pixels, (side * patch, side * patch)), *tiles])


def _pictures(
    media: Sequence[PreparedMedia], values: Mapping[str, object]
) -> dict[str, torch.Tensor]:
    """Return all pictures' patches, which of them each token pools, and the pictures' grids."""
    side, before, window = _window(values)
    pool = cast("Sequence[int]", values["pooling_size"])
    base = torch.arange(side * side, dtype=torch.int32).view(side, side)
    poolings, grids, at = [], [], 0
    for picture in media:
        tiling = _tiling(
            picture.source.height, picture.source.width, values, len(picture.pixels) - 1
        )
        owner, inside = zip(
            *(_owners(count, side, before, window) for count in tiling), strict=True
        )
        number = 1 + owner[0][:, None] * tiling[1] + owner[1]
        tile_patches = (number * side + inside[0][:, None]) * side + inside[1]
        low, high = _pool(base, pool), _pool(tile_patches.int(), pool)
        grids.append([*low.shape[:2], *high.shape[:2]])
        patches = torch.cat([low.flatten(0, 1), high.flatten(0, 1)])
        poolings.append(torch.where(patches >= 0, patches + at * side * side, patches))
        at += len(picture.pixels)
    return {
        "pixel_values": torch.cat([_patches(picture.pixels, values) for picture in media]),
        "image_token_pooling": torch.cat(poolings),
        "image_grids": torch.tensor(grids),
        "image_num_crops": torch.tensor([len(picture.pixels) for picture in media]),
    }


def _owners(count: int, side: int, before: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for every patch along a side of the canvas, its tile and its place in that tile."""
    patch = torch.arange((count - 1) * window + side)
    tile = ((patch - before) // window).clamp(0, count - 1)
    return tile, patch - tile * window


def _pool(index: torch.Tensor, pool: Sequence[int]) -> torch.Tensor:
    """(R, C) numbers of patches -> (rows, cols, patches of a token), filled up with -1 around."""
    missing = [-length % size for length, size in zip(index.shape, pool, strict=True)]
    (top, bottom), (left, right) = [(edge // 2, (edge + 1) // 2) for edge in missing]
    index = functional.pad(index, (left, right, top, bottom), value=-1)
    rows, cols = index.shape[0] // pool[0], index.shape[1] // pool[1]
    return index.view(rows, pool[0], cols, pool[1]).transpose(1, 2).flatten(2)


def _span(patches: tuple[int, int], pool: Sequence[int]) -> Region:
    """Return what `_pool` covers of so many rows and columns of patches, in fractions of them."""
    missing = [-length % size for length, size in zip(patches, pool, strict=True)]
    starts = [edge // 2 for edge in missing]
    (top, left), (bottom, right) = (
        [-start / length for start, length in zip(starts, patches, strict=True)],
        [
            1 + (edge - start) / length
            for edge, start, length in zip(missing, starts, patches, strict=True)
        ],
    )
    return top, left, bottom, right


def _patches(pixels: torch.Tensor, values: Mapping[str, object]) -> torch.Tensor:
    """(n, 3, h, w) uint8 -> (n, patches, patch * patch * 3), normalised."""
    patch = cast(int, values["patch_size"])
    normal = preprocess.normalize(pixels, preprocess.read_recipe(values))
    blocks = normal.unflatten(2, (-1, patch)).unflatten(4, (-1, patch))
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)


def _picture(grid: Grid, flags: Mapping[str, object]) -> str:
    """Return the text of a picture: the base picture, then the tiles' rows."""
    base, tiles = (_shape(grid.take(part.nonzero().squeeze(1)))
                   for part in (grid.tile == 0, grid.tile > 0))  # fmt: skip
    ends = bool(flags["image_use_col_tokens"])
    base_ends = bool(flags.get("use_single_crop_col_tokens", ends))
    start = "<low_res_im_start>" if flags["use_single_crop_start_token"] else "<im_start>"
    return f"{start}{_rows(*base, base_ends)}<im_end><im_start>{_rows(*tiles, ends)}<im_end>"


def _shape(grid: Grid) -> tuple[int, int]:
    """Return the rows and columns of a grid of one tile or frame, or of all tiles of a picture."""
    return int(grid.row.max()) + 1, int(grid.col.max()) + 1


def _rows(rows: int, cols: int, ends: bool) -> str:
    return ("<im_patch>" * cols + "<im_col>" * ends) * rows


# Videos


def _video(video: PreparedMedia, values: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Return all frames' patches, which of them each token pools, and the video's grid."""
    side = cast("Mapping[str, int]", values["size"])["height"] // cast(int, values["patch_size"])
    pool = cast("Sequence[int]", values["pooling_size"])
    low = _pool(torch.arange(side * side).view(side, side), pool)
    shift = torch.arange(len(video.pixels))[:, None, None] * side * side
    index = low.flatten(0, 1)[None]
    return {
        "pixel_values_videos": torch.cat(
            [_patches(chunk, values) for chunk in video.pixels.split(16)]
        ),
        "video_token_pooling": torch.where(index >= 0, index + shift, index).flatten(0, 1),
        "video_grids": torch.tensor([[len(video.pixels), *low.shape[:2]]]),
    }


def _frames(video: PreparedMedia, grid: Grid, flags: Mapping[str, object]) -> str:
    """Return the text of a video: a time before each frame's tokens."""
    kind = "frame" if flags["use_frame_special_tokens"] else "im"
    rows = _rows(*_shape(grid), bool(flags["video_use_col_tokens"]))
    times = frames.seconds(video)
    return " ".join(f"{time:.1f} <{kind}_start>{rows}<{kind}_end>" for time in times)


def _official(
    between: list[int], source: Source, values: Mapping[str, object], most: int | None
) -> list[int]:
    """`num_frames` at most, `max_fps` a second at most, each the first of an equal part."""
    count, rate = cast(int, values["num_frames"]), cast(float, values["max_fps"])
    if source.fps > rate:
        count = min(count, int(len(between) / source.fps * rate))
    return even_parts(between, max(min(count, len(between), most or count), 1))
