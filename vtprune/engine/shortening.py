"""What the decoder and its layers are given in place of what was made for the uncut sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch

from vtprune.engine.caches import CacheState, build_mask
from vtprune.engine.packing import Packed, gather, gather_mask, repack
from vtprune.engine.past import Past
from vtprune.engine.positions import Positions
from vtprune.engine.present import Present
from vtprune.errors import ModelError
from vtprune.models.structure import Structure

Kwargs = dict[str, object]


class Shortening:
    """The arguments of one forward, from cut to cut."""

    def __init__(
        self, structure: Structure, present: Present, past: Past, positions: Positions
    ) -> None:
        self.structure, self.present, self.past = structure, present, past
        self.positions = positions
        self.base = present.packed  # what the decoder's layers were prepared for
        self.offset = 0
        self.spans = [(0, present.valid, present.packed.length)]
        self.replaced: dict[object, tuple[object, object]] = {}

    def follow(self, layer: int, renumber: bool, device: torch.device) -> None:
        """Takes note of a cut; `renumber` tells whether it gives new positions."""
        self.spans.append((layer, self.present.valid, self.present.packed.length))
        self.positions.follow(self.present, layer, renumber, device)
        self.replaced.clear()

    # -- the decoder -----------------------------------------------------------------------------

    def inputs(self, given: Kwargs, embeds: torch.Tensor) -> Kwargs:
        """The decoder's arguments after a cut at the input."""
        present, index = self.present, self.present.last_cut.index
        positions = given.get("position_ids")
        if not isinstance(positions, torch.Tensor):
            first = self.past.columns
            positions = torch.arange(first, first + embeds.shape[1], device=embeds.device)[None]
        self.offset = self.base.length - present.packed.length
        self.base = present.packed
        self.spans = self.spans[1:]
        mask = given.get("attention_mask")
        if self.past.columns:
            mask = self.valid_keys(0)
        elif isinstance(mask, Mapping) or (isinstance(mask, torch.Tensor) and mask.dim() == 4):
            mask = gather_mask(mask, present.last_cut)
        else:
            mask = present.valid
        if mask is None and self.past.cache is None:
            # Without mask and cache, gaps in the position ids would be read as packed sequences.
            mask = torch.ones(present.shape, dtype=torch.bool)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            mask = mask.to(embeds.device, torch.long)
        positions = gather(positions, index, dim=positions.dim() - 1)
        if self.positions.now is not None:
            positions = self.positions.now.to(embeds.device)
        return {
            **given,
            "inputs_embeds": gather(embeds, index),
            "position_ids": positions,
            "attention_mask": mask,
        }

    def uncut_inputs(self, given: Kwargs, embeds: torch.Tensor) -> Kwargs:
        """The decoder's arguments without a cut at the input, on a cache that had one."""
        if not self.past.offset:
            return given
        mask = self.valid_keys(0)
        if mask is not None:
            mask = mask.to(embeds.device, torch.long)
        return {**given, "attention_mask": mask}

    # -- its layers ------------------------------------------------------------------------------

    def arguments(self, kwargs: Kwargs, layer: int, hidden: torch.Tensor) -> Kwargs:
        """A layer's arguments for the sequence as it is now.

        Args:
            hidden: (B, n, d) states that enter it.
        """
        changed = dict(kwargs)
        if self.present.packed is not self.base:
            self.change_positions(changed, layer, hidden)
        mask = kwargs.get("attention_mask")
        if self.past.columns or (mask is None and self.present.valid is not None):
            key = ("mask", self.structure.window(layer), self.past.tells(layer))
            changed["attention_mask"] = self.once(key, None, lambda _: self.mask(layer, hidden))
        else:
            changed["attention_mask"] = self.once(id(mask), mask, self.shorten_mask)
        return changed

    def change_positions(self, changed: Kwargs, layer: int, hidden: torch.Tensor) -> None:
        positions = self.positions.now
        if positions is None:
            for name in ("position_embeddings", "position_ids"):
                value = changed.get(name)
                if value is not None:
                    shorten = self.shorten_ids if name == "position_ids" else self.shorten_positions
                    changed[name] = self.once(id(value), value, shorten)
            return
        given, ids = changed.get("position_embeddings"), changed.get("position_ids")
        if given is not None:  # None: a layer without positions (NoPE)
            key = ("rotary", self.structure.rope_type(layer))
            changed["position_embeddings"] = self.once(
                key, None, lambda _: self.rotate_anew(given, ids, layer, hidden, positions)
            )
        if ids is not None:
            changed["position_ids"] = positions

    def rotate_anew(
        self, given: object, ids: object, layer: int, hidden: torch.Tensor, positions: torch.Tensor
    ) -> object:
        """Return a layer's position embeddings for new position ids.

        Args:
            given: those of the sequence that the layer was prepared for.
            ids: its position ids, where the layer is given them.

        Raises:
            ModelError: its position embeddings are made in a way that is not known.
        """
        if isinstance(ids, torch.Tensor):
            made = self.structure.rotary(layer, hidden, ids) if ids.dim() == 2 else None
            if not _equal(made, given):
                raise ModelError(
                    f"positions: renumber: layer {layer} of {self.structure.model_type} takes "
                    "position embeddings that vtprune can't make",
                    "leave positions: keep",
                )
        return self.structure.rotary(layer, hidden, positions)

    def once(self, key: object, value: object, change: Callable[[object], object]) -> object:
        """`change(value)`, worked out once for all layers up to the next cut.

        The value is held, so that its id stays its own.
        """
        if key not in self.replaced:
            self.replaced[key] = (value, change(value))
        return self.replaced[key][1]

    def from_base(self) -> Packed:
        """The sequence as it is now, in the slots that the layers were prepared for."""
        packed = self.once("packed", None, lambda _: repack(self.base, self.present.packed))
        assert isinstance(packed, Packed)
        return packed

    def shorten_positions(self, value: object) -> object:
        """Shorten position embeddings, (..., B or 1, S, D) each."""
        if isinstance(value, tuple):
            return tuple(self.shorten_positions(one) for one in value)
        assert isinstance(value, torch.Tensor)
        return gather(value, self.from_base().index, dim=value.dim() - 2)

    def shorten_ids(self, value: object) -> object:
        """Shorten position ids, (B or 1, S), or (3, B or 1, S): time, row and column."""
        assert isinstance(value, torch.Tensor)
        return gather(value, self.from_base().index, dim=value.dim() - 1)

    def shorten_mask(self, mask: object) -> object:
        short = gather_mask(mask, self.from_base())
        if isinstance(short, torch.Tensor) and short.dim() == 2 and isinstance(mask, torch.Tensor):
            return short.to(mask.device, mask.dtype)
        return short

    def mask(self, layer: int, hidden: torch.Tensor) -> object:
        valid = self.valid_keys(layer)
        return build_mask(self.structure, layer, hidden, valid, self.past.cache)

    def valid_keys(self, layer: int) -> torch.Tensor | None:
        """(B, past + n) bool of a layer's keys in this forward; None where all are valid."""
        return self.past.join(layer, self.present.valid, self.present.shape)

    # -- the cache -------------------------------------------------------------------------------

    def lengths(self, num_layers: int) -> list[int]:
        """Keys that every layer of the cache holds once this forward is in it."""
        spans = [*self.spans, (num_layers, None, 0)]
        return [
            self.past.length(layer) + length
            for (first, _, length), (until, _, _) in pairwise(spans)
            for layer in range(first, until)
        ]

    def cache_state(self, num_layers: int) -> CacheState:
        """What is to be known of the cache once this forward is in it."""
        spans = [*self.spans, (num_layers, None, 0)]
        valid: list[torch.Tensor | None] = []
        for (first, new, length), (until, _, _) in pairwise(spans):
            shape = (self.present.shape[0], length)
            valid += [self.past.join(layer, new, shape) for layer in range(first, until)]
        cuts = [first for first, _, _ in self.spans if first > 0]
        if self.past.first_cut is not None:
            cuts.append(self.past.first_cut)
        offset = self.offset + self.past.offset
        return CacheState(
            valid, min(cuts, default=None), offset, self.positions.by_layer(num_layers)
        )


def _equal(made: object, given: object) -> bool:
    """Whether two position embeddings, tensors or tuples of them, are the same."""
    if isinstance(made, tuple) and isinstance(given, tuple):
        return len(made) == len(given) and all(map(_equal, made, given))
    return (
        isinstance(made, torch.Tensor)
        and isinstance(given, torch.Tensor)
        and made.shape[-2:] == given.shape[-2:]
        and torch.equal(made.expand_as(given), given)
    )
