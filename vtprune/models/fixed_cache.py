"""Caches as compiled layers take them: of one layer alone, and of a size that stays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)
from transformers.configuration_utils import PreTrainedConfig

from vtprune.models.seams import CHECK


class OwnLengthLayer(StaticLayer):
    """A static layer of a cache that is as long as what it is given first, and room for more.

    So layers past a cut stay shorter than those before, and no shape changes while decoding. The
    first forward sees its own keys alone, as in a growing cache, without free slots.

    Args:
        room: tokens after those of the first forward that it has to hold.
    """

    def __init__(self, room: int) -> None:
        super().__init__(max_cache_len=room)
        self.room, self.marked = room, False

    # Transformers (5.17 to 5.24) makes a mask for every single token where this is true, which free
    # slots need, and leaves the mask of a prompt to the kernel where it is not.
    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether it has free slots."""
        return self.is_initialized

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room for the first keys and those to come.

        Unlike transformers' own: marks of addresses that graphs check would give each layer a graph
        of its own.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        self.max_cache_len = key_states.shape[-2] + self.room
        pad = (0, 0, 0, self.room)
        self.keys = torch.nn.functional.pad(key_states, pad)
        self.values = torch.nn.functional.pad(value_states, pad)
        self.cumulative_length = torch.full(
            (), key_states.shape[-2], dtype=torch.long, device=self.device
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values; those of the first forward without free slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        return super().update(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next forward of `query_length` tokens sees, and the first."""
        return (self.max_cache_len if self.is_initialized else query_length), 0

    def get_seq_length(self) -> int:
        """Return how many keys it holds."""
        return int(self.cumulative_length) if self.is_initialized else 0

    def reset(self) -> None:
        """Empty it; what comes next is a first forward again."""
        self.__init__(self.room)  # type: ignore[misc]

    def mark_addresses(self) -> None:
        """Tell CUDA graphs, once, that its tensors stay where they are."""
        if self.is_initialized and not self.marked:
            for tensor in (self.keys, self.values, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor, guard=False)
            self.marked = True


class LayerCache(Cache):
    """One layer of a cache, as that layer of a decoder takes it, whatever number it names.

    In the whole cache, the number of the layer would be a part of its graph.
    """

    def __init__(self, layer: DynamicLayer | OwnLengthLayer) -> None:
        super().__init__(layers=[layer])
        self.layer = layer

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values; return all."""
        return self.layer.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many keys the layer holds."""
        return int(self.layer.get_seq_length())

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many keys the next forward sees, and the first."""
        return self.layer.get_mask_sizes(query_length)


def own_length_cache(config: PreTrainedConfig, room: int) -> Cache:
    """Return a cache whose layers have lengths of their own that stay while decoding.

    Args:
        config: of the decoder.
        room: tokens of the answer.

    Returns:
        One that grows where the config asks for other layers than of plain attention.
    """
    cache = DynamicCache(config=config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return cache
    return Cache(layers=[OwnLengthLayer(room) for _ in range(config.num_hidden_layers)])


def layer_cache(cache: Cache, number: int) -> LayerCache | None:
    """Return one layer of a cache for a compiled layer; None: it is of a kind that can't be.

    Raises:
        ModelError: the cache is not to be used here.
    """
    check: Callable[[], None] | None = vars(cache).get(CHECK)
    if check is not None:
        check()
    if cache.offloading:
        return None
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= number:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[number] if number < len(cache.layers) else None
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, OwnLengthLayer):
        return None
    if isinstance(layer, OwnLengthLayer):
        layer.mark_addresses()
    return LayerCache(layer)  # type: ignore[arg-type]
