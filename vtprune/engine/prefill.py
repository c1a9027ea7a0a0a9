"""One forward over a batch of prompts with visual tokens: its cuts, and the trace of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vtprune.device import Duration, TimeMark, send
from vtprune.engine.decoding import refuse_cache
from vtprune.engine.kv_cache import AnswerReadings, cache_before
from vtprune.engine.plan import LayerStage, PlacedStage, PlannedBatch, PruningPlan, StageGroup
from vtprune.engine.position_ids import first_and_end, given_position_ids
from vtprune.engine.readings import KernelCall, Readings
from vtprune.engine.sequence import SequenceState
from vtprune.engine.trace import MergedTokens, StageRecord, TokenScores
from vtprune.errors import ModelError
from vtprune.preset import StageSpec
from vtprune.preset.spec import PIXELS
from vtprune.pruners import METHODS, create
from vtprune.pruners.base import (
    Budget,
    Pruner,
    Selection,
    VisualTokens,
    depends_on_question,
    merge,
)
from vtprune.tokens.information import group_information
from vtprune.tokens.layout import Layout
from vtprune.tokens.schedule import SLACK, Cut, count_by_layer

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

Kwargs = dict[str, object]
BLIND = "spread"
"""The question-blind method that chooses what is kept for later questions."""


class Prefill:
    """One forward over a batch of prompts, cut by cut.

    Args:
        plan: the preset for this model.
        batch: the prompts, and the cuts that are to be made.
        given: the decoder's arguments, before anything of this forward is in its cache.
        embeds: (B, S, d) of the prompts.
        cache: that the decoder is given; None: it is given none.
        started: when it began.

    Attributes:
        last_rows: how many last tokens the decoder is to give the states of; 0: all.
    """

    def __init__(
        self,
        plan: PruningPlan,
        batch: PlannedBatch,
        given: Kwargs,
        embeds: torch.Tensor,
        cache: Cache | None,
        started: TimeMark,
    ) -> None:
        self.plan, self.batch, self.trace = plan, batch, batch.trace
        self.started, self.selecting = started, Duration()
        self.use_cache = given.get("use_cache") is True
        positions = given_position_ids(given, batch.past, embeds)
        self.last_positions = positions[..., -1]
        mask, length = given.get("attention_mask"), int(embeds.shape[1])
        past = cache_before(cache, mask, batch.past, length, plan.structure)
        self.sequence = SequenceState(
            plan.structure, batch.layouts, batch.valid, cache, past, plan.late
        )
        if batch.renumbers:
            self.sequence.first_end = first_and_end(positions, self.sequence.columns)
        self.readings = Readings(plan.structure, self.sequence)
        self.records: list[StageRecord] = []
        self.layers_cut: set[int] = set()
        self.last_rows = 0

    @property
    def shortens(self) -> bool:
        """Whether any layer gets, or has in its cache, fewer tokens than the decoder is given."""
        return bool(self.batch.by_layer) or self.sequence.past.shortened

    @property
    def first_changed(self) -> int | None:
        """The first layer past the input whose arguments change; None where none's do."""
        layers = [layer for layer in self.batch.by_layer if layer > 0]
        if self.sequence.past.first_cut is not None:
            layers.append(self.sequence.past.first_cut)
        if 0 in self.batch.by_layer or self.sequence.past.offset:
            windowed = self.plan.structure.first_windowed(self.sequence.total)
            layers += [] if windowed is None else [windowed]
            layers += self.plan.structure.scaling_layers(self.sequence.total)[:1]
            layers += self.plan.structure.distance_layers[:1]
        return min(layers, default=None)

    def take_attention(self, layer: int, call: KernelCall) -> None:
        """Keep the attention rows that the methods cutting at `layer` read."""
        needs = self.batch.needs(layer)
        by_head = "text_attention_by_head" in needs
        all_text = by_head or "text_attention" in needs
        self.readings.take_attention(layer - 1, call, all_text, by_head)

    # -- cuts ------------------------------------------------------------------------------------

    def cut(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Select what every sample keeps from `layer` on.

        Args:
            hidden: (B, n, d) states that enter the layer, before this cut.

        Returns:
            The same states; where tokens were merged, a copy with the kept ones' new states.
        """
        self.record_until(layer)
        merged, stages = hidden, self.batch.by_layer[layer]
        for stage in stages:
            merged = self.cut_stage(layer, stage, hidden, merged)
        renumbers = any(stage.spec.positions == "renumber" for stage in stages)
        self.sequence.end_cut(layer, renumbers, hidden.device)
        self.readings.clear()
        self.layers_cut.add(layer)
        return merged

    def record_until(self, end: int) -> None:
        """Record the stages before a layer that leave all that is there, and so need no states."""
        done, no_states = {record.layer for record in self.records}, torch.empty(0)
        for layer, stages in self.batch.stages_by_layer.items():
            if layer < end and layer not in {*self.batch.by_layer, *done}:
                for stage in stages:
                    self.cut_stage(layer, stage, no_states, no_states)

    def cut_stage(
        self, layer: int, stage: LayerStage, hidden: torch.Tensor, merged: torch.Tensor
    ) -> torch.Tensor:
        """Drop what one stage does not keep of every sample, and record it.

        Args:
            hidden: (B, n, d) states that enter the layer.
            merged: the same, with what other stages here merged into them.

        Returns:
            `merged`, with what this stage merges.
        """
        sequence, modality = self.sequence, stage.group.modality
        before = [len(layout) for layout in sequence.layouts]
        modality_before, modality_after = [], []
        merges: list[MergedTokens | None] = [None] * len(before)
        scores: list[TokenScores | None] = [None] * len(before)
        for sample, cut in enumerate(stage.cuts):
            index = sequence.layouts[sample].of_modality(modality)
            modality_before.append(len(index))
            if cut is not None and stage.spec.at == PIXELS:
                columns = sequence.layouts[sample].columns[index]
                sequence.drop(sample, index[torch.isin(columns, self.batch.dropped[sample])])
            elif cut is not None and cut.count < len(index):
                layout, selection = self.cut_sample(sample, index, cut, stage.group, hidden)
                columns = layout.columns + self.batch.past
                if selection.scores is not None:
                    scores[sample] = TokenScores(columns, selection.scores)
                if selection.assign is not None:
                    merges[sample] = MergedTokens(columns, selection.index, selection.assign)
                    slots = sequence.slots(sample, layout.columns)
                    rows = merge(hidden[sample, send(slots, hidden.device)], selection)
                    merged = merged.clone() if merged is hidden else merged
                    merged[sample, send(slots[selection.index], merged.device)] = rows
            modality_after.append(len(sequence.layouts[sample].of_modality(modality)))
            if cut is not None:
                check_count(stage.spec.method, modality_after[-1], cut.count)
        self.records.append(
            StageRecord(
                stage.spec,
                layer,
                modality,
                cuts=[cut is not None for cut in stage.cuts],
                before=before,
                after=[len(layout) for layout in sequence.layouts],
                modality_before=modality_before,
                modality_after=modality_after,
                kept=self.original_columns(sequence.layouts),
                merges=merges,
                scores=scores,
            )
        )
        return merged

    def original_columns(self, layouts: Sequence[Layout]) -> list[list[int]]:
        """Return every sample's columns in the original prompt, what the cache held included."""
        return [(layout.columns + self.batch.past).tolist() for layout in layouts]

    def cut_sample(
        self, sample: int, index: torch.Tensor, cut: Cut, group: StageGroup, hidden: torch.Tensor
    ) -> tuple[Layout, Selection]:
        """Drop what a method does not keep of one sample's tokens at `index` in its layout.

        Returns:
            The layout of those tokens, and the method's selection among them, its index on the CPU.
        """
        stage = group.stages[cut.stage]
        layout = self.sequence.layouts[sample].take(index)
        for_turns = self.plan.preset.keep_for_turns
        if for_turns is not None and depends_on_question(stage.pruner.needs):
            selection = self.select_for_turns(sample, layout, cut, stage, hidden, for_turns)
        else:
            selection = self.select(sample, layout, cut, stage, hidden)
        dropped = torch.ones(len(layout), dtype=torch.bool)
        kept = selection.index.cpu()
        dropped[kept] = False
        self.sequence.drop(sample, index[dropped])
        return layout, replace(selection, index=kept)

    def select(
        self,
        sample: int,
        layout: Layout,
        cut: Cut,
        stage: PlacedStage,
        hidden: torch.Tensor,
        blind: Pruner | None = None,
    ) -> Selection:
        """Return what the method of a stage keeps of one sample's tokens.

        Args:
            layout: those that it chooses from.
            blind: a method in its place.
        """
        pruner = blind or stage.pruner
        states = {name: self.readings.read(sample, name, layout, hidden) for name in pruner.needs}
        seed = (self.plan.preset.seed * 1009 + cut.stage) % 2**63
        budget = self.budget(sample, layout, cut, stage.spec, hidden)
        return pruner.select(VisualTokens(layout, states, seed, stage.place.part), budget)

    def select_for_turns(
        self,
        sample: int,
        layout: Layout,
        cut: Cut,
        stage: PlacedStage,
        hidden: torch.Tensor,
        share: float,
    ) -> Selection:
        """Return what a question-aware stage keeps of one sample, part of it for later questions.

        A question-blind method takes its share first, and the stage's own the rest of the budget
        from what is left. Nothing is merged.
        """
        count = math.floor(share * cut.count + SLACK)
        kept = torch.zeros(len(layout), dtype=torch.bool)
        if count:
            blind = create(BLIND, {})
            part = self.select(sample, layout, replace(cut, count=count), stage, hidden, blind)
            kept[part.index.cpu()] = True
        if count < cut.count:
            others = (~kept).nonzero().squeeze(1)
            rest = replace(cut, count=cut.count - count)
            part = self.select(sample, layout.take(others), rest, stage, hidden)
            kept[others[part.index.cpu()]] = True
        return Selection(kept.nonzero().squeeze(1))

    def budget(
        self, sample: int, layout: Layout, cut: Cut, stage: StageSpec, hidden: torch.Tensor
    ) -> Budget:
        """Return how many tokens each frame or tile of a sample may keep."""
        group = layout.groups(stage.per)
        if stage.split == "even":
            budget = Budget.share(cut.count, group)
        else:
            slots = send(self.sequence.slots(sample, layout.columns), hidden.device)
            weights = group_information(hidden[sample, slots], group)
            least = 0 if stage.split == "entropy-or-none" else 1
            budget = Budget.share_by(cut.count, group, weights, least)
        if 0 < cut.count < len(budget.quota) and stage.split != "entropy-or-none":
            self.plan.trace.warn(
                f"{cut.count} tokens are to be kept in {len(budget.quota)} {stage.per}s: evenly "
                f"spaced {stage.per}s keep one token each, the others none"
            )
        return budget

    # -- the end ---------------------------------------------------------------------------------

    def end(self, cache: Cache | None, durations: dict[str, Duration]) -> None:
        """Check that all was done as planned, complete the trace, tie what was cut to the cache.

        Args:
            cache: in the decoder's output.
            durations: as of Trace.
        """
        missed = [layer for layer in self.batch.by_layer if layer not in self.layers_cut]
        if missed:
            raise ModelError(
                f"the cut at layer {missed[0]} did not run: this model's layers are not called as "
                "modules (compiled?)",
                "leave it uncompiled, and let vtprune compile its layers: "
                "vtprune.compile_model(model)",
            )
        self.record_until(self.plan.num_layers + 1)
        trace = self.trace
        trace.stages = [*self.smaller_media(), *self.records]
        trace.kept = self.sequence.layouts
        trace.visual_by_layer = self.visual_by_layer()
        trace.durations = durations
        decode = self.plan.decode
        if self.shortens or decode is not None:
            after = self.sequence.cache_after()
            structure = self.plan.structure
            after.check_reached(structure, self.sequence.cache, cache, self.use_cache)
            if cache is not None and decode is not None:
                refuse_cache(structure, cache)
                after.decoding = self.start_readings()
            if cache is not None and self.shortens:
                after.last_positions = self.last_positions
                after.tie_in_block(cache, structure)
            elif cache is not None:
                after.tie(cache)
        self.plan.trace.take(trace)

    def start_readings(self) -> AnswerReadings:
        """Return what the cuts while decoding start from."""
        before, past = self.sequence.past.decoding, self.batch.past
        visual = [layout.columns + past for layout in self.sequence.original_layouts]
        if before is not None:
            visual = [torch.cat(rows) for rows in zip(before.visual, visual, strict=True)]
        return AnswerReadings(visual, self.trace.decoding)

    def visual_by_layer(self) -> list[list[int]]:
        """Return the visual tokens of each layer, for every sample, from what was really kept."""
        counts = []
        for sample, layout in enumerate(self.sequence.original_layouts):
            drops = [(one.layer, one.before[sample] - one.after[sample]) for one in self.records]
            counts.append(count_by_layer(len(layout), self.plan.num_layers, drops))
            assert counts[-1][-1] == len(self.sequence.layouts[sample])
        return counts

    def smaller_media(self) -> list[StageRecord]:
        """Return records of stages that made media smaller before the prompts were made of them."""
        records: list[StageRecord] = []
        trace = self.trace
        before = [counts.total() for counts in trace.full_size]
        for group in self.batch.groups:
            if not (group.stages and METHODS[group.stages[0].spec.method].media):
                continue
            modality_before = [counts.total(group.modality) for counts in trace.full_size]
            modality_after = [len(layout.of_modality(group.modality)) for layout in trace.layouts]
            rows = zip(before, modality_before, modality_after, strict=True)
            after = [total - whole + left for total, whole, left in rows]
            records.append(
                StageRecord(
                    group.stages[0].spec,
                    0,
                    group.modality,
                    cuts=[size > 0 for size in modality_before],
                    before=before,
                    after=after,
                    modality_before=modality_before,
                    modality_after=modality_after,
                    kept=self.original_columns(trace.layouts),
                    merges=[None] * len(trace.layouts),
                )
            )
            before = after
        return records


def check_count(method: str, kept: int, planned: int) -> None:
    """Hold a method to its budget."""
    if METHODS[method].exact:
        assert kept == planned, f"{method} must meet its budget: {kept}, not {planned}"
    assert kept <= planned, f"{method} must keep to its budget: {kept}, not {planned}"
