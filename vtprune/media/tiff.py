"""The pages of TIFF files, and whether libtiff decoded them without a complaint.

It runs in the child process alone: libtiff writes its complaints to the process's stderr, and for
damaged fax and JPEG data they are all that there is: it then goes on with whatever it has.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import PIL
from PIL import Image

from vtprune.errors import MediaError
from vtprune.media.child_process import Caller
from vtprune.media.rgb import Converted, bits_of, to_rgb
from vtprune.media.source import Limits, check_pixels, damaged, printable
from vtprune.media.still import decoding, open_image

_MOST_PAGES = 2_000
_RAW, _OLD_JPEG, _DEFLATE = 1, 6, (8, 32946)
# Of these libtiff decodes what it can and only warns: fax, JPEG, PackBits.
_LENIENT = (2, 3, 4, 6, 7, 32771, 32773)
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType: a smaller copy of another page, its transparency
(_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _OFFSETS, _SAMPLES, _ROWS, _COUNTS, _PLANAR) = (
    254, 256, 257, 258, 259, 273, 277, 278, 279, 284,
)  # fmt: skip
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS, _SUB_IFDS = 322, 323, 324, 325, 330


def list_pages(path: Path, limits: Limits) -> tuple[list[tuple[int, int, int]], int]:
    """Return number, width and height (as displayed) of the wanted pages, and how many there are.

    Raises:
        MediaError: for no pages, too many of them, one above the limit, or a broken header.
    """
    with _opened(path, limits) as image:
        frames = _pages(path, image)
        sizes = []
        for number in limits.select_pages(path, len(frames)):
            with decoding(_name(path, number, len(frames)), limits):
                image.seek(frames[number - 1])
                width, height = _displayed(image)
                check_pixels(path, width, height, limits)
                sizes.append((number, width, height))
        return sizes, len(frames)


def send_page(caller: Caller, path: Path, number: int, limits: Limits) -> tuple[str, ...]:
    """Send the pixels of one page, upright; return the warnings.

    Raises:
        MediaError: the page does not decode without a complaint, and the limits allow no part.
    """
    with _caught_stderr() as take_stderr:
        try:
            return _send(caller, path, number, limits, False, take_stderr)
        except MediaError:
            if not limits.allow_partial:
                raise
        damage = f"{path.name}: damaged, only a part of the picture is there"
        return (damage, *_send(caller, path, number, limits, True, take_stderr))


def _send(
    caller: Caller,
    path: Path,
    number: int,
    limits: Limits,
    partial: bool,
    take_stderr: Callable[[], str],
) -> tuple[str, ...]:
    with _decoded(path, number, limits, partial, take_stderr) as (converted, (width, height)):
        caller.send(number, (height, width, 3), converted.rows)
        return tuple(f"{path.name}: {note}" for note in converted.warnings)


@contextmanager
def _caught_stderr() -> Iterator[Callable[[], str]]:
    """Catch what this process writes to stderr; give what returns it, each time what is new."""
    with ExitStack() as stack:
        if hasattr(os, "memfd_create"):
            noise: Any = open(os.memfd_create("noise"), "w+b", buffering=0)  # noqa: SIM115
        else:
            noise = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        stack.callback(noise.close)
        stderr = os.dup(2)
        stack.callback(os.close, stderr)
        stack.callback(os.dup2, stderr, 2)
        os.dup2(noise.fileno(), 2)

        def take_stderr() -> str:
            size = noise.seek(0, os.SEEK_END)
            noise.seek(0)
            text: str = noise.read(size).decode("utf-8", "replace")
            noise.seek(0)
            noise.truncate()
            return text

        yield take_stderr


@contextmanager
def _decoded(
    path: Path, number: int, limits: Limits, partial: bool, take_stderr: Callable[[], str]
) -> Iterator[tuple[Converted, tuple[int, int]]]:
    """Decode one page, and give it with its width and height, upright.

    Args:
        number: of the page, from 1 on.
        partial: give what decodes of a damaged page.
        take_stderr: returns what the process has written to stderr since it was last asked.

    Raises:
        MediaError: the page does not decode, or libtiff complained and `partial` is not set.
    """
    _libtiff()  # before Pillow decodes anything, and so switches off the handler of warnings
    with _opened(path, limits, partial) as image:
        frames = _pages(path, image)
        name = _name(path, number, len(frames))
        with decoding(name, limits, partial):
            image.seek(frames[number - 1])
            check_pixels(path, *_displayed(image), limits)
            bits, offset = bits_of(image), int(image.tag_v2.offset)  # type: ignore[attr-defined]
            compression = image.tag_v2.get(_COMPRESSION, _RAW)  # type: ignore[attr-defined]
            problem = "" if partial else _bad_strips(path, image, compression)
            if not problem and compression in _LENIENT and not partial:
                problem = _complaints(path, offset, take_stderr)
            take_stderr()
            if not problem:
                image.load()
                problem = take_stderr()
            if problem and not partial:
                raise damaged(name, f"the picture is damaged ({_first_line(problem)})", limits)
            yield to_rgb(name, image, bits), image.size


@contextmanager
def _opened(path: Path, limits: Limits, partial: bool = False) -> Iterator[Image.Image]:
    with decoding(printable(path), limits, partial), open_image(path, ("TIFF",)) as image:
        yield image


def _name(path: Path, number: int, count: int) -> str:
    return f"{printable(path)}: page {number}" if count > 1 else printable(path)


def _pages(path: Path, image: Image.Image) -> list[int]:
    """Return the candidates, in the chain of pictures, of those that are pages."""
    pages, number = [], 0
    while number <= _MOST_PAGES:
        try:
            image.seek(number)
        except EOFError:
            break
        except Exception:  # a page of an unknown kind: told if it is asked for
            pages.append(number)
        else:
            kind = image.tag_v2.get(_SUBFILE, 0)  # type: ignore[attr-defined]
            if not (isinstance(kind, int) and kind & (_REDUCED | _MASK)):
                pages.append(number)
            elif number == 0 and _SUB_IFDS in image.tag_v2:  # type: ignore[attr-defined]
                raise MediaError(
                    f"{printable(path)}: a camera's raw picture, of which only a preview can be "
                    "read",
                    "convert it to JPEG or PNG",
                )
        number += 1
    if number > _MOST_PAGES:
        raise MediaError(f"{printable(path)}: more than {_MOST_PAGES:,} pages", "split the file")
    return pages or [0]


def _displayed(image: Image.Image) -> tuple[int, int]:
    """Return width and height with the orientation applied.

    Not `image.size`: whether that has it applied before decoding differs by Pillow's release.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    width, height = int(tags[_WIDTH]), int(tags[_HEIGHT])
    return (height, width) if tags.get(274) in (5, 6, 7, 8) else (width, height)


