"""The tokens of one prefill from cut to cut, and the arguments that fit those that are left."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from vtprune.engine.attention_mask import causal_mask, gather_mask, is_prepared
from vtprune.engine.kv_cache import PrunedCache, refuse_padding_on_state
from vtprune.engine.packing import gather, pack, repack
from vtprune.engine.position_ids import given_position_ids, renumber, renumbered_embeddings
from vtprune.errors import ModelError
from vtprune.models.seams import LayerMemory, token_mask
from vtprune.models.structure import Structure
from vtprune.tokens.layout import Layout

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

Kwargs = dict[str, object]


class SequenceState:
    """A batch of prompts as it is now: columns, visual tokens, slots, padding and position ids.

    Columns are those of this forward's input_ids; slots are places in the sequence as it is now.

    Args:
        structure: of the model.
        layouts: of every sample's visual tokens, before any cut.
        valid: (B, S) bool on the CPU: which columns hold a token.
        cache: that the decoder is given; None: it is given none.
        past: what it held before this forward.

    Attributes:
        original_layouts: of every sample's visual tokens, before any cut.
        original_length: columns of the batch before any cut, padding included.
        layouts: of every sample's visual tokens still there.
        columns: for every sample its columns still there, text and visual.
        packed: the columns in the sequence as it is now.
        valid: (B, n) bool of its slots; None where all hold a token.
        last_cut: the sequence as it is now, in the slots of the one before.
        position_ids: (B, n) of the sequence as it is now; None as long as they are the original
            ones.
        first_end: (B, 2) the first position id of every sample and the one after its last, which
            a stage needs that renumbers.
    """

    def __init__(
        self,
        structure: Structure,
        layouts: Sequence[Layout],
        valid: torch.Tensor,
        cache: Cache | None = None,
        past: PrunedCache | None = None,
    ) -> None:
        self.structure, self.cache, self.past = structure, cache, past or PrunedCache()
        self.original_layouts, self.original_length = list(layouts), valid.shape[1]
        self.layouts = list(layouts)
        self.columns = [row.nonzero().squeeze(1) for row in valid]
        # The batch as it came, wherever its padding is.
        self.packed = pack([torch.arange(valid.shape[1])] * len(valid))
        self.valid = None if bool(valid.all()) else valid.clone()
        self.last_cut = self.packed
        self.position_ids: torch.Tensor | None = None
        self.first_end: torch.Tensor | None = None
        self._cut_at_input = False
        self._prepared = self.packed  # what the decoder made its layers' arguments for
        self._left_of_prepared = self.packed
        # From which layer on: validity of the slots, how many, by how much position ids are less.
        self._stretches: list[tuple[int, torch.Tensor | None, int, torch.Tensor | None]] = [
            (0, self.valid, self.packed.length, None)
        ]
        self._shared: dict[object, tuple[object, object]] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(B, n) of the sequence as it is now."""
        return len(self.columns), self.packed.length

    def slots(self, sample: int, columns: torch.Tensor) -> torch.Tensor:
        """Return where a sample's columns are in the sequence as it is now."""
        return self.packed.slots(sample, columns)

    def text_columns(self, sample: int) -> torch.Tensor:
        """Return the columns of a sample's text after its last visual token.

        Raises:
            ModelError: there is none.
        """
        visual = self.original_layouts[sample].columns
        row = self.columns[sample]
        text = row[row > (visual[-1] if len(visual) else -1)]
        if not len(text):
            raise ModelError(
                "this method is question-aware, and no text follows the pictures in the prompt",
                "put the question after the pictures, or use a question-blind method",
            )
        return text

    # -- a cut -----------------------------------------------------------------------------------

    def drop(self, sample: int, dropped: torch.Tensor) -> None:
        """Take tokens, at `dropped` in a sample's layout, out of it and out of its columns.

        They are in the sequence up to the next `end_cut`.
        """
        layout = self.layouts[sample]
        keep = torch.ones(len(layout), dtype=torch.bool)
        keep[dropped] = False
        self.layouts[sample] = layout.take(keep.nonzero().squeeze(1))
        row = self.columns[sample]
        stays = torch.ones(len(row), dtype=torch.bool)
        stays[torch.searchsorted(row, layout.columns[dropped])] = False
        self.columns[sample] = row[stays]

    def end_cut(self, layer: int, renumbers: bool, device: torch.device) -> None:
        """Pack what is left, which the layers from `layer` on get.

        Args:
            renumbers: whether a stage of this cut gives new position ids.
            device: of the position ids.
        """
        left = pack(self.columns)
        if left.valid is not None and self.past.columns:
            refuse_padding_on_state(self.structure, layer)
        self.last_cut = repack(self.packed, left)
        self.packed, self.valid = left, left.valid
        shift = self._stretches[-1][3]
        if renumbers:
            assert self.first_end is not None
            positions, shift = renumber(self.first_end, left)
            self.position_ids = positions.to(device)
        elif self.position_ids is not None:
            self.position_ids = gather(self.position_ids, self.last_cut.index)
        if layer == 0:  # the decoder makes its layers' arguments for what is left
            self._cut_at_input = True
            self._prepared = left
            self._stretches.clear()
        self._left_of_prepared = repack(self._prepared, left)
        self._stretches.append((layer, self.valid, left.length, shift))
        self._shared.clear()

    # -- arguments -------------------------------------------------------------------------------

    def decoder_arguments(self, given: Kwargs, embeds: torch.Tensor) -> Kwargs:
        """Return the decoder's arguments, after a cut at the input if there is one.

        Args:
            embeds: (B, S, d) of the tokens before that cut.
        """
        # A caller's mask has the original columns, of which a cut cache holds fewer.
        first = self.structure.first_with_keys
        if not self._cut_at_input:
            if not self.past.offset:
                return given
            valid = self._valid_keys(first)
            return {**given, "attention_mask": self._as_argument(valid, embeds)}
        index, mask = self.last_cut.index, given.get("attention_mask")
        if self.past.columns:
            mask = self._valid_keys(first)
        elif is_prepared(mask):
            mask = gather_mask(mask, self.last_cut)
        else:  # the decoder makes masks of it
            mask = self.valid
        if mask is None and self.cache is None:
            # Without mask and cache, transformers (5.17 to 5.24: find_packed_sequence_indices)
            # would read gaps in the position ids as the borders of packed sequences.
            mask = torch.ones(self.shape, dtype=torch.bool)
        positions = self.position_ids
        if positions is None:
            positions = given_position_ids(given, self.past.columns, embeds)
            positions = gather(positions, index, dim=positions.dim() - 1)
        return {
            **given,
            "inputs_embeds": gather(embeds, index),
            "position_ids": positions,
            "attention_mask": self._as_argument(mask, embeds),
        }

    def _as_argument(self, mask: object, embeds: torch.Tensor) -> object:
        """Return a mask as a decoder takes it: one over columns holds numbers."""
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            return mask.to(embeds.device, torch.long)
        return mask

    def layer_arguments(self, given: Kwargs, layer: int, hidden: torch.Tensor) -> Kwargs:
        """Return a layer's arguments for the sequence as it is now.

        A decoder hands all its layers what it made once for the uncut sequence, so every layer from
        the first cut on needs others.

        Args:
            given: the layer's own, by name.
            hidden: (B, n, d) states that enter it.
        """
        changed = dict(given)
        if self.packed is not self._prepared:
            self._replace_positions(changed, layer, hidden)
        memory, mask = self.structure.memories[layer], given.get("attention_mask")
        if memory.state:
            self._replace_token_mask(changed, memory, hidden)
        if not memory.keys:
            return changed
        # Without padding transformers leaves the mask out for sdpa and flash attention. One for a
        # cache counts the keys of the first layer, where others may hold fewer.
        if self.past.columns or (mask is None and self.valid is not None):
            key = ("mask", self.structure.window(layer), self.past.length(layer),
                   id(self.past.valid_in(layer)))  # fmt: skip
            make = functools.partial(self._make_mask, layer, hidden)
            changed["attention_mask"] = self._share(key, make)
        else:
            make = functools.partial(gather_mask, mask, self._left_of_prepared)
            changed["attention_mask"] = self._share(id(mask), make, mask)
        return changed

    def _replace_token_mask(
        self, changed: Kwargs, memory: LayerMemory, hidden: torch.Tensor
    ) -> None:
        """Replace a layer's (B, n) mask of the tokens that its state is made of.

        Transformers (5.17 to 5.24) leaves it out where nothing is padded.
        """
        name = token_mask(memory)
        given, valid = changed.get(name), self.valid
        dtype = given.dtype if isinstance(given, torch.Tensor) else torch.long
        if valid is None and given is not None:
            valid = torch.ones(self.shape, dtype=torch.bool)
        if valid is not None:
            changed[name] = self._share(
                ("tokens", dtype, hidden.device), lambda: valid.to(hidden.device, dtype)
            )

    def _replace_positions(self, changed: Kwargs, layer: int, hidden: torch.Tensor) -> None:
        """Replace a layer's position ids and embeddings; NoPE layers are given no embeddings."""
        positions = self.position_ids
        if positions is None or not self.structure.memories[layer].keys:
            for name, dim in (("position_embeddings", -2), ("position_ids", -1)):
                value = changed.get(name)
                if value is not None:
                    make = functools.partial(self._shorten, value, dim)
                    changed[name] = self._share(id(value), make, value)
            return
        if changed.get("position_embeddings") is not None:
            make = functools.partial(
                renumbered_embeddings, self.structure, layer, hidden, dict(changed), positions
            )
            key = ("rotary", self.structure.rope_type(layer))
            changed["position_embeddings"] = self._share(key, make)
        if changed.get("position_ids") is not None:
            changed["position_ids"] = positions

    def _share(self, key: object, make: Callable[[], object], source: object = None) -> object:
        """Return `make()`, worked out once for all layers up to the next cut.

        Args:
            source: held, so that its id, as a key, stays its own.
        """
        if key not in self._shared:
            self._shared[key] = (source, make())
        return self._shared[key][1]

    def _shorten(self, value: object, dim: int) -> object:
        """Shorten position ids or embeddings, or a tuple of them, along the dimension of slots."""
        if isinstance(value, tuple):
            return tuple(self._shorten(part, dim) for part in value)
        assert isinstance(value, torch.Tensor)
        return gather(value, self._left_of_prepared.index, dim=value.dim() + dim)

    def _make_mask(self, layer: int, hidden: torch.Tensor) -> object:
        return causal_mask(self.structure, layer, hidden, self._valid_keys(layer), self.cache)

    def _valid_keys(self, layer: int) -> torch.Tensor | None:
        """Return which of a layer's keys are valid in this forward, (B, past + n); None: all."""
        return self.past.valid_after(layer, self.valid, self.shape)

    # -- the end ---------------------------------------------------------------------------------

    def cache_after(self, num_layers: int) -> PrunedCache:
        """Return what is to be known of the cache once this forward is in it."""
        lengths: list[int] = []
        valid: list[torch.Tensor | None] = []
        shifts: list[torch.Tensor | None] = []
        past, batch, memories = self.past, len(self.columns), self.structure.memories
        dropped = 0
        firsts = [first for first, *_ in self._stretches]
        for (first, until), (_, new, length, shift) in zip(
            pairwise([*firsts, num_layers]), self._stretches, strict=True
        ):
            made: dict[object, torch.Tensor | None] = {}  # one for all layers that are alike
            for layer in range(first, until):
                alike = past.length(layer), id(past.valid_in(layer))
                if alike not in made:
                    made[alike] = past.valid_after(layer, new, (batch, length))
                lengths.append(past.length(layer) + length if memories[layer].keys else 0)
                if layer == self.structure.first_with_keys:
                    dropped = self.original_length - length
                valid.append(made[alike])
                shifts.append(shift)
        cuts = [first for first in firsts if first > 0]
        if past.first_cut is not None:
            cuts.append(past.first_cut)
        return PrunedCache(
            lengths=tuple(lengths),
            valid=valid,
            first_cut=min(cuts, default=None),
            offset=dropped + past.offset,
            shifts=shifts if any(shift is not None for shift in shifts) else (),
        )
