"""PDF pages, drawn by PDFium. It runs in the child process alone: PDFium is C++, and may crash."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vtprune.errors import DamagedError, MediaError
from vtprune.media.source import Limits, printable

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument

_POINTS = 72  # an inch
_PASSWORD = 4  # PDFium's FPDF_ERR_PASSWORD


def list_pages(path: Path, limits: Limits) -> tuple[list[tuple[int, int, int]], int]:
    """Return number, width and height in pixels of the wanted pages, and how many there are.

    Raises:
        MediaError: no PDF, a password, too many pages, or one above the limit of pixels.
    """
    with _opened(path) as document:
        count = len(document)
        return [
            (number, *_size(path, document, number, limits))
            for number in limits.select_pages(path, count)
        ], count


@contextmanager
def draw(path: Path, number: int, limits: Limits) -> Iterator[npt.NDArray[np.uint8]]:
    """Draw one page on white, (H, W, 3) RGB; the pixels are there inside the block."""
    with _opened(path) as document:
        width, height = _size(path, document, number, limits)
        try:
            document.init_forms()  # else what is filled in is not drawn
            page = document[number - 1]
            bitmap = page.render(scale=limits.dpi / _POINTS, rev_byteorder=True)
            pixels = bitmap.to_numpy()[:, :, :3]  # (H, W, 3)
        except Exception as error:
            raise DamagedError(
                f"{printable(path)}: page {number} can't be drawn ({error})",
                "save the PDF anew with another program, or give pictures of its pages",
            ) from error
        if pixels.shape != (height, width, 3):
            raise DamagedError(
                f"{printable(path)}: page {number} has two sizes", "save the PDF anew"
            )
        yield pixels


@contextmanager
def _opened(path: Path) -> Iterator[PdfDocument]:
    try:
        from pypdfium2 import PdfDocument, PdfiumError
    except ImportError as error:
        raise MediaError(
            f"{printable(path)}: reading PDF pages needs pypdfium2",
            "pip install 'vtprune[pdf]', or give pictures of the pages",
        ) from error
    try:
        document = PdfDocument(path.absolute())
    except PdfiumError as error:
        code = getattr(error, "err_code", None)
        if code == _PASSWORD or "password" in str(error).lower():
            raise MediaError(
                f"{printable(path)}: the PDF asks for a password",
                "save it without one, or give pictures of its pages",
            ) from error
        raise DamagedError(
            f"{printable(path)}: the PDF is damaged, or has no pages", "copy or download it again"
        ) from error
    try:
        yield document
    finally:
        document.close()


def _size(path: Path, document: PdfDocument, number: int, limits: Limits) -> tuple[int, int]:
    """The width and height of a page in pixels, before anything of it is drawn."""
    try:
        points = document.get_page_size(number - 1)
    except Exception as error:
        raise DamagedError(
            f"{printable(path)}: page {number} is damaged ({error})", "copy or download it again"
        ) from error
    sides = [length * limits.dpi / _POINTS for length in points]
    if not all(math.isfinite(side) and side > 0 for side in sides):
        raise DamagedError(
            f"{printable(path)}: page {number} is {points[0]:g} x {points[1]:g} points",
            "save the PDF anew with another program",
        )
    width, height = (math.ceil(side) for side in sides)
    name = f"{printable(path)}: page {number} at {limits.dpi} dpi"
    if width * height > limits.max_pixels:
        raise MediaError(
            f"{name}: {width:,} x {height:,} pixels is over the limit of {limits.max_pixels:,}",
            "lower --dpi, or raise --max-pixels if you trust the file",
        )
    return width, height
