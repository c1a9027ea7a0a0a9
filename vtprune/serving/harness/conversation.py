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
class MessageMedia:
    """One media item of a message.

    Args:
        kind: "image" or "video".
        content: a file, a picture in memory, or, of a video, its pictures.
        start, end: the seconds of a video to read; None: from its start, to its end.
    """

    kind: str
    content: object
    start: float | None = None
    end: float | None = None


Part = str | MessageMedia


@dataclass(frozen=True, eq=False)
class Message:
    """What one side says: texts and media, in order."""

    role: str
    parts: tuple[Part, ...]

    def turn(self) -> Turn:
        """Return the message as the families take it."""
        text, places = "", []
        for part in self.parts:
            if isinstance(part, str):
                text += part
            else:
                places.append(len(text))
        return Turn(self.role, text, len(places), tuple(places) if any(places) else ())


Conversation = Sequence[Message]


def media_in(conversation: Conversation) -> list[MessageMedia]:
    """Return the media of a conversation, in order."""
    return [part for message in conversation for part in message.parts if not isinstance(part, str)]


def user(parts: Iterable[Part]) -> Message:
    """Return a message of the user."""
    return Message("user", tuple(parts))


def interleave(text: str, media: Sequence[MessageMedia]) -> Message:
    """Return a user's message of a text and its media.

    The media take the places of the text's placeholders if there is one for each, else they come
    before the text.
    """
    pieces = text.split(PLACEHOLDER)
    if len(pieces) != len(media) + 1 or not media:
        return user([*media, text])
    parts: list[Part] = [pieces[0]]
    for item, piece in zip(media, pieces[1:], strict=True):
        parts += [item, piece]
    return user(part for part in parts if part != "")


def media_from(content: object) -> MessageMedia:
    """Return the media item that a harness gives; without a kind, that of its suffix or type.

    A mapping may name the kind ("type"), the file ("url", "path", "video" or "image"), and the
    seconds of a video to read ("video_start", "video_end").

    Raises:
        ModelError: it is sound.
    """
    if isinstance(content, Mapping):
        names = ("url", "path", "video", "image")
        inner = next((content[name] for name in names if content.get(name) is not None), None)
        if inner is None:
            raise ModelError(f"a media item without a file: {sorted(map(str, content))}")
        media = media_from(inner)
        kind = str(content.get("type") or media.kind)
        if kind == "audio":
            raise ModelError("the question has sound, and no family takes sound", "leave it out")
        return MessageMedia(kind, media.content, content.get("video_start", media.start),
                     content.get("video_end", media.end))  # fmt: skip
    if isinstance(content, (str, Path)):
        path = file_name(content)
        suffix = Path(path).suffix.lower()
        return MessageMedia("image" if suffix in PICTURES else "video", path)
    return MessageMedia("image" if isinstance(content, Picture) else "video", content)


def store(media: Sequence[MessageMedia], folder: Path) -> list[Path]:
    """Return the file of every media item; those in memory are written to `folder`, lossless."""
    paths = []
    for number, item in enumerate(media):
        content = item.content
        if isinstance(content, (str, Path)):
            if re.match(r"data:", str(content)):
                raise MediaError("a picture is given as a data: URL", "give its file")
            paths.append(Path(file_name(content)))
        elif isinstance(content, Picture):
            paths.append(_write(content, folder / f"{number}.png"))
        elif isinstance(content, Sequence) and all(isinstance(frame, Picture) for frame in content):
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
    """Write a picture as it is in memory: its orientation is applied already, or not wanted."""
    if picture.mode not in PNG_MODES:
        picture = picture.convert("RGB")
    picture.save(path, format="PNG", compress_level=0, exif=b"")
    return path


def window(sampling: Sampling, media: Sequence[MessageMedia]) -> Sampling:
    """Return the sampling with the seconds of a video that a question names.

    Raises:
        ModelError: several videos, of which different seconds are meant.
    """
    asked = {(item.start, item.end) for item in media if item.kind == "video"}
    if not asked - {(None, None)}:
        return sampling
    if len(asked) > 1:
        raise ModelError(
            "a question about different seconds of several videos", "cut the videos first"
        )
    start, end = asked.pop()
    return replace(sampling, start=start, end=end)
