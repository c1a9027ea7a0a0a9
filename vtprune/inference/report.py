"""What one question cost: counts, FLOPs, bytes, seconds, in the fixed names of the JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Report:
    """One answered question.

    Args:
        question, answer: what was asked and answered.
        model: name, family, layers, parameters, device, dtype, attention.
        input: files, modality, frames, tiles, timestamps, decoder, duration, width, height.
        preset: the resolved preset, every stage with its layer and all its options.
        tokens: visual, text, answer, keep_mean, kept_after, by_modality, stages, by_frame, by_tile.
        flops: vision, prefill, prefill_full, decode, decode_full, reduction; None: not counted.
        kv_cache_bytes: kept, full; None: not counted.
        memory_bytes: weights, peak.
        seconds: startup (interpreter and imports; 0 in a library call), load, media, preprocess,
            vision, select, prefill, decode, first_token, total: from the beginning of the command,
            or of the call, to the end of the answer. Of several questions each has its own, and the
            first what all share.
        compare: the unpruned run beside it; None where it was not asked for.
        warnings: what the reader should know before believing a figure.
        version: of vtprune, torch and transformers.
    """

    question: str
    answer: str
    model: Mapping[str, object]
    input: Mapping[str, object]
    preset: Mapping[str, object]
    tokens: Mapping[str, object]
    flops: Mapping[str, float | None]
    kv_cache_bytes: Mapping[str, int | None]
    memory_bytes: Mapping[str, int]
    seconds: Mapping[str, float]
    compare: Mapping[str, object] | None = None
    warnings: tuple[str, ...] = ()
    version: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Plain dicts, lists, strings and numbers; `compare` only where there is one."""
        values = asdict(self)
        values["warnings"] = list(self.warnings)
        if self.compare is None:
            del values["compare"]
        return values
