"""A decoder's layers with a gradient, of whose inputs only one in several is held.

The others are computed anew from there when the gradient comes to their segment, and what is inside
a layer when it comes to the layer: the states of one segment and the inside of one layer are held
at a time. torch.utils.checkpoint does this for a function; here the decoder calls the layers itself
and may work on the states between them, so that no function is a segment.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from vtprune.models.seams import Arguments


class Segments:
    """The layers of one forward with a gradient.

    Args:
        num_layers: of the decoder; a segment has about the square root of it.
    """

    def __init__(self, num_layers: int) -> None:
        self.length = max(1, math.isqrt(num_layers))
        self.calls: list[Callable[[torch.Tensor], torch.Tensor]] = []
        self.inputs: dict[int, torch.Tensor] = {}
        self.output: Callable[[], torch.Tensor | None] = lambda: None
        self.version = 0

    def run(
        self, arguments: Arguments, forward: Callable[..., object], *args: object, **kwargs: object
    ) -> object:
        """Run a layer in the place of its `forward`.

        Args:
            arguments: of the layer.
        """
        given = arguments.bind(args, kwargs)
        hidden = given.pop("hidden_states")
        assert isinstance(hidden, torch.Tensor)

        def call(states: torch.Tensor) -> object:
            first = (states,) if args else ()
            named = given if args else given | {"hidden_states": states}
            return forward(*first, **arguments.give(named))

        if any(carries_more(value) for value in given.values()):
            return checkpoint(call, hidden, use_reentrant=False)
        with torch.no_grad():
            output = call(hidden.detach())
        if not isinstance(output, torch.Tensor):
            return checkpoint(call, hidden, use_reentrant=False)
        follows = hidden is self.output() and hidden._version == self.version
        number = len(self.calls)
        if number % self.length == 0 or not follows:
            self.inputs[number] = hidden.detach()
        self.calls.append(call)  # type: ignore[arg-type]
        result = _Layer.apply(hidden, output, self, number)  # type: ignore[no-untyped-call]
        assert isinstance(result, torch.Tensor)
        # Held weakly: its gradient's function holds this object.
        self.output, self.version = weakref.ref(result), result._version
        return result

    def take_input(self, number: int) -> torch.Tensor:
        """Return a layer's input, and hold it no longer; layers ask from the last one on."""
        first = next(layer for layer in range(number, -1, -1) if layer in self.inputs)
        with torch.no_grad():
            for layer in range(first, number):
                self.inputs[layer + 1] = self.calls[layer](self.inputs[layer])
        return self.inputs.pop(number)


class _Layer(torch.autograd.Function):
    """One layer, whose inside is computed anew for its gradient."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: torch.Tensor,
        output: torch.Tensor,
        segments: Segments,
        number: int,
    ) -> torch.Tensor:
        ctx.segments, ctx.number = segments, number  # type: ignore[attr-defined]
        return output.detach()

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        segments, number = ctx.segments, ctx.number  # type: ignore[attr-defined]
        hidden = segments.take_input(number).detach().requires_grad_(True)
        with torch.enable_grad():
            output = segments.calls[number](hidden)
        (slope,) = torch.autograd.grad(output, hidden, gradients)
        return slope, None, None, None


def carries_more(value: object) -> bool:
    """Return whether an argument may carry a gradient from layer to layer, as the states do.

    Layers may write into an object that all are given, such as the keys and values that later
    layers take over (transformers 5.23: Gemma 3n's and Gemma 4's shared_kv_states).
    """
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if isinstance(value, tuple):
        return any(map(carries_more, value))
    return not isinstance(value, (bool, int, float, str, type(None)))
