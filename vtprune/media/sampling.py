"""Which frames of a source to read: evenly in time, or between two times."""

from __future__ import annotations

import math
from bisect import bisect_left

from vtprune.errors import MediaError
from vtprune.media.source import Source, printable


def frames_between(source: Source, start: float | None, end: float | None) -> list[int]:
    """Return the frames whose timestamp lies in [start, end], in seconds on the file's own clock.

    None means from the first, or to the last frame. An image has one frame, and takes neither.

    Raises:
        MediaError: for start >= end, a value that is not a time, an image with either, or no frame
            between them.
    """
    name = printable(source.path)
    if source.kind == "image":
        if start is not None or end is not None:
            raise MediaError(
                f"{name}: a picture has no start or end", "leave --start and --end away"
            )
        return [0]
    for option, value in (("start", start), ("end", end)):
        if value is not None and (not math.isfinite(value) or value < 0):
            raise MediaError(
                f"{option} {value:g} is not a time of 0 s or more", f"change --{option}"
            )
    if start is not None and end is not None and start >= end:
        raise MediaError(
            f"start {start:g} s must be before end {end:g} s", "swap --start and --end"
        )
    index = [
        i
        for i, time in enumerate(source.timestamps)
        if (start is None or time >= start) and (end is None or time <= end)
    ]
    if not index:
        first, last = source.timestamps[0], source.timestamps[-1]
        interval = f"from {start:g} s on" if end is None else f"from {start or 0:g} to {end:g} s"
        raise MediaError(
            f"{name}: no frame {interval}; its frames lie from {first:.3f} to {last:.3f} s",
            "change --start or --end",
        )
    return index


def sample_evenly(
    source: Source,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
) -> list[int]:
    """Sample frames at even times: the nearest by timestamp, of two equally near ones the earlier.

    With `num_frames`: that many times from the first to the last frame between `start` and `end`,
    both included (one frame: the first). With `fps`: every 1/fps seconds from the first of them on.
    With neither: all of them. Where that is more than `max_frames`, `max_frames` even times
    instead. In a clip of variable frame rate two times may have the same nearest frame, which then
    comes twice; but a clip with fewer frames than times gives each of them once at most.

    Raises:
        MediaError: for a count below 1, fps <= 0, both of them, and what `frames_between` refuses.
    """
    for option, count in (("frames", num_frames), ("max-frames", max_frames)):
        if count is not None and count < 1:
            raise MediaError(
                f"{option} {count} is out of range: it must be 1 or more", f"change --{option}"
            )
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise MediaError(f"fps {fps:g} is out of range: it must be above 0", "change --fps")
    if num_frames is not None and fps is not None:
        raise MediaError("frames and fps exclude each other", "give one of --frames and --fps")
    index = frames_between(source, start, end)
    if source.kind == "image":
        return index
    first, last = source.timestamps[index[0]], source.timestamps[index[-1]]
    count = len(index) if num_frames is None else num_frames
    if fps is not None:
        count = math.floor((last - first) * fps + 1e-6) + 1
    if max_frames is not None and count > max_frames:
        num_frames, fps, count = max_frames, None, max_frames
    if fps is None and num_frames is None:
        return index
    if count > max(len(index), 1_000_000):  # times this dense have every frame as their nearest
        return index
    step = 1 / fps if fps is not None else (last - first) / max(count - 1, 1)
    nearest = [_nearest(source.timestamps, index, first + i * step) for i in range(count)]
    return sorted(set(nearest)) if count > len(index) else nearest


def _nearest(timestamps: tuple[float, ...], index: list[int], time: float) -> int:
    """Return the frame of the ascending `index` nearest to `time`, to a microsecond."""
    low, high = index[0], index[-1] + 1
    after = min(bisect_left(timestamps, time, low, high), high - 1)
    before = max(after - 1, low)
    return before if time - timestamps[before] <= timestamps[after] - time + 1e-6 else after
