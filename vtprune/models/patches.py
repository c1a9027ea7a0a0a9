"""Pictures and videos of any size, cut into patches that the model merges: Qwen's and GLM's way."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models import frames, preprocess
from vtprune.models.base import Files, Plan, Prepared, Sampling, VisionInputs
from vtprune.tokens.layout import Grid, box

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

Values = Mapping[str, object]
LIMITS = ("size", "min_pixels", "max_pixels")
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def grids(config: PreTrainedConfig, vision: VisionInputs) -> dict[str, list[Grid]]:
    """merge x merge patches are one token; a frame of the grid is a group of the video's."""
    merge = config.vision_config.spatial_merge_size
    return {
        modality: [
            box(time, rows // merge, cols // merge)
            for time, rows, cols in torch.as_tensor(given[f"{modality}_grid_thw"]).tolist()
        ]
        for modality, given in vision.items()
    }


def read_values(files: Files, modality: str, defaults: Mapping[str, Values]) -> dict[str, object]:
    """A preprocessor file's values over the defaults, older names of the pixel limits understood.

    A checkpoint without a file for videos has that for pictures serve both, except for the limits:
    a video's frames take the video processor's own, as in the authors' qwen-vl-utils.

    Args:
        defaults: modality -> the values where the file has none.
    """
    own = files.image if modality == "image" else files.video
    if modality == "video" and not own:
        own = {key: value for key, value in files.image.items() if key not in LIMITS}
    values = preprocess.merged(own, defaults[modality])
    size = dict(cast("Mapping[str, int]", values["size"]))
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if values.get(key) is not None:
            size[edge] = cast(int, values[key])
    return {**values, "size": size}


def factor(values: Values) -> int:
    """Pixels along a side of what becomes one token."""
    return cast(int, values["patch_size"]) * cast(int, values["merge_size"])


def limits(values: Values) -> tuple[int, int]:
    """The fewest and the most pixels of a picture, or of all frames of a video."""
    size = cast("Mapping[str, int]", values["size"])
    return size["shortest_edge"], size["longest_edge"]


def largest(values: Values, num_frames: int = 1) -> tuple[int, int]:
    """(height, width) of the largest square picture that is not made smaller.

    Args:
        num_frames: that a picture counts as.
    """
    side = factor(values)
    edge = max(math.isqrt(limits(values)[1] // num_frames) // side, 1) * side
    return edge, edge


def clip_size(
    num_frames: int, height: int, width: int, values: Values, least: int, most: int
) -> tuple[int, int]:
    """(height, width) of each frame, where the limits are for the pixels of all frames together.

    Frames count in whole groups; what is smaller than a token is enlarged first. A single frame
    counts as a group, since it is repeated to fill one.

    Raises:
        ModelError: one side is more than 200 times the other.
    """
    side, group = factor(values), cast(int, values["temporal_patch_size"])
    num_frames = max(num_frames, group)
    if height < side or width < side:
        grow = max(side / height, side / width)
        height, width = int(height * grow), int(width * grow)
    preprocess.check_aspect(height, width)
    rows, cols = round(height / side), round(width / side)
    total = round(num_frames / group) * group * rows * cols * side**2
    if total > most:
        shrink = math.sqrt(num_frames * height * width / most)
        rows = max(1, math.floor(height / shrink / side))
        cols = max(1, math.floor(width / shrink / side))
    elif total < least:
        grow = math.sqrt(least / (num_frames * height * width))
        rows, cols = math.ceil(height * grow / side), math.ceil(width * grow / side)
    return rows * side, cols * side


def plan(index: tuple[int, ...], values: Values, size: Callable[[], tuple[int, int]]) -> Plan:
    """Reads `index` and resizes to `size()`, unless the preprocessor does not resize."""
    if not values.get("do_resize", True):
        return Plan(index, _unchanged)
    resample = preprocess.read_recipe(values).resample
    return Plan(index, functools.partial(preprocess.resize, size=size(), resample=resample))


def plan_source(
    source: Source,
    sampling: Sampling,
    values: Values,
    official: Callable[..., list[int]],
    size: Callable[[Source, Values, int], tuple[int, int]],
) -> Plan:
    """What to read of a picture or video.

    Args:
        official: (frames between start and end, source, values, most) -> the frames of the
            family's own sampling.
        size: (source, values, number of frames) -> (height, width) of each.
    """
    index: tuple[int, ...] = (0,)
    if source.kind == "video":
        own = functools.partial(official, source=source, values=values, most=sampling.max_frames)
        index = frames.chosen(source, sampling, own)
    return plan(index, values, lambda: size(source, values, len(index)))


def _unchanged(pixels: torch.Tensor) -> torch.Tensor:
    return pixels


def vision_inputs(
    media: Sequence[Prepared], values_of: Callable[[str], Values]
) -> dict[str, dict[str, torch.Tensor]]:
    """Modality -> patches and grids of its media, for the modalities that there are.

    Args:
        values_of: modality -> its preprocessor's values.
    """
    vision = {}
    for modality, key in PIXELS.items():
        clips = [one.pixels for one in media if one.source.kind == modality]
        if clips:
            patches, thw = _cut(clips, values_of(modality))
            vision[modality] = {key: patches, f"{modality}_grid_thw": thw}
    return vision


def _cut(clips: Sequence[torch.Tensor], values: Values) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, 3, H, W) uint8 each -> patches (n, 3 * temporal * patch * patch) and (clips, 3) grids.

    A few frames at a time: in float32 a long video is gigabytes, and should be there once.
    """
    patch, merge = cast(int, values["patch_size"]), cast(int, values["merge_size"])
    temporal = cast(int, values["temporal_patch_size"])
    recipe = preprocess.read_recipe(values)
    thw = torch.tensor(
        [
            (-(-len(clip) // temporal), clip.shape[-2] // patch, clip.shape[-1] // patch)
            for clip in clips
        ]
    )
    dtype = preprocess.normalize(clips[0][:1, :, :1, :1], recipe).dtype
    patches = torch.empty(int(thw.prod(1).sum()), 3 * temporal * patch**2, dtype=dtype)
    at = 0
    for clip in clips:
        for chunk in clip.split(8 * temporal):
            normal = preprocess.normalize(chunk, recipe)
            part = preprocess.patchify(normal, patch, merge, temporal)
            patches[at : at + len(part)] = part
            at += len(part)
    return patches, thw


def type_ids(input_ids: torch.Tensor, ids: Mapping[str, tuple[int, ...]]) -> torch.Tensor:
    """(1, L) int64 `mm_token_type_ids`: 0 text, 1 image, 2 video.

    Without them positions are silently those of plain text.

    Args:
        ids: modality -> token ids of its placeholder.
    """
    made = torch.zeros_like(input_ids)
    for number, modality in enumerate(PIXELS, start=1):
        made[torch.isin(input_ids, torch.tensor(ids[modality]))] = number
    return made
