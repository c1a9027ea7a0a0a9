"""What can't be pruned rightly and is refused, and what a user is warned of in a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING

import torch
from torch import nn

from vtprune.engine.hooks import ALL_THREADS, this_thread
from vtprune.engine.inputs import PixelView
from vtprune.engine.kv_cache import PrunedCache, pruned_cache
from vtprune.engine.sequence import SequenceState
from vtprune.errors import ModelError, PresetError
from vtprune.models.batch_layout import missing_input
from vtprune.models.seams import BESIDE_PIXELS, ENCODERS, ROPE_INPUTS, Arguments, unknown
from vtprune.models.structure import Structure
from vtprune.preset import Preset
from vtprune.tokens.layout import MODALITIES

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from vtprune.models.base import StreamedVideo

TYPE_IDS = ("mm_token_type_ids", "token_type_ids")
"""What processors give to tell a model which tokens are visual."""


def refuse_columns(given: Mapping[str, object]) -> None:
    """Refuse arguments of the model that name columns, which are fewer after a cut."""
    if given.get("labels") is not None:
        raise ModelError(
            "labels were given, but a pruned prompt has fewer positions than labels",
            "compute the loss from the logits of the answer, without labels",
        )
    if isinstance(given.get("logits_to_keep"), torch.Tensor):
        raise ModelError(
            "logits_to_keep names columns, which are not the same after a cut",
            "give a number: the last positions are always there",
        )


def refuse_compiling() -> None:
    """Refuse a forward that is being compiled."""
    if torch.compiler.is_compiling():
        raise ModelError(
            "this model's forward is being compiled, and hooks do not run in a compiled graph",
            "pass disable_compile=True to generate",
        )


def refuse_copy(module: nn.Module, model: nn.Module) -> None:
    """Refuse a copy of the hooked model: its layers are others than those that would be cut."""
    if module is not model:
        raise ModelError(
            "this is a copy of a model that was being pruned when it was made (a deep copy, or a "
            "replica of torch.nn.DataParallel)",
            "make copies outside the block, and prune each in its own; use one process a device "
            "instead of DataParallel",
        )


def refuse_embeds(modalities: set[str], embeds: object) -> None:
    """Refuse a prompt without ids, but not one more state of an answer."""
    if modalities or (isinstance(embeds, torch.Tensor) and embeds.shape[1] > 1):
        raise ModelError(
            "the prompt was given as inputs_embeds, which don't say what is visual",
            "pass input_ids and pixel values",
        )


def refuse_lone_placeholders(
    structure: Structure, ids: torch.Tensor, given: Mapping[str, object]
) -> None:
    """Refuse visual tokens without pictures: a piece of a prompt that was cut up.

    Further tokens on a cache that was pruned may hold a copied placeholder; that is text.
    """
    if pruned_cache(given.get("cache")) is not None:
        return
    placeholders = torch.tensor(sorted(structure.placeholder_ids()), device=ids.device)
    if bool(torch.isin(ids, placeholders).any()):
        raise ModelError(
            "this forward has visual tokens, but no pictures for them",
            "prefill in one piece: leave prefill_chunk_size unset",
        )


def refuse_missing_inputs(
    structure: Structure,
    modality: str,
    encoder: Arguments,
    given: Mapping[str, object],
    error: Exception,
) -> None:
    """Refuse pixels that came without what the encoder needs beside them, such as their places.

    Args:
        encoder: its arguments.
        given: those that it got.
        error: that it raised.
    """
    missing = [name for name in encoder.order if name in BESIDE_PIXELS and given.get(name) is None]
    if isinstance(error, ValueError):  # of which most are about the pixels themselves
        missing = [name for name in missing if name in str(error)]
    if missing:
        raise missing_input(structure.model_type, modality, " or ".join(missing)) from error


def refuse_missing_times(model_type: str, given: Mapping[str, object], error: Exception) -> None:
    """Refuse a video that came without the seconds of its steps (Qwen-Omni).

    Args:
        given: the arguments of the function that gives positions.
        error: that it raised.
    """
    for name, argument in ROPE_INPUTS.items():
        if given.get("video_grid_thw") is not None and given.get(argument, error) is None:
            raise missing_input(model_type, "video", name) from error


def refuse_piece(past: int, vision: Mapping[str, object], before: Mapping[str, object]) -> None:
    """Refuse a further piece of a prompt whose pictures were encoded once for all pieces.

    Args:
        past: columns of the cache.
        vision: modality -> its encoder's call.
        before: the same, of the forward before.
    """
    if past and any(before.get(name) is noted for name, noted in vision.items()):
        raise ModelError(
            "this forward has a piece of a prompt, of whose visual tokens others came before",
            "prefill in one piece: leave prefill_chunk_size unset",
        )


def refuse_past(structure: Structure, pruned: PrunedCache | None) -> None:
    """Refuse new pictures on a cache that they can't go on with."""
    if pruned is not None and pruned.renumbered:
        raise ModelError(
            "new pictures on top of a cached conversation whose positions were renumbered",
            "ask about them in a new conversation, or leave positions: keep",
        )
    if structure.two_way:
        raise ModelError(
            f"{structure.model_type}: new pictures on top of a cached conversation",
            "ask about them in a new conversation",
        )


