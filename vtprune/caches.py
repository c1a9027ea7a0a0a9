"""What a shortened cache needs: how long it is, which keys are valid, and masks that fit it."""

from __future__ import annotations

import copy
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch

from vtprune.models.structure import Structure
from vtprune.packing import join_valid

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
    """

    valid: list[torch.Tensor | None]
    first_cut: int | None
    offset: int
    shifts: list[torch.Tensor | None] = field(default_factory=list)

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
    if cache is None or not hasattr(cache, "get_seq_length"):
        return 0
    return int(cache.get_seq_length())


def layer_length(cache: object, layer: int) -> int:
    """Keys that one layer of a cache holds."""
    layers = getattr(cache, "layers", ())
    return int(layers[layer].get_seq_length()) if layer < len(layers) else 0


def mark_cache(cache: object, state: CacheState) -> None:
    """Ties what was cut to the cache, for the forwards that go on with it.

    Where the input was cut, the cache answers with the length of the original prompt when it is
    asked for its length without a layer: generation places new tokens by that answer. Emptying
    the cache ends both.
    """
    cache._vtprune = state  # type: ignore[attr-defined]
    cache.reset = types.MethodType(_reset, cache)  # type: ignore[attr-defined]
    if state.offset:
        cache.get_seq_length = types.MethodType(_source_length, cache)  # type: ignore[attr-defined]


def cache_state(cache: object) -> CacheState | None:
    """What was tied to a cache; None where it is an ordinary one."""
    state = getattr(cache, "_vtprune", None)
    return state if isinstance(state, CacheState) else None


def unmark_cache(cache: object) -> None:
    """Makes a cache an ordinary one again."""
    for name in ("_vtprune", "reset", "get_seq_length"):
        getattr(cache, "__dict__", {}).pop(name, None)


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
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config = structure.decoder_config
    windowed = structure.window(layer) is not None
    create = create_sliding_window_causal_mask if windowed else create_causal_mask
    mask = None if valid is None else valid.to(hidden.device)
    return create(config, hidden, mask, cache, layer_idx=layer)  # type: ignore[arg-type]


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
        """The decoder's arguments with layer 0's positions, and notes the original ones.

        Only where something was renumbered.
        """
        if not self.state.renumbered:
            return given
        positions = given.get("position_ids")
        if not isinstance(positions, torch.Tensor):
            past = cache_length(self.cache)
            positions = torch.arange(past, past + length, device=self.device)[None]
        self.positions = positions
        return {**given, "position_ids": self.shifted(0)}

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
            changed["position_embeddings"] = self.built[key]
            if "position_ids" in changed:
                changed["position_ids"] = self.shifted(layer)
        return changed

    def needed(self) -> bool:
        """Whether layers past a cut would get a mask that does not fit their keys."""
        first = self.state.first_cut
        if first is None:
            return False
        plain = self.structure.attention == "sdpa" or "flash" in self.structure.attention
        growing = not getattr(self.cache, "is_compileable", False)
        windows = self.structure.narrowest_window is not None
        unmasked = self.new is None and all(one is None for one in self.state.valid)
        return not (plain and growing and unmasked and self.shape[1] == 1 and not windows)

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
    cache = given["past_key_values"]
    return Continued(state, structure, cache, new, shape, embeds.device)
