"""The rows of an evaluation, from the records of its answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, median
from typing import Any

from vtprune.evaluation.bootstrap import Difference, Estimate, difference, estimate
from vtprune.evaluation.records import Record
from vtprune.evaluation.variants import FOLLOW_UP, UNPRUNED, Variant, group_by_row
from vtprune.inference.questions_file import Asked, list_number

LARGEST_LOSS = 700.0  # math.exp goes no further
Records = Mapping[tuple[int, str], Record]
PASS = (
    "question", "answer", "score", "same", "loss", "divergence", "keep_mean", "prefill", "first",
)  # fmt: skip
"""What a row has of each of its questions."""


@dataclass(frozen=True, eq=False)
class RowRecords:
    """The records of one row by question; only of questions that were answered for all its seeds.

    Args:
        questions: their numbers.
        files: the file that each is about.
        right: how right the answers are, means over the seeds; None without labels.
        same: the share of seeds whose answer is the unpruned model's.
        records: of every seed.
    """

    questions: list[int]
    files: list[str]
    right: list[float] | None
    same: list[float]
    records: list[list[Record]]

    @property
    def quality(self) -> list[float]:
        """How right the answers are or, without labels, whether they are the unpruned model's."""
        return self.same if self.right is None else self.right

    def take(self, questions: Sequence[int]) -> RowRecords:
        """Return the records of these questions only."""
        place = {number: i for i, number in enumerate(self.questions)}
        index = [place[number] for number in questions if number in place]
        return RowRecords(
            [self.questions[i] for i in index],
            [self.files[i] for i in index],
            None if self.right is None else [self.right[i] for i in index],
            [self.same[i] for i in index],
            [self.records[i] for i in index],
        )

    def less(self, other: RowRecords) -> Difference | None:
        """Return the paired difference of quality, over the questions that both answered."""
        shared = sorted(set(self.questions) & set(other.questions))
        if not shared:
            return None
        ours, theirs = self.take(shared), other.take(shared)
        if ours.right is not None and theirs.right is not None:
            return difference(ours.right, theirs.right, ours.files)
        return difference(ours.same, theirs.same, ours.files)


def records_of(asked: Sequence[Asked], variants: Sequence[Variant], records: Records) -> RowRecords:
    """Collect the records of one row, which has a variant for every seed."""
    numbers, complete = [], []
    for number in range(len(asked)):
        of_seeds = [records.get((number, variant.key)) for variant in variants]
        answered = [record for record in of_seeds if record is not None and not record.error]
        if len(answered) == len(variants):
            numbers.append(number)
            complete.append(answered)
    labelled = bool(complete) and all(
        record.score is not None for of_seeds in complete for record in of_seeds
    )
    return RowRecords(
        numbers,
        [str(asked[number].file) for number in numbers],
        [mean(record.score or 0.0 for record in row) for row in complete] if labelled else None,
        [mean(float(record.same) for record in row) for row in complete],
        complete,
    )


@dataclass(frozen=True)
class FollowUps:
    """A row's questions asked as follow-ups, compared with the same questions asked alone.

    Quality is accuracy, or without labels agreement with the unpruned model in the same
    conversation.

    Args:
        questions: how many there are: of all files with two or more.
        quality: of the follow-ups.
        agreement: the share of their answers that are the unpruned model's, there.
        unpruned: quality of the unpruned model's follow-ups.
        fresh: quality of the same questions under the same pruning, each asked alone.
        against_unpruned, against_fresh: paired differences to those two.
        change: what asking second changes, pruned, less what it changes unpruned; paired. Below 0:
            the tokens kept for the first question serve the second worse than its own would.
    """

    questions: int
    quality: Estimate
    agreement: float
    unpruned: float
    fresh: float
    against_unpruned: Difference
    against_fresh: Difference
    change: Difference

    def to_dict(self, labelled: bool) -> dict[str, object]:
        """Return the block "second" of a row."""
        return {
            "questions": self.questions,
            "accuracy": self.quality.mean if labelled else None,
            "agreement": self.agreement,
            "interval": [self.quality.low, self.quality.high],
            "unpruned": self.unpruned,
            "fresh": self.fresh,
            "against_unpruned": self.against_unpruned.to_dict(),
            "against_fresh": self.against_fresh.to_dict(),
            "change": self.change.to_dict(),
        }


