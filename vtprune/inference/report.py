"""What one question cost: counts, FLOPs, bytes, seconds, in the fixed names of the JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from vtprune.errors import VtpruneError
from vtprune.inference.provenance import file_digests, machine_facts

if TYPE_CHECKING:
    from vtprune.inference.kept_tokens import KeptTokens

__all__ = [
    "CompareResult",
    "CompareSeconds",
    "CompileInfo",
    "DecodeCutCount",
    "DecodingInfo",
    "FailedReport",
    "Flops",
    "HostInfo",
    "InputInfo",
    "KvCacheBytes",
    "MemoryBytes",
    "ModalitySettings",
    "ModelInfo",
    "Report",
    "ResolvedPreset",
    "ResolvedStage",
    "Seconds",
    "StageCount",
    "TokenCounts",
    "Versions",
]


class Block:
    """A part of a report: its fields are the names of the JSON, each declared here alone."""

    def to_dict(self) -> dict[str, object]:
        """Return plain dicts, lists, strings and numbers.

        A field that may be left out (its default is None) is left out where it is None.
        """
        values = {field: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {
            field.name: to_plain(value)
            for field, value in values.items()
            if (value is not None or field.default is not None) and field.metadata.get("json", True)
        }


def to_plain(value: object) -> object:
    """Return blocks and mappings as dicts, sequences as lists, and all else as it is."""
    if isinstance(value, Block):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


@dataclass(frozen=True, kw_only=True)
class HostInfo(Block):
    """The machine that a result was measured on.

    Args:
        cores: logical ones of all CPUs.
        gpus: names of all that torch sees.
        os: system, release and architecture.
    """

    cpu: str
    cores: int
    gpus: Sequence[str]
    os: str
    python: str


def describe_host() -> HostInfo:
    """Return what is known of this machine."""
    return HostInfo(**machine_facts())  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class ModelInfo(Block):
    """The model that answered.

    Args:
        name: as it was asked for; `adapter` likewise, None without one.
        family: the model type of its config.
        attention: the kernel, such as "sdpa".
        pruned_equals: what a pruned answer equals: "masked", the model with the dropped tokens
            masked as keys; or "layer loop", where layers keep a state of all tokens: a loop over
            the layers, each on the tokens that are left there. None where that is not known.
        revision: commit of the checkpoint on the hub; None of a directory.
    """

    name: str
    adapter: str | None = None
    family: str
    layers: int
    parameters: int
    device: str
    dtype: str
    attention: str
    pruned_equals: str | None = None
    revision: str | None = None

    def to_columns(self) -> dict[str, object]:
        """Return the columns of CSV rows that say what ran, and where."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "attention": self.attention,
            "model": self.name,
        }


@dataclass(frozen=True, kw_only=True)
class InputInfo(Block):
    """The media that were read.

    Args:
        modality: "image", "video", "mixed", or "text" without media.
        frames, tiles: of all files together.
        timestamps: seconds of the frames in their files.
        duration: seconds of all videos.
        width, height: of the first file as displayed, rotation applied.
    """

    files: Sequence[str]
    modality: str
    frames: int
    tiles: int
    timestamps: Sequence[float]
    decoder: str
    duration: float
    width: int
    height: int

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it, with the SHA-256 of each file; None of what is no file."""
        values = super().to_dict()
        digests = list(file_digests(self.files).values())
        return {**values, "sha256": digests} if any(digests) else values


@dataclass(frozen=True, kw_only=True)
class ResolvedStage(Block):
    """A stage as it ran, with its layer and all its options, which the JSON has beside the rest."""

    at: str
    layer: int
    modality: str
    method: str
    keep: float | None
    per: str
    split: str
    positions: str
    options: Mapping[str, str | float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Return the stage in the preset schema, its layer and modality added."""
        values = super().to_dict()
        del values["options"]
        return {**values, **self.options}


@dataclass(frozen=True, kw_only=True)
class ModalitySettings(Block):
    """What the preset says of one modality; None where it says nothing."""

    keep: float | None = None
    max_tiles: int | None = None
    frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None


