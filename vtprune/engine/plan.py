"""A preset, resolved for one model: its budgets, its stages' layers, its methods."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vtprune.engine.trace import Trace
from vtprune.errors import ModelError, PresetError
from vtprune.models.structure import Structure
from vtprune.preset import Preset, StageSpec
from vtprune.preset.calibration import Calibration, find_calibration
from vtprune.preset.spec import PIXELS
from vtprune.pruners import METHODS, create, create_units, find_profile
from vtprune.pruners.base import TOWER, Pruner, UnitPruner
from vtprune.tokens.layout import MODALITIES, Layout
from vtprune.tokens.schedule import Place, Schedule, fixed_count, resolve_layer
from vtprune.tokens.solver import solve
from vtprune.tokens.units import FullSizeCounts


@dataclass(frozen=True, eq=False)
class Group:
    """One budget: the stages of one modality, or of both where they share them."""

    modality: str
    stages: tuple[StageSpec, ...]
    keep: float | None
    places: tuple[Place, ...]
    pruners: tuple[Pruner, ...]
    at_pixels: UnitPruner | None = None
    """The method of the first stage, where that acts before the vision tower."""

    @property
    def before_tower(self) -> bool:
        """Whether the first stage acts before the vision tower."""
        return bool(self.stages) and self.stages[0].at == PIXELS

    def most_at_pixels(self, num_tokens: int) -> int | None:
        """The most tokens that may be left before the vision tower; None where nothing says."""
        keep = self.stages[0].keep
        if keep is None and len(self.stages) == 1:
            keep = self.keep
        return None if keep is None else fixed_count(keep, num_tokens)


class Plan:
    """A preset, resolved for one model."""

    def __init__(
        self, preset: Preset, structure: Structure, calibration: Calibration | None, trace: Trace
    ) -> None:
        self.preset = preset
        self.structure = structure
        self.calibration = calibration
        self.trace = trace
        self.groups: dict[str, Group] = {}
        for warning in structure.warnings:
            trace.warn(warning)
        if preset.shares_one_budget():
            self.group("all")  # so that its faults show before anything runs

    @property
    def num_layers(self) -> int:
        return len(self.structure.layers)

    @functools.cached_property
    def reads_tower(self) -> bool:
        """Whether a method of any stage reads what the vision tower attends to."""
        preset = self.preset
        whole = [(keep := preset.keep_for(one)) is not None and keep >= 1 for one in MODALITIES]
        stages = (preset.stages, preset.image.stages, preset.video.stages)
        return not all(whole) and any(
            set(create(stage.method, dict(stage.options)).needs) & set(TOWER)
            for own in stages
            for stage in own or ()
            if stage.at != PIXELS
        )

    def group(self, modality: str) -> Group:
        """The budget of a modality, with the layers of its stages in this model."""
        if modality not in self.groups:
            of = "image" if modality == "all" else modality
            keep = self.preset.keep_for(of)
            whole = keep is not None and keep >= 1
            stages = () if whole else self.preset.stages_for(of)
            for stage in stages:
                if stage.keep is None and keep is None and stage.at != PIXELS:
                    raise PresetError(
                        f"{self.preset.label}: the stage at {stage.at} ({stage.method}) has "
                        "no keep, and no keep was given",
                        "give --keep 0.3, keep: 0.3 in the preset, or a keep to the stage",
                    )
            stages, places = self.places(stages)
            pruners = tuple(create(stage.method, dict(stage.options)) for stage in stages)
            at_pixels = None
            if stages and METHODS[stages[0].method].units:
                at_pixels = create_units(stages[0].method, dict(stages[0].options))
            self.groups[modality] = Group(modality, stages, keep, places, pruners, at_pixels)
        return self.groups[modality]

    def places(
        self, stages: tuple[StageSpec, ...]
    ) -> tuple[tuple[StageSpec, ...], tuple[Place, ...]]:
        """The stages, a stage with a schedule of its own as many, and their layers.

        Warns where `ecl` or `horizon` is a guess.
        """
        calibration = self.calibration
        if calibration is None:
            calibration, warnings = find_calibration(
                self.structure.model_type, self.num_layers, self.structure.hidden_size
            )
            if any(stage.at in ("ecl", "horizon") for stage in stages):
                for warning in warnings:
                    self.trace.warn(warning)
        cuts: list[tuple[StageSpec, Place]] = []
        for stage in stages:
            self.check(stage)
            method = METHODS[stage.method]
            if stage.at == "schedule":
                profile = find_profile(stage.method)
                layers = profile.layers(self.num_layers, method.lowest)
                cuts += [
                    (stage, Place(stage.at, layer, profile=profile, part=part))
                    for part, layer in enumerate(layers)
                ]
                continue
            layer = resolve_layer(stage.at, self.num_layers, calibration.ecl, calibration.horizon)
            if layer < method.lowest:
                raise PresetError(
                    f"{stage.method} reads the attention of the layer before its cut, and there is "
                    f"none before layer {layer} (at: {stage.at})",
                    f"at: {method.lowest} or later",
                )
            place = Place(stage.at, layer, stage.keep, method.drops_all, method.lowest)
            cuts.append((stage, place))
        return tuple(stage for stage, _ in cuts), tuple(place for _, place in cuts)

    def check(self, stage: StageSpec) -> None:
        """Refuses a stage that this model can't run."""
        if stage.positions == "renumber" and not self.structure.one_dimensional:
            raise ModelError(
                f"positions: renumber: a position of {self.structure.model_type} is a time, a row "
                "and a column (mrope), which have no gaps to close",
                "leave positions: keep",
            )

    def groups_for(self, layouts: list[Layout]) -> list[Group]:
        """The budgets that a batch needs.

        Raises:
            PresetError: a method that can't cut what is there.
        """
        present = [m for m in MODALITIES if any(len(one.of_modality(m)) for one in layouts)]
        groups = [
            self.group(name) for name in (["all"] if self.preset.shares_one_budget() else present)
        ]
        for group in groups:
            found = present if group.modality == "all" else [group.modality]
            for stage in group.stages:
                takes = METHODS[stage.method].modalities
                if other := [name for name in found if name not in takes]:
                    raise PresetError(
                        f"{stage.method} cuts {' and '.join(takes)} tokens, and these are of "
                        f"{' and '.join(other)} input",
                        f"choose another method for {other[0]}: vtprune methods",
                    )
        return groups

    def solve(
        self,
        group: Group,
        layouts: list[Layout],
        gone: Sequence[torch.Tensor],
        whole: Sequence[FullSizeCounts],
    ) -> list[Schedule]:
        """Every sample's cuts under one budget.

        Args:
            gone: for every sample the columns of the tokens that went at `pixels`.
            whole: what every sample would hold if its media had not been made smaller; empty where
                they were not.
        """
        solved = []
        first = int(group.before_tower)
        for sample, (layout, columns) in enumerate(zip(layouts, gone, strict=True)):
            own = layout.columns[layout.of_modality(group.modality)]
            present = len(own) - int(torch.isin(own, columns).sum())
            size = whole[sample].total(group.modality) if whole else len(own)
            places = group.places[first:]
            schedule = solve(places, group.keep, self.num_layers, size, present)
            for warning in schedule.warnings:
                self.trace.warn(warning)
            cut = None if group.at_pixels is None else present
            solved.append(schedule.after_pixels(cut) if first else schedule)
        return solved
