"""What a profile gives, in the fixed names of its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vtprune.inference.csv_file import csv_text, flat
from vtprune.inference.report import (
    Block,
    CompareSeconds,
    InputInfo,
    KvCacheBytes,
    MemoryBytes,
    ModelInfo,
    TokenCounts,
    Versions,
)
from vtprune.inference.wording import with_options


@dataclass(frozen=True)
class Machine(Block):
    """One device, measured.

    Args:
        device: as torch names it.
        name: of the processor or GPU.
        threads: of a CPU; 0 of a GPU.
        dtype: that the ceilings were measured in.
        flops_per_second: of a large matrix product.
        bytes_per_second: of a copy, read and write.
        free_bytes: of memory.
    """

    device: str
    name: str
    threads: int
    dtype: str
    flops_per_second: float
    bytes_per_second: float
    free_bytes: int


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
        tower, projector: of which `vision` is the sum.
        prefill_by_layer: without the output head.
    """

    vision: float
    prefill: float
    prefill_full: float
    decode: float
    decode_full: float
    reduction: float
    tower: float
    projector: float
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
    """Seconds at the ceilings of this machine."""

    vision: float
    prefill: float
    decode_per_token: float
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
        memory_bytes: the peak is an estimate.
        seconds: None where nothing was measured.
    """

    input: MediaAmount
    measured: str | None
    tokens: TokenCounts
    flops: ProfileFlops
    kv_cache_bytes: KvCacheBytes
    memory_bytes: MemoryBytes
    seconds: ProfileSeconds | None
    roofline: RooflineSeconds
    compare: PredictedSpeedups
    warnings: Sequence[str] = ()

    @property
    def is_exact(self) -> bool:
        """Whether its own run was timed, and no other row's in its place."""
        return self.measured not in ("shared", "scaled")


@dataclass(frozen=True, kw_only=True)
class FailedRow(RowName):
    """A variant that can't cut this input as it was asked to."""

    error: str


@dataclass(frozen=True, kw_only=True)
class VerdictFindings(Block):
    """The parts of a verdict; see `verdict.Verdict`."""

    limited_by: str
    pays: bool
    best: str
    best_told_apart: bool


@dataclass(frozen=True, kw_only=True)
class MeasurementInfo(Block):
    """How the seconds were measured; see `row_times.Measurement`."""

    how: str
    passes: int
    seconds: float
    scaled: str


@dataclass(frozen=True, kw_only=True)
class Profile(Block):
    """What pruning saves on one machine.

    Args:
        rows: the unpruned model first.
        verdict: in sentences.
        measured: None where nothing was measured.
        warnings: what the reader should know before believing a figure.
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

    @property
    def good_rows(self) -> list[ProfileRow]:
        """The rows that could be cut."""
        return [row for row in self.rows if isinstance(row, ProfileRow)]

    def to_csv(self) -> str:
        """Return one line a row, its blocks as columns, under a line of their names."""
        same = {
            "device": self.model.device,
            "dtype": self.model.dtype,
            "attention": self.model.attention,
            "model": self.model.name,
            "machine": self.machine.name,
            "passes": self.measured.passes if self.measured else None,
        }
        return csv_text([{**same, **flat(row.to_dict())} for row in self.rows])
