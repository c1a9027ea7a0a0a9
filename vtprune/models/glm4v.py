"""GLM-4.1V: pictures and videos of any size, a time after every pair of a video's frames."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from vtprune.errors import ModelError
from vtprune.models import cost, frames, preprocess
from vtprune.models.base import Contents, Files, Grids, Media, PreparedMedia, Tensors
from vtprune.models.patches import (
    MergedPatches,
    Values,
    clip_size,
    largest_square,
    limits,
    tower_shape,
)
from vtprune.tokens.layout import Grid

if TYPE_CHECKING:
    from vtprune.media import Source

TOKENS = {"image": "<|image|>", "video": "<|video|>"}
SPECIAL_TOKENS = {
    "<|image|>": "image_token_id",
    "<|begin_of_image|>": "image_start_token_id",
    "<|end_of_image|>": "image_end_token_id",
}
COMMON: Mapping[str, object] = {
    "resample": 3,
    "image_mean": preprocess.CLIP_MEAN,
    "image_std": preprocess.CLIP_STD,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "image": {**COMMON, "size": {"shortest_edge": 112 * 112, "longest_edge": 15000 * 28 * 28}},
    "video": {
        **COMMON,
        "size": {"shortest_edge": 112 * 112, "longest_edge": 60000 * 28 * 28},
        "fps": 2.0,
        "max_duration": 300,
    },
}

# The chat format of the official checkpoints.
TEMPLATE = (
    "{{ '[gMASK]<sop>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
    "{{ '<|begin_of_' + part['type'] + '|><|' + part['type'] + '|>' }}"
    "{{ '<|end_of_' + part['type'] + '|>' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


class Glm4v(MergedPatches):
    """A grid of merged patches for each picture, and for each pair of a video's frames."""

    name = "GLM-4.1V"
    model_types = ("glm4v",)
    tokens = TOKENS
    special_tokens = SPECIAL_TOKENS
    template = TEMPLATE
    shares_placeholder = True  # a video's frames stand as pictures in the prompt
    defaults = DEFAULTS

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        """A convolution makes blocks one token; then a matrix and a gated MLP.

        The tower's own MLPs are as wide as its output; `intermediate_size` is the merger's.
        """
        tower = getattr(config, "vision_config", None)
        hidden = cost.size_of(tower, "hidden_size")
        inner = cost.size_of(tower, "intermediate_size")
        out = cost.size_of(tower, "out_hidden_size")
        shape = tower_shape(config, hidden, out, out)
        merger = ((shape.merge**2 * hidden, out), (out, out), (out, 2 * inner), (inner, out))
        return replace(shape, gated=True, projector=merger)

    def largest(self, files: Files) -> tuple[int, int]:
        """A picture counts as a whole group of frames."""
        values = self.values(files, "image")
        return largest_square(values, cast(int, values["temporal_patch_size"]))

    def check_media(self, media: Media) -> None:
        if len({item.source.kind for item in media}) > 1:
            raise ModelError(
                "pictures and videos in one question; in GLM-4.1V they share a placeholder, and"
                " the model takes one kind at a time",
                "ask about the pictures and the videos separately",
            )

    def frame_size(self, source: Source, values: Values, num_frames: int) -> tuple[int, int]:
        """The limits of a video's pixels are for all frames together, in whole groups of them."""
        group = cast(int, values["temporal_patch_size"])
        num_frames += -num_frames % group
        least, most = limits(values)
        return clip_size(num_frames, source.height, source.width, values, least, most)

    def official_frames(
        self, between: list[int], source: Source, values: Values, most: int | None
    ) -> list[int]:
        """2 frames a second of clips up to 300 s, and 600 evenly of longer ones.

        They are the frames after even times; the official processor's repeated last one is left
        out, since it fills the last pair as it is.
        """
        last, rate = len(between) - 1, source.fps
        fps, longest = cast(float, values["fps"]), cast(float, values["max_duration"])
        duration = len(between) / rate
        limit = int(longest * fps)
        if duration <= longest:
            count = max(math.floor(duration * fps), 1)
            positions = [min(last, math.ceil(number * rate / fps)) for number in range(count)]
        elif limit >= len(between):
            positions = list(range(len(between)))
        else:
            step = duration / (limit - 1)
            times = [number * step for number in range(limit - 1)] + [duration]
            positions = [min(last, math.ceil(time * rate)) for time in times]
        index = [between[position] for position in dict.fromkeys(positions)]
        return index if most is None else frames.starts_of_parts(index, most)

    def placeholder_texts(self, files: Files, media: Media, grids: Grids) -> dict[str, list[str]]:
        pairs = zip(grids.get("video", ()), media, strict=False)
        return {"video": [_frames(grid, video) for grid, video in pairs]}

    def token_types(self, files: Files, input_ids: torch.Tensor, media: Media) -> Tensors:
        """`mm_token_type_ids`, by what this prompt's placeholders hold."""
        visual = (input_ids == files.config.image_token_id).long()
        videos = any(item.source.kind == "video" for item in media)
        return {"mm_token_type_ids": visual * (2 if videos else 1)}

    def published_files(self, side: int) -> Contents:
        return {"image": {"size": {"shortest_edge": 12544, "longest_edge": 9633792}}}


def _frames(grid: Grid, video: PreparedMedia) -> str:
    """Return the text of a video: the tokens of each pair of frames, then its whole second."""
    steps = int(grid.frame[-1]) + 1
    pads = TOKENS["image"] * (len(grid) // steps)
    times = frames.seconds(video)[::2][:steps]
    times += times[-1:] * (steps - len(times))
    return "".join(f"<|begin_of_image|>{pads}<|end_of_image|>{int(time)}" for time in times)
