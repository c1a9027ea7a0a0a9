"""Videos: what is in them, and frames of them, by FFmpeg or decord in the child process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import cast

from vtprune.errors import VtpruneError
from vtprune.media.child_process import Call, Caller, ChildFailedError, Pixels, run, run_to_end
from vtprune.media.source import Limits, Source, damaged, unreadable

# How much memory a video may make the child take, beside what its frames need: decoders hold up to
# some twenty of them, of up to six bytes a pixel.
_MEMORY = 1 << 30
_BYTES_A_PIXEL = 128
_BYTES_AN_ALLOWED_PIXEL = 8  # before the size of the frames is known


class DecordUnfitError(VtpruneError):
    """decord can't read this file, or numbers its frames differently; PyAV can take over."""


def check_decord() -> None:
    """Refuse where decord2 is not installed: the older decord, of the same module name, is of 2021.

    Raises:
        VtpruneError: names the extra that brings it.
    """
    try:
        metadata.version("decord2")
    except metadata.PackageNotFoundError as error:
        raise VtpruneError(
            "--decoder decord needs the package decord2, which is not installed",
            'pip install "vtprune[decord]", or leave --decoder away: PyAV reads all videos',
        ) from error


def open_video(path: Path, limits: Limits) -> Source:
    """Return what a video holds.

    Raises:
        MediaError: for a file that can't be read.
    """
    memory = _MEMORY + _BYTES_AN_ALLOWED_PIXEL * limits.max_pixels
    try:
        return cast(
            "Source", run_to_end(Call(f"{__name__}:list_frames", (path, limits), memory))[1]
        )
    except ChildFailedError as error:
        raise unreadable(path, str(error)) from error


def read_video(
    source: Source,
    index: list[int],
    limits: Limits,
    decoder: str,
    problems: list[str],
    on_wait: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Pixels]]:
    """Yield the frames `index` (ascending) with their numbers; warnings go to `problems`.

    Args:
        decoder: "pyav" or "decord".
        on_wait: called ten times a second while a frame is waited for; it may raise.

    Raises:
        MediaError: for a frame that doesn't decode, unless the limits allow a part of the file.
        DecordUnfitError: decord doesn't give these frames.
    """
    memory = _MEMORY + _BYTES_A_PIXEL * source.width * source.height
    call = Call(f"{__name__}:decode_frames", (source, index, limits, decoder), memory)
    try:
        problems += cast("list[str]", (yield from run(call, on_wait)))
    except ChildFailedError as error:
        if decoder == "decord":
            raise DecordUnfitError(str(error)) from error
        raise damaged(source.path, str(error), limits) from error


# The child's side.


def list_frames(caller: Caller, path: Path, limits: Limits) -> Source:
    """Return what a video holds."""
    from vtprune.media.timeline import open_clip

    return open_clip(path, limits, caller.alive)


def decode_frames(
    caller: Caller, source: Source, index: list[int], limits: Limits, decoder: str
) -> list[str]:
    """Send frames of a video; return the warnings."""
    from vtprune.media.decoding import decord_frames, pyav_frames

    problems: list[str] = []
    if decoder == "decord":
        frames = decord_frames(source, index)
    else:
        frames = pyav_frames(source, index, limits, problems, caller.alive)
    for number, pixels in frames:
        caller.send(number, pixels.shape, [pixels])
    return problems
