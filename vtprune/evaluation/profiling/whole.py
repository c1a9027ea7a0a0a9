"""Timing the whole model: every row in turn, there and back, beside the unpruned model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import torch

from vtprune.engine.inputs import FeatureCache
from vtprune.errors import VtpruneError
from vtprune.evaluation.profiling.probes import STEPS, run_once
from vtprune.evaluation.profiling.rows import Planned
from vtprune.evaluation.profiling.times import Budget, Measured, Pass, RowTimes
from vtprune.evaluation.profiling.towers import time_encoders
from vtprune.inference.prompts import to_device

if TYPE_CHECKING:
    from vtprune.evaluation.profiling.inputs import Case
    from vtprune.models.loading import Loaded, Progress

TOWER_SHARE = 0.1  # of the budget, for timing the vision tower again


@dataclass
class Run:
    """What one run of one row took."""

    vision: float
    select: float
    prefill: float
    around: float
    decode: float
    visual: tuple[int, ...]


@dataclass
class Encodings:
    """The inputs of every case on the device, and what the vision tower made of them."""

    loaded: Loaded
    tensors: dict[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    encoded: dict[int, FeatureCache] = field(default_factory=dict)
    vision: dict[int, list[float]] = field(default_factory=dict)

    def add(self, case: Case) -> None:
        self.tensors[id(case)] = to_device(self.loaded, case.inputs.tensors)
        self.encoded[id(case)] = {}
        self.vision[id(case)] = []

    def again(self, case: Case) -> float:
        """Runs the vision tower once more on what it was given; seconds."""
        seconds = time_encoders(self.loaded, self.encoded[id(case)])
        self.vision[id(case)].append(seconds)
        return seconds


def measure_whole(
    loaded: Loaded,
    rows: Sequence[Planned],
    budget: Budget,
    repeats: int,
    on_progress: Progress | None = None,
) -> Measured:
    """Times every row on the whole model.

    One warm-up each, then passes of unpruned and all pruned rows, every second one backwards, until
    there are `repeats` of them or the budget is spent; of a row's passes each is compared with the
    unpruned run of the same pass. A pass that ended before all rows had their turn counts for none.

    Args:
        loaded: the whole model, with weights.
        rows: an unpruned one for each case, before the others of it.
    """
    encodings = Encodings(loaded)
    for case in {id(row.case): row.case for row in rows}.values():
        encodings.add(case)
    runs: dict[int, list[Run]] = {id(row): [] for row in rows}
    done, total = 0, len(rows) * (repeats + 1)
    slowest = 0.0
    errors: dict[tuple[object, ...], str] = {}
    for number in range(repeats + 1):
        if number > 1 and budget.left < slowest:
            break
        started = time.perf_counter()
        for row in rows if number % 2 == 0 else reversed(rows):
            if number == 1 and budget.left < 0 and runs[id(row)]:
                continue  # the warm-up has to do
            done += 1
            if row.key in errors:
                continue
            try:
                runs[id(row)].append(run_row(encodings, row))
            except VtpruneError as error:
                if not row.steps:
                    raise
                errors[row.key] = error.message
            if on_progress:
                on_progress("timing", done, total)
        slowest = time.perf_counter() - started
        if number == 0:
            time_towers(encodings, rows, budget)
    good = [row for row in rows if row.key not in errors]
    whole = min(len(runs[id(row)]) for row in good)
    first = min(1, whole - 1)  # the warm-up counts only where there is nothing else
    made = {row.key: sum_up(row, runs[id(row)][first:whole], encodings) for row in good}
    notes = [] if first else ["there was time for one pass only, and for none to warm up before it"]
    return Measured("whole", made, whole - first, budget.seconds - budget.left, notes, "", errors)


def time_towers(encodings: Encodings, rows: Sequence[Planned], budget: Budget) -> None:
    """The vision tower once for every case, and again where that is short."""
    for case in {id(row.case): row.case for row in rows}.values():
        for _ in range(3):
            if encodings.again(case) > TOWER_SHARE * budget.seconds:
                break


def run_row(encodings: Encodings, row: Planned) -> Run:
    case = row.case
    preset = row.wanted.preset if row.steps else None
    # What goes before the vision tower gives it another input, of which nothing is kept.
    encoded = {} if row.encoded else encodings.encoded[id(case)]
    ran = run_once(encodings.loaded, encodings.tensors[id(case)], case, preset, STEPS, encoded)
    took = ran.seconds
    return Run(
        vision=took["vision"],
        select=took["select"],
        prefill=took["prefill"],
        around=max(took["first_choice"] - took["vision"] - took["prefill"], 0.0),
        decode=took["decode"] / STEPS,
        visual=tuple(ran.trace.visual_by_layer[0]),
    )


def sum_up(row: Planned, runs: Sequence[Run], encodings: Encodings) -> RowTimes:
    """A row's medians, and its passes."""
    preprocess = row.case.preprocess_seconds
    tower = None if row.encoded else median(encodings.vision[id(row.case)])

    def vision(run: Run) -> float:
        return run.vision if tower is None else tower

    def middle(part: Callable[[Run], float]) -> float:
        return median(part(run) for run in runs)

    return RowTimes(
        preprocess=preprocess,
        vision=middle(vision),
        select=middle(lambda run: run.select),
        prefill=middle(lambda run: run.prefill),
        around=middle(lambda run: run.around),
        decode_per_token=middle(lambda run: run.decode),
        passes=tuple(
            Pass(run.prefill, preprocess + vision(run) + run.prefill + run.around, run.decode)
            for run in runs
        ),
        visual=runs[-1].visual,
    )
