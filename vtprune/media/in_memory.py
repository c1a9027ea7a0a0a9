"""Media that are no files: pictures, arrays, clips, bytes and open files, made sources like files.

Pictures and arrays are read where they lie. Bytes and open files are of strangers, as files are:
they are written to a temporary file, and read by the same decoders under the same limits. The file
is removed when its source is no longer used.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from vtprune.errors import MediaError, quote
from vtprune.media import still
from vtprune.media.child_process import Pixels
from vtprune.media.source import AskedMedia, Limits, MediaGroup, Source, Stored, check_pixels

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeIs

Picture: TypeAlias = "Image.Image | npt.NDArray[np.uint8] | torch.Tensor"
"""A Pillow picture, or an array (H, W, 3) of uint8."""

_BLOCK = 1 << 20
_KINDS = (
    "a path, a Pillow picture, bytes, an open file, an array (T, H, W, 3) or (H, W, 3), or Clip"
)


@dataclass(frozen=True, eq=False)
class Clip:
    """A video in memory: frames, and how many of them are shown in a second.

    >>> import vtprune
    >>> clip = vtprune.Clip(frames, fps=25)  # frames: (T, H, W, 3) uint8, or a list of pictures
    >>> report = vtprune.ask(None, clip, "what moves?")

    Args:
        frames: an array (T, H, W, 3) of uint8, or Pillow pictures or arrays (H, W, 3) of one size.
        fps: frames a second.

    Raises:
        MediaError: no frames, or frames a second that are no number above 0.
    """

    frames: npt.NDArray[np.uint8] | torch.Tensor | Sequence[Picture]
    fps: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.fps < float("inf"):
            raise MediaError(
                f"the frames a second of a clip are {self.fps}, but must be above 0",
                "give the rate that the frames were taken at, such as fps=25",
            )
        if not len(self.frames):
            raise MediaError("the clip has no frames", "give one or more")


Medium: TypeAlias = "str | AskedMedia | Clip | Picture | bytes | bytearray | memoryview | BinaryIO"
"""One media item: a path, or what is in memory."""


def media_list(media: object) -> list[Medium]:
    """Return one media item, or several in a list or tuple, as a list.

    Raises:
        MediaError: anything in it that is no media item, or nothing in it.
    """
    items: list[Any] = list(media) if isinstance(media, (list, tuple)) else [media]
    if not items:
        raise MediaError(
            "the list of media is empty, but a question needs at least one item",
            "give a picture or a video, or several in a list",
        )
    for item in items:
        if isinstance(item, (list, tuple)):
            raise MediaError(
                "the media hold a list inside a list",
                "frames of one video are vtprune.Clip(frames, fps=25)",
            )
        if not is_medium(item):
            raise MediaError(
                f"the media hold {quote(item)}, which is neither a picture nor a video",
                f"give {_KINDS}, a Clip, or several in a list",
            )
    return items


def is_medium(item: object) -> bool:
    """Return whether an object may be a media item, by its type."""
    kinds = (str, Path, Source, Stored, MediaGroup, Clip, Image.Image, np.ndarray, bytes,
             bytearray, memoryview)  # fmt: skip
    return isinstance(item, kinds) or is_tensor(item) or callable(getattr(item, "read", None))


def is_tensor(item: object) -> TypeIs[torch.Tensor]:
    """Return whether an object is a tensor; torch is not imported for what can be none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(item, torch.Tensor)


def name_of(item: object) -> str:
    """Return what a media item is called before it is opened."""
    if isinstance(item, (str, Path, Source, Stored, MediaGroup)):
        return str(item)
    name = getattr(item, "filename", None) or getattr(item, "name", None)
    if isinstance(name, str) and name:
        return name
    if isinstance(item, (bytes, bytearray, memoryview)):
        return "bytes"
    is_array = isinstance(item, np.ndarray) or is_tensor(item)
    return "array" if is_array else type(item).__name__.lower()


# -- pictures and arrays ---------------------------------------------------------------------------


