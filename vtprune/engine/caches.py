"""What a shortened cache needs: how long it is, which keys are valid, and masks that fit it."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch

from vtprune.engine.packing import join_valid
from vtprune.errors import ModelError
from vtprune.models.seams import check_cache, make_mask, unknown
from vtprune.models.structure import Structure

if TYPE_CHECKING:
    from transformers.cache_utils import Cache, DynamicLayer

Kwargs = dict[str, object]


@dataclass
class CacheState:
    """What the engine has to know about a cache that it shortened.

    Args:
        valid: for every layer the (B, n) bool validity of its keys; None where all are valid.
        first_cut: the first layer that saw a shorter sequence than the decoder was given.
        offset: columns that were dropped at the input.
        shifts: for every layer the (B,) int64 by which its positions are less than the original
            ones; None where they are the original ones.
        last: (..., B or 1) int64 the position of its prompt's last token, until a forward went on
            from it.
        inside: tells whether a forward of the running thread is in a block, which gives it what
            fits the cache; None: nothing is needed.
    """

    valid: list[torch.Tensor | None]
    first_cut: int | None
    offset: int
    shifts: list[torch.Tensor | None] = field(default_factory=list)
    last: torch.Tensor | None = None
    inside: Callable[[], bool] | None = None

    def shift(self, layer: int) -> torch.Tensor | None:
        return self.shifts[layer] if self.shifts else None

    @property
    def shortened(self) -> bool:
        """Whether any layer holds fewer keys than there were columns."""
        return bool(self.offset) or self.first_cut is not None

    @property
    def renumbered(self) -> bool:
        return any(one is not None for one in self.shifts)


def cache_length(cache: object) -> int:
    """Columns of the original prompts that a cache stands for; 0 without one."""
    check_cache(cache)
    return 0 if cache is None else int(cast("Cache", cache).get_seq_length())


def layer_length(cache: object, layer: int) -> int:
    """Keys that one layer of a cache holds."""
    layers = getattr(cache, "layers", ())
    return int(layers[layer].get_seq_length()) if layer < len(layers) else 0


def check_reached(
    given: Cache | None, made: Cache | None, lengths: Sequence[int], use_cache: bool
) -> None:
    """Refuses a forward whose cuts did not reach the cache that goes on from it.

    Args:
        given: the cache that the decoder was called with.
        made: the one in its output.
        lengths: for every layer the keys that it has to hold.
        use_cache: whether the decoder was asked for one.

    Raises:
        ModelError: the cache is another one, or holds other keys.
    """
    if made is None and (given is not None or use_cache):
        raise unknown("the output of the decoder does not hold its cache")
    if given is not None and made is not given:
        raise unknown("the cache in the output of the decoder is not the one that it was given")
    if made is None:
        return
    for layer, length in enumerate(lengths):
        if (held := layer_length(made, layer)) != length:
            raise unknown(
                f"layer {layer} of the cache holds {held} keys after a cut that left {length}"
            )


def refuse_uneven(cache: Cache) -> None:
    """Refuses a cache that was cut between layers, but does not say where.

    Raises:
        ModelError: its layers hold different numbers of keys.
    """
    if grows(cache) and layer_length(cache, 0) != layer_length(cache, len(cache.layers) - 1):
        raise unknown("a cache that was pruned, copied in a way that lost what was cut")


def mark_cache(cache: object, state: CacheState) -> None:
    """Ties what was cut to the cache, for the forwards that go on with it.

    Where the input was cut, the cache answers with the length of the original prompt when it is
    asked for its length without a layer: generation places new tokens by that answer. Emptying
    the cache ends both. A forward outside of blocks, which would go wrong, is refused.
    """
    cache._vtprune = state  # type: ignore[attr-defined]
    cache.reset = types.MethodType(_reset, cache)  # type: ignore[attr-defined]
    if state.offset:
        cache.get_seq_length = types.MethodType(_source_length, cache)  # type: ignore[attr-defined]
    if state.inside is not None:
        cache.update = types.MethodType(_update, cache)  # type: ignore[attr-defined]


def cache_state(cache: object) -> CacheState | None:
    """What was tied to a cache; None where it is an ordinary one."""
    state = getattr(cache, "_vtprune", None)
    if not isinstance(state, CacheState):
        return None
    if cache.reset.__self__ is not cache:  # type: ignore[attr-defined]
        mark_cache(cache, state)  # a shallow copy of the one that was marked
    return state


def unmark_cache(cache: object) -> None:
    """Makes a cache an ordinary one again."""
    for name in ("_vtprune", "reset", "get_seq_length", "update"):
        getattr(cache, "__dict__", {}).pop(name, None)


def grows(cache: object) -> bool:
    """Whether every layer of a cache holds its keys as plain growing tensors."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", ())
    return bool(layers) and all(isinstance(layer, DynamicLayer) for layer in layers)


