"""The frames of a video through decord, which is asked for: `--decoder decord`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata

import numpy as np

from vtprune.errors import VtpruneError
from vtprune.media.source import Source

# While frames are transformed, decord decodes ahead, without a bound, until it has to seek: of
# large clips it only gets to read one frame in so many.
_AHEAD_BYTES = 512 << 20
_SPARSE = 8
_THREAD_BYTES = 64 << 20
_MAX_THREADS = 8


class DecordUnfitError(Exception):
    """decord can't read this file, or numbers its frames differently; PyAV can take over."""


def check_installed() -> None:
    """Refuse where decord2 is not installed: the older decord, of the same module name, is of 2021.

    Raises:
        VtpruneError: names the extra that brings it.
    """
    try:
        metadata.version("decord2")
    except metadata.PackageNotFoundError as error:
        raise VtpruneError(
            "--decoder decord needs the package decord2, which is not installed",
            'pip install "vtprune[decord]", or leave --decoder away: PyAV reads all videos',
        ) from error


def decord_frames(source: Source, index: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the frames `index` (ascending) with their numbers, each (H, W, 3) uint8 RGB.

    Raises:
        DecordUnfitError: where decord doesn't give these frames.
    """
    frame_bytes = source.width * source.height * 3
    ahead = source.num_frames * frame_bytes
    if len(index) * _SPARSE > source.num_frames and ahead > _AHEAD_BYTES:
        raise DecordUnfitError(f"it would hold {ahead / 2**30:.1f} GiB of frames")
    threads = max(1, min(os.cpu_count() or 1, _MAX_THREADS, _THREAD_BYTES // frame_bytes))
    try:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        reader = decord.VideoReader(str(source.path.absolute()), num_threads=threads)
        if len(reader) != source.num_frames:
            raise DecordUnfitError(f"it counts {len(reader)} frames, not {source.num_frames}")
        times = reader.get_frame_timestamp(list(range(len(reader))))[:, 0]
        expected = np.array(source.timestamps)
        apart = np.abs((times - times[0]) - (expected - expected[0])).max()
        if apart > 0.002 + 1e-6 * source.duration:  # decord's are float32, and begin at 0
            raise DecordUnfitError(f"its times are {apart:.3f} s apart from the file's")
        for i in index:
            frame = reader[i].asnumpy()  # (H, W, 3)
            if frame.shape != (source.height, source.width, 3):
                raise DecordUnfitError(f"its frames have the shape {frame.shape}")
            yield i, frame
    except (MemoryError, GeneratorExit, DecordUnfitError):
        raise
    except Exception as error:  # DECORDError, RuntimeError, OSError for a missing library, ...
        raise DecordUnfitError(" ".join(str(error).split())[:100]) from error
