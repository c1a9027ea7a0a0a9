"""Walk the blocks of a file without decoding them: where its content ends, and what is in it.

What follows the content is not read, however long it is.
"""

from __future__ import annotations

import mmap
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 20
MOST_CHUNKS = 1 << 20  # of a PNG, and boxes of an AVIF
_MOST_BLOCKS = 1 << 24  # of a GIF, 255 bytes each at the most
_GAP = 1 << 16  # zero bytes between two blocks of a GIF that readers pass over
# In a JPEG's coded data 0xFF is followed by 0, by a restart mark, or by the next marker.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_FRAME_HEADERS = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PADDING = 64  # bytes between two pictures of raw Motion JPEG
_MOST_MARKERS = 100_000
_BOXES = (b"ftyp", b"free", b"mdat", b"moof", b"moov", b"sidx", b"skip", b"styp", b"uuid", b"wide")
_UNKNOWN_RIFF = (0, (1 << 32) - 1)  # written as a live stream
_UNKNOWN_SIZE = (1 << 56) - 1  # the same, of an EBML element
# FFmpeg's names of formats that state no size and whose frames are compressed: they don't end in
# tens of thousands of zeros, as plain pixels may.
_COMPRESSED = ("flv", "h263", "h264", "ivf", "mjpeg", "mpeg", "mpegts", "obu", "ogg", "rm")
_MANY_ZEROS = 1 << 16
_ZEROS = bytes(_CHUNK)
_KEPT_ZEROS = 1 << 10  # a frame may end with some
MOST_SCANS = 500  # passes over a JPEG: libjpeg-turbo's own advice; cameras and tools make up to 20


@dataclass(frozen=True)
class Gif:
    """What the blocks of a GIF say.

    Args:
        end: where its content ends.
        num_pictures: how many it holds.
        complete: whether it ends as a GIF should.
    """

    end: int
    num_pictures: int
    complete: bool


def scan_gif(path: Path) -> Gif:
    """Walk the blocks of a GIF, without decoding them."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        total = len(data)
        colours = data[10] if total > 10 else 0
        at = 13 + (3 << (colours & 7) + 1 if colours & 0x80 else 0)
        pictures = gap = steps = 0
        while at < total and steps < _MOST_BLOCKS:
            block = data[at]
            if block == 0x3B:
                return Gif(at + 1, pictures, True)
            if block == 0 and gap < _GAP:
                at, gap = at + 1, gap + 1
                continue
            if block == 0x2C and at + 9 < total:
                colours = data[at + 9]
                at += 11 + (3 << (colours & 7) + 1 if colours & 0x80 else 0)
                pictures += 1
            elif block == 0x21:
                at += 2
            else:
                break
            gap = 0
            while at < total and data[at]:
                at, steps = at + 1 + data[at], steps + 1
            at, steps = at + 1, steps + 1
        return Gif(min(at, total), pictures, False)


def stated_end(path: Path) -> int | None:
    """Return where an MP4, Matroska, AVI or GIF file ends by its own headers.

    Where a part of the file is missing, that is behind its last byte. None: they do not say.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head[:3] == b"GIF":
            gif = scan_gif(path)
            return gif.end if gif.complete else total + 1
        if head[:4] == b"RIFF":
            return _end_of_riff(file, total)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return _end_of_segment(head)
        return _end_of_boxes(file, total)


def end_without_zeros(path: Path, ffmpeg_format: str) -> int:
    """Return up to where FFmpeg shall read a video: all of it, but for many zeros at its end.

    A gigabyte of them becomes one packet of a raw stream (2 GB of memory), or is searched for the
    next packet byte by byte, for longer than anyone waits.
    """
    total = path.stat().st_size
    stated = 0 if ffmpeg_format in _COMPRESSED else stated_end(path)
    if stated is None or ffmpeg_format not in (*_COMPRESSED, "avi", "matroska"):
        return total
    end = total
    with path.open("rb") as file:
        while end > stated:
            start = max(stated, end - _CHUNK)
            file.seek(start)
            content = file.read(end - start)
            if content != _ZEROS[: len(content)]:
                end = start + len(content.rstrip(b"\0"))
                break
            end = start
    return total if total - end < _MANY_ZEROS else end + _KEPT_ZEROS


def _end_of_riff(file: BinaryIO, total: int) -> int | None:
    """Return where the last RIFF chunk ends: an AVI of over a gigabyte has several."""
    end = 0
    while end + 8 <= total:
        file.seek(end)
        header = file.read(8)
        size = int.from_bytes(header[4:], "little")
        if header[:4] != b"RIFF":
            break
        if size in _UNKNOWN_RIFF:
            return None
        end += size + 8
    return end


def _end_of_boxes(file: BinaryIO, total: int) -> int | None:
    """Return where the last box (size, name) of an MP4 ends; None for other files."""
    end = 0
    for name, start, size in _boxes(file, total):
        if name not in _BOXES or size < 8:  # not MP4, padding, or a box to the end
            return None
        end = start + size
    return end


