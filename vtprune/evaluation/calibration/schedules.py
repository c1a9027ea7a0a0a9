"""Schedules: a layer-average budget spent on breadth (tokens) or depth (layers); which loses least.

`vtprune calibrate --propose` tries them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vtprune.errors import PresetError
from vtprune.evaluation.bootstrap import Change, Gap, relative_change, relative_gap
from vtprune.evaluation.records import Record
from vtprune.evaluation.search import Records, find_outcomes
from vtprune.evaluation.variants import Variant, split_options
from vtprune.inference.questions_file import Asked
from vtprune.inference.wording import with_options
from vtprune.preset import load_preset, override
from vtprune.preset.calibration import Calibration
from vtprune.pruners import METHODS, find_method
from vtprune.tokens.schedule import SLACK

SELECTORS = ("spread", "entropy", "random", "uniform")
DEPTHS = (1 / 4, 1 / 2, 3 / 4)  # between the depth where all tokens use the budget up, and the end
LEFT = 1 / 6  # of the budget that random keeps past the horizon, as in `entropy-horizon`
SEED = 0
LayersToCut = Callable[[Mapping[str, object]], Sequence[int]]
"""A stage in the preset schema -> the layers, ascending, that it can cut before."""


@dataclass(frozen=True)
class CandidateSchedule:
    """One way to spend a budget.

    Args:
        name: as in the table.
        stages: in the preset schema; one is free, and meets the budget.
    """

    name: str
    stages: tuple[Mapping[str, object], ...]

    def variant(self, keep: float) -> Variant:
        """Return the schedule at a layer average; one that can't be met holds the error."""
        variant = Variant("asked", "", load_preset({"stages": list(self.stages)}), keep)
        variant = replace(variant, preset=replace(variant.preset, name=self.name))
        try:
            return replace(variant, preset=override(variant.preset, keep, seed=SEED))
        except PresetError as error:
            return replace(variant, error=error)


@dataclass(frozen=True)
class TriedSchedule:
    """What a schedule did.

    Args:
        schedule: which.
        keep_mean: layer average of what was really kept, over the questions.
        change: of quality against the unpruned model; one entry.
        behind: the best schedule's change less this one's, and its interval.
        apart: whether that interval has no 0 in it.
        exact: share of the answers that are what greedy decoding gives.
        unreachable: why the budget can't be met; the rest says nothing then.
    """

    schedule: CandidateSchedule
    keep_mean: float = 0.0
    change: Change | None = None
    behind: Gap | None = None
    apart: bool = False
    exact: float = 0.0
    unreachable: str = ""


def list_schedules(
    keep: float,
    num_layers: int,
    calibration: Calibration,
    selectors: Sequence[str] = SELECTORS,
    options: Mapping[str, str] | None = None,
    layers_to_cut: LayersToCut | None = None,
) -> list[CandidateSchedule]:
    """List a few splits of a budget, from one cut at the start to all tokens until it is used up.

    Every selector by its own schedule, if it has one; at one place alone; with random past the
    horizon; and with everything dropped at the horizon and at depths between; last, no selector:
    all tokens to the depth that the budget pays for.

    Args:
        options: of every selector that has such an option.
        layers_to_cut: of the model; None: all layers.

    Raises:
        PresetError: a selector is no method that chooses tokens, or an option is none of theirs.
    """
    schedules = []
    by_selector = split_options([name for name in selectors if name in METHODS], options or {})
    horizon, paid = calibration.horizon, keep * num_layers
    can_cut = layers_to_cut or (lambda _: range(num_layers))
    can_drop = can_cut({"at": "ecl", "method": "vtw"})
    wanted = {round(paid + part * (num_layers - paid)) for part in DEPTHS}
    depths = {min(can_drop, key=lambda layer: abs(layer - depth)) for depth in wanted}
    if horizon < num_layers:
        horizon = _next(can_drop, horizon)
    for name in selectors:
        method = find_method(name)
        if not method.chooses:
            choosing = [other for other, entry in METHODS.items() if entry.chooses]
            raise PresetError(
                f"method {name} chooses no tokens: all schedules end with it or without it",
                f"choose from {', '.join(choosing)}",
            )
        label = with_options(name, by_selector[name])
        if method.schedule:
            stage = {"at": "schedule", "method": name, **by_selector[name]}
            schedules.append(CandidateSchedule(f"{label}, its own schedule", (stage,)))
            if method.lowest:  # it can't cut at the input, and any other one place is a guess
                continue
        at = "ecl" if method.at == "ecl" or method.lowest else "input"
        first: dict[str, object] = {"at": at, "method": name, **by_selector[name]}
        start = _next(can_cut(first), calibration.ecl) if at == "ecl" else 0
        schedules.append(CandidateSchedule(f"{label} at {at}", (first,)))
        if start < horizon < num_layers:
            last = {"at": "horizon", "method": "random", "keep": round(LEFT * keep, 4)}
            schedules.append(
                CandidateSchedule(f"{label} at {at}, random at horizon", (first, last))
            )
        for depth in sorted({*depths, horizon}):
            if max(start, paid) < depth < num_layers:
                last = {"at": "horizon" if depth == horizon else depth, "method": "vtw", "keep": 0}
                place = f"horizon ({depth})" if depth == horizon else f"layer {depth}"
                schedules.append(
                    CandidateSchedule(f"{label} at {at}, none from {place}", (first, last))
                )
    if last_paid := max((n for n in can_drop if n <= paid + SLACK), default=0):
        everything = {"at": last_paid, "method": "vtw"}
        schedules.append(CandidateSchedule(f"all, none from layer {last_paid}", (everything,)))
    return schedules


def _next(layers: Sequence[int], layer: int) -> int:
    """Return where a cut at a named place is made: the next of some layers, else their last."""
    return next((n for n in layers if n >= layer), layers[-1] if layers else layer)


def rank_schedules(
    schedules: Sequence[CandidateSchedule],
    variants: Sequence[Variant],
    asked: Sequence[Asked],
    records: Iterable[Record],
    before: Sequence[float],
) -> tuple[TriedSchedule, ...]:
    """Return what all schedules did, the best first, and last those that can't meet the budget.

    Args:
        variants: of the schedules.
        records: of every question under every variant; their score is the quality.
        before: quality of the unpruned model's answers.
    """
    by_key: Records = {(record.question, record.cell): record for record in records}
    outcomes = find_outcomes(asked, variants, by_key, lambda record: record.score or 0.0, before)
    pairs = list(zip(schedules, outcomes, strict=True))
    ran = sorted((pair for pair in pairs if not pair[1].error), key=lambda pair: -pair[1].rank[0])
    tried = []
    for schedule, outcome in ran:
        after, best = (np.array(each.after)[:, None] for each in (outcome, ran[0][1]))
        behind = relative_gap(before, best, after, outcome.files)
        tried.append(
            TriedSchedule(
                schedule,
                outcome.keep_mean,
                relative_change(before, after, outcome.files),
                behind,
                apart=behind.low is not None and behind.low > 0,
                exact=outcome.agreement,
            )
        )
    unreachable = [
        TriedSchedule(schedule, unreachable=outcome.error)
        for schedule, outcome in pairs
        if outcome.error
    ]
    return (*tried, *unreachable)
