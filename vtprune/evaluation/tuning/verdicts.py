"""From answers to verdicts: what goes on from the search, what holds, and why nothing does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vtprune.evaluation.records import Record
from vtprune.evaluation.summary import Row, summarise
from vtprune.evaluation.tuning.bound import files_needed, measure
from vtprune.evaluation.tuning.candidates import Plan
from vtprune.evaluation.tuning.result import (
    BEATEN,
    BELOW,
    CHOSEN,
    FAILS,
    HOLDS,
    NOT_COUNTED,
    Found,
    Trial,
    percent,
)
from vtprune.evaluation.variants import UNPRUNED, Variant

if TYPE_CHECKING:
    from vtprune.inference.questions_file import Asked

Records = Mapping[tuple[int, str], Record]


def _figures(
    asked: Sequence[Asked], key: str, records: Records, labelled: bool
) -> tuple[list[float], list[float], list[str]]:
    """Quality of a cell's answers, that of the unpruned model's, and the files."""
    numbers = range(len(asked))
    files = [str(one.file) for one in asked]
    if labelled:
        after = [records[number, key].score or 0.0 for number in numbers]
        return after, [records[number, UNPRUNED].score or 0.0 for number in numbers], files
    return [float(records[number, key].same) for number in numbers], [1.0] * len(asked), files


def _found(asked: Sequence[Asked], cell: Variant, row: Row, records: Records, plan: Plan) -> Found:
    quality = measure(*_figures(asked, cell.key, records, plan.labelled), plan.seed)
    return Found(quality, row.agreement.mean, row.divergence, row.keep_mean,
                 row.first_token_speedup)  # fmt: skip


def search(plan: Plan, cells: Sequence[Variant], records: Records) -> list[Trial]:
    """What every candidate did on the part that was searched, in the order of the cells."""
    asked = plan.part(False)
    trials = []
    for cell, row in zip(cells[1:], summarise(asked, cells, records)[1:], strict=True):
        name = f"{cell.name} at {cell.at}" if cell.method else cell.name
        found = None if row.errors else _found(asked, cell, row, records, plan)
        trials.append(Trial(name, cell.preset, cell.keep, found, None, next(iter(row.errors), "")))
    return trials


def _merit(trial: Trial) -> tuple[float, float]:
    assert trial.searched is not None
    return trial.searched.quality.mean, -trial.searched.divergence


def put_in_order(trials: Sequence[Trial], floor: float) -> list[Trial]:
    """The candidates to test, from the highest keep down, from the search alone."""
    left = [one for one in trials if one.searched and one.searched.quality.mean >= floor]
    order: list[Trial] = []
    for keep in sorted({one.kept for one in left}):
        best = max((one for one in left if one.kept == keep), key=_merit)
        if not order or _merit(best) > max(map(_merit, order)):
            order.append(best)
    return order[::-1]


def confirm(
    order: Sequence[Trial], cells: Sequence[Variant], plan: Plan, records: Records
) -> list[Trial]:
    """The candidates with what they did on the held-out part, and their verdicts.

    Args:
        cells: the unpruned one, then one a candidate.
        records: of the held-out part, numbered from 0.
    """
    if not order:
        return []
    asked = plan.part(True)
    tested: list[Trial] = []
    failed = False
    for trial, cell, row in zip(
        order, cells[1:], summarise(asked, cells, records)[1:], strict=True
    ):
        if row.errors:
            verdict = next(iter(row.errors), "")
            tested.append(replace(trial, verdict=verdict))
            failed = True
            continue
        found = _found(asked, cell, row, records, plan)
        holds = found.quality.lower >= plan.floor
        verdict = NOT_COUNTED if failed else HOLDS if holds else FAILS
        failed = failed or not holds
        tested.append(replace(trial, held_out=found, verdict=verdict))
    holding = [number for number, one in enumerate(tested) if one.verdict == HOLDS]
    if holding:
        tested[holding[-1]] = replace(tested[holding[-1]], verdict=CHOSEN)
    return tested


def fallen(trial: Trial, floor: float) -> Trial:
    """A candidate that was not tested, with the reason."""
    if trial.searched is None:
        return trial
    fell = trial.searched.quality.mean < floor
    return replace(trial, verdict=BELOW if fell else BEATEN)


def say_why(
    plan: Plan,
    trials: Sequence[Trial],
    tested: Sequence[Trial],
    cells: Sequence[Variant],
    records: Records,
) -> tuple[tuple[str, str], int | None]:
    """Why nothing was chosen and what would help, and how many questions would tell."""
    if any(one.verdict == CHOSEN for one in tested):
        return ("", ""), None
    what = f"{percent(plan.floor)} of the unpruned model's "
    what += "accuracy" if plan.labelled else "answers"
    if not tested:
        ran = [one for one in trials if one.searched]
        if not ran:
            return (f"no candidate can run on these questions: {trials[0].verdict}",
                    "vtprune methods says what each takes"), None  # fmt: skip
        best = max(ran, key=_merit)
        return (
            f"nothing keeps {what}, searched on {plan.size(False)}: the best, {best.label}, keeps "
            f"{_merit(best)[0]:.1%}",
            "try a higher --keep, other --methods, or a lower --floor",
        ), None
    first = tested[0]
    if first.held_out is None:
        return (f"{first.label} can't run on all held-out questions: {first.verdict}",
                "leave it out: --presets and --methods name the candidates"), None  # fmt: skip
    quality = first.held_out.quality
    told = (f"nothing is shown to keep {what}: {first.label}, the first to be tested, keeps "
            f"{quality.mean:.1%} on {plan.size(True)} held out, lower 95 % bound "
            f"{quality.lower:.1%}")  # fmt: skip
    figures = _figures(plan.part(True), cells[1].key, records, plan.labelled)
    files = files_needed(*figures, plan.floor, plan.seed)
    if files is None:
        return (told, "try a higher --keep, other --methods, or a lower --floor"), None
    times = files / plan.size(True).files
    needed = round(len(plan.asked) * times)
    whole = round(len({one.file for one in plan.asked}) * times)
    return (
        told,
        f"too few questions: some {needed:,} questions about {whole:,} files such as these would "
        "tell; or a lower --floor",
    ), needed
