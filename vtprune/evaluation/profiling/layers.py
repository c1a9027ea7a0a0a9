"""Timing single layers, where the whole model would take too long or not fit, and summing them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING

from vtprune.errors import VtpruneError
from vtprune.evaluation.profiling.build import count_weights, layer_kinds, tower_kinds
from vtprune.evaluation.profiling.heads import HeadSeconds, time_head
from vtprune.evaluation.profiling.probes import (
    Probe,
    Prober,
    Reading,
    layers_of,
    probe_count,
    probe_row,
)
from vtprune.evaluation.profiling.rows import Planned
from vtprune.evaluation.profiling.samples import Samples, sum_layers
from vtprune.evaluation.profiling.times import RUN, SCALED, SHARED, Budget, Pass, RowTimes
from vtprune.evaluation.profiling.towers import time_short_tower, towers_timed, whole_tower
from vtprune.inference.prompts import to_device
from vtprune.models import cost
from vtprune.models.structure import find_structure

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.evaluation.profiling.machine import Machine
    from vtprune.models.loading import Loaded, Progress

AGAIN = 0.05  # of the budget: a vision tower that takes less runs again
SLOWNESS = 2.0  # of what the ceilings promise, before anything was timed


@dataclass
class Layered:
    """What is known of a model with all its layers, from runs of one with few.

    Args:
        loaded: the short model.
        config: of the whole model.
        towers: where the model has its vision towers' layers.
        machine: its ceilings tell beforehand how long something takes.
        budget: of seconds.
        vision: seconds of the whole tower, by the identity of the case.
        readings: all that was run.
        slowness, overhead: what a probe took, of its promise and beside its layers.
        tower_slowness: likewise of the vision tower.
        unchosen: rows whose own methods were not run.
        head: seconds of the output head.
        errors: why rows could not be run, by their keys.
        thinned: of the whole tower, for rows that leave something out before it, by their keys.
    """

    loaded: Loaded
    config: PreTrainedConfig
    towers: Sequence[str]
    machine: Machine
    budget: Budget
    vision: dict[int, float] = field(default_factory=dict)
    readings: list[tuple[Probe, Reading]] = field(default_factory=list)
    slowness: float = SLOWNESS
    tower_slowness: float = SLOWNESS
    overhead: float = 0.0
    largest: float = 0.0
    unchosen: list[Planned] = field(default_factory=list)
    head: HeadSeconds = field(default_factory=HeadSeconds)
    thinned: dict[object, list[float]] = field(default_factory=dict)
    errors: dict[tuple[object, ...], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.loaded.model
        self.prober = Prober(self.loaded)
        self.kinds = layer_kinds(self.config)
        self.own_kinds = layer_kinds(model.config)
        self.shape = cost.decoder_shape(self.config.get_text_config())
        size = model.dtype.itemsize
        read = size * count_weights(layers_of(model)[0])
        cached = 2 * size * self.shape.kv_heads * self.shape.head_dim
        self.prefill = Samples(lambda tokens: cost.layer_flops(self.shape, tokens, tokens))
        self.decode = Samples(lambda keys: read + float(cached) * keys)

    @property
    def num_kinds(self) -> int:
        return len(set(self.kinds))

    # -- running ----------------------------------------------------------------------------------

    def start_pass(self) -> None:
        self.prefill.start_pass()
        self.decode.start_pass()

    def encode(self, row: Planned, most: int = 4) -> float:
        """Runs the vision tower on a row's case: once, and again where that is short.

        Returns:
            Seconds that the first run of the short tower took.
        """
        case, model = row.case, self.loaded.model
        self.prober.tensors[id(case)] = to_device(self.loaded, case.inputs.tensors)
        encoded = self.prober.encoded[id(case)] = {}
        inner = find_structure(model).inner
        with towers_timed(inner, self.towers, model.device) as clocks:
            reading = self.prober.run(probe_count(row, case.text + 1, self.num_kinds))
            forwards = [laps for clock in clocks for laps in clock.forwards()]
        kinds = tower_kinds(model.config), tower_kinds(self.config)
        took, spent = [whole_tower(reading.vision, forwards, *kinds)], reading.vision
        while len(took) < most and spent < AGAIN * self.budget.seconds:
            whole, spent = time_short_tower(self.loaded, self.config, self.towers, encoded)
            took.append(whole)
        self.vision[id(case)] = median(took[1:] or took)
        return reading.vision

    def forget(self) -> None:
        """Leaves out of the sums what was run so far."""
        self.readings, self.prefill.passes, self.decode.passes = [], [], []

    def forget_pass(self, readings: int) -> None:
        """Leaves out of the sums the last pass, which began after so many readings."""
        del self.readings[readings:], self.prefill.passes[-1], self.decode.passes[-1]

    def run(self, probe: Probe) -> None:
        """Runs a probe, and takes its layers' seconds down."""
        left, model = self.budget.left, self.loaded.model
        with towers_timed(find_structure(model).inner, self.towers, model.device) as clocks:
            reading = self.prober.run(probe)
            forwards = [laps for clock in clocks for laps in clock.forwards()]
        if probe.whole and probe.row.encoded:
            kinds = tower_kinds(model.config), tower_kinds(self.config)
            seconds = whole_tower(reading.vision, forwards, *kinds)
            self.thinned.setdefault(probe.row.key, []).append(seconds)
        for lap in reading.laps:
            self.prefill.add(self.own_kinds[lap.layer], lap.tokens, lap.seconds)
        for laps in reading.decode_laps:
            for lap, before in zip(laps, reading.laps, strict=True):
                self.decode.add(self.own_kinds[lap.layer], before.tokens, lap.seconds)
        self.readings.append((probe, reading))
        inside, promised = sum(lap.seconds for lap in reading.laps), self.promise(probe)
        self.overhead = left - self.budget.left - inside
        if promised >= self.largest:
            self.largest, self.slowness = promised, max(inside / max(promised, 1e-9), 1.0)

    def promise(self, probe: Probe) -> float:
        """Seconds of a probe's layers at the machine's ceilings."""
        flops = sum(cost.layer_flops(self.shape, count, count) for count in probe.counts)
        return flops / self.machine.flops_per_second

    def expect(self, probes: Sequence[Probe]) -> float:
        """Seconds that probes will probably take."""
        layers = self.slowness * sum(self.promise(probe) for probe in probes)
        return layers + len(probes) * self.overhead

    # -- summing ----------------------------------------------------------------------------------

    def find(self, row: Planned) -> list[tuple[Probe, Reading]]:
        """The runs of a row; else of one that the same methods cut; else of any that was cut."""
        whole = [one for one in self.readings if one[0].whole]
        same = [one for one in whole if one[0].row.key == row.key]
        alike = [one for one in whole if signature(one[0].row) == signature(row)]
        if row.cuts and not alike:
            self.unchosen.append(row)
        other = [one for one in whole if bool(one[0].row.cuts) == bool(row.cuts)]
        return same or alike or other or whole or self.readings

    def sum_up(self, row: Planned, source: Planned, work: Callable[[Planned], float]) -> RowTimes:
        """A row's seconds with all layers of the whole model.

        Args:
            source: the row that was timed in its place; itself where its own input was.
            work: a row -> FLOPs of the vision tower.
        """
        found = self.find(source)
        larger = len(row.case.layout) / len(source.case.layout)
        counts = self.real_counts(row, source, found)
        probe, _ = found[0]
        more = len(self.kinds) - probe.depth
        chose = bool(row.cuts) and bool(probe.row.cuts)
        select = median(reading.select for _, reading in found) if chose else 0.0
        rest = median(reading.rest - reading.select for _, reading in found) + select
        rest += more * median(reading.gap for _, reading in found) + (larger - 1) * select
        steps = median(reading.decode_rest for _, reading in found)
        steps += more * median(reading.decode_gap for _, reading in found)
        preprocess, vision = row.case.preprocess_seconds, self.tower_seconds(row, source, work)
        around = self.head.prefill + median(reading.around for _, reading in found)
        steps += self.head.decode

        def prefill(number: int | None = None) -> float:
            return rest + sum_layers(self.prefill, self.kinds, counts, number)

        def decode(number: int | None = None) -> float:
            return steps + sum_layers(self.decode, self.kinds, counts, number)

        return RowTimes(
            preprocess=preprocess,
            vision=vision,
            select=select * larger,
            prefill=prefill(),
            around=around,
            decode_per_token=decode(),
            passes=tuple(
                Pass(prefill(n), preprocess + vision + prefill(n) + around, decode(n))
                for n in range(len(self.prefill.passes))
            ),
            visual=tuple(count - row.case.text for count in counts),
            how=self.how(row, source, counts),
        )

    def how(self, row: Planned, source: Planned, counts: Sequence[int]) -> str:
        """How a row's seconds were measured."""
        timed = self.prefill.timed()
        layers = zip(self.kinds, counts, strict=True)
        if row is not source or any(layer not in timed for layer in layers):
            return SCALED
        ran = any(probe.whole and probe.row.key == row.key for probe, _ in self.readings)
        return RUN if ran else SHARED

    def tower_seconds(
        self, row: Planned, source: Planned, work: Callable[[Planned], float]
    ) -> float:
        """Seconds of the whole vision tower."""
        timed = self.thinned.get(source.key)
        seconds = median(timed) if timed else self.vision[id(source.case)]
        of = source if timed else replace(source, encoded=None)
        if not work(of):  # its FLOPs are not known
            return seconds * len(row.case.layout) / len(source.case.layout)
        return seconds * work(row) / work(of)

    def real_counts(
        self, row: Planned, source: Planned, found: Sequence[tuple[Probe, Reading]]
    ) -> tuple[int, ...]:
        """Tokens that each layer of a row sees: as cut, where its own cuts were run."""
        probe, reading = found[0]
        if row is not source or probe.row.key != row.key or not probe.whole:
            return row.counts
        cuts = sorted({step.layer for step in row.cuts if step.layer > 0})
        seen = [lap.tokens for lap in reading.laps]
        return tuple(
            seen[self.num_kinds * sum(cut <= layer for cut in cuts)]
            for layer in range(len(self.kinds))
        )


