"""What this machine reaches, and what a model would take at that: the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vtprune.device import cpu_name, free_memory
from vtprune.inference.measuring import compute_vision_flops
from vtprune.inference.report import Block
from vtprune.inference.roofline import (
    Ceilings,
    Roofline,
    WeightBytes,
    decode_bound,
    measure_ceilings,
    prefill_bound,
)
from vtprune.models import cost

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vtprune.engine.trace import Trace
    from vtprune.evaluation.profiling.gpus import Gpu
    from vtprune.models.base import Inputs
    from vtprune.models.loading import Loaded


@dataclass(frozen=True)
class Machine(Block):
    """One device, measured; or one that is not here, by its data sheet.

    Args:
        device: as torch names it; "data sheet" where it is not here.
        name: of the processor or GPU.
        threads: of a CPU; 0 of a GPU.
        dtype: that the ceilings are of.
        flops_per_second: of a large matrix product; the peak of a data sheet.
        bytes_per_second: of a copy, read and write; the bandwidth of a data sheet.
        free_bytes: of memory; all of it, of a data sheet.
        predicted: nothing was measured on it.
        source: the data sheet; None where it was measured.
    """

    device: str
    name: str
    threads: int
    dtype: str
    flops_per_second: float
    bytes_per_second: float
    free_bytes: int
    predicted: bool = False
    source: str | None = None

    @property
    def ceilings(self) -> Ceilings:
        """What it can reach."""
        return Ceilings(self.flops_per_second, self.bytes_per_second)


def machine_of_gpu(gpu: Gpu, dtype: str) -> Machine:
    """Return a card that is not here, by its data sheet.

    Raises:
        ModelError: the data sheet has no such dtype.
    """
    return Machine(
        device="data sheet",
        name=gpu.name,
        threads=0,
        dtype=dtype,
        flops_per_second=gpu.peak_of(dtype),
        bytes_per_second=gpu.bandwidth,
        free_bytes=gpu.memory,
        predicted=True,
        source=gpu.source,
    )


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The device's ceilings, in about a second."""
    ceilings = measure_ceilings(device, dtype)
    return Machine(
        device=str(device),
        name=device_name(device),
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        dtype=str(dtype).removeprefix("torch."),
        flops_per_second=ceilings.flops_per_second,
        bytes_per_second=ceilings.bytes_per_second,
        free_bytes=free_memory(device),
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return cpu_name()


def peak_bytes(
    shape: cost.DecoderShape,
    weights: WeightBytes,
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
    weights: WeightBytes
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
        given = self.machine.ceilings, self.shape, self.weights, counts, self.dtype.itemsize
        return Roofline(
            vision=vision_flops / self.machine.flops_per_second,
            prefill=prefill_bound(*given),
            decode=decode_bound(*given),
        )

    def peak_bytes(self, counts: Sequence[int]) -> int:
        """Return an estimate of the most memory that the language model needs at once."""
        eager = self.attention == "eager"
        return peak_bytes(self.shape, self.weights, counts, self.dtype.itemsize, eager)
