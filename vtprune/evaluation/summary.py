"""From records to rows: accuracy, agreement, intervals, and how fast it was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median

from vtprune.evaluation.columns import Column, Records, against, aligned, column_of
from vtprune.evaluation.intervals import Difference, Estimate, estimate, holm
from vtprune.evaluation.turns import Second, second_of
from vtprune.evaluation.variants import FOLLOW_UP, UNPRUNED, Variant
from vtprune.inference.csv_file import csv_text, flat
from vtprune.inference.questions_file import Asked

LARGEST_LOSS = 700.0  # math.exp goes no further


@dataclass(frozen=True)
class Row:
    """One row of an evaluation; a row with several seeds is the mean over them.

    Args:
        name: what it is called, its place and keep included.
        role: "unpruned", "asked" or "baseline".
        preset: the preset's name; None for a method.
        method: the method's name; None for a preset.
        options: of the method, as they were given.
        resolved: the preset that ran, every stage with all its options.
        at: where it cuts, as it was asked for.
        keep: as asked; None where the preset says its keeps itself.
        keep_mean: the layer average that was really kept.
        questions: how many were answered in every seed.
        seeds: how many it was run with.
        accuracy: the share of right answers with its interval; None without labels.
        relative: accuracy over the unpruned model's.
        agreement: the share of answers that are the unpruned model's, with its interval.
        by_kind: kind of question -> accuracy, or agreement without labels.
        against_unpruned, against_random: paired differences of accuracy, or of agreement;
            against random at the input with the same keep.
        divergence, perplexity: of the unpruned answer's tokens under pruning.
        prefill_speedup, first_token_speedup: medians of the questions' ratios.
        reads_question: what is kept depends on the question.
        second: of the questions asked second; None where they were not.
        errors: why questions could not be asked.
    """

    name: str
    role: str
    preset: str | None
    method: str | None
    at: str
    keep: float | None
    keep_mean: float
    questions: int
    seeds: int
    accuracy: Estimate | None
    relative: float | None
    agreement: Estimate
    by_kind: Mapping[str, float]
    against_unpruned: Difference | None
    against_random: Difference | None
    divergence: float
    perplexity: float
    prefill_speedup: float
    first_token_speedup: float
    reads_question: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    resolved: Mapping[str, object] = field(default_factory=dict)
    second: Second | None = None
    errors: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The row as JSON."""
        quality = self.accuracy
        shown: dict[str, object] = {
            "row": self.name,
            "role": self.role,
            "preset": self.preset,
            "method": self.method,
            "at": self.at,
            "keep": self.keep,
            "keep_mean": self.keep_mean,
            "questions": self.questions,
            "seeds": self.seeds,
            "accuracy": quality.mean if quality else None,
            "interval": [quality.low, quality.high] if quality else None,
            "relative": self.relative,
            "agreement": self.agreement.mean,
            "agreement_interval": [self.agreement.low, self.agreement.high],
            "by_kind": dict(self.by_kind),
            "against_unpruned": _told(self.against_unpruned),
            "against_random": _told(self.against_random),
            "divergence": self.divergence,
            "perplexity": self.perplexity,
            "prefill_speedup": self.prefill_speedup,
            "first_token_speedup": self.first_token_speedup,
            "reads_question": self.reads_question,
            "options": dict(self.options),
            "resolved_preset": dict(self.resolved),
        }
        if self.second:
            shown["second"] = self.second.to_dict(self.accuracy is not None)
        return {**shown, "errors": list(self.errors)} if self.errors else shown


