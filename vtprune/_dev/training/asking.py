"""Many questions of the embedded world in many cells, shared by processes; a killed run goes on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vtprune.demo import write
from vtprune.errors import VtpruneError
from vtprune.evaluation.records import Record, read_records
from vtprune.evaluation.variants import Variant
from vtprune.inference.questions_file import Asked, read_questions

Records = dict[tuple[int, str], Record]


@dataclass(frozen=True)
class Part:
    """Questions, by their numbers in the whole list, and the cells that they are asked in."""

    name: str
    numbers: tuple[int, ...]
    cells: tuple[Variant, ...]


@dataclass(frozen=True)
class AskingJob:
    """What is to be answered, and where its files and answers are.

    Args:
        out: folder of media, questions and answers.
        model: a checkpoint; None: the packaged one.
        calibration: a file of its layers.
    """

    out: Path
    asked: tuple[Asked, ...]
    parts: tuple[Part, ...]
    model: str | None = None
    processes: int = 2
    calibration: Path | None = None

    def share(self, part: Part, rank: int) -> tuple[int, ...]:
        """The numbers of one process: every so many files, each whole."""
        files = list(dict.fromkeys(self.asked[number].file for number in part.numbers))
        own = set(files[rank :: self.processes])
        return tuple(number for number in part.numbers if self.asked[number].file in own)

    def path(self, part: Part, rank: int) -> Path:
        """Where one process keeps the answers of one part."""
        return self.out / f"{part.name}-{rank}-of-{self.processes}.jsonl"

    def run(self) -> Records:
        """Asks what has not been answered yet."""
        from torch.multiprocessing import spawn

        spawn(answer, (self,), nprocs=self.processes)
        return self.collect()

    def collect(self) -> Records:
        """All processes' records, by the questions' numbers in the whole list."""
        records: Records = {}
        for part in self.parts:
            for rank in range(self.processes):
                numbers, path = self.share(part, rank), self.path(part, rank)
                for record in read_records(path, len(numbers)) if path.exists() else ():
                    records[numbers[record.question], record.cell] = record
        return records


def questions(out: Path, split: str, num: int, seed: int) -> tuple[Asked, ...]:
    """The questions of a folder, drawn and written at the first call."""
    folder = out / f"{split}-{num}-seed-{seed}"
    listed = folder / "questions.jsonl"
    if not listed.exists():
        out.mkdir(parents=True, exist_ok=True)
        write(folder, num, seed, split)
    return tuple(read_questions(listed))


def answer(rank: int, job: AskingJob) -> None:
    """One process: its share of the files, on one thread."""
    import torch

    from vtprune.demo.score import rate
    from vtprune.evaluation.evaluate import evaluate
    from vtprune.evaluation.runner import AskSettings
    from vtprune.models.loading import load

    def show(what: str, done: int, total: int) -> None:
        if rank == 0 and what == "answering":
            sys.stderr.write(f"{part.name}: {done} of {total}\n")

    torch.set_num_threads(1)
    loaded = load(job.model, calibration=job.calibration)
    for part in job.parts:
        own = tuple(job.asked[number] for number in job.share(part, rank))
        if own:
            settings = AskSettings(score=rate, metric="demo")
            found = evaluate(loaded, own, part.cells, settings, job.path(part, rank), show)
            if found.questions < len(own):
                raise VtpruneError(
                    f"{len(own) - found.questions} questions can't be asked: their files don't "
                    "decode", "remove the folder's files, and start again"
                )  # fmt: skip


def split_parts(
    asked: Sequence[Asked], cells: Sequence[Variant], headline: Sequence[Variant], few: int
) -> tuple[Part, ...]:
    """The first `few` questions in all cells, the others in those of the headline.

    A file's questions stay together.
    """
    while 0 < few < len(asked) and asked[few].file == asked[few - 1].file:
        few += 1
    first, rest = tuple(range(min(few, len(asked)))), tuple(range(few, len(asked)))
    parts = (Part("first", first, tuple(cells)),)
    return (*parts, Part("rest", rest, tuple(headline))) if rest else parts
