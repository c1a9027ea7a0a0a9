"""The hooks on a decoder and its layers: cuts on the way, and what fits the tokens left by them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from vtprune.device import Duration, TimeMark, mark, send
from vtprune.engine.attention_mask import causal_mask, distances, held_columns, mask_by_columns
from vtprune.engine.decoding import DecodeStep, cut_cache
from vtprune.engine.hooks import Hooks, ThreadState, this_thread
from vtprune.engine.kv_cache import (
    PrunedCache,
    cache_length,
    layer_length,
    pruned_cache,
    refuse_padding_on_state,
    refuse_uneven,
    untie,
)
from vtprune.engine.late_checks import LateChecks
from vtprune.engine.packing import gather, gather_marked
from vtprune.engine.plan import PruningPlan
from vtprune.engine.position_ids import given_position_ids, refuse_inside_prompt
from vtprune.engine.prefill import Prefill
from vtprune.engine.readings import KernelCall, KernelTap
from vtprune.engine.refusals import refuse_windows, warn_of_positions
from vtprune.engine.sequence import SequenceState
from vtprune.engine.tower_attention import read_scores
from vtprune.errors import ModelError
from vtprune.models import seams
from vtprune.models.base import StreamedVideo
from vtprune.models.structure import DEEPSTACK, Structure
from vtprune.pruners.base import TOWER

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

Args = tuple[object, ...]
Kwargs = dict[str, object]


class DecoderHooks:
    """Prefills that cut, and continuations on what they left in the cache.

    The hooks of a forward, from its `start` to its `end`, are of the thread that it runs in: what
    it has begun it ends, also where another thread leaves the block meanwhile.

    Args:
        plan: the preset for this model.
        state: of the thread that calls the decoder.
        streamed: the prompt's video, if that was encoded in segments.
    """

    def __init__(
        self, plan: PruningPlan, state: ThreadState, streamed: StreamedVideo | None = None
    ) -> None:
        self.plan, self.state, self.streamed = plan, state, streamed
        self.structure, self.trace = plan.structure, plan.trace
        self.decoder = plan.structure.decoder
        self.arguments = plan.structure.seams

    def attach(self, hooks: Hooks) -> None:
        """Put on the hooks that stay from forward to forward."""
        hooks.before(self.decoder, self.start)
        # A forward that raises goes through the decoder's own list of these hooks (PyTorch 2.13):
        # with one that stays, `end` does not change the list under it.
        hooks.at_end(self.decoder, lambda *_: None)

    def mark(self) -> TimeMark:
        """Return this moment in the work of the model's device."""
        return mark(self.structure.device)

    def since(self, started: TimeMark) -> Duration:
        """Return how long the model's device worked since a moment."""
        return Duration.since(started, self.structure.device)

    def start(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Cut at the input, and put on the layer hooks that this forward needs."""
        state = self.state
        state.hooks.remove()  # of a forward that Ctrl-C ended: PyTorch then runs no hook at its end
        self.plan.late.do_ready()
        batch, state.batch = state.batch, None
        given = self.arguments.decoder.bind(args, kwargs)
        embeds, cache = given.get("inputs_embeds"), seams.find_cache("its decoder", given)
        length = cache_length(cache)
        if not length:
            untie(cache)  # it was emptied since
        if batch is not None:
            if not isinstance(embeds, torch.Tensor):
                raise seams.unknown("a decoder that is given no inputs_embeds")
            prefill = Prefill(self.plan, batch, given, embeds, cache, self.mark())
            state.hooks = hooks = Hooks(this_thread())
            hooks.at_end(self.decoder, functools.partial(self.end, prefill, hooks))
            given = self.start_prefill(prefill, embeds, given, hooks)
            return (), self.arguments.decoder.give(given)
        if not isinstance(embeds, torch.Tensor) or cache is None or not length:
            return None
        pruned = pruned_cache(cache)
        if pruned is None:
            refuse_uneven(cache)
            return None
        given = self.start_continuation(pruned, embeds, given, length)
        return (), self.arguments.decoder.give(given)

    # -- prefill ---------------------------------------------------------------------------------

    def start_prefill(
        self, prefill: Prefill, embeds: torch.Tensor, given: Kwargs, hooks: Hooks
    ) -> Kwargs:
        """Cut at the input, hook the layers, and return the decoder's arguments."""
        batch, sequence, readings = prefill.batch, prefill.sequence, prefill.readings
        if prefill.shortens:
            refuse_windows(self.structure, batch.past + embeds.shape[1], sequence.cache)
            if batch.past and sequence.valid is not None:
                refuse_padding_on_state(self.structure)
            seams.check_values("its decoder", given, seams.DECODER)
        if batch.reads_tower:
            vision = {name: self.state.calls.get(name, {}) for name in self.state.modalities}
            readings.tower = self.streamed_scores(batch.tower_names) or read_scores(
                self.structure, vision, sequence.original_layouts
            )
        if 0 in batch.by_layer:
            readings.project(embeds, batch.projections(0))
            embeds = self.timed_cut(prefill, 0, embeds)
        given = self.with_all_rows(prefill, sequence.decoder_arguments(given, embeds))
        self.trace.warn(
            warn_of_positions(self.structure, sequence, given.get("position_ids"), self.streamed)
        )
        for layer in batch.by_layer:
            if layer > 0:
                self.hook_readings(prefill, layer, hooks)
        if prefill.first_changed is not None:
            enter = functools.partial(self.enter_layer, prefill)
            self.hook_layers(prefill.first_changed, enter, hooks)
            self.hook_layer_before(prefill, hooks)
            if self.structure.carries_blocks and any(layer > 0 for layer in batch.by_layer):
                self.hook_blocks(prefill, hooks)
            self.hook_queries(sequence.total, sequence.query_places, hooks)
            self.hook_distances(prefill.first_changed, sequence, hooks)
        features, marks = given.get(seams.FEATURES), given.get(seams.MARKS)
        if batch.by_layer and isinstance(features, dict) and isinstance(marks, torch.Tensor):

            def current(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
                packed, count = sequence.packed, sequence.num_visual
                left, rows = gather_marked(marks[..., 0], features[layer], packed, count)
                return left[..., None], rows

            given[seams.FEATURES] = seams.CurrentFeatures(features, current)
            given[seams.MARKS] = seams.CurrentMarks(current, next(iter(features)))
        if batch.by_layer and hasattr(self.decoder, DEEPSTACK):
            # Qwen3-VL adds visual features to the states after its first layers, by marks of the
            # uncut sequence.
            add = functools.partial(add_to_kept_tokens, prefill)
            hooks.replace(self.decoder, DEEPSTACK, add)
        return given

    def streamed_scores(self, names: Sequence[str]) -> list[torch.Tensor]:
        """Return what a streamed video's tokens receive of their tower's attention; [] of others.

        Args:
            names: those of `TOWER` that are needed.

        Raises:
            ModelError: it was not read when the segments were encoded.
        """
        if self.streamed is None:
            return []
        tower, columns = self.streamed.tower, [TOWER.index(name) for name in names]
        if tower is None or bool(tower[:, columns].isnan().all(0).any()):
            raise ModelError(
                "a stage reads the vision tower's attention, and the segments of the streamed "
                "video were cut by a method that does not",
                "use that method at the input too, or leave --stream out",
            )
        return [tower]

    def with_all_rows(self, prefill: Prefill, given: Kwargs) -> Kwargs:
        """Return the decoder's arguments, so that cuts get all tokens.

        Gemma 4 (from 5.20 on) goes on with the last tokens alone from the layers on that take their
        keys from earlier ones. Cuts there need all, and dropped tokens would be among the last.
        """
        last = given.get(seams.LAST_ROWS)
        named = seams.LAST_ROWS in self.arguments.decoder
        if not prefill.shortens or not named or not isinstance(last, int) or not last:
            return given
        prefill.last_rows = last
        columns = prefill.sequence.original_length - last
        late = any(layer >= self.structure.first_sharing for layer in prefill.batch.by_layer)
        visual = any(
            len(layout) and int(layout.columns[-1]) >= columns
            for layout in prefill.sequence.original_layouts
        )
        return {**given, seams.LAST_ROWS: 0} if late or visual else given

    def hook_readings(self, prefill: Prefill, layer: int, hooks: Hooks) -> None:
        """Read in the layer before a cut what the methods there ask for."""
        for name in prefill.batch.projections(layer):
            keep = functools.partial(prefill.readings.keep, layer - 1, name)
            hooks.after(self.structure.projection(layer - 1, name), keep)
        if not prefill.batch.reads_attention(layer):
            return

        def take(call: KernelCall) -> None:
            started = self.mark()
            with torch.no_grad():
                prefill.take_attention(layer, call)
            prefill.selecting += self.since(started)

        tap = KernelTap(self.structure.attention_module(layer - 1), take)
        hooks.replace_during(tap.module, tap.registry, "get_interface", tap.get_interface)

    def hook_layer_before(self, prefill: Prefill, hooks: Hooks) -> None:
        """Read what the layer before a cut is given, for methods that need it.

        Where that layer begins with a cut itself, it is what is left after it.
        """

        def keep(layer: int, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
            given, hidden = self.read_layer(layer - 1, args, kwargs)
            if prefill.batch.reads_previous(layer):
                prefill.readings.previous = hidden.detach()
            if prefill.batch.reads_rotary(layer):
                prefill.readings.take_rotary(layer - 1, given.get("position_embeddings"))

        for layer in prefill.batch.by_layer:
            if prefill.batch.reads_previous(layer) or prefill.batch.reads_rotary(layer):
                before = self.structure.layers[layer - 1]
                hooks.before(before, functools.partial(keep, layer))

    def timed_cut(self, prefill: Prefill, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Cut; return the states, those of kept tokens with what was merged into them."""
        started = self.mark()
        with torch.no_grad():
            hidden = prefill.cut(layer, hidden)
        prefill.selecting += self.since(started)
        return hidden

    def enter_layer(
        self, prefill: Prefill, number: int, module: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Cut before a layer where it is time, and give it what fits the shorter sequence."""
        given, hidden = self.read_layer(number, args, kwargs)
        if self.structure.carries_blocks and any(layer > 0 for layer in prefill.layers_cut):
            hidden = prefill.sequence.of_prepared(hidden)
        if number > 0 and number in prefill.batch.by_layer:
            hidden = self.timed_cut(prefill, number, hidden)
            hidden = gather(hidden, prefill.sequence.last_cut.index)
        changed = prefill.sequence.layer_arguments(given, number, hidden)
        return self.write_layer(number, args, {**changed, "hidden_states": hidden})

    def hook_blocks(self, prefill: Prefill, hooks: Hooks) -> None:
        """Give the decoder as many states as it gave, from the first cut between layers on."""
        first = min(layer for layer in prefill.batch.by_layer if layer > 0)

        def lengthen(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            return prefill.sequence.to_prepared(output)

        for layer in self.structure.layers[first:]:
            hooks.after(layer, lengthen)

    def end(
        self, prefill: Prefill, hooks: Hooks, module: nn.Module, args: object, output: object
    ) -> None:
        """Take the hooks of a prefill off, complete its trace and tie what was cut to the cache."""
        hooks.remove()
        if output is None:  # the forward raised
            return
        durations = {
            "vision": self.state.encoded,
            "select": prefill.selecting,
            "prefill": self.since(prefill.started),
        }
        self.state.encoded = Duration()
        prefill.trace.found, self.state.found = self.state.found, set()
        prefill.end(seams.output_cache(output), durations)
        seams.keep_last_rows(output, prefill.last_rows)
        if self.structure.carries_blocks and any(layer > 0 for layer in prefill.layers_cut):
            seams.change_states(output, prefill.sequence.of_prepared)

    # -- going on from it ------------------------------------------------------------------------

    def start_continuation(
        self, pruned: PrunedCache, embeds: torch.Tensor, given: Kwargs, length: int
    ) -> Kwargs:
        """Hook the layers of a forward on a cache that was cut; return the decoder's arguments.

        Args:
            length: columns that the cache stands for.
        """
        cache, decode = cast("Cache", given["cache"]), self.plan.decode
        step = None
        if decode is not None and pruned.decoding is not None:
            if embeds.shape[1] > 1:  # a further question
                pruned.decoding.begin_question()
            else:
                if pruned.decoding.since >= decode.every:
                    for_turns = self.plan.preset.keep_for_turns or 0.0
                    pruned = cut_cache(pruned, cache, self.structure, decode, for_turns)
                step = DecodeStep(pruned, cache, self.structure)
        continuation = Continuation(pruned, self.structure, given, embeds, self.plan.late)
        first, after = continuation.first_layer(), continuation.cache_with_padding()
        if first is not None or step is not None or after is not None:
            self.state.hooks = hooks = Hooks(this_thread())
            hooks.at_end(self.decoder, lambda *_: hooks.remove())
        if step is not None:
            step.attach(hooks)
            hooks.at_end(self.decoder, lambda module, args, output: step.end(output))
        if first is not None:
            self.hook_layers(first, functools.partial(self.continue_layer, continuation), hooks)
            self.hook_queries(length + embeds.shape[1], continuation.query_places, hooks)
            self.hook_distances(first, continuation, hooks)
        if after is not None:
            hooks.at_end(self.decoder, functools.partial(self.note_padding, after))
        return continuation.decoder_arguments(given, embeds)

    def note_padding(
        self, after: PrunedCache, module: nn.Module, args: object, output: object
    ) -> None:
        """Tie what is known of a cache after a forward that put padding into it."""
        if output is not None and (cache := seams.output_cache(output)) is not None:
            after.tie_in_block(cache, self.structure)

    def continue_layer(
        self, continuation: Continuation, number: int, module: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Give a layer the mask and positions that fit its keys."""
        given, hidden = self.read_layer(number, args, kwargs)
        return self.write_layer(number, args, continuation.layer_arguments(given, number, hidden))

    # -- layers ----------------------------------------------------------------------------------

    def hook_layers(
        self, first: int, enter: Callable[..., tuple[Args, Kwargs]], hooks: Hooks
    ) -> None:
        """Call `enter(number, module, args, kwargs)` before every layer from `first` on."""
        for number in range(first, len(self.structure.layers)):
            hooks.before(self.structure.layers[number], functools.partial(enter, number))

    def hook_queries(
        self,
        columns: int,
        places: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
        hooks: Hooks,
    ) -> None:
        """Scale queries by their original columns, in layers that scale them by their place.

        Args:
            columns: of the original prompts up to the end of this forward.
            places: layer -> as `query_places` gives it.
        """
        for number in self.structure.scaling_layers(columns):
            scale = functools.partial(self.scale_queries, number, places)
            hooks.after(self.structure.scaled_queries(number), scale)

    def scale_queries(
        self,
        layer: int,
        places: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
        module: nn.Module,
        args: object,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Return queries that their layer's own scale, by kept tokens, makes right."""
        attention = self.structure.attention_module(layer)
        columns, slots = places(layer)
        return scaled_by_columns(attention, columns, slots, output)

    def hook_distances(
        self, first: int, tokens: SequenceState | Continuation, hooks: Hooks
    ) -> None:
        """Bias attention by distances of original columns, in layers that count them.

        Args:
            first: the first layer that may hold fewer keys.
        """
        for number in self.structure.distance_layers:
            module = seams.bias_module(self.structure.layers[number])
            if number >= first and seams.DISTANCE not in self.arguments.layers[number]:
                bias = functools.partial(self.bias_attention, number, tokens)
                hooks.replace(module, "forward", bias)

    def bias_attention(
        self,
        layer: int,
        tokens: SequenceState | Continuation,
        give: Callable[..., torch.Tensor],
        states: torch.Tensor,
        queries: torch.Tensor,
        keys: torch.Tensor,
    ) -> torch.Tensor:
        """Return the bias of a layer's attention by the original columns of its queries and keys.

        Args:
            give: the forward of the module that gives it.
            states: (B, n, H, r) that it is made of.
            queries, keys: (n,) and (K,) the places that the layer counts itself.
        """
        attention, device = self.structure.attention_module(layer), states.device
        columns, slots = tokens.query_places(layer)
        held = held_columns(tokens.key_columns(layer), len(keys))
        bias = seams.distance_bias(give, states, send(columns, device), send(held, device))
        if not seams.scales_queries(attention):
            return bias
        by_query = bias.transpose(1, 2)  # (B, n, H, K)
        return scaled_by_columns(attention, columns, slots, by_query).transpose(1, 2)

    def read_layer(self, number: int, args: Args, kwargs: Kwargs) -> tuple[Kwargs, torch.Tensor]:
        """Return the arguments of a layer by name, and the states that enter it."""
        given = self.arguments.layers[number].bind(args, kwargs)
        seams.check_values(f"decoder layer {number}", given, seams.LAYER)
        hidden = given["hidden_states"]
        assert isinstance(hidden, torch.Tensor)
        given["hidden_states"] = hidden = seams.fold_streams(hidden, self.structure.decoder_config)
        return given, hidden

    def write_layer(self, number: int, args: Args, given: Kwargs) -> tuple[Args, Kwargs]:
        """Return the arguments of a layer as it is called: states that came by place stay there.

        Transformers' hooks that collect hidden states (5.17 to 5.24) read them at the first place.
        """
        hidden = given["hidden_states"]
        assert isinstance(hidden, torch.Tensor)
        given["hidden_states"] = seams.unfold_streams(hidden, self.structure.decoder_config)
        first = (given.pop("hidden_states"),) if args else ()
        return first, self.arguments.layers[number].give(given)


def add_to_kept_tokens(
    prefill: Prefill,
    add: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    visual_pos_masks: torch.Tensor,
    visual_embeds: torch.Tensor,
) -> torch.Tensor:
    """Add features to states (deepstack) as the decoder does, for the tokens still there.

    Args:
        add: the decoder's own method, which runs after a layer.
        visual_pos_masks, visual_embeds: the marks and features of the uncut sequence.
    """
    if prefill.layers_cut:
        sequence = prefill.sequence
        visual_pos_masks, visual_embeds = gather_marked(
            visual_pos_masks, visual_embeds, sequence.packed, sequence.num_visual
        )
    return add(hidden_states, visual_pos_masks, visual_embeds)


# -- a forward on a cache that was cut: decoding, or a further turn of text -----------------------


class Continuation:
    """The masks and position ids of one forward on top of a shortened cache.

    What transformers (5.17 to 5.24) makes for it fits the first layer of each type: masks count
    that layer's keys, and there is one set of position ids for all.

    Args:
        pruned: what was cut of the cache.
        structure: of the model.
        given: the decoder's arguments, by name.
        embeds: (B, n, d) of the new tokens.
        late: of the block.
    """

    def __init__(
        self,
        pruned: PrunedCache,
        structure: Structure,
        given: Kwargs,
        embeds: torch.Tensor,
        late: LateChecks,
    ) -> None:
        self.pruned, self.structure, self.late = pruned, structure, late
        self.cache = cast("Cache", given["cache"])
        self.shape, self.device = (embeds.shape[0], embeds.shape[1]), embeds.device
        self.past = cache_length(self.cache)
        self.new = _valid_tokens(given.get("attention_mask"), self.shape[1])
        if self.new is not None:
            refuse_padding_on_state(structure)
        self.shared: dict[object, object] = {}  # made once for all layers that are alike
        # Of layers that are asked for it once this forward has added to them.
        asked = {*structure.key_layers[structure.first_sharing :], *structure.distance_layers}
        self.lengths = {source: layer_length(self.cache, source) for source in asked}
        self.masked_from = pruned.first_cut if self.needs_masks() else None
        self.windowed_from = self.first_windowed()
        self.positions: torch.Tensor | None = None  # the original ones, where layers get others

    def needs_masks(self) -> bool:
        """Return whether layers past a cut would get a mask that does not fit their keys."""
        if self.pruned.first_cut is None:
            return False
        one_token = self.new is None and self.shape[1] == 1
        return not one_token or self.pruned.needs_mask(self.structure, self.cache)

    def first_windowed(self) -> int | None:
        """Return the first layer with fewer keys and a window that ends before the first column."""
        first, layers = self.pruned.first_short, range(len(self.structure.layers))
        if first is None or self.structure.first_windowed(self.past + self.shape[1]) is None:
            return None
        return next((n for n in layers[first:] if self.window(n) is not None), None)

    def window(self, layer: int) -> int | None:
        """Return the window of a layer that is narrower than all columns; None: it is not."""
        return self.structure.window_within(layer, self.past + self.shape[1])

    def first_layer(self) -> int | None:
        """Return the first layer that needs a mask or positions of its own; None: none does."""
        shifts = self.pruned.shifts
        layers = [n for n, shift in enumerate(shifts) if shift is not shifts[0]][:1]
        layers += [n for n in (self.masked_from, self.windowed_from) if n is not None]
        if self.pruned.first_short is not None:
            layers += self.structure.scaling_layers(self.past + self.shape[1])[:1]
            first = self.pruned.first_short
            layers += [n for n in self.structure.distance_layers if n >= first][:1]
        return min(layers, default=None)

    def decoder_arguments(self, given: Kwargs, embeds: torch.Tensor) -> Kwargs:
        """Return the decoder's arguments: a mask of the first keys that layers have, positions."""
        changed = dict(given)
        if self.pruned.shortened:
            positions = given_position_ids(given, self.past, embeds)
            last, self.pruned.last_positions = self.pruned.last_positions, None
            if last is not None:
                refuse_inside_prompt(positions, last, self.late)
            if self.pruned.renumbered:
                self.positions = positions
                positions = self.shifted(0, positions)
            changed["position_ids"] = positions
        if self.pruned.offset:
            valid = self.valid_keys(self.structure.first_with_keys)
            changed["attention_mask"] = None if valid is None else send(valid.long(), self.device)
        return changed

    def layer_arguments(self, given: Kwargs, layer: int, hidden: torch.Tensor) -> Kwargs:
        """Return a layer's arguments.

        Args:
            given: its own, by name.
            hidden: (B, n, d) states that enter it.
        """
        changed, memory = dict(given), self.structure.memories[layer]
        if changed.get(seams.DISTANCE) is not None:
            width = seams.held_keys(self.cache, layer, self.shape[1])
            apart = distances(self.new_columns(), self.key_columns(layer), width)
            changed[seams.DISTANCE] = send(apart, hidden.device)
        if not memory.keys or memory.index:
            return changed
        if self.window(layer) is not None:
            masked_from = self.windowed_from
        else:
            masked_from = self.masked_from
        if masked_from is not None and layer >= masked_from:
            changed["attention_mask"] = self.mask(given, layer, hidden)
        if self.positions is None:
            return changed
        shift = self.pruned.shift(layer)
        if shift is not self.pruned.shift(0):
            positions = self.shifted(layer, self.positions)[..., -hidden.shape[-2] :]
            if given.get("position_embeddings") is not None:  # None: a layer without positions
                key = (
                    "rotary",
                    id(shift),
                    self.structure.rope_type(layer),
                    hidden.shape[-2],
                )
                if key not in self.shared:
                    self.shared[key] = self.structure.rotary(layer, hidden, positions)
                changed["position_embeddings"] = self.shared[key]
            if "position_ids" in changed:
                changed["position_ids"] = positions
        return changed

    def shifted(self, layer: int, positions: torch.Tensor) -> torch.Tensor:
        """Return the position ids of a layer, (B, n)."""
        shift = self.pruned.shift(layer)
        return positions if shift is None else positions - send(shift, positions.device)[:, None]

    def valid_keys(self, layer: int) -> torch.Tensor | None:
        """Return which of a layer's keys are valid after this forward, (B, past + n); None: all."""
        return self.pruned.valid_after(layer, self.new, self.shape, self.length(layer))

    def query_places(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the original columns of this forward's tokens, and where a layer takes them to be.

        Returns:
            (B, n) each.
        """
        columns, count = self.new_columns().clamp_min(0), self.shape[1]
        return columns, torch.arange(count)[None] + self.length(layer)

    def cache_with_padding(self) -> PrunedCache | None:
        """Return what is to be known of the cache after this forward; None: it has no padding.

        Keys that nothing is known of are those of tokens.
        """
        if self.new is None:
            return None
        layers, new = range(len(self.structure.layers)), self.new_columns()
        made: dict[object, tuple[torch.Tensor | None, torch.Tensor]] = {}
        for n in layers:
            alike = id(self.pruned.valid_in(n)), self.length(n)
            if alike not in made:
                held = self.columns_in(n)
                made[alike] = self.valid_keys(n), torch.cat([held, send(new, held.device)], dim=1)
        known = [made[id(self.pruned.valid_in(n)), self.length(n)] for n in layers]
        return replace(
            self.pruned,
            lengths=tuple(self.length(n) + self.shape[1] for n in layers),
            valid=[valid for valid, _ in known],
            key_columns=[columns for _, columns in known],
        )

    def new_columns(self) -> torch.Tensor:
        """Return the original columns of this forward's tokens, (B, n); -1 for padding."""
        batch, count = self.shape
        columns = torch.arange(self.past, self.past + count)[None].expand(batch, -1)
        return columns if self.new is None else columns.masked_fill(~self.new, -1)

    def columns_in(self, layer: int) -> torch.Tensor:
        """Return the original columns of a layer's keys before this forward."""
        return self.pruned.columns_in(layer, self.shape[0], self.past, self.length(layer))

    def length(self, layer: int) -> int:
        """Return how many keys a layer has had before this forward."""
        source = self.structure.key_layers[layer]
        return self.lengths[source] if source in self.lengths else layer_length(self.cache, source)

    def key_columns(self, layer: int) -> torch.Tensor:
        """Return the original columns of a layer's keys in this forward, -1 for padding."""
        held, new = self.columns_in(layer), self.new_columns()
        return torch.cat([held, send(new, held.device)], dim=1)

    def mask(self, given: Kwargs, layer: int, hidden: torch.Tensor) -> object:
        """Return the mask of a layer past a cut."""
        window, shares = self.window(layer), self.structure.key_layers[layer] != layer
        key = (
            id(self.pruned.valid_in(layer)),
            self.length(layer),
            self.structure.windows[layer],
            shares,
            hidden.shape[-2],
        )
        if key not in self.shared:
            if window is None and not shares:
                valid = self.valid_keys(layer)
                mask = causal_mask(self.structure, layer, hidden, valid, self.cache)
            else:
                mask = self.mask_by_columns(given, layer, window, hidden)
            self.shared[key] = mask
        return self.shared[key]

    def mask_by_columns(
        self, given: Kwargs, layer: int, window: int | None, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Return the mask of a layer that has a window, or keys of an earlier layer."""
        keys, queries = self.key_columns(layer), self.new_columns()
        source = self.structure.key_layers[layer]
        if source != layer:
            width = seams.shared_width(given, self.structure.layers[layer], source)
        else:
            width = seams.held_keys(self.cache, layer, self.shape[1])
        queries = queries[:, -hidden.shape[-2] :]
        starts = None
        if self.structure.is_chunked(layer):
            starts = self.pruned.starts
            starts = torch.zeros(self.shape[0], dtype=torch.long) if starts is None else starts
        return mask_by_columns(self.structure, queries, keys, width, window, hidden, starts)


def scaled_by_columns(
    attention: nn.Module, columns: torch.Tensor, slots: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Return values with a layer's scale by original columns in place of that by slots.

    Args:
        columns, slots: (B, n) of the queries.
        values: (B, n, ...) what the layer scales, or has scaled.
    """
    factor = seams.query_scale(attention, columns) / seams.query_scale(attention, slots)
    factor = factor.view(*factor.shape, *(1,) * (values.dim() - 2))
    return values * send(factor.to(values.dtype), values.device)


def _valid_tokens(mask: object, length: int) -> torch.Tensor | None:
    """Return which of several new tokens hold one, (B, n) bool on the CPU; None: all do.

    Args:
        mask: that the decoder is given. Of masks by the kind of layers, the one of tokens.
    """
    if isinstance(mask, Mapping):
        parts = mask.values()
        mask = next((m for m in parts if isinstance(m, torch.Tensor) and m.dim() == 2), None)
    if length == 1 or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    valid = mask[:, -length:].bool().cpu()
    return None if bool(valid.all()) else valid
