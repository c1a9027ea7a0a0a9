"""Questions about media files, one JSON object a line, as `vtprune demo` writes them."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vtprune.errors import MOST_FAULTS, VtpruneError, brief_path, list_faults, quote
from vtprune.inference.wording import counted
from vtprune.media import file_name

if TYPE_CHECKING:
    from vtprune.preset.validation import Schema

T = TypeVar("T")
LONGEST_QUESTION = 100_000  # characters, about 25,000 tokens
LARGEST_FILE = 64 * 2**20  # bytes
KEYS = ("file", "question", "answer", "choices", "kind")
TEXT_KINDS = ("number_*", "ocr*", "text*", "document*", "chart*", "table*")
HINT = 'a line is {"file": "clip.mp4", "question": "what moves?", "answer": "a circle"}'


@dataclass(frozen=True)
class Asked:
    """One question about one file.

    Args:
        file: the picture, video or directory of pictures.
        question: what is asked.
        answer: the right answer; None where it is not known.
        choices: the answers to choose from; () where any may be given.
        kind: what the question is about, such as "colour" or "ocr"; "" where nobody said.
    """

    file: Path
    question: str
    answer: str | None = None
    choices: tuple[str, ...] = ()
    kind: str = ""

    @property
    def text_heavy(self) -> bool:
        """Whether the question is about written text: its kind is one of TEXT_KINDS."""
        return any(fnmatchcase(self.kind.lower(), pattern) for pattern in TEXT_KINDS)


def mixed_labels(asked: Sequence[Asked]) -> list[str]:
    """Return a warning where only some questions have a right answer: agreement counts, for all."""
    answered = sum(question.answer is not None for question in asked)
    if answered in (0, len(asked)):
        return []
    return [
        f"{answered:,} of {counted(len(asked), 'question')} have a right answer: agreement with "
        "the unpruned model counts, for all; leave the others out for accuracy"
    ]


def read_questions(path: str | Path) -> list[Asked]:
    """Read the questions of a file.

    Args:
        path: lines of JSON objects with file (relative to this file) and question, and, where
            known, answer, choices and kind. Further keys are left alone.

    Raises:
        VtpruneError: not readable, or faults, all named with their lines.
    """
    return read_json_lines(path, _read_line, "question", HINT)


def read_json_lines(
    path: str | Path, read_line: Callable[[str, Path], T | list[str]], what: str, hint: str
) -> list[T]:
    """Read a file of JSON lines; blank ones are left out.

    Args:
        read_line: gets a line and the file's folder; returns what it holds, or its faults.
        what: a line holds.
        hint: shows one.

    Raises:
        VtpruneError: not readable, or faults, all named with their lines.
    """
    path = Path(path)
    name = brief_path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        last = raw.count(b"\n", 0, error.start) + 1
        raise VtpruneError(f"{name}, line {last}: can't be read: not UTF-8 text", hint) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or "not a file's name"
        raise VtpruneError(f"{name}: can't be read: {reason}", f"check the path; {hint}") from error
    if len(raw) > LARGEST_FILE:
        raise VtpruneError(f"{name}: larger than {LARGEST_FILE} bytes", "split it")
    read: list[T] = []
    faults: list[str] = []
    more = 0  # faults that are counted only: a large file could hold millions
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            result = read_line(line, path.parent)
            if isinstance(result, list):
                room = MOST_FAULTS - len(faults)
                faults += [f"line {number}: {fault}" for fault in result[:room]]
                more += len(result[room:])
            else:
                read.append(result)
    if faults:
        raise VtpruneError(f"{name}: {list_faults(faults, more)}", hint)
    if not read:
        raise VtpruneError(f"{name}: holds no {what}", hint)
    return read


def _read_line(line: str, folder: Path) -> Asked | list[str]:
    """Return the question of one line, or what is wrong with it."""
    from vtprune.preset.validation import find_faults

    try:
        data = _readable(json.loads(line))
    except json.JSONDecodeError as error:
        return [f"not JSON: {error.msg}"]
    except RecursionError:
        return ["not JSON: nested too deep"]
    except ValueError:  # Python reads no number of thousands of digits
        return ["not JSON: a number with too many digits"]
    faults = [message for _, message in find_faults(_schema(), data)]
    if not isinstance(data, dict):
        return faults
    for key in data:
        close = [] if key in KEYS else get_close_matches(key, KEYS, n=1, cutoff=0.8)
        faults += [f"unknown key {quote(key)}, did you mean {name}?" for name in close]
    if not faults and (fault := check_length(data["question"])):
        faults.append(fault)
    if faults:
        return faults
    answer, choices = data.get("answer"), data.get("choices") or ()
    if choices and answer is not None and answer not in choices:
        faults.append(f"answer: {quote(answer)} is not one of the choices")
    try:
        file = folder / file_name(data["file"])
    except VtpruneError as error:
        return [*faults, error.message]
    if not os.path.exists(file):  # False too for what can't be a name
        faults.append(f"file: {quote(data['file'])}: no such file in {brief_path(folder)}")
    return faults or Asked(
        file,
        data["question"].strip(),
        None if answer is None else answer.strip(),
        tuple(choices),
        data.get("kind") or "",
    )


@functools.cache
def _schema() -> type[Schema]:
    """Return what a line may hold; other keys are left alone."""
    from pydantic import ConfigDict, Field

    from vtprune.preset.validation import Schema

    class QuestionSchema(Schema):
        model_config = ConfigDict(title="a line", extra="ignore")

        file: str = Field(pattern=r"\S")
        question: str = Field(pattern=r"\S")
        answer: str | None = Field(None, pattern=r"\S")
        choices: list[str] | None = Field(None, min_length=1, description="a list of texts")
        kind: str | None = None

    return QuestionSchema


def _readable(value: object) -> object:
    """Return JSON data with "?" for halves of characters, which no tokenizer takes."""
    if isinstance(value, dict):
        return {_readable(key): _readable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_readable(item) for item in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def check_length(text: str | None, name: str = "question") -> str:
    """Return what is wrong with a text's length; "" where nothing is.

    A model reads some thousands of words; what is far longer was passed by mistake, and would fail
    only after the weights are loaded.
    """
    if text is None or len(text) <= LONGEST_QUESTION:
        return ""
    return f"the {name} has {len(text):,} characters, more than {LONGEST_QUESTION:,}"
