"""Pictures, and the animations that only Pillow reads (WebP, AVIF), as 8-bit RGB."""

from __future__ import annotations

import io
import logging
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from vtprune.errors import MediaError
from vtprune.media.child_process import Pixels
from vtprune.media.file_blocks import (
    MOST_CHUNKS,
    MOST_SCANS,
    boxes_end,
    count_scans,
    png_chunks,
    png_is_whole,
    png_names,
    riff_end,
    scan_gif,
)
from vtprune.media.rgb import Converted, bits_of, to_rgb
from vtprune.media.source import (
    Limits,
    Source,
    check_pixels,
    damaged,
    picture_source,
    printable,
    too_large,
    unreadable,
)
from vtprune.process_settings import WARNINGS_OFF

_ORIENTATION = 274  # the EXIF tag; 5 to 8 swap width and height
_BROWSER_DELAY = 0.1  # seconds: what browsers, and FFmpeg for GIF, make of a frame that says 0
_MOST_BYTES = 256 << 20  # bytes of a file that its decoder wants in memory at once
_PILLOW = threading.RLock()


def open_picture(path: Path, formats: tuple[str, ...], limits: Limits) -> Source | None:
    """Return what a picture holds, or None for an animation that FFmpeg reads.

    Args:
        formats: Pillow's names of what the file may be.

    Raises:
        MediaError: for a picture above the limit, or with a broken header.
    """
    if formats == ("GIF",) and scan_gif(path).num_pictures > 1:
        return None
    with decoding(printable(path), limits), open_image(path, formats) as image:
        check_pixels(path, *image.size, limits)
        animated = image.format in ("PNG", "WEBP", "AVIF") and getattr(image, "is_animated", False)
        if animated and image.format == "PNG":
            return None
        width, height = image.size
        if orientation(path, image) >= 5:
            width, height = height, width
        if animated:
            return _animation(path, image, width, height)
        return picture_source(path, width, height, "pillow")


def picture(path: Path, formats: tuple[str, ...], limits: Limits) -> tuple[Pixels, tuple[str, ...]]:
    """Return one picture upright, and the warnings.

    Raises:
        MediaError: for a picture that doesn't decode to its end, unless the limits allow a part of
            it.
    """
    try:
        return _decode(path, formats, limits, partial=False)
    except MediaError:
        if not limits.allow_partial:
            raise
    pixels, notes = _decode(path, formats, limits, partial=True)
    return pixels, (f"{path.name}: damaged, only a part of the picture is there", *notes)


def animation(
    source: Source, formats: tuple[str, ...], index: list[int], limits: Limits, problems: list[str]
) -> Iterator[tuple[int, Pixels]]:
    """Yield the frames `index` (ascending) of an animation, upright; warnings go to `problems`."""
    name = printable(source.path)
    with decoding(name, limits):
        image = open_image(source.path, formats)
        orientation_tag = orientation(source.path, image)
    with image:
        for i in index:
            try:
                with decoding(f"{name}: frame {i}", limits):
                    image.seek(i)
                    frame = _fill(to_rgb(name, image, 8), image.size, orientation_tag)
            except MediaError:
                if not limits.allow_partial:
                    raise
                problems.append(f"{source.path.name}: damaged, frames from {i} on do not decode")
                return
            yield i, frame


@contextmanager
def decoding(name: str, limits: Limits, partial: bool = False) -> Iterator[None]:
    """Set Pillow's process-wide settings for one call, by one thread at a time.

    Pillow's plugins raise nearly anything on broken files; here it all becomes a MediaError.

    Args:
        name: what is decoded, for the error.
        partial: give what decodes of a damaged picture.
    """
    logger, silent = logging.getLogger("PIL"), logging.NullHandler()
    with _PILLOW, WARNINGS_OFF:
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        # Pillow refuses from twice this number of pixels on.
        Image.MAX_IMAGE_PIXELS = limits.max_pixels / 2  # type: ignore[assignment]
        ImageFile.LOAD_TRUNCATED_IMAGES = partial
        logger.addHandler(silent)  # else what it logs goes to stderr where nobody listens
        try:
            yield
        except MediaError:
            raise
        except UnidentifiedImageError as error:
            reason = "a picture with a damaged header, or of an unknown kind"
            raise unreadable(name, reason) from error
        except Image.DecompressionBombError as error:
            pixels = re.search(r"\d+", str(error))
            count = f"{int(pixels[0]):,}" if pixels else "a picture of too many"
            raise too_large(name, count, limits) from error
        except MemoryError as error:
            raise MediaError(
                f"{name}: the picture takes more memory than there is", "scale it down first"
            ) from error
        except Exception as error:
            raise damaged(name, f"the picture is damaged ({_reason(error)})", limits) from error
        finally:
            logger.removeHandler(silent)
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def open_image(path: Path, formats: tuple[str, ...]) -> Image.Image:
    """Open a picture by Pillow, which then sees no more of the file than belongs to it.

    Raises:
        MediaError: a format that this Pillow lacks, or a file that is too large for it.
    """
    Image.preinit()
    if not set(formats) & set(Image.OPEN):
        Image.init()
    if not set(formats) & set(Image.OPEN):  # AVIF before Pillow 11.3, or built without it
        raise MediaError(
            f"{printable(path)}: this Pillow reads no {formats[0]} pictures",
            "update Pillow (pip install -U pillow), or convert the picture to PNG",
        )
    return Image.open(_content(path, formats[0]), formats=formats)


