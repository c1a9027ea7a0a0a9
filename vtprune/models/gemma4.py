"""Gemma 4: pictures and frames of any shape within a budget of tokens, pooled from patches."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional

from vtprune.errors import ModelError
from vtprune.models import cost, frames, preprocess
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
from vtprune.tokens.layout import Grid, box

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from vtprune.media import Source

Values = Mapping[str, object]
TOKENS = {"image": "<|image|>", "video": "<|video|>"}
START, END = "<|image>", "<image|>"
SPECIAL_TOKENS = {
    "<|image|>": "image_token_id",
    "<|video|>": "video_token_id",
    START: "boi_token_id",
    END: "eoi_token_id",
}
KEYS = {
    "image": ("pixel_values", "image_position_ids"),
    "video": ("pixel_values_videos", "video_position_ids"),
}
"""Modality -> the names of its patches and of their places."""
BUDGETS = (70, 140, 280, 560, 1120)
"""Tokens of a picture, or of a frame, that the models are trained for."""
DEFAULTS: Mapping[str, Values] = {
    "image": {"max_soft_tokens": 280, "do_normalize": False},
    "video": {"max_soft_tokens": 70, "do_normalize": True, "num_frames": 32},
}
COMMON: Values = {
    "size": {},  # the budget says it
    "resample": 3,
    "image_mean": (0.0, 0.0, 0.0),
    "image_std": (1.0, 1.0, 1.0),
    "patch_size": 16,
    "pooling_kernel_size": 3,
}

# The chat format of the official checkpoints. An answer without thoughts begins with an empty
# thought, except that of the small models (E2B, E4B), which have inputs to each layer.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|turn>' + role + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] | trim }}"
    "{% else %}{{ '\n\n<|' + part['type'] + '|>\n\n' }}{% endif %}{% endfor %}"
    "{{ '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)
NO_THOUGHT = (
    "{% if add_generation_prompt and not enable_thinking %}"
    "{{ '<|channel>thought\n<channel|>' }}{% endif %}"
)


class Gemma4(Family):
    """One grid a picture, as large as its budget of tokens allows; a video's frames likewise.

    Tokens of one picture, or frame, see each other both ways in some sizes' sliding layers.
    """

    name = "Gemma 4"
    model_types = ("gemma4",)
    modalities = ("image", "video")
    tokens = TOKENS
    special_tokens = SPECIAL_TOKENS
    template = TEMPLATE

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> Grids:
        """Blocks of patches are pooled to one token; the rest up to the budget is padding."""
        grids: Grids = {}
        for modality, inputs in vision.items():
            places = torch.as_tensor(inputs[KEYS[modality][1]]).cpu()
            if modality == "image":
                items = list(places[:, None])
            elif not joins_videos(config):  # (videos, frames, patches, 2), of equally many frames
                items = list(places)
            else:
                counts = torch.as_tensor(inputs["num_frames_per_video"])
                items = list(places.split(counts.tolist()))
            grids[modality] = [self._grid(config, item) for item in items]
        return grids

    def _grid(self, config: PreTrainedConfig, places: torch.Tensor) -> Grid:
        """(frames, patches, 2) columns and rows of patches, -1 in padding -> one box of tokens."""
        merge = self.patches_per_token(config)
        cols, rows = (places[0].amax(0) + 1).tolist()
        return box(len(places), rows // merge, cols // merge)

    def patches_per_token(self, config: PreTrainedConfig) -> int:
        """Return the patches along a side of the block that makes one token."""
        return int(config.vision_config.pooling_kernel_size)

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        """Gated MLPs; averages over blocks of patches, then one matrix.

        A picture's padding up to the budget goes through the tower too.
        """
        tower = getattr(config, "vision_config", None)
        size_of = cost.size_of
        heads, wide = size_of(tower, "num_attention_heads"), size_of(tower, "head_dim")
        shape = cost.plain_tower(config)
        if heads * wide != shape.hidden or size_of(tower, "num_key_value_heads") != heads:
            return None  # of no published checkpoint
        projector = ((shape.hidden, cost.text_width(config)),)
        merge = size_of(tower, "pooling_kernel_size")
        return replace(shape, projector=projector, merge=merge, gated=True)

    def largest(self, files: Files) -> tuple[int, int]:
        """The largest square within the budget."""
        values = self.values(files, "image")
        edge = math.isqrt(cast(int, values["max_soft_tokens"])) * token_side(values)
        return edge, edge

    def plan_image(self, files: Files, source: Source, sampling: Sampling, alone: bool) -> ReadPlan:
        """Enlarged or made smaller to the budget; max_tiles does not apply: there are no tiles."""
        return _plan(source, (0,), self.values(files, "image"))

    def plan_video(self, files: Files, source: Source, sampling: Sampling) -> ReadPlan:
        """Without frames or fps, the checkpoint's `num_frames` (32), after start and end.

        Each is the first of an equal part; all of them where a video has fewer.
        """
        values = self.values(files, "video")
        count = cast(int, values["num_frames"])
        count = min(count, sampling.max_frames or count)
        index = frames.choose_frames(
            source, sampling, lambda between: frames.starts_of_parts(between, count)
        )
        return _plan(source, index, values)

    def values(self, files: Files, modality: str) -> dict[str, object]:
        """Return a preprocessor file's values over the defaults.

        Raises:
            ModelError: the budget is none that the models are trained for.
        """
        stored = files.image if modality == "image" else files.video
        values = preprocess.merged(stored, {**COMMON, **DEFAULTS[modality]})
        if values["max_soft_tokens"] not in BUDGETS:
            raise ModelError(
                f"the checkpoint's preprocessor has max_soft_tokens {values['max_soft_tokens']};"
                f" {self.name} takes one of {', '.join(map(str, BUDGETS))}",
                "set one of these in its preprocessor_config.json",
            )
        return values

    def template_for(self, files: Files) -> str:
        small = getattr(files.config.get_text_config(), "hidden_size_per_layer_input", 0)
        return TEMPLATE if small else TEMPLATE + NO_THOUGHT

    def vision_inputs(self, files: Files, media: Media) -> VisionTensors:
        """Patches and their places, both filled up to the budget, and frames of each video."""
        vision: VisionTensors = {}
        for modality, names in KEYS.items():
            items = [item.pixels for item in media if item.source.kind == modality]
            if not items:
                continue
            values = self.values(files, modality)
            recipe = preprocess.read_recipe(values)
            cut = [self.patches(preprocess.normalize(pixels, recipe), values) for pixels in items]
            parts: Sequence[Sequence[torch.Tensor]] = list(zip(*cut, strict=True))
            if modality == "video" and not joins_videos(files.config):
                frames.check_alike(items, self.name)
                joined = [torch.stack(list(part)) for part in parts]
            else:
                joined = [torch.cat(list(part)) for part in parts]
            vision[modality] = dict(zip(names, joined, strict=True))
            if modality == "video" and joins_videos(files.config):
                counts = torch.tensor([len(pixels) for pixels in items])
                vision[modality]["num_frames_per_video"] = counts
        return vision

    def patches(self, pixels: torch.Tensor, values: Values) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, 3, H, W) -> (n, P, 3 * patch * patch) and (n, P, 2) columns and rows; 0 and -1 in
        the rest."""
        merge = cast(int, values["pooling_kernel_size"])
        return cut(pixels, cast(int, values["patch_size"]), _budget(values) * merge**2)

    def placeholder_texts(self, files: Files, media: Media, grids: Grids) -> dict[str, list[str]]:
        """A picture's tokens between two markers; a video's frames so, each behind its time."""
        pictures = [f"{START}{TOKENS['image'] * len(grid)}{END}" for grid in grids.get("image", ())]
        videos = [item for item in media if item.source.kind == "video"]
        clips = []
        for video, grid in zip(videos, grids.get("video", ()), strict=True):
            block = f"{START}{TOKENS['video'] * (len(grid) // len(video.pixels))}{END}"
            clips.append(" ".join(f"{_clock(time)} {block}" for time in frames.seconds(video)))
        return {"image": pictures, "video": clips}

    def token_types(self, files: Files, input_ids: torch.Tensor, media: Media) -> Tensors:
        """`mm_token_type_ids`, (1, L): 0 text, 1 image, 2 video: what is seen both ways."""
        types = torch.zeros_like(input_ids)
        for number, modality in enumerate(KEYS, start=1):
            types[input_ids == self.placeholders(files.config)[modality][0]] = number
        return {"mm_token_type_ids": types}

    def published_files(self, side: int) -> Contents:
        return {"image": {"max_soft_tokens": 280}, "video": {"max_soft_tokens": 70}}


