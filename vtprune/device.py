"""Time and memory of a device."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CONTAINER = Path("/sys/fs/cgroup/memory.max")
CONTAINER_USED = Path("/sys/fs/cgroup/memory.current")
CONTAINER_PARTS = Path("/sys/fs/cgroup/memory.stat")


def cpu_name() -> str:
    """Return the processor's name, as far as the system gives one."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or os.name


def now(device: torch.device) -> float:
    """Return the seconds on a clock, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def clock() -> float:
    """Return the seconds on a clock that stands still while graphs are compiled."""
    return time.perf_counter() - compile_times().seconds


@dataclass(frozen=True, eq=False)
class TimeMark:
    """A moment in the work of a device, whose time is read later: nobody waits for it here.

    Args:
        clock: of the host at that moment.
        compiling: seconds that torch had compiled for by then; of a GPU's time taken off later.
        event: where CUDA notes the time; None for other devices.
    """

    clock: float
    compiling: float = 0.0
    event: torch.cuda.Event | None = None

    def __deepcopy__(self, memo: object) -> TimeMark:
        """Return itself: a copy of an event is one that nothing was noted in."""
        return self

    @property
    def is_past(self) -> bool:
        """Whether the device has got there."""
        return self.event is None or bool(self.event.query())


def mark(device: torch.device) -> TimeMark:
    """Return the moment when a device will have done what it was given up to here."""
    if device.type != "cuda":
        return TimeMark(clock())
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return TimeMark(clock(), compile_times().seconds, event)


@dataclass(frozen=True)
class Duration:
    """How long a device took, summed over spans; read from it where that is asked for.

    Args:
        known: seconds beside those of the spans.
        spans: first and last moment of each.
    """

    known: float = 0.0
    spans: tuple[tuple[TimeMark, TimeMark], ...] = ()

    @classmethod
    def since(cls, started: TimeMark, device: torch.device) -> Duration:
        """Return the time from a moment up to now."""
        return cls(spans=((started, mark(device)),))

    def __add__(self, other: Duration) -> Duration:
        """Return the sum; the first spans that are past are not kept: an answer has many."""
        spans = self.spans + other.spans
        past = tuple(takewhile(lambda span: span[1].is_past, spans))
        seconds = sum(seconds_between(*span) for span in past)
        return Duration(self.known + other.known + seconds, spans[len(past) :])

    @property
    def seconds(self) -> float:
        """The sum, after the device has got to the end of each span."""
        return self.known + sum(seconds_between(*span) for span in self.spans)


def seconds_between(first: TimeMark, last: TimeMark) -> float:
    """Return the seconds between two moments, after the device has got to the later one."""
    if first.event is None or last.event is None:
        return last.clock - first.clock
    last.event.synchronize()
    seconds = float(first.event.elapsed_time(last.event)) / 1000
    return max(seconds - (last.compiling - first.compiling), 0.0)


class Delivery:
    """Numbers on their way from a device to the host, which goes on meanwhile.

    Args:
        numbers: on any device; of devices other than CUDA's they are here at once.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        cuda = numbers.device.type == "cuda"
        self._numbers = numbers.to("cpu", non_blocking=cuda)  # to pinned memory (PyTorch 2.4 on)
        self._sent = mark(numbers.device)

    @property
    def is_here(self) -> bool:
        """Whether `read` returns at once."""
        return self._sent.is_past

    def read(self) -> torch.Tensor:
        """Return the numbers, on the CPU, once they are here."""
        if self._sent.event is not None:
            self._sent.event.synchronize()
        return self._numbers


def with_float64(device: torch.device) -> torch.device:
    """Return a device on which float64 can be computed: the CPU for Apple's, else itself."""
    return torch.device("cpu") if device.type == "mps" else device


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device, which the host does not wait for, unless that is its own.

    A blocking copy to a GPU waits for all that the GPU has been given before it. Memory that is not
    pinned is read before the call returns, so that it may be changed at once: CUDA promises that,
    other kinds of device do not, and are waited for.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


@dataclass(frozen=True)
class CompileTimes:
    """The graphs that torch has compiled in this process.

    Args:
        seconds: that compiling took.
        graphs: how many, those after a graph break included.
    """

    seconds: float = 0.0
    graphs: int = 0


def compile_times() -> CompileTimes:
    """Return what torch has compiled so far; nothing where its compiler was never imported."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    times = getattr(dynamo, "compilation_time_metrics", {}).get("_compile.compile_inner", ())
    return CompileTimes(sum(times), len(times))


def time_warm(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one run, after one to warm up."""
    work()
    return time_runs(work, device, 1)[0]


def time_runs(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Return the seconds of each run."""
    times = []
    for _ in range(repeats):
        started = now(device)
        work()
        times.append(now(device) - started)
    return times


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a CUDA device; for any other, of the machine, or of its container.

    Where the system does not tell (macOS), half of all memory; where it does not tell that either
    (Windows), no limit.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError):
        for line in MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, container_free())
    total = machine_memory()
    return sys.maxsize if total is None else total // 2


def container_free() -> int:
    """Return the bytes that the control group may still take; no limit where there is none."""
    with suppress(OSError, ValueError):  # "max", or a system without control groups
        limit = int(CONTAINER.read_text(encoding="ascii"))
        used = int(CONTAINER_USED.read_text(encoding="ascii"))
        parts = dict(map(str.split, CONTAINER_PARTS.read_text(encoding="ascii").splitlines()))
        return max(0, limit - used + int(parts.get("inactive_file", 0)))  # files go when needed
    return sys.maxsize


def total_memory(device: torch.device) -> int | None:
    """Return the bytes of a CUDA device; for any other, of the machine, or of its container.

    None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = machine_memory()
    with suppress(OSError, ValueError):  # "max", or a system without control groups
        limit = int(CONTAINER.read_text(encoding="ascii"))
        return limit if total is None else min(total, limit)
    return total


def machine_memory() -> int | None:
    """Return the bytes of the machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
