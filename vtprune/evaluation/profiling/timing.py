"""Seconds of every row: of the whole model, or of few layers that are summed to all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING

from vtprune.engine.trace import Trace
from vtprune.errors import ModelError, VtpruneError
from vtprune.evaluation.profiling.machine import ProfiledModel
from vtprune.evaluation.profiling.model_runs import (
    STEPS,
    ModelRunner,
    PlannedRun,
    RunTimes,
    count_run,
    short_run,
    time_head,
    whole_run,
)
from vtprune.evaluation.profiling.prompts import ProfiledPrompt, smaller_prompt
from vtprune.evaluation.profiling.row_times import (
    LayerSums,
    Measurement,
    MeasurementInfo,
    PassTimes,
    RowTimes,
    TimeBudget,
    methods_of,
)
from vtprune.evaluation.profiling.rows import PlannedRow, plan_row
from vtprune.evaluation.profiling.shapes import (
    build_random,
    layer_kinds,
    shallow_config,
    tower_kinds,
)
from vtprune.inference.out_of_memory import explain_out_of_memory
from vtprune.inference.roofline import count_weights
from vtprune.models import cost
from vtprune.models.encoder_cost import tower_paths
from vtprune.models.skeleton import build_skeleton
from vtprune.models.structure import find_structure

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.models.loading import Progress

MEMORY_SHARE = 0.8  # of the free memory that a model may take
SLOWNESS = 2.0  # times the machine's ceilings, before anything was timed
# Shares of the budget of seconds:
WHOLE_SHARE = 0.5  # that a warm-up and a pass over the whole model may take
FIRST_SHARE = 0.02  # what may be expected to take more is tried on a smaller input first
LARGEST_SHARE = 0.25  # that the largest input may take once
TOWER_SHARE = 0.05  # a vision tower that takes less runs again
HEAD_SHARE = 0.02  # an output head that takes more is timed in part


def measure(
    model: ProfiledModel,
    rows: Sequence[PlannedRow],
    budget: TimeBudget,
    repeats: int,
    how: str = "auto",
    on_progress: Progress | None = None,
) -> Measurement:
    """Time all rows.

    Args:
        rows: no two that are cut alike, and those without cuts first.
        repeats: the most passes over all rows.
        how: "whole", "layers", or "auto": the whole model where it fits memory and budget.

    Raises:
        ModelError: not even a few layers fit in memory.
    """
    fits = how == "auto" and fits_memory(model, rows) and fits_time(model, rows, budget)
    whole = how == "whole" or fits
    config, distinct_layers = (model.config, None) if whole else short_config(model, rows)
    built = build_random(config, model.device, model.dtype, model.attention, distinct_layers)
    structure = find_structure(model.loaded.model)
    towers = tower_paths(structure.inner, structure.decoder)
    loaded = replace(model.loaded, model=built)
    runner = ModelRunner(loaded, model.config, towers, short=not whole)
    timer = Timer(model, runner, budget, repeats, on_progress)
    with explain_out_of_memory(loaded, rows[-1].variant.preset, Trace()):
        return timer.measure_whole(rows) if whole else timer.measure_layers(rows)


def fits_memory(model: ProfiledModel, rows: Sequence[PlannedRow]) -> bool:
    """Whether the whole model and its longest prompt fit in the free memory."""
    need = max(model.peak_bytes(row.counts) for row in rows)
    return need <= MEMORY_SHARE * model.machine.free_bytes


def fits_time(model: ProfiledModel, rows: Sequence[PlannedRow], budget: TimeBudget) -> bool:
    """Whether a warm-up and one pass of all rows will probably take less than the budget."""
    least = sum(
        model.vision_flops(prompt.inputs) / model.machine.flops_per_second
        for prompt in prompts_of(rows)
    )
    for row in rows:
        roofline = model.roofline(row.counts)
        least += roofline.prefill.seconds + STEPS * roofline.decode.seconds
    return 2 * SLOWNESS * least <= WHOLE_SHARE * budget.left


def prompts_of(rows: Sequence[PlannedRow]) -> list[ProfiledPrompt]:
    return list(dict.fromkeys(row.prompt for row in rows))


def first_rows(rows: Sequence[PlannedRow]) -> list[PlannedRow]:
    """Return the first row of each input."""
    return list({row.prompt: row for row in reversed(rows)}.values())


def short_config(
    model: ProfiledModel, rows: Sequence[PlannedRow]
) -> tuple[PreTrainedConfig, int | None]:
    """Return the config of a model with few layers, and how many have weights of their own.

    Raises:
        ModelError: not even those fit in memory, or the layers can't stand for all.
    """
    kinds = layer_kinds(model.config)
    if len({*zip(kinds, model.shape.by_layer, strict=True)}) > len(set(kinds)):
        raise ModelError(
            f"{model.loaded.name}: layers of one kind differ (in their experts or MLP, or in whose "
            "keys they see), so a few of them can't be timed for all",
            "--no-measure counts without timing",
        )
    num_kinds = len(set(kinds))
    depth = max(len(short_run(row, num_kinds).counts) for row in rows)
    config = shallow_config(model.config, depth)
    need = model.dtype.itemsize * count_weights(build_skeleton(config))
    room = MEMORY_SHARE * model.machine.free_bytes
    if need <= room:
        return config, None
    least = need - max(depth - num_kinds, 0) * model.weights.layer
    if least > room:
        raise ModelError(
            f"{model.loaded.name}: not even a few of its layers fit in memory: "
            f"{least / 1e9:.1f} GB of {room / 1e9:.1f}",
            "--no-measure counts without timing; or try --dtype bfloat16",
        )
    return config, num_kinds


@dataclass
class Timer:
    """Times rows on one model within a budget.

    Args:
        model: the one with all layers, without weights.
        runner: of that model with weights, or of one with few layers.
        repeats: the most passes over all rows.
        vision: seconds of the whole tower.
        passes: the runs of each, in the order in which they ended.
        errors: why rows could not be run, by their keys.
        slowness, overhead: what a run's layers took, of what the machine's ceilings promise, and
            seconds beside them.
        tower_slowness: likewise of the vision tower.
    """

    model: ProfiledModel
    runner: ModelRunner
    budget: TimeBudget
    repeats: int
    on_progress: Progress | None = None
    vision: dict[ProfiledPrompt, float] = field(default_factory=dict)
    passes: list[list[tuple[PlannedRun, RunTimes]]] = field(default_factory=list)
    errors: dict[tuple[object, ...], str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    slowness: float = SLOWNESS
    tower_slowness: float = SLOWNESS
    overhead: float = 0.0
    largest: float = 0.0

    def __post_init__(self) -> None:
        self.kinds = layer_kinds(self.model.config)
        self.num_kinds = len(set(self.kinds))

    # -- running ----------------------------------------------------------------------------------

    def encode(self, row: PlannedRow, again: int = 3) -> None:
        """Time the vision tower on a row's input: once, and again where that is short."""
        prompt = row.prompt
        depth = self.num_kinds if self.runner.short else len(self.kinds)
        run = count_run(row, prompt.text + 1, depth)
        took = [self.runner.run(run).vision]
        for _ in range(again):
            started = time.perf_counter()
            took.append(self.runner.encode_again(prompt))
            if time.perf_counter() - started > TOWER_SHARE * self.budget.seconds:
                break
        self.vision[prompt] = median(took[1:] or took)

    def run_passes(self, runs: Sequence[PlannedRun], warm_up: bool = False) -> None:
        """Run all, there and back, until there are enough passes or the next would take too long.

        Args:
            warm_up: leave the first pass out, where there are others.
        """
        took: dict[PlannedRun, float] = {}
        rounds = self.repeats + warm_up
        for number in range(rounds):
            if number and sum(took.values()) > self.budget.left:
                break
            done: list[tuple[PlannedRun, RunTimes]] = []
            for run in runs if number % 2 == 0 else reversed(runs):
                if number and run not in took:
                    continue
                if done and not number and self.runner.short and self.too_long([run]):
                    continue  # its layers are scaled from others
                started = time.perf_counter()
                try:
                    done.append((run, self.run(run)))
                except VtpruneError as error:
                    if not run.row.cuts:
                        raise
                    self.errors[run.row.key] = error.message
                    took.pop(run, None)
                    continue
                took[run] = time.perf_counter() - started
                if self.on_progress:
                    self.on_progress("timing", number * len(runs) + len(done), rounds * len(runs))
            self.passes.append(done)
        if warm_up and len(self.passes) > 1:
            del self.passes[0]
        elif warm_up:
            self.warnings.append(
                "there was time for one pass only, and for none to warm up before it"
            )

    def run(self, run: PlannedRun) -> RunTimes:
        """Time one run, and learn from it how long others will take."""
        started = time.perf_counter()
        times = self.runner.run(run)
        inside, promised = sum(one.seconds for one in times.layers), self.promise(run)
        self.overhead = time.perf_counter() - started - inside
        if promised >= self.largest:
            self.largest, self.slowness = promised, max(inside / max(promised, 1e-9), 1.0)
        return times

    def promise(self, run: PlannedRun) -> float:
        """Return the seconds of a run's layers at the machine's ceilings."""
        flops = sum(cost.layer_flops(self.model.shape, count, count) for count in run.counts)
        return flops / self.model.machine.flops_per_second

    def too_long(self, runs: Sequence[PlannedRun]) -> bool:
        """Whether runs will probably take longer than the budget has left."""
        layers = self.slowness * sum(map(self.promise, runs))
        return layers + len(runs) * self.overhead > self.budget.left

    # -- the whole model --------------------------------------------------------------------------

    def measure_whole(self, rows: Sequence[PlannedRow]) -> Measurement:
        """Time every row on the whole model: one warm-up each, then passes of all rows."""
        for row in first_rows(rows):
            self.encode(row)
        self.run_passes([whole_run(row) for row in rows], warm_up=True)
        times = {}
        for row in rows:
            if row.key not in self.errors:
                runs = self.runs_of(row)
                passes = tuple(
                    PassTimes(
                        preprocess=row.prompt.preprocess_seconds,
                        vision=one.vision if row.encoded else self.vision[row.prompt],
                        select=one.select,
                        prefill=one.prefill,
                        around=one.around,
                        decode_per_token=one.decode,
                    )
                    for one in runs
                )
                times[row.key] = RowTimes(passes, runs[-1].visual)
        return self.finish("whole", times, self.errors)

    def runs_of(self, row: PlannedRow) -> list[RunTimes]:
        """Return the runs of a row with all its cuts, one a pass."""
        return [
            times
            for done in self.passes
            for run, times in done
            if run.has_cuts and run.row.key == row.key
        ]

    def finish(
        self,
        how: str,
        times: Mapping[tuple[object, ...], RowTimes],
        errors: Mapping[tuple[object, ...], str],
        scaled: str = "",
    ) -> Measurement:
        info = MeasurementInfo(
            how=how, passes=len(self.passes), seconds=self.budget.spent, scaled=scaled
        )
        return Measurement(info, times, errors, tuple(self.warnings))

    # -- few layers, summed to all ----------------------------------------------------------------

    def measure_layers(self, rows: Sequence[PlannedRow]) -> Measurement:
        """Time few layers at each distinct count of tokens, and sum them to all layers."""
        self.learn_pace(rows)
        sources, scaled = self.smaller_rows(rows)
        timed = list(dict.fromkeys(sources.values()))
        longest = max(row.counts[0] for row in timed)
        long = HEAD_SHARE * self.budget.seconds
        head = time_head(self.runner.loaded.model, longest, long)
        for row in first_rows(timed):
            self.encode(row)
        self.run_passes(self.plan_runs(timed))
        sums = LayerSums(self.model, self.passes, self.vision, head)
        times = {
            row.key: sums.row_times(row, sources[row])
            for row in rows
            if sources[row].key not in self.errors
        }
        errors = {row.key: self.errors[sources[row].key] for row in rows if row.key not in times}
        self.warnings += sums.warnings(scaled)
        return self.finish("layers", times, errors, scaled)

    def learn_pace(self, rows: Sequence[PlannedRow]) -> None:
        """Time a small input first, where the real ones are large: how slow are tower and layer?"""
        prompt = max(prompts_of(rows), key=self.expected)
        share = FIRST_SHARE * self.budget.seconds / self.expected(prompt)
        if share > 1:
            return
        small = smaller_prompt(self.model.loaded, prompt, max(share, 1e-4))
        row = plan_row(self.model.loaded, small, rows[0].variant)
        self.encode(row, again=0)
        promised = self.model.vision_flops(small.inputs) / self.model.machine.flops_per_second
        self.tower_slowness = max(self.vision[small] / max(promised, 1e-9), 1.0)
        self.run(short_run(row, self.num_kinds))

    def expected(self, prompt: ProfiledPrompt) -> float:
        """Return the seconds that the short tower and two layers will probably take."""
        tokens = prompt.text + len(prompt.layout)
        layers = 2 * self.slowness * cost.layer_flops(self.model.shape, tokens, tokens)
        share = min(1.0, 2 / max(len(tower_kinds(self.model.config)), 1))
        tower = self.tower_slowness * share * self.model.vision_flops(prompt.inputs)
        return (tower + layers) / self.model.machine.flops_per_second

    def smaller_rows(self, rows: Sequence[PlannedRow]) -> tuple[dict[PlannedRow, PlannedRow], str]:
        """Return what to time in place of each row: of a smaller input, where its own takes long.

        Returns:
            The rows, and the size of the smaller input, empty where there is none.
        """
        first = prompts_of(rows)
        room = LARGEST_SHARE * self.budget.left / len(first)
        share, prompts = 1.0, {prompt: prompt for prompt in first}
        while share > 1e-3 and max(len(prompt.layout) for prompt in prompts.values()) > 64:
            slowest = max(map(self.expected, prompts.values()))
            if slowest <= room:
                break
            share *= max(0.1, min(0.7, room / slowest))
            prompts = {prompt: smaller_prompt(self.model.loaded, prompt, share) for prompt in first}
        if share == 1.0:
            return {row: row for row in rows}, ""
        sources: dict[PlannedRow, PlannedRow] = {}
        for row in rows:
            smaller = plan_row(self.model.loaded, prompts[row.prompt], row.variant)
            sources[row] = sources[rows[0]] if smaller.error else smaller
        source = prompts[rows[0].prompt].gathered.items[0].source
        frames = f"{source.num_frames} frames of " if source.kind == "video" else ""
        return sources, f"{frames}{source.width} x {source.height}"

    def plan_runs(self, rows: Sequence[PlannedRow]) -> list[PlannedRun]:
        """Return every row's own run; where that takes too long, the fewest that time everything.

        Those are one run for the rows that the same methods cut, and one for every count of tokens
        that is in none of these.
        """
        runs = [short_run(row, self.num_kinds) for row in rows]
        if not self.too_long(runs):
            return runs
        chosen: dict[object, PlannedRun] = {}
        for run in sorted(runs, key=self.promise):
            if run.row.model_cuts:
                chosen.setdefault((run.row.prompt, methods_of(run.row)), run)
        runs = list(chosen.values()) or runs
        timed = {count for run in runs for count in run.counts}
        single: dict[int, PlannedRow] = {}
        for row in rows:
            for count in row.counts:
                if count not in timed:
                    single.setdefault(count, row)
        layers = Counter(count for row in rows for count in row.counts)
        often = sorted(single, key=lambda count: -layers[count])
        return [*runs, *(count_run(single[count], count, self.num_kinds) for count in often)]
