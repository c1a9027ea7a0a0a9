"""`evaluate`: many questions under many variants, and what their answers come to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune import __version__
from vtprune.errors import VtpruneError
from vtprune.evaluation.damaged import DamagedFiles
from vtprune.evaluation.follow_up import follow_up_records
from vtprune.evaluation.records import AnswersFile, Record
from vtprune.evaluation.rows import EvaluationRow, make_rows
from vtprune.evaluation.runner import AskSettings, FileRunner, group_by_file
from vtprune.evaluation.variants import SEEDS, Variant, all_stages
from vtprune.inference.csv_file import csv_text, flat
from vtprune.inference.measuring import describe_model, describe_versions
from vtprune.inference.provenance import file_digests
from vtprune.inference.questions_file import Asked, faults_of, mixed_labels
from vtprune.inference.report import HostInfo, ModelInfo, Versions, describe_host
from vtprune.inference.wording import counted

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded, Progress

FEW_FILES = 20  # below, drawing files says little about other files


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gave.

    Args:
        model: as in a report.
        rows: the unpruned one first.
        labelled: whether right answers are known for all questions.
        files: how many.
        failed: questions that could not be asked, by their numbers in the list.
        host: the machine that it ran on.
        media: all files; the JSON has the SHA-256 of each.
    """

    model: ModelInfo
    rows: tuple[EvaluationRow, ...]
    questions: int
    files: int
    labelled: bool
    version: Versions
    warnings: tuple[str, ...] = ()
    failed: Mapping[int, VtpruneError] = field(default_factory=dict)
    host: HostInfo = field(default_factory=describe_host)
    media: Sequence[str] = ()

    def to_dict(self) -> dict[str, object]:
        """Return the JSON that `vtprune evaluate --json` prints."""
        return {
            "model": self.model.to_dict(),
            "questions": self.questions,
            "files": self.files,
            "labelled": self.labelled,
            "rows": [row.to_dict() for row in self.rows],
            "failed": faults_of(self.failed),
            "warnings": list(self.warnings),
            "version": self.version.to_dict(),
            "host": self.host.to_dict(),
            "media": file_digests(self.media),
        }

    def to_csv(self) -> str:
        """Return one line a row, its blocks as columns, under a line of their names."""
        same = {**self.model.to_columns(), "files": self.files}
        values = [row.to_dict() for row in self.rows]
        for row in values:
            del row["passes"]
        rows = [{**same, **flat(_name_ends(row))} for row in values]
        return csv_text(rows)


def _name_ends(values: Mapping[str, object]) -> dict[str, object]:
    """Name the ends of every interval: {"interval": {"low": 0.4, "high": 0.6}}."""
    named: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = _name_ends(value)
        elif name.endswith("interval") and isinstance(value, list):
            value = dict(zip(("low", "high"), value, strict=True))
        named[name] = value
    return named


