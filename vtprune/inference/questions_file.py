"""Questions about media files, one JSON object a line, as `vtprune demo` writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from vtprune.errors import MOST_FAULTS, VtpruneError, brief_path, list_faults, quote
from vtprune.inference.wording import counted
from vtprune.media import file_name

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
        """Whether it is about written text: its kind is one of TEXT_KINDS."""
        return any(fnmatchcase(self.kind.lower(), pattern) for pattern in TEXT_KINDS)


def mixed_labels(asked: Sequence[Asked]) -> list[str]:
    """What to say where some questions only have a right answer: agreement counts, for all."""
    answered = sum(one.answer is not None for one in asked)
    if answered in (0, len(asked)):
        return []
    return [
        f"{answered:,} of {counted(len(asked), 'question')} have a right answer: agreement with "
        "the unpruned model counts, for all; leave the others out for accuracy"
    ]


def read_questions(path: str | Path) -> list[Asked]:
    """The questions of a file.

    Args:
        path: lines of JSON objects with file (relative to this file) and question, and, where
            known, answer, choices and kind. Further keys are left alone.

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
        raise VtpruneError(f"{name}:{last}: can't be read: not UTF-8 text", HINT) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or "not a file's name"
        raise VtpruneError(f"{name}: can't be read: {reason}", HINT) from error
    if len(raw) > LARGEST_FILE:
        raise VtpruneError(f"{name}: larger than {LARGEST_FILE} bytes", "split it")
    asked: list[Asked] = []
    faults: list[str] = []
    more = 0  # faults that are counted only: a large file could hold millions
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            found = _read_line(line, path.parent)
            if isinstance(found, Asked):
                asked.append(found)
            else:
                room = MOST_FAULTS - len(faults)
                faults += [f"{name}:{number}: {fault}" for fault in found[:room]]
                more += len(found[room:])
    if faults:
        raise VtpruneError(list_faults(faults, more), HINT)
    if not asked:
        raise VtpruneError(f"{name}: holds no question", HINT)
    return asked


def _read_line(line: str, folder: Path) -> Asked | list[str]:
    """The question of one line, or what is wrong with it."""
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        return [f"not JSON: {error.msg}"]
    except RecursionError:
        return ["not JSON: nested too deep"]
    except ValueError:  # Python reads no number of thousands of digits
        return ["not JSON: a number with too many digits"]
    if not isinstance(data, dict):
        return [f"{quote(data)} is not a JSON object"]
    faults = [f"{key} is missing" for key in ("file", "question") if key not in data]
    for key in data:
        close = [] if key in KEYS else get_close_matches(key, KEYS, n=1, cutoff=0.8)
        faults += [f"unknown key {quote(key)}, did you mean {one}?" for one in close]
    for key in ("file", "question", "answer", "kind"):
        value = data.get(key)
        absent = value is None if key == "answer" else key == "kind" and value in (None, "")
        if key in data and not absent and not (isinstance(value, str) and value.strip()):
            faults.append(f"{key} is {quote(value)}, not text")
    if not faults and (fault := check_length(data["question"])):
        faults.append(fault)
    choices = data.get("choices")
    if choices is not None and not _is_choices(choices):
        faults.append(f"choices is {quote(choices)}, not a list of texts")
    if faults:
        return faults
    answer = data.get("answer")
    if choices and answer is not None and answer not in choices:
        faults.append(f"answer {quote(answer)} is not one of the choices")
    try:
        file = folder / file_name(data["file"])
    except VtpruneError as error:
        return [*faults, error.message]
    if not os.path.exists(file):  # False too for what can't be a name
        faults.append(f"file {quote(data['file'])}: no such file in {brief_path(folder)}")
    return faults or Asked(
        file,
        _whole(data["question"].strip()),
        None if answer is None else _whole(answer.strip()),
        tuple(map(_whole, choices or ())),
        data.get("kind") or "",
    )


def check_length(text: str | None, name: str = "question") -> str:
    """Return what is wrong with a text's length; "" where nothing is.

    A model reads some thousands of words; what is far longer was passed by mistake, and would fail
    only after the weights are loaded.
    """
    if text is None or len(text) <= LONGEST_QUESTION:
        return ""
    return f"the {name} has {len(text):,} characters, more than {LONGEST_QUESTION:,}"


def _whole(text: str) -> str:
    """Text that a tokenizer takes: JSON can spell out half a character."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _is_choices(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)
