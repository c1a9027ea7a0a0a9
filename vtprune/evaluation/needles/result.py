"""What a test with needles gave: a row a variant, with figures by kind and size of the needles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from vtprune.evaluation.bootstrap import Estimate, estimate
from vtprune.evaluation.needles.kinds import KINDS
from vtprune.evaluation.needles.planting import Needle
from vtprune.evaluation.records import Record
from vtprune.evaluation.rows import Records, VariantRow, describe_row, errors_of, records_of
from vtprune.evaluation.variants import Variant, group_by_row
from vtprune.inference.csv_file import csv_text, flat, with_ends
from vtprune.inference.provenance import file_digests
from vtprune.inference.report import HostInfo, ModelInfo, Versions, describe_host

SEEN = 0.5
"""In how many layers, as a share of them, one of a needle's tokens has to be for it to be kept."""
MOST_NEEDLES = 0.9
"""The share of the needles of a size that have to be kept for the size to count as kept."""


@dataclass(frozen=True)
class NeedleFigures:
    """Figures of the needles of a kind and a size under one variant.

    Args:
        kind: of KINDS; None: of all kinds.
        size: share of the shorter side; None: of all sizes, also of those that have none.
        needles: how many were asked about.
        labelled: of how many of them the right answer is known.
        needle_tokens: visual tokens that show a needle, mean.
        tokens: the share of them that is kept, average over the layers.
        tokens_to_end: the share after the last cut, mean.
        found: the share of the needles of which a token is kept through SEEN of the layers.
        right: the share of right answers; None where no right answers are known.
        same: the share of answers that are the unpruned model's.
    """

    kind: str | None
    size: float | None
    needles: int
    labelled: int
    needle_tokens: float
    tokens: Estimate
    tokens_to_end: float
    found: float
    right: Estimate | None
    same: Estimate

    def count(self, name: str) -> int:
        """Return the number of needles behind a figure."""
        return self.labelled if name == "right" else self.needles

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it."""
        values: dict[str, object] = {
            key: getattr(self, key)
            for key in ("kind", "size", "needles", "labelled", "needle_tokens")
        }
        for name in ("tokens", "right", "same"):
            figure: Estimate | None = getattr(self, name)
            values[name] = figure and figure.mean
            values[f"{name}_interval"] = figure and [figure.low, figure.high]
        return {**values, "tokens_to_end": self.tokens_to_end, "found": self.found}


@dataclass(frozen=True)
class NeedleRow(VariantRow):
    """One way to prune, with its figures.

    Args:
        figures: by (kind, size); None stands for all.
        smallest: the least size from which on MOST_NEEDLES of the needles are kept; None where
            not even the largest are.
    """

    figures: Mapping[tuple[str | None, float | None], NeedleFigures]
    smallest: float | None = None

    @property
    def needles(self) -> int:
        """Number of needles that the row was asked about."""
        every = self.figures.get((None, None))
        return every.needles if every else 0

    @property
    def sizes(self) -> list[float]:
        """The sizes of its needles, ascending."""
        return sorted(size for kind, size in self.figures if kind is None and size is not None)

    @property
    def sentence(self) -> str:
        """How small a detail it still keeps, in words; "" without needles of a size."""
        if not self.sizes:
            return ""
        size = self.sizes[-1] if self.smallest is None else self.smallest
        figures = self.figures[None, size]
        width = f"{size:.0%} of the shorter side (about {figures.needle_tokens:.1f} tokens)"
        share = f"{figures.found:.0%} keep a token through half of the layers"
        if self.smallest is None:
            return (f"keeps no size: of details of {width} {share}, and {MOST_NEEDLES:.0%} would "
                    "have to")  # fmt: skip
        return f"keeps details of {width} and larger: of those of this size {share}"

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it."""
        values: dict[str, object] = {
            **self.named("seeds", "smallest", "sentence"),
            "options": dict(self.options),
            "figures": [figures.to_dict() for figures in self.figures.values()],
        }
        return self.with_errors(values)


