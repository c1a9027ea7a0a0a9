"""GLM-4.1V: pictures and videos of any size, a time after every pair of a video's frames."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from vtprune.errors import ModelError
from vtprune.models import frames, patches, preprocess, prompt
from vtprune.models.base import Files, Inputs, Plan, Prepared, Sampling, Turn, VisionInputs
from vtprune.tokens.layout import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

TOKENS = {"image": "<|image|>", "video": "<|video|>"}
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


class Glm4v:
    """A grid of merged patches for each picture, and for each pair of a video's frames."""

    name = "GLM-4.1V"
    model_types = ("glm4v",)
    modalities = ("image", "video")

    def placeholders(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        """A video's frames stand as pictures in the prompt."""
        return {"image": (config.image_token_id,), "video": (config.image_token_id,)}

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> dict[str, list[Grid]]:
        """merge x merge patches are one token; a frame of the grid is a pair of the video's."""
        return patches.grids(config, vision)

    def largest(self, files: Files) -> tuple[int, int]:
        values = patches.read_values(files, "image", DEFAULTS)
        return patches.largest(values, cast(int, values["temporal_patch_size"]))

    def plan(self, files: Files, source: Source, sampling: Sampling, num_media: int) -> Plan:
        """Without frames or fps, the official sampling, after start and end.

        That is 2 frames a second of clips up to 300 s, and 600 evenly of longer ones. The limits
        of a video's pixels are for all frames together. max_tiles does not apply.
        """
        values = patches.read_values(files, source.kind, DEFAULTS)
        return patches.plan_source(source, sampling, values, _official, _size)

    def encode(self, files: Files, media: Sequence[Prepared], turns: Sequence[Turn]) -> Inputs:
        """The inputs, `mm_token_type_ids` included, without which positions are silently wrong."""
        kinds = {one.source.kind for one in media}
        if len(kinds) > 1:
            raise ModelError(
                "pictures and videos in one question; in GLM-4.1V they share a placeholder, and"
                " the model takes one kind at a time",
                "ask about the pictures and the videos separately",
            )
        values_of = functools.partial(patches.read_values, files, defaults=DEFAULTS)
        vision = patches.vision_inputs(media, values_of)
        text = prompt.render(files, media, turns, TOKENS, TEMPLATE)
        ids = self.placeholders(files.config)
        grids = self.grids(files.config, vision)
        written = [
            _frames(grid, one) for grid, one in zip(grids.get("video", ()), media, strict=False)
        ]
        tensors = prompt.encode(files, text, TOKENS, ids, grids, {"video": written})
        visual = tensors["input_ids"] == ids["image"][0]
        tensors["mm_token_type_ids"] = visual.long() * (2 if "video" in kinds else 1)
        for given in vision.values():
            tensors |= given
        return Inputs(tensors, text, () if "video" in kinds else (1,) * len(media))


def _frames(grid: Grid, video: Prepared) -> str:
    """A video in the prompt: the tokens of each pair of frames, then its first whole second."""
    steps = int(grid.frame[-1]) + 1
    pads = TOKENS["image"] * (len(grid) // steps)
    times = frames.seconds(video)[::2][:steps]
    times += times[-1:] * (steps - len(times))
    return "".join(f"<|begin_of_image|>{pads}<|end_of_image|>{int(time)}" for time in times)


def _size(source: Source, values: Mapping[str, object], num_frames: int) -> tuple[int, int]:
    """(height, width) of each frame, or of a picture; either counts in whole groups of frames."""
    group = cast(int, values["temporal_patch_size"])
    num_frames += -num_frames % group
    least, most = patches.limits(values)
    return patches.clip_size(num_frames, source.height, source.width, values, least, most)


def _official(
    between: list[int], source: Source, values: Mapping[str, object], most: int | None
) -> list[int]:
    """The frames after even times; the official processor's repeated last one is left out, since
    it fills the last pair as it is."""
    last, rate = len(between) - 1, source.fps
    wanted, longest = cast(float, values["fps"]), cast(float, values["max_duration"])
    duration = len(between) / rate
    limit = int(longest * wanted)
    if duration <= longest:
        count = max(math.floor(duration * wanted), 1)
        positions = [min(last, math.ceil(number * rate / wanted)) for number in range(count)]
    elif limit >= len(between):
        positions = list(range(len(between)))
    else:
        step = duration / (limit - 1)
        times = [number * step for number in range(limit - 1)] + [duration]
        positions = [min(last, math.ceil(time * rate)) for time in times]
    index = [between[position] for position in dict.fromkeys(positions)]
    return index if most is None else frames.starts_of_parts(index, most)
