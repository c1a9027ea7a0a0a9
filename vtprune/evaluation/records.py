"""Records of answers, and the file that keeps them, with which a killed run goes on."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import json_fault, quote
from vtprune.saving import (
    LONGEST_LINE,
    Faults,
    ResumableLines,
    is_torn,
    json_line,
    kept_in,
    lines_of,
)

if TYPE_CHECKING:
    from vtprune.inference.questions_file import Asked
    from vtprune.preset.validation import Schema

BEGINNING = b'{"question": '  # of every line that `AnswersFile` writes


@dataclass(frozen=True)
class NeedleKept:
    """How much of a needle's tokens pruning kept.

    Args:
        tokens: how many of the unpruned model's visual tokens show a part of it.
        kept: the share of them that is kept, average over the layers.
        kept_to_end: the share after the last cut.
        longest: the share of the layers that some token of it is in.
    """

    tokens: int
    kept: float
    kept_to_end: float
    longest: float


@dataclass(frozen=True)
class Record:
    """One question under one variant.

    Args:
        question: its number among those that are asked, from 0.
        cell: the key of the variant.
        answer: its text.
        score: how right the answer is, in [0, 1]; None where the right one is not known.
        same: whether it is the unpruned answer.
        loss: minus the mean log-probability of the unpruned answer's tokens.
        divergence: mean KL divergence of the unpruned from the pruned predictions of the unpruned
            answer's first tokens.
        keep_mean: the layer average that was kept.
        prefill: seconds of the decoder's prompt forward, selection included.
        first: seconds from the resized media to the first token.
        error: why there is no answer.
        needle: of a question about a needle, how much of it was kept.
    """

    question: int
    cell: str
    answer: str = ""
    score: float | None = None
    same: bool = False
    loss: float = 0.0
    divergence: float = 0.0
    keep_mean: float = 1.0
    prefill: float = 0.0
    first: float = 0.0
    error: str = ""
    needle: NeedleKept | None = None


class AnswersFile:
    """The records of a run, and the file that keeps them.

    A line is written, and handed to the disk, as soon as its question is answered. The file is
    this process's alone until `close`. Only half a line at the end, which a killed run left, is
    ever cut off.

    Args:
        path: the file; None: the records are kept in memory alone.
        head: what another run must have in common with this one to go on with the file.
        questions: how many there are; None: any number is taken.
        asked: them, of which each line has file, text and right answer.

    Raises:
        VtpruneError: the file can't be written, is written to by another process, belongs to
            another evaluation, or has lines that are no records.
    """

    def __init__(
        self,
        path: Path | None,
        head: Mapping[str, object],
        questions: int | None = None,
        asked: Sequence[Asked] = (),
    ) -> None:
        self.asked = asked
        self.records: dict[tuple[int, str], Record] = {}
        self.path, self.questions = path, questions
        self.lines: ResumableLines | None = None
        if path is not None:
            self.lines = ResumableLines(
                path,
                self.take,
                BEGINNING,
                what="answers of this evaluation",
                head=json.dumps({"vtprune": head}, sort_keys=True),
                others="the answers of another evaluation (other questions, model, settings or "
                "version)",
            )

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, KeyboardInterrupt) and self.path is not None:
            # The signal may have come between the writing of a record and its being counted.
            num_kept = sum(1 for _ in read_records(self.path, self.questions))
            error.add_note(f"{kept_in(self.path, num_kept)}; the same command goes on from there")
        self.close()

    def take(self, line: bytes) -> str:
        """Read one record; return what is wrong with the line, "" where nothing is."""
        record = parse_record(line, self.questions)
        if isinstance(record, str):
            return record
        self.records[record.question, record.cell] = record
        return ""

    def add(self, records: list[Record]) -> None:
        """Keep the records of one question."""
        if self.lines is not None:
            lines = ({**asdict(record), **self.details(record)} for record in records)
            text = "\n".join(json_line(line, allow_nan=True) for line in lines)
            self.lines.append(text, len(self.records))
        for record in records:
            self.records[record.question, record.cell] = record

    def details(self, record: Record) -> dict[str, object]:
        """Return what a record is of, for readers of the file; a run that goes on ignores it."""
        if not self.asked:
            return {}
        asked = self.asked[record.question]
        return {"file": str(asked.file), "text": asked.question, "right_answer": asked.answer}

    def has(self, question: int, key: str) -> bool:
        """Return whether there is a record of a question under a variant."""
        return (question, key) in self.records

    def close(self) -> None:
        """Close the file, and let other processes have it."""
        if self.lines is not None:
            self.lines.close()


def read_records(path: Path, questions: int | None = None) -> Iterator[Record]:
    """Yield the records of a file, in its order; half a line at the end is left out.

    Args:
        questions: how many there are; None: any number is taken.

    Raises:
        VtpruneError: any other line that is no record.
    """
    faults = Faults(path, "answers of this evaluation")
    with path.open("rb", buffering=0) as file:
        for number, line in enumerate(lines_of(file), 1):
            record = parse_record(line, questions)
            if isinstance(record, Record):
                yield record
            elif number > 1 and (line.endswith(b"\n") or not is_torn(line, BEGINNING)):
                faults.add(number, record)
    faults.refuse()


def parse_record(line: bytes, questions: int | None = None) -> Record | str:
    """Return the record of a line, or what is wrong with it.

    Args:
        questions: how many there are; None: any number is taken.
    """
    from vtprune.preset.validation import find_faults

    if not line.strip():
        return "blank"
    if len(line) >= LONGEST_LINE:
        return f"longer than {LONGEST_LINE:,} bytes"
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        return json_fault(error)
    if not isinstance(data, dict):
        return f"{quote(data)} is not a JSON object"
    for _, fault in find_faults(_schema(), data):
        return fault
    if questions is not None and data["question"] >= questions:
        return f"question is {quote(data['question'])}, but there are {questions:,}"
    values = {name: data[name] for name in _schema().model_fields if name in data}
    if needle := values.get("needle"):
        values["needle"] = NeedleKept(**needle)
    return Record(**values)


@functools.cache
def _schema() -> type[Schema]:
    """Return what a line may hold; other keys are left alone."""
    from pydantic import ConfigDict, Field

    from vtprune.preset.validation import Schema

    class NeedleSchema(Schema):
        model_config = ConfigDict(title="needle", extra="forbid")

        tokens: int = Field(ge=0, description="a whole number, 0 or more")
        kept: float = Field(ge=0, le=1, description="a number from 0 to 1")
        kept_to_end: float = Field(ge=0, le=1, description="a number from 0 to 1")
        longest: float = Field(ge=0, le=1, description="a number from 0 to 1")

    class RecordSchema(Schema):
        model_config = ConfigDict(title="a line", extra="ignore", allow_inf_nan=True)

        question: int = Field(ge=0, description="a whole number, 0 or more")
        cell: str
        answer: str = ""
        score: float | None = Field(None, ge=0, le=1, description="null, or a number from 0 to 1")
        same: bool = Field(False, description="true or false")
        loss: float = Field(0.0, description="a number")
        divergence: float = Field(0.0, description="a number")
        keep_mean: float = Field(1.0, ge=0, le=1, description="a number from 0 to 1")
        prefill: float = Field(0.0, ge=0, lt=math.inf, description="seconds, 0 or more")
        first: float = Field(0.0, ge=0, lt=math.inf, description="seconds, 0 or more")
        error: str = ""
        needle: NeedleSchema | None = None

    return RecordSchema
