"""Pictures and videos of any size, cut into patches that the model merges: Qwen's and GLM's way."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch

from vtprune.models import cost, frames, preprocess
from vtprune.models.base import (
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
from vtprune.tokens.layout import box

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.media import Source

Values = Mapping[str, object]
LIMITS = ("size", "min_pixels", "max_pixels")
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class MergedPatches(Family):
    """A grid of merged patches for each picture, and for each group of a video's frames.

    Attributes:
        defaults: modality -> the preprocessor's values where a checkpoint's file has none.
    """

    modalities = ("image", "video")
    tower_depth = "depth"
    defaults: ClassVar[Mapping[str, Values]]

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> Grids:
        """merge x merge patches are one token; a frame of the grid is a group of the video's."""
        merge = config.vision_config.spatial_merge_size
        return {
            modality: [
                box(time, rows // merge, cols // merge)
                for time, rows, cols in torch.as_tensor(inputs[f"{modality}_grid_thw"]).tolist()
            ]
            for modality, inputs in vision.items()
        }

    def largest(self, files: Files) -> tuple[int, int]:
        """The largest square."""
        return largest_square(self.values(files, "image"))

    def plan_image(self, files: Files, source: Source, sampling: Sampling, alone: bool) -> ReadPlan:
        """max_tiles does not apply: there are no tiles, and a picture's limits are in pixels."""
        return self._plan(source, self.values(files, "image"), (0,))

    def plan_video(self, files: Files, source: Source, sampling: Sampling) -> ReadPlan:
        """Without frames or fps, the official sampling, after start and end."""
        values = self.values(files, "video")
        official = functools.partial(
            self.official_frames, source=source, values=values, most=sampling.max_frames
        )
        return self._plan(source, values, frames.choose_frames(source, sampling, official))

    def _plan(self, source: Source, values: Values, index: tuple[int, ...]) -> ReadPlan:
        """Reads `index` and resizes, unless the preprocessor does not resize."""
        if not values.get("do_resize", True):
            return ReadPlan(index, _unchanged)
        size = self.frame_size(source, values, len(index))
        resample = preprocess.read_recipe(values).resample
        return ReadPlan(index, functools.partial(preprocess.resize, size=size, resample=resample))

    def official_frames(
        self, between: list[int], source: Source, values: Values, most: int | None
    ) -> list[int]:
        """Return the frames that the official processor takes.

        Args:
            between: the frames between start and end.
            most: the user's limit.
        """
        raise NotImplementedError

    def frame_size(self, source: Source, values: Values, num_frames: int) -> tuple[int, int]:
        """Return (height, width) that a picture, or each frame of a video, is resized to."""
        raise NotImplementedError

    def values(self, files: Files, modality: str) -> dict[str, object]:
        """Return a preprocessor file's values over the defaults; older names of limits understood.

        A checkpoint without a file for videos has that for pictures serve both, except for the
        limits: a video's frames take the video processor's own, as in the authors' qwen-vl-utils.
        """
        stored = files.image if modality == "image" else files.video
        if modality == "video" and not stored:
            stored = {key: value for key, value in files.image.items() if key not in LIMITS}
        values = preprocess.merged(stored, self.defaults[modality])
        size = dict(cast("Mapping[str, int]", values["size"]))
        for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if values.get(key) is not None:
                size[edge] = cast(int, values[key])
        return {**values, "size": size}

    def vision_inputs(self, files: Files, media: Media) -> VisionTensors:
        """Patches and grids."""
        vision = {}
        for modality, key in PIXELS.items():
            clips = [item.pixels for item in media if item.source.kind == modality]
            if clips:
                patches, thw = _cut(clips, self.values(files, modality))
                vision[modality] = {key: patches, f"{modality}_grid_thw": thw}
        return vision

    def token_types(self, files: Files, input_ids: torch.Tensor, media: Media) -> Tensors:
        """`mm_token_type_ids`, (1, L): 0 text, 1 image, 2 video.

        Without them positions are silently those of plain text.
        """
        types = torch.zeros_like(input_ids)
        ids = self.placeholders(files.config)
        for number, modality in enumerate(PIXELS, start=1):
            types[torch.isin(input_ids, torch.tensor(ids[modality]))] = number
        return {"mm_token_type_ids": types}


def tower_shape(config: object, hidden: int, intermediate: int, out: int) -> cost.VisionShape:
    """Return the shape of a tower of patches of two frames, and a merger of blocks of them.

    Args:
        hidden, intermediate: widths of the tower.
        out: width of what the merger makes.
    """
    tower = getattr(config, "vision_config", None)
    patch, merge = cost.size_of(tower, "patch_size"), cost.size_of(tower, "spatial_merge_size")
    group, merged = cost.size_of(tower, "temporal_patch_size", 2), merge**2 * hidden
    return cost.VisionShape(
        layers=cost.size_of(tower, "depth"),
        hidden=hidden,
        intermediate=intermediate,
        patch=patch,
        inputs=cost.size_of(tower, "in_channels", 3) * group * patch**2,
        projector=((merged, merged), (merged, out)),
        merge=merge,
    )


def token_side(values: Values) -> int:
    """Return the pixels along a side of one token, or of the tokens that sizes are multiples of."""
    expand = cast(int, values.get("patch_expand_factor", 1))
    return cast(int, values["patch_size"]) * cast(int, values["merge_size"]) * expand


def limits(values: Values) -> tuple[int, int]:
    """Return the fewest and the most pixels of a picture, or of all frames of a video."""
    size = cast("Mapping[str, int]", values["size"])
    return size["shortest_edge"], size["longest_edge"]


def largest_square(values: Values, num_frames: int = 1) -> tuple[int, int]:
    """Return (height, width) of the largest square picture that is not made smaller.

    Args:
        num_frames: that a picture counts as.
    """
    side = token_side(values)
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
    side, group = token_side(values), cast(int, values["temporal_patch_size"])
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


def _unchanged(pixels: torch.Tensor) -> torch.Tensor:
    return pixels


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
    size = int(thw.prod(1).sum()), 3 * temporal * patch**2
    patches = torch.empty(size, dtype=dtype, device=clips[0].device)
    at = 0
    for clip in clips:
        for chunk in clip.split(8 * temporal):
            normal = preprocess.normalize(chunk, recipe)
            part = preprocess.patchify(normal, patch, merge, temporal)
            patches[at : at + len(part)] = part
            at += len(part)
    return patches, thw