def _told(found: Difference | None) -> dict[str, float] | None:
    return None if found is None else found.to_dict()


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Args:
        model: as in a report.
        rows: the unpruned one first.
        labelled: whether right answers are known for all questions.
        files: how many.
    """

    model: Mapping[str, object]
    rows: tuple[Row, ...]
    questions: int
    files: int
    labelled: bool
    warnings: tuple[str, ...] = ()
    version: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """The JSON that `vtprune evaluate --json` prints."""
        return {
            "model": dict(self.model),
            "questions": self.questions,
            "files": self.files,
            "labelled": self.labelled,
            "rows": [row.to_dict() for row in self.rows],
            "warnings": list(self.warnings),
            "version": dict(self.version),
        }

    def to_csv(self) -> str:
        """One line a row, its blocks as columns, under a line of their names."""
        same = {
            **{key: self.model.get(key) for key in ("device", "dtype", "attention")},
            "model": self.model.get("name"),
            "files": self.files,
        }
        return csv_text([{**same, **flat(_ends(row.to_dict()))} for row in self.rows])


def _ends(values: Mapping[str, object]) -> dict[str, object]:
    """A block whose intervals are blocks too: {"interval": {"low": 0.4, "high": 0.6}}."""
    found: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = _ends(value)
        elif name.endswith("interval") and isinstance(value, list):
            value = dict(zip(("low", "high"), value, strict=True))
        found[name] = value
    return found


def summarise(asked: Sequence[Asked], cells: Sequence[Variant], records: Records) -> list[Row]:
    """The rows of an evaluation, from the records that there are.

    Args:
        records: by question number and cell key; those of a row with an error are left out.
    """
    groups: dict[str, list[Variant]] = {}
    for cell in cells:
        groups.setdefault(cell.row, []).append(cell)
    columns = {row: column_of(asked, own, records) for row, own in groups.items()}
    return [
        _row(asked, row, own, columns, records)
        for row, own in groups.items() if not own[0].follow_up
    ]  # fmt: skip


def _row(
    asked: Sequence[Asked],
    name: str,
    cells: Sequence[Variant],
    columns: Mapping[str, Column],
    records: Records,
) -> Row:
    column, base = columns[name], columns[UNPRUNED]
    entry = cells[0]
    files = [str(asked[number].file) for number in column.questions]
    accuracy = None if column.right is None else estimate(column.right, files)
    before = aligned(base, column.questions)
    relative = None
    if column.right is not None and before.right is not None and any(before.right):
        relative = mean(column.right) / mean(before.right)
    by_kind: dict[str, list[float]] = {}
    for number, value in zip(column.questions, column.right or column.same, strict=True):
        by_kind.setdefault(asked[number].kind, []).append(value)
    flat = [one for own in column.records for one in own]
    random = next(
        (
            columns[cell]
            for cell in columns
            if entry.keep is not None and cell == f"random at input keep {entry.keep:g}"
        ),
        None,
    )
    errors = dict.fromkeys(
        record.error
        for cell in cells
        for number in range(len(asked))
        if (record := records.get((number, cell.key))) is not None and record.error
    )
    is_method = bool(entry.method) and entry.role != UNPRUNED
    return Row(
        name=name,
        role=entry.role,
        preset=None if entry.method else entry.preset.name,
        method=entry.method if is_method else None,
        at=entry.at,
        keep=entry.keep,
        keep_mean=mean(one.keep_mean for one in flat) if flat else math.nan,
        questions=len(column.questions),
        seeds=len(cells),
        accuracy=accuracy,
        relative=relative,
        agreement=estimate(column.same, files),
        by_kind={kind: mean(values) for kind, values in sorted(by_kind.items())},
        against_unpruned=None if name == UNPRUNED else against(asked, column, base),
        against_random=against(asked, column, random) if random not in (None, column) else None,
        divergence=mean(one.divergence for one in flat) if flat else math.nan,
        perplexity=_perplexity([one.loss for one in flat]),
        prefill_speedup=_speedup(column, before, "prefill"),
        first_token_speedup=_speedup(column, before, "first"),
        reads_question=bool(entry.preset.readers()),
        options=dict(entry.options),
        resolved={} if cells[0].matches else entry.preset.to_dict(),
        second=second_of(asked, name, UNPRUNED, columns, FOLLOW_UP),
        errors=tuple(errors),
    )


def _perplexity(losses: Sequence[float]) -> float:
    return math.exp(min(mean(losses), LARGEST_LOSS)) if losses else math.nan


def _speedup(column: Column, base: Column, part: str) -> float:
    """The median over the questions of unpruned over pruned seconds."""
    ratios = [
        getattr(before[0], part) / max(getattr(one, part), 1e-9)
        for own, before in zip(column.records, base.records, strict=False)
        for one in own
    ]
    return float(median(ratios)) if ratios else math.nan


def compare_with_rivals(
    asked: Sequence[Asked], cells: Sequence[Variant], records: Records, row: str
) -> list[tuple[str, Difference, float]]:
    """One row against every other of the same keep: (rival, difference, Holm-adjusted p-value).

    A p-value is one-sided: that the row is not worse. Below 0.05 it is worse than that rival, also
    after the correction for their number.
    """
    groups: dict[str, list[Variant]] = {}
    for cell in (one for one in cells if not one.follow_up):
        groups.setdefault(cell.row, []).append(cell)
    own = column_of(asked, groups[row], records)
    keep = groups[row][0].keep
    rivals = [
        name for name, of in groups.items() if name not in (row, UNPRUNED) and of[0].keep == keep
    ]
    found = [
        (name, gap)
        for name in rivals
        if (gap := against(asked, own, column_of(asked, groups[name], records))) is not None
    ]
    adjusted = holm([gap.worse for _, gap in found])
    return [(name, gap, p) for (name, gap), p in zip(found, adjusted, strict=True)]