def compare_follow_ups(row: str, rows: Mapping[str, RowRecords]) -> FollowUps | None:
    """Compare the follow-ups of a row with its own questions; None where there are none."""
    names = (row + FOLLOW_UP, UNPRUNED + FOLLOW_UP, row, UNPRUNED)
    if any(name not in rows for name in names):
        return None
    shared = sorted(set.intersection(*(set(rows[name].questions) for name in names)))
    if not shared:
        return None
    compared = [rows[name].take(shared) for name in names]
    if any(records.right is None for records in compared):
        compared = [replace(records, right=None) for records in compared]
    second, unpruned, fresh, unpruned_fresh = compared
    changed = [a - b for a, b in zip(second.quality, unpruned.quality, strict=True)]
    usual = [a - b for a, b in zip(fresh.quality, unpruned_fresh.quality, strict=True)]
    return FollowUps(
        questions=len(shared),
        quality=estimate(second.quality, second.files),
        agreement=mean(second.same),
        unpruned=mean(unpruned.quality),
        fresh=mean(fresh.quality),
        against_unpruned=difference(second.quality, unpruned.quality, second.files),
        against_fresh=difference(second.quality, fresh.quality, second.files),
        change=difference(changed, usual, second.files),
    )


@dataclass(frozen=True)
class VariantRow:
    """One way to prune, as a row of any table; a row with several seeds is the mean over them.

    Args:
        name: method or preset, place and keep.
        role: "unpruned", "asked" or "baseline".
        preset: the preset's name; None for a method.
        method: the method's name; None for a preset.
        at: where it cuts, as it was asked for.
        keep: as asked; None where the preset sets its keeps itself.
        keep_mean: the layer average that was really kept.
        seeds: how many it was run with.
        options: of the method, as given.
        errors: why questions could not be asked.
    """

    name: str
    role: str
    preset: str | None
    method: str | None
    at: str
    keep: float | None
    keep_mean: float
    seeds: int
    options: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    errors: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def way(self) -> str:
        """Its name without its keep, which rows at other keeps share."""
        return self.name.partition(" keep ")[0]

    def named(self, *counts: str) -> dict[str, object]:
        """Return what JSON has of every row first, its counts such as "seeds" last."""
        keys = ("role", "preset", "method", "at", "keep", "keep_mean", *counts)
        return {"row": self.name, **{key: getattr(self, key) for key in keys}}

    def with_errors(self, values: dict[str, object]) -> dict[str, object]:
        """Return what JSON has of a row, with its errors last where there are some."""
        return {**values, "errors": list(self.errors)} if self.errors else values


def describe_row(
    seeds: Sequence[Variant],
    records: Sequence[Record],
    errors: Iterable[str],
) -> dict[str, Any]:
    """Return the fields of `VariantRow`.

    Args:
        seeds: the variants of the row.
        records: of the questions that were answered.
        errors: of the others, each told once.
    """
    variant = seeds[0]
    return {
        "name": variant.row,
        "role": variant.role,
        "preset": None if variant.method else variant.preset.name,
        "method": variant.method if variant.method and variant.role != UNPRUNED else None,
        "at": variant.at,
        "keep": variant.keep,
        "keep_mean": mean(record.keep_mean for record in records) if records else math.nan,
        "seeds": len(seeds),
        "options": dict(variant.options),
        "errors": tuple(dict.fromkeys(errors)),
    }


def errors_of(questions: int, keys: Sequence[str], records: Records) -> Iterator[str]:
    """Yield why questions could not be asked, of each key of an answers file in turn."""
    for key in keys:
        for number in range(questions):
            record = records.get((number, key))
            if record is not None and record.error:
                yield record.error


