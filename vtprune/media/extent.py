"""Where the content of a file ends: what follows it is not read, however long it is."""

from __future__ import annotations

import mmap
import re
import zlib
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


def riff_end(head: bytes, total: int) -> int:
    """Return where a RIFF file ends by its header."""
    return min(total, int.from_bytes(head[4:8], "little") + 8)


def boxes_end(path: Path) -> int:
    """Return where the last of a file's boxes (size, name) ends."""
    total = path.stat().st_size
    start = count = 0
    with path.open("rb") as file:
        while start + 8 <= total and count < MOST_CHUNKS:
            count += 1
            file.seek(start)
            header = file.read(16)
            size = int.from_bytes(header[:4], "big")
            if size == 1:
                size = int.from_bytes(header[8:], "big")
            if not header[4:8].isalnum():
                return start
            if size < 8:  # up to the end of the file
                return total
            start += size
    return min(start, total)


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


def num_scans(path: Path) -> int:
    """How many passes over the picture a JPEG makes."""
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
    """Where the coded data at `at` ends."""
    file.seek(at)
    rest = b""
    while data := file.read(_CHUNK):
        data = rest + data
        match = _MARKER.search(data) if b"\xff" in data else None  # zeros are passed over fast
        if match:
            return at - len(rest) + match.start()
        at += len(data) - len(rest)
        rest = data[-1:] if data[-1:] == b"\xff" else b""
    return at
