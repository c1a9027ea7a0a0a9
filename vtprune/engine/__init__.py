"""Prune inside an unpatched transformers model: `pruning`, the block in which its hooks are on.

Where to look, in the order in which a prompt passes:

    block               the hooks of one block; a forward that brings prompts begins there
    plan, fitting       a preset, resolved for a model and then for a batch: what is cut where
    inputs              what whoever made the prompts knows of them beyond the tensors
    vision_encoder      the calls of the encoders; pixel_selection drops frames and tiles before
    encoded_rows, features_on_disk    each prompt's features of a batch, from a cache
    tower_attention     what tokens receive of their vision tower's attention
    decoder             the hooks on the decoder and its layers, also where a cut cache goes on
    prefill             one forward over prompts: its cuts, and the trace of them
    sequence            what is left of the prompts, and the arguments that fit it
    readings            what methods read of the model: states and attention
    packing, attention_mask, position_ids    of a shortened sequence
    kv_cache            the cache after a cut; decoding goes on from it
    decoding            cuts of the cache while an answer is decoded
    refusals            what is refused, and what a user is warned of
    unpruned            a model that can't be pruned, at keep 1
    late_checks         checks that no device is waited for
    hooks               hooks and replaced methods, for a thread or for all: the only ones
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from vtprune.engine.block import PruningBlock
from vtprune.engine.inputs import PreparedInputs
from vtprune.engine.plan import PruningPlan
from vtprune.engine.refusals import leave_out_optional, refuse_pixels
from vtprune.engine.trace import Trace
from vtprune.engine.unpruned import describe_unpruned
from vtprune.errors import ModelError
from vtprune.models.structure import find_structure
from vtprune.preset import Keep, Preset, load_preset, override
from vtprune.preset.calibration import Calibration
from vtprune.tokens.layout import MODALITIES

THREADS = ("all", "own")


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
    tokens: int | None = None,
    tokens_after: int | None = None,
    fit: str | None = None,
    decode_every: int | None = None,
    decode_keep: float | None = None,
    keep_for_turns: float | None = None,
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
        tokens: in place of a keep: the most visual tokens, averaged over the layers.
        tokens_after: in place of a keep: the most that the first cut leaves.
        fit: in place of a keep: what the tokens that the first cut leaves fit into: "context", the
            model's positions with room for an answer of 256 tokens, or "memory".
        decode_every, decode_keep: cut the KV cache after each so many decoded tokens, to this share
            of the visual tokens in it.
        keep_for_turns: share of what is kept for a question that is chosen without it.

    Yields:
        The trace, filled by each prefill; after calls at once, by the prefill that ended last.

    Raises:
        ModelError: a model or a case that can't be pruned, with the reason; at keep 1 a model only
            has a warning.
        PresetError: a preset that is not valid or a keep that can't be reached.
    """
    wanted = override(
        load_preset(preset),
        keep,
        method,
        at,
        options,
        seed,
        tokens,
        tokens_after,
        fit,
        decode_every,
        decode_keep,
        keep_for_turns,
    )
    if modality not in (None, *MODALITIES):
        raise ModelError(f"modality {modality!r} is not one of {', '.join(MODALITIES)}")
    if threads not in THREADS:
        raise ModelError(f"threads {threads!r} is not one of {', '.join(THREADS)}")
    inputs = inputs or PreparedInputs()
    trace = Trace()
    wanted, warning = leave_out_optional(wanted, inputs.pixels)
    refuse_pixels(wanted, inputs.pixels)
    try:
        structure = find_structure(model)
    except ModelError as error:
        if not wanted.keeps_all():
            raise
        describe_unpruned(trace, model, inputs, error)
        yield trace
        return
    trace.warn(warning)
    streamed = inputs.streamed is not None
    wanted, warning = leave_out_optional(wanted, inputs.pixels, structure, streamed)
    trace.warn(warning)
    plan = PruningPlan(wanted, structure, calibration, trace, inputs.answer_tokens)
    block = PruningBlock(plan, modality, inputs, own_thread=threads == "own")
    try:
        block.attach()
        yield trace
        plan.late.do_all()
    finally:
        block.detach()
