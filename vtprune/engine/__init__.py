"""Prunes inside an unpatched transformers model: what its hooks do in one block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from vtprune.engine.caches import (
    cache_length,
    cache_state,
)
from vtprune.engine.cuts import Batch, plan_cuts
from vtprune.engine.decoder import DecoderHooks
from vtprune.engine.encoding import Encoding
from vtprune.engine.hooks import ALL_THREADS, LOCK, Hooks, this_thread, threads_before
from vtprune.engine.inputs import PreparedInputs
from vtprune.engine.packing import valid_columns
from vtprune.engine.plan import Plan
from vtprune.engine.prompt_warnings import warn_of_choosing_anew, warn_of_types
from vtprune.engine.refusals import (
    refuse_columns,
    refuse_compiling,
    refuse_copy,
    refuse_embeds,
    refuse_lone_placeholders,
    refuse_past,
)
from vtprune.engine.thinning import refuse_pixels
from vtprune.engine.thread_state import RopeDeltas, ThreadState
from vtprune.engine.trace import Trace
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
    threads: str = "all",
    calibration: Calibration | None = None,
    inputs: PreparedInputs | None = None,
) -> Iterator[Trace]:
    """Drops visual tokens in every forward of `model` inside the block, and only there.

    Calls at once from several threads give what each gives alone.

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
    resolved = override(load_preset(preset), keep, method, at, options, seed)
    if modality not in (None, *MODALITIES):
        raise ModelError(f"modality {modality!r} is not one of {', '.join(MODALITIES)}")
    if threads not in THREADS:
        raise ModelError(f"threads {threads!r} is not one of {', '.join(THREADS)}")
    inputs = inputs or PreparedInputs()
    refuse_pixels(resolved, inputs.pixels)
    trace = Trace()
    plan = Plan(resolved, find_structure(model), calibration, trace)
    state = ThreadState()
    encoding = Encoding(plan, state, modality, inputs)
    hooks = Hooks(this_thread() if threads == "own" else ALL_THREADS)
    session = _Session(plan, encoding, inputs.pixels.whole if inputs.pixels else (), hooks)
    try:
        session.attach()
        yield trace
    finally:
        session.detach()


class _Session:
    """The hooks of one block, and what they share.

    Args:
        plan: the preset for this model.
        encoding: the calls of its encoders.
        whole: what every prompt would hold if its media had not been made smaller.
        hooks: of the threads whose calls are pruned.
    """

    def __init__(
        self, plan: Plan, encoding: Encoding, whole: Sequence[FullSizeCounts], hooks: Hooks
    ) -> None:
        self.plan, self.encoding, self.whole = plan, encoding, whole
        self.hooks, self.state = hooks, encoding.state
        self.structure, self.inner = plan.structure, plan.structure.inner
        self.decoder = DecoderHooks(plan, self.state)
        self.deltas, self.everywhere = RopeDeltas(self.inner), Hooks(ALL_THREADS)

    def attach(self) -> None:
        """Puts the hooks on."""
        with LOCK:  # so that of two threads' blocks that refuse each other one is opened
            refuse_blocks(threads_before(self.inner), self.hooks.thread)
            self.hooks.before(self.inner, self.see_inputs)
            self.encoding.attach(self.hooks)
            self.hooks.before(self.structure.model, self.see_arguments)
            self.decoder.attach(self.hooks)
            self.deltas.attach(self.structure.model, self.everywhere)

    def detach(self) -> None:
        """Takes everything off; the model is as it was found.

        What runs in other threads at that moment keeps the hooks of its forward up to the end.
        """
        self.state.hooks.remove()
        self.hooks.remove()
        self.everywhere.remove()

    def see_arguments(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        refuse_columns(kwargs)

    def see_inputs(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Notes where visual tokens sit in this forward, if it is a prompt that has any."""
        state = self.state
        state.batch = None
        refuse_compiling()
        refuse_copy(module, self.inner)
        ids = kwargs.get("input_ids")
        if isinstance(ids, torch.Tensor) and ids.shape[1] < 2:
            return  # decoding: nothing to see, and no time to lose
        arguments = self.structure.seams.inner
        given = arguments.bind(args, kwargs)
        check_values("the inner model", given, INNER, arguments.own)
        inside = [PIXELS[name] for name in PIXELS if given.get(name) is not None]
        encoded = given.get("mm_encoder_outputs") or {}
        assert isinstance(encoded, Mapping)
        shown = {name for name, features in encoded.items() if features is not None} | {*inside}
        ids = given.get("input_ids")
        if not isinstance(ids, torch.Tensor):
            refuse_embeds(shown, given.get("inputs_embeds"))
            return
        if ids.shape[1] < 2:
            return  # decoding
        if not shown:
            refuse_lone_placeholders(self.structure, ids, given)
            return
        for modality in inside:  # encoded inside this forward, so not recorded yet
            state.calls[modality] = given
        vision = {name: noted for name, noted in state.calls.items() if name in shown}
        self.warn_of_prompt(ids, given)
        state.batch, state.modalities = self.see_prompt(ids, given, vision), tuple(shown)

    def warn_of_prompt(self, ids: torch.Tensor, given: Kwargs) -> None:
        """Warn of inputs that are missing, and of choices that a growing prompt changes."""
        trace, state = self.plan.trace, self.state
        trace.warn(warn_of_types(self.structure, given))
        cached = find_cache("the model", given) is not None or given.get("use_cache") is not False
        before, state.uncached = state.uncached, None if cached else ids
        trace.warn(warn_of_choosing_anew(self.plan.preset.question_aware_methods(), before, ids))

    def see_prompt(
        self, ids: torch.Tensor, given: Kwargs, vision: Mapping[str, Mapping[str, object]]
    ) -> Batch:
        """Lays out the visual tokens of a prompt and plans its cuts."""
        cache = find_cache("the model", given)
        past = cache_length(cache)
        batch, length = ids.shape
        valid = valid_columns(given.get("attention_mask"), batch, length, past)
        layouts, warnings = lay_out_batch(
            self.structure, ids.cpu(), valid, vision, self.encoding.modality, self.encoding.media
        )
        for warning in warnings:
            self.plan.trace.warn(warning)
        if past:
            refuse_past(self.structure, cache_state(cache))
        thinning = self.encoding.thin()
        gone = None if thinning is None else thinning.gone_of(layouts)
        planned = plan_cuts(self.plan, layouts, valid, past, gone, self.whole)
        if thinning is not None:
            planned.trace.encoded = thinning.encoded()
        return planned


def refuse_blocks(open_for: Set[object], thread: object | None) -> None:
    """Refuse a block where blocks that are open on the model would prune the same calls.

    Args:
        open_for: the threads whose calls those prune; ALL_THREADS is a block for all of them.
        thread: whose calls this one is to prune, likewise.
    """
    if this_thread() in open_for or ALL_THREADS in open_for:
        raise ModelError(
            "this model is being pruned already by an enclosing block, or by another thread's "
            "block for all threads",
            "leave that block first; one preset can hold several stages. For blocks in several "
            'threads at once give each threads="own"',
        )
    if thread is ALL_THREADS and open_for:
        raise ModelError(
            'other threads have blocks with threads="own" open on this model, and this one would '
            "prune their calls too",
            'give threads="own" here as well, or wait until those blocks are left',
        )
