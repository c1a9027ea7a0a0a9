"""Copies of a prompt's KV cache as they would be had the prefill been cut at a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from vtprune.engine.kv_cache import PrunedCache, cache_length, fork_cache

if TYPE_CHECKING:
    from transformers.cache_utils import Cache, DynamicLayer


def can_branch(cache: object) -> bool:
    """Return whether every layer of a cache holds all keys in order, in plain growing tensors."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def branch_cache(cache: Cache, layer: int, kept: torch.Tensor) -> Cache:
    """Return a cache as it would be had a prefill been cut at `layer`; the given one stays as is.

    What goes on with a branch leaves the others alone: growing makes new tensors.

    Args:
        cache: of a prompt without padding and without a cut; see `can_branch`.
        layer: the first layer that holds the shorter sequence; past the last: nothing is cut.
        kept: (B, n) int64 ascending columns that it and later layers hold. A cache of 1 row is
            branched into B rows.
    """
    length, rows = cache_length(cache), len(kept)
    branch = fork_cache(cache)
    for number, cached in enumerate(cast("list[DynamicLayer]", branch.layers)):
        for name in ("keys", "values"):
            states: torch.Tensor = getattr(cached, name)  # (1, H, S, D)
            if number < layer:
                states = states.expand(rows, *states.shape[1:])
            else:  # (H, B, n, D) -> (B, H, n, D)
                states = states[0][:, kept.to(states.device)].transpose(0, 1)
            setattr(cached, name, states)
    if layer < len(branch.layers):
        offset = 0 if layer else length - kept.shape[1]
        PrunedCache(first_cut=layer or None, offset=offset).tie(branch)
    return branch


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of the keys and values that a cache holds."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(states.nbytes for states in tensors if isinstance(states, torch.Tensor))
