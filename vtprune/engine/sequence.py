"""The tokens of one prefill from cut to cut, and the arguments that fit those that are left."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeGuard

import torch

from vtprune.device import send
from vtprune.engine.attention_mask import causal_mask, distances, gather_mask, mask_by_columns
from vtprune.engine.kv_cache import PrunedCache, refuse_padding_on_state
from vtprune.engine.late_checks import LateChecks
from vtprune.engine.packing import Packed, gather, pack, repack
from vtprune.engine.position_ids import given_position_ids, renumber, renumbered_embeddings
from vtprune.errors import ModelError
from vtprune.models.seams import (
    DISTANCE,
    OF_LAYERS_TOKENS,
    OF_TOKENS,
    LayerMemory,
    held_keys,
    shared_width,
    token_mask,
)
from vtprune.models.structure import Structure
from vtprune.tokens.layout import Layout

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

Kwargs = dict[str, object]


@dataclass(frozen=True, eq=False)
class Stretch:
    """The tokens that the layers from one cut to the next one get.

    Args:
        first: the first of these layers.
        packed: the columns in every slot.
        valid: (B, n) bool of the slots; None where all hold a token.
        shift: (B,) int64 by which position ids are less than the original ones; None: by nothing.
    """

    first: int
    packed: Packed
    valid: torch.Tensor | None
    shift: torch.Tensor | None = None

    def holds(self, later: Stretch) -> torch.Tensor | None:
        """Return which slots hold a token that a later stretch still has, (B, n); None: all."""
        if later is self:
            return self.valid
        kept = torch.zeros(self.packed.index.shape, dtype=torch.bool)
        for sample, columns in enumerate(later.packed.columns):
            kept[sample, self.packed.slots(sample, columns)] = True
        return kept


class SequenceState:
    """A batch of prompts as it is now: columns, visual tokens, slots, padding and position ids.

    Columns are those of this forward's input_ids; slots are places in the sequence as it is now.

    Args:
        structure: of the model.
        layouts: of every sample's visual tokens, before any cut.
        valid: (B, S) bool on the CPU: which columns hold a token.
        cache: that the decoder is given; None: it is given none.
        past: what it held before this forward.
        late: of the block.

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
        starts: (B,) the first column of every prompt that holds a token, those of the cache first.
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
        late: LateChecks | None = None,
    ) -> None:
        self.structure, self.cache, self.past = structure, cache, past or PrunedCache()
        self.late = late or LateChecks()
        self.original_layouts, self.original_length = list(layouts), valid.shape[1]
        self.layouts = list(layouts)
        self.columns = [row.nonzero().squeeze(1) for row in valid]
        # The batch as it came, wherever its padding is.
        self.packed = pack([torch.arange(valid.shape[1])] * len(valid))
        self.valid = None if bool(valid.all()) else valid.clone()
        self.starts = valid.int().argmax(1)
        if self.past.columns:
            self.starts = torch.zeros_like(self.starts)
            self.starts = self.starts if self.past.starts is None else self.past.starts
        self.last_cut = self.packed
        self.position_ids: torch.Tensor | None = None
        self.first_end: torch.Tensor | None = None
        self._cut_at_input, self._masks_by_decoder = False, False
        self._prepared = self.packed  # what the decoder made its layers' arguments for
        self._left_of_prepared = self.packed
        self._stretches = [Stretch(0, self.packed, self.valid)]
        self._shared: dict[object, tuple[object, object]] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(B, n) of the sequence as it is now."""
        return len(self.columns), self.packed.length

    @property
    def num_visual(self) -> int:
        """Visual tokens of the batch that are still there."""
        return sum(map(len, self.layouts))

    @property
    def total(self) -> int:
        """Columns of the original prompts up to here, those in the cache included."""
        return self.past.columns + self.original_length

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
        shift = self._stretches[-1].shift
        if renumbers:
            assert self.first_end is not None
            self._refuse_renumbering(layer)
            positions, shift = renumber(self.first_end, left)
            self.position_ids = send(positions, device)
        elif self.position_ids is not None:
            self.position_ids = gather(self.position_ids, self.last_cut.index)
        if layer == 0:  # the decoder makes its layers' arguments for what is left
            self._cut_at_input = True
            self._prepared = left
            self._stretches.clear()
        self._left_of_prepared = repack(self._prepared, left)
        self._stretches.append(Stretch(layer, left, self.valid, shift))
        self._shared.clear()

    def _refuse_renumbering(self, layer: int) -> None:
        """Refuse new position ids for layers whose keys an earlier layer made for the old ones."""
        if any(source < layer <= n for n, source in enumerate(self.structure.key_layers)):
            raise ModelError(
                f"positions: renumber at layer {layer}: later layers of "
                f"{self.structure.model_type} share keys of layers before it, which have the "
                "original positions",
                "cut at the input, or leave positions: keep",
            )

    def of_prepared(self, states: torch.Tensor) -> torch.Tensor:
        """Return, of states of the sequence that the decoder was given, those still there."""
        return gather(states, self._left_of_prepared.index)

    def to_prepared(self, states: torch.Tensor) -> torch.Tensor:
        """Return (B, n, d) states at their slots of that sequence; zeros for what was dropped."""
        full = states.new_zeros(len(states), self._prepared.length, *states.shape[2:])
        for sample, slots in enumerate(self._left_of_prepared.columns):
            full[sample, send(slots, full.device)] = states[sample, states.shape[1] - len(slots) :]
        return full

    # -- keys ------------------------------------------------------------------------------------

    def query_columns(self) -> torch.Tensor:
        """Return the original columns of the slots as they are now, (B, n); -1 for padding."""
        return self._columns_of(self.packed, self.valid)

    def query_places(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the original columns of all slots, and where a layer takes them to be, (B, n)."""
        columns = self.query_columns().clamp_min(0)
        return columns, torch.arange(columns.shape[1])[None] + self.past.length(layer)

    def key_columns(self, layer: int) -> torch.Tensor:
        """Return the original columns of a layer's keys in this forward, those of the cache first.

        Returns:
            (B, P + n); -1 for those that the tokens as they are now do not see.
        """
        return self._keys_in(layer, self._stretches[-1])

    def chunk_starts(self, layer: int) -> torch.Tensor | None:
        """Return the first column of every prompt, (B,), for a layer of chunks; None for others."""
        return self.starts if self.structure.is_chunked(layer) else None

    def _keys_in(self, layer: int, now: Stretch) -> torch.Tensor:
        source, past = self._source(layer), self.past
        new = self._columns_of(source.packed, source.holds(now))
        held = past.columns_in(layer, len(new), past.columns, past.length(layer))
        return torch.cat([held, send(new, held.device)], dim=1)

    def _columns_of(self, packed: Packed, valid: torch.Tensor | None) -> torch.Tensor:
        columns = packed.index + self.past.columns
        return columns if valid is None else columns.masked_fill(~valid, -1)

    def _source(self, layer: int) -> Stretch:
        """Return the tokens whose keys a layer sees, which an earlier layer may have made."""
        source = self.structure.key_layers[layer]
        return next(one for one in reversed(self._stretches) if one.first <= source)

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
        elif _is_prepared(mask):
            mask = self._gathered(mask, first)
        elif isinstance(mask, Mapping) and self._fits(mask):
            short = gather(embeds, index)
            mask = {name: self._gathered_of(name, part, short) for name, part in mask.items()}
        else:  # the decoder makes masks of it
            mask, self._masks_by_decoder = self.valid, True
        if mask is None and self.cache is None:
            # Without mask and cache, transformers (5.17 to 5.24: find_packed_sequence_indices)
            # would read gaps in the position ids as the borders of packed sequences.
            mask = torch.ones(self.shape, dtype=torch.bool)
        positions = self.position_ids
        if positions is None:
            positions = given_position_ids(given, self.past.columns, embeds)
            positions = gather(positions, index, dim=positions.dim() - 1)
        changed = {
            **given,
            "inputs_embeds": gather(embeds, index),
            "position_ids": positions,
            "attention_mask": self._as_argument(mask, embeds),
        }
        for name, dim in OF_TOKENS.items():
            value = given.get(name)
            if isinstance(value, torch.Tensor):
                changed[name] = gather(value, index, dim=dim)
        return changed

    def _as_argument(self, mask: object, embeds: torch.Tensor) -> object:
        """Return a mask as a decoder takes it: one over columns holds numbers."""
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            return send(mask.long(), embeds.device)
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
        if changed.get(DISTANCE) is not None:
            keys, width = self.key_columns(layer), self._width(given, layer)
            apart = distances(self.query_columns(), keys, width)
            changed[DISTANCE] = send(apart, hidden.device)
        memory = self.structure.memories[layer]
        if memory.of_all_tokens:
            self._replace_token_mask(changed, memory, hidden)
        if not memory.keys or memory.index:
            return changed
        mask, source = given.get("attention_mask"), self._source(layer)
        window = self.structure.window_within(layer, self.total)
        # A decoder counts kept tokens in the windows of the masks that it makes after a cut.
        misfit = window is not None and self._masks_by_decoder
        # Without padding transformers leaves the mask out for sdpa and flash attention. One for a
        # cache counts the keys of the first layer, where others may hold fewer.
        needed = bool(self.past.columns) or (mask is None and self.valid is not None)
        past = self.past.length(layer), id(self.past.valid_in(layer))
        key: tuple[object, ...]
        make: Callable[[], object]
        if _is_prepared(mask) and not self.past.columns and not misfit:
            width = self._width(given, layer)
            make = functools.partial(self._gather_mask, mask, source, width)
            changed["attention_mask"] = self._share((id(mask), source.first, width), make, mask)
        elif (
            misfit
            or source is not self._stretches[-1]
            or (needed and (window is not None or self.structure.key_layers[layer] != layer))
        ):
            width = self._width(given, layer)
            make = functools.partial(self._mask_by_columns, layer, width, window, hidden)
            key = ("columns", window, source.first, width, hidden.shape[-2], past)
            changed["attention_mask"] = self._share(key, make)
        elif needed:
            make = functools.partial(self._make_mask, layer, hidden)
            key = ("mask", self.structure.windows[layer], past)
            changed["attention_mask"] = self._share(key, make)
        elif isinstance(mask, torch.Tensor) and mask.dim() == 2:
            valid = self.valid
            changed["attention_mask"] = (
                None if valid is None else send(valid.to(mask.dtype), mask.device)
            )
        return changed

    def _replace_token_mask(
        self, changed: Kwargs, memory: LayerMemory, hidden: torch.Tensor
    ) -> None:
        """Replace a layer's (B, n) mask of the tokens that its state, or index, is made of.

        Transformers (5.17 to 5.24) leaves it out where nothing is padded.
        """
        name = token_mask(memory)
        given, valid = changed.get(name), self.valid
        dtype = given.dtype if isinstance(given, torch.Tensor) else torch.long
        if valid is None and given is not None:
            valid = torch.ones(self.shape, dtype=torch.bool)
        if valid is not None:
            changed[name] = self._share(
                ("tokens", dtype, hidden.device), lambda: send(valid.to(dtype), hidden.device)
            )

    def _replace_positions(self, changed: Kwargs, layer: int, hidden: torch.Tensor) -> None:
        """Replace what a layer has for each token; NoPE layers are given no position embeddings."""
        for name, dim in OF_LAYERS_TOKENS.items():
            if (value := changed.get(name)) is not None:
                changed[name] = self._shorten(value, dim)
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
                renumbered_embeddings,
                self.structure, layer, hidden, dict(changed), positions, self.late,
            )  # fmt: skip
            key = ("rotary", self.structure.rope_type(layer), hidden.shape[-2])
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
        """Shorten position ids or embeddings, or a tuple of them, along the dimension of slots.

        Of the last tokens alone, with which some decoders go on, none was dropped.
        """
        if isinstance(value, tuple):
            return tuple(self._shorten(part, dim) for part in value)
        assert isinstance(value, torch.Tensor)
        if value.shape[dim] != self._prepared.length:
            return value
        return gather(value, self._left_of_prepared.index, dim=value.dim() + dim)

    def _fits(self, masks: Mapping[str, object]) -> bool:
        """Return whether masks by layer type are gathered; else the decoder makes all of them.

        Where one was left out since nothing was padded (5.17 to 5.24: `generate` with a static
        cache), padding that a cut makes needs another. The decoder knows no pictures, whose tokens
        may see each other both ways. Masks of tokens alone (GLM-5-next) it makes as well.
        """
        if not any(part is None or _is_prepared(part) for part in masks.values()):
            return False
        if self.structure.two_way:
            return any(map(_is_prepared, masks.values()))
        return all(part is not None for part in masks.values())

    def _gathered_of(self, name: str, mask: object, hidden: torch.Tensor) -> object:
        """Return what is left of the mask of a layer type after the cut at the input."""
        if _is_prepared(mask):
            return self._gathered(mask, self.structure.first_of_type(name))
        if isinstance(mask, torch.Tensor):
            return None if self.valid is None else send(self.valid.to(mask.dtype), mask.device)
        return self._make_mask(self.structure.first_of_type(name), hidden)

    def _gathered(self, mask: torch.Tensor, layer: int) -> torch.Tensor:
        """Return what is left of a 4-D mask of layers like this one after the cut at the input."""
        held = held_keys(self.cache, layer, self.packed.length)
        return gather_mask(mask, self.last_cut, self.original_length, held)

    def _gather_mask(self, mask: torch.Tensor, source: Stretch, held: int) -> torch.Tensor:
        """Return what is left of a mask that the decoder made, or was given, for a layer.

        Args:
            held: keys that the layer sees.
        """
        prepared, now = self._prepared, self._stretches[-1]
        if source is now and self.packed is prepared:
            return mask
        keys = self._left_of_prepared if source is now else repack(prepared, source.packed)
        return gather_mask(
            mask, self._left_of_prepared, prepared.length, held, keys, source.holds(now)
        )

    def _mask_by_columns(
        self, layer: int, width: int, window: int | None, hidden: torch.Tensor
    ) -> torch.Tensor:
        queries = self.query_columns()[:, -hidden.shape[-2] :]
        keys = self.key_columns(layer)
        starts = self.chunk_starts(layer)
        return mask_by_columns(self.structure, queries, keys, width, window, hidden, starts)

    def _width(self, given: Kwargs, layer: int) -> int:
        """Return how many keys a layer sees in this forward."""
        source = self.structure.key_layers[layer]
        if source != layer:
            return shared_width(given, self.structure.layers[layer], source)
        return held_keys(self.cache, layer, self.packed.length)

    def _make_mask(self, layer: int, hidden: torch.Tensor) -> object:
        return causal_mask(self.structure, layer, hidden, self._valid_keys(layer), self.cache)

    def _valid_keys(self, layer: int) -> torch.Tensor | None:
        """Return which of a layer's keys are valid in this forward, (B, past + n); None: all."""
        return self.past.valid_after(layer, self.valid, self.shape)

    # -- the end ---------------------------------------------------------------------------------

    def cache_after(self) -> PrunedCache:
        """Return what is to be known of the cache once this forward is in it."""
        lengths: list[int] = []
        valid: list[torch.Tensor | None] = []
        columns: list[torch.Tensor] = []
        shifts: list[torch.Tensor | None] = []
        past, memories, dropped = self.past, self.structure.memories, 0
        firsts = [stretch.first for stretch in self._stretches]
        for (first, until), now in zip(
            pairwise([*firsts, len(self.structure.layers)]), self._stretches, strict=True
        ):
            # One for all layers that are alike.
            made: dict[object, tuple[torch.Tensor | None, torch.Tensor]] = {}
            for layer in range(first, until):
                if not memories[layer].keys:
                    lengths.append(0)
                    valid.append(None)
                    columns.append(torch.zeros(self.shape[0], 0, dtype=torch.long))
                    shifts.append(now.shift)
                    continue
                source = self._source(layer)
                alike = source.first, past.length(layer), id(past.valid_in(layer))
                if alike not in made:
                    new, shape = source.holds(now), source.packed.index.shape
                    after = past.valid_after(layer, new, (shape[0], shape[1]))
                    made[alike] = after, self._keys_in(layer, now)
                length = source.packed.length
                lengths.append(past.length(layer) + length)
                if layer == self.structure.first_with_keys:
                    dropped = self.original_length - length
                valid.append(made[alike][0])
                columns.append(made[alike][1])
                shifts.append(now.shift)
        cuts = [first for first in firsts if first > 0]
        if past.first_cut is not None:
            cuts.append(past.first_cut)
        return PrunedCache(
            lengths=tuple(lengths),
            valid=valid,
            key_columns=columns,
            starts=self.starts,
            first_cut=min(cuts, default=None),
            offset=dropped + past.offset,
            shifts=shifts if any(shift is not None for shift in shifts) else (),
        )


def _is_prepared(mask: object) -> TypeGuard[torch.Tensor]:
    """Return whether it is a mask with a row for each query."""
    return isinstance(mask, torch.Tensor) and mask.dim() == 4
