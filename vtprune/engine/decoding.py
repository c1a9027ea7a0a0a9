"""A forward on a cache that was cut: decoding, or a further turn of text."""

from __future__ import annotations

import torch

from vtprune.engine.attention_mask import causal_mask
from vtprune.engine.kv_cache import PrunedCache, cache_length, layer_length
from vtprune.engine.position_ids import given_position_ids, refuse_inside_prompt
from vtprune.models.structure import Structure

Kwargs = dict[str, object]


class Continuation:
    """The masks and position ids of one forward on top of a shortened cache.

    What transformers (5.17 to 5.24) makes for it fits the first layer of each type: masks count
    that layer's keys, and there is one set of position ids for all.

    Args:
        pruned: what was cut of the cache.
        structure: of the model.
        given: the decoder's arguments, by name.
        embeds: (B, n, d) of the new tokens.
    """

    def __init__(
        self, pruned: PrunedCache, structure: Structure, given: Kwargs, embeds: torch.Tensor
    ) -> None:
        self.pruned, self.structure, self.cache = pruned, structure, given["cache"]
        self.shape, self.device = (embeds.shape[0], embeds.shape[1]), embeds.device
        self.new = _valid_tokens(given.get("attention_mask"), self.shape[1])
        self.shared: dict[object, object] = {}  # made once for all layers that are alike
        self.masked_from = pruned.first_cut if self.needs_masks() else None
        self.positions: torch.Tensor | None = None  # the original ones, where layers get others

    def needs_masks(self) -> bool:
        """Return whether layers past a cut would get a mask that does not fit their keys."""
        if self.pruned.first_cut is None:
            return False
        one_token = self.new is None and self.shape[1] == 1
        return not one_token or self.pruned.needs_mask(self.structure, self.cache)

    def first_layer(self) -> int | None:
        """Return the first layer that needs a mask or positions of its own; None: none does."""
        shifts = self.pruned.shifts
        layers = [n for n, shift in enumerate(shifts) if shift is not shifts[0]][:1]
        if self.masked_from is not None:
            layers.append(self.masked_from)
        return min(layers, default=None)

    def decoder_arguments(self, given: Kwargs, embeds: torch.Tensor) -> Kwargs:
        """Return the decoder's arguments: a mask over the keys that layer 0 has, its positions."""
        changed = dict(given)
        if self.pruned.shortened:
            positions = given_position_ids(given, cache_length(self.cache), embeds)
            last, self.pruned.last_positions = self.pruned.last_positions, None
            if last is not None:
                refuse_inside_prompt(positions, last)
            if self.pruned.renumbered:
                self.positions = positions
                positions = self.shifted(0, positions)
            changed["position_ids"] = positions
        if self.pruned.offset:
            valid = self.valid_keys(0)
            changed["attention_mask"] = None if valid is None else valid.to(self.device, torch.long)
        return changed

    def layer_arguments(self, given: Kwargs, layer: int, hidden: torch.Tensor) -> Kwargs:
        """Return a layer's arguments.

        Args:
            given: its own, by name.
            hidden: (B, n, d) states that enter it.
        """
        changed = dict(given)
        if self.masked_from is not None and layer >= self.masked_from:
            changed["attention_mask"] = self.mask(layer, hidden)
        if self.positions is None:
            return changed
        shift = self.pruned.shift(layer)
        if shift is not self.pruned.shift(0):
            positions = self.shifted(layer, self.positions)
            if given.get("position_embeddings") is not None:  # None: a layer without positions
                key = ("rotary", id(shift), self.structure.rope_type(layer))
                if key not in self.shared:
                    self.shared[key] = self.structure.rotary(layer, hidden, positions)
                changed["position_embeddings"] = self.shared[key]
            if "position_ids" in changed:
                changed["position_ids"] = positions
        return changed

    def shifted(self, layer: int, positions: torch.Tensor) -> torch.Tensor:
        """Return the position ids of a layer, (B, n)."""
        shift = self.pruned.shift(layer)
        return positions if shift is None else positions - shift.to(positions.device)[:, None]

    def valid_keys(self, layer: int) -> torch.Tensor | None:
        """Return which of a layer's keys are valid after this forward, (B, past + n); None: all."""
        held = layer_length(self.cache, layer)
        return self.pruned.valid_after(layer, self.new, self.shape, held)

    def mask(self, layer: int, hidden: torch.Tensor) -> object:
        """Return the mask of a layer past a cut."""
        key = (id(self.pruned.valid_in(layer)), layer_length(self.cache, layer),
               self.structure.window(layer))  # fmt: skip
        if key not in self.shared:
            valid = self.valid_keys(layer)
            self.shared[key] = causal_mask(self.structure, layer, hidden, valid, self.cache)
        return self.shared[key]


def _valid_tokens(mask: object, length: int) -> torch.Tensor | None:
    """Return which of several new tokens hold one, (B, n) bool on the CPU; None: all do."""
    if length == 1 or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    valid = mask[:, -length:].bool().cpu()
    return None if bool(valid.all()) else valid
