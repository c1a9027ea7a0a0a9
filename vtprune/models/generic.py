"""Any other model: its checkpoint's own processor makes the inputs."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import torch

from vtprune.errors import ModelError
from vtprune.models import frames, placeholder_runs, preprocess, prompt
from vtprune.models.base import (
    PIXELS,
    Family,
    Files,
    Grids,
    Inputs,
    Media,
    PreparedMedia,
    ReadPlan,
    Sampling,
    Turn,
    VisionInputs,
)
from vtprune.tokens.layout import Grid, join

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source
    from vtprune.models.processor import Processor

IMAGE_IDS = ("image_token_id", "image_token_index", "image_patch_id")
VIDEO_IDS = ("video_token_id", "video_token_index")
SHAPES = (
    *("{}_grid_thw", "{}_grid_hws", "target_sizes_{}s"),
    *("grid_thws", "spatial_shapes", "target_sizes"),
)
"""Inputs that count the patches of each media item or tile."""
MERGES = ("spatial_merge_size", "merge_size", "downsample_factor")
STEPS_APART = (
    *("cohere_compass", "cosmos3_omni", "exaone4_5", "glm5_next", "hyperclovax_vision_v2"),
    "lfm3_vl",
)
"""Model types whose vision tower looks at each step of a video by itself, as tests prove."""
FRAMES_A_STEP = ("temporal_patch_size", "video_temporal_patch_size")
BICUBIC = 3
FALLBACK_FRAMES = 32
"""Frames of a video, evenly, where a checkpoint's processor samples none itself."""
MOST_BYTES = 2**30
"""Of the frames of one video as they are read; larger ones are read smaller."""
LEARNED_QUERIES = re.compile(r"perceiver|resampler|patch_to_query|qformer")
"""Fields of configs whose models give the features of learned queries."""
LARGEST_EDGE = 8192
"""A processor's limit above this is a number of pixels, and not of a picture's edge."""


