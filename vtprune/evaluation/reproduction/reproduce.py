"""Run a published table: its budgets by `profile`, its scores by `evaluate`, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np
import torch

from vtprune.errors import VtpruneError
from vtprune.evaluation.bootstrap import FEWEST_FILES, relative_gap
from vtprune.evaluation.profiling.profile import load_structure, plan_variant
from vtprune.evaluation.profiling.prompts import ProfiledPrompts, largest_picture, parse_size
from vtprune.evaluation.profiling.result import count_flops
from vtprune.evaluation.profiling.rows import profile_variants
from vtprune.evaluation.profiling.shapes import find_shape
from vtprune.evaluation.reproduction.tables import PublishedRow, PublishedTable
from vtprune.evaluation.variants import (
    SEEDS,
    Variant,
    VariantList,
    all_stages,
    repeat_variants,
)
from vtprune.inference.csv_file import csv_text, flat
from vtprune.inference.questions_file import list_number
from vtprune.media import Limits
from vtprune.models import EMBEDDED
from vtprune.models.base import Sampling
from vtprune.preset.spec import Preset

if TYPE_CHECKING:
    from pathlib import Path

    from vtprune.evaluation.evaluate import Evaluation
    from vtprune.evaluation.rows import EvaluationRow
    from vtprune.inference.questions_file import Asked
    from vtprune.models.loading import Progress


@dataclass(frozen=True)
class ReproducedRow:
    """A published row beside what came out here.

    Args:
        published: the row.
        left: layer -> visual tokens from there on, here; None: not counted.
        flops: percent of prefill FLOPs saved here; None: not counted.
        kept: the layer average that was kept of the questions' media; None: none were asked.
        retained: percent of the unpruned model's right answers or, without labels, of its answers.
        interval: 95 % of that, by file; None of fewer than FEWEST_FILES files.
        questions: how many were asked.
        errors: why not all, or why there are no counts.
    """

    published: PublishedRow
    left: Mapping[int, int] | None = None
    flops: float | None = None
    kept: float | None = None
    retained: float | None = None
    interval: tuple[float, float] | None = None
    questions: int = 0
    errors: tuple[str, ...] = ()

    @property
    def difference(self) -> float | None:
        """Points of `retained` here above the published figure."""
        if self.retained is None or self.published.retained is None:
            return None
        return self.retained - self.published.retained

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it."""
        published = self.published
        return {
            "row": published.name,
            "preset": published.preset.to_dict(),
            "published": {
                "retained": published.retained,
                "flops": published.flops,
                "left": {str(layer): count for layer, count in published.left.items()},
            },
            "here": {
                "retained": self.retained,
                "interval": self.interval and list(self.interval),
                "flops": self.flops,
                "left": None
                if self.left is None
                else {str(layer): count for layer, count in self.left.items()},
                "kept": self.kept,
                "questions": self.questions,
            },
            "difference": self.difference,
            "note": published.note,
            "errors": list(self.errors),
        }


@dataclass(frozen=True)
class Reproduction:
    """A published table, run.

    Args:
        model: name of the one that was run.
        tokens: visual tokens of the input whose budgets were counted; None: not counted.
        evaluation: all figures of the questions; None: none were asked.
    """

    table: PublishedTable
    model: str
    rows: tuple[ReproducedRow, ...]
    tokens: int | None = None
    evaluation: Evaluation | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Return the JSON that `vtprune reproduce --json` prints."""
        return {
            "table": self.table.to_dict(),
            "model": self.model,
            "tokens": self.tokens,
            "rows": [row.to_dict() for row in self.rows],
            "evaluation": self.evaluation and self.evaluation.to_dict(),
            "warnings": list(self.warnings),
        }

    def to_csv(self) -> str:
        """Return one line a row."""
        lines = []
        for row in self.rows:
            values = row.to_dict()
            here = values["here"]
            assert isinstance(here, dict)
            low, high = here.pop("interval") or (None, None)
            here |= {"interval": {"low": low, "high": high}}
            for side in (here, values["published"]):
                assert isinstance(side, dict)
                left = side["left"] or {}
                side["left"] = ", ".join(f"{count} from {layer}" for layer, count in left.items())
            del values["preset"], values["errors"]
            lines.append({"table": self.table.name, "model": self.model, **flat(values)})
        return csv_text(lines)


def list_rows(table: PublishedTable, seed: int | None = None) -> VariantList:
    """Return the rows of a table as the variants of an evaluation."""
    from vtprune.preset import override

    variants = []
    for row in table.rows:
        preset = override(row.preset, seed=seed)
        places = dict.fromkeys(stage.at for stage in all_stages(preset))
        keep = preset.keep
        variants.append(Variant("asked", "", preset, keep, ", ".join(places)))
    return VariantList(tuple(variants), Preset(), seed or 0)


@dataclass(frozen=True)
class RowBudget:
    """What a row leaves of an input, and saves.

    Args:
        left: layer -> visual tokens from there on.
        flops: percent of prefill FLOPs saved.
        warnings: what the reader should know.
        error: why it can't cut the input; empty where it can.
    """

    left: Mapping[int, int] = field(default_factory=dict)
    flops: float = 0.0
    warnings: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Budgets:
    """The budgets of a table's rows, in their order, on an input of so many visual tokens."""

    tokens: int
    rows: tuple[RowBudget, ...]


