"""Questions about media: lists of them, as `vtprune demo` writes them or as people have them."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard, TypeVar

from vtprune.errors import (
    MOST_FAULTS,
    VtpruneError,
    brief_path,
    list_faults,
    nearest_path,
    quote,
)
from vtprune.inference.tables import TABLES, read_rows
from vtprune.inference.wording import counted
from vtprune.media import (
    AskedMedia,
    Limits,
    MediaGroup,
    Source,
    Stored,
    file_name,
    group_media,
)

if TYPE_CHECKING:
    from vtprune.preset.validation import Schema

T = TypeVar("T")
LONGEST_QUESTION = 100_000  # characters, about 25,000 tokens
KEYS = ("file", "question", "answer", "choices", "kind")
FILES = ("file", "files", "image", "images", "video", "videos")
CHOICES = ("choices", "options")
ALIASES = (*FILES, *CHOICES, "answers", "messages")
"""Other names of keys, as widespread lists have them."""
TEXT_KINDS = ("number_*", "ocr*", "text*", "document*", "chart*", "table*")
HINT = 'a line is {"file": "clip.mp4", "question": "what moves?", "answer": "a circle"}'


@dataclass(frozen=True)
class Asked:
    """One question about one media item, or about several as one.

    Args:
        file: the picture, video or directory of pictures, or what `group_media` made of several.
        question: what is asked.
        answer: the right answer; None where it is not known; of several the most frequent.
        choices: the answers to choose from; () where any may be given.
        kind: what the question is about, such as "colour" or "ocr"; "" where nobody said.
        answers: all right answers, as often as they were given; () where there is at most one.
        place: where it lies in a file of questions: "line 3"; "" where it is in none.
        number: in the list that it is from, from 0; None where it is in none.
    """

    file: AskedMedia
    question: str
    answer: str | None = None
    choices: tuple[str, ...] = ()
    kind: str = ""
    answers: tuple[str, ...] = ()
    place: str = field(default="", compare=False)
    number: int | None = field(default=None, compare=False)

    @property
    def right_answers(self) -> tuple[str, ...]:
        """All right answers."""
        return self.answers or (() if self.answer is None else (self.answer,))

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


def read_questions(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Asked]:
    """Read the questions of a list.

    Args:
        path: JSON lines, JSON, CSV, TSV, Parquet or a Hugging Face dataset on disk. A row has file
            (relative to the list, or the bytes in the table; several in a list) and question, or
            messages; where known answer (several in a list), choices and kind. Further keys are
            left alone.
        columns: key -> the column that holds it, where the list has other names.

    Raises:
        VtpruneError: not readable, or faults, all named with their lines.
    """
    rows = read_askable(path, columns)
    faulty = [row for row in rows if isinstance(row, FaultyRow)]
    if faulty:
        raise _list_error(Path(path), faulty)
    return [row for row in rows if not isinstance(row, FaultyRow)]


def read_askable(
    path: str | Path, columns: Mapping[str, str] | None = None
) -> list[Asked | FaultyRow]:
    """Read the questions of a list of which some may be wrong.

    Args:
        path, columns: as of `read_questions`.

    Raises:
        VtpruneError: not readable, or no question is right.
    """
    return read_some(path, read_row, "question", HINT, columns)


def open_questions(
    listed: Sequence[Asked | FaultyRow | VtpruneError], limits: Limits, most: int | None = None
) -> tuple[list[Asked], dict[int, VtpruneError]]:
    """Return the questions that can be asked, and the errors of the others by their numbers.

    Numbers are those of the list, from 0. The error of a question from a file of them names its
    place there, as "line 3".

    Args:
        most: as of `limit_questions`; files of the others are not opened.

    Raises:
        VtpruneError: there is no question that can be asked.
    """
    from vtprune.media import open_each

    opened: dict[object, VtpruneError | None] = {}
    asked: list[Asked] = []
    failed: dict[int, VtpruneError] = {}
    for number, item in limit_questions([*enumerate(listed)], most):
        if not isinstance(item, Asked):
            failed[number] = item.error if isinstance(item, FaultyRow) else item
            continue
        if item.file not in opened:
            try:
                open_each([item.file], limits)
                opened[item.file] = None
            except VtpruneError as error:
                opened[item.file] = error
        error_of_file = opened[item.file]
        if error_of_file is None:
            asked.append(replace(item, number=number))
        else:
            failed[number] = _placed(error_of_file, item.place)
    if not asked:
        raise next(iter(failed.values()), VtpruneError("there is no question", "give one or more"))
    return asked, failed


def _placed(error: VtpruneError, place: str) -> VtpruneError:
    """Return an error of a file as that of a place in a list which names the file."""
    return type(error)(f"{place}: {error.message}", error.hint) if place else error


def faults_of(failed: Mapping[int, VtpruneError]) -> list[dict[str, object]]:
    """Return the questions that can't be asked as JSON has them."""
    return [
        {"question": number, "error": error.message, "hint": error.hint}
        for number, error in failed.items()
    ]