@dataclass(frozen=True)
class NeedleTest:
    """What a test with needles gave.

    Args:
        rows: the unpruned one first.
        needles: how many were planted.
        media: the files that they were planted in.
    """

    model: ModelInfo
    rows: tuple[NeedleRow, ...]
    needles: int
    version: Versions
    warnings: tuple[str, ...] = ()
    host: HostInfo = field(default_factory=describe_host)
    media: Sequence[str] = ()

    def to_dict(self) -> dict[str, object]:
        """Return the JSON that `vtprune evaluate --needle --json` prints."""
        return {
            "model": self.model.to_dict(),
            "needles": self.needles,
            "files": len(self.media),
            "rows": [row.to_dict() for row in self.rows],
            "warnings": list(self.warnings),
            "version": self.version.to_dict(),
            "host": self.host.to_dict(),
            "media": file_digests(self.media),
        }

    def to_csv(self) -> str:
        """Return one line for each row, kind and size; an empty cell stands for all."""
        lines = []
        for row in self.rows:
            same = {**self.model.to_columns(), **flat(row.named("seeds"))}
            for figures in row.figures.values():
                line = with_ends(figures.to_dict(), ("tokens", "right", "same"))
                lines.append({**same, **line})
        return csv_text(lines)


def make_rows(
    needles: Sequence[Needle], variants: Sequence[Variant], records: Records
) -> list[NeedleRow]:
    """Make the rows of a test from the records that there are."""
    groups = group_by_row(variants)
    return [_make_row(needles, seeds, records) for seeds in groups.values()]


def _make_row(needles: Sequence[Needle], seeds: Sequence[Variant], records: Records) -> NeedleRow:
    of_row = records_of([needle.asked for needle in needles], seeds, records)
    answered = [
        (needles[number], of_seeds)
        for number, of_seeds in zip(of_row.questions, of_row.records, strict=True)
        if all(record.needle is not None for record in of_seeds)
    ]
    cells: dict[tuple[str | None, float | None], list[tuple[Needle, list[Record]]]] = {}
    for needle, of_seeds in answered:
        keys = [(None, None), (None, needle.size), (needle.kind, None), (needle.kind, needle.size)]
        for key in dict.fromkeys(keys):
            cells.setdefault(key, []).append((needle, of_seeds))
    figures = {key: _figures(*key, cells[key]) for key in sorted(cells, key=_in_order)}
    every = [record for of_seeds in of_row.records for record in of_seeds]
    errors = errors_of(len(needles), [variant.key for variant in seeds], records)
    return NeedleRow(
        **describe_row(seeds, every, errors),
        figures=figures,
        smallest=_smallest(figures),
    )


def _in_order(key: tuple[str | None, float | None]) -> tuple[int, float]:
    kind, size = key
    return KINDS.index(kind) if kind else -1, size or 0.0


def _figures(
    kind: str | None, size: float | None, cell: Sequence[tuple[Needle, list[Record]]]
) -> NeedleFigures:
    """Return the figures of some needles, each asked about under every seed."""
    files = [needle.base for needle, _ in cell]

    def means(value: Callable[[Record], float]) -> list[float]:
        return [mean(value(record) for record in of_seeds) for _, of_seeds in cell]

    def kept(record: Record) -> float:
        assert record.needle is not None
        return record.needle.kept

    def longest(record: Record) -> float:
        assert record.needle is not None
        return record.needle.longest

    def kept_to_end(record: Record) -> float:
        assert record.needle is not None
        return record.needle.kept_to_end

    labelled = [(needle, of_seeds) for needle, of_seeds in cell if needle.asked.answer is not None]
    right = [mean(record.score or 0.0 for record in of_seeds) for _, of_seeds in labelled]
    return NeedleFigures(
        kind,
        size,
        len(cell),
        len(labelled),
        mean(of_seeds[0].needle.tokens if of_seeds[0].needle else 0 for _, of_seeds in cell),
        estimate(means(kept), files),
        mean(means(kept_to_end)),
        mean(means(lambda record: float(longest(record) >= SEEN))),
        estimate(right, [needle.base for needle, _ in labelled]) if labelled else None,
        estimate(means(lambda record: float(record.same)), files),
    )


def _smallest(figures: Mapping[tuple[str | None, float | None], NeedleFigures]) -> float | None:
    """Return the least size that is kept, as are all larger ones; None where there is none."""
    smallest = None
    of_sizes = [one for one in figures.values() if one.kind is None and one.size is not None]
    for one in sorted(of_sizes, key=lambda one: -(one.size or 0.0)):
        if one.found < MOST_NEEDLES:
            break
        smallest = one.size
    return smallest
