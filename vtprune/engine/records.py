"""What a prefill did, written down stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

from vtprune.engine.plan import Group
from vtprune.engine.trace import StageRecord, Trace
from vtprune.preset import StageSpec
from vtprune.pruners import METHODS
from vtprune.tokens.layout import Layout


def record(
    stage: StageSpec,
    modality: str,
    layer: int,
    *,
    cuts: list[bool],
    before: list[int],
    after: list[int],
    own_before: list[int],
    own_after: list[int],
    kept: list[list[int]],
    merged: list[bool],
) -> StageRecord:
    """The record of one stage; what it did is as of StageRecord."""
    return StageRecord(
        layer=layer,
        method=stage.method,
        at=stage.at,
        modality=modality,
        options=dict(stage.options),
        keep=stage.keep,
        per=stage.per,
        split=stage.split,
        positions=stage.positions,
        cuts=cuts,
        before=before,
        after=after,
        own_before=own_before,
        own_after=own_after,
        kept=kept,
        merged=merged,
    )


def smaller_media(groups: Sequence[Group], trace: Trace, past: int) -> list[StageRecord]:
    """The records of stages that made media smaller before the prompts were made of them.

    Args:
        past: columns that the cache held before.
    """
    records: list[StageRecord] = []
    before = [whole.total() for whole in trace.whole]
    for group in groups:
        if not (group.stages and METHODS[group.stages[0].method].media):
            continue
        own_before = [whole.total(group.modality) for whole in trace.whole]
        own_after = [len(one.of_modality(group.modality)) for one in trace.layouts]
        rows = zip(before, own_before, own_after, strict=True)
        after = [total - whole + left for total, whole, left in rows]
        records.append(
            record(
                group.stages[0],
                group.modality,
                0,
                cuts=[size > 0 for size in own_before],
                before=before,
                after=after,
                own_before=own_before,
                own_after=own_after,
                kept=[(layout.columns + past).tolist() for layout in trace.layouts],
                merged=[False] * len(trace.layouts),
            )
        )
        before = after
    return records


def count_by_layer(
    whole: Sequence[Layout],
    kept: Sequence[Layout],
    records: Sequence[StageRecord],
    num_layers: int,
) -> list[list[int]]:
    """For every sample the visual tokens of each layer, from what was really kept.

    Args:
        whole, kept: before any cut, and after the last.
    """
    counts = []
    for sample, (layout, left) in enumerate(zip(whole, kept, strict=True)):
        drops = [0] * num_layers
        for one in records:
            drops[one.layer] += one.before[sample] - one.after[sample]
        present, row = len(layout), []
        for drop in drops:
            present -= drop
            row.append(present)
        assert present == len(left)
        counts.append(row)
    return counts
