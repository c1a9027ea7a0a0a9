"""What can't be pruned rightly, and is refused before anything is cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from vtprune.engine.caches import CacheState, cache_state
from vtprune.errors import ModelError
from vtprune.models.seams import unknown
from vtprune.models.structure import Structure

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


def refuse_columns(given: Mapping[str, object]) -> None:
    """Refuses arguments of the model that name columns, which are fewer after a cut."""
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
    """Refuses a forward that is being compiled."""
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


def refuse_embeds(shown: set[str], embeds: object) -> None:
    """Refuses a prompt without ids, but not one more state of an answer."""
    if shown or (isinstance(embeds, torch.Tensor) and embeds.shape[1] > 1):
        raise ModelError(
            "the prompt was given as inputs_embeds, which don't say what is visual",
            "pass input_ids and pixel values",
        )


def refuse_lone_placeholders(
    structure: Structure, ids: torch.Tensor, given: Mapping[str, object]
) -> None:
    """Refuses visual tokens without pictures: a piece of a prompt that was cut up.

    Further tokens on a cache that was pruned may hold a copied placeholder; that is text.
    """
    if cache_state(given.get("cache")) is not None:
        return
    wanted = torch.tensor(sorted(structure.placeholder_ids()), device=ids.device)
    if bool(torch.isin(ids, wanted).any()):
        raise ModelError(
            "visual tokens without their pictures are in this forward",
            "prefill in one piece: leave prefill_chunk_size unset",
        )


def refuse_past(structure: Structure, state: CacheState | None) -> None:
    """Refuses new pictures on a cache that they can't go on with."""
    if state is not None and state.renumbered:
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
    """Refuses a prompt of `length` columns that is longer than a sliding window of the model.

    A window counts original columns in the model, but kept ones in a shorter cache.
    """
    for number, layer in enumerate(cache.layers if cache else ()):
        if getattr(layer, "is_sliding", False) and structure.window(number) is None:
            raise unknown(f"layer {number} of the cache has a sliding window that its config hides")
    window = structure.narrowest_window
    if window is not None and length > window:
        raise ModelError(
            f"the prompt has {length} tokens, and layers of this model see the last {window} "
            "only (sliding window): dropping tokens would widen what they see",
            "ask with fewer frames or tiles, or with --keep 1",
        )
