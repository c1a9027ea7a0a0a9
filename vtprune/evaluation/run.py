"""The order of an evaluation: cells, answers, rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune import __version__
from vtprune.errors import DamagedError, VtpruneError
from vtprune.evaluation.answering import Settings, answer_all
from vtprune.evaluation.records import Book
from vtprune.evaluation.summary import Evaluation, Row, summarise
from vtprune.evaluation.variants import SEEDS, Variant
from vtprune.inference.figures import describe_model
from vtprune.inference.questions_file import Asked, mixed_labels
from vtprune.inference.wording import counted

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded, Progress

MOST_BROKEN = 5  # files named one by one
FEW_FILES = 20  # below, drawing files again says little about other files


@dataclass(frozen=True)
class Plan:
    """What is asked, and in which cells."""

    asked: tuple[Asked, ...]
    cells: tuple[Variant, ...]
    notes: tuple[str, ...] = ()


def evaluate(
    loaded: Loaded,
    plan: Plan,
    settings: Settings | None = None,
    path: Path | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Asks every question in every cell, and says what survived.

    A file that opens but can't be decoded is left out with its questions, and named in the
    warnings.

    Args:
        path: where the answers are kept, one a line; what is there already is not asked again.
            None: nowhere.

    Raises:
        VtpruneError: of any kind, with the way out; also where no file can be decoded.
    """
    import torch
    import transformers

    settings = settings or Settings()
    broken: dict[Path, DamagedError] = {}
    with Book(path, head_of(loaded, plan.asked, settings), len(plan.asked)) as book:
        answer_all(loaded, plan.asked, plan.cells, book, settings, on_progress, broken)
    files = len({one.file for one in plan.asked}) - len(broken)
    if broken and not files:
        raise next(iter(broken.values()))
    records = {key: one for key, one in book.records.items()
               if plan.asked[key[0]].file not in broken}  # fmt: skip
    rows = summarise(plan.asked, plan.cells, records)
    notes = [*loaded.warnings, *plan.notes, *left_out(plan.asked, broken),
             *mixed_labels(plan.asked), *_doubts(rows, files)]  # fmt: skip
    return Evaluation(
        model=describe_model(loaded).to_dict(),
        rows=tuple(rows),
        questions=sum(one.file not in broken for one in plan.asked),
        files=files,
        labelled=all(one.answer is not None for one in plan.asked),
        warnings=tuple(dict.fromkeys(notes)),
        version={
            "vtprune": __version__,
            "torch": str(torch.__version__),
            "transformers": str(transformers.__version__),
        },
    )


def _doubts(rows: Sequence[Row], files: int) -> list[str]:
    """Why the rows say less than they seem to."""
    notes = []
    fewest = min((row.seeds for row in rows if row.method == "random"), default=SEEDS)
    if fewest < SEEDS:
        notes.append(f"random rows of {counted(fewest, 'seed')} say little: {SEEDS} or more are "
                     "wanted")  # fmt: skip
    if files < FEW_FILES:
        notes.append(f"{counted(files, 'file')}: intervals from fewer than {FEW_FILES} are rough")
    reading = [row.name for row in rows if row.reads_question]
    if reading:
        notes.append(f"what these keep depends on the question, so a second one on the same cached "
                     f"conversation finds what the first left: {', '.join(reading)}")  # fmt: skip
    return notes


def left_out(asked: Sequence[Asked], broken: Mapping[Path, DamagedError]) -> list[str]:
    """What to say of files that can't be decoded: their questions are in no row."""
    lost = {path: sum(one.file == path for one in asked) for path in broken}
    notes = [
        f"{error.message}: {counted(lost[path], 'question')} left out"
        for path, error in list(broken.items())[:MOST_BROKEN]
    ]
    more = list(lost.values())[MOST_BROKEN:]
    if more:
        notes.append(f"{counted(len(more), 'more file')} can't be decoded: "
                     f"{counted(sum(more), 'question')} left out")  # fmt: skip
    return notes


def head_of(loaded: Loaded, asked: Sequence[Asked], settings: Settings) -> Mapping[str, object]:
    """What two runs must have in common to share a file of answers; the cells may differ."""
    told = [[str(one.file.name), one.question, one.answer, one.choices, one.kind]
            for one in asked]  # fmt: skip
    known = loaded.known_places()[0]
    return {
        "version": __version__,
        "model": describe_model(loaded).to_dict(),
        "questions": hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16],
        "sampling": asdict(settings.sampling),
        "max_new_tokens": settings.generation.max_new_tokens,
        "system": settings.generation.system,
        "metric": settings.metric,
        "calibration": [known.ecl, known.horizon],
    }


def first_questions(asked: Sequence[Asked], most: int | None) -> list[Asked]:
    """At most so many questions, evenly from all files.

    Raises:
        VtpruneError: fewer than one.
    """
    if most is None or most >= len(asked):
        return list(asked)
    if most < 1:
        raise VtpruneError(f"--limit {most} is out of range", "1 or more")
    return [asked[i * len(asked) // most] for i in range(most)]
