"""The figures of a profile, in the fixed names of its JSON, and how each row's are filled in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from statistics import median
from typing import TYPE_CHECKING

from vtprune.evaluation.profiling.machine import Machine, ProfiledModel
from vtprune.evaluation.profiling.prompts import ProfiledPrompt
from vtprune.evaluation.profiling.row_times import Measurement, MeasurementInfo, PassTimes
from vtprune.evaluation.profiling.rows import PlannedRow, as_cut, is_preset
from vtprune.evaluation.profiling.verdict import VerdictFindings, VerdictRow
from vtprune.evaluation.variants import UNPRUNED
from vtprune.inference.csv_file import csv_text, flat
from vtprune.inference.measuring import compute_costs, count_vision
from vtprune.inference.report import (
    Block,
    CompareSeconds,
    HostInfo,
    InputInfo,
    KvCacheBytes,
    MemoryBytes,
    ModelInfo,
    StageCount,
    TokenCounts,
    Versions,
    describe_host,
)
from vtprune.inference.wording import with_options
from vtprune.models import cost
from vtprune.models.encoder_cost import EncoderFlops
from vtprune.tokens.layout import MODALITIES

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded


@dataclass(frozen=True, kw_only=True)
class ShapeInfo(ModelInfo):
    """The model, as in a report, and where its shape is from."""

    source: str


@dataclass(frozen=True, kw_only=True)
class PromptInfo(InputInfo):
    """The input, as in a report, and its tokens."""

    visual_tokens: int
    text_tokens: int


@dataclass(frozen=True, kw_only=True)
class MediaAmount(Block):
    """How much media an input has."""

    frames: int
    tiles: int
    visual_tokens: int


@dataclass(frozen=True, kw_only=True)
class ProfileFlops(Block):
    """Floating-point operations, as in a report, and by parts.

    Args:
        tower, projector: of which `vision` is the sum; None where the tower can't be counted.
        prefill_by_layer: without the output head.
    """

    vision: float | None
    prefill: float
    prefill_full: float
    decode: float
    decode_full: float
    reduction: float
    tower: float | None
    projector: float | None
    prefill_by_layer: Sequence[float]
    decode_per_token: float
    decode_per_token_full: float


@dataclass(frozen=True, kw_only=True)
class ProfileSeconds(Block):
    """Measured seconds by part, medians of the passes; selection is in the prefill."""

    load: float = 0.0
    media: float
    preprocess: float
    vision: float
    select: float
    prefill: float
    decode: float
    first_token: float
    total: float
    decode_per_token: float


@dataclass(frozen=True, kw_only=True)
class RooflineSeconds(Block):
    """Least seconds at the ceilings of the machine; predicted of a card that is not here.

    Args:
        prefill, decode_per_token: of every layer the longer of the two that follow, summed.
        prefill_compute, decode_compute: at its FLOP/s.
        prefill_bandwidth, decode_bandwidth: reading weights and cache, at its bytes/s.
        prefill_bound, decode_bound: which of the two is longer, "compute" or "bandwidth".
        first_token: preparing the pixels (0 of a card that is not here), vision and prefill.
    """

    vision: float
    prefill: float
    prefill_compute: float
    prefill_bandwidth: float
    prefill_bound: str
    decode_per_token: float
    decode_compute: float
    decode_bandwidth: float
    decode_bound: str
    first_token: float


@dataclass(frozen=True, kw_only=True)
class PredictedSpeedups(Block):
    """Speed-ups over the unpruned model on the same input: by FLOPs, and at the ceilings."""

    prefill_predicted: float
    prefill_roofline: float
    first_token_roofline: float


@dataclass(frozen=True, kw_only=True)
class MeasuredSpeedups(PredictedSpeedups):
    """The same, and the measured ones: medians over the passes, and the least and the greatest.

    Args:
        seconds: of the unpruned model.
        realised_fraction: prefill_speedup / prefill_predicted.
    """

    seconds: CompareSeconds
    prefill_speedup: float
    prefill_spread: Sequence[float]
    first_token_speedup: float
    first_token_spread: Sequence[float]
    total_speedup: float
    total_spread: Sequence[float]
    realised_fraction: float


@dataclass(frozen=True, kw_only=True)
class RowName(Block):
    """Which row it is.

    Args:
        keep: the layer average that was asked for; None where the preset sets every keep itself.
        preset: None for a keep that was asked for.
        method: that cuts at such a keep; None: the stages of the preset `stages_of`.
        options: that were given of either.
    """

    keep: float | None
    preset: str | None
    method: str | None
    stages_of: str | None
    options: Mapping[str, object]

    @property
    def label(self) -> str:
        """The row's name in tables."""
        if self.preset:
            return self.preset
        name = with_options(self.method, self.options) if self.method else "keep"
        return f"{name} {self.keep:g}"