def can_branch(cache: object) -> bool:
    """Whether every layer of a cache holds all keys in order, as plain growing tensors."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def cache_bytes(cache: Cache) -> int:
    """Of the keys and values that a cache holds."""
    held = [getattr(one, name, None) for one in cache.layers for name in ("keys", "values")]
    return sum(one.nbytes for one in held if isinstance(one, torch.Tensor))


def fork_cache(cache: Cache) -> Cache:
    """A cache that goes on by itself from where another one is, which stays as it is.

    Of growing caches: what they hold is shared until one of them grows, which makes new tensors.
    """
    fork = copy.copy(cache)
    fork.layers = [copy.copy(one) for one in cache.layers]
    unmark_cache(fork)
    state = getattr(cache, "_vtprune", None)
    if isinstance(state, CacheState):
        mark_cache(fork, state)
    return fork


def branch_cache(cache: Cache, layer: int, kept: torch.Tensor) -> Cache:
    """A cache as it would be had a prefill been cut at `layer`; the given one stays as it is.

    What goes on with a branch leaves the others alone: growing makes new tensors.

    Args:
        cache: of a prompt without padding and without a cut; see `can_branch`.
        layer: the first layer that holds the shorter sequence; past the last: nothing is cut.
        kept: (B, n) int64 ascending columns that it and later layers hold. A cache of 1 row is
            branched into B rows.
    """
    length, rows = cache_length(cache), len(kept)
    branch = copy.copy(cache)
    branch.layers = [copy.copy(one) for one in cache.layers]
    for number, one in enumerate(cast("list[DynamicLayer]", branch.layers)):
        for name in ("keys", "values"):
            held: torch.Tensor = getattr(one, name)  # (1, H, S, D)
            if number < layer:
                changed = held.expand(rows, *held.shape[1:])
            else:  # (H, B, n, D) -> (B, H, n, D)
                changed = held[0][:, kept.to(held.device)].transpose(0, 1)
            setattr(one, name, changed)
    if layer < len(branch.layers):
        offset = 0 if layer else length - kept.shape[1]
        state = CacheState([None] * len(branch.layers), layer or None, offset)
        mark_cache(branch, state)
    return branch


def _reset(cache: Cache) -> None:
    unmark_cache(cache)
    cache.reset()


def _update(cache: Cache, *args: object, **kwargs: object) -> object:
    """Add keys and values of a layer.

    Raises:
        ModelError: outside of a block.
    """
    inside = cache._vtprune.inside  # type: ignore[attr-defined]
    if not inside():
        raise ModelError(
            "this cache was pruned in a block that has been left: without one, new tokens would "
            "see the wrong keys",
            "keep the block open until all threads have generated, or go on in a new one",
        )
    return type(cache).update(cache, *args, **kwargs)  # type: ignore[arg-type]


def _source_length(cache: Cache, layer_idx: int | None = None) -> int:
    held = type(cache).get_seq_length(cache, layer_idx or 0)
    if layer_idx is not None or not held:
        return held
    return held + cache._vtprune.offset  # type: ignore[attr-defined]


def build_mask(
    structure: Structure,
    layer: int,
    hidden: torch.Tensor,
    valid: torch.Tensor | None,
    cache: object,
) -> object:
    """A causal mask for one layer, in the form that the model's attention takes.

    Args:
        hidden: (B, n, d) of this forward.
        valid: (B, past + n) bool of the layer's keys, None where all are valid.
        cache: sized by this layer's own length.
    """
    windowed = structure.window(layer) is not None
    mask = None if valid is None else valid.to(hidden.device)
    return make_mask(windowed, structure.decoder_config, hidden, mask, cache, layer)


def is_unmasked(state: CacheState, structure: Structure, cache: object) -> bool:
    """Whether one more token needs no mask: it sees all keys that a layer holds."""
    plain = structure.attention == "sdpa" or "flash" in structure.attention
    windows = structure.narrowest_window is not None
    return plain and grows(cache) and not windows and all(one is None for one in state.valid)


def needs_block(state: CacheState, structure: Structure, cache: object) -> bool:
    """Whether a token that goes on from a cache outside of blocks would go wrong."""
    if state.renumbered or any(one is not None for one in state.valid):
        return True
    return state.first_cut is not None and not is_unmasked(state, structure, cache)


class Continued:
    """Masks and positions of the layers, for a forward on top of a shortened cache."""

    def __init__(
        self,
        state: CacheState,
        structure: Structure,
        cache: object,
        new: torch.Tensor | None,
        shape: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.state, self.structure, self.cache = state, structure, cache
        self.new, self.shape, self.device = new, shape, device
        self.built: dict[object, object] = {}
        self.replace_input = bool(state.offset)
        self.masked_from = state.first_cut if self.needed() else None
        self.positions: torch.Tensor | None = None

    def first_layer(self) -> int | None:
        """The first layer that needs a mask or positions of its own; None where none does."""
        num_layers = len(self.structure.layers)
        own = [n for n in range(num_layers) if self.state.shift(n) is not self.state.shift(0)]
        found = [*own[:1], *([] if self.masked_from is None else [self.masked_from])]
        return min(found, default=None)

    def place(self, given: Kwargs, length: int) -> Kwargs:
        """The decoder's arguments with the positions of layer 0, and notes the original ones."""
        if not self.state.shortened:
            return given
        positions = given.get("position_ids")
        if not isinstance(positions, torch.Tensor):
            past = cache_length(self.cache)
            positions = torch.arange(past, past + length, device=self.device)[None]
        self.check_positions(positions)
        if not self.state.renumbered:
            return {**given, "position_ids": positions}
        self.positions = positions
        return {**given, "position_ids": self.shifted(0)}

    def check_positions(self, positions: torch.Tensor) -> None:
        """Refuses new tokens that are placed inside the prompt, by a cache that is shorter than it.

        Checked once after each prompt: it waits for the device.

        Args:
            positions: (..., B or 1, n) of the new tokens.
        """
        last, self.state.last = self.state.last, None
        if last is None:
            return
        first = positions[..., 0].to(last.device)
        inside = first <= last
        if bool(inside.reshape(-1, inside.shape[-1]).all(0).any()):  # on every axis (mrope)
            raise unknown(
                f"a new token after a pruned prompt is at position {int(first.min())}, inside the "
                "prompt"
            )

    def shifted(self, layer: int) -> torch.Tensor:
        """(B, n) positions of a layer."""
        assert self.positions is not None
        shift = self.state.shift(layer)
        if shift is None:
            return self.positions
        return self.positions - shift.to(self.positions.device)[:, None]

    def change(self, layer: int, kwargs: Kwargs, hidden: torch.Tensor) -> Kwargs:
        """A layer's arguments."""
        changed = dict(kwargs)
        if self.masked_from is not None and layer >= self.masked_from:
            changed["attention_mask"] = self.mask(layer, hidden)
        if self.positions is not None and self.state.shift(layer) is not self.state.shift(0):
            key = ("positions", id(self.state.shift(layer)), self.structure.rope_type(layer))
            if key not in self.built:
                positions = self.shifted(layer)
                self.built[key] = self.structure.rotary(layer, hidden, positions)
            if kwargs.get("position_embeddings") is not None:  # None: a layer without positions
                changed["position_embeddings"] = self.built[key]
            if "position_ids" in changed:
                changed["position_ids"] = self.shifted(layer)
        return changed

    def needed(self) -> bool:
        """Whether layers past a cut would get a mask that does not fit their keys."""
        if self.state.first_cut is None:
            return False
        unmasked = self.new is None and self.shape[1] == 1
        return not (unmasked and is_unmasked(self.state, self.structure, self.cache))

    def valid(self, layer: int) -> torch.Tensor | None:
        """(B, past + n) bool of a layer's keys after this forward."""
        held = layer_length(self.cache, layer)
        return join_valid(self.state.valid[layer], held, self.new, self.shape)

    def input_mask(self) -> torch.Tensor | None:
        """What the decoder gets instead of a mask over the original columns."""
        valid = self.valid(0)
        return None if valid is None else valid.to(self.device, torch.long)

    def mask(self, layer: int, hidden: torch.Tensor) -> object:
        """The mask of a layer past a cut, built once for the layers that share it."""
        key = (id(self.state.valid[layer]), layer_length(self.cache, layer),
               self.structure.window(layer))  # fmt: skip
        if key not in self.built:
            valid = self.valid(layer)
            self.built[key] = build_mask(self.structure, layer, hidden, valid, self.cache)
        return self.built[key]


def continue_from(
    state: CacheState, structure: Structure, given: Kwargs, embeds: torch.Tensor
) -> Continued:
    """What a forward on a shortened cache needs: decoding, or a further turn of text."""
    shape = (embeds.shape[0], embeds.shape[1])
    mask, new = given.get("attention_mask"), None
    if shape[1] > 1 and isinstance(mask, torch.Tensor) and mask.dim() == 2:
        new = mask[:, -shape[1] :].bool().cpu()
        new = None if bool(new.all()) else new
    cache = given["cache"]
    return Continued(state, structure, cache, new, shape, embeds.device)
