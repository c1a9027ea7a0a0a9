"""The search for the best variant: how much of the unpruned quality each keeps on some questions.

`tune` searches presets and methods at several keeps, `calibrate --propose` schedules at one keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, median

from vtprune.evaluation.bootstrap import TINY, Quality, measure_quality, sum_by_file
from vtprune.evaluation.records import Record
from vtprune.evaluation.variants import Variant
from vtprune.inference.questions_file import Asked

Records = Mapping[tuple[int, str], Record]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one variant did on the questions that were asked.

    Args:
        variant: which.
        after, before: quality of each answer, and of the unpruned model's.
        files: the file that each question is about.
        agreement: the share of answers that are the unpruned model's, or the right ones.
        divergence: from the unpruned predictions, mean KL over the first answer tokens.
        keep_mean: the layer average that was really kept.
        first_token_speedup: measured, the median over the questions.
        seed: of the draws of the bound.
        error: why it can't run on one of the questions; the rest says nothing then.
    """

    variant: Variant
    after: Sequence[float] = ()
    before: Sequence[float] = ()
    files: Sequence[str] = ()
    agreement: float = 0.0
    divergence: float = 0.0
    keep_mean: float = 0.0
    first_token_speedup: float = 0.0
    seed: int = 0
    error: str = ""

    @cached_property
    def quality(self) -> Quality:
        """The share of the unpruned quality that is kept, with its lower bound."""
        return measure_quality(self.after, self.before, self.files, self.seed)

    @property
    def rank(self) -> tuple[float, float]:
        """What outcomes are compared by: the quality that is kept, then the divergence."""
        kept, unpruned = sum_by_file([self.after, self.before], self.files).sum(axis=0)
        return float(kept) / max(float(unpruned), TINY), -self.divergence

    def to_dict(self) -> dict[str, float]:
        """Return it as JSON has it."""
        return {
            **self.quality.to_dict(),
            "agreement": self.agreement,
            "divergence": self.divergence,
            "keep_mean": self.keep_mean,
            "first_token_speedup": self.first_token_speedup,
        }


def find_outcomes(
    asked: Sequence[Asked],
    variants: Sequence[Variant],
    records: Records,
    quality: Callable[[Record], float],
    before: Sequence[float],
    unpruned_seconds: Sequence[float] = (),
    seed: int = 0,
) -> list[Outcome]:
    """Return what every variant did, in their order.

    Args:
        records: by question number and key of the variant.
        quality: of one answer.
        before: quality of the unpruned model's answer to each question.
        unpruned_seconds: to its first token; none where nothing was timed.
    """
    files = [str(question.file) for question in asked]
    outcomes = []
    for variant in variants:
        keys = [(number, variant.key) for number in range(len(asked))]
        answers = [records[key] for key in keys if key in records]
        error = next((record.error for record in answers if record.error), "")
        if error:
            outcomes.append(Outcome(variant, error=error))
            continue
        ratios = [
            seconds / max(record.first, 1e-9)
            for seconds, record in zip(unpruned_seconds, answers, strict=False)
        ]
        outcomes.append(
            Outcome(
                variant,
                [quality(record) for record in answers],
                before,
                files,
                mean(float(record.same) for record in answers),
                mean(record.divergence for record in answers),
                mean(record.keep_mean for record in answers),
                median(ratios) if ratios else 0.0,
                seed,
            )
        )
    return outcomes


def best(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome that keeps most, the first of equals."""
    return max(outcomes, key=lambda outcome: outcome.rank)
