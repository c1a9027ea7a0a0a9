"""From what was counted and measured of a row to its figures in the report's names."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

from vtprune.evaluation.profiling.costs import cost_row
from vtprune.evaluation.profiling.machine import ProfiledModel, Roofline
from vtprune.evaluation.profiling.row_times import Measurement, PassTimes, RowTimes
from vtprune.evaluation.profiling.rows import PlannedRow, as_cut, is_preset
from vtprune.evaluation.profiling.verdict import Facts
from vtprune.evaluation.variants import UNPRUNED

if TYPE_CHECKING:
    from vtprune.evaluation.profiling.inputs import Case


class Found:
    """One row with its costs, its seconds, and what it would take at the machine's ceilings.

    Args:
        planned: the row before anything ran; `row` is as it was cut then.
        plain: the row without cuts of the same input.
        measured: None: nothing was.
    """

    def __init__(
        self,
        model: ProfiledModel,
        planned: PlannedRow,
        plain: PlannedRow,
        answer_tokens: int,
        measured: Measurement | None = None,
    ) -> None:
        self.planned, self.answer_tokens = planned, answer_tokens
        self.times = self.plain_times = None
        self.row, self.plain = planned, plain
        if measured is not None:
            self.times = measured.rows[planned.key]
            self.plain_times = measured.rows[plain.key]
            self.row = as_cut(planned, self.times.visual)
        size = model.dtype.itemsize
        self.costs = cost_row(model.loaded, self.row, answer_tokens, size)
        self.peak, self.weights = model.peak_bytes(self.row.counts), model.weights.total
        before = cost_row(model.loaded, plain, answer_tokens, size)
        self.roof, self.plain_roof = (
            model.roofline(one.counts, float(costs.flops["vision"]))  # type: ignore[arg-type]
            for one, costs in ((self.row, self.costs), (plain, before))
        )

    @property
    def predicted(self) -> float:
        """The prefill's speed-up that the FLOPs promise."""
        flops = self.costs.flops
        return float(flops["prefill_full"]) / float(flops["prefill"])  # type: ignore[arg-type]

    def facts(self) -> Facts:
        """What a verdict is made of: what was measured, else what the ceilings allow."""
        case = self.row.case
        shown = describe_size(case)
        limit = self.plain_roof.prefill / self.roof.prefill
        preprocess = case.preprocess_seconds
        times = self.times.typical if self.times else times_of(self.roof, preprocess)
        unpruned = self.plain_times
        plain = unpruned.typical if unpruned else times_of(self.plain_roof, preprocess)
        gains = self.speedups(self.whole) if self.times else ()
        return Facts(
            name=self.row.name,
            tokens=len(case.layout),
            seconds=time_parts(times, self.answer_tokens),
            speedup=median(gains)
            if gains
            else plain.total(self.answer_tokens) / times.total(self.answer_tokens),
            prefill_speedup=median(self.speedups(prefill_of)) if self.times else limit,
            predicted=self.predicted,
            roofline=limit,
            frames=shown["frames"],
            tiles=shown["tiles"],
            pruned=bool(self.row.cuts),
            named=is_preset(self.row.variant),
            thinned=self.row.encoded is not None or bool(case.inputs.whole),
            totals=tuple(map(self.whole, self.times.passes)) if self.times else (),
            gains=gains,
        )

    @property
    def above_roofline(self) -> bool:
        """Whether every pass was faster than the machine's ceilings allow."""
        limit = self.plain_roof.prefill / self.roof.prefill
        return min(self.speedups(prefill_of)) > limit

    @property
    def prefill_seconds(self) -> float:
        """Median over the passes."""
        assert self.times is not None
        return self.times.typical.prefill

    def same_cuts(self, other: Found) -> bool:
        """Whether the other row is of the list of keeps too, and the same cuts in it."""
        ways = [
            (one.method, one.stages_of, one.options)
            for one in (self.row.variant, other.row.variant)
            if not is_preset(one)
        ]
        return len(ways) == 2 and ways[0] == ways[1]

    def whole(self, one: PassTimes) -> float:
        """Seconds of a pass to the end of the answer."""
        return one.total(self.answer_tokens)

    def speedups(self, seconds: Callable[[PassTimes], float]) -> tuple[float, ...]:
        """Over the unpruned row on the same input, pass by pass."""
        assert self.times is not None
        assert self.plain_times is not None
        return self.times.speedups(self.plain_times, seconds)


def prefill_of(one: PassTimes) -> float:
    return one.prefill


