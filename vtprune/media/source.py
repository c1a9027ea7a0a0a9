"""A media file as a source of frames: its path, what it holds, and how much of it may be read."""

from __future__ import annotations

import os
import re
import reprlib
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from vtprune.errors import DamagedError, MediaError, path_fault, path_hint
from vtprune.small_files import system_name

if TYPE_CHECKING:
    import torch

    from vtprune.media.in_memory import HeldFile

DECODERS = ("auto", "pyav", "decord")


@dataclass(frozen=True)
class Limits:
    """How much may be read from an untrusted file, how, and by which library.

    >>> vtprune.Limits(max_pixels=20_000_000, pages="1-3")

    Args:
        max_pixels: the largest picture, page or video frame, width x height. The default is the
            size above which Pillow itself refuses.
        allow_partial: read what can be decoded of a damaged file, with a warning, instead of
            refusing it.
        pages: of PDF and TIFF files, such as "1-3" or "1,3,5-"; None: all of them.
        dpi: pixels an inch that PDF pages are drawn with.
        max_pages: the most pages of one file.
        max_bytes: of an open file, of bytes, or of what lies at an address.
        hosts: whose http and https addresses are fetched, such as ("images.example.org",).
        seconds: that fetching one may take.
        decoder: of videos: "pyav"; "decord", with PyAV for what decord can't read; or "auto", which
            is PyAV: decord was faster for no kind of file that was measured.

    Raises:
        MediaError: a limit below 1, pages in another form, or a decoder that does not exist.
    """

    max_pixels: int = 178_956_970
    allow_partial: bool = False
    pages: str | None = None
    dpi: int = 144
    max_pages: int = 64
    decoder: str = "auto"
    max_bytes: int = 2 << 30
    hosts: tuple[str, ...] = ()
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_pixels", "dpi", "max_pages", "max_bytes"):
            if not getattr(self, name) >= 1:
                raise MediaError(
                    f"{name} is {getattr(self, name)}, but must be at least 1",
                    f"give a larger {name}, or leave it out for the default",
                )
        if self.pages is not None:
            page_ranges(self.pages)
        if self.decoder not in DECODERS:
            raise MediaError(
                f"the decoder {reprlib.repr(self.decoder)} is not known",
                f"choose one of {', '.join(DECODERS)}",
            )

    def select_pages(self, path: Path, count: int) -> list[int]:
        """Return the numbers, from 1 on, of the wanted pages of a file that has `count`.

        Raises:
            MediaError: a page that the file does not have, or too many of them.
        """
        ranges = [(1, count)] if self.pages is None else page_ranges(self.pages)
        last = max(end or start for start, end in ranges)
        if last > count:
            has = "1 page" if count == 1 else f"{count:,} pages"
            raise MediaError(
                f"{printable(path)}: the file has {has}, no page {last}", "change --pages"
            )
        spans = [range(start, (end or count) + 1) for start, end in ranges]
        total = sum(map(len, spans))
        if total > self.max_pages:
            raise MediaError(
                f"{printable(path)}: {total:,} pages are over the limit of {self.max_pages}",
                "choose some of them, for example with --pages 1-8",
            )
        numbers = [number for span in spans for number in span]
        repeated = next((number for number in numbers if numbers.count(number) > 1), None)
        if repeated is not None:
            raise MediaError(
                f"{printable(path)}: --pages {self.pages} names page {repeated} twice",
                "name every page once",
            )
        return numbers


def page_ranges(text: str) -> list[tuple[int, int | None]]:
    """Return the first and last page of every part of "1-3,7,9-"; None for an open end.

    Raises:
        MediaError: a text in another form, or a range that runs backwards.
    """
    ranges: list[tuple[int, int | None]] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(-([0-9]{1,9})?)?", part.strip())
        start = int(match[1]) if match else 0
        end = start if match and not match[2] else int(match[3]) if match and match[3] else None
        if not match or start < 1 or (end is not None and end < start):
            raise MediaError(
                f"pages {reprlib.repr(text)} can't be read",
                "pages are numbers from 1 on, for example --pages 1-3 or --pages 1,3,5-",
            )
        ranges.append((start, end))
    return ranges


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Track:
    """How to find the frames of one video stream again.

    Args:
        stream: its number in the container.
        width: of a coded frame, before it is turned.
        height: of a coded frame, before it is turned.
        orientation: how a coded frame is turned and mirrored to be shown, 1 to 8 as in EXIF.
        pts: what the decoder says of every frame, in display order: the time of its packet, no two
            the same. Empty where that does not tell the frames apart, and they have to be counted.
        keyframes: the frame numbers that decoding may start from; empty where the container has no
            index to trust.
        may_skip: whether frames that no other frame needs can be left undecoded.
    """

    stream: int
    width: int
    height: int
    orientation: int
    pts: tuple[int, ...]
    keyframes: tuple[int, ...]
    may_skip: bool = False