def refuse_windows(structure: Structure, length: int, cache: Cache | None) -> None:
    """Refuse windows that are not known, or that can't be masked in a prompt of `length` columns.

    A window counts original columns. Flash attention's own counts kept tokens.
    """
    for number, layer in enumerate(cache.layers if cache else ()):
        if getattr(layer, "is_sliding", False) and structure.window(number) is None:
            raise unknown(f"layer {number} of the cache has a sliding window that its config hides")
    window = structure.narrowest_window
    if window is not None and length > window and "flash" in structure.attention:
        raise ModelError(
            f"the prompt has {length} tokens, and layers of this model see the last {window} "
            f"only (sliding window), which {structure.attention} counts in kept tokens: dropping "
            "tokens would widen what they see",
            "load the model with attention sdpa or eager",
        )


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


def refuse_pixels(preset: Preset, pixels: PixelView | None) -> None:
    """Refuse a stage before the vision tower where there are no pixels to compare.

    Raises:
        PresetError: with the way out.
    """
    way_out = (
        "give the media: vtprune.answer(model, [(file, question)], ...) or vtprune ask; or cut at "
        "the input"
    )
    stages = [stage for name in MODALITIES if (stage := preset.downsampling_stage(name))]
    if stages and (pixels is None or not pixels.full_size):
        raise PresetError(
            f"at: pixels: {stages[0].method} makes smaller pictures or takes fewer frames, and "
            "prepared inputs hold them as they are",
            way_out,
        )
    stage = preset.frame_and_tile_stage()
    if stage is not None and pixels is None:
        raise PresetError(
            f"at: pixels: {stage.method} compares the pixels of the media, and prepared inputs "
            "hold them normalised and cut up",
            way_out,
        )


def leave_out_optional(
    preset: Preset,
    pixels: PixelView | None,
    structure: Structure | None = None,
    streamed: bool = False,
) -> tuple[Preset, str]:
    """Return a preset without the optional stages that can't run, and a warning; "" for none.

    Args:
        structure: of the model, once it is known.
        streamed: a video was encoded in segments.
    """
    stage = preset.frame_and_tile_stage()
    if stage is None or not stage.optional:
        return preset, ""
    if pixels is None:
        why = "prepared inputs hold no pixels to compare"
    elif streamed:
        why = "the frames of a streamed video are never there at once"
    elif structure is not None and not structure.family.sees_steps_apart:
        why = f"whether {structure.model_type} encodes frames one by one is not known"
    else:
        return preset, ""
    warning = f"{preset.label}: the optional stage at pixels ({stage.method}) is left out: {why}"
    return preset.without_optional_stages(), warning


def refuse_unknown_tower(structure: Structure) -> None:
    """Refuse to leave frames out before a tower of which it is not known that it sees each alone.

    Raises:
        ModelError: its family does not say so.
    """
    if structure.family.sees_steps_apart:
        return
    if "video" not in structure.placeholders() and not hasattr(structure.inner, ENCODERS["video"]):
        reason = "takes pictures alone, of which its processor does not tell which tile shows what"
    else:
        reason = "has a vision tower of which it is not known that it looks at each frame by itself"
    raise ModelError(
        f"{structure.model_type} {reason}, so nothing can be left out before the tower",
        "cut at the input, or give smaller pictures or fewer frames: --method downsample",
    )


# -- warnings ------------------------------------------------------------------------------------