def evaluate(
    loaded: Loaded,
    asked: Sequence[Asked],
    variants: Sequence[Variant],
    settings: AskSettings | None = None,
    path: Path | None = None,
    on_progress: Progress | None = None,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Ask every question under every variant, and compare the answers.

    A file that opens but can't be decoded is left out with its questions, and named in the
    warnings.

    Args:
        path: where the answers are kept, one a line; what is there already is not asked again.
            None: nowhere.
        notes: warnings of the list of variants.

    Raises:
        VtpruneError: of any kind, with the way out; also where no file can be decoded.
    """
    settings = settings or AskSettings()
    damaged = DamagedFiles()
    with AnswersFile(path, settings_head(loaded, asked, settings), len(asked), asked) as answers:
        answer_all(loaded, asked, variants, answers, settings, damaged, on_progress)
    left_out = damaged.warnings(asked)
    asked, records = damaged.without_damaged(asked, answers.records)
    files = len({question.file for question in asked})
    rows = make_rows(asked, variants, records)
    warnings = [*loaded.warnings, *notes, *default_places(loaded, variants), *left_out,
                *mixed_labels(asked), *_doubts(rows, files)]  # fmt: skip
    return Evaluation(
        model=describe_model(loaded),
        rows=tuple(rows),
        questions=len(asked),
        files=files,
        labelled=all(question.answer is not None for question in asked),
        warnings=tuple(dict.fromkeys(warnings)),
        version=describe_versions(),
        media=file_names(asked),
    )


def answer_all(
    loaded: Loaded,
    asked: Sequence[Asked],
    variants: Sequence[Variant],
    answers: AnswersFile,
    settings: AskSettings,
    damaged: DamagedFiles,
    on_progress: Progress | None = None,
) -> None:
    """Ask every question under every variant, but for what the answers file has already.

    Files follow each other; each is read and encoded once. The unpruned model answers first: every
    variant is compared with that answer, token by token, and generates one of its own only where
    greedy decoding leaves it.

    Args:
        damaged: takes the files that open but can't be decoded, whose questions are left out.

    Raises:
        VtpruneError: a file that can't be read for another reason, or a question the unpruned model
            can't answer.
    """
    follow_ups = any(variant.follow_up for variant in variants)
    done = 0

    def show(more: int = 0) -> None:
        if on_progress:
            on_progress("answering", done + more, len(asked))

    for numbers in group_by_file(asked):
        missing = {
            number: [
                variant for variant in variants
                # a file's only question follows no other
                if not answers.has(number, variant.key)
                and (len(numbers) > 1 or not variant.follow_up)
            ]
            for number in numbers
        }  # fmt: skip
        wanted = [number for number in numbers if missing[number]]
        if wanted:
            opened = numbers if follow_ups else wanted
            runner = None
            with damaged.leaving_out(asked[numbers[0]].file):
                runner = FileRunner(loaded, [asked[number] for number in opened], settings)
            for count, number in enumerate(wanted if runner else []):
                show(count)
                answers.add(_ask(runner, opened.index(number), number, missing[number], variants))
        done += len(numbers)
        show()


def _ask(
    runner: FileRunner,
    place: int,
    number: int,
    missing: Sequence[Variant],
    variants: Sequence[Variant],
) -> list[Record]:
    """Return the records of one question under the variants that it misses."""
    alone = {variant.key for variant in missing if not variant.follow_up}
    follow_ups = [variant for variant in missing if variant.follow_up]
    records = runner.answer(place, number, alone, variants) if alone else []
    return records + follow_up_records(runner, place, number, follow_ups) if follow_ups else records


def _doubts(rows: Sequence[EvaluationRow], files: int) -> list[str]:
    """Return why the rows say less than they seem to."""
    notes = []
    fewest = min((row.seeds for row in rows if row.method == "random"), default=SEEDS)
    if fewest < SEEDS:
        notes.append(f"random rows of {counted(fewest, 'seed')} say little: run {SEEDS} seeds or "
                     "more")  # fmt: skip
    notes += rough_intervals(files)
    aware = [row.name for row in rows if row.reads_question]
    if aware:
        notes.append("these rows are question-aware: a follow-up question on the same KV cache "
                     f"sees only the tokens kept for the first: {', '.join(aware)}")  # fmt: skip
    return notes


def default_places(loaded: Loaded, variants: Sequence[Variant]) -> list[str]:
    """Return a warning of each named layer that variants cut at and nobody measured here."""
    used = {str(stage.at) for variant in variants for stage in all_stages(variant.preset)}
    return loaded.find_calibration(used)[1]


def rough_intervals(files: int) -> list[str]:
    """Return the warning of intervals from so few files."""
    if files >= FEW_FILES:
        return []
    return [f"{counted(files, 'file')}: intervals from fewer than {FEW_FILES} files are rough"]


def file_names(asked: Sequence[Asked]) -> list[str]:
    """Return every file that is asked about, once."""
    return list(dict.fromkeys(str(question.file) for question in asked))


def settings_head(
    loaded: Loaded, asked: Sequence[Asked], settings: AskSettings
) -> Mapping[str, object]:
    """Return what two runs must have in common to share an answers file; variants may differ."""
    questions = [
        [str(each.file.name), each.question, each.answer, each.choices, each.kind, *each.answers]
        for each in asked
    ]
    places = loaded.find_calibration()[0]
    return {
        "version": __version__,
        "model": describe_model(loaded).to_dict(),
        "questions": hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:16],
        "sampling": asdict(settings.sampling),
        "max_new_tokens": settings.generation.max_new_tokens,
        "system": settings.generation.system,
        "metric": settings.metric,
        "calibration": [places.ecl, places.horizon],
    }
