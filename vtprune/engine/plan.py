"""What is cut where: a preset resolved for one model, and then for one batch of prompts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch

from vtprune.engine.fitting import ANSWER_TOKENS, PromptSize, fit_tokens
from vtprune.engine.late_checks import LateChecks
from vtprune.engine.trace import Trace
from vtprune.errors import ModelError, PresetError
from vtprune.models.seams import takes_over_choice
from vtprune.models.structure import Structure
from vtprune.preset import Preset, StageSpec
from vtprune.preset.calibration import Calibration, find_calibration
from vtprune.preset.spec import PIXELS, DecodeSpec
from vtprune.pruners import METHODS, create, create_patches, create_units, find_profile
from vtprune.pruners.base import (
    ATTENTION,
    PROJECTED,
    ROTARY,
    TOWER,
    PatchPruner,
    Pruner,
    UnitPruner,
)
from vtprune.tokens.layout import MODALITIES, Layout
from vtprune.tokens.schedule import Cut, Place, Schedule, resolve_layer
from vtprune.tokens.solver import solve
from vtprune.tokens.units import FullSizeCounts


@dataclass(frozen=True, eq=False)
class PlacedStage:
    """A stage of a preset, at its layer in one model.

    Args:
        spec: the stage as the preset has it; one with a schedule of its own is several of these.
        place: where it cuts.
        pruner: its method, with its options.
    """

    spec: StageSpec
    place: Place
    pruner: Pruner


@dataclass(frozen=True, eq=False)
class StageGroup:
    """One budget: the stages of one modality, or of both where they share them.

    Args:
        at_pixels: the method of the first stage, where that acts before the vision tower.
    """

    modality: str
    stages: tuple[PlacedStage, ...]
    at_pixels: UnitPruner | PatchPruner | None = None

    @property
    def before_tower(self) -> bool:
        """Whether the first stage acts before the vision tower."""
        return bool(self.stages) and self.stages[0].spec.at == PIXELS


class PruningPlan:
    """A preset, resolved for one model: its budgets, its stages' layers, its methods.

    Args:
        answer_tokens: that a budget which has to fit leaves room for; None: `ANSWER_TOKENS`.
    """

    def __init__(
        self,
        preset: Preset,
        structure: Structure,
        calibration: Calibration | None,
        trace: Trace,
        answer_tokens: int | None = None,
    ) -> None:
        self.preset = preset
        self.structure = structure
        self.calibration = calibration
        self.trace = trace
        self.late = LateChecks()
        self.answer_tokens = ANSWER_TOKENS if answer_tokens is None else answer_tokens
        self.groups: dict[str, StageGroup] = {}
        if preset.shares_one_budget():
            self.group("all")  # so that its faults show before anything runs

    @property
    def num_layers(self) -> int:
        return len(self.structure.layers)

    @property
    def decode(self) -> DecodeSpec | None:
        """The cuts of the KV cache while an answer is decoded; None: none, as at keep 1."""
        decode = self.preset.decode
        if decode is None or decode.keep == 1 or self.preset.keeps_all():
            return None
        return decode

    @functools.cached_property
    def tower_names(self) -> tuple[str, ...]:
        """The readings of the vision tower's attention that methods of any stage need."""
        preset = self.preset
        lists = (preset.stages, preset.image.stages, preset.video.stages)
        needs = {
            name
            for stages in lists
            for stage in stages or ()
            if stage.at != PIXELS and not preset.keeps_all()
            for pruner in pruners(stage)
            for name in pruner.needs
        }
        return tuple(name for name in TOWER if name in needs)

    @property
    def reads_tower(self) -> bool:
        """Whether a method of any stage reads what the vision tower attends to."""
        return bool(self.tower_names)

    def group(self, modality: str) -> StageGroup:
        """Return the budget of a modality, with the layers of its stages in this model."""
        if modality not in self.groups:
            name = image_or_video(modality)
            keep = self.preset.keep_for(name)
            specs = self.preset.stages_for(name) if keep is None or keep < 1 else ()
            for stage in specs:
                asked = keep is not None or self.preset.has_budget
                if stage.keep is None and not asked and stage.at != PIXELS:
                    raise PresetError(
                        f"{self.preset.label}: the stage at {stage.at} ({stage.method}) has "
                        "no keep, and no keep was given",
                        "give --keep 0.3, keep: 0.3 in the preset, or a keep to the stage",
                    )
            if self.preset.fit is not None:
                specs = self.fitting_stages(specs)
            stages = tuple(
                PlacedStage(spec, place, pruners(spec)[place.part])
                for spec, place in self.places(specs)
            )
            at_pixels: UnitPruner | PatchPruner | None = None
            if stages and METHODS[stages[0].spec.method].units:
                method, options = stages[0].spec.method, dict(stages[0].spec.options)
                patches = METHODS[method].patches
                at_pixels = (create_patches if patches else create_units)(method, options)
            self.groups[modality] = StageGroup(modality, stages, at_pixels)
        return self.groups[modality]

    def fitting_stages(self, specs: tuple[StageSpec, ...]) -> tuple[StageSpec, ...]:
        """Return stages that number positions anew where the tokens have to fit the context."""
        structure = self.structure
        renumbers = structure.one_dimensional and not structure.distance_layers
        if self.preset.fit != "context" or not renumbers:
            return specs
        return tuple(
            spec if spec.at == PIXELS else replace(spec, positions="renumber") for spec in specs
        )

    def fit(
        self,
        groups: Sequence[StageGroup],
        layouts: Sequence[Layout],
        text: Sequence[int],
        trace: Trace,
    ) -> list[Preset]:
        """Return every sample's preset, its budget what fits; note in the trace how much that is.

        Raises:
            ModelError, PresetError: nothing fits.
        """
        if self.preset.fit is None:
            return [self.preset] * len(layouts)
        budgets = [[stage.place for stage in group.stages] for group in groups]
        trace.fitting = [
            fit_tokens(
                self.preset.fit,
                self.structure,
                budgets,
                PromptSize(size, len(layout), self.answer_tokens, len(layouts)),
            )
            for layout, size in zip(layouts, text, strict=True)
        ]
        return [self.preset.with_fitting(fitting.tokens) for fitting in trace.fitting]

    def keep_at_pixels(self, group: StageGroup, visual: int) -> float | None:
        """Return the fraction that may be left before the vision tower; None: as many as are.

        Args:
            visual: visual tokens of the prompt, of all modalities.
        """
        keep = group.stages[0].spec.keep
        if keep is None and len(group.stages) == 1:
            return self.preset.keep_before_tower(image_or_video(group.modality), visual)
        return keep

    def places(self, stages: tuple[StageSpec, ...]) -> list[tuple[StageSpec, Place]]:
        """Return the stages with their places; one with a schedule of its own has several.

        It warns where `ecl` or `horizon` is a guess.
        """
        calibration = self.calibration
        if calibration is None:
            calibration, warnings = find_calibration(
                self.structure.model_type, self.num_layers, self.structure.hidden_size,
                {str(stage.at) for stage in stages},
            )  # fmt: skip
            for warning in warnings:
                self.trace.warn(warning)
        cuts: list[tuple[StageSpec, Place]] = []
        for stage in stages:
            self.check(stage)
            method = METHODS[stage.method]
            if stage.at == "schedule":
                profile = find_profile(stage.method)
                layers = self.possible_layers(stage, profile.layers(self.num_layers, method.lowest))
                cuts += [
                    (stage, Place(stage.at, layer, profile=profile, part=part))
                    for part, layer in enumerate(layers)
                ]
                continue
            layer = resolve_layer(stage.at, self.num_layers, calibration.ecl, calibration.horizon)
            if layer < method.lowest:
                raise PresetError(
                    f"{stage.method} reads what the layer before its cut does, and there is none "
                    f"before layer {layer} (at: {stage.at})",
                    f"at: {method.lowest} or later",
                )
            if layer < self.num_layers:
                layer = self.possible_layers(stage, [layer])[0]
            place = Place(
                stage.at,
                layer,
                stage.keep,
                method.drops_all,
                method.lowest,
                self.layers_to_cut(stage),
            )
            cuts.append((stage, place))
        return cuts

    def layers_to_read(self, stage: StageSpec, part: int = 0) -> tuple[int, ...] | None:
        """Return the layers that a stage can cut at, for what its method reads; None: all.

        It reads queries, keys, values or attention of the layer before; some decoders have layers
        without (linear attention, convolutions, experts alone).

        Args:
            part: the number of the cut, in a schedule of the method's own.
        """
        memories = self.structure.memories
        if all(memory.keys for memory in memories) or stage.at == PIXELS:
            return None
        needs = {name.removeprefix("text_") for name in pruners(stage)[part].needs}
        attends = bool(needs & {"attention", "attention_by_head"})
        if not attends and not needs & {*PROJECTED}:
            return None
        layers = [layer + 1 for layer, memory in enumerate(memories[:-1]) if memory.keys]
        # At the input a method reads what layer 0 would project.
        if memories[0].keys and not attends:
            layers.insert(0, 0)
        return tuple(layers)

    def layers_to_cut(self, stage: StageSpec, part: int = 0) -> tuple[int, ...] | None:
        """Return the layers that a stage can cut at; None: all.

        Args:
            part: as of `layers_to_read`.
        """
        layers, possible = self.layers_to_read(stage, part), self.structure.cut_layers
        if len(possible) == self.num_layers:
            return layers
        return tuple(layer for layer in possible if layers is None or layer in layers)

    def possible_layers(self, stage: StageSpec, layers: Sequence[int]) -> list[int]:
        """Return where a stage cuts that is to cut at some layers: where it can.

        Named and relative places move to the next such layer, with a warning.

        Raises:
            PresetError: a layer by its number, or the input, where it can't cut.
        """
        possible = [self.layers_to_cut(stage, part) for part in range(len(layers))]
        if all(part is None for part in possible):
            return list(layers)
        choices = [range(self.num_layers) if part is None else part for part in possible]
        last, end = [0] * len(layers), self.num_layers
        for number in reversed(range(len(layers))):  # a later cut needs a layer of its own
            end = max((layer for layer in choices[number] if layer < end), default=-1)
            last[number] = end
        if end < 0:
            raise PresetError(
                f"{stage.method} cuts {len(layers)} times (at: {stage.at}) where the layer before "
                f"has attention to read, and {self.structure.model_type} has "
                f"{min(map(len, choices))} such layers",
                "name one place: --at ecl, or use a method that reads hidden states alone, such as "
                "divprune",
            )
        moved: list[int] = []
        for number, layer in enumerate(layers):
            first = moved[-1] + 1 if moved else 0
            allowed = [other for other in choices[number] if first <= other <= last[number]]
            nearest = next((other for other in allowed if other >= layer), allowed[-1])
            if nearest != layer:
                if stage.at == "input" or stage.at.isdigit():
                    self.refuse_layer(stage, layer, nearest)
                self.trace.warn(
                    f"{self.why_not(stage, layer, 'this model')}: the cut at {stage.at} moved from "
                    f"layer {layer} to {nearest}"
                )
            moved.append(nearest)
        return moved

    def why_not(self, stage: StageSpec, layer: int, model: str) -> str:
        """Return why a stage can't cut at a layer of a model."""
        before = max(layer - 1, 0)
        if takes_over_choice(self.structure.layers[layer]):
            return f"layer {layer} of {model} sees the keys that layer {before} chose"
        if self.structure.cut_layers == (0,):
            return f"layers of {model} have the positions of all tokens that its decoder was given"
        if layer not in self.structure.cut_layers:
            return (
                f"a layer from {layer} on of {model} chooses, by an index of its own, among the "
                "keys of one before"
            )
        return (
            f"{stage.method} reads the attention of the layer before its cut, and layer {before} "
            f"of {model} has none"
        )

    def refuse_layer(self, stage: StageSpec, layer: int, nearest: int) -> NoReturn:
        """Refuse a cut at a layer where a stage can't.

        Args:
            nearest: where it could cut.

        Raises:
            PresetError: with the layers where it can.
        """
        why = f"{self.why_not(stage, layer, self.structure.model_type)} (at: {stage.at})"
        if layer not in self.structure.cut_layers:
            possible = ", ".join(map(str, self.layers_to_cut(stage) or ()))
            raise PresetError(
                f"{why}: {stage.method} can cut before layers {possible}", f"at: {nearest}"
            )
        numbers = [n for n, memory in enumerate(self.structure.memories) if memory.keys]
        raise PresetError(
            f"{why}: the layers with attention are {', '.join(map(str, numbers))}",
            f"at: {nearest}, or a method that reads hidden states alone, such as divprune",
        )

    def check(self, stage: StageSpec) -> None:
        """Refuse a stage that this model can't run."""
        if stage.positions == "renumber" and not self.structure.one_dimensional:
            raise ModelError(
                f"positions: renumber: a position of {self.structure.model_type} is a time, a row "
                "and a column (mrope), which have no gaps to close",
                "leave positions: keep",
            )
        if stage.positions == "renumber" and self.structure.distance_layers:
            raise ModelError(
                f"positions: renumber: {self.structure.model_type} has no position ids: its "
                "attention is biased by distances, which count the columns of the original prompt",
                "leave positions: keep",
            )

    def groups_for(self, layouts: list[Layout]) -> list[StageGroup]:
        """Return the budgets that a batch needs.

        Raises:
            PresetError: a method that can't cut what is there.
        """
        present = [m for m in MODALITIES if any(len(row.of_modality(m)) for row in layouts)]
        groups = [
            self.group(name) for name in (["all"] if self.preset.shares_one_budget() else present)
        ]
        for group in groups:
            modalities = present if group.modality == "all" else [group.modality]
            for stage in group.stages:
                method = stage.spec.method
                takes = METHODS[method].modalities
                if other := [name for name in modalities if name not in takes]:
                    raise PresetError(
                        f"{method} takes {' and '.join(takes)} input only, and this input "
                        f"has {' and '.join(other)} tokens",
                        f"choose another method for {other[0]}: vtprune methods",
                    )
        return groups

    def solve(
        self,
        group: StageGroup,
        layouts: list[Layout],
        dropped: Sequence[torch.Tensor],
        full_size: Sequence[FullSizeCounts],
        presets: Sequence[Preset],
    ) -> list[Schedule]:
        """Return every sample's cuts under one budget.

        Args:
            presets: of every sample, as of `fit`.
            dropped: for every sample the columns of the tokens that a stage at `pixels` dropped.
            full_size: token counts of every sample had its media not been made smaller; empty where
                they were not.
        """
        schedules = []
        first = int(group.before_tower)
        places = [stage.place for stage in group.stages[first:]]
        for sample, (layout, gone) in enumerate(zip(layouts, dropped, strict=True)):
            columns = layout.columns[layout.of_modality(group.modality)]
            present = len(columns) - int(torch.isin(columns, gone).sum())
            size = full_size[sample].total(group.modality) if full_size else len(columns)
            visual = full_size[sample].total("all") if full_size else len(layout)
            keep, after = presets[sample].budget_for(image_or_video(group.modality), visual, size)
            try:
                schedule = solve(places, keep, self.num_layers, size, present, after)
            except PresetError as error:
                budget = presets[sample].budget
                if budget is None:
                    raise
                message = f"a budget of {budget:,} of {visual:,} visual tokens: {error.message}"
                raise PresetError(message, error.hint) from error
            for warning in schedule.warnings:
                self.trace.warn(warning)
            left = None if group.at_pixels is None else present
            schedules.append(schedule.after_pixels(left) if first else schedule)
        return schedules


