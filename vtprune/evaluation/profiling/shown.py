"""What a profile is of: a picture or video of a given size, or media files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vtprune.errors import MediaError
from vtprune.media import Limits, Source, open_sources

FPS = 2.0  # of a video without a file
LONGEST = 65536  # pixels along a side, and frames


@dataclass(frozen=True)
class Shown:
    """What a profile is of.

    Args:
        kind: "image" or "video".
        width, height: in pixels.
        frames: of the video, all of which are looked at.
        paths: media files; where there are any, the rest says nothing.
    """

    kind: str = "image"
    width: int = 0
    height: int = 0
    frames: int = 1
    paths: tuple[str, ...] = ()

    def smaller(self, share: float) -> Shown:
        """About that share of the pixels: fewer frames, or a smaller picture."""
        if self.kind == "video" and self.frames > 2:
            return replace(self, frames=max(2, int(self.frames * share) // 2 * 2))
        side = share**0.5
        return replace(self, width=max(1, int(self.width * side)),
                       height=max(1, int(self.height * side)))  # fmt: skip


def parse_picture(text: str) -> Shown | None:
    """A picture "1344x1344", width first; None where it is no size.

    Raises:
        MediaError: a size that no picture has.
    """
    found = _lengths(text, 2)
    return Shown("image", found[0], found[1]) if found else None


def parse_video(text: str) -> Shown | None:
    """A video "64x448x448", frames first, then width and height; None where it is no size.

    Raises:
        MediaError: a size that no video has.
    """
    found = _lengths(text, 3)
    return Shown("video", found[1], found[2], found[0]) if found else None


def _lengths(text: str, count: int) -> list[int]:
    """So many lengths with an x in between; none where the text is something else."""
    if not re.fullmatch("[xX]".join([r"\d+"] * count), text.strip(), re.ASCII):
        return []
    parts = [part.lstrip("0") or "0" for part in text.strip().lower().split("x")]
    for part in parts:
        if len(part) > len(str(LONGEST)) or not 1 <= int(part) <= LONGEST:
            told = part if len(part) < 20 else f"a length of {len(part)} digits"
            raise MediaError(
                f"{told} is out of range: a side, or the frames, are 1 to {LONGEST}",
                "for example --image 1344x1344, or --video 64x448x448",
            )
    return [int(part) for part in parts]


def open_media(paths: Sequence[str], limits: Limits) -> Shown:
    """Media files, checked before anything expensive is done."""
    sources = open_sources(list(paths), limits)
    kinds = {source.kind for source in sources}
    first = sources[0]
    return Shown("video" if "video" in kinds else "image", first.width, first.height,
                 first.num_frames, tuple(paths))  # fmt: skip


def make_source(shown: Shown) -> Source:
    """A source without a file."""
    video = shown.kind == "video"
    parts = [shown.frames] * video + [shown.width, shown.height]
    return Source(
        path=Path("x".join(map(str, parts))),
        kind=shown.kind,
        width=shown.width,
        height=shown.height,
        num_frames=shown.frames,
        timestamps=tuple(number / FPS for number in range(shown.frames)) if video else (),
        fps=FPS if video else 0.0,
        duration=shown.frames / FPS if video else 0.0,
        decoder="none",
        warnings=(),
    )
