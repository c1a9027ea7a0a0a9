"""One forward over a prompt with visual tokens: its cuts, and what the layers get after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from vtprune.attention import Call, Rows, attention_rows
from vtprune.caches import CacheState, build_mask, layer_length, mark_cache
from vtprune.errors import ModelError
from vtprune.information import group_information
from vtprune.layout import Layout
from vtprune.models.structure import Structure
from vtprune.packing import (
    Packed,
    gather,
    gather_mask,
    join_valid,
    pack,
    past_columns,
    repack,
)
from vtprune.plan import Group, Plan
from vtprune.preset import StageSpec
from vtprune.pruners import METHODS
from vtprune.pruners.base import ATTENTION, TOWER, Budget, VisualTokens, merge
from vtprune.schedule import Cut, Schedule
from vtprune.spec import PIXELS
from vtprune.trace import StageRecord, Trace
from vtprune.units import Whole

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

Kwargs = dict[str, object]


def start_prefill(
    plan: Plan,
    layouts: list[Layout],
    columns: list[torch.Tensor],
    length: int,
    past: int,
    gone: list[torch.Tensor] | None = None,
    whole: Sequence[Whole] = (),
) -> Prefill:
    """The cuts of a batch, from every sample's own number of tokens.

    Args:
        layouts: of every sample.
        columns: for every sample its columns that hold a token, text or visual.
        length: columns of the batch.
        past: columns that the cache holds already.
        gone: for every sample the columns of visual tokens that went before the vision tower.
        whole: what every sample would hold if its media had not been made smaller; empty where
            they were not.
    """
    groups = plan.groups_for(layouts)
    if gone is None:
        gone = [torch.zeros(0, dtype=torch.long)] * len(layouts)
    schedules = [plan.solve(group, layouts, gone, whole) for group in groups]
    plan.trace.layouts, plan.trace.whole = layouts, list(whole)
    plan.trace.text = [len(row) - len(one) for row, one in zip(columns, layouts, strict=True)]
    uncut = pack([torch.arange(length)] * len(columns))
    return Prefill(plan, groups, schedules, list(layouts), list(columns), uncut, uncut, past, gone)


@dataclass
class Prefill:
    """One forward over a prompt with visual tokens.

    Args:
        plan: the preset for this model.
        groups: the budgets, and `schedules` their cuts, for every group and sample.
        layouts: of every sample's visual tokens still there; columns of this forward's input_ids.
        columns: for every sample its columns still there.
        base: the columns in the sequence that the decoder's layers were prepared for.
        packed: the columns in the sequence as it is now.
        past: columns that the cache held before.
        gone: for every sample the columns of visual tokens that went before the vision tower.
    """

    plan: Plan
    groups: list[Group]
    schedules: list[list[Schedule]]
    layouts: list[Layout]
    columns: list[torch.Tensor]
    base: Packed
    packed: Packed
    past: int
    gone: list[torch.Tensor]
    states: dict[str, torch.Tensor] = field(default_factory=dict)
    records: list[StageRecord] = field(default_factory=list)
    valid: list[tuple[int, torch.Tensor | None, int]] = field(default_factory=list)
    replaced: dict[object, tuple[object, object]] = field(default_factory=dict)
    cache: Cache | None = None
    held: list[int] = field(default_factory=list)
    earlier: CacheState | None = None
    offset: int = 0
    attention: list[torch.Tensor] = field(default_factory=list)
    tower: list[torch.Tensor] = field(default_factory=list)
    first: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    shifts: list[tuple[int, torch.Tensor | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers = sorted(
            {cut.layer for solved in self.schedules for one in solved for cut in one.cuts}
        )
        self.done: set[int] = set()
        self.last_cut = self.packed

    @property
    def structure(self) -> Structure:
        return self.plan.structure

    def begin(self, given: Kwargs) -> None:
        """Takes note of the decoder's arguments, and of the cache before anything is in it."""
        cache = given.get("past_key_values")
        self.cache = cache  # type: ignore[assignment]
        if self.renumbers:
            self.first = first_positions(given.get("position_ids"), self.columns, self.past)
        if self.past:
            self.held = [layer_length(cache, layer) for layer in range(self.plan.num_layers)]
            state = getattr(cache, "_vtprune", None)
            if not isinstance(state, CacheState):
                valid = past_columns(given.get("attention_mask"), self.past)
                state = CacheState([valid] * self.plan.num_layers, None, 0)
            self.earlier = state
        full = all(len(row) == self.packed.length for row in self.columns)
        mask = None
        if not full:  # the batch as it came, wherever its padding is
            mask = torch.zeros(len(self.columns), self.packed.length, dtype=torch.bool)
            for row, held in zip(mask, self.columns, strict=True):
                row[held] = True
        self.valid = [(0, mask, self.packed.length)]

    def cuts_at(self, layer: int) -> list[tuple[Group, int, list[Cut | None]]]:
        """(group, number of the stage, every sample's cut) of the stages that cut at `layer`."""
        found = []
        for group, solved in zip(self.groups, self.schedules, strict=True):
            for number in range(len(group.stages)):
                cuts = [
                    next((c for c in one.cuts if c.stage == number and c.layer == layer), None)
                    for one in solved
                ]
                if any(cuts):
                    found.append((group, number, cuts))
        return found

    def needs(self, layer: int) -> set[str]:
        """Names of the states that the methods cutting at `layer` read."""
        return {
            name
            for group, number, _ in self.cuts_at(layer)
            if group.stages[number].at != PIXELS
            for name in group.pruners[number].needs
        }

    @property
    def renumbers(self) -> bool:
        """Whether any stage gives positions without gaps."""
        return any(s.positions == "renumber" for group in self.groups for s in group.stages)

    def projections(self, layer: int) -> list[str]:
        """Which of a layer's projections the methods cutting at `layer` read."""
        needs = {name.removeprefix("text_") for name in self.needs(layer)}
        return sorted(needs & {"query", "key", "value"})

    @property
    def reads_tower(self) -> bool:
        """Whether a method reads what the vision tower attended to, which is then in `tower`."""
        return any(self.needs(layer) & set(TOWER) for layer in self.layers)

    def reads_attention(self, layer: int) -> bool:
        return bool(self.needs(layer) & set(ATTENTION))

    def slots(self, sample: int, columns: torch.Tensor) -> torch.Tensor:
        """Where a sample's columns are in the sequence as it is now."""
        held = self.packed.columns[sample]
        return torch.searchsorted(held, columns) + self.packed.length - len(held)

    def text_columns(self, sample: int) -> torch.Tensor:
        """Columns of a sample's text after its last visual token.

        Raises:
            ModelError: there is none.
        """
        visual = self.plan.trace.layouts[sample].columns
        row = self.columns[sample]
        text = row[row > (visual[-1] if len(visual) else -1)]
        if not len(text):
            raise ModelError(
                "this method reads the question, and no text follows the pictures in the prompt",
                "put the question after the pictures, or use a method that reads no text",
            )
        return text

    def take_attention(self, layer: int, call: Call) -> None:
        """Keeps the attention rows that the methods cutting at `layer` read: (B) x (R, S)."""
        wanted = []
        all_text = "text_attention" in self.needs(layer)
        for sample, row in enumerate(self.columns):
            text = self.text_columns(sample)
            valid = torch.zeros(self.packed.length, dtype=torch.bool)
            valid[self.slots(sample, row)] = True
            past = torch.ones(self.past_length(layer - 1), dtype=torch.bool)
            earlier = self.earlier.valid[layer - 1] if self.earlier else None
            if earlier is not None:
                past[: earlier.shape[1]] = earlier[sample]
            queries = self.slots(sample, text if all_text else text[-1:])
            wanted.append(Rows(queries, valid, past))
        self.attention = attention_rows(call, wanted)

    def past_length(self, layer: int) -> int:
        """Keys that a layer's cache held before this forward."""
        return self.held[layer] if self.past else 0

    @property
    def shortens(self) -> bool:
        """Whether any layer gets, or has in its cache, fewer tokens than the decoder is given."""
        return bool(self.layers) or (self.earlier is not None and self.earlier.shortened)

    @property
    def first_changed(self) -> int | None:
        """The first layer past the input whose arguments change; None where none's do."""
        found = [layer for layer in self.layers if layer > 0][:1]
        if self.earlier is not None and self.earlier.first_cut is not None:
            found.append(self.earlier.first_cut)
        return min(found, default=None)

    def cut(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Selects what every sample keeps from `layer` on.

        Args:
            hidden: (B, n, d) states that enter the layer, before this cut.

        Returns:
            The same states; where tokens were merged, a copy with the kept ones' new states.
        """
        entering = hidden
        renumber = False
        for group, number, cuts in self.cuts_at(layer):
            stage = group.stages[number]
            renumber = renumber or stage.positions == "renumber"
            before = [len(layout) for layout in self.layouts]
            own_before, own_after = [], []
            for sample, cut in enumerate(cuts):
                own = self.layouts[sample].of_modality(group.modality)
                own_before.append(len(own))
                if cut is not None and stage.at == PIXELS:
                    here = torch.isin(self.layouts[sample].columns[own], self.gone[sample])
                    self.drop(sample, own[here])
                elif cut is not None and cut.count < len(own):
                    merged = self.cut_sample(sample, own, cut, group, hidden)
                    if merged is not None:
                        entering = entering.clone() if entering is hidden else entering
                        slots, rows = merged
                        entering[sample, slots.to(entering.device)] = rows
                own_after.append(len(self.layouts[sample].of_modality(group.modality)))
                if cut is not None:
                    self.check_count(stage.method, own_after[-1], cut.count)
            self.records.append(
                StageRecord(
                    layer=layer,
                    method=stage.method,
                    at=stage.at,
                    modality=group.modality,
                    options=dict(stage.options),
                    keep=stage.keep,
                    per=stage.per,
                    cuts=[cut is not None for cut in cuts],
                    before=before,
                    after=[len(layout) for layout in self.layouts],
                    own_before=own_before,
                    own_after=own_after,
                    kept=[(layout.columns + self.past).tolist() for layout in self.layouts],
                    split=stage.split,
                    positions=stage.positions,
                )
            )
        now = pack(self.columns)
        self.last_cut = repack(self.packed, now)
        self.packed = now
        self.valid.append((layer, now.valid, now.length))
        self.place(layer, renumber, hidden.device)
        self.states.clear()
        self.attention = []
        self.replaced.clear()
        self.done.add(layer)
        return entering

    def check_count(self, method: str, kept: int, planned: int) -> None:
        """Holds a method to its budget."""
        if METHODS[method].exact:
            assert kept == planned, f"{method} must meet its budget: {kept}, not {planned}"
        assert kept <= planned, f"{method} must keep to its budget: {kept}, not {planned}"

    def place(self, layer: int, renumber: bool, device: torch.device) -> None:
        """The positions from a cut on, where a stage at it or before it renumbered them."""
        if renumber:
            assert self.first is not None
            now = self.packed
            lengths = torch.tensor([len(row) for row in now.columns])
            slots = torch.arange(now.length)[None] - (now.length - lengths)[:, None]
            self.positions = (self.first[:, :1] + slots.clamp_min(0)).to(device)
            end = self.first[:, 0] + lengths
            self.shifts.append((layer, self.first[:, 1] - end))
        elif self.positions is not None:
            self.positions = gather(self.positions, self.last_cut.index)

    def read(self, sample: int, name: str, mine: Layout, hidden: torch.Tensor) -> torch.Tensor:
        """The states of one sample that a method reads by this name, as VisualTokens has them."""
        slots = self.slots(sample, mine.columns)
        if name in ATTENTION:
            rows = self.attention[sample]
            rows = rows[:, slots.to(rows.device)]
            return rows if name == "text_attention" else rows[-1]
        if name in TOWER:
            place = torch.searchsorted(self.plan.trace.layouts[sample].columns, mine.columns)
            return self.tower[sample][place.to(self.tower[sample].device)].to(hidden.device)
        if name.startswith("text_"):
            slots = self.slots(sample, self.text_columns(sample))
        name = name.removeprefix("text_")
        source = hidden if name == "hidden" else self.states[name]
        width = self.structure.head_dim
        if name == "hidden":
            width = source.shape[-1] // self.structure.num_heads
        return source[sample].index_select(0, slots.to(source.device)).unflatten(-1, (-1, width))

    def budget(
        self, sample: int, mine: Layout, cut: Cut, stage: StageSpec, hidden: torch.Tensor
    ) -> Budget:
        """How many tokens each frame or tile of a sample may keep."""
        group = mine.groups(stage.per)
        if stage.split == "even":
            budget = Budget.share(cut.count, group)
        else:
            slots = self.slots(sample, mine.columns).to(hidden.device)
            weights = group_information(hidden[sample, slots], group)
            least = 0 if stage.split == "entropy-or-none" else 1
            budget = Budget.share_by(cut.count, group, weights, least)
        if 0 < cut.count < len(budget.quota) and stage.split != "entropy-or-none":
            self.plan.trace.warn(
                f"{cut.count} tokens for {len(budget.quota)} {stage.per}s: evenly spaced ones "
                "keep one each, the others none"
            )
        return budget

    def cut_sample(
        self, sample: int, own: torch.Tensor, cut: Cut, group: Group, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Drops what a method does not keep of one sample's tokens at `own` in its layout.

        Returns:
            Where tokens were merged: the (K,) slots of the kept ones, and their (K, d) new states.
        """
        stage, pruner = group.stages[cut.stage], group.pruners[cut.stage]
        layout = self.layouts[sample]
        mine = layout.take(own)
        states = {name: self.read(sample, name, mine, hidden) for name in pruner.needs}
        seed = (self.plan.preset.seed * 1009 + cut.stage) % 2**63
        budget = self.budget(sample, mine, cut, stage, hidden)
        tokens = VisualTokens(mine, states, seed, group.places[cut.stage].part)
        selection = pruner.select(tokens, budget)
        merged = None
        if selection.assign is not None:
            slots = self.slots(sample, mine.columns)
            rows = merge(hidden[sample, slots.to(hidden.device)], selection)
            merged = slots[selection.index.cpu()], rows
        dropped = torch.ones(len(mine), dtype=torch.bool)
        dropped[selection.index.cpu()] = False
        self.drop(sample, own[dropped])
        return merged

    def drop(self, sample: int, gone: torch.Tensor) -> None:
        """Takes tokens, at `gone` in a sample's layout, out of it and out of its columns."""
        layout = self.layouts[sample]
        keep = torch.ones(len(layout), dtype=torch.bool)
        keep[gone] = False
        self.layouts[sample] = layout.take(keep.nonzero().squeeze(1))
        row = self.columns[sample]
        present = torch.ones(len(row), dtype=torch.bool)
        present[torch.searchsorted(row, layout.columns[gone])] = False
        self.columns[sample] = row[present]

    # -- what the decoder and its layers get -----------------------------------------------------

    def shorten_inputs(self, given: Kwargs, embeds: torch.Tensor) -> Kwargs:
        """The decoder's arguments after a cut at the input."""
        index = self.last_cut.index
        positions = given.get("position_ids")
        if not isinstance(positions, torch.Tensor):
            positions = torch.arange(self.past, self.past + embeds.shape[1], device=embeds.device)
            positions = positions[None]
        mask = given.get("attention_mask")
        self.offset = self.base.length - self.packed.length
        self.base = self.packed
        self.valid = self.valid[1:]
        shape = (len(self.columns), self.packed.length)
        if self.past:
            mask = self.valid_keys(0)
        elif isinstance(mask, Mapping) or (isinstance(mask, torch.Tensor) and mask.dim() == 4):
            mask = gather_mask(mask, self.last_cut)
        else:
            mask = self.packed.valid
        if mask is None and self.cache is None:
            # Without mask and cache, gaps in the position ids would be read as packed sequences.
            mask = torch.ones(shape, dtype=torch.bool)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            mask = mask.to(embeds.device, torch.long)
        positions = gather(positions, index, dim=positions.dim() - 1)
        if self.positions is not None:
            positions = self.positions.to(embeds.device)
        return {
            **given,
            "inputs_embeds": gather(embeds, index),
            "position_ids": positions,
            "attention_mask": mask,
        }

    def fit_mask(self, given: Kwargs, embeds: torch.Tensor) -> Kwargs:
        """The decoder's arguments where nothing is cut at the input, but was in an earlier one."""
        if self.earlier is None or not self.earlier.offset:
            return given
        mask = self.valid_keys(0)
        return {**given, "attention_mask": None if mask is None else mask.to(embeds.device).long()}

    def valid_keys(self, layer: int) -> torch.Tensor | None:
        """(B, past + n) bool of a layer's keys in this forward; None where all are valid."""
        past = self.earlier.valid[layer] if self.earlier else None
        shape = (len(self.columns), self.packed.length)
        return join_valid(past, self.past_length(layer), self.valid[-1][1], shape)

    def shorten_layer(self, kwargs: Kwargs, layer: int, hidden: torch.Tensor) -> Kwargs:
        """A layer's arguments for the sequence as it is now."""
        changed = dict(kwargs)
        cut = self.packed is not self.base  # else the layers were prepared for it
        for name in ("position_embeddings", "position_ids"):
            value = kwargs.get(name)
            if cut and value is not None and self.positions is None:
                changed[name] = self.once(id(value), value, self.shorten_positions)
        if cut and self.positions is not None:
            rotary = ("rotary", self.structure.rope_type(layer))
            positions = self.positions
            changed["position_embeddings"] = self.once(
                rotary, None, lambda _: self.structure.rotary(layer, hidden, positions)
            )
            if kwargs.get("position_ids") is not None:
                changed["position_ids"] = positions
        mask = kwargs.get("attention_mask")
        if self.past or (mask is None and self.packed.valid is not None):
            past = (id(self.earlier.valid[layer]), self.held[layer]) if self.earlier else None
            key = ("mask", self.structure.window(layer), past)
            changed["attention_mask"] = self.once(
                key, None, lambda _: self.build_mask(layer, hidden)
            )
        else:
            changed["attention_mask"] = self.once(id(mask), mask, self.shorten_mask)
        return changed

    def once(self, key: object, value: object, change: Callable[[object], object]) -> object:
        """`change(value)`, worked out once for all layers up to the next cut.

        The value is held, so that its id stays its own.
        """
        if key not in self.replaced:
            self.replaced[key] = (value, change(value))
        return self.replaced[key][1]

    def from_base(self) -> Packed:
        """The sequence as it is now, in the slots that the layers were prepared for."""
        packed = self.once("packed", None, lambda _: repack(self.base, self.packed))
        assert isinstance(packed, Packed)
        return packed

    def shorten_positions(self, value: object) -> object:
        if isinstance(value, tuple):
            return tuple(self.shorten_positions(one) for one in value)
        assert isinstance(value, torch.Tensor)
        return gather(value, self.from_base().index)

    def shorten_mask(self, mask: object) -> object:
        short = gather_mask(mask, self.from_base())
        if isinstance(short, torch.Tensor) and short.dim() == 2 and isinstance(mask, torch.Tensor):
            return short.to(mask.device, mask.dtype)
        return short

    def build_mask(self, layer: int, hidden: torch.Tensor) -> object:
        return build_mask(self.structure, layer, hidden, self.valid_keys(layer), self.cache)

    def end(self, cache: object) -> None:
        """Checks that all was done as planned, writes the trace, marks the cache."""
        missed = [layer for layer in self.layers if layer not in self.done]
        if missed:
            raise ModelError(
                f"the cut at layer {missed[0]} did not run: this model's layers are not called as "
                "modules (compiled?)",
                "prune the model before compiling it",
            )
        trace = self.plan.trace
        trace.stages = [*smaller_media(self.groups, trace, self.past), *self.records]
        trace.kept = self.layouts
        trace.visual_by_layer = self.count_by_layer()
        trace.prefills += 1
        if cache is None or not self.shortens:
            return
        spans = [*self.valid, (self.plan.num_layers, None, 0)]
        valid: list[torch.Tensor | None] = []
        shifts: list[torch.Tensor | None] = []
        if self.shifts:
            for layer in range(self.plan.num_layers):
                own = [shift for first, shift in self.shifts if first <= layer]
                shifts.append(own[-1] if own else None)
        for (first, new, length), (until, _, _) in pairwise(spans):
            for layer in range(first, until):
                past = self.earlier.valid[layer] if self.earlier else None
                shape = (len(self.columns), length)
                valid.append(join_valid(past, self.past_length(layer), new, shape))
        first_cut = next((layer for layer in self.layers if layer > 0), None)
        offset = self.offset + (self.earlier.offset if self.earlier else 0)
        if self.earlier and self.earlier.first_cut is not None:
            first_cut = min(first_cut or self.plan.num_layers, self.earlier.first_cut)
        mark_cache(cache, CacheState(valid, first_cut, offset, shifts))

    def count_by_layer(self) -> list[list[int]]:
        """For every sample the visual tokens of each layer, from what was really kept."""
        counts = []
        for sample, layout in enumerate(self.plan.trace.layouts):
            drops = [0] * self.plan.num_layers
            for record in self.records:
                drops[record.layer] += record.before[sample] - record.after[sample]
            present, row = len(layout), []
            for drop in drops:
                present -= drop
                row.append(present)
            assert present == len(self.layouts[sample])
            counts.append(row)
        return counts


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
        stage = group.stages[0]
        own_before = [whole.total(group.modality) for whole in trace.whole]
        own_after = [len(one.of_modality(group.modality)) for one in trace.layouts]
        rows = zip(before, own_before, own_after, strict=True)
        after = [total - whole + left for total, whole, left in rows]
        records.append(
            StageRecord(
                layer=0,
                method=stage.method,
                at=stage.at,
                modality=group.modality,
                options=dict(stage.options),
                keep=stage.keep,
                per=stage.per,
                cuts=[size > 0 for size in own_before],
                before=before,
                after=after,
                own_before=own_before,
                own_after=own_after,
                kept=[(layout.columns + past).tolist() for layout in trace.layouts],
            )
        )
        before = after
    return records


def first_positions(positions: object, columns: list[torch.Tensor], past: int) -> torch.Tensor:
    """(B, 2) int64: every sample's first position in this forward, and the one after its last.

    Args:
        positions: (B or 1, S) as the decoder was given them; None: columns counted from `past`.
    """
    rows = []
    for sample, row in enumerate(columns):
        if isinstance(positions, torch.Tensor):
            own = positions[min(sample, len(positions) - 1)].cpu()
            rows.append([int(own[row[0]]), int(own[row[-1]]) + 1])
        else:
            rows.append([past + int(row[0]), past + int(row[-1]) + 1])
    return torch.tensor(rows)