@dataclass(frozen=True)
class Source:
    """What a file holds, by its headers and timestamps.

    Of a video, one frame is decoded for its orientation; all of them, without being kept, where the
    file does not say when they are shown.

    Args:
        path: the file, or the directory of pictures.
        kind: "image" or "video".
        width: as displayed, with the orientation of the file applied. Pixels count as square.
        height: as displayed.
        num_frames: 1 for an image. Frame i is the i-th in display order, whichever decoder reads
            it.
        timestamps: seconds, of every frame, on the file's own clock: nothing is subtracted, so a
            first frame at 0.033 s stays there. Empty for an image.
        fps: average frames a second, num_frames / duration; 0.0 for an image.
        duration: seconds from the start of the first frame to the end of the last; 0.0 for an
            image.
        decoder: "pillow", "pdfium", "decord", "pyav", "directory" or "memory": what `read` tries
            first.
        warnings: what a user should know about the file.
        page: of a file with several pages, from 1 on; 0 for any other file.
        label: what media that are no file of the user's are called; "" for the path.
    """

    path: Path
    kind: str
    width: int
    height: int
    num_frames: int
    timestamps: tuple[float, ...]
    fps: float
    duration: float
    decoder: str
    warnings: tuple[str, ...]
    page: int = 0
    label: str = ""
    _track: Track | None = field(default=None, repr=False, compare=False)
    _pictures: tuple[Path, ...] = field(default=(), repr=False, compare=False)
    _frames: Sequence[Any] = field(default=(), repr=False, compare=False)
    _held: HeldFile | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Return the path, and the page of a file with several, as PDF viewers write it."""
        name = self.label or str(self.path)
        return f"{name}#page={self.page}" if self.page else name

    @property
    def in_memory(self) -> bool:
        """Whether it can't be read again once the caller has let go of it."""
        return bool(self._frames) or self._held is not None

    def without_content(self) -> Source:
        """Return it without pixels and temporary file, for a record that outlives the call."""
        return replace(self, _frames=(), _held=None) if self.in_memory else self

    def __str__(self) -> str:
        return self.name

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_held": None}  # a temporary file stays with this process

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files that it is read from."""
        return self._pictures or (self.path,)


@dataclass(frozen=True)
class Stored:
    """A media item that lies in a table or an archive, and is read when it is needed.

    Args:
        name: tells it from all others, and names it in messages.
        load: gives its bytes.
    """

    name: str
    load: Callable[[], bytes] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class MediaGroup:
    """Several media items of one question, in order."""

    items: tuple[Path | Source | Stored, ...]

    @property
    def name(self) -> str:
        """The names of its items, without folders."""
        return " + ".join(item.name for item in self.items)

    def __str__(self) -> str:
        return " + ".join(map(str, self.items))


AskedMedia = Path | Source | Stored | MediaGroup
"""What a question is about: it can be compared, and says its name."""


def group_media(items: Sequence[Path | Source | Stored | MediaGroup]) -> AskedMedia:
    """Return one or several media items as what can be compared, and says its name."""
    apart: list[Path | Source | Stored] = []
    for item in items:
        apart += item.items if isinstance(item, MediaGroup) else [item]
    return apart[0] if len(apart) == 1 else MediaGroup(tuple(apart))


def picture_source(path: Path, width: int, height: int, decoder: str, page: int = 0) -> Source:
    """Return the source of one picture, or of one page of a file with several."""
    return Source(
        path,
        kind="image",
        width=width,
        height=height,
        num_frames=1,
        timestamps=(),
        fps=0.0,
        duration=0.0,
        decoder=decoder,
        warnings=(),
        page=page,
        _pictures=(path,),
    )


@dataclass(frozen=True)
class Frames:
    """Frames that were read.

    Args:
        pictures: what the transform returned for each chunk, concatenated along dimension 0.
        index: the frame numbers that were read, in the order asked for.
        timestamps: their times in seconds; empty for an image.
        decoder: the one that ran.
        warnings: the source's, then what reading found.
    """

    pictures: torch.Tensor
    index: tuple[int, ...]
    timestamps: tuple[float, ...]
    decoder: str
    warnings: tuple[str, ...]


def file_name(address: str | Path) -> str:
    """Return the path that a name or a `file:` address means, as `system_name` has it.

    Raises:
        MediaError: an address on another machine, or with a query or fragment.
    """
    text = system_name(str(address))
    if not re.match("file:/", text, re.IGNORECASE) or os.path.exists(text):
        return text
    parts = urlsplit(text)
    if parts.netloc.lower() not in ("", "localhost"):
        raise MediaError(
            f"{printable(text)}: a file on {printable(parts.netloc)}, not on this machine",
            "copy it here first, and give the path of the copy",
        )
    if parts.query or parts.fragment:
        raise MediaError(
            f"{printable(text)}: an address of a file ends with its path",
            "write ? as %3F and # as %23; choose pages with --pages",
        )
    path = system_name(unquote(parts.path, errors="surrogateescape"))
    return path[1:] if os.name == "nt" and re.match("/[A-Za-z]:", path) else path


def printable(path: str | Path) -> str:
    """Return a path as it may be printed: on one line, whatever its name holds."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def local_path(path: str | Path) -> Path:
    """Return the path of an existing regular file that may be read, or of a directory.

    Decoders are only ever given such a path, made absolute: to FFmpeg, a name like `concat:a|b` or
    `http://...` is something else than a file, and a pipe or a device may never end.

    Raises:
        MediaError: for anything else.
    """
    local = Path(file_name(path))
    try:
        mode = local.stat().st_mode
        if stat.S_ISREG(mode):
            with local.open("rb") as file:
                empty = not file.read(1)
    except (OSError, ValueError) as error:
        reason = path_fault(error)
        if isinstance(error, FileNotFoundError) and re.match(
            r"[A-Za-z][A-Za-z0-9+.-]+:", str(local)
        ):
            web = re.match("https?://", str(path), re.IGNORECASE)
            allow = "allow its host (--allow-url HOST), or " if web else ""
            raise MediaError(
                f"{printable(path)}: not a local file",
                f"{allow}download it first, and give the path of the copy",
            ) from error
        hint = "check the path and its permissions"
        if isinstance(error, FileNotFoundError):
            hint = path_hint(local)
        raise MediaError(f"{printable(path)}: {reason[0].lower() + reason[1:]}", hint) from error
    if stat.S_ISDIR(mode):
        return local
    if not stat.S_ISREG(mode):
        raise MediaError(
            f"{printable(path)}: a device, pipe or socket, not a file",
            "save its content to a file first",
        )
    if empty:
        raise MediaError(f"{printable(path)}: the file is empty", "copy or download it again")
    return local


def check_pixels(path: str | Path, width: int, height: int, limits: Limits) -> None:
    """Refuse a picture above the limit, before memory is taken for it."""
    if width * height > limits.max_pixels:
        raise too_large(path, f"{width} x {height} = {width * height:,}", limits)


def too_large(path: str | Path, pixels: str, limits: Limits) -> MediaError:
    """Return the error for a picture above the limit."""
    return MediaError(
        f"{printable(path)}: {pixels} pixels is over the limit of {limits.max_pixels:,}",
        "raise the limit (max_pixels) if you trust the file, or scale the picture down",
    )


def damaged(path: str | Path, reason: str, limits: Limits) -> DamagedError:
    """Return the error for a file of which at most a part can be decoded."""
    again = "copy or download it again"
    partial = "" if limits.allow_partial else ", or read what decodes with --allow-partial"
    return DamagedError(f"{printable(path)}: {reason}", again + partial)


def unreadable(path: str | Path, reason: str = "") -> MediaError:
    """Return the error for a file that is neither a picture nor a video."""
    return MediaError(
        f"{printable(path)}: not a picture or a video that can be read"
        + (f" ({reason})" if reason else ""),
        "convert it, for example to PNG or to an H.264 mp4",
    )
