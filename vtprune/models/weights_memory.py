"""The memory that weights take while transformers reads them: little more than their own.

transformers (5.17 to 5.24) maps the files. A weight that is converted is a copy, and what was read
of its file stays in memory beside it; weights of experts are copied once more when they are joined.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vtprune.errors import ModelError
from vtprune.models.weights import AGAIN, Weights
from vtprune.process_settings import environment

EXPERT = re.compile(r"experts\.\d+\.")
IN_TURN = "HF_DEACTIVATE_ASYNC_LOAD"
"""The environment variable, transformers' only switch for that."""
READ_AROUND = 2**21
"""The most bytes that Linux maps around a page that is read."""
DONTNEED = 4
"""Linux's MADV_DONTNEED: a page is read from its file again when it is needed again."""


@contextmanager
def little_memory(weights: Weights) -> Iterator[None]:
    """Let transformers drop what it has read and copied, and read experts into their place.

    Where weights of experts are joined, each is read in its turn; by default threads convert all of
    them ahead. For one thread at a time; what other threads load meanwhile is right too.
    """
    experts = any(EXPERT.search(name) for name in weights.num_bytes)
    pages = _MappedFiles(weights.files)
    with environment({IN_TURN: "1"} if experts else {}), _replace_reading(pages):
        yield


@contextmanager
def _replace_reading(pages: _MappedFiles) -> Iterator[None]:
    from transformers import core_model_loading as loading

    read: Callable[..., torch.Tensor] | None = getattr(loading, "_materialize_copy", None)
    converter = getattr(loading, "WeightConverter", None)
    gather = getattr(converter, "materialize_tensors", None)
    if read is None or converter is None or gather is None:  # another version: it takes more memory
        yield
        return

    def read_and_drop(tensor: Any, device: Any = None, dtype: Any = None) -> torch.Tensor:
        mapped = tensor[...]
        weight = read(mapped, device, dtype)
        if weight.data_ptr() != mapped.data_ptr():
            pages.drop(mapped)
        return weight

    def gather_in_place(mapping: Any) -> dict[str, Any]:
        joined = _join(mapping, pages)
        return gather(mapping) if joined is None else joined

    inherited = "materialize_tensors" not in vars(converter)
    loading._materialize_copy = read_and_drop
    converter.materialize_tensors = gather_in_place
    try:
        yield
    finally:
        loading._materialize_copy = read
        if inherited:
            del converter.materialize_tensors
        else:
            converter.materialize_tensors = gather


def _join(mapping: Any, pages: _MappedFiles) -> dict[str, Any] | None:
    """Return the experts' weights of a layer in one tensor; None: they are not of that form."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = list(mapping.operations)
    kinds = [type(step) for step in steps]
    readers = {key: mapping.collected_tensors.get(key, []) for key in mapping.source_patterns}
    readers = {key: reads for key, reads in readers.items() if reads}
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]) or steps[0].dim != 0:
        return None
    if len({len(reads) for reads in readers.values()}) != 1 or len(mapping.target_patterns) != 1:
        return None
    if not all(callable(read) for reads in readers.values() for read in reads):
        return None  # read ahead by threads, or tensors that are to be saved
    if (len(kinds) == 1) != (len(readers) == 1) or steps[-1].dim < len(kinds) - 1:
        return None
    layer = next(iter(mapping.layer_targets), mapping.target_patterns[0])
    tensor = _read_into_one(layer, list(readers.values()), steps[-1].dim - 1, pages)
    if tensor is None:
        return None
    mapping.collected_tensors.clear()
    # The first step takes a tensor as joined; the mapping is of this layer alone.
    mapping.operations = steps[:1]
    return {next(iter(readers)): tensor}


def _read_into_one(
    layer: str, readers: Sequence[Sequence[Callable[[], Any]]], dim: int, pages: _MappedFiles
) -> torch.Tensor | None:
    """Return the weights (experts, ...), those of several names of an expert beside each other.

    Args:
        readers: of every name, of every expert.
        dim: of an expert's weights along which those of several names lie.

    Returns:
        None where another process has some, or they are not of one dtype.

    Raises:
        ModelError: they are not of one shape.
    """
    firsts = [reads[0]() for reads in readers]
    if any(first is None for first in firsts):
        return None
    shape = list(firsts[0].shape)
    if len(firsts) > 1:
        shape[dim] = sum(first.shape[dim] for first in firsts)
    joined = firsts[0].new_empty(len(readers[0]), *shape)
    offset = 0
    for first, reads in zip(firsts, readers, strict=True):
        size = first.shape[dim] if len(firsts) > 1 else None
        places = joined if size is None else joined.narrow(dim + 1, offset, size)
        offset += size or 0
        weights = itertools.chain([first], (read() for read in reads[1:]))
        for place, weight in zip(places, weights, strict=True):
            if weight is None or weight.dtype != place.dtype:
                return None
            if weight.shape != place.shape:
                raise ModelError(
                    f"experts of {layer} have weights of several shapes: {list(place.shape)} and "
                    f"{list(weight.shape)}",
                    AGAIN,
                )
            place.copy_(weight)
            pages.drop(weight)
    return joined


class _MappedFiles:
    """Where files of weights are mapped into this process's memory.

    Args:
        files: that are mapped before the first weight is dropped.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = frozenset(os.path.realpath(file) for file in files)

    def drop(self, weight: torch.Tensor) -> None:
        """Drop the pages of a weight, if it lies in one of the files; nobody has written to it."""
        start = weight.data_ptr() if weight.device.type == "cpu" else 0
        place = next((place for place in self._places if start in place), None)
        if place is None:
            return
        first = max((start // READ_AROUND - 1) * READ_AROUND, place.start)
        end = min((start + weight.nbytes) // READ_AROUND * READ_AROUND + READ_AROUND, place.stop)
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), DONTNEED)

    @functools.cached_property
    def _places(self) -> list[range]:
        if sys.platform != "linux":
            return []
        places = []
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in self.files:
                start, end = (int(edge, 16) for edge in fields[0].split("-"))
                places.append(range(start, end))
        return places


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