def open_pixels(item: Image.Image | npt.NDArray[np.uint8] | torch.Tensor | Clip, limits: Limits) \
        -> Source:  # fmt: skip
    """Return a picture, an array or a clip as a source, which holds it and does not copy it.

    Raises:
        MediaError: values of another type or shape, frames of different sizes, or a picture above
            the limit.
    """
    if isinstance(item, Clip):
        frames, fps = item.frames, item.fps
        return _video(frames if isinstance(frames, Sequence) else _array(frames), fps, limits)
    if isinstance(item, Image.Image):
        return _picture(item, limits)
    pixels = _array(item)
    if pixels.ndim == 4:
        return _video(pixels, 1.0, limits)
    return _picture(pixels, limits)


def _picture(pixels: Image.Image | Pixels, limits: Limits) -> Source:
    width, height = _size("the picture", pixels, limits)
    name = getattr(pixels, "filename", "")
    label = name if isinstance(name, str) and name else f"picture-{_digest([pixels], limits)}"
    return Source(
        Path(label), "image", width, height, 1, (), 0.0, 0.0, "memory", (), label=label,
        _frames=(pixels,),
    )  # fmt: skip


def _video(frames: Sequence[Picture] | Pixels, fps: float, limits: Limits) -> Source:
    pictures = [frame if isinstance(frame, Image.Image) else _array(frame) for frame in frames]
    if not pictures:
        raise MediaError("the array has no frames", "give one or more")
    sizes = [_size(f"frame {number}", frame, limits) for number, frame in enumerate(pictures)]
    other = next((number for number, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        raise MediaError(
            f"frame {other} is {sizes[other][0]} x {sizes[other][1]}, but frame 0 is "
            f"{sizes[0][0]} x {sizes[0][1]}: the frames of a video have one size",
            "resize them; pictures that are no video are given in a list, without Clip",
        )
    label = f"video-{_digest(pictures, limits)}"
    times = tuple(number / fps for number in range(len(pictures)))
    return Source(
        Path(label), "video", *sizes[0], len(pictures), times, fps, len(pictures) / fps, "memory",
        (), label=label, _frames=tuple(pictures),
    )  # fmt: skip


def _array(value: object) -> Pixels:
    """Return an array of pixels as it is.

    Raises:
        MediaError: another type or shape.
    """
    if is_tensor(value):
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray):
        raise MediaError(
            f"{quote(value)} is no picture", "a frame is a Pillow picture or an array (H, W, 3)"
        )
    if value.dtype != np.uint8:
        raise MediaError(
            f"an array of {value.dtype}, but pixels are uint8 from 0 to 255",
            "scale and cast it: (255 * array).round().clip(0, 255).astype('uint8')",
        )
    if value.ndim not in (3, 4) or value.shape[-1] != 3 or 0 in value.shape:
        hint = "a picture is (H, W, 3), a video (T, H, W, 3), in the order red, green, blue"
        if value.ndim in (3, 4) and value.shape[-3] == 3:
            hint = "channels come last: " + (
                "array.transpose(1, 2, 0)" if value.ndim == 3 else "array.transpose(0, 2, 3, 1)"
            )
        raise MediaError(f"an array of shape {tuple(value.shape)} is no picture and no video", hint)
    return cast("Pixels", value)


def _size(name: str, pixels: Image.Image | Pixels, limits: Limits) -> tuple[int, int]:
    """Return width and height as displayed."""
    if not isinstance(pixels, Image.Image):
        if pixels.ndim != 3:
            raise MediaError(
                f"{name} is an array of shape {pixels.shape}", "a frame is (H, W, 3) of uint8"
            )
        height, width = pixels.shape[:2]
        check_pixels(name, width, height, limits)
        return width, height
    width, height = pixels.size
    if width < 1 or height < 1:
        raise MediaError(f"{name} is {width} x {height}: it has no pixels", "give another")
    check_pixels(name, width, height, limits)
    if getattr(pixels, "is_animated", False) and pixels.format != "MPO":
        raise MediaError(
            f"{name} has {getattr(pixels, 'n_frames', 2)} frames or pages",
            "give its path or bytes for all of them, or picture.copy() for the one that it is at",
        )
    with still.decoding(name, limits):
        turned = still.exif_orientation(pixels) >= 5
    return (height, width) if turned else (width, height)


def _digest(pictures: Sequence[Image.Image | Pixels], limits: Limits) -> str:
    """Return a few digits that tell pictures from others."""
    digest = hashlib.blake2b(digest_size=8)
    for picture in pictures:
        if isinstance(picture, Image.Image):
            with still.decoding("the picture", limits):
                digest.update(f"{picture.mode} {picture.size}".encode())
                digest.update(picture.tobytes())
        else:
            digest.update(str(picture.shape).encode())
            digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()


def read_pixels(
    source: Source, index: list[int], limits: Limits, problems: list[str]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the frames `index` of a source in memory, (H, W, 3) uint8 RGB, each a copy."""
    import torch

    for number in index:
        frame = source._frames[number]
        if isinstance(frame, Image.Image):
            pixels, notes = still.upright(source.name, frame, limits)
            problems.extend(f"{source.name}: {note}" for note in notes)
        else:
            pixels = np.array(frame, order="C")
        yield number, torch.from_numpy(pixels)


# -- bytes and open files --------------------------------------------------------------------------


class HeldFile:
    """A temporary file, alone in its folder; both are removed when nobody refers to it any more.

    Its label tells what it holds from other content.
    """

    def __init__(self, name: str) -> None:
        folder = tempfile.mkdtemp(prefix="vtprune-")
        self.path = Path(folder, name)
        self.label = name
        self.remove = weakref.finalize(self, _remove, folder, str(self.path))


def _remove(folder: str, path: str) -> None:
    for remove, name in ((os.unlink, path), (os.rmdir, folder)):
        try:
            remove(name)
        except OSError:
            return


def hold(item: Stored | bytes | bytearray | memoryview | BinaryIO, limits: Limits) -> HeldFile:
    """Write bytes, or what an open file holds from its start on, to a temporary file.

    Raises:
        MediaError: nothing in it, more than the limit, a file that is closed or of text, or no room
            on disk.
    """
    if isinstance(item, Stored):
        return _write(item.name, iter([item.load()]), limits, item.name)
    if isinstance(item, (bytes, bytearray, memoryview)):
        return _write("bytes", iter([bytes(item)]), limits, None)
    named = getattr(item, "name", None)
    return _write(name_of(item), _blocks(item), limits, named if isinstance(named, str) else None)


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """Yield what an open file holds, from its start on where it can go back there."""
    name = name_of(file)
    try:
        place = file.tell() if file.seekable() else None
        if place is not None:
            file.seek(0)
        while block := file.read(_BLOCK):
            if not isinstance(block, bytes):
                raise MediaError(
                    f"{name}: the file is opened as text", "open it as bytes: open(path, 'rb')"
                )
            yield block
        if place is not None:
            file.seek(place)
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise MediaError(f"{name}: can't be read: {error}", "open it again") from error


def _write(name: str, blocks: Iterator[bytes], limits: Limits, named: str | None) -> HeldFile:
    """Write blocks of bytes to a temporary file, at most as many as the limits allow.

    Args:
        named: its label; None for one made of its content.
    """
    stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in Path(name).name)[-60:]
    size, digest = 0, hashlib.blake2b(digest_size=8)
    try:
        held = HeldFile(stem.lstrip("._") or "media")
        with held.path.open("wb") as file:
            for block in blocks:
                size += len(block)
                if size > limits.max_bytes:
                    raise MediaError(
                        f"{name}: more than the limit of {limits.max_bytes:,} bytes",
                        "save it to a file first, and give its path",
                    )
                file.write(block)
                digest.update(block)
    except OSError as error:
        raise MediaError(
            f"{name}: can't be kept on disk: {error.strerror or error}",
            "make room in the system's folder for temporary files, or give the path of a file",
        ) from error
    if not size:
        raise MediaError(f"{name}: it holds no bytes", "give a picture or a video")
    held.label = f"{name}-{digest.hexdigest()}" if named is None else named
    return held


def with_held(source: Source, held: HeldFile) -> Source:
    """Return the source of a temporary file, which keeps the file for as long as it is used."""
    return replace(source, label=held.label, _held=held)


@contextmanager
def naming(held: HeldFile | None) -> Iterator[None]:
    """Leave the temporary folder out of what errors say of a file."""
    try:
        yield
    except MediaError as error:
        if held is None:
            raise
        message = error.message.replace(f"{held.path.parent}{os.sep}", "")
        raise type(error)(message, error.hint) from error
