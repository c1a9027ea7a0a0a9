"""The frames of a video in display order: their times, and how to find them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vtprune.media.container import (
    BROADCAST,
    RAW,
    Packets,
    best_stream,
    end_by_metadata,
    open_container,
    read_packets,
)
from vtprune.media.decoding import decode_all, decode_head, has_alpha, orientation_of
from vtprune.media.file_blocks import stated_end
from vtprune.media.source import Limits, Source, Track, check_pixels, damaged

_HDR = {16: "PQ", 18: "HLG"}  # AVColorTransferCharacteristic
_INDEXED = ("mov", "matroska")  # containers whose keyframes are places that decoding can start from
_INTERLACED = 2  # AVFieldOrder from here on: a packet may hold half a frame
# Codecs whose frames FFmpeg can't put in order by their packets, where the container does not tell.
_REORDERED = ("h264", "hevc", "vvc")
# What decord2 3.4 numbers and seeks right (not AVI with B frames, MPEG-TS, FLV, and nothing that is
# turned or mirrored). Of frames above this size it holds nine, PyAV five.
_DECORD_CONTAINERS = _INDEXED
_DECORD_CODECS = ("av1", "h264", "hevc", "mjpeg", "mpeg4", "vp8", "vp9")
_DECORD_BYTES = 64 << 20


@dataclass(frozen=True)
class _Stream:
    """Facts about a video stream, kept after its container is closed.

    Args:
        number: in the container.
        num_stated: frames by the header; 0 where it does not say.
        stated_end: when Matroska's metadata say that it ends, in seconds; 0.0 where they don't.
        unit: seconds of one unit of its times.
        rate: frames a second.
        indexed: whether the container has an index of keyframes to trust.
        timeless: whether it has no container, and so no times.
        hides_order: whether its packets don't tell the order in which frames are shown.
        interlaced: whether a packet may hold half a frame.
        off_air: whether it was broadcast, where lost packets are normal.
        suits_decord: whether decord numbers and seeks such streams right.
        transfer: its transfer characteristic, as FFmpeg numbers it, where the header says.
    """

    number: int
    num_stated: int
    stated_end: float
    unit: float
    rate: float
    indexed: bool
    timeless: bool
    hides_order: bool
    interlaced: bool
    off_air: bool
    suits_decord: bool
    transfer: int | None


@dataclass(frozen=True)
class _FrameList:
    """The frames of a stream in display order.

    Args:
        times: in seconds.
        pts: the decoder's time of each; empty where two are the same or one is missing.
        keyframes: numbers of the frames that decoding may start from.
        num_failed: packets that do not decode.
    """

    times: tuple[float, ...]
    pts: tuple[int, ...]
    keyframes: tuple[int, ...]
    num_failed: int = 0


def open_clip(path: Path, limits: Limits, alive: Callable[[], None]) -> Source:
    """Return what a video holds, by its headers, its packets' times, and one decoded frame.

    Where the packets do not tell when each frame is shown, all frames are decoded once.

    Args:
        alive: called at every step, however long the whole takes.

    Raises:
        MediaError: for a file that is no video, has no video stream, is above the limit, or is cut
            short.
    """
    with open_container(path) as container:
        chosen = best_stream(path, container)
        check_pixels(path, chosen.width, chosen.height, limits)
        packets = read_packets(container, chosen, alive)
        stream = _facts(container, chosen)

    num_packets = len(packets.pts)
    warnings = []

    def refuse_or_warn(reason: str) -> None:
        if not (limits.allow_partial and num_packets):
            raise damaged(path, reason, limits)
        warnings.append(f"{path.name}: {reason}")

    end = stated_end(path)
    cut_short = packets.incomplete or (end is not None and end > path.stat().st_size)
    if cut_short or not num_packets:
        of = f" of {stream.num_stated}" if stream.num_stated > num_packets else ""
        refuse_or_warn(f"the file is cut short: {num_packets}{of} frames are there")

    frame, decoded = decode_head(path, stream.number, limits, alive, packets.doubtful)
    check_pixels(path, frame.width, frame.height, limits)
    if _tells_order(packets, stream):
        frames = _by_packets(packets, stream, decoded)
    else:
        frames = _by_decoding(path, packets, stream, frame, limits, alive)
    count = len(frames.times)
    first, last = frames.times[0], frames.times[-1]
    last_duration = packets.last_duration * stream.unit or 1 / stream.rate
    if not cut_short and last + 5 * last_duration < stream.stated_end:
        refuse_or_warn(f"the file is cut short: {count} frames are there")
    if packets.num_gaps:
        warnings.append(
            f"{path.name}: {packets.num_gaps} of {num_packets} packets may be damaged: the "
            "transport stream has gaps"
        )
    if frames.num_failed and not stream.off_air:
        refuse_or_warn(f"{frames.num_failed} of {num_packets} packets do not decode")

    transfer = getattr(frame, "color_trc", stream.transfer)  # frames tell it from PyAV 17 on
    if transfer in _HDR:
        kind = _HDR[transfer]
        warnings.append(f"{path.name}: HDR ({kind}), read as 8 bits without tone mapping")
    orientation = orientation_of(frame)
    width, height = frame.width, frame.height
    decoder = "pyav"
    if limits.decoder == "decord":
        is_exact = stream.suits_decord and orientation == 1 and bool(frames.keyframes)
        is_exact = is_exact and not (warnings or packets.num_left_out or packets.has_leading)
        is_small = width * height * 3 <= _DECORD_BYTES
        if is_exact and is_small and not (packets.doubtful or has_alpha(frame)):
            decoder = "decord"
        else:
            warnings.append(f"{path.name}: PyAV reads it: decord does not give its frames exactly")
    track = Track(
        stream.number,
        width,
        height,
        orientation,
        frames.pts,
        frames.keyframes,
        may_skip=not stream.interlaced,
    )
    if orientation >= 5:
        width, height = height, width
    duration = last + last_duration - first
    return Source(
        path=path,
        kind="video",
        width=width,
        height=height,
        num_frames=count,
        timestamps=frames.times,
        fps=count / duration,
        duration=duration,
        decoder=decoder,
        warnings=tuple(warnings),
        _track=track,
    )


def _facts(container: InputContainer, stream: VideoStream) -> _Stream:
    codec = stream.codec_context
    name = codec.codec.canonical_name
    kind = container.format.name.split(",")[0]
    # Without a container, FFmpeg's average is 25 whatever the stream says.
    rates = [stream.average_rate, stream.guessed_rate]
    rate = next(filter(None, reversed(rates) if kind in RAW else rates), Fraction(25))
    interlaced = int(getattr(codec, "field_order", 0) or 0) >= _INTERLACED
    size = (stream.width, stream.height)
    others = [video for video in container.streams.video if video.codec_context is not None]
    alone = [(video.width, video.height) for video in others].count(size) == 1
    return _Stream(
        number=stream.index,
        num_stated=stream.frames,
        stated_end=end_by_metadata(stream),
        unit=float(stream.time_base or 0),
        rate=float(rate),
        indexed=kind in _INDEXED,
        timeless=kind in RAW,
        hides_order=(kind in RAW or kind == "avi") and name in _REORDERED and codec.has_b_frames,
        interlaced=interlaced,
        off_air=kind == BROADCAST,
        suits_decord=kind in _DECORD_CONTAINERS
        and name in _DECORD_CODECS
        and alone
        and not interlaced,
        transfer=getattr(codec, "color_trc", None),
    )


def _tells_order(packets: Packets, stream: _Stream) -> bool:
    """Whether every packet has another time, and these give the order of the frames."""
    known_pts = {value for value in packets.pts if value is not None}
    all_differ = len(known_pts) == len(packets.pts)
    return all_differ and bool(stream.unit) and not (stream.hides_order or packets.jumps_back)


def _by_packets(packets: Packets, stream: _Stream, decoded: set[int]) -> _FrameList:
    """List the frames by their packets' times.

    Args:
        decoded: which of the doubtful packets make a frame.
    """
    pts = [value if value is not None else 0 for value in packets.pts]
    lost = packets.doubtful - decoded
    order = sorted((i for i in range(len(pts)) if pts[i] not in lost), key=pts.__getitem__)
    shown_pts = tuple(pts[i] for i in order)
    keyframes = (i for i, packet in enumerate(order) if packets.is_key[packet])
    return _FrameList(
        _times(shown_pts, stream), shown_pts, tuple(keyframes) if stream.indexed else ()
    )


def _by_decoding(
    path: Path,
    packets: Packets,
    stream: _Stream,
    head: VideoFrame,
    limits: Limits,
    alive: Callable[[], None],
) -> _FrameList:
    """List the frames as the decoder gives them."""
    pts, num_failed = decode_all(path, stream.number, limits, alive)
    known_pts = [value for value in pts if value is not None]
    identified = tuple(known_pts) if len(set(known_pts)) == len(pts) else ()
    if not pts:
        raise damaged(path, "no frame of the video decodes", limits)
    dts = [value for value in packets.dts if value is not None]
    step = packets.last_duration or round(1 / (stream.rate * (stream.unit or 1)))
    if stream.hides_order and not stream.timeless and dts:
        # AVI tells when packets are decoded. FFmpeg shows the first frame when it has read as many
        # as it needs to know which one that is, and so do we.
        delay = head.dts - dts[0] if head.dts is not None else 0
        values = [value + delay for value in _continuous(dts, step)]
        values += [values[-1] + step * (i + 1) for i in range(len(pts) - len(values))]
        times = _times(values[: len(pts)], stream)
    elif known_pts:
        last = known_pts[0] - step
        filled = [last := (last + step if value is None else value) for value in pts]
        times = _times(_continuous(filled, step), stream)
    else:
        times = tuple(round(i / stream.rate, 6) for i in range(len(pts)))
    return _FrameList(times, identified, (), num_failed)


def _times(values: Sequence[int], stream: _Stream) -> tuple[float, ...]:
    """Return times in seconds; of a stream without a container, by its frame rate from 0 on."""
    if stream.timeless or not stream.unit:
        return tuple(round(i / stream.rate, 6) for i in range(len(values)))
    return tuple(round(value * stream.unit, 6) for value in values)


def _continuous(values: Sequence[int], step: int) -> list[int]:
    """Return times that go on where the clock is set back, as where recordings are joined."""
    shift, joined = 0, [values[0]]
    for value in values[1:]:
        if value + shift < joined[-1]:
            shift = joined[-1] + step - value
        joined.append(value + shift)
    return joined
