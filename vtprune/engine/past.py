"""What a prompt with visual tokens finds in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from vtprune.engine.caches import CacheState, cache_state, layer_length
from vtprune.engine.packing import join_valid, past_columns

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


@dataclass(frozen=True, eq=False)
class Past:
    """The cache before a forward.

    Args:
        columns: of the original prompts that it stands for.
        cache: itself; None where there is none.
        held: keys that every layer holds; empty where it is empty.
        state: what was cut of it, and which of its keys are padding; None where it is empty.
    """

    columns: int
    cache: Cache | None
    held: tuple[int, ...] = ()
    state: CacheState | None = None

    @property
    def shortened(self) -> bool:
        """Whether any layer holds fewer keys than there were columns."""
        return self.state is not None and self.state.shortened

    @property
    def first_cut(self) -> int | None:
        """The first layer that holds fewer keys than the first one; None where none does."""
        return self.state.first_cut if self.state else None

    @property
    def offset(self) -> int:
        """Columns that were dropped at the input."""
        return self.state.offset if self.state else 0

    def length(self, layer: int) -> int:
        """Keys that a layer holds."""
        return self.held[layer] if self.held else 0

    def valid(self, layer: int) -> torch.Tensor | None:
        """(B, m) bool of the first keys of a layer; None where all are valid."""
        return self.state.valid[layer] if self.state else None

    def join(
        self, layer: int, new: torch.Tensor | None, shape: tuple[int, int]
    ) -> torch.Tensor | None:
        """(B, past + n) bool of a layer's keys after this forward; None where all are valid.

        Args:
            new: (B, n) of its tokens, None where all are valid.
            shape: (B, n).
        """
        return join_valid(self.valid(layer), self.length(layer), new, shape)

    def tells(self, layer: int) -> object:
        """Equal for layers whose keys are as many, and valid alike."""
        return self.length(layer), id(self.valid(layer))


def find_past(given: Mapping[str, object], columns: int, num_layers: int) -> Past:
    """The cache that a decoder is given, before anything of this forward is in it.

    Args:
        columns: of the original prompts that it stands for.
    """
    cache = cast("Cache | None", given.get("cache"))
    if not columns:
        return Past(columns, cache)
    state = cache_state(cache)
    if state is None:
        valid = past_columns(given.get("attention_mask"), columns)
        state = CacheState([valid] * num_layers, None, 0)
    held = tuple(layer_length(cache, layer) for layer in range(num_layers))
    return Past(columns, cache, held, state)
