"""The least seconds that a model's layers can take on a machine: its roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from vtprune.device import time_runs
from vtprune.models import cost
from vtprune.models.structure import decoder_layers

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

TRIES = 5  # of what the machine's ceilings are measured by
COMPUTE, BANDWIDTH = "compute", "bandwidth"


class Ceilings(NamedTuple):
    """What a machine can reach: FLOPs a second, and bytes a second of its memory."""

    flops_per_second: float
    bytes_per_second: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure a matrix product and a copy, the best of a few tries."""
    side = 4096 if device.type == "cuda" else 1024
    left = torch.randn(side, side, device=device).to(dtype)
    source = torch.randn(2**24, device=device)
    target = torch.empty_like(source)
    product = min(time_runs(lambda: left @ left, device, TRIES))
    copy = min(time_runs(lambda: target.copy_(source), device, TRIES))
    return Ceilings(2 * side**3 / product, 2 * source.numel() * source.element_size() / copy)


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's weights, by part.

    Args:
        total: of all, tied ones once.
        layer: of one decoder layer.
        head: of the output head.
    """

    total: int
    layer: float
    head: int


def weigh(model: PreTrainedModel, size: int) -> WeightBytes:
    """Return the bytes of a model's weights, which may be without values.

    Args:
        size: bytes of one number.
    """
    layers = decoder_layers(model)
    head = model.get_output_embeddings()
    return WeightBytes(
        total=size * count_weights(model),
        layer=size * count_weights(layers) / max(1, len(layers)),
        head=size * (count_weights(head) if head is not None else 0),
    )


def count_weights(module: nn.Module) -> int:
    """Return the number of parameters of a module, tied ones once."""
    return sum(weight.numel() for weight in module.parameters())


@dataclass(frozen=True)
class Bound:
    """The least seconds of a pass through the decoder.

    Args:
        seconds: of every layer the longer of the two that follow, summed.
        arithmetic: at the peak FLOP/s.
        reading: of weights and cache, at the memory's bandwidth.
    """

    seconds: float
    arithmetic: float
    reading: float

    @property
    def by(self) -> str:
        """What bounds it: "compute" or "bandwidth"."""
        return COMPUTE if self.arithmetic >= self.reading else BANDWIDTH


@dataclass(frozen=True)
class Roofline:
    """The least seconds of a question, by its parts; decoding is of one token."""

    vision: float
    prefill: Bound
    decode: Bound


def prefill_bound(
    ceilings: Ceilings,
    shape: cost.DecoderShape,
    weights: WeightBytes,
    counts: Sequence[int],
    dtype_size: int,
) -> Bound:
    """Return the least seconds of the layers over a prompt, and of the head at its end.

    Args:
        counts: tokens that each layer sees.
        dtype_size: bytes of one number.
    """
    return _bound(ceilings, [
        (cost.head_flops(shape), weights.head),
        *((flops, _weights_read(shape, weights, layer, count, dtype_size))
          for layer, (flops, count) in enumerate(
              zip(cost.flops_by_layer(shape, counts), counts, strict=True)
          )),
    ])  # fmt: skip


def decode_bound(
    ceilings: Ceilings,
    shape: cost.DecoderShape,
    weights: WeightBytes,
    counts: Sequence[int],
    dtype_size: int,
) -> Bound:
    """Return the least seconds of one token after a prompt; arguments as of `prefill_bound`."""
    return _bound(ceilings, [
        (cost.head_flops(shape), weights.head),
        *((cost.layer_flops(shape, 1, count + 1, layer),
           _weights_read(shape, weights, layer, 1, dtype_size)
           + dtype_size * shape.by_layer[layer].cached * count)
          for layer, count in enumerate(cost.cached_by_layer(shape, counts))),
    ])  # fmt: skip


def _weights_read(
    shape: cost.DecoderShape, weights: WeightBytes, layer: int, tokens: int, dtype_size: int
) -> float:
    """Return the bytes of a layer's weights that tokens go through.

    Of a mixture of experts a few tokens read only theirs: no more than they multiply with.
    """
    multiplied = shape.by_layer[layer].token / 2 * dtype_size
    return min(weights.layer, tokens * multiplied) if multiplied else weights.layer


def _bound(ceilings: Ceilings, parts: Sequence[tuple[float, float]]) -> Bound:
    """Return the bound of (FLOPs, bytes), one part after the other."""
    arithmetic = [flops / ceilings.flops_per_second for flops, _ in parts]
    reading = [read / ceilings.bytes_per_second for _, read in parts]
    return Bound(sum(map(max, arithmetic, reading)), sum(arithmetic), sum(reading))
