"""What lmms-eval asks for, read: its two kinds of tasks, round by round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vtprune.serving.harness.asking import naming
from vtprune.serving.harness.conversation import (
    Conversation,
    Message,
    MessageMedia,
    Part,
    interleave,
    media_from,
)

Document = Mapping[str, object]
Options = Mapping[str, object]
Find = Callable[[str, str, int], Document]
"""From a task, a split and a number to the document."""


@dataclass(frozen=True)
class Round:
    """One round of a request.

    Args:
        conversation: a new one; None after the last round.
        note: what the task wants to be told in the next round.
        answers: of the rounds before, as the task has them now.
    """

    conversation: Conversation | None
    note: object = None
    answers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TaskRequest:
    """One request.

    Args:
        name: task and number, for messages.
        options: of generation.
        rounds: from a round's number, the answers of those before and the task's note to the
            round.
    """

    name: str
    options: Options
    rounds: Callable[[int, list[str], object], Round]

    def round(self, number: int = 0, answers: Sequence[str] = (), note: object = None) -> Round:
        """A round; errors name the question."""
        with naming(self.name):
            return self.rounds(number, list(answers), note)

    def only(self) -> Conversation:
        """The conversation of a request of one round."""
        conversation = self.round().conversation
        assert conversation is not None
        return conversation


def read_chat(arguments: Sequence[object], find: Find) -> TaskRequest:
    """A request of a task as conversations.

    Args:
        arguments: context, doc_to_messages, generation_kwargs, number, task, split.
    """
    _, messages, options, number, task, split = arguments
    assert callable(messages)

    def rounds(count: int, answers: list[str], note: object) -> Round:
        document = find(task, split, number)  # type: ignore[arg-type]
        if not count:
            return Round(conversation(messages(document)))
        reply = messages(
            document, round_idx=count, previous_output=answers, previous_round_info=note
        )
        if not (isinstance(reply, tuple) and len(reply) == 4) or reply[1]:
            return Round(None, None, answers)
        return Round(conversation(reply[0]), reply[3], answers)

    return TaskRequest(f"{task} {number}", _options(options), rounds)


def read_simple(arguments: Sequence[object], find: Find) -> TaskRequest:
    """A request of a task as a text and its media.

    Args:
        arguments: context, generation_kwargs, doc_to_visual, with several rounds doc_to_text,
            number, task, split.
    """
    context, options, show, *texts, number, task, split = arguments

    def rounds(count: int, answers: list[str], note: object) -> Round:
        document = find(task, split, number)  # type: ignore[arg-type]
        if not count:
            return Round([interleave(str(context), media_of(show, document))])
        reply = None
        if texts and callable(texts[0]):
            reply = texts[0](
                document, previous_output=answers, round_idx=count, previous_round_info=note
            )
        if not (isinstance(reply, tuple) and len(reply) == 5):
            return Round(None, None, answers)
        media, text, ended, answers, note = reply
        if ended:
            return Round(None, note, list(answers))
        return Round(
            [interleave(text, [media_from(item) for item in media or ()])], note, list(answers)
        )

    return TaskRequest(f"{task} {number}", _options(options), rounds)


def media_of(show: object, document: Document) -> list[MessageMedia]:
    """What doc_to_visual shows of a document."""
    return [media_from(item) for item in (show(document) if callable(show) else None) or ()]


def conversation(messages: Sequence[Mapping[str, object]]) -> list[Message]:
    """lmms-eval's messages."""
    turns = []
    for message in messages:
        content = message["content"]
        pieces = [content] if isinstance(content, str) else content
        assert isinstance(pieces, Sequence)
        turns.append(Message(str(message["role"]), tuple(_part(piece) for piece in pieces)))
    return turns


def _part(piece: str | Mapping[str, object]) -> Part:
    if isinstance(piece, str):
        return piece
    if piece["type"] == "text":
        return str(piece["text"])
    media = media_from(piece)
    start, end = piece.get("start_time"), piece.get("end_time")
    if start is None and end is None:
        return media
    return MessageMedia(media.kind, media.content, start, end)  # type: ignore[arg-type]


def _options(options: object) -> Options:
    return options if isinstance(options, Mapping) else {}


def batches(asked: Sequence[TaskRequest], size: int) -> Iterator[list[int]]:
    """Numbers of requests that are generated alike, at most `size` of them."""
    alike: dict[str, list[int]] = {}
    for number, request in enumerate(asked):
        key = repr(sorted(request.options.items(), key=lambda item: item[0]))
        alike.setdefault(key, []).append(number)
    for numbers in alike.values():
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]
