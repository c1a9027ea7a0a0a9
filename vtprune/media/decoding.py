"""The frames of a video, through PyAV or decord; in the child process alone."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vtprune.media.container import demux, is_partial, open_container
from vtprune.media.source import Limits, Source, Track, damaged
from vtprune.media.video import DecordUnfitError

_THREAD_BYTES = 64 << 20  # raw pixels that the decoding threads together may hold back
_MAX_THREADS = 8
_PADDING = 1 << 16  # pixels
_SEEK_FRAMES = 4  # decode up to this many frames needlessly rather than seek over them
# While frames are transformed, decord decodes ahead, without a bound, until it has to seek: of
# large clips it only gets to read one frame in so many.
_AHEAD_BYTES = 512 << 20
_SPARSE = 8
# EXIF orientations by whether the picture is mirrored left to right, and top to bottom; of those
# from 5 on, rows have become columns before that.
_UPRIGHT = {(False, False): 1, (True, False): 2, (True, True): 3, (False, True): 4}
_SIDEWAYS = {(False, False): 5, (True, False): 6, (True, True): 7, (False, True): 8}
_MIRRORED_ACROSS = (2, 3, 6, 7)
_MIRRORED_DOWN = (3, 4, 7, 8)


def pyav_frames(
    source: Source,
    index: list[int],
    limits: Limits,
    problems: list[str],
    alive: Callable[[], None],
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the frames `index` (ascending) with their numbers, each (H, W, 3) uint8 RGB.

    A packet without a picture of its own (the second field of an interlaced frame) gives the
    picture that is on screen at its time. Warnings go to `problems`.

    Raises:
        MediaError: for a frame that doesn't decode, unless the limits allow a part of the file.
    """
    assert source._track is not None, "a video has a track"
    on_screen: tuple[int, VideoFrame] | None = None
    waiting = list(reversed(index))
    missing = 0
    for i, frame in _walk(source, index, limits, alive):
        while waiting and (frame is None or waiting[-1] <= i):
            target = waiting.pop()
            if frame is not None and i == target:
                yield target, _to_rgb(frame, source._track)
            elif on_screen is not None and target - on_screen[0] == 1:
                yield target, _to_rgb(on_screen[1], source._track)
            elif limits.allow_partial:
                missing += 1
            else:
                raise damaged(
                    source.path, f"frame {target} of {source.num_frames} does not decode", limits
                )
        if frame is not None:
            on_screen = i, frame
    if missing:
        problems.append(
            f"{source.path.name}: damaged, {missing} of {len(index)} frames do not decode"
        )


