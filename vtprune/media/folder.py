"""A directory of numbered pictures, read as a video of one frame a second."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import MediaError
from vtprune.media import still
from vtprune.media.file_type import file_type_of
from vtprune.media.pages import open_pages, read_page
from vtprune.media.source import Limits, Source, damaged, printable

if TYPE_CHECKING:
    import torch

_MOST_TYPES = 1000  # files whose type is looked at, for a message
_SUFFIXES = {
    ".avif",
    ".bmp",
    ".gif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".png",
    ".ppm",
    ".qoi",
    ".tif",
    ".tiff",
    ".webp",
}


def open_folder(path: Path, limits: Limits) -> Source:
    """Return a directory's pictures in natural order (2 before 10) as frames at 0, 1, 2, ... s.

    Raises:
        MediaError: for no pictures, or pictures of different sizes.
    """
    entries = _entries(path)
    files = _pictures(path, entries)
    sizes = []
    for file in files:
        picture = _open_picture(file, limits)
        sizes.append((picture.width, picture.height))
        if sizes[-1] != sizes[0]:
            raise MediaError(
                f"{printable(file)}: {sizes[-1][0]} x {sizes[-1][1]}, but "
                f"{printable(files[0].name)} is {sizes[0][0]} x {sizes[0][1]}: the frames of a "
                "video have one size",
                f"take it out of the directory, or {_ask_each(path)}",
            )
    videos = _count_videos(entry for entry in entries if not _is_picture(entry))
    warnings = () if not videos else (
        f"{printable(path)}: read as one video of its {_several(len(files), 'picture')}, without "
        f"the {_several(videos, 'video')} in it; to have all files answered, {_ask_each(path)}",
    )  # fmt: skip
    times = tuple(float(i) for i in range(len(files)))
    return Source(
        path,
        "video",
        *sizes[0],
        len(files),
        times,
        1.0,
        float(len(files)),
        "directory",
        warnings,
        _pictures=tuple(files),
    )


def picture_files(path: Path) -> list[Path]:
    """Return a directory's pictures in natural order.

    Hidden files, files that are not named like a picture, and subdirectories are left out.

    Raises:
        MediaError: for no pictures.
    """
    return _pictures(path, _entries(path))


def _entries(path: Path) -> list[Path]:
    try:
        return [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise MediaError(
            f"{printable(path)}: {error.strerror}", "check the path and its permissions"
        ) from error


def _pictures(path: Path, entries: list[Path]) -> list[Path]:
    files = [entry for entry in entries if _is_picture(entry)]
    if files:
        return sorted(files, key=lambda file: natural_order(file.name))
    videos = _count_videos(entries)
    folders = sum(entry.is_dir() for entry in entries)
    if videos or folders:
        has = _several(videos, "video") if videos else _several(folders, "folder")
        raise MediaError(
            f"{printable(path)}: the directory has {has} and no pictures, and a directory is read "
            "as one video of numbered pictures",
            f"name the files, or {_ask_each(path)}",
        )
    raise MediaError(
        f"{printable(path)}: the directory has no pictures",
        "give a file, or a directory of numbered pictures such as 001.png, 002.png",
    )


def pictures(
    source: Source, index: list[int], limits: Limits, problems: list[str]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the pictures `index` of a source, (H, W, 3) uint8 RGB; warnings go to `problems`."""
    import torch

    for i in index:
        file = source._pictures[i]
        file_type = file_type_of(file)
        if file_type.reader == "pages":
            frame, warnings = read_page(replace(source, path=file), file_type, limits)
        elif file_type.reader == "picture":
            frame, warnings = still.picture(file, file_type.formats, limits)
        else:
            raise damaged(file, "the file has changed since it was opened", limits)
        problems.extend(warnings)
        yield i, torch.from_numpy(frame)


def _open_picture(file: Path, limits: Limits) -> Source:
    file_type = file_type_of(file)
    sources: list[Source | None] = []
    if file_type.reader == "pages":
        sources = [*open_pages(file, file_type, replace(limits, pages=None))]
    elif file_type.reader == "picture":
        sources = [still.open_picture(file, file_type.formats, limits)]
    if len(sources) != 1 or sources[0] is None or sources[0].kind == "video":
        raise MediaError(
            f"{printable(file)}: not a still picture that can be read, or more than one",
            "take it out of the directory",
        )
    return sources[0]


def _ask_each(path: Path) -> str:
    return f'ask about each: vtprune batch {printable(path)} -q "..."'


def _several(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _count_videos(entries: Iterable[Path]) -> int:
    """Return how many of the first entries are videos."""
    return sum(map(_is_video, islice(entries, _MOST_TYPES)))


def _is_video(file: Path) -> bool:
    try:
        return file.is_file() and file_type_of(file).reader == "video"
    except MediaError:
        return False


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in _SUFFIXES and file.is_file()


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts names by the numbers in them: 2 before 10."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part.lower()) for part in parts]