def placeholder_ids(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return modality -> placeholder ids, as the config names them."""
    ids: dict[str, tuple[int, ...]] = {}
    for modality, names in (("image", IMAGE_IDS), ("video", VIDEO_IDS)):
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, int) and value >= 0:
                ids[modality] = (value,)
                break
    return ids


class GenericFamily(Family):
    """A model type without a file of its own.

    Args:
        model_type: `config.model_type`.
        modalities: what its processor prepares.
    """

    listed = False
    lists_media = True
    overlapping_tiles = True

    def __init__(self, model_type: str, modalities: tuple[str, ...] = ("image",)) -> None:
        self.name, self.model_types, self.modalities = model_type, (model_type,), modalities
        self.sees_steps_apart = model_type in STEPS_APART

    def placeholders(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        return placeholder_ids(config)

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> Grids:
        """From the shapes that the encoders were given; else from runs of placeholders."""
        tokens, queries = self.placeholders(config), has_learned_queries(config)
        grids: Grids = {}
        for modality, inputs in vision.items():
            rows = cast(torch.Tensor, inputs["input_ids"])
            ids = tokens.get(modality) or next(iter(tokens.values()))
            visual = torch.isin(rows, torch.tensor(ids))
            total = int(visual.sum())
            known = _grids_of_shapes(inputs, modality, config, total)
            pixels = _pixels_of(inputs, modality)
            grids[modality] = known or [
                placeholder_runs.grid_of_runs(
                    row,
                    columns,
                    # Pictures with nothing between them are apart as tiles are.
                    tiles=_num_tiles(pixels, len(columns), total),
                    size=None if queries else (1, 1),
                )
                for row, of_row in zip(rows, visual, strict=True)
                for columns in placeholder_runs.split_items(row, of_row.nonzero().squeeze(1), None)
            ]
        return grids

    def frames_a_step(self, config: PreTrainedConfig) -> int:
        parts = (getattr(config, "vision_config", None), config)
        counts = (getattr(part, name, None) for part in parts for name in FRAMES_A_STEP)
        return next((count for count in counts if isinstance(count, int) and count > 0), 1)

    # -- a model of the same shape, without a checkpoint ------------------------------------

    def tower_kinds(self, config: PreTrainedConfig) -> list[str]:
        """The tower as one: how many layers it has is not known."""
        return [""]

    def shorten_tower(self, config: PreTrainedConfig) -> None:
        """Left whole."""

    # -- preparing inputs -----------------------------------------------------------------------

    def largest(self, files: Files) -> tuple[int, int]:
        """As far as the picture processor's sizes tell."""
        size = files.image.get("size")
        edges = dict(size) if isinstance(size, Mapping) else {}
        for most in (files.image.get("max_pixels"), edges.get("longest_edge")):
            if isinstance(most, int) and most > LARGEST_EDGE:
                return (math.isqrt(most),) * 2
        edge = edges.get("shortest_edge") or edges.get("longest_edge") or 336
        return int(edges.get("height") or edge), int(edges.get("width") or edge)

    def plan_image(self, files: Files, source: Source, sampling: Sampling, alone: bool) -> ReadPlan:
        """As it is: the processor resizes and cuts it; max_tiles does not apply."""
        _processor(files).check("image")
        return ReadPlan((0,), _unchanged)

    def plan_video(self, files: Files, source: Source, sampling: Sampling) -> ReadPlan:
        """The frames that the processor samples, after start and end; smaller if they are many."""
        processor = _processor(files)
        processor.check("video")

        def official(between: list[int]) -> list[int]:
            places = processor.sample(len(between), source)
            if places is None:
                chosen = frames.first_to_last(between, FALLBACK_FRAMES)
            else:
                chosen = [between[place] for place in places]
            return frames.first_to_last(chosen, sampling.max_frames or len(chosen))

        index = frames.choose_frames(source, sampling, official)
        scale = math.sqrt(MOST_BYTES / (3 * len(index) * source.height * source.width))
        if scale >= 1:
            return ReadPlan(index, _unchanged)
        size = (max(1, int(source.height * scale)), max(1, int(source.width * scale)))
        return ReadPlan(index, functools.partial(preprocess.resize, size=size, resample=BICUBIC))

    def encode(self, files: Files, media: Sequence[PreparedMedia], turns: Sequence[Turn]) -> Inputs:
        self.check_media(media)
        processor = _processor(files)
        text, tokens = self._write(files, processor, media, turns)
        if len(tokens) == len({item.source.kind for item in media}):
            media = prompt.in_prompt_order(text, media, tokens)
        if files.processor.get("chat_template") or files.tokenizer.chat_template:
            tensors = processor.encode(text, media)
        else:
            text, tensors = self._encode_without_template(files, processor, text, tokens, media)
        grids = self._media_grids(files, processor, media, tokens, tensors)
        laid = tuple(zip([item.source.kind for item in media], grids, strict=False))
        tiles = tuple(len(grid.tile.unique()) for kind, grid in laid if kind == "image")
        return Inputs(tensors, text, tiles, laid)

    def _encode_without_template(
        self,
        files: Files,
        processor: Processor,
        text: str,
        tokens: Mapping[str, str],
        media: Media,
    ) -> tuple[str, dict[str, torch.Tensor]]:
        """Return the prompt and the inputs of a checkpoint that has no chat template.

        Some processors want another token of theirs in its place; some write placeholders
        themselves, and refuse those of the prompt or leave them beside their own (BLIP-2).
        """
        without = text
        for token in tokens.values():
            without = without.replace(token, "")
        others = [
            text.replace(token, other) for kind, token in tokens.items()
            for other in processor.tokens(kind) if other != token
        ]  # fmt: skip
        encoded: dict[str, dict[str, torch.Tensor]] = {}
        for prompt_text in (text, *others):
            with suppress(ModelError):
                encoded[prompt_text] = processor.encode(prompt_text, media)
                break
        if not encoded:
            return without, processor.encode(without, media)
        ((written, tensors),) = encoded.items()
        ids = torch.tensor(sorted(set().union(*self.placeholders(files.config).values())))
        with suppress(ModelError):
            alone = processor.encode(without, media)
            counts = [int(torch.isin(each["input_ids"], ids).sum()) for each in (tensors, alone)]
            if counts[1] and counts[0] - counts[1] == len(media):
                return without, alone
        return written, tensors

    def _write(
        self, files: Files, processor: Processor, media: Media, turns: Sequence[Turn]
    ) -> tuple[str, dict[str, str]]:
        """Return the conversation as text, and what stands for a media item of each modality.

        Some templates write all of a picture's placeholders; then nothing does.

        Raises:
            ModelError: the template does not write every media item.
        """
        ids = self.placeholders(files.config)
        texts: dict[str, list[str]] = {}
        for kind in {item.source.kind for item in media}:
            named = files.tokenizer.convert_ids_to_tokens(list(ids.get(kind, ())))
            candidates = [*processor.tokens(kind), *named]
            texts[kind] = [text for text in candidates if isinstance(text, str) and text]
        first = {kind: candidates[0] if candidates else "" for kind, candidates in texts.items()}
        every = [text for candidates in texts.values() for text in candidates]
        written = prompt.write(files, media, turns, every, _template(first))
        tokens = {}
        for kind, candidates in texts.items():
            count = sum(item.source.kind == kind for item in media)
            counts = {text: written.count(text) for text in candidates}
            fitting = [text for text in candidates if counts[text] == count]
            if fitting:
                tokens[kind] = fitting[0]
            elif candidates and not any(n and n % count == 0 for n in counts.values()):
                prompt.check_count(written, candidates[0], kind, media)
        return written, tokens

    def _media_grids(
        self,
        files: Files,
        processor: Processor,
        media: Media,
        tokens: Mapping[str, str],
        tensors: Mapping[str, torch.Tensor],
    ) -> list[Grid]:
        """Return the grid of each media item; none where the prompt holds no placeholders."""
        row, ids = tensors["input_ids"][0], self.placeholders(files.config)

        def columns(wanted: Iterable[int]) -> torch.Tensor:
            return torch.isin(row, torch.tensor(sorted(wanted))).nonzero().squeeze(1)

        every = columns(set().union(*ids.values()))
        if not len(every) or not media:
            return []
        kinds = [item.source.kind for item in media]
        by_kind = {kind: columns(ids.get(kind, ())) for kind in set(kinds)}
        counts = [len(of_kind) for of_kind in by_kind.values()]
        if len(counts) == 1 or not all(counts) or sum(counts) != len(every):  # they share an id
            return self._grids_in_columns(files, processor, media, tokens, tensors, every)
        grids = {
            kind: iter(
                self._grids_in_columns(
                    files,
                    processor,
                    [item for item in media if item.source.kind == kind],
                    tokens,
                    tensors,
                    of_kind,
                )
            )
            for kind, of_kind in by_kind.items()
        }
        return [next(grids[kind]) for kind in kinds]

    def _grids_in_columns(
        self,
        files: Files,
        processor: Processor,
        media: Media,
        tokens: Mapping[str, str],
        tensors: Mapping[str, torch.Tensor],
        columns: torch.Tensor,
    ) -> list[Grid]:
        """Return the grids of media whose placeholders are in these columns, (n,) ascending."""
        row = tensors["input_ids"][0]
        kinds = [item.source.kind for item in media]
        if len(set(kinds)) == 1:
            known = _grids_of_shapes(tensors, kinds[0], files.config, len(columns))
            if known and len(known) == len(media):
                return known
            if known and len(media) == 1:
                return [_one_item(known, _num_frames(media[0]))]
        items = placeholder_runs.split_items(row, columns, len(media))
        if len(media) > 1:
            alone = [self._count_alone(files, processor, item, tokens) for item in media]
            if len(set(kinds)) == 1 and known and (shared := _share(known, alone, media)):
                return shared
            if sum(alone) == len(columns):
                items = list(columns.split(alone))
            elif len(items) < len(media):
                items = list(columns.tensor_split(len(media)))
        pixels = {PIXELS[name]: value for name, value in tensors.items() if name in PIXELS}
        queries = has_learned_queries(files.config)
        grids = []
        for item, of_item in zip(media, items, strict=True):
            of_kind = pixels.get(item.source.kind, next(iter(pixels.values()), None))
            grids.append(
                placeholder_runs.grid_of_runs(
                    row,
                    of_item,
                    frames=_num_frames(item),
                    tiles=_num_tiles(of_kind, len(of_item), len(columns)),
                    size=None if queries else _proportions(of_kind, item),
                )
            )
        return grids

    def _count_alone(
        self, files: Files, processor: Processor, item: PreparedMedia, tokens: Mapping[str, str]
    ) -> int:
        """Return how many placeholders a media item has in a prompt of its own."""
        ids = processor.encode(tokens.get(item.source.kind, ""), [item])["input_ids"]
        every = set().union(*self.placeholders(files.config).values())
        return int(torch.isin(ids, torch.tensor(sorted(every))).sum())


def has_learned_queries(config: PreTrainedConfig) -> bool:
    """Return whether visual tokens are those of learned queries, which are no places in a picture.

    Idefics2 and Aria name them in their configs.
    """
    return any(LEARNED_QUERIES.search(name) for name in vars(config))


def _processor(files: Files) -> Processor:
    """Return the checkpoint's processor.

    Raises:
        ModelError: it was not put together.
    """
    if files.assembled is None:
        raise ModelError(
            f"{files.config.model_type}: its processor was not loaded",
            "load the model by name or directory: vtprune.load('DIR')",
        )
    return files.assembled


def _unchanged(pixels: torch.Tensor) -> torch.Tensor:
    return pixels


def _template(tokens: Mapping[str, str]) -> str:
    """Return the chat template for a checkpoint that has none: media and text as they come.

    Args:
        tokens: kind of media -> its placeholder.
    """
    return (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}"
        f"{{% else %}}{{{{ {json.dumps(dict(tokens))}[part['type']] }}}}{{% endif %}}"
        "{% endfor %}{% endfor %}"
    )