def _content(path: Path, file_format: str) -> Path | io.BytesIO:
    """Return the file; of formats whose decoder reads whole files, the bytes up to their end."""
    total = path.stat().st_size
    with path.open("rb") as file:
        if file_format == "WEBP":
            end = riff_end(file.read(12), total)
        elif file_format == "AVIF":
            end = boxes_end(path)
        elif file_format == "GIF":
            end = scan_gif(path).end
        else:
            if file_format == "PNG" and len(png_chunks(file)) == MOST_CHUNKS:
                raise MediaError(
                    f"{printable(path)}: over {MOST_CHUNKS - 1:,} chunks", "save it anew"
                )
            return path.absolute()
        if end > _MOST_BYTES:
            raise MediaError(
                f"{printable(path)}: {end:,} bytes are over the limit of {_MOST_BYTES:,} for "
                f"{file_format}",
                "convert it to PNG or JPEG",
            )
        file.seek(0)
        return io.BytesIO(file.read(end))


def orientation(path: Path, image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; no PNG is decoded for it, as Pillow does."""
    exif_keys = {"exif", "Raw profile type exif", "xmp"} & image.info.keys()
    if image.format == "PNG" and not exif_keys and b"eXIf" not in png_names(path):
        return 1
    return exif_orientation(image)


def _decode(
    path: Path, formats: tuple[str, ...], limits: Limits, partial: bool
) -> tuple[Pixels, tuple[str, ...]]:
    name = printable(path)
    with decoding(name, limits, partial), open_image(path, formats) as image:
        check_pixels(path, *image.size, limits)
        if formats == ("JPEG",) and count_scans(path) > MOST_SCANS:
            raise MediaError(
                f"{name}: more than {MOST_SCANS} scans, each over the whole picture",
                "convert it to PNG",
            )
        if image.format == "PNG" and not (partial or png_is_whole(path)):
            raise damaged(name, "the picture is damaged (a wrong checksum)", limits)
        bits = bits_of(image)
        image.load()
        converted = to_rgb(name, image, bits)
        notes = tuple(f"{path.name}: {note}" for note in converted.warnings)
        return _fill(converted, image.size, orientation(path, image)), notes


def upright(name: str, image: Image.Image, limits: Limits) -> tuple[Pixels, tuple[str, ...]]:
    """Return a picture in memory as upright RGB, (H, W, 3), and the warnings, without its name."""
    with decoding(name, limits):
        bits = bits_of(image)
        image.load()
        converted = to_rgb(name, image, bits)
        return _fill(converted, image.size, exif_orientation(image)), converted.warnings


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8."""
    value = image.getexif().get(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _fill(converted: Converted, size: tuple[int, int], orientation_tag: int) -> Pixels:
    """Return the rows of a picture as one array, turned upright as they are written into it."""
    width, height = size
    pixels = np.empty((width, height, 3) if orientation_tag >= 5 else (height, width, 3), np.uint8)
    stored = _as_stored(pixels, orientation_tag)
    top = 0
    for rows in converted.rows:
        stored[top : top + len(rows)] = rows
        top += len(rows)
    return pixels


def _as_stored(pixels: Pixels, orientation_tag: int) -> Pixels:
    """Return an upright picture as a file with this EXIF orientation stores it, as a view."""
    if orientation_tag in (5, 7):
        pixels = pixels.transpose(1, 0, 2)
    if orientation_tag in (6, 8):
        pixels = np.rot90(pixels, 1 if orientation_tag == 6 else -1)
    if orientation_tag in (3, 4, 7):
        pixels = pixels[::-1]
    if orientation_tag in (2, 3, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _animation(path: Path, image: Image.Image, width: int, height: int) -> Source:
    seconds = [time or _BROWSER_DELAY for time in _durations(path, image)]
    timestamps = tuple(float(time) for time in np.cumsum([0.0, *seconds[:-1]]))
    total = float(sum(seconds))
    count = len(seconds)
    return Source(
        path, "video", width, height, count, timestamps, count / total, total, "pillow", ()
    )


def _durations(path: Path, image: Image.Image) -> list[float]:
    """Return each frame's seconds: of WebP from its chunk headers, of AVIF (rare) by decoding."""
    count = getattr(image, "n_frames", 1)
    if image.format != "WEBP":
        seconds = []
        for i in range(count):
            image.seek(i)
            image.load()
            seconds.append(float(image.info.get("duration", 0)) / 1000)
        return seconds
    seconds = []
    with path.open("rb") as file:
        end = riff_end(file.read(12), path.stat().st_size)
        while len(seconds) < count and file.tell() < end and len(header := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", header)
            start = file.tell()
            if name == b"ANMF":  # x, y, width, height, duration (3 bytes each, ms), flags
                seconds.append(int.from_bytes(file.read(15)[12:], "little") / 1000)
            file.seek(start + size + size % 2)
    return seconds + [0.0] * (count - len(seconds))


def _reason(error: Exception) -> str:
    """Return Pillow's message on one line, not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 100 else text[:97] + "..."