def _boxes(file: BinaryIO, total: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name, start and size of the boxes of an MP4 or AVIF."""
    start = count = 0
    while start + 8 <= total and count < MOST_CHUNKS:
        file.seek(start)
        header = file.read(16)
        size = int.from_bytes(header[:4], "big")
        if size == 1:
            size = int.from_bytes(header[8:], "big")
        yield header[4:8], start, size
        start, count = start + max(size, 8), count + 1


def _end_of_segment(head: bytes) -> int | None:
    """Return where a Matroska's segment ends: id and size, as of the EBML header before it."""
    size, start = _ebml_size(head, 4)
    if head[start + size : start + size + 4] != b"\x18\x53\x80\x67":
        return None
    size, start = _ebml_size(head, start + size + 4)
    return start + size if size < _UNKNOWN_SIZE else None


def _ebml_size(data: bytes, start: int) -> tuple[int, int]:
    """Return the size at `start`, and where its content begins."""
    first = data[start] if start < len(data) else 0
    length = 9 - first.bit_length()
    value = int.from_bytes(data[start : start + length], "big") & ((1 << 7 * length) - 1)
    if value == (1 << 7 * length) - 1:
        value = _UNKNOWN_SIZE
    return value, start + length


def riff_end(head: bytes, total: int) -> int:
    """Return where a RIFF file ends by its header."""
    return min(total, int.from_bytes(head[4:8], "little") + 8)


def boxes_end(path: Path) -> int:
    """Return where the last of an AVIF's boxes ends."""
    total, end = path.stat().st_size, 0
    with path.open("rb") as file:
        for name, start, size in _boxes(file, total):
            if not name.isalnum():
                return start
            if size < 8:  # up to the end of the file
                return total
            end = start + size
    return min(end, total)


def png_chunks(file: BinaryIO) -> list[tuple[bytes, int, int]]:
    """Return the name, start and length of every chunk of a PNG up to its end mark."""
    chunks: list[tuple[bytes, int, int]] = []
    at = 8
    file.seek(at)
    while len(header := file.read(8)) == 8 and len(chunks) < MOST_CHUNKS:
        length = int.from_bytes(header[:4], "big")
        chunks.append((header[4:], at + 8, length))
        if header[4:] == b"IEND" or length >= 1 << 31 or not header[4:].isalpha():
            break
        at += length + 12
        file.seek(at)
    return chunks


def png_names(path: Path) -> list[bytes]:
    """Return the names of a PNG's chunks."""
    with path.open("rb") as file:
        return [name for name, _, _ in png_chunks(file)]


def png_is_whole(path: Path) -> bool:
    """Whether the checksums of a PNG's pixels are right."""
    with path.open("rb") as file:
        for name, start, length in png_chunks(file):
            if name != b"IDAT":
                continue
            file.seek(start)
            sum_, left = zlib.crc32(name), length
            while left and (data := file.read(min(left, _CHUNK))):
                sum_, left = zlib.crc32(data, sum_), left - len(data)
            if left or file.read(4) != sum_.to_bytes(4, "big"):
                return False
    return True


@dataclass(frozen=True)
class _Jpeg:
    """The markers of one JPEG picture.

    Args:
        end: where it ends; 0 where its end mark is missing.
        size: height and width, as they are written.
        lists_others: whether it says that further pictures follow it (a preview, a second eye, a
            depth map): then the file is one picture.
        num_scans: passes over the picture.
    """

    end: int
    size: bytes
    lists_others: bool
    num_scans: int


def is_motion_jpeg(path: Path) -> bool:
    """Whether a file that begins as a JPEG is raw Motion JPEG: the next picture of the same size
    follows right after the first. A JPEG with a smaller preview or other data behind it is not."""
    with path.open("rb") as file:
        first = _scan_jpeg(file, 0)
        if not first.end or first.lists_others:
            return False
        file.seek(first.end)
        padding = file.read(_PADDING)
        start = padding.find(b"\xff\xd8\xff")
        if start < 0 or padding[:start].strip(b"\0\xff\r\n"):
            return False
        return _scan_jpeg(file, first.end + start, header_only=True).size == first.size != b""


def count_scans(path: Path) -> int:
    """Return how many passes over the picture a JPEG makes."""
    with path.open("rb") as file:
        return _scan_jpeg(file, 0).num_scans


def _scan_jpeg(file: BinaryIO, start: int, header_only: bool = False) -> _Jpeg:
    """Read the markers of the JPEG at `start`."""
    at, size, others, scans = start + 2, b"", False, 0
    for _ in range(_MOST_MARKERS):
        file.seek(at)
        head = file.read(4)
        if len(head) < 2 or head[0] != 0xFF or scans > MOST_SCANS:
            break
        marker = head[1]
        if marker == 0xD9:
            return _Jpeg(at + 2, size, others, scans)
        if marker == 0xFF:
            at += 1
            continue
        if marker == 1 or 0xD0 <= marker <= 0xD8:
            at += 2
            continue
        length = int.from_bytes(head[2:4], "big")
        if marker in _FRAME_HEADERS:
            size = file.read(5)[1:]
            if header_only:
                break
        elif marker == 0xE2:
            others |= file.read(4) == b"MPF\0"
        at += 2 + max(length, 2)
        if marker == 0xDA:
            scans += 1
            at = _next_marker(file, at)
    return _Jpeg(0, size, others, scans)


def _next_marker(file: BinaryIO, at: int) -> int:
    """Return where the coded data at `at` ends."""
    file.seek(at)
    carried = b""
    while data := file.read(_CHUNK):
        data = carried + data
        match = _MARKER.search(data) if b"\xff" in data else None  # zeros are passed over fast
        if match:
            return at - len(carried) + match.start()
        at += len(data) - len(carried)
        carried = data[-1:] if data[-1:] == b"\xff" else b""
    return at
