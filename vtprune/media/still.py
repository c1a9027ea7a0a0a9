"""Pictures, and the animations that only Pillow reads (WebP, AVIF), as 8-bit RGB."""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vtprune.errors import MediaError
from vtprune.media.source import Limits, Source, check_pixels, damaged, too_large, unreadable
from vtprune.process_wide import WARNINGS_OFF

# Formats that are pictures, told by their content and decoded by Pillow itself: no EPS (runs
# Ghostscript), no TGA (told from almost nothing), no stubs that open but can't load.
_FORMATS = (
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "JPEG",
    "JPEG2000",
    "PNG",
    "PPM",
    "QOI",
    "TIFF",
    "WEBP",
)
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # MPO and TIFF hold several pictures, not frames
_ORIENTATION = 274  # the EXIF tag; 5 to 8 swap width and height
_BROWSER_DELAY = 0.1  # seconds: what browsers, and FFmpeg for GIF, make of a frame that says 0
_PILLOW = threading.RLock()


@contextmanager
def _pillow(limits: Limits, partial: bool = False) -> Iterator[None]:
    """Pillow's process-wide settings, for the time of one call and one thread at a time."""
    with _PILLOW, WARNINGS_OFF:
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        # Pillow refuses from twice this number of pixels on.
        Image.MAX_IMAGE_PIXELS = limits.max_pixels / 2  # type: ignore[assignment]
        ImageFile.LOAD_TRUNCATED_IMAGES = partial
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def open_picture(path: Path, limits: Limits) -> Source | None:
    """What a picture holds, or None for no picture, and for an animation that FFmpeg reads.

    Raises:
        MediaError: for a picture above the limit, or with a broken header.
    """
    with _pillow(limits):
        image = _open(path, limits)
        if image is None:
            return None
        with image:
            check_pixels(path, *image.size, limits)
            try:
                animated = image.format in _ANIMATED and getattr(image, "is_animated", False)
                if animated and image.format in ("GIF", "PNG"):
                    return None
                if animated:
                    return _animation(path, image)
                width, height = image.size
                if _orientation(path, image) >= 5:
                    width, height = height, width
            except MemoryError:
                raise
            except Exception as error:  # Pillow's plugins raise nearly anything on broken headers
                raise damaged(path, f"the picture is damaged ({_reason(error)})", limits) from error
            return Source(
                path, "image", width, height, 1, (), 0.0, 0.0, "pillow", (), _pictures=(path,)
            )


def picture(path: Path, limits: Limits) -> tuple[torch.Tensor, tuple[str, ...]]:
    """One picture upright, as (H, W, 3) uint8 RGB, and the warnings.

    Raises:
        MediaError: for a picture that doesn't decode to its end, unless the limits allow a part of
        it.
    """
    try:
        return _decode(path, limits, partial=False), ()
    except MediaError:
        if not limits.allow_partial:
            raise
    return _decode(path, limits, partial=True), (
        f"{path.name}: damaged, only a part of the picture is there",
    )


def animation(
    source: Source, index: list[int], limits: Limits, problems: list[str]
) -> Iterator[tuple[int, torch.Tensor]]:
    """The frames `index` (ascending) of an animation, each (H, W, 3) uint8 RGB.

    Warnings go to `problems`.
    """
    with _pillow(limits):
        image = _open(source.path, limits)
    assert image is not None, "a source is opened before it is read"
    with image:
        for i in index:
            try:
                with _pillow(limits):
                    image.seek(i)
                    frame = _to_rgb(image)
            except MemoryError:
                raise
            except Exception as error:
                if limits.allow_partial:
                    name = source.path.name
                    problems.append(f"{name}: damaged, frames from {i} on do not decode")
                    return
                reason = f"frame {i} does not decode ({_reason(error)})"
                raise damaged(source.path, reason, limits) from error
            yield i, frame