def warn_of_types(structure: Structure, given: Mapping[str, object]) -> str:
    """Return a warning where the ids are missing that tell a model which tokens are visual.

    Without them transformers (5.17 to 5.24) goes on in silence: generation counts positions as in
    text, and masks see no pictures.

    Args:
        given: the arguments of the multimodal model, by name.

    Returns:
        "" where nothing is missing.
    """
    takes = structure.seams.inner
    name = next((name for name in TYPE_IDS if name in takes), None)
    if name is None or any(given.get(one) is not None for one in TYPE_IDS):
        return ""
    if structure.one_dimensional:
        # Whether another class needs them for its masks is not known.
        lost = "its pictures are masked like text" if structure.family.listed else ""
    else:
        lost = "" if _in_space(given.get("position_ids")) else "its pictures are placed like text"
    if not lost:
        return ""
    return (
        f"{name} is missing: {lost}, and answers are worse, pruned or not; pass what the model's "
        f"processor gives (return_{name}=True)"
    )


def _in_space(positions: object) -> bool:
    """Return whether position ids, (3 or 4, B, S), differ in time, row and column."""
    if not isinstance(positions, torch.Tensor) or positions.dim() != 3:
        return False
    time, row, column = positions[-3:]
    return not (torch.equal(time, row) and torch.equal(row, column))


def warn_of_positions(
    structure: Structure,
    sequence: SequenceState,
    position_ids: object,
    streamed: StreamedVideo | None = None,
) -> str:
    """Return a warning where a prompt reaches past the positions that a model was made for.

    Args:
        sequence: the prompts, after any cut at the input.
        position_ids: that the decoder is given for them; None: columns, those in the cache first.
        streamed: the one prompt's video, if that was encoded in segments.

    Returns:
        "" where it does not.
    """
    limit, past = structure.num_positions, sequence.past.columns
    end = past + max(len(row) for row in sequence.columns)
    visual = [len(layout) for layout in sequence.original_layouts]
    length = past + sequence.original_length
    if streamed is not None:  # its positions are those of the whole video
        length += len(streamed.layout) - visual[0]
        visual = [len(streamed.layout)]
    # A picture, and a video whose steps count one each, is no longer than its tokens are many.
    inner = structure.seams.inner
    timed = "second_per_grid_ts" in inner or any(name in inner for name in ROPE_INPUTS)
    videos = any(len(layout.of_modality("video")) for layout in sequence.original_layouts)
    if limit is None or (length <= limit and not (timed and videos)):
        return ""
    if isinstance(position_ids, torch.Tensor):
        spatial = position_ids[-3:] if position_ids.dim() == 3 else position_ids
        end = int(spatial.amax()) + 1
    if end <= limit:
        return ""
    return (
        f"the prompt has {end:,} positions, and this model was made for {limit:,}: answers may be "
        f"wrong, pruned or not; {_way_out(structure, sequence, visual, limit - past)}"
    )


def _way_out(
    structure: Structure, sequence: SequenceState, visual: Sequence[int], room: int
) -> str:
    """Say what of `visual` tokens of each prompt would fit into `room` positions."""
    if not structure.one_dimensional:
        return "fewer frames, or smaller pictures, fit"
    keep = fitting_keep(
        [
            len(row) - len(left)
            for row, left in zip(sequence.columns, sequence.layouts, strict=True)
        ],
        visual,
        room,
    )
    if keep <= 0:
        return "the text alone does not fit: give less of it"
    return (
        f"keep {keep:g} or less fits in a stage at the input with positions: renumber, and so do "
        "fewer frames or tiles (other cuts leave positions as they are)"
    )


def fitting_keep(text: Sequence[int], visual: Sequence[int], room: int) -> float:
    """Return the largest keep, of two decimals, with which every sample fits into `room`.

    Args:
        text: tokens of every sample that are not visual.
        visual: its visual tokens before any cut.
    """
    fits = [(room - t) / v for t, v in zip(text, visual, strict=True) if v]
    return math.floor(100 * min(fits, default=0.0)) / 100


def warn_of_choosing_anew(
    methods: Sequence[str], before: torch.Tensor | None, ids: torch.Tensor
) -> str:
    """Return a warning where a method chooses again for a prompt that has grown by its answer.

    Without a cache every step of generation is a prefill of the prompt and the answer so far, in
    which a method that reads the question finds the answer too.

    Args:
        methods: of the stages, that read the question.
        before: (B, S) ids of the last prefill without a cache; None: there was none.
        ids: (B, S + n) of this one.

    Returns:
        "" where this is another prompt.
    """
    if not methods or before is None or len(before) != len(ids):
        return ""
    length = before.shape[1]
    if ids.shape[1] <= length or not torch.equal(ids[:, :length], before):
        return ""
    return (
        f"without a cache (use_cache=False) {' and '.join(methods)} choose at every step anew, by "
        "the question and the answer so far: what is kept changes within the answer; with a cache "
        "the choice for the prompt stays"
    )
