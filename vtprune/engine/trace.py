"""What a pruned prefill really did, sample by sample."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vtprune.device import Duration
from vtprune.engine.fitting import Fitting
from vtprune.preset.spec import StageSpec
from vtprune.tokens.layout import Layout
from vtprune.tokens.schedule import layer_average
from vtprune.tokens.units import FullSizeCounts

_LOCK = threading.Lock()
"""Held while a trace changes or is copied, so that none is made of two prefills."""


@dataclass(frozen=True, eq=False)
class MergedTokens:
    """Which tokens of one sample went into which: read from the device only where it is asked for.

    Args:
        columns: (N,) of the tokens that the method chose from, in the original input_ids.
        kept: (K,) the kept tokens' places among them.
        assign: (N,) as of Selection, on the model's device.
    """

    columns: torch.Tensor
    kept: torch.Tensor
    assign: torch.Tensor

    def __eq__(self, other: object) -> bool:
        """Tensors have no truth as a whole: compare what they say."""
        return isinstance(other, MergedTokens) and self.by_column() == other.by_column()

    def by_column(self) -> dict[int, int]:
        """Return the column of each dropped token that was merged -> that of the kept one."""
        assign = self.assign.cpu()
        dropped = assign >= 0
        dropped[self.kept] = False
        kept_columns = self.columns[self.kept][assign[dropped]]
        return dict(zip(self.columns[dropped].tolist(), kept_columns.tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What a method ranked one sample's tokens by: read from the device where it is asked for.

    Args:
        columns: (N,) of the tokens that the method chose from, in the original input_ids.
        values: (N,) as of Selection, on the model's device.
    """

    columns: torch.Tensor
    values: torch.Tensor

    def by_column(self) -> dict[int, float]:
        """Return the score of each column."""
        return dict(zip(self.columns.tolist(), self.values.float().tolist(), strict=True))


@dataclass(frozen=True)
class StageRecord:
    """What one stage did to one prefill; lists have one entry a sample of the batch.

    Args:
        spec: the stage as the preset has it.
        layer: the first layer that saw the shorter sequence; 0 is the language model's input.
        modality: "image", "video", or "all" where they share the stage.
        cuts: whether this was where the sample's stage cut; a stage at a named place may cut at
            different layers for samples of very different size, with a record for each layer.
        before, after: counts of visual tokens, of every modality.
        modality_before, modality_after: counts of the tokens that the stage is about.
        kept: ascending columns of the original input_ids with visual tokens still present, of
            every modality.
        merges: what was merged into kept tokens; None where nothing was.
        scores: what the method ranked the tokens by; None where it chose by no score, or cut
            nothing.
    """

    spec: StageSpec
    layer: int
    modality: str
    cuts: list[bool]
    before: list[int]
    after: list[int]
    modality_before: list[int]
    modality_after: list[int]
    kept: list[list[int]]
    merges: list[MergedTokens | None]
    scores: list[TokenScores | None] = field(default_factory=list, compare=False)

    @property
    def merged(self) -> list[bool]:
        """Whether dropped tokens were merged into kept ones."""
        return [merge is not None for merge in self.merges]

    @property
    def merged_into(self) -> list[dict[int, int]]:
        """The column of each merged token -> that of its kept one, both of the input_ids."""
        return [merge.by_column() if merge else {} for merge in self.merges]

    @property
    def method(self) -> str:
        """The registered method."""
        return self.spec.method

    @property
    def at(self) -> str:
        """The place as the preset names it."""
        return self.spec.at

    @property
    def options(self) -> Mapping[str, str | float]:
        """All options of the method."""
        return dict(self.spec.options)

    @property
    def keep(self) -> float | None:
        """The stage's own keep; None for the free stage."""
        return self.spec.keep

    @property
    def per(self) -> str:
        """The scope over which the budget was shared."""
        return self.spec.per

    @property
    def split(self) -> str:
        """How that scope's groups shared it."""
        return self.spec.split

    @property
    def positions(self) -> str:
        """Whether kept tokens kept their position ids."""
        return self.spec.positions


