"""Seconds on a clock that waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_warm(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a run after one to warm up."""
    work()
    return time_runs(work, device, 1)[0]


def time_runs(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of every run."""
    times = []
    for _ in range(repeats):
        started = now(device)
        work()
        times.append(now(device) - started)
    return times
