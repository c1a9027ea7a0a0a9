"""What this machine reaches, and what a model would take at that: the roofline."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vtprune.device import free_memory
from vtprune.evaluation.profiling.shapes import count_weights
from vtprune.inference.compare import measure_ceilings
from vtprune.inference.measuring import compute_vision_flops
from vtprune.inference.report import Block
from vtprune.models import cost
from vtprune.models.structure import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from vtprune.engine.trace import Trace
    from vtprune.models.base import Inputs
    from vtprune.models.loading import Loaded


@dataclass(frozen=True)
class Machine(Block):
    """One device, measured.

    Args:
        device: as torch names it.
        name: of the processor or GPU.
        threads: of a CPU; 0 of a GPU.
        dtype: that the ceilings were measured in.
        flops_per_second: of a large matrix product.
        bytes_per_second: of a copy, read and write.
        free_bytes: of memory.
    """

    device: str
    name: str
    threads: int
    dtype: str
    flops_per_second: float
    bytes_per_second: float
    free_bytes: int


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The device's ceilings, in about a second."""
    rate, bandwidth = measure_ceilings(device, dtype)
    return Machine(
        device=str(device),
        name=device_name(device),
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        dtype=str(dtype).removeprefix("torch."),
        flops_per_second=rate,
        bytes_per_second=bandwidth,
        free_bytes=free_memory(device),
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or os.name


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights, by part.

    Args:
        total: of all, tied ones once.
        layer: of one decoder layer.
        head: of the output head.
    """

    total: int
    layer: float
    head: int


def weigh(model: PreTrainedModel, size: int) -> Weights:
    """The weights of a model, which may be without values.

    Args:
        size: bytes of one number.
    """
    layers = decoder_layers(model)
    head = model.get_output_embeddings()
    return Weights(
        total=size * count_weights(model),
        layer=size * count_weights(layers) / len(layers),
        head=size * (count_weights(head) if head is not None else 0),
    )


@dataclass(frozen=True)
class Roofline:
    """The least seconds that a row can take here, by its parts."""

    vision: float
    prefill: float
    decode_per_token: float


def layer_seconds(machine: Machine, flops: float, read: float) -> float:
    """Return the longer of the arithmetic and of reading so many bytes."""
    return max(flops / machine.flops_per_second, read / machine.bytes_per_second)


def estimate(
    machine: Machine,
    shape: cost.DecoderShape,
    weights: Weights,
    counts: Sequence[int],
    vision_flops: float,
    dtype_size: int,
) -> Roofline:
    """Every layer at the machine's ceilings.

    Args:
        counts: tokens that each layer sees.
        dtype_size: bytes of one number.
    """
    head = layer_seconds(machine, cost.head_flops(shape), weights.head)
    return Roofline(
        vision=vision_flops / machine.flops_per_second,
        prefill=head
        + sum(
            layer_seconds(machine, cost.layer_flops(shape, count, count, layer), weights.layer)
            for layer, count in enumerate(counts)
        ),
        decode_per_token=head
        + sum(
            layer_seconds(
                machine,
                cost.layer_flops(shape, 1, count + 1, layer),
                weights.layer + dtype_size * shape.by_layer[layer].cached * count,
            )
            for layer, count in enumerate(counts)
        ),
    )


def peak_bytes(
    shape: cost.DecoderShape,
    weights: Weights,
    counts: Sequence[int],
    dtype_size: int,
    eager: bool = False,
) -> int:
    """An estimate of the most memory that the language model needs at once.

    Weights, the cache, and what one layer holds while it runs: states, and the MLP's.

    Args:
        eager: attention scores are held too.
    """
    most = max(counts)
    activations = dtype_size * most * cost.activations(shape)
    if eager:
        activations += (dtype_size + 4) * shape.heads * most**2
    return int(weights.total + cost.kv_bytes(shape, counts, dtype_size) + activations)


@dataclass(frozen=True)
class ProfiledModel:
    """A model without weights, and the device that it would run on.

    Args:
        loaded: its structure and preparation files.
        machine, weights: of the device, and of the whole model.
        attention: the kernel; None leaves it to transformers.
    """

    loaded: Loaded
    device: torch.device
    dtype: torch.dtype
    machine: Machine
    weights: Weights
    attention: str | None = None

    @property
    def config(self) -> PreTrainedConfig:
        return self.loaded.model.config

    @property
    def shape(self) -> cost.DecoderShape:
        """What the language model's cost depends on."""
        return self.loaded.decoder_shape

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that the cache holds of a token in a layer, the mean over the layers."""
        return cost.kv_bytes(self.shape, [1] * self.shape.layers, self.dtype.itemsize) // (
            self.shape.layers
        )

    def vision_flops(self, inputs: Inputs, trace: Trace | None = None) -> float:
        """Return the FLOPs of tower and projector; 0 where they are not known.

        Args:
            trace: says what goes before the tower; None: nothing.
        """
        return compute_vision_flops(self.loaded, inputs, trace)

    def roofline(self, counts: Sequence[int], vision_flops: float = 0.0) -> Roofline:
        """Return the least seconds for these tokens in each layer."""
        size = self.dtype.itemsize
        return estimate(self.machine, self.shape, self.weights, counts, vision_flops, size)

    def peak_bytes(self, counts: Sequence[int]) -> int:
        """Return an estimate of the most memory that the language model needs at once."""
        eager = self.attention == "eager"
        return peak_bytes(self.shape, self.weights, counts, self.dtype.itemsize, eager)
