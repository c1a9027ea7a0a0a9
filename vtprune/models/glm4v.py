"""GLM-4.1V and later: pictures and videos of any size, a time after every pair of frames."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, cast

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
        "max_frames": 640,
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
    """A grid of merged patches for each picture, and for each pair of a video's frames.

    GLM-4.5V has experts in GLM-4.1V's decoder. Which frames of a video are taken, and how their
    times are written, goes by the processors that a checkpoint names: GLM-4.6V has the model
    classes of GLM-4.1V and GLM-4.5V.

    Attributes:
        processor: name of the processors' line where a checkpoint names none.
    """

    name = "GLM-4.1V"
    model_types: tuple[str, ...] = ("glm4v", "glm4v_moe")
    processor: ClassVar[str] = "Glm4v"
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
        return replace(shape, gated=True, projector=_merger(shape, hidden, out, inner))

    def largest(self, files: Files) -> tuple[int, int]:
        """A picture counts as a whole group of frames."""
        values = self.values(files, "image")
        return largest_square(values, cast(int, values["temporal_patch_size"]))

    def check_media(self, media: Media) -> None:
        if len({item.source.kind for item in media}) > 1:
            raise ModelError(
                f"pictures and videos in one question; in {self.name} they share a placeholder, and"
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
        """The frames of the video processor that the checkpoint names.

        The last one, which it repeats to fill a pair, is left out: the pair is filled as it is.
        """
        kind = self._line(values.get("video_processor_type"), values.get("image_processor_type"))
        total, rate = len(between), source.fps
        seconds = total / rate
        if kind == "Glm4v":
            positions = _at_even_times(total, rate, values)
        elif kind == "Glmga":
            pace = cast(float, values["fps"])
            count = min(int(seconds * pace), cast(int, values["max_frames"]))
            short = [math.floor(number * total / count) for number in range(count)]
            positions = _paced(total, rate, pace, count, seconds - 1 / pace, short)
        else:
            longest = min(seconds, 2400)
            pace = 6.0 if longest <= 30 else 2.0 if longest <= 300 else 1.0
            count = min(int(longest * pace), 640)
            positions = _paced(total, rate, pace, count, int(seconds), _spread(0, total - 1, count))
        index = [between[position] for position in dict.fromkeys(positions or [0])]
        return index if most is None else frames.starts_of_parts(index, most)

    def _line(self, *names: object) -> str:
        """Return "Glm46V" of "Glm46VVideoProcessor": the line of the first processor named."""
        for name in names:
            match = re.fullmatch(r"(Glm\w+?)(?:Image|Video|)Processor(?:Fast|Pil)?", str(name))
            if match:
                return match[1]
        return self.processor

    def placeholder_texts(self, files: Files, media: Media, grids: Grids) -> dict[str, list[str]]:
        """A block for each pair of frames, then its time: whole seconds, or tenths from 4.6V on."""
        pairs = zip(grids.get("video", ()), media, strict=False)
        contents = (files.processor, files.image, files.video)
        kind = self._line(*(values.get("processor_class") for values in contents))
        tenths = kind != "Glm4v"
        return {"video": [_frames(grid, video, tenths) for grid, video in pairs]}

    def token_types(self, files: Files, input_ids: torch.Tensor, media: Media) -> Tensors:
        """`mm_token_type_ids`, by what this prompt's placeholders hold."""
        visual = (input_ids == files.config.image_token_id).long()
        videos = any(item.source.kind == "video" for item in media)
        return {"mm_token_type_ids": visual * (2 if videos else 1)}

    def published_files(self, side: int) -> Contents:
        return {"image": {"size": {"shortest_edge": 12544, "longest_edge": 9633792}}}


class Glm46V(Glm4v):
    """Up to 6 frames a second of short clips, and times in tenths of seconds."""

    name = "GLM-4.6V"
    model_types = ("glm46v",)
    processor = "Glm46V"


class Glmga(Glm46V):
    """2 frames a second, up to 640; sizes in multiples of a checkpoint's own."""

    name = "GLM-GA"
    model_types = ("glmga",)
    processor = "Glmga"
    defaults: ClassVar[Mapping[str, Values]] = {
        "image": DEFAULTS["image"],
        "video": {
            **DEFAULTS["video"],
            "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 55790},
        },
    }


class GlmOcr(Glm46V):
    """GLM-4.6V's pictures and videos, in a tower and a decoder of their own."""

    name = "GLM-OCR"
    model_types = ("glm_ocr",)

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        """The tower's MLPs have its `intermediate_size`; the merger's is 3 x its output."""
        tower = getattr(config, "vision_config", None)
        hidden = cost.size_of(tower, "hidden_size")
        out = cost.size_of(tower, "out_hidden_size")
        shape = tower_shape(config, hidden, cost.size_of(tower, "intermediate_size"), out)
        inner = out * cost.size_of(tower, "in_channels", 3)
        return replace(shape, gated=True, projector=_merger(shape, hidden, out, inner))


def _merger(
    shape: cost.VisionShape, hidden: int, out: int, inner: int
) -> tuple[tuple[int, int], ...]:
    """Return the matrices behind the tower: a convolution, a matrix and a gated MLP."""
    return ((shape.merge**2 * hidden, out), (out, out), (out, 2 * inner), (inner, out))


def _at_even_times(total: int, rate: float, values: Values) -> list[int]:
    """Return the frames after even times: 2 a second of clips up to 300 s, 600 of longer ones."""
    last, seconds = total - 1, total / rate
    fps, longest = cast(float, values["fps"]), cast(float, values["max_duration"])
    limit = int(longest * fps)
    if seconds <= longest:
        count = max(math.floor(seconds * fps), 1)
        return [min(last, math.ceil(number * rate / fps)) for number in range(count)]
    if limit >= total:
        return list(range(total))
    step = seconds / (limit - 1)
    times = [number * step for number in range(limit - 1)] + [seconds]
    return [min(last, math.ceil(time * rate)) for time in times]


def _paced(
    total: int, rate: float, pace: float, count: int, stop: float, short: list[int]
) -> list[int]:
    """Return `count` frames: those that come due at `pace` until `stop`, else spread evenly.

    Args:
        stop: the time in seconds from which on no frame comes due.
        short: the frames of a clip that has fewer than `count`.
    """
    due, step, positions = 0.0, 1 / rate, list(short)
    if total >= count:
        positions = []
        for position in range(total):
            if position * step >= due:
                due += 1 / pace
                positions.append(position)
                if due >= stop:
                    break
    if len(positions) < count:
        positions = _spread(positions[0], positions[-1], count)
    elif len(positions) > count:
        positions = _spread(0, total - 1, count)
    return positions


def _spread(first: int, last: int, count: int) -> list[int]:
    """Return `count` numbers from `first` to `last`, rounded down as numpy's linspace has them."""
    if count < 2:
        return [first] * count
    step = (last - first) / (count - 1)
    return [math.floor(number * step + first) for number in range(count - 1)] + [last]


def _frames(grid: Grid, video: PreparedMedia, tenths: bool) -> str:
    """Return the text of a video: the tokens of each pair of frames, then its time.

    Args:
        tenths: whether times are in tenths of seconds; else they are cut to whole ones.
    """
    steps = int(grid.frame[-1]) + 1
    pads = TOKENS["image"] * (len(grid) // steps)
    times = frames.seconds(video)[::2][:steps]
    times += times[-1:] * (steps - len(times))
    texts = [f"{time:.1f} seconds" if tenths else str(int(time)) for time in times]
    return "".join(f"<|begin_of_image|>{pads}<|end_of_image|>{text}" for text in texts)