def count_budgets(
    table: PublishedTable,
    model: str | None,
    calibration: Path | None = None,
    on_progress: Progress | None = None,
) -> Budgets:
    """Count tokens and FLOPs of a table's rows, from a model's shape alone.

    Nothing is run or timed, so that the counts are the same on every machine.

    Args:
        model: as of `profile`.

    Raises:
        VtpruneError: of any kind, with the way out.
    """
    size = table.image or table.video
    media = parse_size(size, "image" if table.image else "video") if size else None
    loaded = load_structure(find_shape(model), torch.float32, calibration=calibration)
    prompts = ProfiledPrompts(
        loaded, media or largest_picture(loaded), Sampling(), table.text_tokens, Limits(),
        on_progress,
    )  # fmt: skip
    rows = []
    for variant in profile_variants([1.0], [row.preset for row in table.rows])[1:]:
        row = plan_variant(prompts, variant)
        if row.error:
            rows.append(RowBudget(error=row.error))
            continue
        flops, _ = count_flops(loaded, row, 1)
        left = {cut.layer: cut.after for cut in row.cuts}
        rows.append(RowBudget(left, 100 * flops.reduction, row.warnings))
    return Budgets(len(prompts.distinct[0].layout), tuple(rows))


def run_table(
    table: PublishedTable,
    model: str | None,
    seed: int | None = None,
    seeds: int = SEEDS,
    calibration: Path | None = None,
    on_progress: Progress | None = None,
    ask: Callable[[Sequence[Variant]], tuple[Sequence[Asked], Evaluation]] | None = None,
) -> Reproduction:
    """Count the budgets of a table's rows, and ask questions under them.

    Args:
        model: as of `profile`.
        ask: gets the rows as variants; returns the questions, and what came out. None: tokens and
            FLOPs alone.

    Raises:
        VtpruneError: of any kind; that there are no budgets, where nothing is asked.
    """
    variants = repeat_variants(list_rows(table, seed), seeds)
    budgets, warnings = None, []
    try:
        budgets = count_budgets(table, model, calibration, on_progress)
    except VtpruneError as error:
        if ask is None:
            raise
        warnings = [f"no budgets: {error.message}"]
    if ask is None:
        return put_beside(table, model, budgets)
    asked, evaluation = ask(variants)
    return put_beside(table, model, budgets, evaluation, asked, warnings)


def put_beside(
    table: PublishedTable,
    model: str | None,
    budgets: Budgets | None,
    evaluation: Evaluation | None = None,
    asked: Sequence[Asked] = (),
    warnings: Sequence[str] = (),
) -> Reproduction:
    """Return a table's figures beside what came out here.

    Args:
        model: as of `count_budgets`; the evaluation's name of it comes first.
        budgets: of `count_budgets`.
        evaluation: of the variants of `list_rows`, on the questions `asked`.
    """
    rows = []
    for number, published in enumerate(table.rows):
        found = _Figures()
        if budgets is not None:
            found.count(budgets.rows[number])
        if evaluation is not None:
            by_name = {row.preset: row for row in evaluation.rows if row.role == "asked"}
            found.score(by_name[published.name], evaluation.rows[0], asked)
        rows.append(found.row(published))
    tokens = None if budgets is None else budgets.tokens
    notes = [*warnings, *(evaluation.warnings if evaluation else ())]
    if evaluation is None and budgets is not None:
        notes += [warning for row in budgets.rows for warning in row.warnings]
    if table.tokens is not None and tokens not in (None, table.tokens):
        notes.append(f"the published counts are of {table.tokens:,} visual tokens, and this model "
                     f"has {tokens:,}")  # fmt: skip
    name = evaluation.model.name if evaluation else model or EMBEDDED
    return Reproduction(table, name, tuple(rows), tokens, evaluation, tuple(dict.fromkeys(notes)))


@dataclass
class _Figures:
    """The figures of one row, as they are found."""

    left: dict[int, int] | None = None
    flops: float | None = None
    kept: float | None = None
    retained: float | None = None
    interval: tuple[float, float] | None = None
    questions: int = 0
    errors: list[str] = field(default_factory=list)

    def row(self, published: PublishedRow) -> ReproducedRow:
        """Return the row."""
        return ReproducedRow(published, **{**vars(self), "errors": tuple(self.errors)})

    def count(self, budget: RowBudget) -> None:
        """Take tokens and FLOPs, or why there are none."""
        if budget.error:
            self.errors.append(budget.error)
            return
        self.left, self.flops = dict(budget.left), budget.flops

    def score(self, row: EvaluationRow, unpruned: EvaluationRow, asked: Sequence[Asked]) -> None:
        """Take what is retained of the unpruned model's quality, paired by question."""
        self.errors += row.errors
        self.questions, self.kept = row.questions, row.keep_mean if row.questions else None
        labelled = row.accuracy is not None
        after, before = (_by_question(each, labelled) for each in (row, unpruned))
        numbers = sorted(after.keys() & before.keys())
        quality = [before[number] for number in numbers]
        if not any(quality):
            return
        figures = [np.array([[each[number]] for number in numbers]) for each in (after, before)]
        names = {list_number(asked, place): str(each.file) for place, each in enumerate(asked)}
        files = [names[number] for number in numbers]
        gap = relative_gap(quality, figures[0], figures[1], files)
        self.retained = 100 * (1 + gap.mean)
        if gap.low is not None and gap.high is not None and len(set(files)) >= FEWEST_FILES:
            self.interval = 100 * (1 + gap.low), 100 * (1 + gap.high)


def _by_question(row: EvaluationRow, labelled: bool) -> dict[int, float]:
    """Return the quality of each question, mean over the seeds."""
    values: dict[int, list[float]] = {}
    for record in row.passes:
        value = record.score if labelled else float(record.same)
        values.setdefault(record.question, []).append(value or 0.0)
    return {number: mean(each) for number, each in values.items()}
