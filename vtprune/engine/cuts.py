"""The cuts of one batch, layer by layer, and what the methods that make them read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vtprune.engine.plan import Group, Plan
from vtprune.engine.trace import Trace
from vtprune.preset import StageSpec
from vtprune.preset.spec import PIXELS
from vtprune.pruners.base import ATTENTION, TOWER
from vtprune.tokens.layout import Layout
from vtprune.tokens.schedule import Cut, Schedule
from vtprune.tokens.units import FullSizeCounts


@dataclass(frozen=True, eq=False)
class Step:
    """One stage at one layer.

    Args:
        group: the budget that it is of.
        number: of the stage in it.
        cuts: for every sample its cut; None where it is not cut here.
    """

    group: Group
    number: int
    cuts: tuple[Cut | None, ...]

    @property
    def stage(self) -> StageSpec:
        """What the preset says."""
        return self.group.stages[self.number]

    @property
    def needs(self) -> set[str]:
        """Names of the states that its method reads."""
        if self.stage.at == PIXELS:
            return set()
        return set(self.group.pruners[self.number].needs)


@dataclass(frozen=True, eq=False)
class Cuts:
    """The cuts of a batch.

    Args:
        groups: the budgets.
        schedules: for every group the cuts of every sample.
    """

    groups: Sequence[Group]
    schedules: Sequence[Sequence[Schedule]]

    @functools.cached_property
    def by_layer(self) -> dict[int, list[Step]]:
        """The steps of every layer that has any, in order."""
        found = {
            cut.layer for solved in self.schedules for schedule in solved for cut in schedule.cuts
        }
        return {layer: self._at(layer) for layer in sorted(found)}

    def _at(self, layer: int) -> list[Step]:
        steps = []
        for group, solved in zip(self.groups, self.schedules, strict=True):
            for number in range(len(group.stages)):
                cuts = tuple(
                    next((c for c in one.cuts if c.stage == number and c.layer == layer), None)
                    for one in solved
                )
                if any(cuts):
                    steps.append(Step(group, number, cuts))
        return steps

    @property
    def renumbers(self) -> bool:
        """Whether any stage gives positions without gaps."""
        return any(s.positions == "renumber" for group in self.groups for s in group.stages)

    @property
    def layers(self) -> list[int]:
        """Where it is cut, ascending; 0 is the input."""
        return list(self.by_layer)

    def needs(self, layer: int) -> set[str]:
        """Names of the states that the methods cutting at `layer` read."""
        return {name for step in self.by_layer[layer] for name in step.needs}

    def projections(self, layer: int) -> list[str]:
        """Which of a layer's projections the methods cutting at `layer` read."""
        needs = {name.removeprefix("text_") for name in self.needs(layer)}
        return sorted(needs & {"query", "key", "value"})

    def reads_attention(self, layer: int) -> bool:
        """Whether a method cutting at `layer` reads the attention of the layer before."""
        return bool(self.needs(layer) & set(ATTENTION))

    @property
    def reads_tower(self) -> bool:
        """Whether a method reads what the vision tower attended to."""
        return any(self.needs(layer) & set(TOWER) for layer in self.layers)


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts with visual tokens, as they came.

    Args:
        layouts: of every sample.
        valid: (B, S) bool on the CPU: which columns hold a token, text or visual.
        past: columns that the cache holds already.
        gone: for every sample the columns of visual tokens that went before the vision tower.
        cuts: that are to be made.
        trace: what is known of the prefill, which its end completes.
    """

    layouts: list[Layout]
    valid: torch.Tensor
    past: int
    gone: list[torch.Tensor]
    cuts: Cuts
    trace: Trace


def plan_cuts(
    plan: Plan,
    layouts: list[Layout],
    valid: torch.Tensor,
    past: int,
    gone: list[torch.Tensor] | None = None,
    whole: Sequence[FullSizeCounts] = (),
) -> Batch:
    """Plan a batch's cuts from every sample's own number of tokens, and begin its trace.

    Args:
        layouts, valid, past: as of Batch.
        gone: as of Batch; None: nothing went.
        whole: what every sample would hold if its media had not been made smaller; empty where
            they were not.
    """
    groups = plan.groups_for(layouts)
    if gone is None:
        gone = [torch.zeros(0, dtype=torch.long)] * len(layouts)
    schedules = [plan.solve(group, layouts, gone, whole) for group in groups]
    tokens = valid.sum(1).tolist()
    text = [size - len(one) for size, one in zip(tokens, layouts, strict=True)]
    trace = Trace(layouts=layouts, text=text, whole=list(whole))
    plan.trace.begun = trace
    return Batch(layouts, valid, past, gone, Cuts(groups, schedules), trace)
