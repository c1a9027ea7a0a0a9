"""The result of a comparison: its rows, as JSON and as CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vtprune.inference.csv_file import csv_text, flat
from vtprune.inference.report import (
    Block,
    CompareResult,
    Flops,
    HostInfo,
    InputInfo,
    KvCacheBytes,
    ModelInfo,
    StageCount,
    TokenCounts,
    Versions,
    describe_host,
)
from vtprune.inference.wording import with_options

PARTS = ("media", "preprocess", "vision", "select", "prefill", "decode", "first_token", "total")
COMPARED = ("prefill_speedup", "prefill_predicted", "prefill_roofline", "realised_fraction",
            "first_token_speedup", "total_speedup")  # fmt: skip
RUN = ("model", "device", "dtype", "attention", "file", "question", "repeats")
COLUMNS = (
    *RUN, "role", "method", "preset", "at", "keep", "answer", "same_answer", "visual", "keep_mean",
    "kept_after", "stages", "options", "vision_flops", "prefill_flops", "prefill_full_flops",
    "reduction", "kv_cache_kept_bytes", "kv_cache_full_bytes",
    *(f"{part}_seconds" for part in PARTS), *COMPARED, "evidence_kept", "beside",
    "error",
)  # fmt: skip
"""Of the CSV, every line of which has a cell for each."""


@dataclass(frozen=True)
class ComparisonRow(Block):
    """One row of a comparison; where it could not be run, with the reason alone.

    Args:
        role: "unpruned", "asked" or "baseline".
        method: "unpruned", or the method's name; None for a preset.
        preset: the resolved preset, every stage with its layer and all its options.
        at: where it cuts, as it was asked for.
        keep: the layer average that was asked for; None where the preset says its keeps itself.
        options: of the method, as given.
        beside: of a matched baseline, the rows whose layers and counts it has.
        answer, same_answer: and whether it is the unpruned one.
        tokens, flops, kv_cache_bytes: as in a report.
        seconds: medians of what was measured, by part; the total is from reading the media to the
            last token, without loading the model, which all rows share. None without measuring.
        compare: as in a report; None for the unpruned row, and without measuring.
        evidence_kept: share of the unpruned answer's evidence on kept tokens, average over the
            layers; None where it was not asked for, or the row has smaller media.
        error: why there is no answer.
    """

    role: str
    method: str | None
    preset: Mapping[str, object]
    at: str
    keep: float | None
    options: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    answer: str | None = None
    same_answer: bool | None = None
    tokens: TokenCounts | None = None
    flops: Flops | None = None
    kv_cache_bytes: KvCacheBytes | None = None
    seconds: Mapping[str, float] | None = None
    compare: CompareResult | None = None
    evidence_kept: float | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """The method with its options, or the preset's name."""
        return with_options(self.method, self.options) if self.method else str(self.preset["name"])

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it; what there is none of is left out, but `method` and `keep`."""
        values = super().to_dict()
        for key in ("beside", "options"):
            if not values[key]:
                del values[key]
        return values


@dataclass(frozen=True)
class Comparison(Block):
    """The result of `compare_methods`.

    Args:
        question: what was asked.
        model, input, version, host: as in a report.
        rows: the unpruned model's first, then keep by keep what was asked for and the baselines.
        pairs: how often each row was timed in turn with the unpruned model; 0: not at all.
        seconds: startup, load and total of the whole comparison.
        warnings: what to know before believing a figure.
    """

    question: str
    model: ModelInfo
    input: InputInfo
    rows: tuple[ComparisonRow, ...]
    pairs: int
    version: Versions
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    host: HostInfo = field(default_factory=describe_host)

    def to_csv(self) -> str:
        """Return one line a row under a line of COLUMNS; a cell without a figure is empty."""
        same = {
            **self.model.to_columns(),
            "file": "; ".join(self.input.files),
            "question": self.question,
            "repeats": self.pairs,
        }
        return csv_text([{**same, **_cells(row)} for row in self.rows], COLUMNS)


def _cells(row: ComparisonRow) -> dict[str, object]:
    """Return the columns of a row."""
    tokens, flops, compare, cache = (
        {} if block is None else block.to_dict()
        for block in (row.tokens, row.flops, row.compare, row.kv_cache_bytes)
    )
    seconds = row.seconds or {}
    named = ("role", "method", "at", "keep", "answer", "same_answer", "evidence_kept", "error")
    return flat({
        **{key: getattr(row, key) for key in named},
        "preset": None if row.method else row.name,
        "beside": row.beside,
        "options": _options(row.tokens.stages if row.tokens else ()),
        **{key: tokens.get(key) for key in ("visual", "keep_mean", "kept_after")},
        "stages": tokens.get("stages") or [],
        **{f"{key}_flops": flops.get(key) for key in ("vision", "prefill", "prefill_full")},
        "reduction": flops.get("reduction"),
        **{f"kv_cache_{key}_bytes": cache.get(key) for key in ("kept", "full")},
        **{f"{key}_seconds": seconds.get(key) for key in PARTS},
        **{key: compare.get(key) for key in COMPARED},
    })  # fmt: skip


def _options(stages: Sequence[StageCount]) -> list[str]:
    """Return every option that the stages ran with, as "norm=none"."""
    pairs = [pair for stage in stages for pair in stage.options.items()]
    return list(dict.fromkeys(f"{name}={value}" for name, value in pairs))
