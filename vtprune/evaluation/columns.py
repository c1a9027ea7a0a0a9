"""Figures by question: of one row, of the questions that rows have in common, and their gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from vtprune.evaluation.intervals import Difference, difference
from vtprune.evaluation.records import Record
from vtprune.evaluation.variants import Variant
from vtprune.inference.questions_file import Asked

Records = Mapping[tuple[int, str], Record]


@dataclass(frozen=True, eq=False)
class Column:
    """One row's figures by question, means over its seeds; only questions that all seeds have."""

    questions: list[int]
    right: list[float] | None
    same: list[float]
    records: list[list[Record]]

    @property
    def values(self) -> list[float]:
        """Quality: how right the answers are, or, without labels, whether they are the same."""
        return self.same if self.right is None else self.right


def column_of(asked: Sequence[Asked], cells: Sequence[Variant], records: Records) -> Column:
    numbers, found = [], []
    for number in range(len(asked)):
        own = [records.get((number, cell.key)) for cell in cells]
        whole = [one for one in own if one is not None and not one.error]
        if len(whole) == len(cells):
            numbers.append(number)
            found.append(whole)
    labelled = bool(found) and all(one.score is not None for own in found for one in own)
    right = [mean(one.score or 0.0 for one in own) for own in found] if labelled else None
    return Column(numbers, right, [mean(float(o.same) for o in own) for own in found], found)


def aligned(column: Column, questions: Sequence[int]) -> Column:
    """The same column, of these questions only."""
    place = {number: i for i, number in enumerate(column.questions)}
    index = [place[number] for number in questions if number in place]
    return Column(
        [column.questions[i] for i in index],
        None if column.right is None else [column.right[i] for i in index],
        [column.same[i] for i in index],
        [column.records[i] for i in index],
    )


def against(asked: Sequence[Asked], column: Column, other: Column | None) -> Difference | None:
    """The paired difference over the questions that both have."""
    if other is None:
        return None
    shared = sorted(set(column.questions) & set(other.questions))
    if not shared:
        return None
    one, two = aligned(column, shared), aligned(other, shared)
    files = [str(asked[number].file) for number in shared]
    if one.right is not None and two.right is not None:
        return difference(one.right, two.right, files)
    return difference(one.same, two.same, files)
