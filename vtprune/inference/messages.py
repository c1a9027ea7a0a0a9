"""Conversations as chat clients write them: roles, texts, and media between the words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vtprune.errors import VtpruneError, quote
from vtprune.models.turns import Turn

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""A role as clients name it -> the chat template's."""
MEDIA = {"image": "image", "video": "video", "image_url": "image", "video_url": "video",
         "file": "file"}  # fmt: skip
"""Type of a part of a message -> the kind of its media item."""
NAMES = ("url", "file_id", "file_data")
"""What names the media item of a part that is a mapping."""
RESPONSES = ("input_text", "input_image", "input_video", "input_file", "output_text")
MOST_MESSAGES = 256
MOST_MEDIA = 64
LONGEST = 400_000
"""Characters of all texts together."""
EXAMPLE = (
    'a message is {"role": "user", "content": [{"type": "image", "image": "page.png"}, '
    '{"type": "text", "text": "what is the total?"}]}'
)

Messages = Sequence[Mapping[str, object]]
Resolve = Callable[[str, str], str]
"""(kind, what names the media item) -> the path of its file."""


def read_messages(messages: object, resolve: Resolve) -> tuple[list[str], list[Turn]]:
    """Return the files of a conversation, in its order, and its turns.

    Args:
        messages: a list of {"role", "content"}; content is a text, or a list of parts: {"type":
            "text", "text"}, {"type": "image", "image"}, {"type": "video", "video"}, or
            {"type": "image_url", "image_url": {"url"}} and "video_url" likewise, or {"type":
            "file", "file": {"file_id"}} or {"file_data"}.
        resolve: gives the file of a media item.

    Raises:
        VtpruneError: they have another form, are too many or too long, or do not end with a user's.
    """
    if not isinstance(messages, list):
        raise VtpruneError("messages: not a list of messages", EXAMPLE)
    if not messages:
        raise VtpruneError("messages: the list is empty", EXAMPLE)
    if len(messages) > MOST_MESSAGES:
        raise VtpruneError(
            f"messages: {len(messages):,} are more than {MOST_MESSAGES}", "leave the oldest out"
        )
    files: list[str] = []
    turns: list[Turn] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise VtpruneError(f"{where}: {quote(message)} is not a message", EXAMPLE)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise VtpruneError(
                f"{where}: role {quote(role)} is none of {', '.join(ROLES)}", EXAMPLE
            )
        turns.append(_read_message(where, ROLES[role], message.get("content"), resolve, files))
    if sum(len(turn.text) for turn in turns) > LONGEST:
        raise VtpruneError(f"messages: more than {LONGEST:,} characters", "leave the oldest out")
    if turns[-1].role != "user":
        raise VtpruneError(
            f"messages: the last one is of the {turns[-1].role}, not of the user",
            "end with the question",
        )
    return files, turns


def _read_message(
    where: str, role: str, content: object, resolve: Resolve, files: list[str]
) -> Turn:
    """Return one message as a turn; its files are added to `files`."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise VtpruneError(f"{where}: content is neither a text nor a list of parts", EXAMPLE)
    text, places = "", []
    for number, part in enumerate(parts):
        place = f"{where}.content[{number}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif isinstance(kind, str) and kind in MEDIA:
            if role != "user":
                raise VtpruneError(
                    f"{place}: a message of the {role} has a media item",
                    "put pictures and videos into messages of the user",
                )
            if len(files) >= MOST_MEDIA:
                raise VtpruneError(
                    f"{place}: more than {MOST_MEDIA} pictures and videos", "give fewer"
                )
            files.append(resolve(MEDIA[kind], _reference(place, kind, part)))
            places.append(len(text))
        elif kind in RESPONSES:
            raise VtpruneError(
                f"{place}: {kind} is a part of the Responses API",
                "of chat completions: text, image_url, video_url or file",
            )
        else:
            known = ", ".join(("text", *MEDIA))
            raise VtpruneError(f"{place}: not a part of a known type ({known})", EXAMPLE)
    return Turn(role, text, len(places), tuple(places))


def _reference(place: str, kind: str, part: Mapping[str, object]) -> str:
    """Return what names the media item of a part."""
    value = part.get(kind)
    if isinstance(value, Mapping):
        value = next((value[name] for name in NAMES if value.get(name)), None)
    if not isinstance(value, str) or not value:
        raise VtpruneError(f"{place}: {kind} has no text that names a file", EXAMPLE)
    return value
