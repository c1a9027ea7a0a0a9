"""What sampled captions come to: a row a variant, beside the unpruned model's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from vtprune.errors import VtpruneError
from vtprune.evaluation.bootstrap import Difference, Estimate, difference, estimate
from vtprune.evaluation.captions.scores import Cider, distinct, words
from vtprune.evaluation.records import Record
from vtprune.evaluation.rows import Records, VariantRow, describe_row, errors_of
from vtprune.evaluation.variants import UNPRUNED, Variant, group_by_row
from vtprune.inference.csv_file import csv_text, flat, with_ends
from vtprune.inference.provenance import file_digests
from vtprune.inference.questions_file import Asked, faults_of
from vtprune.inference.report import HostInfo, ModelInfo, Versions, describe_host

CIDER, SELF_CIDER = "cider", "self_cider"
MEASURES = (CIDER, SELF_CIDER, "distinct_1", "distinct_2", "words")
"""What captions are measured by: CIDEr-D by the references, then three of their differences, and
how many words one has."""


def caption_key(variant: Variant, turn: int) -> str:
    """Return the name of a caption in an answers file."""
    return f"{variant.key} caption {turn}"


@dataclass(frozen=True)
class CaptionRow(VariantRow):
    """The captions under one way to prune.

    Args:
        questions: how many were answered.
        figures: measure -> its mean over the questions; CIDER without references is not there.
        against_unpruned: measure -> paired difference from the unpruned model's; {} of its own.
    """

    questions: int
    figures: Mapping[str, Estimate]
    against_unpruned: Mapping[str, Difference]

    @property
    def verdict(self) -> str:
        """Whether pruning makes captions poorer, or more alike, in words; "" of no difference."""
        verdicts = []
        for name, title, less, more in (
            (CIDER, "CIDEr", "poorer", "better"),
            (SELF_CIDER, "self-CIDEr", "more alike", "more different"),
        ):
            gap = self.against_unpruned.get(name)
            if gap is None:
                continue
            word = less if gap.high < 0 else more if gap.low > 0 else f"not {less} for certain"
            verdicts.append(f"{word} ({title} {gap.mean:+.2f}, {gap.low:+.2f} to {gap.high:+.2f})")
        return "; ".join(verdicts)

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it."""
        values: dict[str, object] = {
            **self.named("seeds", "questions"),
            "options": dict(self.options),
            "verdict": self.verdict,
        }
        for name in MEASURES:
            figure, gap = self.figures.get(name), self.against_unpruned.get(name)
            values[name] = figure and figure.mean
            values[f"{name}_interval"] = figure and [figure.low, figure.high]
            values[f"{name}_against_unpruned"] = gap and gap.to_dict()
        return self.with_errors(values)


