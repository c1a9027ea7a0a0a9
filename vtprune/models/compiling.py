"""Compiled layers: of a decoder and of vision towers, one graph for all layers of a kind.

What is compiled is the forward inside a layer module. Hooks before and after the layer run outside
of the graph, so all that pruning gives a layer reaches it as an argument. Where something inside
the layer is hooked or read, which a graph would not see, that call runs as it is, uncompiled.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from vtprune.device import compile_times
from vtprune.errors import ModelError
from vtprune.models.seams import (
    LAYER_NUMBERS,
    SHARED,
    Arguments,
    cache_argument,
    captured_by,
    counts_distances,
    masks_choice,
    outputs_asked,
    scales_queries,
)
from vtprune.models.structure import Structure, find_decoder, find_structure

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache

ATTRIBUTE = "_vtprune_compiled"
"""The attribute of a model that holds its CompiledModel."""
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
NO_REGISTRY = types.SimpleNamespace()
PACKED = "cu_seqlens"
"""The argument that gives an encoder's layers the bounds of the pictures."""
LISTS = ("layers", "layer", "blocks", "block", "resblocks")
"""The names of lists of an encoder's layers."""


@dataclass(frozen=True)
class CompileCost:
    """What compiling has cost.

    Args:
        seconds: that compiling took.
        graphs: that were compiled.
        recompiles: those of them for a function that had a graph already, which did not fit.
    """

    seconds: float = 0.0
    graphs: int = 0
    recompiles: int = 0

    def plus(self, other: CompileCost) -> CompileCost:
        """Return both together."""
        return CompileCost(
            self.seconds + other.seconds,
            self.graphs + other.graphs,
            self.recompiles + other.recompiles,
        )

    def since(self, before: CompileCost) -> CompileCost:
        """Return what was added to `before`."""
        return CompileCost(
            self.seconds - before.seconds,
            self.graphs - before.graphs,
            self.recompiles - before.recompiles,
        )


@dataclass(eq=False)
class CompiledFunction:
    """A compiled forward of all layers of one kind, with a code object and so limits of its own."""

    run: Callable[..., object]
    seconds: float = 0.0
    graphs: int = 0

    def __call__(self, layer: nn.Module, given: Mapping[str, object]) -> object:
        before = compile_times()
        try:
            return self.run(layer, given)
        finally:
            after = compile_times()
            self.graphs += after.graphs - before.graphs
            self.seconds += after.seconds - before.seconds

    @property
    def cost(self) -> CompileCost:
        """What compiling it has cost so far."""
        return CompileCost(self.seconds, self.graphs, max(self.graphs - 1, 0))

    def __deepcopy__(self, memo: object) -> CompiledFunction:
        """Return itself: copies of a model share its graphs."""
        return self


_FUNCTIONS: dict[object, CompiledFunction] = {}
"""All of this process: models with layers of the same kind share their graphs."""


@dataclass(eq=False)
class CompiledModel:
    """The compiled layers of a model.

    Args:
        backend, mode: of `torch.compile`.
        static_cache: decode on a cache whose shapes stay, not on one that grows.
        layers: of the decoder, that are compiled.
        num_layers: of the decoder.
        tower_layers: of vision encoders, that are compiled, or whose feed-forward networks are.
        reasons: why others are not, each with how many.
    """

    backend: str
    mode: str | None
    static_cache: bool
    layers: int = 0
    num_layers: int = 0
    tower_layers: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    functions: dict[object, CompiledFunction] = field(default_factory=dict)
    earlier: dict[object, CompileCost] = field(default_factory=dict)
    """What each function had cost when this model first ran it: other models share them."""

    @property
    def cost(self) -> CompileCost:
        """What compiling has cost so far."""
        costs = [function.cost.since(self.earlier[key]) for key, function in self.functions.items()]
        return CompileCost(
            sum(cost.seconds for cost in costs),
            sum(cost.graphs for cost in costs),
            sum(cost.recompiles for cost in costs),
        )

    def function(
        self, kind: object, one_token: bool, forward: Callable[..., object]
    ) -> Callable[..., object]:
        """Return the compiled forward of a kind of layers, for prompts or for single tokens."""
        key = kind, one_token, self.backend, self.mode
        if key not in _FUNCTIONS:
            _FUNCTIONS[key] = CompiledFunction(self.compile(forward))
        if key not in self.functions:
            self.functions[key], self.earlier[key] = _FUNCTIONS[key], _FUNCTIONS[key].cost
        return self.functions[key]

    def compile(self, forward: Callable[..., object]) -> Callable[..., object]:
        def layer_forward(layer: nn.Module, given: Mapping[str, object]) -> object:
            return forward(layer, **given)

        # Dynamo counts and limits the graphs of a code object, so each function gets one.
        layer_forward.__code__ = layer_forward.__code__.replace()
        return cast(
            "Callable[..., object]",
            torch.compile(layer_forward, backend=self.backend, mode=self.mode, dynamic=True),
        )

    def cache_for(self, model: nn.Module, room: int) -> dict[str, object]:
        """Return the argument of `generate` for a cache that suits the graphs.

        Args:
            room: tokens of the answer.
        """
        if not self.static_cache:
            return {}
        from vtprune.models.fixed_cache import own_length_cache

        config = find_decoder(cast("PreTrainedModel", model)).config
        return cache_argument(model, own_length_cache(cast("PreTrainedConfig", config), room))

    def notes(self) -> list[str]:
        """Return what a user should know of what is not compiled."""
        return [
            f"--compile: {count} of {self.num_layers} decoder layers run uncompiled, each of which "
            f"{reason}"
            for reason, count in self.reasons.items()
        ]

    def warnings(self) -> list[str]:
        """Return what a user should know of the graphs."""
        import torch._dynamo.config as config

        limit = int(config.recompile_limit)
        if any(function.graphs >= limit for function in self.functions.values()):
            return [
                f"one kind of layers has {limit} compiled graphs, the most that "
                "torch._dynamo.config.recompile_limit allows: inputs that fit none of them run "
                "uncompiled"
            ]
        return []


