"""The rows of a profile: the variants that were asked for, and what each keeps of an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from vtprune.engine.pixel_selection import select_pixels
from vtprune.engine.plan import PruningPlan, StageGroup
from vtprune.engine.trace import Trace
from vtprune.errors import PresetError, VtpruneError
from vtprune.evaluation.variants import (
    UNPRUNED,
    Variant,
    method_variant,
    split_options,
    unpruned_variant,
)
from vtprune.models.structure import find_structure
from vtprune.preset import DEFAULT, Preset, StageSpec, load_preset, override, preset_names
from vtprune.preset.spec import PIXELS
from vtprune.pruners import METHODS, find_method
from vtprune.tokens.layout import MODALITIES
from vtprune.tokens.schedule import Schedule, count_by_layer

if TYPE_CHECKING:
    from vtprune.evaluation.profiling.prompts import ProfiledPrompt
    from vtprune.models.loading import Loaded

KEEPS = (1.0, 0.5, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class PlannedCut:
    """One cut of a row.

    Args:
        stage: as the preset has it.
        modality: whose tokens it cuts.
        layer: the first layer that sees fewer.
        before, after: tokens of the modality.
        total: of the modality, in the prompt.
        downsamples: it made the media smaller, before there was a prompt.
    """

    stage: StageSpec
    modality: str
    layer: int
    before: int
    after: int
    total: int
    downsamples: bool = False


@dataclass(frozen=True, eq=False)
class PlannedRow:
    """One row as it would be cut.

    Args:
        variant: how it prunes.
        prompt: the input that it is about.
        cuts: in order of their layers.
        visual: visual tokens that each of the decoder's layers sees.
        error: why it can't be cut like that; empty where it can.
        encoded: modality -> rows that the vision tower gets of each item, where not all.
    """

    variant: Variant
    prompt: ProfiledPrompt
    cuts: tuple[PlannedCut, ...] = ()
    visual: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    error: str = ""
    encoded: Mapping[str, list[int]] | None = None

    @property
    def model_cuts(self) -> tuple[PlannedCut, ...]:
        """The cuts inside the model's run."""
        return tuple(cut for cut in self.cuts if not cut.downsamples)

    @property
    def counts(self) -> tuple[int, ...]:
        """All tokens that each layer sees."""
        return tuple(self.trace.tokens_by_layer())

    @property
    def trace(self) -> Trace:
        """The trace of such a run, as far as its costs go."""
        return Trace(
            layouts=[self.prompt.layout],
            text=[self.prompt.text],
            visual_by_layer=[list(self.visual)],
            encoded=[dict(self.encoded)] if self.encoded else [],
            full_size=[self.prompt.inputs.full_size] if self.prompt.inputs.full_size else [],
        )

    @property
    def keep(self) -> float | None:
        """The layer average asked for: of a preset, what it says of the prompt's media."""
        if not is_preset(self.variant) or self.variant.role == UNPRUNED:
            return self.variant.keep
        layout, preset = self.prompt.layout, self.variant.preset
        keeps = {preset.keep_for(name) for name in MODALITIES if len(layout.of_modality(name))}
        return keeps.pop() if len(keeps) == 1 else None

    @property
    def key(self) -> tuple[object, ...]:
        """A key that is equal for rows that are cut alike."""
        every = len(self.prompt.layout)
        cuts = tuple(
            replace(
                cut,
                stage=replace(cut.stage, at=PIXELS * (cut.stage.at == PIXELS), keep=None),
                modality="all" if cut.total == every else cut.modality,
            )
            for cut in self.cuts
        )
        return (self.prompt, cuts)

    @property
    def name(self) -> str:
        """What the row is called in a sentence."""
        if is_preset(self.variant):
            return f"preset {self.variant.name}"
        keep = f"keep {self.variant.keep:g}"
        has_method = self.variant.role != UNPRUNED and self.variant.method
        return f"{self.variant.name} at {keep}" if has_method else keep


def is_preset(variant: Variant) -> bool:
    """Whether it is a preset at its own keep, and not one of the keeps that were asked for."""
    return not variant.method and variant.stages_of is None