def _shapes(
    inputs: Mapping[str, object], modality: str, config: PreTrainedConfig
) -> list[tuple[int, int, int]]:
    """Return the steps, rows and columns of the patches of each media item or tile."""
    for name in SHAPES:
        value = inputs.get(name.format(modality))
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1] in (2, 3):
            return [(1, *shape) if len(shape) == 2 else tuple(shape) for shape in value.tolist()]
    sizes = inputs.get("image_sizes")  # of pictures that are padded to the largest (Pixtral)
    patch = getattr(getattr(config, "vision_config", None), "patch_size", None)
    if modality != "image" or not isinstance(sizes, torch.Tensor) or not isinstance(patch, int):
        return []
    return [(1, height // patch, width // patch) for height, width in sizes.view(-1, 2).tolist()]


def _grids_of_shapes(
    inputs: Mapping[str, object], modality: str, config: PreTrainedConfig, count: int
) -> list[Grid] | None:
    """Return the grids of media items or tiles of `count` tokens; None: no shapes tell them."""
    shapes, merge = _shapes(inputs, modality, config), _merge(config)
    left = inputs.get(f"{modality}_compression_mask")  # by VideoLLaMA 3, of patches that changed
    if not isinstance(left, torch.Tensor):
        return placeholder_runs.grids_of_patches(shapes, count, merge)
    grids = placeholder_runs.grids_of_patches(shapes, left.numel(), merge)
    if grids is None or int(left.sum()) != count:
        return None
    masks = left.flatten().cpu().split([len(grid) for grid in grids])
    return [g.take(mask.nonzero().squeeze(1)) for g, mask in zip(grids, masks, strict=True)]


def _pixels_of(inputs: Mapping[str, object], modality: str) -> torch.Tensor | None:
    """Return the pixels that an encoder is given; None where they are of no known name."""
    named = (inputs.get(name) for name, of in PIXELS.items() if of == modality)
    return next((value for value in named if isinstance(value, torch.Tensor)), None)


def _num_frames(item: PreparedMedia) -> int:
    """Return the frames of a video that were read; 0 for a picture."""
    return len(item.index) if item.source.kind == "video" else 0


def _one_item(parts: Sequence[Grid], frames: int) -> Grid:
    """Return the grid of one media item from those of its tiles, or of its frames in order.

    Args:
        frames: of a video; 0 for a picture.
    """
    if not frames:
        return placeholder_runs.below_each_other(parts)
    tiles = len(parts) // frames if len(parts) % frames == 0 else 1  # of each frame
    in_frames = [parts[start : start + tiles] for start in range(0, len(parts), tiles)]
    return join(
        [
            placeholder_runs.below_each_other(of_frame).at_frame(number)
            for number, of_frame in enumerate(in_frames)
        ]
    )


def _share(parts: Sequence[Grid], counts: Sequence[int], media: Media) -> list[Grid] | None:
    """Return the grids of media items of so many tokens, of their parts in order; None: misfit."""
    left, items = list(parts), []
    for count, item in zip(counts, media, strict=True):
        taken: list[Grid] = []
        while left and sum(map(len, taken)) < count:
            taken.append(left.pop(0))
        if sum(map(len, taken)) != count:
            return None
        items.append(_one_item(taken, _num_frames(item)))
    return items if not left else None


def _merge(config: PreTrainedConfig) -> int:
    """Return how many patches along a side become a token, as far as the config says it."""
    for part in (getattr(config, "vision_config", None), config):
        for name in MERGES:
            value = getattr(part, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return 1


def _num_tiles(pixels: torch.Tensor | None, count: int, total: int) -> int:
    """Return the number of tiles of a picture with `count` of the tokens, as far as it is known.

    Args:
        pixels: (..., tiles, 3, h, w) of all pictures, which have `total` tokens.
    """
    tiles = 1 if pixels is None or pixels.dim() < 4 else math.prod(pixels.shape[:-3])
    per_tile, rest = divmod(total, tiles)
    return 1 if rest or not per_tile or count % per_tile else count // per_tile


def _proportions(pixels: torch.Tensor | None, item: PreparedMedia) -> tuple[int, int]:
    """Return the height and width of what a tower is given, or of the source."""
    if pixels is None or pixels.dim() < 4:
        return item.source.height, item.source.width
    return int(pixels.shape[-2]), int(pixels.shape[-1])