def pruners(stage: StageSpec) -> list[Pruner]:
    """Return a stage's method, with its options; in a schedule of its own, that of each cut."""
    pruner = create(stage.method, dict(stage.options))
    if stage.at != "schedule":
        return [pruner]
    later = METHODS[stage.method].later
    others = len(find_profile(stage.method).depths) - 1
    return [pruner, *[create(*later) if later else pruner] * others]


def image_or_video(modality: str) -> str:
    """Return the name under which a preset has the keep of a budget."""
    return "image" if modality == "all" else modality


# -- one batch -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LayerStage:
    """One stage at one layer.

    Args:
        group: the budget that it is of.
        stage: one of its stages.
        cuts: for every sample its cut; None where it is not cut here.
    """

    group: StageGroup
    stage: PlacedStage
    cuts: tuple[Cut | None, ...]

    @property
    def spec(self) -> StageSpec:
        """The stage as the preset has it."""
        return self.stage.spec

    @property
    def needs(self) -> set[str]:
        """Names of the states that its method reads."""
        if self.spec.at == PIXELS:
            return set()
        return set(self.stage.pruner.needs)


@dataclass(frozen=True, eq=False)
class PlannedBatch:
    """Prompts with visual tokens as they came, and their cuts.

    Args:
        layouts: of every sample.
        valid: (B, S) bool on the CPU: which columns hold a token, text or visual.
        past: columns that the cache holds already.
        dropped: for every sample the columns of visual tokens that went before the vision tower.
        groups: the budgets.
        schedules: for every group the cuts of every sample.
        trace: what is known of the prefill, which its end completes.
    """

    layouts: list[Layout]
    valid: torch.Tensor
    past: int
    dropped: Sequence[torch.Tensor]
    groups: Sequence[StageGroup]
    schedules: Sequence[Sequence[Schedule]]
    trace: Trace

    @functools.cached_property
    def stages_by_layer(self) -> dict[int, list[LayerStage]]:
        """Layers of stages, ascending, 0 for the input -> the stages in order."""
        layers = {cut.layer for rows in self.schedules for row in rows for cut in row.cuts}
        return {layer: self._stages_at(layer) for layer in sorted(layers)}

    @functools.cached_property
    def by_layer(self) -> dict[int, list[LayerStage]]:
        """Layers where it is cut, ascending, 0 for the input -> their stages in order.

        Those of `stages_by_layer` without the layers whose stages leave all that is there: other
        kernels than the unpruned model's would round otherwise.
        """
        left = {
            group.modality: [len(row.of_modality(group.modality)) for row in self.layouts]
            for group in self.groups
        }
        cut_layers: dict[int, list[LayerStage]] = {}
        for layer, stages in self.stages_by_layer.items():
            cuts = False
            for stage in stages:
                before = left[stage.group.modality]
                after = [
                    most if cut is None else cut.count
                    for most, cut in zip(before, stage.cuts, strict=True)
                ]
                left[stage.group.modality] = after
                cuts |= after != before or (stage.spec.positions == "renumber" and bool(cut_layers))
            if cuts:
                cut_layers[layer] = stages
        return cut_layers

    def _stages_at(self, layer: int) -> list[LayerStage]:
        stages = []
        for group, rows in zip(self.groups, self.schedules, strict=True):
            for number, stage in enumerate(group.stages):
                cuts = tuple(
                    next((c for c in row.cuts if c.stage == number and c.layer == layer), None)
                    for row in rows
                )
                if any(cuts):
                    stages.append(LayerStage(group, stage, cuts))
        return stages

    @property
    def renumbers(self) -> bool:
        """Whether any stage gives positions without gaps."""
        return any(s.spec.positions == "renumber" for group in self.groups for s in group.stages)

    def needs(self, layer: int) -> set[str]:
        """Return the names of the states that the methods cutting at `layer` read."""
        return {name for stage in self.by_layer[layer] for name in stage.needs}

    def projections(self, layer: int) -> list[str]:
        """Return which of a layer's projections the methods cutting at `layer` read."""
        needs = {name.removeprefix("text_") for name in self.needs(layer)}
        return sorted(needs & {*PROJECTED})

    def reads_previous(self, layer: int) -> bool:
        """Return whether a method cutting at `layer` reads the states entering the layer before."""
        return bool(self.needs(layer) & {"previous", "text_previous"})

    def reads_rotary(self, layer: int) -> bool:
        """Return whether a method cutting at `layer` reads the positions of the layer before."""
        return bool(self.needs(layer) & {*ROTARY})

    def reads_attention(self, layer: int) -> bool:
        """Return whether a method cutting at `layer` reads the attention of the layer before."""
        return bool(self.needs(layer) & set(ATTENTION))

    @property
    def reads_tower(self) -> bool:
        """Whether a method reads what the vision tower attended to."""
        return bool(self.tower_names)

    @property
    def tower_names(self) -> list[str]:
        """The readings of the vision tower's attention that the methods of these cuts need."""
        return [name for name in TOWER if any(name in self.needs(n) for n in self.by_layer)]


def plan_batch(
    plan: PruningPlan,
    layouts: list[Layout],
    valid: torch.Tensor,
    past: int,
    dropped: Sequence[torch.Tensor] | None = None,
    full_size: Sequence[FullSizeCounts] = (),
) -> PlannedBatch:
    """Plan a batch's cuts from every sample's own number of tokens, and begin its trace.

    Args:
        layouts, valid, past: as of PlannedBatch.
        dropped: as of PlannedBatch; None: none were.
        full_size: token counts of every sample had its media not been made smaller; empty where
            they were not.
    """
    groups = plan.groups_for(layouts)
    if dropped is None:
        dropped = [torch.zeros(0, dtype=torch.long)] * len(layouts)
    tokens = valid.sum(1).tolist()
    text = [size - len(layout) for size, layout in zip(tokens, layouts, strict=True)]
    trace = Trace(layouts=layouts, text=text, full_size=list(full_size))
    plan.trace.begun = trace
    presets = plan.fit(groups, layouts, text, trace)
    schedules = [plan.solve(group, layouts, dropped, full_size, presets) for group in groups]
    return PlannedBatch(layouts, valid, past, dropped, groups, schedules, trace)