@dataclass(frozen=True, eq=False)
class DecodeCut:
    """One cut of the KV cache while an answer was decoded.

    Args:
        steps: decoded tokens whose steps saw all that was there before.
        columns: for every layer the (B, m) int64 columns of the keys left, of prompts and answers;
            -1 for padding.
        visual: for every sample the visual tokens left in each layer.
        duration: that reading the attention since the cut before, and choosing, took.
    """

    steps: int
    columns: tuple[torch.Tensor, ...]
    visual: list[list[int]]
    duration: Duration

    @property
    def seconds(self) -> float:
        """The duration, read from the device."""
        return self.duration.seconds

    def left(self, sample: int, layer: int) -> list[int]:
        """Return the columns of a sample that a layer still sees, ascending."""
        if not self.columns[layer].shape[1]:  # it keeps no keys
            return []
        row = self.columns[layer][sample]
        return row[row >= 0].tolist()


@dataclass
class Trace:
    """What happened in a `pruning` block: the last prefill with visual tokens.

    Where several threads call the model, it is the prefill that ended last, of whichever thread;
    all fields change at once. `snapshot` gives several of them of the same prefill, and blocks with
    `threads="own"` have a trace a thread.

    Args:
        stages: one record a stage, in the order of the cuts.
        layouts: of every sample's visual tokens, before any cut.
        kept: of every sample's visual tokens, after the last cut.
        text: tokens of every sample that are not visual, padding left out.
        visual_by_layer: for every sample the visual tokens that each decoder layer saw.
        durations: of the last prefill: vision (encoding, comparing pixels before it and reading the
            tower's attention, summed since the prefill before), select, prefill (the decoder's
            forward, selection included).
        encoded: for every sample, modality -> the frames, steps or tiles that the vision tower got
            of each media item; empty where it got all.
        found: (sample, modality) whose features came from a cache on disk.
        full_size: of every sample the token counts had its media not been made smaller;
            empty where they were not.
        fitting: of every sample how many tokens fit; empty where a preset says how many it keeps.
        decoding: the cuts of the KV cache while the answer was decoded, in their order.
        prefills: how many prefills with visual tokens have run.
        warnings: what the reader should know, of all of them.
        unpruned: whether the model can't be pruned, and ran as it is.
        begun: layouts, text and full_size of the prefill that began last, whether it ended or not.
    """

    stages: list[StageRecord] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    kept: list[Layout] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    visual_by_layer: list[list[int]] = field(default_factory=list)
    durations: dict[str, Duration] = field(default_factory=dict)
    encoded: list[dict[str, list[int]]] = field(default_factory=list)
    found: set[tuple[int, str]] = field(default_factory=set)
    full_size: list[FullSizeCounts] = field(default_factory=list)
    fitting: list[Fitting] = field(default_factory=list)
    decoding: list[DecodeCut] = field(default_factory=list)
    prefills: int = 0
    warnings: list[str] = field(default_factory=list)
    begun: Trace | None = None
    unpruned: bool = False

    @property
    def seconds(self) -> dict[str, float]:
        """The durations in seconds, read from the device."""
        return {name: duration.seconds for name, duration in self.durations.items()}

    def warn(self, message: str) -> None:
        """Add a warning once; "" is none."""
        with _LOCK:
            if message and message not in self.warnings:
                self.warnings.append(message)

    def take(self, last: Trace) -> None:
        """Become the trace of another prefill, which has ended."""
        with _LOCK:
            kept = {
                "prefills": self.prefills + 1,
                "warnings": self.warnings,
                "begun": self.begun,
            }
            vars(self).update(vars(last) | kept)

    def snapshot(self) -> Trace:
        """Return a copy that later prefills leave as it is."""
        with _LOCK:
            copies = {"warnings": list(self.warnings), "decoding": list(self.decoding)}
            return Trace(**(vars(self) | copies))

    def before(self, sample: int = 0) -> tuple[int, int]:
        """Visual and text tokens of a sample before anything was made smaller or cut."""
        more = self.full_size[sample] if self.full_size else FullSizeCounts({})
        visual = more.total() if self.full_size else len(self.layouts[sample])
        return visual, self.text[sample] + more.more_text

    def keep_mean(self, sample: int = 0) -> float:
        """Return the layer average of the visual tokens that were kept; 1.0 without any media."""
        if not self.layouts:
            return 1.0
        return layer_average(self.visual_by_layer[sample], self.before(sample)[0])

    def tokens_by_layer(self, sample: int = 0) -> list[int]:
        """Return all tokens of a sample that each decoder layer saw, padding left out."""
        return [self.text[sample] + visual for visual in self.visual_by_layer[sample]]
