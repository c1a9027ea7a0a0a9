"""The KV cache after a cut: what it holds, which of its keys are valid, and a copy of it.

A cut needs no hand on the cache: layers from it on are given fewer tokens, so transformers' caches
(5.17 to 5.24), which have a length for each layer, hold fewer keys there. What is not in the cache,
where it was cut and which keys are padding, is tied to it as a `PrunedCache`.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch

from vtprune.device import Duration
from vtprune.engine.attention_mask import join_valid, valid_past_columns
from vtprune.engine.hooks import is_hooked
from vtprune.engine.trace import DecodeCut
from vtprune.errors import ModelError
from vtprune.models.seams import (
    CHECK,
    STATE_METHODS,
    check_cache,
    fork_layer,
    grows,
    layer_length,
    makes_cache,
    unknown,
)
from vtprune.models.structure import Structure

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

NOTE = "_vtprune"
"""The attribute of a cache that holds its PrunedCache."""
GUARDED = ("update", *STATE_METHODS)
"""The methods of a cache that are refused outside of blocks where they would give wrong states."""


TAKING_ROWS = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")
"""The methods of a cache that put other rows in the place of its own."""
REARRANGING = ("crop", *TAKING_ROWS)
"""The methods of a cache that are refused where it is cut while decoding."""


@dataclass(eq=False)
class AnswerReadings:
    """What the answers' tokens attended to since the last cut of the cache while decoding.

    Args:
        visual: for every sample the columns of its visual tokens in the original prompts.
        cuts: those of this answer so far; the trace of its prefill holds the same list.
        steps: decoded tokens of this answer.
        since: those after the last cut.
        sums: layer -> (B, n) attention that its first n keys received, summed over those tokens.
        reading: how long that took.
    """

    visual: Sequence[torch.Tensor]
    cuts: list[DecodeCut]
    steps: int = 0
    since: int = 0
    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    reading: Duration = field(default_factory=Duration)

    def begin_question(self) -> None:
        """Forget what was attended to for the question before."""
        self.steps, self.since, self.sums = 0, 0, {}

    def fork(self) -> AnswerReadings:
        """Return readings that go on by themselves; their cuts are in no trace."""
        sums = {layer: total.clone() for layer, total in self.sums.items()}
        return replace(self, cuts=list(self.cuts), sums=sums)


@dataclass(eq=False)
class PrunedCache:
    """What has to be known of a cache whose layers hold fewer keys than its prompt had columns.

    It refers to no cache, since caches are copied and it with them.

    Args:
        columns: of the original prompts that it stood for when this was noted.
        lengths: keys that every layer held then; empty: none.
        valid: for every layer the (B, n) bool validity of its first keys, None where all are valid;
            empty: all are. Where a layer sees an earlier one's keys (`Structure.key_layers`), both
            are of those.
        key_columns: for every layer the (B, n) int64 columns of those keys in the original prompts,
            -1 where they are not valid; empty: all columns in turn.
        starts: (B,) the first column of every prompt that holds a token; None: 0.
        first_cut: the first layer that saw a shorter sequence than the decoder was given.
        offset: columns that were dropped before the first layer that keeps keys.
        shifts: for every layer the (B,) int64 by which its position ids are less than the original
            ones, None where they are the original ones; empty: all are.
        last_positions: (..., B or 1) int64 position ids of its prompts' last tokens, until a
            forward went on from them.
        decoding: what is known for its cuts while an answer is decoded; None: there are none.
        inside_block: tells whether a forward of the running thread is in a block, which gives it
            what fits the cache; None: nothing is needed.
    """

    columns: int = 0
    lengths: tuple[int, ...] = ()
    valid: Sequence[torch.Tensor | None] = ()
    key_columns: Sequence[torch.Tensor] = ()
    starts: torch.Tensor | None = None
    first_cut: int | None = None
    offset: int = 0
    shifts: Sequence[torch.Tensor | None] = ()
    last_positions: torch.Tensor | None = None
    decoding: AnswerReadings | None = None
    inside_block: Callable[[], bool] | None = None

    @property
    def shortened(self) -> bool:
        """Whether any layer holds fewer keys than there were columns."""
        return bool(self.offset) or self.first_cut is not None

    @property
    def first_short(self) -> int | None:
        """The first layer that holds fewer keys than there were columns; None: none does."""
        return 0 if self.offset else self.first_cut

    @property
    def renumbered(self) -> bool:
        """Whether any layer has other position ids than the original ones."""
        return any(shift is not None for shift in self.shifts)

    @property
    def has_padding(self) -> bool:
        """Whether any layer holds keys of padding."""
        return any(valid is not None for valid in self.valid)

    @property
    def differs_by_row(self) -> bool:
        """Whether anything is noted of each row by itself."""
        noted = (*self.valid, *self.key_columns, *self.shifts, self.starts, self.last_positions)
        return any(rows is not None for rows in noted)

    def with_rows(self, take: Callable[[torch.Tensor], torch.Tensor]) -> PrunedCache:
        """Return what is known once other rows are in the place of these.

        Args:
            take: (B, ...) to (B', ...), of the rows that are there then.
        """
        taken: dict[int, torch.Tensor] = {}  # layers share tensors

        def rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None:
                return None
            if id(tensor) not in taken:
                taken[id(tensor)] = take(tensor)
            return taken[id(tensor)]

        last = self.last_positions
        if last is not None and last.shape[-1] > 1:
            last = take(last.movedim(-1, 0)).movedim(0, -1)
        return replace(
            self,
            valid=[rows(valid) for valid in self.valid],
            key_columns=[take(columns) for columns in self.key_columns],
            starts=rows(self.starts),
            shifts=[rows(shift) for shift in self.shifts],
            last_positions=last,
        )

    def length(self, layer: int) -> int:
        """Return how many keys a layer held."""
        return self.lengths[layer] if self.lengths else 0

    def valid_in(self, layer: int) -> torch.Tensor | None:
        """Return which of the first keys of a layer are valid; None: all."""
        return self.valid[layer] if self.valid else None

    def shift(self, layer: int) -> torch.Tensor | None:
        """Return by how much a layer's position ids are less than the original ones; None: 0."""
        return self.shifts[layer] if self.shifts else None

    def valid_after(
        self,
        layer: int,
        new: torch.Tensor | None,
        shape: tuple[int, int],
        length: int | None = None,
    ) -> torch.Tensor | None:
        """Return which keys of a layer are valid after a forward, (B, past + n); None: all.

        Args:
            new: (B, n) of the forward's tokens, None where all are valid.
            shape: (B, n).
            length: keys that the layer holds before it; None: those that it held.
        """
        held = self.length(layer) if length is None else length
        return join_valid(self.valid_in(layer), held, new, shape)

    def columns_in(self, layer: int, batch: int, columns: int, length: int) -> torch.Tensor:
        """Return the original columns of a layer's keys, (B, length); -1 for what is not seen.

        Args:
            batch: B.
            columns: of the original prompts that the cache stands for now.
            length: keys that the layer has had.
        """
        noted = self.key_columns[layer] if self.key_columns else torch.zeros(batch, 0).long()
        since = torch.arange(columns - length + noted.shape[1], columns, device=noted.device)
        held = torch.cat([noted, since[None].expand(batch, -1)], dim=1)
        valid = None if self.key_columns else self.valid_in(layer)
        if valid is not None:
            held[:, : valid.shape[1]].masked_fill_(~valid, -1)
        return held

    # -- the cache that it is tied to ------------------------------------------------------------

    def tie(self, cache: Cache) -> None:
        """Tie what was cut to its cache, for the forwards that go on with it.

        Where the first layer that keeps keys was cut, the cache answers with the length of the
        original prompt when it is asked for its length without a layer: transformers' generation
        (5.17 to 5.24) slices ids and places new tokens by that answer. Emptying the cache ends
        both. A forward outside of blocks, which would go wrong, is refused.
        """
        replaced: dict[str, Callable[..., object]] = {"reset": _reset}
        if self.offset:
            replaced["get_seq_length"] = _original_length
        if self.inside_block is not None:
            replaced[CHECK] = _refuse_outside
            for name in GUARDED:
                if hasattr(cache, name):
                    replaced[name] = functools.partial(_inside_block, name)
        if self.decoding is not None:
            for name in REARRANGING:
                if hasattr(cache, name):
                    replaced[name] = functools.partial(_refuse_rearranging, name)
        elif self.differs_by_row:
            for name in TAKING_ROWS:
                if hasattr(cache, name):
                    replaced[name] = functools.partial(_take_rows, name)
            if self.last_positions is not None and hasattr(cache, "crop"):
                replaced["crop"] = _crop
        setattr(cache, NOTE, self)
        for name, method in replaced.items():
            setattr(cache, name, types.MethodType(method, cache))

    def tie_in_block(self, cache: Cache, structure: Structure) -> None:
        """Tie what was cut to its cache, and refuse forwards outside of blocks where it has to."""
        if self.needs_block(structure, cache):
            inner = structure.inner
            # A function: a deep copy of the cache does not copy the model.
            self.inside_block = lambda: is_hooked(inner)
        self.tie(cache)

    def check_reached(
        self,
        structure: Structure,
        given: Cache | None,
        returned: Cache | None,
        use_cache: bool,
    ) -> None:
        """Refuse a forward whose cuts did not reach the cache that goes on from it.

        Args:
            given: the cache that the decoder was called with.
            returned: the one in its output.
            use_cache: whether the decoder was asked for one, which not all make by themselves.

        Raises:
            ModelError: the cache is another one, or holds other numbers of keys than `lengths`.
        """
        makes = use_cache and makes_cache(structure.decoder)
        if returned is None and (given is not None or makes):
            raise unknown("the output of the decoder does not hold its cache")
        if given is not None and returned is not given:
            raise unknown("the cache in the output of the decoder is not the one that it was given")
        if returned is None:
            return
        for layer, length in enumerate(self.lengths):
            held = layer_length(returned, structure.key_layers[layer])
            if held != length:
                raise unknown(
                    f"layer {layer} of the cache holds {held} keys after a cut that left {length}"
                )

    def needs_mask(self, structure: Structure, cache: object) -> bool:
        """Return whether one more token needs a mask to see the right keys of a layer."""
        unmasked = structure.attention == "sdpa" or "flash" in structure.attention
        unmasked &= not structure.reads_masks
        windows = structure.narrowest_window is not None
        return not unmasked or windows or self.has_padding or not grows(cache)

    def needs_block(self, structure: Structure, cache: object) -> bool:
        """Return whether a token that goes on from its cache outside of blocks would go wrong."""
        if self.renumbered or self.has_padding:
            return True
        short = self.first_cut is not None or structure.narrowest_window is not None
        return short and self.needs_mask(structure, cache)


def pruned_cache(cache: object) -> PrunedCache | None:
    """Return what was tied to a cache; None where it is an ordinary one."""
    pruned = getattr(cache, NOTE, None)
    if not isinstance(pruned, PrunedCache):
        return None
    if cache.reset.__self__ is not cache:  # type: ignore[attr-defined]
        pruned.tie(cast("Cache", cache))  # it is a shallow copy of the one that was tied
    return pruned


def untie(cache: object) -> None:
    """Make a cache an ordinary one again."""
    for name in (NOTE, "reset", "get_seq_length", CHECK, *GUARDED, *REARRANGING):
        getattr(cache, "__dict__", {}).pop(name, None)


def cache_before(
    cache: Cache | None, mask: object, columns: int, length: int, structure: Structure
) -> PrunedCache:
    """Return what is known of a decoder's cache before anything of its forward is in it.

    Args:
        mask: that the decoder is given.
        columns: of the original prompts that the cache stands for.
        length: of the forward's own columns.
    """
    if not columns:
        return PrunedCache()
    pruned = pruned_cache(cache)
    if pruned is None:
        valid = valid_past_columns(mask, columns, length)
        starts = None if valid is None else valid.int().argmax(1)
        pruned = PrunedCache(valid=[valid] * len(structure.layers), starts=starts)
    lengths = tuple(layer_length(cache, layer) for layer in structure.key_layers)
    return replace(pruned, columns=columns, lengths=lengths)


# -- methods that a cache is given in the place of its own --------------------------------------


def _reset(cache: Cache) -> None:
    untie(cache)
    cache.reset()


def _original_length(cache: Cache, layer_idx: int | None = None) -> int:
    held = type(cache).get_seq_length(cache, layer_idx or 0)
    if layer_idx is not None or not held:
        return held
    return held + cache._vtprune.offset  # type: ignore[attr-defined]


def _inside_block(name: str, cache: Cache, *args: object, **kwargs: object) -> object:
    """Call the cache's method of this name, by which a layer reads or writes what is cached.

    Raises:
        ModelError: outside of a block.
    """
    _refuse_outside(cache)
    return getattr(type(cache), name)(cache, *args, **kwargs)


def _refuse_outside(cache: Cache) -> None:
    if not cache._vtprune.inside_block():  # type: ignore[attr-defined]
        raise ModelError(
            "this cache was pruned in a block that has been left: without one, new tokens would "
            "see the wrong keys",
            "keep the block open until all threads have generated, or go on in a new one",
        )


def _take_rows(name: str, cache: Cache, rows: torch.Tensor | int) -> None:
    """Put other rows in the place of a cache's, and of what is noted of each.

    Args:
        rows: as the method of this name takes them: their numbers, or how often each is repeated.
    """
    pruned: PrunedCache = cache._vtprune  # type: ignore[attr-defined]
    getattr(type(cache), name)(cache, rows)

    def take(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(rows, int):
            return tensor.repeat_interleave(rows, dim=0)
        return tensor[rows.to(tensor.device)]

    pruned.with_rows(take).tie(cache)


def _crop(cache: Cache, tokens: int) -> None:
    """Take a cache's last tokens out, and say what is the last one then.

    The first forward of assisted generation has the prompt and guessed tokens in one.
    """
    pruned: PrunedCache = cache._vtprune  # type: ignore[attr-defined]
    before = cache.get_seq_length()
    type(cache).crop(cache, tokens)  # type: ignore[attr-defined]
    if pruned.last_positions is not None:
        last = pruned.last_positions - (before - cache.get_seq_length())
        replace(pruned, last_positions=last).tie(cache)


def _refuse_rearranging(name: str, cache: Cache, *args: object, **kwargs: object) -> object:
    """Refuse what beams and assisted generation do with the rows and columns of a cache.

    Raises:
        ModelError: always.
    """
    raise ModelError(
        "the cache is cut while decoding, each row by what its own answer attends to, and this "
        f"way of generating takes rows or tokens of it elsewhere ({name})",
        "generate with num_beams=1 and without an assistant model, or leave out decode",
    )


# -- what caches hold ----------------------------------------------------------------------------


def cache_length(cache: object) -> int:
    """Return the columns of the original prompts that a cache stands for; 0 without one."""
    check_cache(cache)
    return 0 if cache is None else int(cast("Cache", cache).get_seq_length())


def refuse_uneven(cache: Cache) -> None:
    """Refuse a cache that was cut between layers, but does not say where.

    Raises:
        ModelError: its layers hold different numbers of keys.
    """
    lengths = {layer_length(cache, layer) for layer in range(len(cache.layers))} - {0}
    if grows(cache) and len(lengths) > 1:
        raise unknown("a cache that was pruned, copied in a way that lost what was cut")


def refuse_padding_on_state(structure: Structure, first: int = 0) -> None:
    """Refuse padding between the cached tokens and new ones, which a state would take for tokens.

    Linear attention fades its state at every token, a convolution counts them, and an index has
    pools of them, so that even masked padding changes what they keep.

    Args:
        first: the first layer that would get the padding.

    Raises:
        ModelError: a layer from `first` on keeps a state.
    """
    if structure.keeps_state(first):
        raise ModelError(
            f"{structure.model_type}: new tokens of different number on top of a cached "
            "conversation: the padding between would change the state that its linear attention "
            "and convolutions keep",
            "go on with one conversation at a time, or with new tokens of the same number",
        )


def fork_cache(cache: Cache) -> Cache:
    """Return a cache that goes on by itself from where another growing one is, which stays."""
    fork, pruned = copy.copy(cache), pruned_cache(cache)
    fork.layers = [fork_layer(layer) for layer in cache.layers]
    untie(fork)
    if pruned is not None and pruned.decoding is not None:
        pruned = replace(pruned, decoding=pruned.decoding.fork())
    if pruned is not None:
        pruned.tie(fork)
    return fork
