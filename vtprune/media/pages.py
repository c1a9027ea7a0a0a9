"""The pages of PDF, TIFF and JPEG 2000 files, each a picture; decoded in the child process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtprune.errors import DamagedError, MediaError
from vtprune.media.child_process import CHILDREN, Call, Caller, ChildFailedError, Pixels, run_to_end
from vtprune.media.file_type import FileType
from vtprune.media.source import Limits, Source, damaged, picture_source, printable

_SECONDS = 15  # of one answer, and of every
_PIXELS_A_SECOND = 10_000_000
_MEMORY = 1 << 30  # bytes that the child may take beside its pictures
_BYTES_A_PIXEL = 16
_TOTAL = 10  # pages together may have this many times the pixels of the largest one


def open_pages(path: Path, file_type: FileType, limits: Limits) -> list[Source]:
    """Return what a PDF, TIFF or JPEG 2000 file holds: a picture a page.

    Raises:
        MediaError: it can't be read, a page is above the limit, or there are too many of them.
    """
    _, (sizes, count) = _run("list_pages", path, (path, file_type.formats[0], limits), 0)
    pixels = sum(width * height for _, width, height in sizes)
    if pixels > _TOTAL * limits.max_pixels:
        raise MediaError(
            f"{printable(path)}: {len(sizes)} pages of together {pixels:,} pixels are over the "
            f"limit of {_TOTAL * limits.max_pixels:,}",
            "choose fewer with --pages",
        )
    decoder = "pdfium" if file_type.formats == ("PDF",) else "pillow"
    return [
        picture_source(path, width, height, decoder, page=number if count > 1 else 0)
        for number, width, height in sizes
    ]


def read_page(
    source: Source, file_type: FileType, limits: Limits
) -> tuple[Pixels, tuple[str, ...]]:
    """Return one page upright, (H, W, 3) RGB, and the warnings.

    Raises:
        MediaError: a page that doesn't decode, unless the limits allow a part of it.
    """
    arguments = (source.path, file_type.formats[0], source.page or 1, limits)
    pixels, warnings = _run("decode_page", source.path, arguments, source.width * source.height)
    if pixels is None or pixels.shape != (source.height, source.width, 3):
        raise damaged(source.path, "the file has changed since it was opened", limits)
    return pixels, warnings


def stop_reading() -> None:
    """End what is read of pages: threads that wait for it get a MediaError at once."""
    CHILDREN.stop(__name__)


def _run(
    function: str, path: Path, arguments: tuple[object, ...], num_pixels: int
) -> tuple[Pixels | None, Any]:
    call = Call(
        f"{__name__}:{function}",
        arguments,
        memory=_MEMORY + _BYTES_A_PIXEL * num_pixels,
        seconds=_SECONDS + num_pixels // _PIXELS_A_SECOND,
    )
    try:
        return run_to_end(call)
    except ChildFailedError as error:
        again = "copy or download it again, or convert it, for example to PNG"
        raise DamagedError(f"{printable(path)}: {error}", again) from error


# The child's side.


def list_pages(
    caller: Caller, path: Path, file_format: str, limits: Limits
) -> tuple[list[tuple[int, int, int]], int]:
    """Return number, width and height of the wanted pages, and how many there are."""
    if file_format == "PDF":
        from vtprune.media import pdf

        return pdf.list_pages(path, limits)
    if file_format == "TIFF":
        from vtprune.media import tiff

        return tiff.list_pages(path, limits)
    from vtprune.media import still

    source = still.open_picture(path, (file_format,), limits)
    assert source is not None, "a still picture"
    size = source.width, source.height
    return [(number, *size) for number in limits.select_pages(path, 1)], 1


def decode_page(
    caller: Caller, path: Path, file_format: str, number: int, limits: Limits
) -> tuple[str, ...]:
    """Send the pixels of a page; return the warnings."""
    if file_format == "PDF":
        from vtprune.media import pdf

        with pdf.draw(path, number, limits) as pixels:
            caller.send(number, pixels.shape, [pixels])
            blank = bool(pixels.min() == 255)
        return (f"{path.name}: nothing is drawn on page {number}: all of it is white",) * blank
    if file_format == "TIFF":
        from vtprune.media import tiff

        return tiff.send_page(caller, path, number, limits)
    from vtprune.media import still

    pixels, warnings = still.picture(path, (file_format,), limits)
    caller.send(number, pixels.shape, [pixels])
    return warnings