def signature(row: Planned) -> tuple[object, ...]:
    """Equal for rows that the same methods cut."""
    return tuple(
        (step.spec.method, step.spec.options, step.spec.per, step.spec.split, step.layer > 0)
        for step in row.cuts
    )


def plan_probes(layered: Layered, rows: Sequence[Planned]) -> list[Probe]:
    """Every row's own short run; where that would take too long, the fewest that tell it all.

    Those are one run for the rows that the same methods cut, and a run for every count of tokens
    that is in none of these.
    """
    every = {row.key: probe_row(row, layered.num_kinds) for row in rows}
    probes = list(every.values())
    if layered.expect(probes) <= layered.budget.left:
        return probes
    chosen: dict[object, Probe] = {}
    for probe in sorted(probes, key=layered.promise):
        if probe.row.cuts:
            chosen.setdefault((id(probe.row.case), signature(probe.row)), probe)
    probes = list(chosen.values()) or probes
    timed = {count for probe in probes for count in probe.counts}
    single: dict[int, Probe] = {}
    for row in rows:
        for count in row.counts:
            if count not in timed:
                single.setdefault(count, probe_count(row, count, layered.num_kinds))
    seen = [count for row in rows for count in row.counts]
    return [*probes, *sorted(single.values(), key=lambda one: -seen.count(one.counts[0]))]


