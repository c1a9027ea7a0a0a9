"""The unpruned model beside the pruned one, on the same inputs and clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from vtprune.inference.generate import Generation, Run, generate
from vtprune.inference.report import CompareResult, CompareSeconds
from vtprune.inference.roofline import Ceilings, measure_ceilings, prefill_bound, weigh
from vtprune.models import cost
from vtprune.preset import Preset

if TYPE_CHECKING:
    from vtprune.inference.prepare import PreparedQuestion
    from vtprune.inference.report import Report
    from vtprune.models.loading import Loaded, Progress

PAIRS = 5
PARTS = ("vision", "select", "prefill", "decode", "first_token", "total")
SPEEDUPS = ("prefill", "first_token", "total")

SecondsByPart = Mapping[str, float]


@dataclass(frozen=True)
class Side:
    """One of the two that are timed side by side.

    Args:
        preset: under which it is answered; None: unpruned.
    """

    question: PreparedQuestion
    preset: Preset | None


@dataclass(frozen=True)
class Pair:
    """Seconds of one unpruned and one pruned run, one right after the other."""

    unpruned: SecondsByPart
    pruned: SecondsByPart


def compare_runs(
    loaded: Loaded,
    question: PreparedQuestion,
    preset: Preset,
    generation: Generation,
    run: Run,
    report: Report,
    on_progress: Progress | None = None,
    full: PreparedQuestion | None = None,
) -> CompareResult:
    """Answers and times with and without pruning.

    One warm-up each, then unpruned and pruned in ABBA order; both are greedy and forced to the
    length of the unpruned answer. Speed-ups are medians of the pairs' ratios; loading is left out.
    Where the report's answer was sampled, a greedy one is given for the comparison, since two
    answers that chance parts say nothing about pruning.

    Args:
        full: the question to the unpruned model, where that is given more of the media.
    """
    steps = 2 * PAIRS + 2
    greedy, sampled = generation.greedy, generation.temperature > 0
    plain, pruned = Side(full or question, None), Side(question, preset)
    unpruned = timed(loaded, plain, greedy)
    answered = timed(loaded, pruned, greedy) if sampled else run
    show(on_progress, 1, steps)
    pairs = time_pairs(
        loaded, plain, pruned, greedy, len(unpruned.tokens), PAIRS,
        lambda done: show(on_progress, 1 + done, steps),
    )  # fmt: skip
    ceilings = measure_ceilings(loaded.model.device, loaded.model.dtype)
    roofline = roofline_speedup(loaded, run, ceilings)
    compared = sum_up(pairs, unpruned.answer, answered, report, roofline)
    return replace(compared, pruned_answer=answered.answer) if sampled else compared


def show(on_progress: Progress | None, done: int, total: int) -> None:
    if on_progress:
        on_progress("comparing", done, total)


def time_pairs(
    loaded: Loaded,
    unpruned: Side,
    pruned: Side,
    generation: Generation,
    length: int,
    num_pairs: int,
    on_run: Callable[[int], None],
) -> list[Pair]:
    """Seconds of both sides in ABBA order, after a warm-up of the pruned one.

    Args:
        generation: greedy.
        length: new tokens that every run is forced to.
        on_run: gets the number of runs done.
    """
    length = max(1, length)
    timed(loaded, pruned, generation, length)
    on_run(1)
    pairs = []
    for number in range(num_pairs):
        order = (unpruned, pruned) if number % 2 == 0 else (pruned, unpruned)
        seconds = {}
        for side in order:
            seconds[id(side)] = add_up(timed(loaded, side, generation, length).seconds)
            on_run(1 + 2 * number + len(seconds))
        pairs.append(Pair(seconds[id(unpruned)], seconds[id(pruned)]))
    return pairs


def medians(seconds: Iterable[SecondsByPart]) -> dict[str, float]:
    """The median of each part."""
    runs = list(seconds)
    return {part: median(run[part] for run in runs) for part in PARTS}


def sum_up(
    pairs: Sequence[Pair], answer: str, run: Run, report: Report, roofline: float | None
) -> CompareResult:
    """The report's `compare`: what was measured beside what the FLOPs promise.

    Args:
        answer: of the unpruned model, greedy.
        run, report: of the pruned one; the run's answer is greedy.
        roofline: as `roofline_speedup` gives it.
    """
    ratio = {
        part: median(pair.unpruned[part] / max(pair.pruned[part], 1e-9) for pair in pairs)
        for part in SPEEDUPS
    }
    predicted = report.flops.prefill_speedup
    unpruned_seconds = medians(pair.unpruned for pair in pairs)
    del unpruned_seconds["select"]
    return CompareResult(
        answer=answer,
        same_answer=answer == run.answer,
        seconds=CompareSeconds(**unpruned_seconds),
        prefill_speedup=ratio["prefill"],
        prefill_predicted=predicted,
        prefill_roofline=roofline,
        realised_fraction=ratio["prefill"] / predicted if predicted else None,
        first_token_speedup=ratio["first_token"],
        total_speedup=ratio["total"],
        pairs=[{"unpruned": dict(pair.unpruned), "pruned": dict(pair.pruned)} for pair in pairs],
    )


def timed(loaded: Loaded, side: Side, generation: Generation, length: int | None = None) -> Run:
    """Answer once, the vision tower included."""
    preset = side.preset or Preset("unpruned", keep=1.0)
    return generate(loaded, [side.question], preset, generation, length=length)[0]


def add_up(seconds: SecondsByPart) -> dict[str, float]:
    """Return the seconds of a run, and those to its first token and to its end."""
    first = seconds["preprocess"] + seconds["first_choice"]
    return {
        **{part: seconds[part] for part in ("vision", "select", "prefill", "decode")},
        "first_token": first,
        "total": seconds["media"] + first + seconds["decode"],
    }


def roofline_speedup(loaded: Loaded, run: Run, ceilings: Ceilings) -> float | None:
    """The prefill speed-up that this machine's measured ceilings allow; None: not counted."""
    shape = loaded.measured_decoder
    if isinstance(shape, cost.CostError):
        return None
    size = loaded.model.dtype.itemsize
    weights = weigh(loaded.model, size)
    full, kept = (
        prefill_bound(ceilings, shape, weights, counts, size).seconds
        for counts in ([sum(run.trace.before())] * shape.layers, run.trace.tokens_by_layer())
    )
    return full / kept
