"""A device: its clock, and how much memory it has."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CONTAINER = Path("/sys/fs/cgroup/memory.max")


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


def free_memory(device: torch.device) -> int:
    """Bytes free on a CUDA device; for any other, of the machine.

    Where the machine does not tell (macOS), half of all that it has; where it does not tell that
    either (Windows), as if there were no limit.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError):
        for line in MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    whole = machine_memory()
    return sys.maxsize if whole is None else whole // 2


def total_memory(device: torch.device) -> int | None:
    """Bytes of a CUDA device; for any other, of the machine, or what its container may use of it.

    None where the machine does not tell (Windows).
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    whole = machine_memory()
    with suppress(OSError, ValueError):  # "max", or a system without control groups
        limit = int(CONTAINER.read_text(encoding="ascii"))
        return limit if whole is None else min(whole, limit)
    return whole


def machine_memory() -> int | None:
    """Bytes that the machine has; None where it does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