def run_passes(
    layered: Layered, rows: Sequence[Planned], repeats: int, on_progress: Progress | None = None
) -> int:
    """Runs the probes of all rows, there and back, until there are enough or time is up.

    A further pass that time does not suffice for counts for no row, so that all have equally many.

    Args:
        rows: the one without cuts first.

    Returns:
        The number of passes.
    """
    longest = max(row.case.text + len(row.case.layout) for row in rows)
    layered.head = time_head(layered.loaded.model, longest, layered.budget.seconds)
    for row in {id(row.case): row for row in reversed(rows)}.values():
        layered.encode(row)
    probes = plan_probes(layered, rows)
    for number in range(repeats):
        layered.start_pass()
        ordered = probes if number % 2 == 0 else list(reversed(probes))
        before, skipped = len(layered.readings), False
        for done, probe in enumerate(ordered):
            if on_progress:
                on_progress(f"timing layers, pass {number + 1}", done, len(ordered))
            if layered.readings and layered.expect([probe]) > layered.budget.left:
                skipped = True  # in the first pass: its layers are scaled from others
                if number:
                    break
                continue
            if probe.row.key in layered.errors:
                continue
            try:
                layered.run(probe)
            except VtpruneError as error:
                if not probe.row.cuts:
                    raise
                layered.errors[probe.row.key] = error.message
        if skipped and number:
            layered.forget_pass(before)
            return number
        if layered.expect(probes) > layered.budget.left:
            return number + 1
    return repeats
