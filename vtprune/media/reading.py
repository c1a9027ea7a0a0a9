"""Open media files, and read their frames, each transformed right after it is decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vtprune.errors import MediaError, format_bytes
from vtprune.media import folder, still
from vtprune.media.addresses import ADDRESS, FetchRules, fetch
from vtprune.media.file_type import file_type_of
from vtprune.media.in_memory import (
    Clip,
    Medium,
    hold,
    is_tensor,
    name_of,
    naming,
    open_pixels,
    read_pixels,
    with_held,
)
from vtprune.media.pages import open_pages
from vtprune.media.source import (
    DEFAULT_LIMITS,
    Frames,
    Limits,
    MediaGroup,
    Source,
    Stored,
    damaged,
    local_path,
    printable,
)
from vtprune.media.video import DecordUnfitError, check_decord, open_video, read_video

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES = 1 << 20  # a frame is transformed as soon as it is there; small ones, some at once
_UNRESIZED_BYTES = 2 << 30


def open_source(path: Medium, limits: Limits = DEFAULT_LIMITS) -> Source:
    """Return what a media item holds: one picture or one video.

    Args:
        path: a file, a directory of numbered pictures, or what is in memory.

    Raises:
        MediaError: for anything that can't be read, with the file, the reason and a way out; for
            several pages.
    """
    sources = _open(path, limits)
    if len(sources) > 1:
        raise MediaError(
            f"{printable(name_of(path))}: {len(sources)} pages, each a picture of its own",
            "choose one of them with --pages; open_sources opens them all",
        )
    return sources[0]


def open_sources(paths: Iterable[Medium], limits: Limits = DEFAULT_LIMITS) -> list[Source]:
    """Return what each of several paths holds; of a file with pages, a picture a page.

    Raises:
        MediaError: as `open_source`; pages are chosen, and no file has any.
    """
    paths = list(paths)
    sources = open_each(paths, limits)
    if limits.pages is not None and not any(_has_pages(source) for source in sources):
        names = ", ".join(printable(name_of(path)) for path in paths[:3])
        raise MediaError(
            f"{names}: no file has pages to choose from",
            "--pages is for PDF and TIFF files",
        )
    return sources


def open_each(paths: Iterable[Medium], limits: Limits = DEFAULT_LIMITS) -> list[Source]:
    """Do as `open_sources` for some of many paths, of which none need have pages."""
    return [source for path in paths for source in _open(path, limits)]


def check_file(path: str | Path) -> None:
    """Refuse what no reader takes, by its first bytes; nothing is decoded.

    Raises:
        MediaError: as `open_source`.
    """
    local = local_path(path)
    if local.is_dir():
        folder.picture_files(local)
    else:
        file_type_of(local)


def _open(medium: Medium, limits: Limits) -> list[Source]:
    if isinstance(medium, Source):
        return [medium]
    if isinstance(medium, MediaGroup):
        return open_each(medium.items, limits)
    if isinstance(medium, str) and limits.hosts and ADDRESS.match(medium):
        rules = FetchRules(limits.hosts, limits.max_bytes, limits.seconds)
        medium = Stored(medium, partial(fetch, medium, rules))
    if isinstance(medium, (str, Path)):
        return _open_file(medium, limits)
    if isinstance(medium, (Clip, Image.Image, np.ndarray)) or is_tensor(medium):
        return [open_pixels(medium, limits)]
    held = hold(medium, limits)
    with naming(held):
        return [with_held(source, held) for source in _open_file(held.path, limits)]


def _open_file(path: str | Path, limits: Limits) -> list[Source]:
    local = local_path(path)
    if local.is_dir():
        return [folder.open_folder(local, limits)]
    file_type = file_type_of(local)
    if file_type.reader == "pages":
        return open_pages(local, file_type, limits)
    source = None
    if file_type.reader == "picture":
        source = still.open_picture(local, file_type.formats, limits)
    if source is None:
        if limits.decoder == "decord":
            check_decord()
        source = open_video(local, limits)
    return [source]


def _has_pages(source: Source) -> bool:
    if source.kind != "image" or source.decoder == "memory":
        return False
    return file_type_of(source.path).reader == "pages"


def read(
    source: Source,
    index: Sequence[int] | None = None,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
) -> Frames:
    """Decode frames, and transform each right after, so that memory stays bounded.

    Args:
        source: from `open_source`, with the same limits.
        index: the frames to read, in any order, repeats allowed; each is decoded once. None: all of
            them.
        transform: gets (n, 3, H, W) uint8 RGB pictures on the CPU, channels last in memory: one, or
            as many small ones as make 1 MiB; gives the same number of entries for each picture,
            along dimension 0. None: keeps the pictures.
        progress: called with the numbers of frames done and wanted: after each chunk, and while one
            is waited for; what it raises ends the reading.

    Raises:
        MediaError: for a frame number out of range, a file that changed or is damaged (unless the
            limits allow a
            part: then the frames that decode, with a warning), or 2 GiB of pictures without a
            transform.
    """
    with naming(source._held):
        return _read(source, index, transform, limits, progress)


def _read(
    source: Source,
    index: Sequence[int] | None,
    transform: Callable[[torch.Tensor], torch.Tensor] | None,
    limits: Limits,
    progress: Callable[[int, int], None] | None,
) -> Frames:
    import torch

    name = printable(source.path)
    numbers = list(range(source.num_frames)) if index is None else [int(i) for i in index]
    outside = [i for i in numbers if not 0 <= i < source.num_frames]
    if outside or not numbers:
        what = f"frame {outside[0]} is out of range" if outside else "no frame is asked for"
        raise MediaError(f"{name}: {what}", f"its frames are 0 to {source.num_frames - 1}")
    unique = sorted(set(numbers))
    size = len(unique) * source.width * source.height * 3
    if transform is None and size > _UNRESIZED_BYTES and len(unique) > 1:
        raise MediaError(
            f"{name}: {len(unique)} frames of {source.width} x {source.height} "
            f"take {format_bytes(size)}",
            "ask for fewer frames, or resize them as they are read",
        )
    done: list[int] = []
    pictures = torch.empty(0)

    def report_progress() -> None:
        if progress is not None:
            progress(len(done), len(unique))

    for attempt in _attempts(source, unique, limits, report_progress):
        done.clear()
        try:
            pictures = _gather(
                attempt.frames, source, done, len(unique), transform, report_progress
            )
            break
        except DecordUnfitError as error:
            attempt.problems.append(f"{source.path.name}: PyAV read it, not decord: {error}")
    if not done:
        raise damaged(source.path, "none of the frames decodes", limits)
    position = {number: i for i, number in enumerate(done)}
    kept = [i for i in numbers if i in position]
    if kept != done:
        grouped = pictures.view(len(done), -1, *pictures.shape[1:])
        pictures = grouped[torch.tensor([position[i] for i in kept])].flatten(0, 1)
    times = tuple(source.timestamps[i] for i in kept) if source.timestamps else ()
    warnings = (*source.warnings, *attempt.problems)
    return Frames(pictures, tuple(kept), times, attempt.decoder, warnings)


def read_parts(
    source: Source,
    index: Sequence[int],
    size: int,
    transform: Callable[[torch.Tensor], torch.Tensor],
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Frames]:
    """Yield the frames of a video in parts of `size`, the last perhaps smaller; one pass over it.

    What is not yielded yet is not decoded, but for what a decoder holds ahead.

    Args:
        index: ascending; a frame that is in it again is decoded once.
        transform, limits, progress: as of `read`; the transform gives one entry a picture.

    Raises:
        MediaError: as `read`; and for a frame that does not decode, whatever the limits allow.
    """
    import torch

    with naming(source._held):
        numbers = [int(number) for number in index]
        reader = _PartReader(source, sorted(set(numbers)), transform, limits, progress)
        pictures = reader.pictures()
        number, picture = next(pictures)
        for start in range(0, len(numbers), size):
            wanted, parts = numbers[start : start + size], []
            for target in wanted:
                while number != target:
                    number, picture = next(pictures)
                parts.append(picture)
            times = tuple(source.timestamps[i] for i in wanted) if source.timestamps else ()
            warnings = (*source.warnings, *reader.problems)
            yield Frames(torch.cat(parts), tuple(wanted), times, reader.decoder, warnings)


class _PartReader:
    """Decodes frames in order, each transformed right after; where decord gives up, PyAV goes on.

    Args:
        index: ascending, each once.
    """

    def __init__(
        self,
        source: Source,
        index: list[int],
        transform: Callable[[torch.Tensor], torch.Tensor],
        limits: Limits,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.source, self.index, self.limits = source, index, limits
        self.transform, self.progress = transform, progress
        self.done, self.decoder, self.problems = 0, "", list[str]()

    def pictures(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the number and the transformed picture, (1, ...), of every frame."""
        while True:
            left = self.index[self.done :]
            for attempt in _attempts(self.source, left, self.limits, self.report_progress):
                self.decoder, self.problems = attempt.decoder, attempt.problems
                try:
                    yield from self._from(attempt)
                    break
                except DecordUnfitError as error:
                    name = self.source.path.name
                    attempt.problems.append(f"{name}: PyAV read it, not decord: {error}")
                    if self.done and self.done < len(self.index):
                        self.source = replace(self.source, decoder="pyav")
                        break
            if self.done == len(self.index):
                return
            if self.decoder != "decord":
                raise damaged(
                    self.source.path, f"frame {self.index[self.done]} does not decode", Limits()
                )

    def _from(self, attempt: _Attempt) -> Iterator[tuple[int, torch.Tensor]]:
        for numbers, chunk in _chunks(attempt.frames, self.source, len(self.index) - self.done):
            part = self.transform(chunk)
            if numbers != self.index[self.done : self.done + len(numbers)]:
                return  # a frame is missing
            for number, picture in zip(numbers, part.split(1), strict=True):
                self.done += 1
                if number == numbers[-1]:
                    self.report_progress()
                yield number, picture

    def report_progress(self) -> None:
        """Tell how many frames are done."""
        if self.progress is not None:
            self.progress(self.done, len(self.index))


