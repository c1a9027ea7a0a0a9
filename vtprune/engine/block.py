"""All hooks of one `pruning` block, put on and taken off together; every prompt is planned here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from vtprune.engine.attention_mask import read_prompts
from vtprune.engine.decoder import DecoderHooks
from vtprune.engine.hooks import ALL_THREADS, LOCK, Hooks, ThreadState, this_thread, threads_before
from vtprune.engine.inputs import PreparedInputs
from vtprune.engine.kv_cache import cache_length, pruned_cache
from vtprune.engine.plan import PlannedBatch, PruningPlan, plan_batch
from vtprune.engine.position_ids import RopeDeltas
from vtprune.engine.refusals import (
    refuse_blocks,
    refuse_columns,
    refuse_compiling,
    refuse_copy,
    refuse_embeds,
    refuse_lone_placeholders,
    refuse_missing_times,
    refuse_past,
    refuse_piece,
    warn_of_choosing_anew,
    warn_of_types,
)
from vtprune.engine.vision_encoder import EncoderHooks, with_sizes
from vtprune.models.base import PIXELS
from vtprune.models.batch_layout import lay_out_batch
from vtprune.models.seams import INNER, POSITIONS, Arguments, check_values, find_cache
from vtprune.tokens.units import FullSizeCounts

Args = tuple[object, ...]
Kwargs = dict[str, object]


class PruningBlock:
    """The hooks of one `pruning` block, and what they share.

    Args:
        plan: the preset for this model.
        modality: what placeholders hold that images and videos share; None: see `pruning`.
        inputs: what is known of the prompts beside the model's inputs.
        own_thread: prune the calls of the thread that makes this; else those of all threads.
    """

    def __init__(
        self,
        plan: PruningPlan,
        modality: str | None,
        inputs: PreparedInputs,
        own_thread: bool,
    ) -> None:
        self.plan, self.modality, self.inputs = plan, modality, inputs
        self.full_size: Sequence[FullSizeCounts] = inputs.pixels.full_size if inputs.pixels else ()
        self.structure, self.inner = plan.structure, plan.structure.inner
        self.state = ThreadState()
        self.encoders = EncoderHooks(plan, self.state, modality, inputs)
        self.decoder = DecoderHooks(plan, self.state, inputs.streamed)
        self.rope_deltas = RopeDeltas(self.inner)
        self.hooks, self.hooks_of_all = (
            Hooks(this_thread() if own_thread else ALL_THREADS),
            Hooks(ALL_THREADS),
        )

    def attach(self) -> None:
        """Put the hooks on."""
        with LOCK:  # so that of two threads' blocks that refuse each other one is opened
            refuse_blocks(threads_before(self.inner), self.hooks.thread)
            self.hooks.before(self.inner, self.plan_forward)
            self.encoders.attach(self.hooks)
            self.hooks.before(self.structure.model, self.check_arguments)
            self.decoder.attach(self.hooks)
            self.rope_deltas.attach(self.structure.model, self.hooks_of_all)
            for module in dict.fromkeys((self.inner, self.structure.model)):  # Omni: each its own
                if hasattr(module, POSITIONS):
                    self.hooks.replace(module, POSITIONS, self.locate)

    def detach(self) -> None:
        """Take everything off; the model is as it was found.

        What runs in other threads at that moment keeps the hooks of its forward up to the end.
        """
        self.state.hooks.remove()
        self.hooks.remove()
        self.hooks_of_all.remove()

    def check_arguments(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Refuse arguments of the outer model, the one with the output head."""
        refuse_columns(kwargs)

    def locate(self, give: Callable[..., object], *args: object, **kwargs: object) -> object:
        """Return the positions that the model gives; refuse videos without their times."""
        try:
            return give(*args, **kwargs)
        except TypeError as error:
            refuse_missing_times(
                self.structure.model_type, Arguments(give).bind(args, kwargs), error
            )
            raise

    def plan_forward(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Plan the cuts of a forward of the inner model, if it is a prompt with visual tokens."""
        state = self.state
        state.batch = None
        refuse_compiling()
        refuse_copy(module, self.inner)
        ids = kwargs.get("input_ids")
        if isinstance(ids, torch.Tensor) and ids.shape[1] < 2:
            return  # decoding: nothing to see, and no time to lose
        arguments = self.structure.seams.inner
        given = arguments.bind(args, kwargs)
        check_values("the inner model", given, INNER, arguments.names)
        with_pixels = {PIXELS[name] for name in PIXELS if given.get(name) is not None}
        encoded = given.get("mm_encoder_outputs") or {}
        assert isinstance(encoded, Mapping)
        modalities = {name for name, features in encoded.items() if features is not None}
        modalities |= with_pixels
        ids = given.get("input_ids")
        if not isinstance(ids, torch.Tensor):
            refuse_embeds(modalities, given.get("inputs_embeds"))
            return
        if ids.shape[1] < 2:
            return  # decoding
        if not modalities:
            refuse_lone_placeholders(self.structure, ids, given)
            return
        if with_pixels:  # encoded inside this forward, so not recorded yet
            state.calls |= dict.fromkeys(with_pixels, with_sizes(given))
        vision = {name: noted for name, noted in state.calls.items() if name in modalities}
        refuse_piece(cache_length(find_cache("the model", given)), vision, state.prefilled)
        state.prefilled = vision
        self.warn_of_prompt(ids, given)
        state.batch, state.modalities = self.plan_prompts(ids, given, vision), tuple(modalities)

    def warn_of_prompt(self, ids: torch.Tensor, given: Kwargs) -> None:
        """Warn of inputs that are missing, and of choices that a growing prompt changes."""
        trace, state = self.plan.trace, self.state
        trace.warn(warn_of_types(self.structure, given))
        cached = find_cache("the model", given) is not None or given.get("use_cache") is not False
        before, state.uncached = state.uncached, None if cached else ids
        trace.warn(warn_of_choosing_anew(self.plan.preset.question_aware_methods(), before, ids))

    def plan_prompts(
        self, ids: torch.Tensor, given: Kwargs, vision: Mapping[str, Mapping[str, object]]
    ) -> PlannedBatch:
        """Lay out the visual tokens of prompts and plan their cuts.

        Args:
            ids: (B, S).
            given: the arguments of the inner model, by name.
            vision: modality -> the arguments of its encoder's call.
        """
        cache = find_cache("the model", given)
        past = cache_length(cache)
        ids, valid = read_prompts(ids, given.get("attention_mask"), past)
        layouts, warnings = lay_out_batch(
            self.structure, ids, valid, vision, self.modality, self.inputs.media
        )
        for warning in warnings:
            self.plan.trace.warn(warning)
        if past:
            refuse_past(self.structure, pruned_cache(cache))
        selection = self.encoders.select_pixels()
        dropped = None if selection is None else selection.dropped_from(layouts)
        planned = plan_batch(self.plan, layouts, valid, past, dropped, self.full_size)
        if selection is not None:
            planned.trace.encoded = selection.encoded()
        return planned