@dataclass(frozen=True, kw_only=True)
class ResolvedPreset(Block):
    """The preset under which the question was answered.

    Args:
        name: None where one `method` is in the place of a preset.
        keep: the layer average that was asked for; None where the stages say their own, or where
            a number of tokens was asked for: `tokens` as a layer average, or `tokens_after` as the
            most that the first cut leaves.
        fit: "context" or "memory", where that decided: `fit_tokens` is how many tokens the first
            cut could leave, `fit_reason` why.
        decode: `every` and `keep` of the cuts while decoding; None: there are none.
        keep_for_turns: share of what is kept for a question that is chosen without it; None: 0.
        stages: those that cut something.
        image, video: None where the preset says nothing of that modality.
        changed: what was changed in the preset, by option.
        evidence: figures that the preset rests on, as in its file; None: it names none.
    """

    name: str | None
    description: str
    keep: float | None
    tokens: int | None = None
    tokens_after: int | None = None
    fit: str | None = None
    fit_tokens: int | None = None
    fit_reason: str | None = None
    decode: Mapping[str, object] | None = None
    keep_for_turns: float | None = None
    seed: int
    image: ModalitySettings | None = None
    video: ModalitySettings | None = None
    method: str | None
    changed: Mapping[str, object]
    evidence: Sequence[Mapping[str, object]] | None = None
    stages: Sequence[ResolvedStage]

    def keep_for(self, modality: str) -> float | None:
        """Return the layer average that was asked for, of "image" or "video"."""
        settings = self.image if modality == "image" else self.video
        return self.keep if settings is None or settings.keep is None else settings.keep


@dataclass(frozen=True, kw_only=True)
class StageCount(Block):
    """What one stage cut, in visual tokens of its modality."""

    at: str
    layer: int
    modality: str
    method: str
    options: Mapping[str, str | float]
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class TokenCounts(Block):
    """Tokens of the prompt and of the answer.

    Args:
        visual, text, answer: before any cut, and of the answer with the end of its turn.
        keep_mean: the layer average of the fraction of visual tokens present, as cut.
        kept_after: visual tokens after the last cut; by_modality: those of each.
        by_frame, by_tile: visual tokens left in each.
    """

    visual: int
    text: int
    answer: int
    keep_mean: float
    kept_after: int
    by_modality: Mapping[str, int]
    stages: Sequence[StageCount]
    by_frame: Sequence[int]
    by_tile: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Flops(Block):
    """Floating-point operations; None: not counted for this model.

    Args:
        vision: of the vision tower and the projector.
        prefill: of the decoder layers over the prompt, and of the output head at its end.
        prefill_full, decode_full: without pruning.
        reduction: 1 - prefill / prefill_full.
    """

    vision: float | None
    prefill: float | None
    prefill_full: float | None
    decode: float | None
    decode_full: float | None
    reduction: float | None

    @property
    def prefill_speedup(self) -> float | None:
        """The speed-up of the prefill that the counts predict; None: not counted."""
        return self.prefill_full / self.prefill if self.prefill and self.prefill_full else None


@dataclass(frozen=True, kw_only=True)
class KvCacheBytes(Block):
    """Bytes of the KV cache after the prefill, and without pruning; None: not counted.

    Args:
        state: what linear attention, Mamba and convolutions hold beside, whatever is kept.
    """

    kept: int | None
    full: int | None
    state: int | None = 0


@dataclass(frozen=True, kw_only=True)
class DecodeCutCount(Block):
    """One cut of the KV cache while the answer was decoded.

    Args:
        tokens: decoded before it.
        visual_mean: visual tokens left, averaged over the layers that keep keys.
        kv_cache_bytes: of the cache after it, the answer's tokens included; `kv_cache_bytes_uncut`
            without cuts while decoding. None: not counted.
    """

    tokens: int
    visual_mean: float
    kv_cache_bytes: int | None
    kv_cache_bytes_uncut: int | None


@dataclass(frozen=True, kw_only=True)
class DecodingInfo(Block):
    """The cuts of the KV cache while the answer was decoded.

    Args:
        every: decoded tokens from one cut to the next.
        keep: share of the visual tokens that each leaves.
        cuts: those that were made.
        seconds: that reading attention and choosing took; of a batch, of all its samples.
    """

    every: int
    keep: float
    cuts: Sequence[DecodeCutCount]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MemoryBytes(Block):
    """Bytes of the weights, and the peak of the process or the GPU; 0: not known."""

    weights: int
    peak: int


@dataclass(frozen=True, kw_only=True)
class Seconds(Block):
    """Seconds by part; of several questions the first has what all of them share.

    Args:
        startup: interpreter and imports; 0 in a library call.
        prefill: the decoder's forward over the prompt, selection included, vision excluded.
        first_token: preprocess, vision, prefill and the choice of the first token.
        total: from the beginning of the command, or of the call, to the end of the answer.
    """

    startup: float
    load: float
    media: float
    preprocess: float
    vision: float
    select: float
    prefill: float
    decode: float
    first_token: float
    total: float


@dataclass(frozen=True, kw_only=True)
class CompileInfo(Block):
    """What was compiled while the question was answered; no other seconds but `total` hold it.

    Args:
        backend, mode: of `torch.compile`; mode is None for its default.
        layers: of the decoder, that are compiled.
        tower_layers: of vision towers, that are.
        seconds: that compiling took.
        graphs: that were compiled.
        recompiles: those of them that took the place of one that did not fit.
    """

    backend: str
    mode: str | None
    layers: int
    tower_layers: int
    seconds: float
    graphs: int
    recompiles: int