def decord_frames(source: Source, index: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the frames `index` (ascending) with their numbers, each (H, W, 3) uint8 RGB.

    Raises:
        DecordUnfitError: where decord doesn't give these frames.
    """
    frame_bytes = source.width * source.height * 3
    bytes_ahead = source.num_frames * frame_bytes
    if len(index) * _SPARSE > source.num_frames and bytes_ahead > _AHEAD_BYTES:
        raise DecordUnfitError(f"it would hold {bytes_ahead / 1e9:.1f} GB of frames")
    threads = _num_threads(source.width, source.height)
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


def decode_head(
    path: Path, number: int, limits: Limits, alive: Callable[[], None], doubtful: set[int]
) -> tuple[VideoFrame, set[int]]:
    """Return the first frame of stream `number` that decodes, and the times of the frames up to
    the last doubtful packet.

    Raises:
        MediaError: none decodes.
    """
    first: VideoFrame | None = None
    decoded: set[int] = set()
    last = max(doubtful, default=None)
    with open_container(path) as container:
        stream = _stream(container, number, limits, num_threads=1)
        for frame in _decode(container, stream, alive):
            first = first or frame
            if frame.pts is not None:
                decoded.add(frame.pts)
            if last is None or (frame.pts is not None and frame.pts >= last):
                break
    if first is None:
        raise damaged(path, "no frame of the video decodes", limits)
    return first, decoded


def decode_all(
    path: Path, number: int, limits: Limits, alive: Callable[[], None]
) -> tuple[list[int | None], int]:
    """Decode stream `number` from its start to its end.

    Returns:
        The time of every frame in display order, and how many packets do not decode.
    """
    failed: list[int] = []
    with open_container(path) as container:
        chosen = cast("VideoStream", container.streams[number])
        threads = _num_threads(chosen.width, chosen.height)
        stream = _stream(container, number, limits, threads)
        pts = [frame.pts for frame in _decode(container, stream, alive, failed=failed)]
    return pts, len(failed)


def has_alpha(frame: VideoFrame) -> bool:
    """Whether the pixels have an alpha channel."""
    return any(component.is_alpha for component in frame.format.components)


def orientation_of(frame: VideoFrame) -> int:
    """Return how a frame is turned and mirrored to be shown, 1 to 8 as in EXIF."""
    matrix = frame.side_data.get("DISPLAYMATRIX")  # type: ignore[call-overload]
    if matrix is None:
        return 1
    # A point (x, y) is shown at (a x + c y, b x + d y); y grows downwards. To the nearest quarter.
    a, b, _, c, d, *_ = np.frombuffer(bytes(cast("bytes", matrix)), np.int32).tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return _UPRIGHT[a < 0, d < 0]
    return _SIDEWAYS[c < 0, b < 0]


def _walk(
    source: Source, index: list[int], limits: Limits, alive: Callable[[], None]
) -> Iterator[tuple[int, VideoFrame | None]]:
    """Yield decoded frames with their numbers, ascending, all of `index` among them; then a None.

    Stretches without a wanted frame are left out by starting again from a keyframe, and frames
    that no other one needs are not decoded. Where the first lands behind the keyframe (some
    containers count decoding times, not display times), or the second gives no picture for a wanted
    frame, the rest is decoded again without that.
    """
    track = source._track
    assert track is not None, "a video has a track"
    number_of = {pts: i for i, pts in enumerate(track.pts)}
    skips = track.may_skip and bool(track.pts)
    needed_pts = {track.pts[i] for i in index} if skips else None
    # With several, an error may take good frames along.
    threads = 1 if limits.allow_partial else _num_threads(track.width, track.height)
    at = -1
    with open_container(source.path) as container:
        stream = _stream(container, track.stream, limits, threads)
        frames = _decode(container, stream, alive, needed_pts)
        for target in index:
            before = bisect_right(track.keyframes, target)
            keyframe = track.keyframes[before - 1] if before else 0
            jumped = keyframe - at > _SEEK_FRAMES and bool(before)
            lost = jumped and not _seek(container, stream, track.pts[keyframe])
            if jumped:
                frames = _decode(container, stream, alive, needed_pts)
            while at < target:
                frame = next(frames, None)
                number = number_of.get(frame.pts, -1) if frame and track.pts else at + 1  # type: ignore[arg-type]
                lost |= jumped and (frame is None or number > keyframe or frame.is_corrupt)
                if lost or (skips and (frame is None or number > target)):
                    remaining = [i for i in index if i >= target]
                    keyframes = () if lost else track.keyframes
                    again = replace(track, keyframes=keyframes, may_skip=False)
                    yield from _walk(replace(source, _track=again), remaining, limits, alive)
                    return
                if frame is None:
                    yield source.num_frames, None
                    return
                if number < 0:  # a frame that no packet announced
                    continue
                jumped, at = False, number
                yield number, frame


def _seek(container: InputContainer, stream: VideoStream, pts: int) -> bool:
    """Seek to a keyframe; return False where a damaged index does not let FFmpeg."""
    try:
        container.seek(pts, stream=stream)
    except av.FFmpegError:
        return False
    return True


def _decode(
    container: InputContainer,
    stream: VideoStream,
    alive: Callable[[], None],
    needed_pts: set[int] | None = None,
    failed: list[int] | None = None,
) -> Iterator[VideoFrame]:
    """Yield the frames from the container's position on, in display order, without damaged ones.

    Args:
        needed_pts: the times of the frames that are needed: of the others, those that no frame
            refers to are not decoded. None: all of them are needed.
        failed: gets the number of every packet that does not decode.
    """
    packets = enumerate(demux(container, stream, alive))
    while True:
        try:
            number, packet = next(packets, (0, None))
        except av.FFmpegError as error:  # the file ends within a packet
            if isinstance(error, MemoryError):
                raise
            packet = None
        if packet is None:
            return
        repeated = not packet.size and packet.dts is not None  # AVI's mark of a frame that stays
        if is_partial(packet) or repeated:
            continue
        if needed_pts is not None:
            stream.codec_context.skip_frame = (
                "DEFAULT" if not packet.size or packet.pts in needed_pts else "NONREF"
            )
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            if failed is not None:
                failed.append(number)
            continue
        for frame in frames:
            assert isinstance(frame, VideoFrame), "a video stream gives video frames"
            yield frame


def _stream(
    container: InputContainer, number: int, limits: Limits, num_threads: int
) -> VideoStream:
    stream = container.streams[number]
    assert isinstance(stream, VideoStream), "the number of a video stream"
    # Frames may grow within a stream. FFmpeg counts their padding as well, hence the room for it.
    stream.codec_context.options = {"max_pixels": str(2 * limits.max_pixels + _PADDING)}
    stream.codec_context.thread_count = num_threads
    stream.codec_context.thread_type = "AUTO" if num_threads > 1 else "NONE"
    return stream


def _num_threads(width: int, height: int) -> int:
    """Return how many threads decode: one a processor, fewer for large frames, which each holds."""
    by_memory = _THREAD_BYTES // (width * height * 3)
    return max(1, min(os.cpu_count() or 1, _MAX_THREADS, by_memory))


def _to_rgb(frame: VideoFrame, track: Track) -> np.ndarray:
    """Return a frame upright, (H, W, 3) uint8, on white, in the size that the video began with."""
    kind = "rgba" if has_alpha(frame) else "rgb24"
    pixels = frame.to_ndarray(width=track.width, height=track.height, format=kind)
    if kind == "rgba":
        opaque = pixels[..., 3:].astype(np.uint16)
        on_white = (pixels[..., :3] * opaque + 255 * (255 - opaque) + 127) // 255
        pixels = on_white.astype(np.uint8)
    if track.orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    across = -1 if track.orientation in _MIRRORED_ACROSS else 1
    down = -1 if track.orientation in _MIRRORED_DOWN else 1
    return np.ascontiguousarray(pixels[::down, ::across])