def _open(path: Path, limits: Limits) -> Image.Image | None:
    try:
        return Image.open(path.absolute(), formats=_FORMATS)
    except UnidentifiedImageError as error:
        with path.open("rb") as file:
            if not file.read(8).startswith(_SIGNATURES):
                return None
        raise unreadable(path, "a picture with a damaged header, or of an unknown kind") from error
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise too_large(
            path, f"{int(pixels[0]):,}" if pixels else "a picture of too many", limits
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        raise damaged(path, f"the picture is damaged ({_reason(error)})", limits) from error


def _decode(path: Path, limits: Limits, partial: bool) -> torch.Tensor:
    with _pillow(limits, partial):
        image = _open(path, limits)
        if image is None:
            raise damaged(path, "the picture is damaged", limits)
        with image:
            check_pixels(path, *image.size, limits)
            try:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image)
            except MemoryError:
                raise
            except Exception as error:
                raise damaged(path, f"the picture is damaged ({_reason(error)})", limits) from error


def _to_rgb(image: Image.Image) -> torch.Tensor:
    """Any mode as (H, W, 3) uint8 RGB: transparency on white, deeper pixels scaled, not clipped."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image.convert("RGBA"))
        image = paper
    return torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """A greyscale picture of 16 or 32 bits, or of floats, as 8 bits.

    The range is the format's where it is known: 0 to 65535 for whole numbers that fit, 0 to 1 or 0
    to 255 for floats that fit. Otherwise it is the picture's own.
    """
    pixels = np.nan_to_num(np.asarray(image).astype(np.float32))
    low, high = float(pixels.min()), float(pixels.max())
    ranges = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    if low >= 0 and high <= ranges[-1]:
        low, high = 0.0, next(top for top in ranges if high <= top)
    if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # type: ignore[attr-defined]
        low, high = (
            high,
            low,
        )  # PhotometricInterpretation 0: white is zero; Pillow inverts only 8 bits itself
    scaled = (pixels - low) / ((high - low) or 1.0) * 255
    grey = Image.fromarray(np.rint(scaled).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return grey


def _orientation(path: Path, image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, without decoding a PNG (as Pillow does for late chunks)."""
    told = {"exif", "Raw profile type exif", "xmp"} & image.info.keys()
    if image.format == "PNG" and not told and not _has_chunk(path, b"eXIf"):
        return 1
    return int(image.getexif().get(_ORIENTATION, 1))


def _has_chunk(path: Path, name: bytes) -> bool:
    """Whether a PNG has a chunk of this name, by its chunk headers alone."""
    with path.open("rb") as file:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            if header[4:] == name:
                return True
            file.seek(int.from_bytes(header[:4], "big") + 4, 1)
    return False


def _animation(path: Path, image: Image.Image) -> Source:
    seconds = [time or _BROWSER_DELAY for time in _durations(path, image)]
    timestamps = tuple(float(time) for time in np.cumsum([0.0, *seconds[:-1]]))
    total = float(sum(seconds))
    count = len(seconds)
    return Source(path, "video", *image.size, count, timestamps, count / total, total, "pillow", ())


def _durations(path: Path, image: Image.Image) -> list[float]:
    """Seconds of each frame: of WebP from its chunk headers, of AVIF (rare) by decoding."""
    if image.format != "WEBP":
        seconds = []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            image.load()
            seconds.append(float(image.info.get("duration", 0)) / 1000)
        return seconds
    seconds = []
    with path.open("rb") as file:
        file.seek(12)  # RIFF, size, WEBP
        while len(header := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", header)
            start = file.tell()
            if name == b"ANMF":  # x, y, width, height, duration (3 bytes each, ms), flags
                seconds.append(int.from_bytes(file.read(15)[12:], "little") / 1000)
            file.seek(start + size + size % 2)
    count = getattr(image, "n_frames", 1)
    return (seconds + [0.0] * count)[:count]


def _reason(error: Exception) -> str:
    """What Pillow says, on one line and not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 100 else text[:97] + "..."
