"""Frame sampling: which frames of a video a family takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch

from vtprune import media
from vtprune.errors import MediaError, ModelError
from vtprune.media import Source
from vtprune.models import preprocess
from vtprune.models.base import PreparedMedia, ReadPlan, Sampling


def choose_frames(
    source: Source, sampling: Sampling, official: Callable[[list[int]], list[int]]
) -> tuple[int, ...]:
    """Return the frame numbers to read: the user's sampling, else the family's.

    Args:
        official: the frames between start and end -> those the family takes, `max_frames` obeyed.

    Raises:
        MediaError: a count below 1, or no frame between start and end.
    """
    if sampling.max_frames is not None and sampling.max_frames < 1:
        raise MediaError(
            f"max-frames {sampling.max_frames} is out of range: it must be 1 or more",
            "change --max-frames",
        )
    if sampling.frames is not None or sampling.fps is not None:
        return tuple(
            media.sample_evenly(
                source,
                num_frames=sampling.frames,
                fps=sampling.fps,
                max_frames=sampling.max_frames,
                start=sampling.start,
                end=sampling.end,
            )
        )
    return tuple(official(media.frames_between(source, sampling.start, sampling.end)))


def first_to_last(frames: list[int], count: int) -> list[int]:
    """Return `count` of the frames, evenly, the first and the last included, rounded down."""
    if count >= len(frames):
        return frames
    if count == 1:
        return frames[:1]
    return [frames[i * (len(frames) - 1) // (count - 1)] for i in range(count)]


def starts_of_parts(frames: list[int], count: int) -> list[int]:
    """Return the first frame of each of `count` equal parts."""
    if count >= len(frames):
        return frames
    return [frames[i * len(frames) // count] for i in range(count)]


def seconds(video: PreparedMedia) -> list[float]:
    """Return the times of a video's frames for its prompt, in seconds.

    They are number / fps, as official processors count; the real ones where frames do not come at
    even times from 0 on.
    """
    rate = video.source.fps
    official = [number / rate for number in video.index]
    pairs = zip(official, video.timestamps, strict=True)
    even = all(abs(counted - real) <= 0.5 / rate for counted, real in pairs)
    return official if even else list(video.timestamps)


def plan_parts(
    source: Source,
    sampling: Sampling,
    values: Mapping[str, object],
    count: int,
    recipe: preprocess.Recipe,
    spread: Callable[[list[int], int], list[int]] = starts_of_parts,
) -> ReadPlan:
    """Plan the frames of a video: a fixed number where the user gives neither frames nor fps.

    Args:
        values: the video preprocessor's; its `num_frames` goes before `count`.
        recipe: how every frame is resized and cropped.
        spread: (frames between start and end, number) -> that many of them.
    """
    count = cast("int | None", values.get("num_frames")) or count
    count = min(count, sampling.max_frames or count)
    index = choose_frames(source, sampling, lambda between: spread(between, count))
    return ReadPlan(index, functools.partial(preprocess.finish, recipe=recipe))


def stack_videos(
    videos: Sequence[PreparedMedia], recipe: preprocess.Recipe, family: str
) -> torch.Tensor:
    """Return (videos, T, 3, h, w), normalised, for models that take videos as one tensor.

    Raises:
        ModelError: they have different numbers of frames.
    """
    check_alike([video.pixels for video in videos], family)
    return torch.stack([preprocess.normalize(video.pixels, recipe) for video in videos])


def check_alike(videos: Sequence[torch.Tensor], family: str) -> None:
    """Refuse videos, one row a frame, that have different numbers of frames."""
    lengths = sorted({len(video) for video in videos})
    if len(lengths) > 1:
        raise ModelError(
            f"videos of {' and '.join(map(str, lengths))} frames in one question;"
            f" {family} takes several videos of the same number of frames",
            f"ask for {lengths[0]} frames of each",
        )