class Gemma4Unified(Gemma4):
    """Gemma 4 without a tower: a block of patches is embedded as it is."""

    name = "Gemma 4 Unified"
    model_types = ("gemma4_unified",)

    def patches_per_token(self, config: PreTrainedConfig) -> int:
        return 1

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        return None

    def template_for(self, files: Files) -> str:
        return TEMPLATE + NO_THOUGHT

    def patches(self, pixels: torch.Tensor, values: Values) -> tuple[torch.Tensor, torch.Tensor]:
        return cut(pixels, token_side(values), _budget(values))


def token_side(values: Values) -> int:
    """Return the pixels along a side of what becomes one token."""
    return cast(int, values["patch_size"]) * cast(int, values["pooling_kernel_size"])


def size_within(height: int, width: int, values: Values) -> tuple[int, int]:
    """(height, width) in whole tokens that a picture is resized to: the most within the budget.

    The aspect ratio is kept; of a picture that is too long for that, one row or column is left.
    """
    side, budget = token_side(values), _budget(values)
    pixels = budget * side**2
    scale = math.sqrt(pixels / (height * width))
    rows, cols = int(scale * height / side), int(scale * width / side)
    if not rows:
        rows, cols = 1, min(width // height, budget)
    elif not cols:
        rows, cols = min(height // width, budget), 1
    return rows * side, cols * side


def cut(pixels: torch.Tensor, patch: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 3, H, W) -> patches (n, most, patch * patch * 3) and their places (n, most, 2).

    Patches go row by row, colours last; places are (column, row). What is missing is 0, and -1.
    """
    count, channels, height, width = pixels.shape
    rows, cols = height // patch, width // patch
    blocks = pixels.reshape(count, channels, rows, patch, cols, patch).permute(0, 2, 4, 3, 5, 1)
    patches = blocks.reshape(count, rows * cols, patch * patch * channels)
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    places = torch.stack([col, row], dim=-1).view(1, rows * cols, 2).repeat(count, 1, 1)
    missing = (0, 0, 0, most - rows * cols)
    return functional.pad(patches, missing), functional.pad(places, missing, value=-1)


def _budget(values: Values) -> int:
    return cast(int, values["max_soft_tokens"])


def _plan(source: Source, index: tuple[int, ...], values: Values) -> ReadPlan:
    size = size_within(source.height, source.width, values)
    resample = preprocess.read_recipe(values).resample
    return ReadPlan(index, functools.partial(preprocess.resize, size=size, resample=resample))


def _clock(seconds: float) -> str:
    """Return mm:ss, whole seconds that have passed."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def joins_videos(config: PreTrainedConfig) -> bool:
    """Return whether the model takes the frames of all videos as one row, with each one's number.

    In older transformers (5.17) videos are stacked, all of the same number of frames.
    """
    from transformers import AutoModelForImageTextToText

    model = cast("type[PreTrainedModel]", AutoModelForImageTextToText._model_mapping[type(config)])
    return "num_frames_per_video" in inspect.signature(model.forward).parameters
