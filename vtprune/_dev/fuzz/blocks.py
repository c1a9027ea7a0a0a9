"""Damage done to the blocks that a media file is made of: chunks, boxes, segments, entries.

A checksum that covers a block is made anew, so that what lies behind it is read.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from vtprune._dev.fuzz.mutations import EDGES

PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"meta", b"iprp", b"ipco", b"edts", b"LIST")
MOST_BLOCKS = 400


@dataclass(frozen=True)
class FileBlock:
    """A part of a file.

    Args:
        start, end: of the whole block.
        content: where its content begins.
        length: how its length is written: format of `struct`, and its place; None: not at all.
        checked: whether a checksum of PNG ends it.
    """

    start: int
    end: int
    content: int
    length: tuple[str, int] | None = None
    checked: bool = False


def damage_blocks(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return a copy of a file with some of its blocks damaged; as it was where it has none."""
    changed, damages = data, []
    for _ in range(rng.choice((1, 1, 2, 3))):
        blocks = list(islice(blocks_of(changed), MOST_BLOCKS))
        if blocks:
            damage, changed = _damage(changed, rng.choice(blocks), rng.choice(blocks), rng)
            damages.append(f"block {damage}")
    return " ".join(damages), changed


def _damage(
    data: bytes, block: FileBlock, other: FileBlock, rng: random.Random
) -> tuple[str, bytes]:
    whole, content = data[block.start : block.end], bytearray(data[block.content : block.end])
    damage = rng.choice(
        ("content", "content", "content", "values", "drop", "double", "move", "length", "empty")
    )
    match damage:
        case "drop":
            return damage, data[: block.start] + data[block.end :]
        case "double":
            return damage, data[: block.end] + whole * rng.choice((1, 2, 50)) + data[block.end :]
        case "move":
            return damage, data[: other.start] + whole + data[other.start :]
        case "length" if block.length:
            kind, place = block.length
            most = (1 << 8 * struct.calcsize(kind)) - 1
            value = rng.choice((*EDGES, block.end - block.start + 1, len(data) + 1))
            field = struct.pack(kind, value & most)
            return damage, data[:place] + field + data[place + len(field) :]
        case "empty":
            content = content[: rng.randrange(len(content) + 1)]
        case "values":
            for _ in range(rng.choice((1, 2, 4))):
                width = rng.choice((1, 2, 4))
                at = rng.randrange(max(1, len(content)))
                value = rng.choice(EDGES) % (1 << 8 * width)
                content[at : at + width] = value.to_bytes(width, rng.choice(("big", "little")))
        case _:
            for _ in range(rng.choice((1, 1, 4, 16)) if content else 0):
                content[rng.randrange(len(content))] = rng.randrange(256)
    return damage, data[: block.content] + _sealed(data, block, bytes(content)) + data[block.end :]


def _sealed(data: bytes, block: FileBlock, content: bytes) -> bytes:
    """Return a block's content with its checksum, which of PNG is over the name too."""
    if not block.checked:
        return content
    body = content[:-4]
    return body + struct.pack(">I", zlib.crc32(data[block.content - 4 : block.content] + body))


def blocks_of(data: bytes) -> Iterator[FileBlock]:
    """Yield the blocks of a file, of the kinds whose form is known here."""
    readers: tuple[tuple[bytes, int, Callable[[bytes], Iterator[FileBlock]]], ...] = (
        (b"\x89PNG", 0, _chunks),
        (b"\xff\xd8", 0, _segments),
        (b"RIFF", 0, lambda data: _riff(data, 12, len(data))),
        (b"ftyp", 4, lambda data: _boxes(data, 0, len(data))),
        (b"II*\0", 0, lambda data: _entries(data, "<")),
        (b"MM\0*", 0, lambda data: _entries(data, ">")),
        (b"GIF8", 0, _parts),
        (b"%PDF", 0, _parts),
    )
    for mark, place, read in readers:
        if data[place : place + len(mark)] == mark:
            yield from read(data)


def _chunks(data: bytes) -> Iterator[FileBlock]:
    place = 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 12 + length
        if end > len(data):
            return
        yield FileBlock(place, end, place + 8, (">I", place), checked=True)
        place = end


def _segments(data: bytes) -> Iterator[FileBlock]:
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        (length,) = struct.unpack_from(">H", data, place + 2)
        yield FileBlock(place, min(place + 2 + length, len(data)), place + 4, (">H", place + 2))
        place += 2 + length


def _riff(data: bytes, place: int, end: int) -> Iterator[FileBlock]:
    while place + 8 <= end:
        name, length = struct.unpack_from("<4sI", data, place)
        last = min(place + 8 + length + length % 2, end)
        yield FileBlock(place, last, place + 8, ("<I", place + 4))
        if name in PARENTS:
            yield from _riff(data, place + 12, last)
        place = last


def _boxes(data: bytes, place: int, end: int) -> Iterator[FileBlock]:
    while place + 8 <= end:
        length, name = struct.unpack_from(">I4s", data, place)
        last = min(place + length, end) if length >= 8 else end
        yield FileBlock(place, last, place + 8, (">I", place))
        if name in PARENTS:
            yield from _boxes(data, place + (12 if name == b"meta" else 8), last)
        place = last


def _entries(data: bytes, order: str) -> Iterator[FileBlock]:
    """Yield the entries of a TIFF file's directories, in which tag, type, count and value lie."""
    (place,) = struct.unpack_from(f"{order}I", data, 4)
    seen: set[int] = set()
    while 0 < place + 2 <= len(data) and place not in seen:
        seen.add(place)
        (count,) = struct.unpack_from(f"{order}H", data, place)
        for number in range(count):
            start = place + 2 + 12 * number
            if start + 12 <= len(data):
                yield FileBlock(start, start + 12, start + 2, (f"{order}I", start + 4))
        after = place + 2 + 12 * count
        if after + 4 > len(data):
            return
        (place,) = struct.unpack_from(f"{order}I", data, after)


def _parts(data: bytes) -> Iterator[FileBlock]:
    """Yield sixteenths of a file."""
    step = max(1, len(data) // 16)
    for start in range(0, len(data), step):
        yield FileBlock(start, min(start + step, len(data)), start)
