"""Prunes inside an unpatched transformers model: `pruning`, the block in which its hooks are on.

Where to look, in the order in which a prompt passes:

    plan                a preset, resolved for a model and then for a batch: what is cut where
    inputs              what whoever made the prompts knows of them beyond the tensors
    vision_encoder      the calls of the encoders; pixel_selection drops frames and tiles before
    tower_attention     what tokens receive of their vision tower's attention
    decoder             the hooks on the decoder and its layers
    prefill             one forward over prompts: its cuts, and the trace of them
    sequence            what is left of the prompts, and the arguments that fit it
    readings            what methods read of the model: states and attention
    packing, attention_mask, position_ids    of a shortened sequence
    kv_cache            the cache after a cut; decoding goes on from it
    refusals            what is refused, and what a user is warned of
    hooks               hooks and replaced methods, for a thread or for all: the only ones
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from vtprune.engine.attention_mask import valid_columns
from vtprune.engine.decoder import DecoderHooks
from vtprune.engine.hooks import (
    ALL_THREADS,
    LOCK,
    Hooks,
    ThreadState,
    this_thread,
    threads_before,
)
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
    refuse_past,
    refuse_pixels,
    warn_of_choosing_anew,
    warn_of_types,
)
from vtprune.engine.trace import Trace
from vtprune.engine.vision_encoder import EncoderHooks
from vtprune.errors import ModelError
from vtprune.models.base import PIXELS
from vtprune.models.batch_layout import lay_out_batch
from vtprune.models.seams import INNER, check_values, find_cache
from vtprune.models.structure import find_structure
from vtprune.preset import Keep, Preset, load_preset, override
from vtprune.preset.calibration import Calibration
from vtprune.tokens.layout import MODALITIES
from vtprune.tokens.units import FullSizeCounts

THREADS = ("all", "own")
Args = tuple[object, ...]
Kwargs = dict[str, object]


@contextmanager
def pruning(
    model: nn.Module,
    preset: str | Path | Mapping[str, object] | Preset | None = None,
    keep: Keep | None = None,
    seed: int | None = None,
    *,
    method: str | None = None,
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
    modality: str | None = None,
    calibration: Calibration | None = None,
    threads: str = "all",
    inputs: PreparedInputs | None = None,
) -> Iterator[Trace]:
    """Drop visual tokens in every forward of `model` inside the block, and only there.

    Calls at once from several threads give what each gives alone.

    Example:
        >>> with vtprune.pruning(model, preset="balanced", keep=0.3) as trace:
        ...     output = model.generate(**inputs)  # from the model's own processor
        >>> [(stage.layer, stage.method, stage.after) for stage in trace.stages]

    Args:
        model: any supported transformers model, loaded by the caller, left as it was found; or
            what holds one, such as a PEFT model: both are pruned, whichever is called.
        preset: packaged name, path, mapping in the preset schema, or a Preset; None: "balanced".
        keep: layer average of the kept fraction, for all modalities or by modality.
        seed: of all random choices; None: the preset's.
        method: replaces the preset's stages by one free stage of this method, cutting at `at`.
        at: the place of that stage; None: the method's own.
        options: of that stage, or of every stage whose method has such an option.
        modality: what placeholders hold that images and videos share; None: images, unless the
            model's inputs tell.
        threads: whose calls are pruned. "all": those of every thread, so that generation can run in
            a thread of its own while a streamer is read; no other block may be open on the model.
            "own": those of the thread that opens the block; others can open such blocks too, each
            with its own preset, and threads without one see the unpruned model.
        calibration: where `ecl` and `horizon` are; None: the packaged one of this model.
        inputs: what the maker of the model's inputs knows of them, which stages at `pixels` need;
            None: only what the inputs say.

    Yields:
        The trace, filled by each prefill; after calls at once, by the prefill that ended last.

    Raises:
        ModelError: a model or a case that can't be pruned, with the reason.
        PresetError: a preset that is not valid or a keep that can't be reached.
    """
    wanted = override(load_preset(preset), keep, method, at, options, seed)
    if modality not in (None, *MODALITIES):
        raise ModelError(f"modality {modality!r} is not one of {', '.join(MODALITIES)}")
    if threads not in THREADS:
        raise ModelError(f"threads {threads!r} is not one of {', '.join(THREADS)}")
    inputs = inputs or PreparedInputs()
    refuse_pixels(wanted, inputs.pixels)
    trace = Trace()
    plan = PruningPlan(wanted, find_structure(model), calibration, trace)
    block = _Block(plan, modality, inputs, this_thread() if threads == "own" else ALL_THREADS)
    try:
        block.attach()
        yield trace
    finally:
        block.detach()


class _Block:
    """The hooks of one `pruning` block, and what they share.

    Args:
        plan: the preset for this model.
        modality: what placeholders hold that images and videos share; None: see `pruning`.
        inputs: what is known of the prompts beside the model's inputs.
        thread: whose calls are pruned.
    """

    def __init__(
        self,
        plan: PruningPlan,
        modality: str | None,
        inputs: PreparedInputs,
        thread: object | None,
    ) -> None:
        self.plan, self.modality, self.inputs = plan, modality, inputs
        self.whole: Sequence[FullSizeCounts] = inputs.pixels.whole if inputs.pixels else ()
        self.structure, self.inner = plan.structure, plan.structure.inner
        self.state = ThreadState()
        self.encoders = EncoderHooks(plan, self.state, modality, inputs)
        self.decoder = DecoderHooks(plan, self.state)
        self.rope_deltas = RopeDeltas(self.inner)
        self.hooks, self.hooks_of_all = Hooks(thread), Hooks(ALL_THREADS)

    def attach(self) -> None:
        """Put the hooks on."""
        with LOCK:  # so that of two threads' blocks that refuse each other one is opened
            refuse_blocks(threads_before(self.inner), self.hooks.thread)
            self.hooks.before(self.inner, self.plan_forward)
            self.encoders.attach(self.hooks)
            self.hooks.before(self.structure.model, self.check_arguments)
            self.decoder.attach(self.hooks)
            self.rope_deltas.attach(self.structure.model, self.hooks_of_all)

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
        for modality in with_pixels:  # encoded inside this forward, so not recorded yet
            state.calls[modality] = given
        vision = {name: noted for name, noted in state.calls.items() if name in modalities}
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
        batch, length = ids.shape
        valid = valid_columns(given.get("attention_mask"), batch, length, past)
        layouts, warnings = lay_out_batch(
            self.structure, ids.cpu(), valid, vision, self.modality, self.inputs.media
        )
        for warning in warnings:
            self.plan.trace.warn(warning)
        if past:
            refuse_past(self.structure, pruned_cache(cache))
        selection = self.encoders.select_pixels()
        dropped = None if selection is None else selection.dropped_from(layouts)
        planned = plan_batch(self.plan, layouts, valid, past, dropped, self.whole)
        if selection is not None:
            planned.trace.encoded = selection.encoded()
        return planned
