"""What was answered, one JSON object a line: a file that a killed run goes on with."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

from vtprune.errors import VtpruneError

LARGEST_LINE = 2**20  # bytes


@dataclass(frozen=True)
class Record:
    """One question in one cell.

    Args:
        question: its number in the questions file, from 0.
        cell: the key of the cell.
        answer: what was answered.
        score: how right that is, in [0, 1]; None where nobody knows.
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


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, in its order; what is none is passed over."""
    known = {field.name for field in fields(Record)}
    with path.open("rb") as file:
        for line in Book.lines(file):
            record = _record(line, known)
            if record is not None:
                yield record


def _record(line: bytes, known: Collection[str]) -> Record | None:
    """A line as a record; None for what is none."""
    try:
        data = json.loads(line)
        return Record(**{name: value for name, value in data.items() if name in known})
    except (ValueError, TypeError, AttributeError):
        return None


class Book:
    """The records of a run, and the file behind them where there is one.

    A line is written, and handed to the system, as soon as its question is answered; half a line
    that a killed run left is cut off.
    """

    def __init__(self, path: Path | None, head: Mapping[str, object]) -> None:
        self.records: dict[tuple[int, str], Record] = {}
        self.file: BinaryIO | None = None
        if path is not None:
            self.file = self.open(path, json.dumps({"vtprune": head}, sort_keys=True))

    def open(self, path: Path, head: str) -> BinaryIO:
        """The file at its end, with what it holds read.

        Raises:
            VtpruneError: it can't be written, or is of another evaluation.
        """
        try:
            file = path.open("r+b" if path.exists() else "w+b")
        except OSError as error:
            raise VtpruneError(
                f"{path}: can't be written: {error.strerror}", "choose another -o"
            ) from error
        if not self.begins(file, head):
            file.close()
            raise VtpruneError(
                f"{path}: holds the answers of another evaluation (other questions, model, "
                "settings or version), or something else",
                "choose another -o, or remove that file",
            )
        whole = 0
        for number, line in enumerate(self.lines(file)):
            if number and not self.take(line):
                break
            whole += len(line)
        file.seek(whole)
        file.truncate()
        if not whole:
            self.write(file, head)
        return file

    @staticmethod
    def begins(file: BinaryIO, head: str) -> bool:
        """Whether a file begins with this head, or with as much of it as a killed run wrote."""
        whole = head.encode() + b"\n"
        begun = file.read(len(whole))
        file.seek(0)
        return whole.startswith(begun)

    @staticmethod
    def lines(file: BinaryIO) -> Iterator[bytes]:
        """Whole lines; half a line at the end is left out."""
        while line := file.readline(LARGEST_LINE):
            if not line.endswith(b"\n"):
                return
            yield line

    def take(self, line: bytes) -> bool:
        """Reads a record; False for what is none."""
        record = _record(line, {field.name for field in fields(Record)})
        if record is None:
            return False
        self.records[record.question, record.cell] = record
        return True

    @staticmethod
    def write(file: BinaryIO, line: str) -> None:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())

    def add(self, records: list[Record]) -> None:
        """Keeps the records of one question."""
        for record in records:
            self.records[record.question, record.cell] = record
        if self.file is not None:
            lines = [json.dumps(asdict(one), ensure_ascii=False) for one in records]
            self.write(self.file, "\n".join(lines))

    def has(self, question: int, cell: str) -> bool:
        return (question, cell) in self.records

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
