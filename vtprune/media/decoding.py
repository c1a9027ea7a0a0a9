"""The frames of a video: through decord where it can read them, else through PyAV."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vtprune.media.container import open_container
from vtprune.media.source import Limits, Source, Track, damaged

_THREAD_BYTES = 64 << 20  # raw pixels that the decoding threads together may hold back
_MAX_THREADS = 8
_PADDING = 1 << 16  # pixels
_SEEK_FRAMES = 4  # decode up to this many frames needlessly rather than seek over them


class DecordUnfitError(Exception):
    """decord can't read this file, or numbers its frames differently; PyAV can take over."""


def decord_frames(source: Source, index: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """The frames `index` (ascending) with their numbers, each (H, W, 3) uint8 RGB, through decord.

    Raises:
        DecordUnfitError: where decord doesn't give these frames.
    """
    try:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        reader = decord.VideoReader(
            str(source.path.absolute()), num_threads=_num_threads(source._track)
        )
        if len(reader) != source.num_frames:
            raise DecordUnfitError(f"{len(reader)} frames instead of {source.num_frames}")
        times = reader.get_frame_timestamp(list(range(len(reader))))[:, 0]
        apart = np.abs(
            times - times[0] - (np.array(source.timestamps) - source.timestamps[0])
        ).max()
        if apart > 0.002 + 1e-6 * source.duration:  # decord's are float32, and begin at 0
            raise DecordUnfitError(f"timestamps {apart:.3f} s apart")
        for i in index:
            frame = torch.from_numpy(reader[i].asnumpy())  # (H, W, 3)
            if frame.shape != (source.height, source.width, 3):
                raise DecordUnfitError(f"frames of shape {tuple(frame.shape)}")
            yield i, frame
    except (MemoryError, GeneratorExit, DecordUnfitError):
        raise
    except Exception as error:  # DECORDError, RuntimeError, OSError for a missing library, ...
        raise DecordUnfitError(str(error)) from error


def pyav_frames(
    source: Source, index: list[int], limits: Limits, problems: list[str]
) -> Iterator[tuple[int, torch.Tensor]]:
    """The frames `index` (ascending) with their numbers, each (H, W, 3) uint8 RGB, through PyAV.

    A packet without a picture of its own (the second field of an interlaced frame) gives the
    picture that is on screen at its time. Warnings go to `problems`.

    Raises:
        MediaError: for a frame that doesn't decode, unless the limits allow a part of the file.
    """
    assert source._track is not None, "a video has a track"
    on_screen: tuple[int, VideoFrame] | None = None
    waiting = list(reversed(index))
    missing = 0
    for i, frame in _walk(source, index, limits):
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


def first_frame(path: Path, number: int, limits: Limits) -> VideoFrame:
    """The first frame of stream `number` that decodes."""
    with open_container(path) as container:
        for frame in _decode(container, _stream(container, number, limits, num_threads=1)):
            return frame
    raise damaged(path, "no frame of the video decodes", limits)


def has_alpha(frame: VideoFrame) -> bool:
    """Whether the pixels have a transparency."""
    return any(component.is_alpha for component in frame.format.components)


def _walk(
    source: Source, index: list[int], limits: Limits
) -> Iterator[tuple[int, VideoFrame | None]]:
    """Decoded frames with their numbers, ascending, all of `index` among them; then a None.

    Stretches without a wanted frame are passed over by starting again from a keyframe. Where that
    lands behind the keyframe (some containers count decoding times, not display times), the rest is
    decoded from the start.
    """
    track = source._track
    assert track is not None, "a video has a track"
    number_of = {pts: i for i, pts in enumerate(track.pts)}
    # With several, an error may take good frames along.
    threads = 1 if limits.allow_partial else _num_threads(track)
    at = -1
    with open_container(source.path) as container:
        stream = _stream(container, track.stream, limits, threads)
        frames = _decode(container, stream)
        for target in index:
            before = bisect_right(track.keyframes, target)
            keyframe = track.keyframes[before - 1] if before else 0
            jumped = keyframe - at > _SEEK_FRAMES and bool(before)
            if jumped:
                container.seek(track.pts[keyframe], stream=stream)
                frames = _decode(container, stream)
            while at < target:
                frame = next(frames, None)
                number = number_of.get(frame.pts, -1) if frame and track.pts else at + 1  # type: ignore[arg-type]
                if jumped and (frame is None or number > keyframe or frame.is_corrupt):
                    rest = [i for i in index if i >= target]
                    yield from _walk(
                        replace(source, _track=replace(track, keyframes=())), rest, limits
                    )
                    return
                if frame is None:
                    yield source.num_frames, None
                    return
                if number < 0:  # a frame that no packet announced
                    continue
                jumped, at = False, number
                yield number, frame


def _decode(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """The frames from where the container stands, in display order; damaged ones are left out."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:  # the file ends within a packet
            packet = None
        if packet is None:
            return
        stays = not packet.size and packet.dts is not None  # AVI's mark of a frame that stays
        if packet.is_corrupt or stays:
            continue
        try:
            frames = packet.decode()
        except av.FFmpegError:
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


def _num_threads(track: Track | None) -> int:
    """As many as there are processors, fewer for large frames: each thread holds some of them."""
    assert track is not None, "a video has a track"
    fits = _THREAD_BYTES // (track.width * track.height * 3)
    return max(1, min(os.cpu_count() or 1, _MAX_THREADS, fits))


def _to_rgb(frame: VideoFrame, track: Track) -> torch.Tensor:
    """A frame upright, (H, W, 3) uint8, on white, in the size that the video began with."""
    kind = "rgba" if has_alpha(frame) else "rgb24"
    pixels = frame.to_ndarray(width=track.width, height=track.height, format=kind)
    if kind == "rgba":
        opaque = pixels[..., 3:].astype(np.uint16)
        on_white = (pixels[..., :3] * opaque + 255 * (255 - opaque) + 127) // 255
        pixels = on_white.astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(np.rot90(pixels, track.rotation // 90)))