def _gather(
    frames: Iterator[tuple[int, torch.Tensor]],
    source: Source,
    done: list[int],
    total: int,
    transform: Callable[[torch.Tensor], torch.Tensor] | None,
    report_progress: Callable[[], None],
) -> torch.Tensor:
    """Return one tensor of the frames' transformed pictures; their numbers go to `done`."""
    import torch

    pictures = torch.empty(0)
    for numbers, chunk in _chunks(frames, source, total):
        part = chunk if transform is None else transform(chunk)
        entries_per_frame = len(part) // len(numbers)
        if len(numbers) == total:
            pictures = part
        else:
            if not done:
                pictures = part.new_empty((total * entries_per_frame, *part.shape[1:]))
            start, end = (n * entries_per_frame for n in (len(done), len(done) + len(numbers)))
            pictures[start:end] = part
        done += numbers
        report_progress()
    return pictures[: len(pictures) // total * len(done)]


@dataclass(frozen=True)
class _Attempt:
    """One decoder's frames, (number, (H, W, 3) uint8), and the warnings that it adds meanwhile."""

    decoder: str
    frames: Iterator[tuple[int, torch.Tensor]]
    problems: list[str]


def _attempts(
    source: Source, index: list[int], limits: Limits, on_wait: Callable[[], None]
) -> Iterator[_Attempt]:
    """Yield the decoders to try, in turn."""
    import torch

    problems: list[str] = []
    if source.decoder == "memory":
        yield _Attempt("memory", read_pixels(source, index, limits, problems), problems)
        return
    if source.kind == "image" or source.decoder == "directory":
        frames = folder.pictures(source, index, limits, problems)
        yield _Attempt(source.decoder, frames, problems)
        return
    if source.decoder == "pillow":
        formats = file_type_of(source.path).formats
        frames = (
            (number, torch.from_numpy(frame))
            for number, frame in still.animation(source, formats, index, limits, problems)
        )
        yield _Attempt("pillow", frames, problems)
        return
    for decoder in dict.fromkeys((source.decoder, "pyav")):
        read_frames = read_video(source, index, limits, decoder, problems, on_wait)
        frames = ((number, torch.from_numpy(pixels)) for number, pixels in read_frames)
        yield _Attempt(decoder, frames, problems)


def _chunks(
    frames: Iterator[tuple[int, torch.Tensor]], source: Source, total: int
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield frames gathered to (n, 3, H, W), with their numbers."""
    import torch

    num_frames = max(1, min(_CHUNK_BYTES // (source.width * source.height * 3), total))
    numbers: list[int] = []
    pixels = torch.empty(0)
    for number, frame in frames:
        if num_frames == 1:
            yield [number], frame[None].permute(0, 3, 1, 2)
            continue
        if not numbers:
            pixels = torch.empty((num_frames, *frame.shape), dtype=torch.uint8)  # (n, H, W, 3)
        pixels[len(numbers)] = frame
        numbers.append(number)
        if len(numbers) == num_frames:
            yield numbers, pixels.permute(0, 3, 1, 2)
            numbers = []
    if numbers:
        yield numbers, pixels[: len(numbers)].permute(0, 3, 1, 2)