@dataclass(frozen=True)
class CaptionTest:
    """What sampled captions gave.

    Args:
        rows: the unpruned one first.
        captions: of each question.
        temperature, top_p: that they were sampled with.
        media: the files.
        failed: questions that could not be asked, by their numbers in the list.
    """

    model: ModelInfo
    rows: tuple[CaptionRow, ...]
    captions: int
    temperature: float
    top_p: float
    questions: int
    version: Versions
    warnings: tuple[str, ...] = ()
    host: HostInfo = field(default_factory=describe_host)
    media: Sequence[str] = ()
    failed: Mapping[int, VtpruneError] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Return the JSON that `vtprune evaluate --captions N --json` prints."""
        return {
            "model": self.model.to_dict(),
            **{key: getattr(self, key) for key in ("captions", "temperature", "top_p",
                                                   "questions")},
            "files": len(self.media),
            "rows": [row.to_dict() for row in self.rows],
            "failed": faults_of(self.failed),
            "warnings": list(self.warnings),
            "version": self.version.to_dict(),
            "host": self.host.to_dict(),
            "media": file_digests(self.media),
        }  # fmt: skip

    def to_csv(self) -> str:
        """Return one line a row."""
        lines = []
        for row in self.rows:
            values = row.to_dict()
            lines.append({**self.model.to_columns(), **flat(with_ends(values, MEASURES))})
        return csv_text(lines)


@dataclass(frozen=True, eq=False)
class _Captions:
    """The captions of one row: question -> those of every seed; of answered questions only."""

    by_question: Mapping[int, list[list[str]]]
    records: Sequence[Record]


def make_rows(
    asked: Sequence[Asked], variants: Sequence[Variant], number: int, records: Records
) -> tuple[list[CaptionRow], list[str]]:
    """Make the rows from the records that there are; beside them, what the reader should know.

    N-grams are weighed by the references where all questions have some, else by the unpruned
    model's captions.
    """
    groups = group_by_row(variants)
    captions = {row: _collect(len(asked), seeds, number, records) for row, seeds in groups.items()}
    notes = []
    referenced = all(question.right_answers for question in asked)
    if referenced:
        documents: list[Sequence[str]] = [question.right_answers for question in asked]
    else:
        documents = [seeds[0] for seeds in captions[UNPRUNED].by_question.values()]
        if any(question.right_answers for question in asked):
            notes.append("some questions have no references: there is no CIDEr")
    cider = Cider(documents)
    if cider.num_documents < 2:
        notes.append("one question gives n-grams no weight: there is no CIDEr and no self-CIDEr")
    measured = {row: _measure(asked, of_row, cider, referenced) for row, of_row in captions.items()}
    rows = []
    for row, seeds in groups.items():
        errors = errors_of(len(asked), [caption_key(variant, 0) for variant in seeds], records)
        rows.append(_make_row(asked, seeds, captions[row], measured[row], measured[UNPRUNED],
                              errors))  # fmt: skip
    return rows, notes


def _collect(questions: int, seeds: Sequence[Variant], number: int, records: Records) -> _Captions:
    found: dict[int, list[list[str]]] = {}
    every = []
    for question in range(questions):
        of_seeds = [
            [records.get((question, caption_key(variant, turn))) for turn in range(number)]
            for variant in seeds
        ]
        answered = [record for row in of_seeds for record in row if record and not record.error]
        if len(answered) == number * len(seeds):
            every += answered
            found[question] = [[record.answer for record in row if record] for row in of_seeds]
    return _Captions(found, every)


def _measure(
    asked: Sequence[Asked], captions: _Captions, cider: Cider, referenced: bool
) -> dict[str, dict[int, float]]:
    """Return measure -> question -> its value, mean over the seeds."""

    def of_seeds(value: object) -> dict[int, float]:
        assert callable(value)
        return {
            question: mean(value(question, texts) for texts in seeds)
            for question, seeds in captions.by_question.items()
        }

    def right(question: int, texts: list[str]) -> float:
        return mean(cider.score(text, asked[question].right_answers) for text in texts)

    measures = {
        "distinct_1": of_seeds(lambda _, texts: distinct(texts, 1)),
        "distinct_2": of_seeds(lambda _, texts: distinct(texts, 2)),
        "words": of_seeds(lambda _, texts: mean(len(words(text)) for text in texts)),
    }
    if cider.num_documents < 2:
        return measures
    measures[SELF_CIDER] = of_seeds(lambda _, texts: cider.self_cider(texts))
    return {CIDER: of_seeds(right), **measures} if referenced else measures


def _make_row(
    asked: Sequence[Asked],
    seeds: Sequence[Variant],
    captions: _Captions,
    measured: Mapping[str, Mapping[int, float]],
    unpruned: Mapping[str, Mapping[int, float]],
    errors: Iterable[str],
) -> CaptionRow:
    questions = list(captions.by_question)
    files = [str(asked[question].file) for question in questions]
    values = {name: [measured[name][each] for each in questions] for name in measured}
    before = {name: [unpruned[name][each] for each in questions] for name in measured}
    of_another = seeds[0].role != UNPRUNED and questions
    return CaptionRow(
        **describe_row(seeds, captions.records, errors),
        questions=len(questions),
        figures={name: estimate(values[name], files) for name in values} if questions else {},
        against_unpruned={
            name: difference(values[name], before[name], files) for name in values
        } if of_another else {},
    )  # fmt: skip
