"""How many visual tokens fit into a model's positions, or into the free memory of its device."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vtprune.device import free_memory
from vtprune.errors import ModelError, PresetError, format_bytes
from vtprune.models import cost
from vtprune.models.layer_cost import measure_decoder
from vtprune.models.structure import Structure
from vtprune.tokens.schedule import Place

ANSWER_TOKENS = 256  # room for an answer, where nobody says how long it may be
HEADROOM = 0.8  # of the free memory; the rest is fragmentation and other users
FEWER = "give fewer frames or tiles"


@dataclass(frozen=True)
class Fitting:
    """How many visual tokens of one prompt fit.

    Args:
        tokens: the most that the first cut may leave; all of them where they fit.
        reason: what they fit into, in words.
    """

    tokens: int
    reason: str


@dataclass(frozen=True)
class PromptSize:
    """The tokens of one prompt that need room.

    Args:
        text, visual: at the language model's input.
        answer: that may follow.
        prompts: how many share the memory, as one batch.
    """

    text: int
    visual: int
    answer: int
    prompts: int = 1


def fit_tokens(
    fit: str, structure: Structure, budgets: Sequence[Sequence[Place]], size: PromptSize
) -> Fitting:
    """Return how many visual tokens the first cut may leave.

    Args:
        fit: "context" or "memory".
        budgets: the places of the stages of each.

    Raises:
        PresetError: tokens are over, and no stage cuts at the language model's input.
        ModelError: not one fits, or nothing says what fits.
    """
    free = [[place.layer for place in places if place.keep is None] for places in budgets]
    first = max((min(layers) for layers in free if layers), default=0)
    if fit == "context":
        return fit_context(structure, first, size)
    return fit_memory(structure, first, size, free_memory(structure.device))


def fit_context(structure: Structure, first: int, size: PromptSize) -> Fitting:
    """Return how many visual tokens the model's positions have room for.

    Args:
        first: the layer of the cut.
    """
    positions = structure.num_positions
    if positions is None:
        raise ModelError(
            f"{structure.model_type}: its config does not say how many positions it was made for, "
            "so fit context has nothing to fit",
            "give the number of tokens: --tokens-after 4096",
        )
    room = positions - size.text - size.answer
    parts = f"{positions:,} positions, less {size.text:,} of text and {size.answer:,} of the answer"
    if room < 1:
        raise ModelError(
            f"fit context: no visual token fits: {parts}",
            "give a shorter question or a lower --max-new-tokens",
        )
    if size.visual <= room:
        return Fitting(size.visual, f"all fit: {parts}, leave {room:,}")
    if first > 0:
        raise PresetError(
            f"fit context: the first cut is at layer {first}, and the layers before it see all "
            f"{size.visual:,} visual tokens, where {room:,} fit ({parts})",
            "cut at the language model's input: --at input, or a preset that does",
        )
    if structure.distance_layers:
        raise ModelError(
            f"fit context: {structure.model_type} counts the columns of the original prompt, "
            "whatever is dropped of them",
            FEWER,
        )
    return Fitting(room, f"{parts}, leave {room:,}")


def fit_memory(structure: Structure, first: int, size: PromptSize, free: int) -> Fitting:
    """Return how many visual tokens the KV cache and the prefill have memory for.

    Args:
        first: the layer of the cut; those before it see all tokens.
        free: bytes.
    """
    try:
        shape = measure_decoder(structure.model)
    except cost.CostError as error:
        raise ModelError(
            f"fit memory: {error.message}, so nothing says what a token takes",
            "give the number of tokens: --tokens-after 4096",
        ) from error
    share = int(HEADROOM * free / size.prompts)
    needed = memory_needed(structure, shape, first, size)
    of = f"{format_bytes(share)} of memory" + (" for each prompt" if size.prompts > 1 else "")
    if needed(1) > share:
        raise ModelError(
            f"fit memory: one visual token of {size.visual:,} needs {format_bytes(needed(1))} "
            f"(what comes before the cut, KV cache, prefill), of {of} that are free",
            FEWER,
        )
    if needed(size.visual) <= share:
        return Fitting(size.visual, f"all fit: {format_bytes(needed(size.visual))} of {of}")
    fits = bisect.bisect_right(range(1, size.visual + 1), share, key=needed)
    return Fitting(fits, f"{format_bytes(needed(fits))} for KV cache and prefill, of {of}")


def memory_needed(
    structure: Structure, shape: cost.DecoderShape, first: int, size: PromptSize
) -> Callable[[int], int]:
    """Return a function: visual tokens that the first cut leaves -> bytes of cache and prefill."""
    value = next(structure.model.parameters()).dtype.itemsize
    prompt = size.text + size.visual
    before = 2 * value * shape.hidden * prompt  # features, and the embeddings made of them
    eager = structure.attention == "eager"

    def needed(tokens: int) -> int:
        kept = size.text + tokens
        layers = [prompt] * first + [kept] * (shape.layers - first)
        cached = cost.kv_bytes(shape, [count + size.answer for count in layers], value)
        longest = max(layers)
        running = value * cost.activations(shape) * longest
        if eager:  # scores, and their softmax in float32
            running += (value + torch.float32.itemsize) * shape.heads * longest**2
        return before + cached + running + cost.state_bytes(shape, value)

    return needed
