"""One forward over a prompt with visual tokens: its cuts, and the trace of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from vtprune.engine.attention import Call
from vtprune.engine.caches import check_reached, mark_cache, needs_block
from vtprune.engine.cuts import Batch, Step
from vtprune.engine.hooks import is_hooked
from vtprune.engine.past import find_past
from vtprune.engine.plan import Group, Plan
from vtprune.engine.positions import Positions, first_positions
from vtprune.engine.present import Present
from vtprune.engine.reading import Readings
from vtprune.engine.records import count_by_layer, record, smaller_media
from vtprune.engine.shortening import Shortening
from vtprune.engine.trace import StageRecord
from vtprune.errors import ModelError
from vtprune.preset import StageSpec
from vtprune.preset.spec import PIXELS
from vtprune.pruners import METHODS
from vtprune.pruners.base import Budget, VisualTokens, merge
from vtprune.tokens.information import group_information
from vtprune.tokens.layout import Layout
from vtprune.tokens.schedule import Cut

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

Kwargs = dict[str, object]


class Prefill:
    """One forward over a batch of prompts.

    Args:
        plan: the preset for this model.
        batch: the prompts, and the cuts that are to be made.
        given: the decoder's arguments, before anything of this forward is in its cache.
        started: when it began, in seconds.
    """

    def __init__(self, plan: Plan, batch: Batch, given: Kwargs, started: float) -> None:
        self.plan, self.cuts, self.gone, self.trace = plan, batch.cuts, batch.gone, batch.trace
        self.started, self.select_seconds = started, 0.0
        self.present = Present(batch.layouts, batch.valid)
        self.past = find_past(given, batch.past, plan.num_layers)
        first = None
        if self.cuts.renumbers:
            first = first_positions(given.get("position_ids"), self.present.columns, batch.past)
        self.readings = Readings(plan.structure, self.present, self.past)
        self.shortening = Shortening(plan.structure, self.present, self.past, Positions(first))
        self.use_cache = given.get("use_cache") is True
        self.last = last_positions(given, batch.past)
        self.records: list[StageRecord] = []
        self.done: set[int] = set()

    @property
    def shortens(self) -> bool:
        """Whether any layer gets, or has in its cache, fewer tokens than the decoder is given."""
        return bool(self.cuts.layers) or self.past.shortened

    @property
    def first_changed(self) -> int | None:
        """The first layer past the input whose arguments change; None where none's do."""
        found = [layer for layer in self.cuts.layers if layer > 0][:1]
        if self.past.first_cut is not None:
            found.append(self.past.first_cut)
        return min(found, default=None)

    def take_attention(self, layer: int, call: Call) -> None:
        """Keeps the attention rows that the methods cutting at `layer` read."""
        all_text = "text_attention" in self.cuts.needs(layer)
        self.readings.take_attention(layer - 1, call, all_text)

    # -- cuts ------------------------------------------------------------------------------------

    def cut(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Selects what every sample keeps from `layer` on.

        Args:
            hidden: (B, n, d) states that enter the layer, before this cut.

        Returns:
            The same states; where tokens were merged, a copy with the kept ones' new states.
        """
        entering, steps = hidden, self.cuts.by_layer[layer]
        for step in steps:
            entering = self.take_step(layer, step, hidden, entering)
        self.present.close()
        renumber = any(step.stage.positions == "renumber" for step in steps)
        self.shortening.follow(layer, renumber, hidden.device)
        self.readings.clear()
        self.done.add(layer)
        return entering

    def take_step(
        self, layer: int, step: Step, hidden: torch.Tensor, entering: torch.Tensor
    ) -> torch.Tensor:
        """What one stage keeps of every sample; the states, with what it merges."""
        present, stage, modality = self.present, step.stage, step.group.modality
        before = [len(layout) for layout in present.layouts]
        own_before, own_after = [], []
        has_merged = [False] * len(before)
        for sample, cut in enumerate(step.cuts):
            own = present.layouts[sample].of_modality(modality)
            own_before.append(len(own))
            if cut is not None and stage.at == PIXELS:
                here = torch.isin(present.layouts[sample].columns[own], self.gone[sample])
                present.drop(sample, own[here])
            elif cut is not None and cut.count < len(own):
                merged = self.cut_sample(sample, own, cut, step.group, hidden)
                if merged is not None:
                    has_merged[sample] = True
                    entering = entering.clone() if entering is hidden else entering
                    slots, rows = merged
                    entering[sample, slots.to(entering.device)] = rows
            own_after.append(len(present.layouts[sample].of_modality(modality)))
            if cut is not None:
                check_count(stage.method, own_after[-1], cut.count)
        self.records.append(
            record(
                stage,
                modality,
                layer,
                cuts=[cut is not None for cut in step.cuts],
                before=before,
                after=[len(layout) for layout in present.layouts],
                own_before=own_before,
                own_after=own_after,
                kept=[(layout.columns + self.past.columns).tolist() for layout in present.layouts],
                merged=has_merged,
            )
        )
        return entering

    def cut_sample(
        self, sample: int, own: torch.Tensor, cut: Cut, group: Group, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Drops what a method does not keep of one sample's tokens at `own` in its layout.

        Returns:
            Where tokens were merged: the (K,) slots of the kept ones, and their (K, d) new states.
        """
        stage, pruner = group.stages[cut.stage], group.pruners[cut.stage]
        mine = self.present.layouts[sample].take(own)
        states = {name: self.readings.read(sample, name, mine, hidden) for name in pruner.needs}
        seed = (self.plan.preset.seed * 1009 + cut.stage) % 2**63
        budget = self.budget(sample, mine, cut, stage, hidden)
        tokens = VisualTokens(mine, states, seed, group.places[cut.stage].part)
        selection = pruner.select(tokens, budget)
        merged, index = None, selection.index.cpu()
        if selection.assign is not None:
            slots = self.present.slots(sample, mine.columns)
            rows = merge(hidden[sample, slots.to(hidden.device)], selection)
            merged = slots[index], rows
        dropped = torch.ones(len(mine), dtype=torch.bool)
        dropped[index] = False
        self.present.drop(sample, own[dropped])
        return merged

    def budget(
        self, sample: int, mine: Layout, cut: Cut, stage: StageSpec, hidden: torch.Tensor
    ) -> Budget:
        """How many tokens each frame or tile of a sample may keep."""
        group = mine.groups(stage.per)
        if stage.split == "even":
            budget = Budget.share(cut.count, group)
        else:
            slots = self.present.slots(sample, mine.columns).to(hidden.device)
            weights = group_information(hidden[sample, slots], group)
            least = 0 if stage.split == "entropy-or-none" else 1
            budget = Budget.share_by(cut.count, group, weights, least)
        if 0 < cut.count < len(budget.quota) and stage.split != "entropy-or-none":
            self.plan.trace.warn(
                f"{cut.count} tokens for {len(budget.quota)} {stage.per}s: evenly spaced ones "
                "keep one each, the others none"
            )
        return budget

    # -- the end ---------------------------------------------------------------------------------

    def end(self, cache: Cache | None, seconds: Mapping[str, float]) -> None:
        """Check that all was done as planned, write the block's trace, mark the cache.

        Args:
            seconds: as of Trace.
        """
        missed = [layer for layer in self.cuts.layers if layer not in self.done]
        if missed:
            raise ModelError(
                f"the cut at layer {missed[0]} did not run: this model's layers are not called as "
                "modules (compiled?)",
                "prune the model before compiling it",
            )
        trace, layouts = self.trace, self.present.layouts
        trace.stages = [
            *smaller_media(self.cuts.groups, trace, self.past.columns),
            *self.records,
        ]
        trace.kept = layouts
        trace.visual_by_layer = count_by_layer(
            self.present.whole, layouts, self.records, self.plan.num_layers
        )
        trace.seconds = dict(seconds)
        if self.shortens:
            self.mark(cache)
        self.plan.trace.take(trace)

    def mark(self, cache: Cache | None) -> None:
        """Tie what was cut to the cache, which has to hold it."""
        num_layers = self.plan.num_layers
        check_reached(self.past.cache, cache, self.shortening.lengths(num_layers), self.use_cache)
        if cache is not None:
            state = self.shortening.cache_state(num_layers)
            state.last = self.last
            if needs_block(state, self.plan.structure, cache):
                inner = self.plan.structure.inner
                state.inside = lambda: is_hooked(inner)  # a copy of the cache copies no function
            mark_cache(cache, state)


def last_positions(given: Kwargs, past: int) -> torch.Tensor | None:
    """(..., B or 1) int64 the position of the last token of each prompt that a decoder is given.

    Args:
        past: columns of the cache, from which a decoder that is given no positions counts.
    """
    positions, embeds = given.get("position_ids"), given.get("inputs_embeds")
    if isinstance(positions, torch.Tensor):
        return positions[..., -1]
    if isinstance(embeds, torch.Tensor):
        return torch.tensor([past + embeds.shape[1] - 1])
    return None


def check_count(method: str, kept: int, planned: int) -> None:
    """Holds a method to its budget."""
    if METHODS[method].exact:
        assert kept == planned, f"{method} must meet its budget: {kept}, not {planned}"
    assert kept <= planned, f"{method} must keep to its budget: {kept}, not {planned}"