@dataclass(frozen=True)
class EvaluationRow(VariantRow):
    """One row of an evaluation.

    Args:
        resolved: the preset that ran, every stage with all its options.
        questions: how many were answered for every seed.
        accuracy: the share of right answers; None without labels.
        relative: accuracy over the unpruned model's.
        agreement: the share of answers that are the unpruned model's.
        by_kind: kind of question -> accuracy, or agreement without labels.
        kind_questions: kind of question -> how many were answered.
        against_unpruned, against_random: paired differences of accuracy, or of agreement;
            against random at the input with the same keep.
        divergence, perplexity: of the unpruned answer's tokens under pruning.
        prefill_speedup, first_token_speedup: medians of the questions' ratios.
        reads_question: the method is question-aware.
        second: of the questions asked as follow-ups; None where they were not.
        passes: what was measured of every question, under every seed; numbers of questions are
            those of their list, as in `failed`.
    """

    questions: int
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
    resolved: Mapping[str, object] = field(default_factory=dict)
    second: FollowUps | None = None
    kind_questions: Mapping[str, int] = field(default_factory=dict)
    passes: Sequence[Record] = ()

    @property
    def quality(self) -> Estimate:
        """Accuracy, or agreement without labels."""
        return self.accuracy or self.agreement

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it."""
        accuracy = self.accuracy
        values: dict[str, object] = {
            **self.named("questions", "seeds"),
            "accuracy": accuracy.mean if accuracy else None,
            "interval": [accuracy.low, accuracy.high] if accuracy else None,
            "relative": self.relative,
            "agreement": self.agreement.mean,
            "agreement_interval": [self.agreement.low, self.agreement.high],
            "by_kind": dict(self.by_kind),
            "kind_questions": dict(self.kind_questions),
            "against_unpruned": self.against_unpruned and self.against_unpruned.to_dict(),
            "against_random": self.against_random and self.against_random.to_dict(),
            **{key: getattr(self, key) for key in ("divergence", "perplexity", "prefill_speedup",
                                                   "first_token_speedup", "reads_question")},
            "options": dict(self.options),
            "resolved_preset": dict(self.resolved),
            "passes": [{key: getattr(record, key) for key in PASS} for record in self.passes],
        }  # fmt: skip
        if self.second:
            values["second"] = self.second.to_dict(accuracy is not None)
        return self.with_errors(values)


def make_rows(
    asked: Sequence[Asked], variants: Sequence[Variant], records: Records
) -> list[EvaluationRow]:
    """Make the rows of an evaluation from the records that there are.

    Args:
        records: by question number and key of the variant.
    """
    groups = group_by_row(variants)
    rows = {row: records_of(asked, seeds, records) for row, seeds in groups.items()}
    return [
        _make_row(asked, seeds, rows, records)
        for seeds in groups.values() if not seeds[0].follow_up
    ]  # fmt: skip


def _make_row(
    asked: Sequence[Asked],
    seeds: Sequence[Variant],
    rows: Mapping[str, RowRecords],
    records: Records,
) -> EvaluationRow:
    variant = seeds[0]
    of_row, unpruned = rows[variant.row], rows[UNPRUNED]
    accuracy = None if of_row.right is None else estimate(of_row.right, of_row.files)
    before = unpruned.take(of_row.questions)
    relative = None
    if of_row.right is not None and before.right is not None and any(before.right):
        relative = mean(of_row.right) / mean(before.right)
    by_kind: dict[str, list[float]] = {}
    for number, value in zip(of_row.questions, of_row.right or of_row.same, strict=True):
        by_kind.setdefault(asked[number].kind, []).append(value)
    every = [record for of_seeds in of_row.records for record in of_seeds]
    random = None if variant.keep is None else rows.get(f"random at input keep {variant.keep:g}")
    errors = errors_of(len(asked), [variant.key for variant in seeds], records)
    losses = [record.loss for record in every]
    return EvaluationRow(
        **describe_row(seeds, every, errors),
        questions=len(of_row.questions),
        accuracy=accuracy,
        relative=relative,
        agreement=estimate(of_row.same, of_row.files),
        by_kind={kind: mean(values) for kind, values in sorted(by_kind.items())},
        kind_questions={kind: len(values) for kind, values in sorted(by_kind.items())},
        against_unpruned=None if of_row is unpruned else of_row.less(unpruned),
        against_random=of_row.less(random) if random not in (None, of_row) else None,
        divergence=mean(record.divergence for record in every) if every else math.nan,
        perplexity=math.exp(min(mean(losses), LARGEST_LOSS)) if losses else math.nan,
        prefill_speedup=_median_speedup(of_row, before, lambda record: record.prefill),
        first_token_speedup=_median_speedup(of_row, before, lambda record: record.first),
        reads_question=bool(variant.preset.question_aware_methods()),
        resolved={} if variant.matches else variant.preset.to_dict(),
        second=compare_follow_ups(variant.row, rows),
        passes=[replace(record, question=list_number(asked, record.question)) for record in every],
    )


def _median_speedup(
    row: RowRecords, unpruned: RowRecords, seconds: Callable[[Record], float]
) -> float:
    """Return the median over the questions of unpruned over pruned seconds."""
    ratios = [
        seconds(before[0]) / max(seconds(record), 1e-9)
        for of_seeds, before in zip(row.records, unpruned.records, strict=False)
        for record in of_seeds
    ]
    return float(median(ratios)) if ratios else math.nan