def _bad_strips(path: Path, image: Image.Image, compression: int) -> str:
    """Say what is wrong with a page's strips or tiles: where they lie, their Deflate checksums."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if compression == _OLD_JPEG:  # has its own tags for where it lies
        return ""
    tiled = _TILE_OFFSETS in tags
    offsets = tags.get(_TILE_OFFSETS if tiled else _OFFSETS)
    counts = tags.get(_TILE_COUNTS if tiled else _COUNTS)
    width, height = tags[_WIDTH], tags[_HEIGHT]
    across = tags.get(_TILE_WIDTH, width) if tiled else width
    rows = min(tags.get(_TILE_HEIGHT, height) if tiled else tags.get(_ROWS, height), height)
    if not offsets or across < 1 or rows < 1:
        return "no strips or tiles"
    bits = tags.get(_BITS, (1,))
    planes = len(bits) if tags.get(_PLANAR, 1) == 2 else 1
    expected = math.ceil(height / rows) * math.ceil(width / across) * planes
    if len(offsets) < expected or (counts and len(counts) < expected):
        return f"{len(offsets)} strips or tiles of {expected}"
    if not counts:
        return ""
    total = path.stat().st_size
    row_bytes = math.ceil(across * sum(bits) / planes / 8)
    with path.open("rb") as file:
        for number in range(expected):
            offset, count = offsets[number], counts[number]
            last = not tiled and (number + 1) % math.ceil(height / rows) == 0
            lines = height - (math.ceil(height / rows) - 1) * rows if last else rows
            if count < 1 or offset < 8 or offset + count > total:
                return f"strip or tile {number + 1} of {expected} is not in the file"
            if compression == _RAW and count < row_bytes * lines:
                return f"strip or tile {number + 1} of {expected} is too short"
            if compression in _DEFLATE:
                file.seek(offset)
                inflate = zlib.decompressobj()
                try:
                    while not inflate.eof and (data := file.read(min(count, 1 << 20))):
                        count -= len(data)
                        while data and not inflate.eof:
                            inflate.decompress(data, 1 << 20)
                            data = inflate.unconsumed_tail
                except zlib.error as error:
                    return f"strip or tile {number + 1} of {expected}: {error}"
                if not inflate.eof:
                    return f"strip or tile {number + 1} of {expected} does not end"
    return ""


def _complaints(path: Path, offset: int, take_stderr: Callable[[], str]) -> str:
    """Return what libtiff says, warnings included, when it decodes the page at this offset.

    Pillow switches its warnings off for every decoding; hence libtiff is asked itself. Empty
    where it is built into Pillow (Windows) and can't be reached.
    """
    library = _libtiff()
    if library is None:
        return ""
    tiff, handler = library
    tiff.TIFFSetWarningHandler(handler)
    take_stderr()
    file = tiff.TIFFOpen(str(path.absolute()).encode("utf-8", "surrogateescape"), b"r")
    try:
        if not file or not tiff.TIFFSetSubDirectory(file, offset):
            return ""  # Pillow says why
        take_stderr()  # about tags: many files have some that libtiff does not know
        tiled = tiff.TIFFIsTiled(file)
        size = (tiff.TIFFTileSize if tiled else tiff.TIFFStripSize)(file)
        number = (tiff.TIFFNumberOfTiles if tiled else tiff.TIFFNumberOfStrips)(file)
        read = tiff.TIFFReadEncodedTile if tiled else tiff.TIFFReadEncodedStrip
        buffer = ctypes.create_string_buffer(max(size, 1))
        for i in range(number):
            if read(file, i, buffer, size) < 0:
                break
        return take_stderr()
    finally:
        if file:
            tiff.TIFFClose(file)


@cache
def _libtiff() -> tuple[Any, int | None] | None:
    """Load the libtiff that came with Pillow, or the system's; return it with its own handler of
    warnings, which writes them to stderr."""
    pillow = Path(PIL.__file__).parent
    candidates = [
        *(pillow.parent / "pillow.libs").glob("libtiff*"),
        *(pillow / ".dylibs").glob("libtiff*"),
        *filter(None, [ctypes.util.find_library("tiff")]),
    ]
    for candidate in candidates:
        try:
            tiff = ctypes.CDLL(str(candidate))
            handle, pointer, number = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ssize_t
            for name, result, arguments in (
                ("TIFFOpen", handle, [ctypes.c_char_p, ctypes.c_char_p]),
                ("TIFFClose", None, [handle]),
                ("TIFFSetSubDirectory", ctypes.c_int, [handle, ctypes.c_uint64]),
                ("TIFFIsTiled", ctypes.c_int, [handle]),
                ("TIFFTileSize", number, [handle]),
                ("TIFFStripSize", number, [handle]),
                ("TIFFNumberOfTiles", ctypes.c_uint32, [handle]),
                ("TIFFNumberOfStrips", ctypes.c_uint32, [handle]),
                ("TIFFReadEncodedTile", number, [handle, ctypes.c_uint32, pointer, number]),
                ("TIFFReadEncodedStrip", number, [handle, ctypes.c_uint32, pointer, number]),
                ("TIFFSetWarningHandler", handle, [handle]),
            ):
                function = getattr(tiff, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError):
            continue
        return tiff, tiff.TIFFSetWarningHandler(None)
    return None


def _first_line(text: str) -> str:
    line = " ".join(text.strip().splitlines()[:1])
    return line if len(line) <= 100 else line[:97] + "..."
