"""Records of answers, and the file that keeps them, with which a killed run goes on."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import VtpruneError, brief_path, list_faults, quote
from vtprune.inference.wording import counted
from vtprune.saving import explain, lock

if TYPE_CHECKING:
    from vtprune.preset.validation import Schema

LONGEST_LINE = 2**20  # bytes
MOST_FAULTS = 5  # that are named
BEGINNING = b'{"question": '  # of every line that `AnswersFile` writes


@dataclass(frozen=True)
class Record:
    """One question under one variant.

    Args:
        question: its number in the questions file, from 0.
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


class AnswersFile:
    """The records of a run, and the file that keeps them.

    A line is written, and handed to the disk, as soon as its question is answered. The file is
    this process's alone until `close`. Only half a line at the end, which a killed run left, is
    ever cut off.

    Args:
        path: the file; None: the records are kept in memory alone.
        head: what another run must have in common with this one to go on with the file.
        questions: how many there are; None: any number is taken.

    Raises:
        VtpruneError: the file can't be written, is written to by another process, belongs to
            another evaluation, or has lines that are no records.
    """

    def __init__(
        self, path: Path | None, head: Mapping[str, object], questions: int | None = None
    ) -> None:
        self.records: dict[tuple[int, str], Record] = {}
        self.path, self.questions = path, questions
        self.file: FileIO | None = None
        if path is not None:
            self.file = open_unbuffered(path)
            try:
                self.resume(self.file, json.dumps({"vtprune": head}, sort_keys=True))
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, KeyboardInterrupt) and self.path is not None:
            # The signal may have come between the writing of a record and its being counted.
            num_kept = sum(1 for _ in read_records(self.path, self.questions))
            error.add_note(f"{self.summary(num_kept)}; the same command goes on from there")
        self.close()

    def summary(self, num_kept: int) -> str:
        """Return how many answers are kept, and where."""
        return f"{counted(num_kept, 'answer')} kept in {self.path}"

    def resume(self, file: FileIO, head: str) -> None:
        """Read the records of a file, and leave it ready for the next one."""
        self.refuse_second_writer(file)
        first_line = head.encode() + b"\n"
        begun = file.read(len(first_line)) or b""
        if not first_line.startswith(begun):
            raise VtpruneError(
                f"{self.path}: holds the answers of another evaluation (other questions, model, "
                "settings or version), or something else",
                "give another file, or remove this one",
            )
        if begun != first_line:  # new, or all that a killed run could write
            file.seek(0)
            file.truncate()
            self.append(head)
            return
        end = self.read_lines(file, len(first_line))
        file.seek(end)
        file.truncate()

    def refuse_second_writer(self, file: FileIO) -> None:
        holder = lock(file)
        if holder is not None:
            name = f"process {holder}" if holder else "another process"
            raise VtpruneError(
                f"{self.path}: {name} is writing its answers there",
                "wait until it ends, or give another file",
            )

    def read_lines(self, file: FileIO, start: int) -> int:
        """Take the records after the head.

        Returns:
            where the next record goes: the end, or the start of half a line at the end.
        """
        assert self.path is not None
        end, faults, line = start, Faults(self.path), b"\n"
        for number, line in enumerate(lines_of(file), 2):
            fault = self.take(line)
            if fault and not line.endswith(b"\n") and is_torn(line):
                line = b"\n"
                break
            if fault:
                faults.add(number, fault)
            end += len(line)
        faults.refuse()
        if line.endswith(b"\n"):
            return end
        self.append("")  # a whole record, of which only the end of the line is missing
        return end + 1

    def take(self, line: bytes) -> str:
        """Read one record; return what is wrong with the line, "" where nothing is."""
        record = parse_record(line, self.questions)
        if isinstance(record, str):
            return record
        self.records[record.question, record.cell] = record
        return ""

    def append(self, text: str) -> None:
        """Write lines at the end, or leave the file as it was.

        Raises:
            VtpruneError: the disk is full, or the file can't be written any more.
        """
        assert self.file is not None
        end, data = self.file.seek(0, os.SEEK_END), memoryview(text.encode() + b"\n")
        try:
            while data:
                data = data[self.file.write(data) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            with suppress(OSError):
                self.file.truncate(end)
            kept = self.summary(len(self.records))
            raise VtpruneError(
                f"{self.path}: can't be written: {explain(error)} ({kept})",
                "make room, then give the same command: it goes on from there",
            ) from error

    def add(self, records: list[Record]) -> None:
        """Keep the records of one question."""
        if self.file is not None:
            self.append(
                "\n".join(json.dumps(asdict(record), ensure_ascii=False) for record in records)
            )
        for record in records:
            self.records[record.question, record.cell] = record

    def has(self, question: int, key: str) -> bool:
        """Return whether there is a record of a question under a variant."""
        return (question, key) in self.records

    def close(self) -> None:
        """Close the file, and let other processes have it."""
        if self.file is not None:
            self.file.close()


class Faults:
    """Faults in the lines of a file, as one error."""

    def __init__(self, path: Path) -> None:
        self.path, self.more = path, 0
        self.named: list[str] = []

    def add(self, line: int, fault: str) -> None:
        """Add a fault; beyond the first few they are only counted."""
        if len(self.named) < MOST_FAULTS:
            self.named.append(f"line {line}: {fault}")
        else:
            self.more += 1

    def refuse(self) -> None:
        """Raise all faults as one error.

        Raises:
            VtpruneError: one line or more is no record.
        """
        if self.named:
            raise VtpruneError(
                f"{brief_path(self.path)}: has lines that are no answers of this evaluation: "
                f"{list_faults(self.named, self.more)}",
                "nothing was changed: mend or remove those lines, or give another file",
            )


def read_records(path: Path, questions: int | None = None) -> Iterator[Record]:
    """Yield the records of a file, in its order; half a line at the end is left out.

    Args:
        questions: how many there are; None: any number is taken.

    Raises:
        VtpruneError: any other line that is no record.
    """
    faults = Faults(path)
    with path.open("rb", buffering=0) as file:
        for number, line in enumerate(lines_of(file), 1):
            record = parse_record(line, questions)
            if isinstance(record, Record):
                yield record
            elif number > 1 and (line.endswith(b"\n") or not is_torn(line)):
                faults.add(number, record)
    faults.refuse()


def lines_of(file: FileIO) -> Iterator[bytes]:
    """Yield the lines from here on, of those that are too long the first part."""
    reader = BufferedReader(file)
    try:
        while line := reader.readline(LONGEST_LINE):
            yield line
            while len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                line = reader.readline(LONGEST_LINE)
    finally:
        reader.detach()  # closing it would close the file


def is_torn(line: bytes) -> bool:
    """Return whether a killed run, or a machine that lost power, could have left this end."""
    begun = line[: len(BEGINNING)]
    return BEGINNING.startswith(begun) or not line.strip(b"\0")


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
        return f"not JSON: {getattr(error, 'msg', 'not UTF-8 text, or nested too deep')}"
    if not isinstance(data, dict):
        return f"{quote(data)} is not a JSON object"
    for _, fault in find_faults(_schema(), data):
        return fault
    if questions is not None and data["question"] >= questions:
        return f"question is {quote(data['question'])}, but there are {questions:,}"
    return Record(**{name: data[name] for name in _schema().model_fields if name in data})


@functools.cache
def _schema() -> type[Schema]:
    """Return what a line may hold; other keys are left alone."""
    from pydantic import ConfigDict, Field

    from vtprune.preset.validation import Schema

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

    return RecordSchema


def open_unbuffered(path: Path) -> FileIO:
    """Open a file to read and write, made where there is none, without touching what it holds.

    Raises:
        VtpruneError: it can't be written.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        file = FileIO(os.open(path, flags, 0o666), "r+b")
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise OSError(errno.EINVAL, "not a regular file")
        return file
    except OSError as error:
        raise VtpruneError(
            f"{path}: can't be written: {explain(error)}", "give another file"
        ) from error
