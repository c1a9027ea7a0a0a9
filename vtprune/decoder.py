"""The hooks on a decoder and its layers: cuts on the way, and what fits the tokens left by them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from vtprune.attention import Call, Tap
from vtprune.caches import (
    CacheState,
    Continued,
    cache_length,
    cache_state,
    continue_from,
    refuse_uneven,
    unmark_cache,
)
from vtprune.clock import now
from vtprune.cuts import Batch
from vtprune.encoding import Encoding
from vtprune.hooks import Hooks
from vtprune.models import seams
from vtprune.models.structure import DEEPSTACK
from vtprune.packing import gather, gather_marked
from vtprune.plan import Plan
from vtprune.prefill import Prefill
from vtprune.refusals import refuse_windows
from vtprune.tower import read_scores

Args = tuple[object, ...]
Kwargs = dict[str, object]


class DecoderHooks:
    """Prefills that cut, and continuations on what they left in the cache.

    Args:
        plan: the preset for this model.
        encoding: the calls of its encoders.
    """

    def __init__(self, plan: Plan, encoding: Encoding) -> None:
        self.plan, self.encoding = plan, encoding
        self.structure, self.trace = plan.structure, plan.trace
        self.decoder = plan.structure.decoder
        self.arguments = plan.structure.seams
        self.hooks = Hooks()  # of one forward
        self.batch: Batch | None = None
        self.modalities: tuple[str, ...] = ()
        self.running: Prefill | None = None
        self.started = 0.0
        self.select_seconds = 0.0

    def attach(self, hooks: Hooks) -> None:
        """Puts on those that stay from forward to forward."""
        if hasattr(self.decoder, DEEPSTACK):
            hooks.replace(self.decoder, DEEPSTACK, self.adding())
        hooks.before(self.decoder, self.start)
        hooks.at_end(self.decoder, self.end)

    def detach(self) -> None:
        """Takes off those of a forward that did not end."""
        self.hooks.remove()
        self.batch, self.running = None, None

    def expect(self, batch: Batch | None, modalities: tuple[str, ...] = ()) -> None:
        """Says what the next forward is over.

        Args:
            batch: None: no prompt with visual tokens.
            modalities: that were encoded for it.
        """
        self.batch, self.modalities = batch, modalities

    def adding(self) -> Callable[..., torch.Tensor]:
        """The decoder's own adding of features to states (deepstack), for the tokens still there.

        It runs after a layer with the marks and features of the uncut sequence.
        """
        add = getattr(self.decoder, DEEPSTACK)

        @functools.wraps(add)
        def add_to_those_left(
            hidden_states: torch.Tensor, visual_pos_masks: torch.Tensor, visual_embeds: torch.Tensor
        ) -> torch.Tensor:
            if self.running is not None and self.running.done:
                visual_pos_masks, visual_embeds = gather_marked(
                    visual_pos_masks, visual_embeds, self.running.present.packed
                )
            return add(hidden_states, visual_pos_masks, visual_embeds)

        return add_to_those_left

    def now(self) -> float:
        return now(self.structure.device)

    def start(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Cuts at the input, and puts on the layer hooks that this forward needs."""
        batch, self.batch, self.running = self.batch, None, None
        given = self.arguments.decoder.bind(args, kwargs)
        embeds, cache = given.get("inputs_embeds"), seams.find_cache("its decoder", given)
        if not cache_length(cache):
            unmark_cache(cache)  # it was emptied since
        if batch is not None:
            self.started, self.select_seconds = self.now(), 0.0
            self.running = Prefill(self.plan, batch, given)
        if not isinstance(embeds, torch.Tensor):
            return None
        if self.running is not None:
            given = self.start_prefill(self.running, embeds, given)
            return (), self.arguments.decoder.give(given)
        if cache is None or not cache_length(cache):
            return None
        state = cache_state(cache)
        if state is None:
            refuse_uneven(cache)
            return None
        given = self.start_continuation(state, embeds, given)
        return (), self.arguments.decoder.give(given)

    def start_prefill(self, prefill: Prefill, embeds: torch.Tensor, given: Kwargs) -> Kwargs:
        cuts, readings = prefill.cuts, prefill.readings
        if prefill.shortens:
            refuse_windows(
                self.structure, prefill.past.columns + embeds.shape[1], prefill.past.cache
            )
            seams.check_values("its decoder", given, seams.DECODER)
        if cuts.reads_tower:
            vision = {name: self.encoding.calls[name] for name in self.modalities}
            readings.tower = read_scores(self.structure, vision, self.trace.layouts)
        if 0 in cuts.by_layer:
            readings.project(embeds, cuts.projections(0))
            embeds = self.timed_cut(prefill, 0, embeds)
            given = prefill.shortening.inputs(given, embeds)
        else:
            given = prefill.shortening.uncut_inputs(given, embeds)
        for layer in cuts.by_layer:
            if layer > 0:
                self.hook_readings(prefill, layer)
        if prefill.first_changed is not None:
            self.hook_layers(prefill.first_changed, functools.partial(self.enter_layer, prefill))
        return given

    def hook_readings(self, prefill: Prefill, layer: int) -> None:
        """Reads in the layer before a cut what the methods there ask for."""
        for name in prefill.cuts.projections(layer):
            keep = functools.partial(prefill.readings.keep, name)
            self.hooks.after(self.structure.projection(layer - 1, name), keep)
        if not prefill.cuts.reads_attention(layer):
            return

        def take(call: Call) -> None:
            started = self.now()
            with torch.no_grad():
                prefill.take_attention(layer, call)
            self.select_seconds += self.now() - started

        module = self.structure.attention_module(layer - 1)
        self.hooks.around(Tap(module, self.structure.attention, take))

    def hook_layers(self, first: int, enter: Callable[..., tuple[Args, Kwargs]]) -> None:
        """Calls `enter(number, module, args, kwargs)` before every layer from `first` on."""
        for number in range(first, len(self.structure.layers)):
            self.hooks.before(self.structure.layers[number], functools.partial(enter, number))

    def timed_cut(self, prefill: Prefill, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Cuts; gives the states back, those of kept tokens with what was merged into them."""
        started = self.now()
        with torch.no_grad():
            hidden = prefill.cut(layer, hidden)
        self.select_seconds += self.now() - started
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
            self.hook_layers(first, functools.partial(self.continue_layer, continued))
        if continued.replace_input:
            given["attention_mask"] = continued.input_mask()
        return given

    def continue_layer(
        self, continued: Continued, number: int, module: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        given, hidden = self.read_layer(number, args, kwargs)
        return self.write_layer(number, args, continued.change(number, given, hidden))

    def end(self, module: nn.Module, args: Args, kwargs: Kwargs, output: object) -> None:
        """Takes the layer hooks off; after a prefill, writes the trace and marks the cache."""
        self.hooks.remove()
        prefill, self.running = self.running, None
        if prefill is None or output is None:  # None: the forward raised
            return
        seconds = {
            "vision": self.encoding.seconds,
            "select": self.select_seconds,
            "prefill": self.now() - self.started,
        }
        self.encoding.seconds = 0.0
        prefill.end(seams.output_cache(output))
        self.trace.seconds = seconds
