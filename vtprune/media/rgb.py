"""Decoded pictures of any kind of pixels, as rows of 8-bit RGB."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vtprune.errors import MediaError

Rows = npt.NDArray[np.uint8]
"""Some rows of a picture, (rows, W, 3)."""

_BAND_PIXELS = 1 << 20  # converted at once
_BITS = (8, 10, 12, 14, 16)  # of grey values that are stored in 16
_INVERTED = 262  # PhotometricInterpretation, the TIFF tag; 0: white is zero
_BITS_PER_SAMPLE = 258  # the TIFF tag


@dataclass(frozen=True)
class Converted:
    """A picture as 8-bit RGB.

    Args:
        rows: from the top to the bottom, converted as they are asked for.
        warnings: what a user should know of how deep values were scaled; without the file's name.
    """

    rows: Iterator[Rows]
    warnings: tuple[str, ...] = ()


def bits_of(image: Image.Image) -> int:
    """Return the bits of a colour as the file states them; asked before the pixels are decoded."""
    if image.format == "TIFF":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (8,))  # type: ignore[attr-defined]
        return int(max(bits)) if isinstance(bits, tuple) and bits else 8
    tile = getattr(image, "tile", None)
    if image.format == "PNG" and tile and ";16B" in str(tile[0][3]):
        return 16
    return 16 if image.mode.startswith("I") else 8


def to_rgb(name: str, image: Image.Image, bits: int) -> Converted:
    """Convert a decoded picture: transparency on white, deeper pixels scaled and not clipped.

    Args:
        name: of the picture, for errors.
        bits: of a colour, as `bits_of` says.

    Raises:
        MediaError: 16-bit colours that use a few bits only; no values at all.
    """
    if image.mode.startswith("I") or image.mode == "F":
        scale, warnings = _grey_scale(name, image, bits)
        return Converted(map(scale, _bands(image)), warnings)
    if bits == 16:
        _check_colours(name, image)
    if image.mode == "LAB":
        return Converted(_rows(image, _lab_to_rgb))
    if image.has_transparency_data:
        return Converted(_rows(image, _on_white))
    return Converted(_rows(image, lambda band: band.convert("RGB")))


def _bands(image: Image.Image) -> Iterator[Image.Image]:
    """Cut the picture into bands, so that memory never holds it twice."""
    width, height = image.size
    step = max(1, _BAND_PIXELS // width)
    for top in range(0, height, step):
        yield image.crop((0, top, width, min(top + step, height)))


def _rows(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Iterator[Rows]:
    return (np.asarray(convert(band)) for band in _bands(image))


def _on_white(band: Image.Image) -> Image.Image:
    paper = Image.new("RGBA", band.size, "white")
    paper.alpha_composite(band.convert("RGBA"))
    return paper.convert("RGB")


def _lab_to_rgb(band: Image.Image) -> Image.Image:
    """Convert CIE L*a*b* (D50) to sRGB, which Pillow's `convert` does not do."""
    from PIL import ImageCms

    converted = ImageCms.applyTransform(band, _lab_transform())
    assert converted is not None, "not in place"
    return converted


@cache
def _lab_transform() -> Any:  # ImageCmsTransform; a Pillow without LittleCMS lacks the module
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")


def _check_colours(name: str, image: Image.Image) -> None:
    """Refuse 16-bit colours of which Pillow, which keeps the upper 8 bits, keeps next to nothing.

    Raises:
        MediaError: all of them are below 4,096.
    """
    extrema = image.getextrema()
    if not isinstance(extrema[0], tuple):
        extrema = (extrema,)  # type: ignore[assignment]
    colours = extrema[:1] if image.mode == "LA" else extrema[:3]
    top = max(int(high) for _, high in colours)  # type: ignore[misc]
    if 0 < top < 16:
        raise MediaError(
            f"{name}: its 16-bit colours are all below {(top + 1) * 256:,} of 65,535: they seem to "
            "use 12 bits or fewer, and would be nearly black",
            "scale them to 16 bits, or convert the picture to 8 bits",
        )


def _grey_scale(
    name: str, image: Image.Image, bits: int
) -> tuple[Callable[[Image.Image], Rows], tuple[str, ...]]:
    """Choose how grey values of more than 8 bits become 8 bits.

    Whole numbers from 0 to 65,535 have the range of the bits that the file states, or, where it
    states 16, of the fewest that hold its largest value: 8, 10, 12, 14 or 16. Floats have 0 to 1,
    or 0 to 255, where they fit. All others have the range from their least to their largest value.
    """
    low, high = _extremes(image)
    if not low <= high:
        raise MediaError(f"{name}: none of its pixels has a value", "check the file")
    warnings: tuple[str, ...] = ()
    tops = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    if low >= 0 and high <= tops[-1]:
        low, top = 0.0, next(top for top in tops if high <= top)
        if image.mode != "F":
            used = next(number for number in _BITS if high < 2**number)
            used = bits if bits in range(9, 16) else used if high else 16
            top = 2.0**used - 1
            if used < min(bits, 16):
                warnings = (
                    f"16-bit grey values, but none above {high:,.0f}: read as {used} bits, "
                    f"{top:,.0f} is white",
                )
    else:
        top = high
        warnings = (
            f"grey values from {low:g} to {high:g}: the least is shown black, the largest white",
        )
    black, white = low, top
    if image.format == "TIFF" and image.tag_v2.get(_INVERTED) == 0:  # type: ignore[attr-defined]
        black, white = top, low  # Pillow inverts only 8 bits itself

    def to_grey(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        values = np.nan_to_num(values.astype(np.float32), posinf=top, neginf=low)
        scaled = (values - black) / ((white - black) or 1.0) * 255
        return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)

    table = to_grey(np.arange(65536)) if image.mode != "F" and low == 0 and top < 65536 else None
    clear = image.info.get("transparency")

    def scale(band: Image.Image) -> Rows:
        values = np.asarray(band)
        grey = to_grey(values) if table is None else table[values]
        if isinstance(clear, int):
            grey = np.where(values == clear, np.uint8(255), grey)
        return np.repeat(grey[..., None], 3, axis=2)

    return scale, warnings


def _extremes(image: Image.Image) -> tuple[float, float]:
    """Return the least and the largest value, of those that are numbers."""
    low, high = np.inf, -np.inf
    for band in _bands(image):
        values = np.asarray(band)
        if image.mode == "F":
            values = values[np.isfinite(values)]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    return low, high