@dataclass(frozen=True, kw_only=True)
class ProfileRow(RowName):
    """One variant on one input.

    Args:
        input: what the unpruned model that it is compared with is given.
        measured: "run", "shared" or "scaled"; None: nothing was measured.
        memory_bytes: the peak is an estimate, without what the vision tower holds.
        fits: whether that peak is within the machine's free memory.
        seconds: None where nothing was measured; medians of the passes.
        passes: the seconds of every pass, by part.
    """

    input: MediaAmount
    measured: str | None
    tokens: TokenCounts
    flops: ProfileFlops
    kv_cache_bytes: KvCacheBytes
    memory_bytes: MemoryBytes
    fits: bool
    seconds: ProfileSeconds | None
    roofline: RooflineSeconds
    compare: PredictedSpeedups
    warnings: Sequence[str] = ()
    passes: Sequence[Mapping[str, float]] = ()

    @property
    def is_exact(self) -> bool:
        """Whether its own run was timed, and no other row's in its place."""
        return self.measured not in ("shared", "scaled")


@dataclass(frozen=True, kw_only=True)
class FailedRow(RowName):
    """A variant that can't cut this input as it was asked to."""

    error: str


@dataclass(frozen=True, kw_only=True)
class Profile(Block):
    """What pruning saves on one machine.

    Args:
        rows: the unpruned model first.
        verdict: in sentences.
        measured: None where nothing was measured.
        warnings: what the reader should know before believing a figure.
        host: the machine that this ran on, also where `machine` is a card that is not here.
    """

    model: ShapeInfo
    machine: Machine
    input: PromptInfo
    rows: Sequence[ProfileRow | FailedRow]
    verdict: str
    findings: VerdictFindings
    measured: MeasurementInfo | None
    warnings: Sequence[str] = ()
    version: Versions
    host: HostInfo = field(default_factory=describe_host)

    @property
    def good_rows(self) -> list[ProfileRow]:
        """The rows that could be cut."""
        return [row for row in self.rows if isinstance(row, ProfileRow)]

    def to_csv(self) -> str:
        """Return one line a row, its blocks as columns, under a line of their names."""
        same = {
            **self.model.to_columns(),
            "machine": self.machine.name,
            "predicted": self.machine.predicted,
            "passes": self.measured.passes if self.measured else None,
        }
        rows = [row.to_dict() for row in self.rows]
        for row in rows:
            row.pop("passes", None)
        return csv_text([{**same, **flat(row)} for row in rows])


# -- the figures of a row ------------------------------------------------------------------------


def count_flops(
    loaded: Loaded, row: PlannedRow, answer_tokens: int
) -> tuple[ProfileFlops, KvCacheBytes]:
    """Return what a row costs by its counts alone.

    Args:
        answer_tokens: of the answer that decoding is counted for.
    """
    trace = row.trace
    flops, kv_bytes = compute_costs(loaded, row.prompt.inputs, trace, answer_tokens, 0)
    shape = loaded.decoder_shape
    full = [sum(trace.before())] * shape.layers
    encoder = count_vision(loaded, row.prompt.inputs, trace)
    counted = {
        **vars(flops),
        "tower": encoder.tower if isinstance(encoder, EncoderFlops) else None,
        "projector": encoder.projector if isinstance(encoder, EncoderFlops) else None,
        "prefill_by_layer": cost.flops_by_layer(shape, row.counts, row.prompt.text),
        "decode_per_token": cost.decode_flops(shape, row.counts, 2),
        "decode_per_token_full": cost.decode_flops(shape, full, 2),
    }
    return ProfileFlops(**counted), kv_bytes


