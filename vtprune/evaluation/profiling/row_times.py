"""Seconds of the rows of a profile, pass by pass: measured, or summed from single layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vtprune.evaluation.profiling.model_runs import LayerTime, PlannedRun, RunTimes, cut_layers
from vtprune.evaluation.profiling.rows import PlannedRow
from vtprune.evaluation.profiling.shapes import layer_kinds
from vtprune.inference.report import Block
from vtprune.models import cost

if TYPE_CHECKING:
    from vtprune.evaluation.profiling.machine import ProfiledModel
    from vtprune.evaluation.profiling.prompts import ProfiledPrompt

RUN, SHARED, SCALED = "run", "shared", "scaled"
"""How a row's seconds were measured: it ran; layers of other rows are summed for it; some of those
are scaled from layers with another number of tokens."""


@dataclass
class TimeBudget:
    """Seconds that measuring may take; the clock starts at once."""

    seconds: float
    started: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.started


class PassTimes(NamedTuple):
    """Seconds of one row in one pass over all rows.

    Args:
        preprocess, vision, select, prefill: as in a report.
        around: of the time to the first token, what is none of those.
        decode_per_token: of a token after the first.
    """

    preprocess: float
    vision: float
    select: float
    prefill: float
    around: float
    decode_per_token: float

    @property
    def first_token(self) -> float:
        return self.preprocess + self.vision + self.prefill + self.around

    def decode(self, answer_tokens: int) -> float:
        """Return the seconds of the tokens after the first."""
        return max(answer_tokens - 1, 0) * self.decode_per_token

    def total(self, answer_tokens: int) -> float:
        """Return the seconds to the end of the answer, without loading and reading media."""
        return self.first_token + self.decode(answer_tokens)


@dataclass(frozen=True)
class RowTimes:
    """Seconds of one row.

    Args:
        passes: every pass; the same number for all rows.
        visual: visual tokens that each layer really saw.
        how: RUN, SHARED or SCALED.
    """

    passes: tuple[PassTimes, ...]
    visual: tuple[int, ...]
    how: str = RUN

    @property
    def typical(self) -> PassTimes:
        """The median of each part."""
        return PassTimes(*map(median, zip(*self.passes, strict=True)))

    def speedups(
        self, unpruned: RowTimes, seconds: Callable[[PassTimes], float]
    ) -> tuple[float, ...]:
        """Return how many times as fast as an unpruned row this one was, pass by pass.

        Args:
            seconds: of a pass, what is compared.
        """
        pairs = zip(unpruned.passes, self.passes, strict=True)
        return tuple(seconds(one) / max(seconds(other), 1e-9) for one, other in pairs)


@dataclass(frozen=True, kw_only=True)
class MeasurementInfo(Block):
    """How the seconds of a profile were measured.

    Args:
        how: "whole": the whole model ran; "layers": single layers were timed and summed.
        passes: how often all was timed.
        seconds: that measuring took.
        scaled: where a smaller input was measured, its size; empty where the real one was.
    """

    how: str
    passes: int
    seconds: float
    scaled: str


@dataclass(frozen=True)
class Measurement:
    """Seconds of all rows of a profile.

    Args:
        rows: by the rows' keys.
        errors: why rows could not be run, by their keys.
        warnings: what the reader should know before believing a figure.
    """

    info: MeasurementInfo
    rows: Mapping[tuple[object, ...], RowTimes]
    errors: Mapping[tuple[object, ...], str]
    warnings: Sequence[str]


# -- sums ----------------------------------------------------------------------------------------


class LayerSamples:
    """Seconds of single layers at the token counts that were timed, pass by pass.

    Args:
        work: tokens -> what a layer has to do for them, in any unit; between and beyond the counts
            that were timed, a layer's speed is that of its neighbours.
        passes: of each, what kind of layer, tokens that it is given or that its cache has, seconds.
    """

    def __init__(
        self, work: Callable[[int], float], passes: Sequence[Iterable[tuple[str, int, float]]]
    ) -> None:
        self.work = work
        self.passes = [medians(samples) for samples in passes]
        self.all = medians(sample for samples in passes for sample in samples)
        self.scaled: set[int] = set()
        """Token counts that were asked for and not timed."""

    def seconds(self, kind: str, tokens: int, number: int) -> float:
        """Return the seconds of a layer in a pass; of all passes where that one lacks it."""
        key = (kind, tokens)
        for timed in (self.passes[number], self.all):
            if key in timed:
                return timed[key]
        self.scaled.add(tokens)
        alike = {at: took for (other, at), took in self.all.items() if other == kind}
        known = alike or {at: took for (_, at), took in self.all.items()}
        counts = sorted(known)
        paces = [known[count] / self.work(count) for count in counts]
        return self.work(tokens) * float(np.interp(tokens, counts, paces))

    def total(self, kinds: Sequence[str], counts: Sequence[int], number: int) -> float:
        """Return the seconds of all layers of a model in a pass, each distinct count timed once."""
        layers = list(zip(kinds, counts, strict=True))
        return sum(layers.count(key) * self.seconds(*key, number) for key in dict.fromkeys(layers))


def medians(samples: Iterable[tuple[str, int, float]]) -> dict[tuple[str, int], float]:
    """Return the median seconds of each kind of layer at each count of tokens."""
    by_key: dict[tuple[str, int], list[float]] = {}
    for kind, tokens, seconds in samples:
        by_key.setdefault((kind, tokens), []).append(seconds)
    return {key: median(seconds) for key, seconds in by_key.items()}


class LayerSums:
    """Sums the layers of rows.

    Args:
        model: the one with all layers.
        passes: the runs of each, on a model with few layers.
        vision: seconds of the whole tower.
        head: seconds of the output head, at the end of the prompt and at a token on its own.
    """

    def __init__(
        self,
        model: ProfiledModel,
        passes: Sequence[Sequence[tuple[PlannedRun, RunTimes]]],
        vision: Mapping[ProfiledPrompt, float],
        head: tuple[float, float],
    ) -> None:
        self.model, self.vision, self.head = model, vision, head
        self.runs = [run for runs in passes for run in runs]
        self.kinds = layer_kinds(model.config)
        self.distinct_kinds = list(dict.fromkeys(self.kinds))
        self.borrowed: list[PlannedRow] = []
        """Rows for which choosing was timed in another one."""
        shape, cached = model.shape, model.cache_bytes_per_token
        self.prefill = LayerSamples(
            lambda tokens: cost.layer_flops(shape, tokens, tokens),
            [[sample for _, times in runs for sample in self.samples(times.layers)]
             for runs in passes],
        )  # fmt: skip
        self.decode = LayerSamples(
            lambda keys: model.weights.layer + cached * keys,
            [[sample for _, times in runs for sample in self.samples(times.decode_layers)]
             for runs in passes],
        )  # fmt: skip

    def samples(self, layers: Sequence[LayerTime]) -> Iterator[tuple[str, int, float]]:
        """Yield the kind, the tokens and the seconds of timed layers."""
        for timed in layers:
            kind = self.distinct_kinds[timed.layer % len(self.distinct_kinds)]
            yield kind, timed.tokens, timed.seconds

    def row_times(self, row: PlannedRow, source: PlannedRow) -> RowTimes:
        """Return a row's seconds with all layers.

        Args:
            source: the row that was timed in its place; itself where its own input was.
        """
        runs = self.runs_like(source)
        times = [times for _, times in runs]
        select = 0.0
        if row.model_cuts and runs[0][0].row.model_cuts:
            larger = len(row.prompt.layout) / len(source.prompt.layout)
            select = larger * median(one.select for one in times)
        rest = median(one.prefill_rest for one in times) + select
        decode_rest = median(one.decode_rest for one in times) + self.head[1]
        around = median(one.around for one in times) + self.head[0]
        visual = self.visual_counts(row, source, runs[0])
        counts = [row.prompt.text + count for count in visual]
        passes = tuple(
            PassTimes(
                preprocess=row.prompt.preprocess_seconds,
                vision=self.tower_seconds(row, source),
                select=select,
                prefill=rest + self.prefill.total(self.kinds, counts, number),
                around=around,
                decode_per_token=decode_rest + self.decode.total(self.kinds, counts, number),
            )
            for number in range(len(self.prefill.passes))
        )
        return RowTimes(passes, visual, self.how(row, source, counts))

    def runs_like(self, row: PlannedRow) -> list[tuple[PlannedRun, RunTimes]]:
        """Return a row's runs; else those of one that the same methods cut; else of any alike."""
        complete = [run for run in self.runs if run[0].has_cuts]
        same_row = [run for run in complete if run[0].row.key == row.key]
        same_methods = [run for run in complete if methods_of(run[0].row) == methods_of(row)]
        if row.model_cuts and not same_methods:
            self.borrowed.append(row)
        alike = [run for run in complete if bool(run[0].row.model_cuts) == bool(row.model_cuts)]
        return same_row or same_methods or alike or complete or self.runs

    def how(self, row: PlannedRow, source: PlannedRow, counts: Sequence[int]) -> str:
        """Return how a row's seconds were measured."""
        layers = zip(self.kinds, counts, strict=True)
        if row is not source or any(layer not in self.prefill.all for layer in layers):
            return SCALED
        ran = any(run.has_cuts and run.row.key == row.key for run, _ in self.runs)
        return RUN if ran else SHARED

    def tower_seconds(self, row: PlannedRow, source: PlannedRow) -> float:
        """Return the seconds of the whole vision tower, scaled to the row's input."""
        encoded = [times.vision for run, times in self.runs
               if source.encoded and run.has_cuts and run.row.key == source.key]  # fmt: skip
        timed = source if encoded else replace(source, encoded=None)
        seconds = median(encoded) if encoded else self.vision[source.prompt]
        work = self.model.vision_flops(timed.prompt.inputs, timed.trace)
        if not work:  # not known
            return seconds * len(row.prompt.layout) / len(source.prompt.layout)
        return seconds * self.model.vision_flops(row.prompt.inputs, row.trace) / work

    def visual_counts(
        self, row: PlannedRow, source: PlannedRow, timed: tuple[PlannedRun, RunTimes]
    ) -> tuple[int, ...]:
        """Return the visual tokens that each layer sees: as cut, where the row's own cuts ran."""
        run, times = timed
        if row is not source or run.row.key != row.key or not run.has_cuts:
            return row.visual
        cuts = cut_layers(row)
        return tuple(
            times.visual[len(self.distinct_kinds) * sum(cut <= layer for cut in cuts)]
            for layer in range(len(self.kinds))
        )

    def warnings(self, scaled: str) -> list[str]:
        """Return what was not timed as it is.

        Args:
            scaled: the size of the smaller input that was timed; empty where none was.
        """
        warnings = []
        counts = len(self.prefill.scaled)
        if scaled:
            warnings.append(
                f"the input takes too long to time here: an input of {scaled} was timed, and its "
                "seconds scaled by FLOPs"
            )
        elif counts:
            warnings.append(
                f"layers at {counts} token counts were not timed but scaled from others; "
                "a larger --seconds times them"
            )
        if self.borrowed:
            names = ", ".join(dict.fromkeys(row.name for row in self.borrowed))
            warnings.append(
                f"selecting the tokens was not timed for {names}: it counts as in another row; a "
                "larger --seconds times it"
            )
        return warnings


def methods_of(row: PlannedRow) -> tuple[object, ...]:
    """Return what is equal for rows that the same methods cut."""
    return tuple(
        (cut.stage.method, cut.stage.options, cut.stage.per, cut.stage.split, cut.layer > 0)
        for cut in row.model_cuts
    )