def list_number(asked: Sequence[Asked], index: int) -> int:
    """Return the number, in the list that it is from, of one of the questions that are asked."""
    number = asked[index].number
    return index if number is None else number


def limit_questions(asked: Sequence[T], most: int | None) -> list[T]:
    """Return at most so many questions, evenly spaced in the list.

    Raises:
        VtpruneError: fewer than one.
    """
    if most is None or most >= len(asked):
        return list(asked)
    if most < 1:
        raise VtpruneError(f"--limit {most} is out of range", "1 or more")
    return [asked[i * len(asked) // most] for i in range(most)]


@dataclass(frozen=True)
class FaultyRow:
    """A row of a list that can't be read.

    Args:
        place: where it lies: "line 3".
        faults: what is wrong with it.
        hint: the way out.
        value: what it holds.
    """

    place: str
    faults: list[str]
    hint: str
    value: object = None

    @property
    def error(self) -> VtpruneError:
        """The error of this row alone."""
        return VtpruneError(f"{self.place}: {list_faults(self.faults, 0)}", self.hint)


def _list_error(path: Path, faulty: Sequence[FaultyRow]) -> VtpruneError:
    faults = [f"{row.place}: {fault}" for row in faulty for fault in row.faults]
    more = len(faults) - MOST_FAULTS
    return VtpruneError(
        f"{brief_path(path)}: {list_faults(faults[:MOST_FAULTS], max(more, 0))}", faulty[0].hint
    )


def read_some(
    path: str | Path,
    read_row: Callable[[object, Path, str], T | list[str]],
    what: str,
    hint: str,
    columns: Mapping[str, str] | None = None,
) -> list[T | FaultyRow]:
    """Read a list of rows, of which some may be wrong.

    Args:
        read_row: gets what a row holds, the list's folder and where the row lies in the list;
            returns what it means, or its faults.
        what: a row holds.
        hint: shows one.
        columns: as of `read_questions`.

    Raises:
        VtpruneError: not readable, or no row is right; faults are named with their lines.
    """
    path = Path(path)
    row_hint = hint
    if path.is_dir() or path.suffix.lower() in TABLES:
        row_hint = "columns of other names are given by --columns, such as file=image,question=text"
    rows: list[T | FaultyRow] = []
    for row in read_rows(path, columns or {}, hint):
        result = [row.fault] if row.fault else read_row(row.value, path.parent, row.place)
        if isinstance(result, list):
            rows.append(FaultyRow(row.place, result, row_hint, row.value))
        else:
            rows.append(result)
    faulty = [row for row in rows if isinstance(row, FaultyRow)]
    if not rows:
        raise VtpruneError(f"{brief_path(path)}: holds no {what}", hint)
    if len(faulty) == len(rows):
        raise _list_error(path, faulty)
    return rows


def read_row(data: object, folder: Path, place: str = "") -> Asked | list[str]:
    """Return the question of one row, or what is wrong with it."""
    from vtprune.preset.validation import find_faults

    if not isinstance(data, Mapping):
        return ["a line must be a mapping of keys"]
    try:
        values = normalised(data)
    except VtpruneError as error:
        return [error.message]
    faults = [] if values["files"] else ["file is missing"]
    faults += [message for _, message in find_faults(_schema(), dict(values))]
    for key in data:
        known = not isinstance(key, str) or key in KEYS or key in ALIASES
        close = [] if known else get_close_matches(key, KEYS, n=1, cutoff=0.8)
        faults += [f"unknown key {quote(key)}, did you mean {name}?" for name in close]
    if not faults and (fault := check_length(values["question"])):
        faults.append(fault)
    if faults:
        return faults
    answers, choices = values["answers"], tuple(values["choices"] or ())
    faults += [
        f"answer: {quote(answer)} is not one of the choices"
        for answer in dict.fromkeys(answers)
        if choices and answer not in choices
    ]
    files: list[AskedMedia] = []
    for file in values["files"]:
        try:
            files.append(_find(file, folder))
        except VtpruneError as error:
            faults.append(error.message)
    return faults or Asked(
        group_media(files),
        values["question"].strip(),
        Counter(answers).most_common(1)[0][0] if answers else None,
        choices,
        " ".join((values["kind"] or "").split()),  # a heading of tables
        tuple(answers) if len(answers) > 1 else (),
        place,
    )


def _find(file: object, folder: Path) -> AskedMedia:
    """Return a file that is named relative to a folder; what lies in memory opened.

    Raises:
        VtpruneError: no such file, or no media item.
    """
    if isinstance(file, (Stored, MediaGroup, Source)):
        return file
    if not isinstance(file, (str, Path)):
        from vtprune.media import media_list, open_each

        return group_media(open_each(media_list(file)))
    name = file_name(file)
    if os.path.exists(folder / name):  # False too for what can't be a name
        return folder / name
    nearest = nearest_path(name, folder)
    also = f", did you mean {nearest}?" if nearest else ""
    raise VtpruneError(f"file: {quote(str(file))}: no such file in {brief_path(folder)}{also}")


# -- rows as people have them ----------------------------------------------------------------------


def normalised(data: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a row as `QuestionSchema` has it: files, question, answers, choices and kind.

    Raises:
        VtpruneError: messages that are no single question.
    """
    values: dict[str, Any] = {"kind": data.get("kind")}
    files: Any = next((data[key] for key in FILES if data.get(key) is not None), [])
    values["files"] = list(files) if isinstance(files, (list, tuple)) else [files]
    if "question" in data:
        values["question"] = data["question"]
    elif isinstance(data.get("messages"), list):
        named, values["question"] = _of_messages(data["messages"])
        values["files"] = named or values["files"]
    choices = next((data[key] for key in CHOICES if data.get(key) is not None), None)
    values["choices"] = _choices(choices)
    answers = data.get("answers") if data.get("answers") is not None else data.get("answer")
    given = _answers(answers)
    if isinstance(values["choices"], list):
        given = [_chosen(answer, values["choices"]) for answer in given]
    values["answers"] = [
        f"{answer:g}" if isinstance(answer, (int, float)) else answer for answer in given
    ]
    return values


def _of_messages(messages: list[object]) -> tuple[list[str], str]:
    """Return the files and the question of messages.

    Raises:
        VtpruneError: they are more than one message of the user.
    """
    from vtprune.inference.messages import read_messages

    files, turns = read_messages(messages, lambda kind, reference: reference)
    if len(turns) != 1:
        raise VtpruneError(
            f"messages: {len(turns)} messages, and a list of questions takes one of the user",
            "vtprune batch answers conversations; --system gives a system prompt",
        )
    return files, turns[0].text


def _choices(value: object) -> object:
    """Return choices as a list of texts, where they are something alike."""
    if isinstance(value, Mapping):  # {"text": [...], "label": [...]}, or {"A": ..., "B": ...}
        value = value.get("text") or [value[key] for key in sorted(value)]
    if isinstance(value, str) and "|" in value:
        value = [part.strip() for part in value.split("|")]
    if not isinstance(value, (list, tuple)):
        return value
    return [f"{item:g}" if _is_number(item) else item for item in value] or None


def _answers(value: object) -> list[Any]:
    """Return the right answers; [] where there is none."""
    if isinstance(value, Mapping):  # VQA's {"answer": ...}, or {"text": [...]}
        value = value.get("answer", value.get("text"))
    if value is None or value == "":
        return []
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, (list, tuple)):
        return [answer for item in value for answer in _answers(item)]
    return [value.strip() if isinstance(value, str) and value.strip() else value]


def _chosen(answer: object, choices: list[object]) -> object:
    """Return the choice that an answer names: by its text, its letter, or its number from 0 on."""
    if isinstance(answer, bool) or answer in choices:
        return answer
    if _is_number(answer):
        text = f"{answer:g}"
        place = int(answer) if float(answer) == int(answer) else -1
        return text if text in choices else choices[place] if 0 <= place < len(choices) else text
    letter = re.fullmatch(r"\(?([A-Za-z])[).]?", answer) if isinstance(answer, str) else None
    place = ord(letter[1].upper()) - ord("A") if letter else -1
    return choices[place] if 0 <= place < len(choices) else answer


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@functools.cache
def _schema() -> type[Schema]:
    """Return what a line may hold; other keys are left alone."""
    from pydantic import ConfigDict, Field

    from vtprune.preset.validation import Schema

    Text = Annotated[str, Field(pattern=r"\S")]

    class QuestionSchema(Schema):
        model_config = ConfigDict(title="a line", extra="ignore", arbitrary_types_allowed=True)

        files: list[object] = Field([])
        question: str = Field(pattern=r"\S")
        answers: list[Text] = Field([], description="a text or a number, or a list of them")
        choices: list[str] | None = Field(None, min_length=1, description="a list of texts")
        kind: str | None = None

    return QuestionSchema


def check_length(text: str | None, name: str = "question") -> str:
    """Return what is wrong with a text's length; "" where nothing is.

    A model reads some thousands of words; what is far longer was passed by mistake, and would fail
    only after the weights are loaded.
    """
    if text is None or len(text) <= LONGEST_QUESTION:
        return ""
    return f"the {name} has {len(text):,} characters, more than {LONGEST_QUESTION:,}"