def count_tokens(row: PlannedRow, answer_tokens: int) -> TokenCounts:
    """Return the counts of a row; which tokens go is not known, so not how many of a frame."""
    layout, trace, kept = row.prompt.layout, row.trace, row.visual[-1]
    left = {name: len(layout.of_modality(name)) for name in MODALITIES}
    for cut in row.cuts:
        if cut.modality != "all":
            left[cut.modality] = cut.after
    if row.cuts and row.cuts[-1].modality == "all":
        modalities = [name for name in MODALITIES if left[name]]
        left = {name: kept if len(modalities) == 1 else left[name] for name in modalities}
    return TokenCounts(
        visual=trace.before()[0],
        text=row.prompt.text,
        answer=answer_tokens,
        keep_mean=trace.keep_mean(),
        kept_after=kept,
        by_modality={name: count for name, count in left.items() if count},
        stages=[
            StageCount(
                at=cut.stage.at,
                layer=cut.layer,
                modality=cut.modality,
                method=cut.stage.method,
                options=dict(cut.stage.options),
                before=cut.before,
                after=cut.after,
            )
            for cut in row.cuts
        ],
        by_frame=[],
        by_tile=[],
    )


PREFILL, FIRST_TOKEN = attrgetter("prefill"), attrgetter("first_token")


