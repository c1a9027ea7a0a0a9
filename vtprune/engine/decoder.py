"""The hooks on a decoder and its layers: cuts on the way, and what fits the tokens left by them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from vtprune.device import now
from vtprune.engine.attention import Call, Tap
from vtprune.engine.caches import (
    CacheState,
    Continued,
    cache_length,
    cache_state,
    continue_from,
    refuse_uneven,
    unmark_cache,
)
from vtprune.engine.hooks import Hooks, this_thread
from vtprune.engine.packing import gather, gather_marked
from vtprune.engine.plan import Plan
from vtprune.engine.prefill import Prefill
from vtprune.engine.prompt_warnings import warn_of_positions
from vtprune.engine.refusals import refuse_windows
from vtprune.engine.thread_state import ThreadState
from vtprune.engine.tower import read_scores
from vtprune.models import seams
from vtprune.models.structure import DEEPSTACK

Args = tuple[object, ...]
Kwargs = dict[str, object]


class DecoderHooks:
    """Prefills that cut, and continuations on what they left in the cache.

    The hooks of a forward, from its `start` to its `end`, are of the thread that it runs in: what
    it has begun it ends, also where another thread leaves the block meanwhile.

    Args:
        plan: the preset for this model.
        state: of the thread that calls the decoder.
    """

    def __init__(self, plan: Plan, state: ThreadState) -> None:
        self.plan, self.state = plan, state
        self.structure, self.trace = plan.structure, plan.trace
        self.decoder = plan.structure.decoder
        self.arguments = plan.structure.seams

    def attach(self, hooks: Hooks) -> None:
        """Puts on those that stay from forward to forward."""
        hooks.before(self.decoder, self.start)
        # A forward that raises goes through the decoder's own list of these hooks (PyTorch 2.13):
        # with one that stays, `end` does not change the list under it.
        hooks.at_end(self.decoder, lambda *_: None)

    def now(self) -> float:
        return now(self.structure.device)

    def start(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Cuts at the input, and puts on the layer hooks that this forward needs."""
        state = self.state
        state.hooks.remove()  # of a forward that Ctrl-C ended: PyTorch then runs no hook at its end
        batch, state.batch = state.batch, None
        given = self.arguments.decoder.bind(args, kwargs)
        embeds, cache = given.get("inputs_embeds"), seams.find_cache("its decoder", given)
        if not cache_length(cache):
            unmark_cache(cache)  # it was emptied since
        if batch is not None:
            prefill = Prefill(self.plan, batch, given, self.now())
            state.hooks = hooks = Hooks(this_thread())
            hooks.at_end(self.decoder, functools.partial(self.end, prefill, hooks))
            if not isinstance(embeds, torch.Tensor):
                raise seams.unknown("a decoder that is given no inputs_embeds")
            given = self.start_prefill(prefill, embeds, given, hooks)
            return (), self.arguments.decoder.give(given)
        if not isinstance(embeds, torch.Tensor) or cache is None or not cache_length(cache):
            return None
        shortened = cache_state(cache)
        if shortened is None:
            refuse_uneven(cache)
            return None
        given = self.start_continuation(shortened, embeds, given)
        return (), self.arguments.decoder.give(given)

    def start_prefill(
        self, prefill: Prefill, embeds: torch.Tensor, given: Kwargs, hooks: Hooks
    ) -> Kwargs:
        cuts, readings = prefill.cuts, prefill.readings
        if prefill.shortens:
            refuse_windows(
                self.structure, prefill.past.columns + embeds.shape[1], prefill.past.cache
            )
            seams.check_values("its decoder", given, seams.DECODER)
        if cuts.reads_tower:
            vision = {name: self.state.calls.get(name, {}) for name in self.state.modalities}
            readings.tower = read_scores(self.structure, vision, prefill.present.whole)
        if 0 in cuts.by_layer:
            readings.project(embeds, cuts.projections(0))
            embeds = self.timed_cut(prefill, 0, embeds)
            given = prefill.shortening.inputs(given, embeds)
        else:
            given = prefill.shortening.uncut_inputs(given, embeds)
        self.plan.trace.warn(
            warn_of_positions(
                self.structure, prefill.present, prefill.past.columns, given.get("position_ids")
            )
        )
        for layer in cuts.by_layer:
            if layer > 0:
                self.hook_readings(prefill, layer, hooks)
        if prefill.first_changed is not None:
            enter = functools.partial(self.enter_layer, prefill)
            self.hook_layers(prefill.first_changed, enter, hooks)
        if prefill.cuts.layers and hasattr(self.decoder, DEEPSTACK):
            hooks.replace(self.decoder, DEEPSTACK, functools.partial(add_to_those_left, prefill))
        return given

    def hook_readings(self, prefill: Prefill, layer: int, hooks: Hooks) -> None:
        """Reads in the layer before a cut what the methods there ask for."""
        for name in prefill.cuts.projections(layer):
            keep = functools.partial(prefill.readings.keep, name)
            hooks.after(self.structure.projection(layer - 1, name), keep)
        if not prefill.cuts.reads_attention(layer):
            return

        def take(call: Call) -> None:
            started = self.now()
            with torch.no_grad():
                prefill.take_attention(layer, call)
            prefill.select_seconds += self.now() - started

        tap = Tap(self.structure.attention_module(layer - 1), take)
        hooks.replace(tap.registry, "get_interface", tap.get_interface)

    def hook_layers(
        self, first: int, enter: Callable[..., tuple[Args, Kwargs]], hooks: Hooks
    ) -> None:
        """Calls `enter(number, module, args, kwargs)` before every layer from `first` on."""
        for number in range(first, len(self.structure.layers)):
            hooks.before(self.structure.layers[number], functools.partial(enter, number))

    def timed_cut(self, prefill: Prefill, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Cuts; gives the states back, those of kept tokens with what was merged into them."""
        started = self.now()
        with torch.no_grad():
            hidden = prefill.cut(layer, hidden)
        prefill.select_seconds += self.now() - started
        return hidden

    def enter_layer(
        self, prefill: Prefill, number: int, module: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Cuts before a layer where it is time, and gives it what fits the shorter sequence."""
        given, hidden = self.read_layer(number, args, kwargs)
        if number in prefill.cuts.by_layer:
            hidden = self.timed_cut(prefill, number, hidden)
            hidden = gather(hidden, prefill.present.last_cut.index)
        changed = prefill.shortening.arguments(given, number, hidden)
        return self.write_layer(number, args, {**changed, "hidden_states": hidden})

    def read_layer(self, number: int, args: Args, kwargs: Kwargs) -> tuple[Kwargs, torch.Tensor]:
        """The arguments of a layer by name, and the states that enter it."""
        given = self.arguments.layers[number].bind(args, kwargs)
        seams.check_values(f"decoder layer {number}", given, seams.LAYER)
        hidden = given["hidden_states"]
        assert isinstance(hidden, torch.Tensor)
        return given, hidden

    def write_layer(self, number: int, args: Args, given: Kwargs) -> tuple[Args, Kwargs]:
        """The arguments of a layer as it is called: states that came by place stay there.

        Transformers' hooks that collect hidden states read them at the first place.
        """
        first = (given.pop("hidden_states"),) if args else ()
        return first, self.arguments.layers[number].give(given)

    def start_continuation(self, state: CacheState, embeds: torch.Tensor, given: Kwargs) -> Kwargs:
        """Decoding, or more text, on a cache that was cut."""
        window = self.structure.narrowest_window
        if window is not None and cache_length(given["cache"]) >= window:
            self.trace.warn(
                f"the answer has gone past the model's sliding window of {window} tokens: from "
                "there on its layers see further back than without pruning"
            )
        continued = continue_from(state, self.structure, given, embeds)
        given = continued.place(given, embeds.shape[1])
        first = continued.first_layer()
        if first is not None:
            self.state.hooks = hooks = Hooks(this_thread())
            hooks.at_end(self.decoder, lambda *_: hooks.remove())
            self.hook_layers(first, functools.partial(self.continue_layer, continued), hooks)
        if continued.replace_input:
            given["attention_mask"] = continued.input_mask()
        return given

    def continue_layer(
        self, continued: Continued, number: int, module: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        given, hidden = self.read_layer(number, args, kwargs)
        return self.write_layer(number, args, continued.change(number, given, hidden))

    def end(
        self, prefill: Prefill, hooks: Hooks, module: nn.Module, args: object, output: object
    ) -> None:
        """Takes the hooks of a prefill off, writes the trace and marks the cache."""
        hooks.remove()
        if output is None:  # the forward raised
            return
        seconds = {
            "vision": self.state.seconds,
            "select": prefill.select_seconds,
            "prefill": self.now() - prefill.started,
        }
        self.state.seconds = 0.0
        prefill.end(seams.output_cache(output), seconds)


def add_to_those_left(
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
    if prefill.done:
        visual_pos_masks, visual_embeds = gather_marked(
            visual_pos_masks, visual_embeds, prefill.present.packed
        )
    return add(hidden_states, visual_pos_masks, visual_embeds)
