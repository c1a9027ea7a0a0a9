"""FLOPs of any vision encoder: it runs on shapes alone, and its products are counted."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry

from vtprune.errors import ModelError
from vtprune.models.cost import CostError, uncounted
from vtprune.models.skeleton import build_skeleton
from vtprune.models.structure import find_decoder
from vtprune.models.transformers_messages import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

META = torch.device("meta")
MOST_KEPT = 256
"""Counts that are kept, one for each size of inputs."""


class EncoderFlops(NamedTuple):
    """FLOPs of a vision tower, and of what follows it up to the decoder."""

    tower: float
    projector: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.tower + self.projector


class _DecoderReachedError(Exception):
    """All media are encoded."""


class _CountProducts(TorchDispatchMode):
    """Counts products; what depends on weights or their results has a shape and no values.

    Everything else (grids, indices, masks, pixels) is computed, since shapes follow from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        with self:
            decomposed = func.decompose(*args, **options)
        if decomposed is not NotImplemented:
            return decomposed
        leaves, _ = tree_flatten((args, options))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not any(tensor.device == META for tensor in tensors):
            if options.get("device") == META:  # a new tensor, or a copy of one with values
                options["device"] = torch.device("cpu")
            result = func(*args, **options)
        else:
            if "device" in options:
                options["device"] = META
            if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
                args = (args[0], _as_numbers(args[1]), *args[2:])
            shaped, shaped_options = tree_map_only(torch.Tensor, _shape_of, (args, options))
            result = func(*shaped, **shaped_options)
            if func._schema.name.endswith("_"):  # in place
                result = args[0]
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **options, out_val=result)
        return result


class _KeepValues(TorchFunctionMode):
    """Gives tensors that are made of numbers their values, wherever a model puts them."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.tensor:  # torch makes these without asking a dispatch mode
            options.pop("device", None)
        return func(*args, **options)


def _shape_of(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device == META:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _as_numbers(index: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Return an index with the places of masks in their stead: shapes depend on their values."""
    numbers: list[torch.Tensor | None] = []
    for part in index:
        masks = part is not None and part.dtype == torch.bool and part.device != META
        numbers += part.nonzero().unbind(1) if part is not None and masks else [part]
    return numbers


class EncoderCounter:
    """Counts the FLOPs of a model between its inputs and its decoder.

    Args:
        model: with or without its weights; it is not run, but one of its config.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._config = model.config
        self._skeleton = model if model.device == META else None
        self._counted: dict[object, EncoderFlops | CostError] = {}
        self._lock = threading.Lock()

    def count(self, tensors: Mapping[str, torch.Tensor]) -> EncoderFlops | CostError:
        """Return the FLOPs for a prompt's inputs on the CPU; the error where it can't be counted.

        Inputs of the same sizes are counted once.
        """
        prompt = tensors["input_ids"].shape
        key = tuple(
            (
                name,
                value.shape,
                None if value.is_floating_point() else tuple(value.flatten().tolist()),
            )
            for name, value in sorted(tensors.items())
            if value.shape != prompt
        )
        with self._lock:
            if key not in self._counted:
                if len(self._counted) >= MOST_KEPT:
                    self._counted.clear()
                try:
                    self._counted[key] = self._count(tensors)
                except CostError as error:
                    self._counted[key] = error.with_traceback(None)
            return self._counted[key]

    def _count(self, tensors: Mapping[str, torch.Tensor]) -> EncoderFlops:
        try:
            if self._skeleton is None:
                self._skeleton = build_skeleton(self._config, "eager")
            return count_encoder(self._skeleton, tensors)
        except CostError:
            raise
        except ModelError as error:
            raise _uncounted(self._config, error) from error


def _uncounted(config: object, error: Exception) -> CostError:
    return uncounted(
        config, f"a vision encoder that does not run without weights ({type(error).__name__})"
    )


def count_encoder(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> EncoderFlops:
    """Return the FLOPs of a skeleton between its inputs and its decoder.

    Args:
        model: no other thread runs it meanwhile.
        tensors: a prompt's inputs, on the CPU.

    Raises:
        CostError: what it does depends on the values of weights, or the inputs are not its own.
    """
    if getattr(model, "get_decoder", lambda: None)() is None:
        raise uncounted(model.config, "a model without a decoder of its own")
    decoder, inner = find_decoder(model), model.base_model
    counter, in_towers = _CountProducts(), 0.0

    def measured(encode: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(encode)
        def run(*args: object, **kwargs: object) -> object:
            nonlocal in_towers
            before = counter.flops
            output = encode(*args, **kwargs)
            in_towers += counter.flops - before
            return output

        return run

    given = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in tensors.items()
    }
    with ExitStack() as stack:
        stack.enter_context(_replace_forward(decoder, _reach_decoder))
        for name in dict.fromkeys(path.split(".")[0] for path in tower_paths(inner, decoder)):
            tower = inner.get_submodule(name)
            stack.enter_context(_replace_forward(tower, measured(tower.forward)))
        stack.enter_context(quiet())
        stack.enter_context(torch.no_grad())
        stack.enter_context(counter)
        stack.enter_context(_KeepValues())
        try:
            model(**given)
        except _DecoderReachedError:
            pass
        except Exception as error:  # of any kind: it is the code of a class that is not known
            raise _uncounted(model.config, error) from error
    return EncoderFlops(in_towers, counter.flops - in_towers)


@contextmanager
def _replace_forward(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Run something else in place of a module of the skeleton, which nothing but the count runs."""
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


def _reach_decoder(*_: object, **__: object) -> None:
    raise _DecoderReachedError


def tower_paths(inner: nn.Module, decoder: nn.Module) -> list[str]:
    """Return where a model's vision towers have their layers: the longest lists of modules."""
    inside = {id(module) for module in decoder.modules()}
    weights = {
        path: sum(weight.numel() for weight in module.parameters())
        for path, module in inner.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and id(module) not in inside
    }
    most = max(weights.values(), default=0)
    return [path for path, weight in weights.items() if 2 * weight > most]