def profile_variants(
    keeps: Sequence[float] = KEEPS,
    presets: Sequence[str | Preset] | None = None,
    methods: Sequence[str] = (),
    at: str | None = None,
    options: Mapping[str, str] | None = None,
    base: str | None = None,
    seed: int | None = None,
) -> list[Variant]:
    """List the variants of a profile: the keeps first, the largest before; then the presets.

    Args:
        keeps: fractions in (0, 1]; 1 is always among them.
        presets: names or files; None: all packaged ones.
        methods: that cut at every keep, each in rows of its own; none: the stages of the first
            preset that takes a keep.
        at: where all methods cut; None: each at its own place.
        options: of every method that has such an option; without methods, of those stages.
        base: the preset that is tried before "balanced" for its stages, where `presets` names none.
        seed: of all random choices; None: the presets' own, else 0.

    Raises:
        PresetError: an unknown name, or a value out of range.
    """
    named = [load_preset(name) for name in (preset_names() if presets is None else presets)]
    tried = ([base] if base else []) if presets is None else named
    first = first_with_free_stage([*map(load_preset, tried), load_preset(DEFAULT)])
    for name in methods:
        find_method(name)
    given = split_options(methods, options or {}) if methods else {}
    variants = [unpruned_variant(seed or 0)]
    for keep in sorted({*keeps} - {1.0}, reverse=True):
        for name in methods:
            variant = method_variant("asked", name, keep, at, given[name], seed)
            if variant.error:
                raise variant.error
            variants.append(variant)
        if not methods:
            preset = override(first, keep, at=at, options=options, seed=seed)
            stated = tuple((options or {}).items())
            variants.append(Variant("asked", "", preset, keep, options=stated,
                                    stages_of=first.name))  # fmt: skip
    named = [override(preset, seed=seed) for preset in named]
    return [*variants, *(Variant("asked", "", preset, preset.keep) for preset in named)]


def first_with_free_stage(presets: Sequence[Preset]) -> Preset:
    """Return the first preset whose stages leave a keep to be set."""
    for preset in presets:
        try:
            override(preset, 0.5)
        except PresetError:
            continue
        return preset
    raise AssertionError("the default preset takes a keep")


def plan_row(loaded: Loaded, prompt: ProfiledPrompt, variant: Variant) -> PlannedRow:
    """Return what a variant keeps of an input, by the same rules as pruning itself.

    Args:
        loaded: its model may be without weights.
    """
    trace = Trace()
    structure = find_structure(loaded.model)
    num_layers, total = len(structure.layers), len(prompt.layout)
    if variant.role == UNPRUNED:
        return PlannedRow(variant, prompt, visual=(total,) * num_layers)
    try:
        plan = PruningPlan(variant.preset, structure, loaded.calibration, trace)
        groups = plan.groups_for([prompt.layout])
        selection = None
        if any(group.at_pixels is not None for group in groups):
            selection = select_pixels(plan, [prompt.layout], [prompt.inputs.units])
        dropped = selection.dropped if selection else [torch.zeros(0, dtype=torch.long)]
        full_size = [prompt.inputs.full_size] if prompt.inputs.full_size else []
        presets = plan.fit(groups, [prompt.layout], [prompt.text], trace)
        cuts = []
        for group in groups:
            (schedule,) = plan.solve(group, [prompt.layout], dropped, full_size, presets)
            cuts += planned_cuts(group, schedule, prompt)
    except VtpruneError as error:
        return PlannedRow(variant, prompt, error=error.message)
    cuts.sort(key=lambda cut: cut.layer)
    drops = [(cut.layer, cut.before - cut.after) for cut in cuts if not cut.downsamples]
    visual = tuple(count_by_layer(total, num_layers, drops))
    encoded = selection.encoded()[0] if selection else None
    return PlannedRow(variant, prompt, tuple(cuts), visual, tuple(trace.warnings), encoded=encoded)


def planned_cuts(group: StageGroup, schedule: Schedule, prompt: ProfiledPrompt) -> list[PlannedCut]:
    """Return the cuts of one budget, and before them what made the media smaller."""
    modality = group.modality
    total = left = len(prompt.layout.of_modality(modality))
    cuts = []
    if prompt.inputs.full_size and group.stages and METHODS[group.stages[0].spec.method].media:
        full = prompt.inputs.full_size.total(modality)
        cuts.append(
            PlannedCut(group.stages[0].spec, modality, 0, full, total, full, downsamples=True)
        )
    for cut in schedule.cuts:
        stage = group.stages[cut.stage].spec
        cuts.append(PlannedCut(stage, modality, cut.layer, left, cut.count, total))
        left = cut.count
    return cuts


def as_cut(row: PlannedRow, visual: Sequence[int]) -> PlannedRow:
    """Return a row with the counts that were really left: some methods keep fewer than they may.

    Args:
        visual: visual tokens that every layer saw.
    """
    if tuple(visual) == row.visual:
        return row
    cuts, left = [], len(row.prompt.layout)
    for cut in row.cuts:
        if not cut.downsamples:
            cut = replace(cut, before=left, after=visual[cut.layer])
            left = cut.after
        cuts.append(cut)
    return replace(row, cuts=tuple(cuts), visual=tuple(visual))