@dataclass(frozen=True, kw_only=True)
class CompareSeconds(Block):
    """Median seconds of the unpruned runs; the total leaves loading out."""

    vision: float
    prefill: float
    decode: float
    first_token: float
    total: float


@dataclass(frozen=True, kw_only=True)
class CompareResult(Block):
    """The unpruned model beside the pruned one.

    Args:
        answer: of the unpruned model, greedy.
        prefill_predicted: by FLOPs; None: not counted. `prefill_roofline` is an estimate by the
            machine's measured ceilings.
        realised_fraction: prefill_speedup / prefill_predicted.
        pruned_answer: the pruned model's greedy answer, where the report's own was sampled.
        pairs: of every unpruned run and the pruned one beside it the seconds by part, of which the
            speed-ups are medians.
    """

    answer: str
    same_answer: bool
    seconds: CompareSeconds
    prefill_speedup: float
    prefill_predicted: float | None
    prefill_roofline: float | None
    realised_fraction: float | None
    first_token_speedup: float
    total_speedup: float
    pruned_answer: str | None = None
    pairs: Sequence[Mapping[str, Mapping[str, float]]] | None = None

    def spread(self, part: str) -> tuple[float, float]:
        """Return the lowest and the highest speed-up of a pair; not a number without pairs."""
        pairs = self.pairs or ()
        ratios = [pair["unpruned"][part] / max(pair["pruned"][part], 1e-9) for pair in pairs]
        return min(ratios, default=math.nan), max(ratios, default=math.nan)

    def speedup(self, part: str) -> float:
        """Return the speed-up of "prefill", "first_token" or "total"."""
        speedups = {
            "prefill": self.prefill_speedup,
            "first_token": self.first_token_speedup,
            "total": self.total_speedup,
        }
        return speedups[part]


@dataclass(frozen=True, kw_only=True)
class Versions(Block):
    """Versions of the libraries that ran."""

    vtprune: str
    torch: str
    transformers: str


@dataclass(frozen=True, kw_only=True)
class Report(Block):
    """One answered question, and what it cost.

    >>> import vtprune
    >>> report = vtprune.ask(None, "clip.mp4", "what moves?", keep=0.3)
    >>> report.tokens.kept_after, report.flops.reduction, report.seconds.prefill
    >>> report.to_dict()["tokens"]["keep_mean"]  # what --json prints

    Args:
        decoding: None without cuts while decoding.
        segment: seconds at which the part of the video begins and ends that was asked about, of an
            answer for each segment; None of the whole.
        compare: None where the unpruned model was not asked for.
        compile: None where the model is not compiled.
        warnings: what the reader should know before believing a figure.
        host: the machine that it ran on.
        kept_tokens: which tokens each stage kept, for `vtprune.draw`; no part of the JSON.
    """

    question: str
    answer: str
    model: ModelInfo
    input: InputInfo
    preset: ResolvedPreset
    tokens: TokenCounts
    flops: Flops
    kv_cache_bytes: KvCacheBytes
    decoding: DecodingInfo | None = None
    memory_bytes: MemoryBytes
    seconds: Seconds
    segment: Sequence[float] | None = None
    compare: CompareResult | None = None
    compile: CompileInfo | None = None
    warnings: Sequence[str] = ()
    version: Versions
    host: HostInfo = field(default_factory=describe_host)
    kept_tokens: KeptTokens | None = field(
        default=None, repr=False, compare=False, metadata={"json": False}
    )

    @property
    def error(self) -> VtpruneError | None:
        """Why there is no answer; None where there is one."""
        return None


class FailedReport(Report):
    """An item that could not be answered: `error` says why, `files` what it was about.

    Its other fields do not exist: reading one, such as `answer`, raises the error.
    """

    files: Sequence[str]

    def __init__(self, question: str, files: Sequence[str], error: VtpruneError) -> None:
        vars(self).update(question=question, files=list(files), _error=error)

    @property
    def error(self) -> VtpruneError:
        """Why there is no answer."""
        error = vars(self)["_error"]
        assert isinstance(error, VtpruneError)
        return error

    def __getattr__(self, name: str) -> object:
        if name in {field.name for field in fields(Report)}:
            raise self.error
        raise AttributeError(name)

    def to_dict(self) -> dict[str, object]:
        """Return question, files, error and hint."""
        error = self.error
        return {"question": self.question, "files": list(self.files), "error": error.message,
                "hint": error.hint}  # fmt: skip

    def __repr__(self) -> str:
        return f"FailedReport({self.question!r}, {self.files!r}, {self.error!r})"

    __eq__ = object.__eq__
    __hash__ = object.__hash__
