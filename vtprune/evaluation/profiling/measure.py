"""Timing the rows of a profile within a budget: the whole model, or layers of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from vtprune.engine.trace import Trace
from vtprune.errors import ModelError
from vtprune.evaluation.profiling.build import (
    build_random,
    build_skeleton,
    count_weights,
    layer_kinds,
    shallow_config,
    tower_kinds,
)
from vtprune.evaluation.profiling.clock import tower_paths
from vtprune.evaluation.profiling.costs import trace_of
from vtprune.evaluation.profiling.inputs import Case, make_case
from vtprune.evaluation.profiling.layers import SLOWNESS, Layered, run_passes
from vtprune.evaluation.profiling.machine import Machine, Weights, estimate, peak_bytes
from vtprune.evaluation.profiling.probes import STEPS, probe_row
from vtprune.evaluation.profiling.rows import Planned, name_of, plan_row
from vtprune.evaluation.profiling.shown import Shown
from vtprune.evaluation.profiling.times import Budget, Measured
from vtprune.evaluation.profiling.whole import measure_whole
from vtprune.inference.figures import compute_vision_flops
from vtprune.inference.memory import fitting_errors
from vtprune.models import cost
from vtprune.models.structure import find_structure

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.models.base import Sampling
    from vtprune.models.loading import Loaded, Progress
    from vtprune.preset import Preset

ROOM = 0.8  # of the free memory that a model may take
WHOLE_SHARE = 0.5  # of the budget, that a warm-up and a pass of the whole may take
FIRST_SHARE = 0.02  # of the budget: what may be expected to take more is tried smaller first
LARGEST_SHARE = 0.25  # of the budget, that the largest case may take once


MadeOf = tuple[Shown, "Sampling", "Preset"]
"""What a case was made of, and the preset that it was made for."""


@dataclass(frozen=True)
class Subject:
    """A model without weights, where it would run.

    Args:
        loaded: its structure and preparation files.
        machine: and `weights` of the whole model.
        attention: the kernel; None leaves it to transformers.
    """

    loaded: Loaded
    device: torch.device
    dtype: torch.dtype
    machine: Machine
    weights: Weights
    attention: str | None = None

    @property
    def shape(self) -> cost.DecoderShape:
        return cost.decoder_shape(self.loaded.model.config.get_text_config())

    @property
    def eager(self) -> bool:
        return self.attention == "eager"


def measure(
    subject: Subject,
    rows: Sequence[Planned],
    shown: Mapping[int, MadeOf],
    budget: Budget,
    repeats: int,
    how: str = "auto",
    on_progress: Progress | None = None,
) -> Measured:
    """Times all rows.

    Args:
        rows: the one without cuts first.
        shown: by the identity of its case, what it was made of.
        how: "whole", "layers", or "auto": the whole model where it fits memory and budget.

    Raises:
        ModelError: not even a few layers fit in memory.
    """
    if how == "auto":
        how = (
            "whole" if fits_memory(subject, rows) and fits_time(subject, rows, budget) else "layers"
        )
    if how == "whole":
        loaded = with_weights(subject, subject.loaded.model.config)
        with fitting_errors(loaded, rows[-1].wanted.preset, Trace()):
            return measure_whole(loaded, rows, budget, repeats, on_progress)
    return measure_layers(subject, rows, shown, budget, repeats, on_progress)


def with_weights(
    subject: Subject, config: PreTrainedConfig, own_layers: int | None = None
) -> Loaded:
    """The model with random weights on its device."""
    model = build_random(config, subject.device, subject.dtype, subject.attention, own_layers)
    return replace(subject.loaded, model=model)


def fits_memory(subject: Subject, rows: Sequence[Planned]) -> bool:
    """Whether the whole model and its longest prompt fit in what is free."""
    size = subject.dtype.itemsize
    need = max(
        peak_bytes(subject.shape, subject.weights, row.counts, size, subject.eager) for row in rows
    )
    return need <= ROOM * subject.machine.free_bytes


def fits_time(subject: Subject, rows: Sequence[Planned], budget: Budget) -> bool:
    """Whether a warm-up and one pass of all rows take less than the budget, probably."""
    least = 0.0
    for case in {id(row.case): row.case for row in rows}.values():
        least += 2 * vision_work(subject, case) / subject.machine.flops_per_second
    for row in rows:
        roof = estimate(
            subject.machine, subject.shape, subject.weights, row.counts, 0.0, subject.dtype.itemsize
        )
        least += 2 * (roof.prefill + STEPS * roof.decode_per_token)
    return SLOWNESS * least <= WHOLE_SHARE * budget.left


def vision_work(subject: Subject, case: Case) -> float:
    """FLOPs of tower and projector; 0 where they are not known."""
    return compute_vision_flops(subject.loaded, case.inputs)


def row_work(subject: Subject, row: Planned) -> float:
    """FLOPs of tower and projector for what a row leaves them."""
    return compute_vision_flops(subject.loaded, row.case.inputs, trace_of(row))


def measure_layers(
    subject: Subject,
    rows: Sequence[Planned],
    shown: Mapping[int, MadeOf],
    budget: Budget,
    repeats: int,
    on_progress: Progress | None = None,
) -> Measured:
    """Times one or two layers at each count of tokens, and sums over all layers."""
    config = subject.loaded.model.config
    experts = subject.shape.experts
    if experts is not None and len(set(experts.sparse)) > 1:
        raise ModelError(
            f"{subject.loaded.name}: some layers have experts and some an MLP, so a few of them "
            "can't be timed for all",
            "--no-measure counts without timing",
        )
    kinds = len(set(layer_kinds(config)))
    depth = max(probe_row(row, kinds).depth for row in rows)
    short = shallow_config(config, depth)
    own = None if short_fits(subject, short, kinds) else kinds
    loaded = with_weights(subject, short, own)
    structure = find_structure(subject.loaded.model)
    towers = tower_paths(structure.inner, structure.decoder)
    layered = Layered(loaded, config, towers, subject.machine, budget)
    with fitting_errors(loaded, rows[-1].wanted.preset, Trace()):
        learn_pace(subject, layered, rows, shown)
        sources, scaled = smaller_cases(subject, layered, rows, shown)
        passes = run_passes(layered, list(sources.values()), repeats, on_progress)
    times = {
        row.key: layered.sum_up(row, sources[id(row)], lambda one: row_work(subject, one))
        for row in rows
        if sources[id(row)].key not in layered.errors
    }
    errors = {row.key: layered.errors[sources[id(row)].key] for row in rows if row.key not in times}
    notes = list(explain(layered, scaled))
    return Measured("layers", times, passes, budget.seconds - budget.left, notes, scaled, errors)


def short_fits(subject: Subject, short: PreTrainedConfig, own: int) -> bool:
    """Whether the layers of a short model fit in memory with weights of their own.

    Args:
        own: layers that have to.

    Raises:
        ModelError: not even those do.
    """
    depth = int(short.get_text_config().num_hidden_layers)
    all_own = subject.dtype.itemsize * count_weights(build_skeleton(short))
    least = all_own - max(depth - own, 0) * subject.weights.layer
    room = ROOM * subject.machine.free_bytes
    if least > room:
        raise ModelError(
            f"{subject.loaded.name}: not even a few of its layers fit in memory: "
            f"{least / 1e9:.1f} GB of {room / 1e9:.1f}",
            "--no-measure counts without timing; or try --dtype bfloat16",
        )
    return all_own <= room


def learn_pace(
    subject: Subject,
    layered: Layered,
    rows: Sequence[Planned],
    shown: Mapping[int, MadeOf],
) -> None:
    """Times a small input first, where the real ones are large: how slow is tower, and layer?"""
    case = max((row.case for row in rows), key=lambda one: expect_case(subject, layered, one))
    expected = expect_case(subject, layered, case)
    if expected < FIRST_SHARE * layered.budget.seconds:
        return
    share = FIRST_SHARE * layered.budget.seconds / expected
    small = make_smaller(subject, case, shown[id(case)], max(share, 1e-4))
    row = plan_row(subject.loaded, small, rows[0].wanted)
    layered.start_pass()
    spent = layered.encode(row, most=1)
    promised = tower_share(subject) * vision_work(subject, small)
    promised /= subject.machine.flops_per_second
    layered.tower_slowness = max(spent / max(promised, 1e-9), 1.0)
    layered.run(probe_row(row, layered.num_kinds))
    layered.forget()


def smaller_cases(
    subject: Subject,
    layered: Layered,
    rows: Sequence[Planned],
    shown: Mapping[int, MadeOf],
) -> tuple[dict[int, Planned], str]:
    """The rows to time in place of others: of a smaller input, where theirs takes too long.

    Returns:
        By the identity of each row; and the size of the smaller input, empty where there is none.
    """
    first = {id(row.case): row.case for row in rows}
    room = LARGEST_SHARE * layered.budget.left / len(first)
    share, cases = 1.0, dict(first)
    while share > 1e-3 and max(len(case.layout) for case in cases.values()) > 64:
        slowest = max(expect_case(subject, layered, case) for case in cases.values())
        if slowest <= room:
            break
        share *= max(0.1, min(0.7, room / slowest))
        cases = {key: make_smaller(subject, case, shown[key], share) for key, case in first.items()}
    if share == 1.0:
        return {id(row): row for row in rows}, ""
    found: dict[int, Planned] = {}
    for row in rows:
        planned = plan_row(subject.loaded, cases[id(row.case)], row.wanted)
        found[id(row)] = found[id(rows[0])] if planned.error else planned
    source = cases[id(rows[0].case)].gathered.items[0].source
    told = f"{source.width} x {source.height}"
    if source.kind == "video":
        told = f"{source.num_frames} frames of {told}"
    return found, told


def make_smaller(subject: Subject, case: Case, made_of: MadeOf, share: float) -> Case:
    """A case of about that share of the pixels."""
    shown, sampling, preset = made_of
    frames = sum(len(item.index) for item in case.gathered.items if item.timestamps)
    shown = replace(shown, paths=(), frames=frames or 1)
    return make_case(subject.loaded, shown.smaller(share), sampling, case.text, preset)


def expect_case(subject: Subject, layered: Layered, case: Case) -> float:
    """Seconds that the short tower and one layer with all tokens will probably take."""
    tokens = case.text + len(case.layout)
    layer = layered.slowness * 2 * cost.layer_flops(subject.shape, tokens, tokens)
    tower = layered.tower_slowness * tower_share(subject) * vision_work(subject, case)
    return (tower + layer) / subject.machine.flops_per_second


def tower_share(subject: Subject) -> float:
    """Of the tower's work, what a short one does."""
    kinds = tower_kinds(subject.loaded.model.config)
    return min(1.0, 2 / max(len(kinds), 1))


def explain(layered: Layered, scaled: str) -> Sequence[str]:
    """What was not timed as it is."""
    notes: list[str] = []
    if scaled:
        notes.append(
            f"too slow to time here: seconds are those of an input of {scaled}, scaled by FLOPs"
        )
    missing = {tokens for _, tokens in layered.prefill.scaled}
    if missing and not scaled:
        notes.append(
            f"layers at {len(missing)} token counts were not timed but scaled from others; "
            "a larger --seconds times them"
        )
    if layered.unchosen:
        names = ", ".join(dict.fromkeys(name_of(row) for row in layered.unchosen))
        notes.append(
            f"choosing was not timed for {names}: it counts as in another row; a larger --seconds "
            "times it"
        )
    return notes