def compiled_model(model: nn.Module) -> CompiledModel | None:
    """Return what is compiled of a model; None: nothing is."""
    return cast("CompiledModel | None", vars(model).get(ATTRIBUTE))


class CompiledForward:
    """The forward of one layer, in the place of its own.

    Args:
        layer: whose forward it is.
        number: of the decoder's layer; None: of an encoder's, which has no cache.
        compiled: what it is a part of.
    """

    def __init__(self, layer: nn.Module, number: int | None, compiled: CompiledModel) -> None:
        self.layer, self.number, self.compiled = layer, number, compiled
        self.__wrapped__ = layer.forward  # what `inspect.signature` reads
        self.arguments = Arguments(layer.forward)
        parameters = inspect.signature(layer.forward).parameters.values()
        self.required = {each.name for each in parameters if each.default is not None}
        self.kind = kind_of(layer)
        self.inside = [module for module in layer.modules() if module is not layer]
        self.captures = False  # outputs inside the layer were asked for
        self.taken_off: list[tuple[nn.Module, int, Callable[..., object], str]] = []

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the graph; the layer as it is where the graph would not see all that it does."""
        if torch.is_grad_enabled() or self.is_hooked_inside():
            return self.__wrapped__(*args, **kwargs)
        given = self.arguments.bind(args, kwargs)
        one_token, cache = False, given.get("cache")
        if self.number is not None:
            from vtprune.models.fixed_cache import layer_cache

            hidden = given.get("hidden_states")
            one_token = isinstance(hidden, torch.Tensor) and hidden.shape[-2] == 1
            given["cache"] = of_layer = cache and layer_cache(cast("Cache", cache), self.number)
            if cache is not None and of_layer is None:
                return self.__wrapped__(*args, **kwargs)
        function = self.compiled.function(self.kind, one_token, type(self.layer).forward)
        named = self.arguments.give(given)
        # An argument that is None fits the same graph as one that is left out.
        used = {k: v for k, v in named.items() if v is not None or k in self.required}
        return function(self.layer, used)

    def take_off_idle(self, module: nn.Module) -> None:
        """Take transformers' capturing hooks off a module inside, while their output is not asked.

        A graph would have a break at each.
        """
        for number, hook in list(module._forward_hooks.items()):
            key = captured_by(hook)
            if key is not None and key not in outputs_asked():
                del module._forward_hooks[number]
                self.taken_off.append((module, number, hook, key))

    def put_back(self) -> None:
        """Put those hooks on again, for good, once their output is asked for."""
        asked = outputs_asked() if self.taken_off else ()
        if any(key in asked for *_, key in self.taken_off):
            for module, number, hook, _ in self.taken_off:
                module._forward_hooks[number] = hook
            self.taken_off, self.captures = [], True

    def is_hooked_inside(self) -> bool:
        """Return whether something inside the layer is hooked or replaced, or attention is read."""
        self.put_back()
        if not self.captures:
            for module in self.inside:
                if module._forward_hooks:
                    self.take_off_idle(module)
        return any(
            module._forward_hooks
            or module._forward_pre_hooks
            or "forward" in vars(module)
            or "get_interface" in vars(attention_registry(type(module)))  # type: ignore[arg-type]
            for module in self.inside
        )


@functools.cache
def attention_registry(kind: type[nn.Module]) -> object:
    """Return the registry of attention kernels that a class of modules asks; an empty one: none."""
    return vars(sys.modules[kind.__module__]).get("ALL_ATTENTION_FUNCTIONS", NO_REGISTRY)


def kind_of(layer: nn.Module) -> object:
    """Return a key that is equal for layers with one graph: of classes, sizes and settings."""
    parts: list[object] = []
    for module in layer.modules():
        settings = [
            (name, value)
            for name, value in sorted(vars(module).items())
            if isinstance(value, (bool, int, float, str)) and name not in LAYER_NUMBERS
        ]
        weights = [
            (name, tuple(weight.shape), weight.dtype, weight.device)
            for name, weight in module.named_parameters(recurse=False)
        ]
        kernel = getattr(getattr(module, "config", None), "_attn_implementation", None)
        parts.append((type(module), kernel, tuple(settings), tuple(weights)))
    return tuple(parts)


def compile_model(
    wrapped: nn.Module,
    *,
    backend: str = "inductor",
    mode: str | None = None,
    static_cache: bool | None = None,
) -> CompiledModel:
    """Compile the decoder's layers and those of the vision towers, in place; graphs come on use.

    >>> import vtprune
    >>> vtprune.compile_model(model)
    >>> with vtprune.pruning(model, keep=0.3):
    ...     output = model.generate(**inputs, disable_compile=True)

    Args:
        wrapped: a transformers model that can be pruned, or what holds one.
        backend: of `torch.compile`.
        mode: of `torch.compile`, with inductor: "reduce-overhead" records CUDA graphs.
        static_cache: decode on a cache whose layers have lengths of their own that stay, which CUDA
            graphs need, not on one that grows; None: on CUDA alone. Of vtprune's own generation.

    Raises:
        ModelError: a model that can't be pruned, no compiler, weights that are spread over devices,
            or a backend or mode that does not exist.
    """
    check_backend(backend, mode)
    structure = find_structure(wrapped)
    if (compiled := compiled_model(structure.model)) is not None:
        return compiled
    check_compiler(structure.device, backend)
    if static_cache is None:
        static_cache = structure.device.type == "cuda"
    compiled = CompiledModel(backend, mode, static_cache, num_layers=len(structure.layers))
    towers = encoder_parts(structure)
    for layer in (*structure.layers, *towers):
        refuse_moved(layer)
    for number, layer in enumerate(structure.layers):
        reason = reason_against(structure, number, layer)
        if reason:
            compiled.reasons[reason] = compiled.reasons.get(reason, 0) + 1
            continue
        layer.forward = CompiledForward(layer, number, compiled)
        compiled.layers += 1
    for layer in towers:
        layer.forward = CompiledForward(layer, None, compiled)
        compiled.tower_layers += 1
    vars(structure.model)[ATTRIBUTE] = compiled
    return compiled


def reason_against(structure: Structure, number: int, layer: nn.Module) -> str:
    """Return why a layer of the decoder is not compiled; "": it is."""
    memory = structure.memories[number]
    if memory.state:
        return "keeps a state beside keys (linear attention, convolution)"
    if memory.index or masks_choice(layer):
        return "chooses its keys by an index"
    if not memory.keys or SHARED in structure.seams.layers[number]:
        return "shares keys with other layers"
    attention = getattr(layer, "self_attn", None)
    if counts_distances(layer) or scales_queries(attention):
        return "counts the keys in its cache"
    return ""


def encoder_parts(structure: Structure) -> list[nn.Module]:
    """Return what is compiled of all that is not the decoder: vision towers, and those of sound.

    Whole layers; of those whose attention goes through pictures one by one, by lengths that a graph
    does not know (Qwen), the feed-forward networks.
    """
    inside = set(structure.decoder.modules())
    layers = [
        layer
        for name, module in structure.inner.named_modules()
        if module not in inside
        and isinstance(module, nn.ModuleList)
        and name.rsplit(".", 1)[-1] in LISTS
        for layer in module
    ]
    parts: list[nn.Module] = []
    for layer in layers:
        if PACKED in Arguments(layer.forward):
            networks = [getattr(layer, name, None) for name in ("mlp", "feed_forward")]
            parts += [network for network in networks if isinstance(network, nn.Module)]
        else:
            parts.append(layer)
    return parts


def refuse_moved(layer: nn.Module) -> None:
    """Refuse a layer whose forward is not its class's own.

    Raises:
        ModelError: accelerate moves its weights, or something else replaced it.
    """
    for module in layer.modules():
        if "forward" in vars(module):
            raise ModelError(
                f"{type(module).__name__}: its forward has been replaced, as where weights are "
                "spread over devices or offloaded (device map), and can't be compiled",
                "load the model on one device, or without compiling it",
            )


def check_backend(backend: str, mode: str | None) -> None:
    """Refuse a backend or mode that torch does not have.

    Raises:
        ModelError: names those that it has.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ModelError(
            f"backend {backend!r} is not one of {', '.join(known)}", "inductor is torch's usual one"
        )
    if mode is not None and (mode not in MODES or backend != "inductor"):
        raise ModelError(
            f"mode {mode!r} is not one of {', '.join(MODES)}, which inductor has",
            "leave it out for torch's default",
        )


def check_compiler(device: torch.device, backend: str) -> None:
    """Refuse to compile where what the backend needs is missing.

    Raises:
        ModelError: with what to install.
    """
    if backend != "inductor":
        return
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ModelError(
                "compiling for CUDA needs triton, which is missing or does not know this GPU",
                "pip install triton, or leave --compile out",
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise ModelError(
            "compiling for a CPU needs a C++ compiler, and torch finds none (g++, clang++, or what "
            "CXX names)",
            "install one, such as apt install g++, or leave --compile out",
        ) from error
