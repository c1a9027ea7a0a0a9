"""Conversations as harnesses give them: texts, files and pictures in memory, in any order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from vtprune.errors import MediaError, ModelError
from vtprune.media import file_name
from vtprune.models.base import Sampling, Turn

PLACEHOLDER = "<image>"
PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tiff", ".webp"}
"""Suffixes of files that harnesses mean as pictures; all others are videos."""
PNG_MODES = {"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"}


@runtime_checkable
class Picture(Protocol):
    """A picture in memory, such as Pillow's."""

    mode: str

    def save(self, path: Path, **options: object) -> None: ...

    def convert(self, mode: str) -> Picture: ...


@dataclass(frozen=True, eq=False)
class Shown:
    """One media item of a message.

    Args:
        kind: "image" or "video".
        content: a file, a picture in memory, or, of a video, its pictures.
        start, end: the seconds of a video that are looked at.
    """

    kind: str
    content: object
    start: float | None = None
    end: float | None = None


Part = str | Shown


@dataclass(frozen=True, eq=False)
class Message:
    """What one side says: texts and media, in order."""

    role: str
    parts: tuple[Part, ...]

    def turn(self) -> Turn:
        """The message as the families take it."""
        text, places = "", []
        for part in self.parts:
            if isinstance(part, str):
                text += part
            else:
                places.append(len(text))
        return Turn(self.role, text, len(places), tuple(places) if any(places) else ())


Conversation = Sequence[Message]


def shown_in(conversation: Conversation) -> list[Shown]:
    """The media of a conversation, in order."""
    return [part for one in conversation for part in one.parts if not isinstance(part, str)]


def user(parts: Iterable[Part]) -> Message:
    return Message("user", tuple(parts))


def interleave(text: str, media: Sequence[Shown]) -> Message:
    """A user's message of a text and its media.

    They stand where the text has a placeholder for each of them, else before it.
    """
    pieces = text.split(PLACEHOLDER)
    if len(pieces) != len(media) + 1 or not media:
        return user([*media, text])
    parts: list[Part] = [pieces[0]]
    for one, piece in zip(media, pieces[1:], strict=True):
        parts += [one, piece]
    return user(part for part in parts if part != "")


def guess(content: object) -> Shown:
    """A media item whose kind is not told: by the file's suffix, or because it is a picture.

    A mapping may tell the kind ("type"), the file ("url", "path", "video" or "image"), and the
    seconds that are looked at ("video_start", "video_end").

    Raises:
        ModelError: it is sound.
    """
    if isinstance(content, Mapping):
        names = ("url", "path", "video", "image")
        inner = next((content[name] for name in names if content.get(name) is not None), None)
        if inner is None:
            raise ModelError(f"a media item without a file: {sorted(map(str, content))}")
        found = guess(inner)
        kind = str(content.get("type") or found.kind)
        if kind == "audio":
            raise ModelError("the question has sound, which no family hears", "leave it out")
        return Shown(kind, found.content, content.get("video_start", found.start),
                     content.get("video_end", found.end))  # fmt: skip
    if isinstance(content, (str, Path)):
        path = file_name(content)
        suffix = Path(path).suffix.lower()
        return Shown("image" if suffix in PICTURES else "video", path)
    return Shown("image" if isinstance(content, Picture) else "video", content)


def store(media: Sequence[Shown], folder: Path) -> list[Path]:
    """The file of every media item; those in memory are written to `folder`, without loss."""
    paths = []
    for number, one in enumerate(media):
        content = one.content
        if isinstance(content, (str, Path)):
            if re.match(r"data:", str(content)):
                raise MediaError("a picture is given as a data: URL", "give its file")
            paths.append(Path(file_name(content)))
        elif isinstance(content, Picture):
            paths.append(_write(content, folder / f"{number}.png"))
        elif isinstance(content, Sequence) and all(isinstance(one, Picture) for one in content):
            frames = folder / str(number)
            frames.mkdir()
            for count, picture in enumerate(content):
                _write(picture, frames / f"{count}.png")
            paths.append(frames)
        else:
            raise MediaError(
                f"media in the form of {type(content).__name__} can't be read",
                "give a file, a Pillow picture, or a list of Pillow pictures",
            )
    return paths


def _write(picture: Picture, path: Path) -> Path:
    """A picture as it is in memory: its orientation has been applied, or is not wanted."""
    if picture.mode not in PNG_MODES:
        picture = picture.convert("RGB")
    picture.save(path, format="PNG", compress_level=0, exif=b"")
    return path


def window(sampling: Sampling, media: Sequence[Shown]) -> Sampling:
    """How much of the media is looked at, where a question names seconds of a video.

    Raises:
        ModelError: several videos, of which different seconds are meant.
    """
    asked = {(one.start, one.end) for one in media if one.kind == "video"}
    if not asked - {(None, None)}:
        return sampling
    if len(asked) > 1:
        raise ModelError(
            "a question about different seconds of several videos", "cut the videos first"
        )
    start, end = asked.pop()
    return replace(sampling, start=start, end=end)
