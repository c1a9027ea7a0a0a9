"""What a video holds: its frames in display order, their times, and how to find them again."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from av.container import InputContainer
from av.video.stream import VideoStream

from vtprune.media.container import (
    Packets,
    best_stream,
    is_cut_short,
    open_container,
    read_packets,
    stated_end,
)
from vtprune.media.decoding import first_frame, has_alpha
from vtprune.media.source import Limits, Source, Track, check_pixels, damaged

_HDR = {16: "PQ", 18: "HLG"}  # AVColorTransferCharacteristic
_INDEXED = ("mov", "matroska")  # containers whose keyframes are places that decoding can start from
_INTERLACED = 2  # AVFieldOrder from here on: a packet may hold half a frame
# What decord numbers and seeks right (not MPEG-TS, FLV); its FFmpeg is 4.1. Of frames above this
# size it holds nine, PyAV five.
_DECORD_CONTAINERS = ("avi", "matroska", "mov")
_DECORD_CODECS = ("h264", "hevc", "mjpeg", "mpeg4", "vp8", "vp9")
_DECORD_BYTES = 64 << 20


def open_clip(path: Path, limits: Limits) -> Source:
    """What a video holds, by its headers, its packets' times, and one decoded frame's rotation.

    Raises:
        MediaError: for a file that is no video, has no video stream, is above the limit, or is cut
            short.
    """
    with open_container(path) as container:
        stream = best_stream(path, container)
        check_pixels(path, stream.width, stream.height, limits)
        packets = read_packets(container, stream)
        number, num_stated, end = stream.index, stream.frames, stated_end(stream)
        unit = float(stream.time_base or 0)
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        indexed = container.format.name.split(",")[0] in _INDEXED
        suits_decord = _suits_decord(container, stream)
        stated = getattr(stream.codec_context, "color_trc", None)

    count = len(packets.pts)
    pts, keyframes = _display_order(packets, indexed) if unit else ((), ())
    if pts:
        times = tuple(round(value * unit, 6) for value in pts)
    else:
        times = tuple(round(i / rate, 6) for i in range(count))
    last = packets.last_duration * unit if pts and packets.last_duration else 1 / rate

    warnings = []
    cut = packets.incomplete or is_cut_short(path) or bool(times and times[-1] + 5 * last < end)
    if cut or not count:
        of = f" of {num_stated}" if num_stated > count else ""
        reason = f"the file is cut short: {count}{of} frames are there"
        if not (limits.allow_partial and count):
            raise damaged(path, reason, limits)
        warnings.append(f"{path.name}: {reason}")

    frame = first_frame(path, number, limits)
    check_pixels(path, frame.width, frame.height, limits)
    transfer = getattr(frame, "color_trc", stated)  # frames tell it from PyAV 17 on
    if transfer in _HDR:
        kind = _HDR[transfer]
        warnings.append(f"{path.name}: HDR ({kind}), read as 8 bits without tone mapping")
    rotation = round(frame.rotation / 90) * 90 % 360
    track = Track(number, frame.width, frame.height, rotation, pts, keyframes)
    width, height = (frame.height, frame.width) if rotation % 180 else (frame.width, frame.height)

    loses_count = cut or packets.num_left_out or packets.has_leading or not pts
    light = width * height * 3 <= _DECORD_BYTES
    fits = suits_decord and light and not (loses_count or has_alpha(frame))
    decoder = "decord" if fits else "pyav"
    duration = times[-1] + last - times[0]
    return Source(
        path=path,
        kind="video",
        width=width,
        height=height,
        num_frames=count,
        timestamps=times,
        fps=count / duration,
        duration=duration,
        decoder=decoder,
        warnings=tuple(warnings),
        _track=track,
    )


def _display_order(packets: Packets, indexed: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The times of the frames in display order, and the numbers of the keyframes to start from.

    Both are empty where the container doesn't tell every frame its own time.
    """
    pts = [value for value in packets.pts if value is not None]
    if len(set(pts)) < len(packets.pts):
        return (), ()
    order = sorted(range(len(pts)), key=pts.__getitem__)
    keyframes = [i for i, packet in enumerate(order) if packets.is_key[packet]] if indexed else []
    return tuple(pts[i] for i in order), tuple(keyframes)


def _suits_decord(container: InputContainer, stream: VideoStream) -> bool:
    """Whether decord is there, reads the codec, and can't take another stream for this one."""
    codec = stream.codec_context
    fits = container.format.name.split(",")[0] in _DECORD_CONTAINERS
    size = (stream.width, stream.height)
    interlaced = int(getattr(codec, "field_order", 0) or 0) >= _INTERLACED
    others = [other for other in container.streams.video if other.codec_context is not None]
    alone = [(other.width, other.height) for other in others].count(size) == 1
    fits &= alone and not interlaced and codec.codec.canonical_name in _DECORD_CODECS
    return fits and importlib.util.find_spec("decord") is not None
