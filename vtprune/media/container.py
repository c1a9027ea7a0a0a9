"""Video files as FFmpeg's containers: the stream to read, and the packets of its frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from vtprune.errors import MediaError
from vtprune.media.file_blocks import end_without_zeros, scan_gif
from vtprune.media.file_type import file_type_of
from vtprune.media.source import printable, unreadable

_FFMPEG = {"GIF": "gif", "PNG": "apng"}  # its names for animations in pictures' formats
BROADCAST = "mpegts"
# Streams without a container.
RAW = ("h261", "h263", "h264", "hevc", "m4v", "mjpeg", "mpegvideo")
_MOST_FRAMES = 5_000_000  # two days at 25 a second; a damaged index may list more than a disk holds


@dataclass
class Packets:
    """The packets of a stream that make its frames, in decoding order.

    Args:
        pts: the time of each, in the stream's units; None where there is none.
        dts: when each is decoded, likewise.
        is_key: whether decoding may start there.
        doubtful: the times of packets that may make no frame: those that come before the first
            keyframe, or are shown before it. Only the decoder knows.
        last_duration: of the last one, in the stream's units; 0 if unknown.
        num_left_out: packets without a frame: left out by an edit list, hidden or incomplete.
        num_gaps: packets of a broadcast that something may be missing of.
        has_leading: whether a frame is shown before the keyframe that it is decoded after (an open
            group of pictures): decord numbers the frames around such a keyframe wrongly.
        jumps_back: whether the clock is set back within the stream, as where recordings are joined.
        incomplete: whether the file ends within a packet.
    """

    pts: list[int | None] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    is_key: list[bool] = field(default_factory=list)
    doubtful: set[int] = field(default_factory=set)
    last_duration: int = 0
    num_left_out: int = 0
    num_gaps: int = 0
    has_leading: bool = False
    jumps_back: bool = False
    incomplete: bool = False


def open_container(path: Path) -> InputContainer:
    """Open a local video, and nothing that it may refer to.

    Raises:
        MediaError: for a file that is no video.
    """
    # FFmpeg may take a file only for what its first bytes say: others of its formats (hls, concat,
    # image2, ...) open further files and addresses named inside it, or find frames in any data.
    formats = [_FFMPEG.get(name, name) for name in file_type_of(path).formats]
    with path.open("rb") as file:
        head = file.read(12)
    try:
        container = av.open(
            _address(path, formats),
            # FFmpeg takes some motion JPEG for a single picture.
            format="mjpeg" if formats == ["mjpeg"] else None,
            # Not `options`, which are the streams' too: with them PyAV 15 crashes on containers
            # without a header, such as FLV.
            container_options={
                "format_whitelist": ",".join(formats),
                "protocol_whitelist": "file,subfile",
            },
            metadata_errors="replace",
        )
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, MemoryError):
            raise
        if head[4:8] in (b"ftyp", b"moov", b"mdat"):
            raise MediaError(
                f"{printable(path)}: the video has no index (moov): it is cut short or unfinished",
                "copy or download it again; nothing of it can be read as it is",
            ) from error
        raise unreadable(path) from error
    return container


def _address(path: Path, formats: list[str]) -> str:
    """Return the file's address for FFmpeg, without many zeros or what follows a GIF's end mark."""
    name = str(path.absolute())
    end = scan_gif(path).end if formats == ["gif"] else end_without_zeros(path, formats[0])
    return f"subfile,,start,0,end,{end},,:{name}" if end < path.stat().st_size else name


def best_stream(path: Path, container: InputContainer) -> VideoStream:
    """Return the stream with the largest frames, then the default, then the first; no cover art.

    Raises:
        MediaError: for a file without a video stream.
    """
    streams = []
    for stream in container.streams.video:
        has_decoder = stream.codec_context is not None  # else a codec that FFmpeg doesn't know
        if has_decoder and stream.width and not stream.disposition & Disposition.attached_pic:
            streams.append(stream)
    if not streams:
        raise MediaError(
            f"{printable(path)}: the file has no video stream that can be read",
            "give a video, or convert it to an H.264 mp4; sound is not read",
        )

    def rank(stream: VideoStream) -> tuple[bool, int, bool, int]:
        moves = stream.frames != 1 and not stream.disposition & Disposition.timed_thumbnails
        is_default = bool(stream.disposition & Disposition.default)
        return moves, stream.width * stream.height, is_default, -stream.index

    return max(streams, key=rank)


def demux(
    container: InputContainer, stream: VideoStream, alive: Callable[[], None]
) -> Iterator[Packet[VideoStream]]:
    """Yield the packets of a stream, the mark of its end included; before each, call `alive`.

    Raises:
        av.FFmpegError: the file ends within a packet, or is damaged there.
    """
    packets = container.demux(stream)
    while True:
        alive()
        try:
            packet = next(packets, None)
        except IndexError:  # PyAV 18, at the end of a file in which further streams turned up
            return
        if packet is None:
            return
        yield packet


def is_partial(packet: Packet[VideoStream]) -> bool:
    """Whether a packet is not there to its end.

    In an MPEG transport stream the same mark means that the packet counter jumps, as where two
    recordings are joined: the packet before that is mostly whole, and FFmpeg decodes it.
    """
    return packet.is_corrupt and packet.stream.container.format.name != BROADCAST


def read_packets(
    container: InputContainer, stream: VideoStream, alive: Callable[[], None]
) -> Packets:
    """Read the packets of a stream, without decoding them."""
    packets = Packets()
    begun = False
    first_key: int | None = None
    last_key: int | None = None
    last_dts: int | None = None
    may_hide = stream.codec_context.codec.canonical_name == "vp8"
    try:
        for packet in demux(container, stream, alive):
            if not packet.size:  # PyAV's mark of the end, or AVI's of a frame that stays
                continue
            if packet.is_keyframe:
                last_key = packet.pts
                first_key = first_key if begun else packet.pts
                begun = True
            elif last_key is not None and packet.pts is not None:
                packets.has_leading |= packet.pts < last_key
            if packet.dts is not None:
                packets.jumps_back |= last_dts is not None and packet.dts < last_dts
                last_dts = packet.dts
            packets.incomplete |= is_partial(packet)
            packets.num_gaps += packet.is_corrupt
            hidden = may_hide and not bytes(packet)[0] & 0x10  # VP8's show_frame bit
            if is_partial(packet) or packet.is_discard or hidden:
                packets.num_left_out += 1
                continue
            if len(packets.pts) == _MOST_FRAMES:
                raise MediaError(
                    f"{printable(container.name)}: more than {_MOST_FRAMES:,} frames",
                    "cut the part that you need out of it",
                )
            early = not begun or (first_key is not None and (packet.pts or 0) < first_key)
            if early and packet.pts is not None:
                packets.doubtful.add(packet.pts)
            packets.pts.append(packet.pts)
            packets.dts.append(packet.dts)
            packets.is_key.append(packet.is_keyframe)
            packets.last_duration = packet.duration or packets.last_duration
    except av.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        packets.incomplete = True
    return packets


def end_by_metadata(stream: VideoStream) -> float:
    """Return when Matroska's metadata say that a stream ends, in seconds; 0.0 where they don't."""
    hours, _, minutes_seconds = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = minutes_seconds.partition(":")
    try:
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0
