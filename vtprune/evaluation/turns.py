"""What pruning for the first question costs the second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from vtprune.evaluation.columns import Column, against, aligned
from vtprune.evaluation.intervals import Difference, Estimate, difference, estimate
from vtprune.inference.questions_file import Asked


@dataclass(frozen=True)
class Second:
    """Second questions of one row, beside the same questions asked fresh.

    Quality is accuracy, or without labels agreement with the unpruned model in the same
    conversation.

    Args:
        questions: how many there are: of all files with two or more.
        quality: of the second questions.
        agreement: the share of their answers that are the unpruned model's, there.
        unpruned: quality of the unpruned model's second answers.
        fresh: quality of the same questions under the same pruning, each asked alone.
        against_unpruned, against_fresh: paired differences to those two.
        change: what asking second changes, pruned, less what it changes unpruned; paired. Below 0:
            the tokens that the first question left are worse for the second than its own would be.
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
        """The block "second" of a row."""
        own = self.quality
        return {
            "questions": self.questions,
            "accuracy": own.mean if labelled else None,
            "agreement": self.agreement,
            "interval": [own.low, own.high],
            "unpruned": self.unpruned,
            "fresh": self.fresh,
            "against_unpruned": self.against_unpruned.to_dict(),
            "against_fresh": self.against_fresh.to_dict(),
            "change": self.change.to_dict(),
        }


def second_of(
    asked: Sequence[Asked], row: str, base: str, columns: Mapping[str, Column], suffix: str
) -> Second | None:
    """The second questions of a row; None where there are none.

    Args:
        base: the unpruned row.
        columns: by row; those of second questions have the suffix.
    """
    names = (row + suffix, base + suffix, row, base)
    if any(name not in columns for name in names):
        return None
    shared = set.intersection(*(set(columns[name].questions) for name in names))
    if not shared:
        return None
    own = [aligned(columns[name], sorted(shared)) for name in names]
    if any(one.right is None for one in own):
        own = [replace(one, right=None) for one in own]
    second, plain, fresh, alone = own
    files = [str(asked[number].file) for number in second.questions]
    changed = [a - b for a, b in zip(second.values, plain.values, strict=True)]
    usual = [a - b for a, b in zip(fresh.values, alone.values, strict=True)]
    to_unpruned, to_fresh = against(asked, second, plain), against(asked, second, fresh)
    assert to_unpruned is not None
    assert to_fresh is not None
    return Second(
        questions=len(shared),
        quality=estimate(second.values, files),
        agreement=mean(second.same),
        unpruned=mean(plain.values),
        fresh=mean(fresh.values),
        against_unpruned=to_unpruned,
        against_fresh=to_fresh,
        change=difference(changed, usual, files),
    )
