"""When each layer of a model ran, without hooks and without stopping a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps

import torch
from torch import nn

Moment = object
"""A point in time: seconds on a CPU, an event on a GPU."""


@dataclass(frozen=True)
class Lap:
    """One run of one layer.

    Args:
        layer: its number.
        tokens: that it was given.
        seconds: it took.
        gap: seconds between the end of the layer before and its start; 0 for the first.
    """

    layer: int
    tokens: int
    seconds: float
    gap: float


@dataclass
class LayerClock:
    """Notes when layers start and end.

    Args:
        device: that the layers run on.
    """

    device: torch.device
    marks: list[tuple[int, int, Moment, Moment]] = field(default_factory=list)

    @contextmanager
    def on(self, layers: Sequence[nn.Module]) -> Iterator[LayerClock]:
        """Times `layers` inside the block, and leaves them as they were."""
        try:
            for number, layer in enumerate(layers):
                layer.__dict__["forward"] = self.timed(number, layer.forward)
            yield self
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    def timed(self, number: int, forward: Callable[..., object]) -> Callable[..., object]:
        @wraps(forward)
        def run(*args: object, **kwargs: object) -> object:
            hidden = args[0] if args else kwargs.get("hidden_states")
            tokens = int(hidden.shape[-2]) if isinstance(hidden, torch.Tensor) else 0
            started = self.now()
            result = forward(*args, **kwargs)
            self.marks.append((number, tokens, started, self.now()))
            return result

        return run

    def now(self) -> Moment:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def forwards(self) -> list[list[Lap]]:
        """The laps of every forward that has run since the last call, in order."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        made: list[list[Lap]] = []
        before: Moment | None = None
        for number, tokens, started, ended in self.marks:
            if number == 0 or not made:
                made.append([])
                before = None
            gap = 0.0 if before is None else self.between(before, started)
            made[-1].append(Lap(number, tokens, self.between(started, ended), gap))
            before = ended
        self.marks = []
        return made

    def between(self, first: Moment, second: Moment) -> float:
        """Seconds from one point in time to another."""
        if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
            return float(first.elapsed_time(second)) / 1000
        assert isinstance(first, float)
        assert isinstance(second, float)
        return second - first


def tower_paths(inner: nn.Module, decoder: nn.Module) -> list[str]:
    """Where a whole model's vision towers have their layers: the longest lists of modules."""
    inside = {id(module) for module in decoder.modules()}
    lists = {
        path: weight_of(module)
        for path, module in inner.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and id(module) not in inside
    }
    most = max(lists.values(), default=0)
    return [path for path, weight in lists.items() if 2 * weight > most]


def weight_of(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