def first_token_of(one: PassTimes) -> float:
    return one.first_token


def times_of(roof: Roofline, preprocess: float) -> PassTimes:
    """Seconds at the machine's ceilings."""
    return PassTimes(preprocess, roof.vision, 0.0, roof.prefill, 0.0, roof.decode_per_token)


def time_parts(times: PassTimes, answer_tokens: int) -> dict[str, float]:
    """Seconds by part, and their sums; selection is in the prefill."""
    return {
        "preprocess": times.preprocess,
        "vision": times.vision,
        "select": times.select,
        "prefill": times.prefill,
        "around": times.around,
        "decode": max(answer_tokens - 1, 0) * times.decode_per_token,
        "first_token": times.first_token,
        "total": times.total(answer_tokens),
    }


def make_row(found: Found) -> dict[str, object]:
    """A row as `--json` prints it.

    `keep`, `preset` (None for a row of the list of keeps), what cuts such a row (`method`, or
    `stages_of` a preset, with the `options` that were given), `input`: what the unpruned model is
    shown beside it, `measured`: how, the blocks of a report, `memory_bytes` with an estimated peak,
    and `roofline`: seconds at the machine's ceilings. Without measuring `seconds` is None, and
    `compare` has only what needs no clock.
    """
    row, costs = found.row, found.costs
    roof = found.roof
    first, plain_first = (
        row.case.preprocess_seconds + one.vision + one.prefill for one in (roof, found.plain_roof)
    )
    compare: dict[str, object] = {
        "prefill_predicted": found.predicted,
        "prefill_roofline": found.plain_roof.prefill / roof.prefill,
        "first_token_roofline": plain_first / first,
    }
    seconds = None
    if found.times and found.plain_times:
        own = seconds_of(found.times, found)
        seconds = {"load": 0.0, "media": row.case.media_seconds, **own}
        compare |= compare_times(found)
    return {
        **named(row),
        "input": describe_size(found.plain.case),
        "measured": found.times.how if found.times else None,
        "tokens": costs.tokens,
        "flops": costs.flops,
        "kv_cache_bytes": costs.kv_cache_bytes,
        "memory_bytes": {"weights": found.weights, "peak": found.peak},
        "seconds": seconds,
        "roofline": {
            "vision": roof.vision,
            "prefill": roof.prefill,
            "decode_per_token": roof.decode_per_token,
            "first_token": first,
        },
        "compare": compare,
        "warnings": list(row.warnings),
    }


def seconds_of(times: RowTimes, found: Found) -> dict[str, float]:
    """The report's `seconds`, and those of one decoded token."""
    typical = times.typical
    parts = time_parts(typical, found.answer_tokens)
    del parts["around"]
    parts["total"] += found.row.case.media_seconds
    return {**parts, "decode_per_token": typical.decode_per_token}


def compare_times(found: Found) -> dict[str, object]:
    """The report's `compare`: beside the unpruned model on the same input, pass by pass.

    A speed-up is the median over the passes, a spread the least and the greatest.
    """
    assert found.plain_times is not None
    before = seconds_of(found.plain_times, found)
    parts = {"prefill": prefill_of, "first_token": first_token_of, "total": found.whole}
    told: dict[str, object] = {
        "seconds": {
            part: before[part] for part in ("vision", "prefill", "decode", "first_token", "total")
        },
    }
    for part, seconds in parts.items():
        speedups = found.speedups(seconds)
        told |= {f"{part}_speedup": median(speedups),
                 f"{part}_spread": [min(speedups), max(speedups)]}  # fmt: skip
    realised = median(found.speedups(prefill_of)) / found.predicted
    return {**told, "realised_fraction": realised}


def named(row: PlannedRow) -> dict[str, object]:
    """Which row it is, and what cuts it."""
    variant = row.variant
    return {
        "keep": variant.keep,
        "preset": variant.name if is_preset(variant) else None,
        "method": None if variant.role == UNPRUNED else variant.method or None,
        "stages_of": variant.stages_of,
        "options": dict(variant.options),
    }


def describe_size(case: Case) -> dict[str, int]:
    """How much an input shows."""
    return {
        "frames": sum(len(item.index) for item in case.gathered.items if item.timestamps),
        "tiles": max(case.inputs.tiles, default=0),
        "visual_tokens": len(case.layout),
    }


def failed_row(row: PlannedRow, measured: Measurement | None) -> dict[str, object]:
    """A row that can't be cut as it was asked for."""
    error = row.error or (measured.errors[row.key] if measured else "")
    return {**named(row), "error": error}
