"""A clock for the layers of a model, without hooks and without stopping a GPU."""

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
class LayerTime:
    """Seconds of one run of one layer.

    Args:
        layer: its number.
        tokens: that it was given.
    """

    layer: int
    tokens: int
    seconds: float


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
        """Time `layers` inside the block, and leave them as they were."""
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

    def forwards(self) -> list[list[LayerTime]]:
        """Return the layers' seconds of every forward since the last call, in order."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        forwards: list[list[LayerTime]] = []
        for number, tokens, started, ended in self.marks:
            if number == 0 or not forwards:
                forwards.append([])
            forwards[-1].append(LayerTime(number, tokens, seconds_between(started, ended)))
        self.marks = []
        return forwards


def seconds_between(first: Moment, second: Moment) -> float:
    if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
        return float(first.elapsed_time(second)) / 1000
    assert isinstance(first, float)
    assert isinstance(second, float)
    return second - first
