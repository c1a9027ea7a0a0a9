"""What a row of a profile costs by its counts alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vtprune.engine.trace import Trace
from vtprune.evaluation.profiling.rows import PlannedRow
from vtprune.inference.figures import compute_costs, compute_vision_flops, find_encoded
from vtprune.models import cost
from vtprune.tokens.layout import MODALITIES

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded


@dataclass(frozen=True)
class Costs:
    """What a row costs by its counts alone, in the report's names.

    Args:
        tokens: as in a report; which tokens go is not known, so not how many of a frame or tile.
        flops: as in a report, and `tower`, `projector`, `prefill_by_layer` (without the output
            head), `decode_per_token`.
        kv_cache_bytes: as in a report.
    """

    tokens: dict[str, object] = field(default_factory=dict)
    flops: dict[str, object] = field(default_factory=dict)
    kv_cache_bytes: dict[str, int] = field(default_factory=dict)


def cost_row(loaded: Loaded, row: PlannedRow, answer_tokens: int, dtype_size: int) -> Costs:
    """Tokens, FLOPs and bytes of a row.

    Args:
        answer_tokens: of the answer that decoding is counted for.
        dtype_size: bytes of one number.
    """
    case = row.case
    trace = row.trace
    plain, _ = compute_costs(loaded, case.inputs, trace, answer_tokens, 0)
    shape = cost.decoder_shape(loaded.model.get_decoder().config)  # type: ignore[operator]
    full = [sum(trace.before())] * shape.layers
    encoded = find_encoded(loaded, case.inputs, trace)
    return Costs(
        tokens=count_tokens(row, trace, answer_tokens),
        flops={
            **plain.to_dict(),
            "vision": compute_vision_flops(loaded, case.inputs, trace),
            "tower": sum(cost.tower_flops(shape, units) for shape, units, _ in encoded),
            "projector": sum(cost.projector_flops(*one) for one in encoded),
            "prefill_by_layer": [
                cost.layer_flops(shape, count, count, layer)
                for layer, count in enumerate(row.counts)
            ],
            "decode_per_token": cost.decode_flops(shape, row.counts, 2),
            "decode_per_token_full": cost.decode_flops(shape, full, 2),
        },
        kv_cache_bytes={
            "kept": cost.kv_bytes(shape, row.counts, dtype_size),
            "full": cost.kv_bytes(shape, full, dtype_size),
        },
    )


def count_tokens(row: PlannedRow, trace: Trace, answer_tokens: int) -> dict[str, object]:
    layout = row.case.layout
    left = {name: len(layout.of_modality(name)) for name in MODALITIES}
    for cut in row.cuts:
        if cut.modality != "all":
            left[cut.modality] = cut.after
    kept = row.visual[-1]
    if row.cuts and row.cuts[-1].modality == "all":
        shown = [name for name in MODALITIES if left[name]]
        left = {name: kept if len(shown) == 1 else left[name] for name in shown}
    return {
        "visual": trace.before()[0],
        "text": row.case.text,
        "answer": answer_tokens,
        "keep_mean": trace.keep_mean(),
        "kept_after": kept,
        "by_modality": {name: count for name, count in left.items() if count},
        "stages": [
            {
                "at": cut.stage.at,
                "layer": cut.layer,
                "modality": cut.modality,
                "method": cut.stage.method,
                "options": dict(cut.stage.options),
                "before": cut.before,
                "after": cut.after,
            }
            for cut in row.cuts
        ],
        "by_frame": [],
        "by_tile": [],
    }