class RowFigures:
    """The figures of one row that can be cut.

    Args:
        planned: the row before anything ran; `row` is as it was cut then.
        unpruned: the row without cuts of the same input, before a preset made that smaller.
        measurement: None: nothing was measured.
    """

    def __init__(
        self,
        model: ProfiledModel,
        planned: PlannedRow,
        unpruned: PlannedRow,
        answer_tokens: int,
        measurement: Measurement | None = None,
    ) -> None:
        self.model, self.unpruned, self.answer_tokens = model, unpruned, answer_tokens
        self.times = self.unpruned_times = None
        self.planned = self.row = planned
        if measurement is not None:
            self.times = measurement.rows[planned.key]
            self.unpruned_times = measurement.rows[unpruned.key]
            self.row = as_cut(planned, self.times.visual)
        self.flops, self.kv_cache_bytes = count_flops(model.loaded, self.row, answer_tokens)
        unpruned_flops, _ = count_flops(model.loaded, unpruned, answer_tokens)
        self.roofline, self.unpruned_roofline = (
            model.roofline(row.counts, flops.vision or 0.0)
            for row, flops in ((self.row, self.flops), (unpruned, unpruned_flops))
        )

    @property
    def predicted(self) -> float:
        """The prefill's speed-up by FLOPs."""
        return self.flops.prefill_full / self.flops.prefill

    @property
    def limit(self) -> float:
        """The prefill's speed-up at the machine's ceilings."""
        return self.unpruned_roofline.prefill.seconds / self.roofline.prefill.seconds

    @property
    def above_roofline(self) -> bool:
        """Whether every pass was faster than the machine's ceilings allow."""
        return min(self.speedups(PREFILL)) > self.limit

    def same_way(self, other: RowFigures) -> bool:
        """Whether both are keeps that were asked for, pruned in the same way."""
        ways = [
            (one.method, one.stages_of, one.options)
            for one in (self.row.variant, other.row.variant)
            if not is_preset(one)
        ]
        return len(ways) == 2 and ways[0] == ways[1]

    def speedups(self, seconds: Callable[[PassTimes], float]) -> tuple[float, ...]:
        """Return the measured speed-ups over the unpruned row, pass by pass."""
        assert self.times is not None
        assert self.unpruned_times is not None
        return self.times.speedups(self.unpruned_times, seconds)

    def total_of(self, one: PassTimes) -> float:
        return one.total(self.answer_tokens)

    @property
    def preprocess_seconds(self) -> float:
        """Seconds of preparing the pixels; 0 of a machine that is not here: not known."""
        return 0.0 if self.model.machine.predicted else self.row.prompt.preprocess_seconds

    def roofline_seconds(self) -> RooflineSeconds:
        """Return the least seconds of the row, and what bounds them."""
        prefill, decode = self.roofline.prefill, self.roofline.decode
        return RooflineSeconds(
            vision=self.roofline.vision,
            prefill=prefill.seconds,
            prefill_compute=prefill.arithmetic,
            prefill_bandwidth=prefill.reading,
            prefill_bound=prefill.by,
            decode_per_token=decode.seconds,
            decode_compute=decode.arithmetic,
            decode_bandwidth=decode.reading,
            decode_bound=decode.by,
            first_token=self.preprocess_seconds + self.roofline.vision + prefill.seconds,
        )

    def for_verdict(self) -> VerdictRow:
        """Return what the verdict asks of a row: as measured, else at the machine's ceilings."""
        preprocess = self.preprocess_seconds
        times, unpruned = (
            measured.typical
            if measured
            else PassTimes(preprocess, at_best.vision, 0.0, at_best.prefill.seconds, 0.0,
                           at_best.decode.seconds)
            for measured, at_best in (
                (self.times, self.roofline), (self.unpruned_times, self.unpruned_roofline),
            )
        )  # fmt: skip
        gains = self.speedups(self.total_of) if self.times else ()
        amount = media_amount(self.row.prompt)
        return VerdictRow(
            name=self.row.name,
            times=times,
            answer_tokens=self.answer_tokens,
            speedup=median(gains) if gains else self.total_of(unpruned) / self.total_of(times),
            prefill_speedup=median(self.speedups(PREFILL)) if self.times else self.limit,
            predicted=self.predicted,
            roofline=self.limit,
            frames=amount.frames,
            tiles=amount.tiles,
            is_pruned=bool(self.row.cuts),
            is_preset=is_preset(self.row.variant),
            spares_tower=self.row.encoded is not None or bool(self.row.prompt.inputs.full_size),
            totals=tuple(map(self.total_of, self.times.passes)) if self.times else (),
            gains=gains,
        )

    def result(self) -> ProfileRow:
        """Return the row as the profile gives it."""
        first, unpruned_first = (
            self.preprocess_seconds + least.vision + least.prefill.seconds
            for least in (self.roofline, self.unpruned_roofline)
        )
        peak = self.model.peak_bytes(self.row.counts)
        predicted = PredictedSpeedups(
            prefill_predicted=self.predicted,
            prefill_roofline=self.limit,
            first_token_roofline=unpruned_first / first,
        )
        return ProfileRow(
            **vars(row_name(self.row)),
            input=media_amount(self.unpruned.prompt),
            measured=self.times.how if self.times else None,
            tokens=count_tokens(self.row, self.answer_tokens),
            flops=self.flops,
            kv_cache_bytes=self.kv_cache_bytes,
            memory_bytes=MemoryBytes(weights=self.model.weights.total, peak=peak),
            fits=peak <= self.model.machine.free_bytes,
            seconds=self.seconds(self.times.typical) if self.times else None,
            roofline=self.roofline_seconds(),
            compare=self.measured_speedups(predicted) if self.times else predicted,
            warnings=list(self.row.warnings),
            passes=[times._asdict() for times in self.times.passes] if self.times else [],
        )

    def seconds(self, times: PassTimes) -> ProfileSeconds:
        """Return seconds in the report's names; the total has reading the media, too."""
        media = self.row.prompt.media_seconds
        return ProfileSeconds(
            media=media,
            preprocess=times.preprocess,
            vision=times.vision,
            select=times.select,
            prefill=times.prefill,
            decode=times.decode(self.answer_tokens),
            first_token=times.first_token,
            total=media + self.total_of(times),
            decode_per_token=times.decode_per_token,
        )

    def measured_speedups(self, predicted: PredictedSpeedups) -> MeasuredSpeedups:
        """Return the predicted speed-ups, and those that were measured."""
        assert self.unpruned_times is not None
        unpruned = self.seconds(self.unpruned_times.typical)
        prefill, first_token, total = (
            self.speedups(part) for part in (PREFILL, FIRST_TOKEN, self.total_of)
        )
        return MeasuredSpeedups(
            **vars(predicted),
            seconds=CompareSeconds(
                vision=unpruned.vision,
                prefill=unpruned.prefill,
                decode=unpruned.decode,
                first_token=unpruned.first_token,
                total=unpruned.total,
            ),
            prefill_speedup=median(prefill),
            prefill_spread=[min(prefill), max(prefill)],
            first_token_speedup=median(first_token),
            first_token_spread=[min(first_token), max(first_token)],
            total_speedup=median(total),
            total_spread=[min(total), max(total)],
            realised_fraction=median(prefill) / self.predicted,
        )


def row_name(row: PlannedRow) -> RowName:
    """Return which row it is, and what cuts it."""
    variant = row.variant
    return RowName(
        keep=row.keep,
        preset=variant.name if is_preset(variant) else None,
        method=None if variant.role == UNPRUNED else variant.method or None,
        stages_of=variant.stages_of,
        options=dict(variant.options),
    )


def failed_row(row: PlannedRow, measurement: Measurement | None) -> FailedRow:
    """Return a row that can't be cut as it was asked to."""
    error = row.error or (measurement.errors[row.key] if measurement else "")
    return FailedRow(**vars(row_name(row)), error=error)


def media_amount(prompt: ProfiledPrompt) -> MediaAmount:
    return MediaAmount(
        frames=prompt.frames,
        tiles=max(prompt.inputs.tiles, default=0),
        visual_tokens=len(prompt.layout),
    )
