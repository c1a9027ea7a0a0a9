"""What was measured, as lines of JSON: a run that was stopped goes on where it ended."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vtprune import __version__
from vtprune.evaluation.profiling.machine import device_name

Figures = Mapping[str, float]
Side = Callable[[], Figures]
Show = Callable[[str], None]


def tell(text: str) -> None:
    """One line of progress."""
    sys.stderr.write(f"{text}\n")


@dataclass(frozen=True)
class Pass:
    """One run of everything that is compared, one after the other.

    Args:
        part: of the benchmark.
        settings: what was run; passes of equal settings belong together.
        number: which of them.
        sides: name -> what it took, and what it was.
        machine: where, and what else ran there.
    """

    part: str
    settings: Mapping[str, Any]
    number: int
    sides: Mapping[str, Figures]
    machine: Mapping[str, Any]


@dataclass
class Results:
    """A file of passes, each written as soon as it is done.

    Args:
        path: of the file.
        show: gets a line of progress.
    """

    path: Path
    show: Show = tell
    passes: list[Pass] = field(init=False)

    def __post_init__(self) -> None:
        self.passes = read_passes(self.path)

    def find(self, part: str, settings: Mapping[str, Any]) -> list[Pass]:
        """The passes of one part with these settings, in order."""
        own = [one for one in self.passes if (one.part, one.settings) == (part, dict(settings))]
        return sorted(own, key=lambda one: one.number)

    def add(self, new: Pass) -> None:
        self.passes.append(new)
        text = json.dumps(vars(new)) + "\n"
        with self.path.open("a+", encoding="utf-8") as file:
            if file.tell():  # after a line that was cut off
                file.seek(file.tell() - 1)
                text = text if file.read() == "\n" else f"\n{text}"
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def measure(
        self,
        part: str,
        settings: Mapping[str, Any],
        sides: Callable[[], Mapping[str, Side]],
        repeats: int,
        device: torch.device,
        warm_up: bool = True,
    ) -> list[Pass]:
        """Runs all sides in turn, every second time backwards, until there are `repeats` passes.

        Args:
            sides: makes what is compared; not called where all passes are there already.
            warm_up: run every side once before.
        """
        told = ", ".join(f"{name} {value}" for name, value in settings.items())
        missing = [
            number
            for number in range(repeats)
            if number not in [one.number for one in self.find(part, settings)]
        ]
        if missing:
            self.show(f"{part}: {told}")
            made = sides()
            for name, run in made.items() if warm_up else ():
                self.show(f"  warm-up: {name}")
                run()
        for number in missing:
            took: dict[str, Figures] = {}
            for name in list(made) if number % 2 == 0 else list(made)[::-1]:
                self.show(f"  pass {number + 1} of {repeats}: {name}")
                took[name] = made[name]()
            ordered = {name: took[name] for name in made}
            self.add(Pass(part, dict(settings), number, ordered, describe_machine(device)))
        return self.find(part, settings)


def read_passes(path: Path) -> list[Pass]:
    """What a file holds; lines that were not written to their end are left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(Pass(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def run_in(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Where and in what something ran, among its settings."""
    return {"dtype": str(dtype).removeprefix("torch."), "device": device.type}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Where it ran, and how much else was running: the system's load over the last minute.

    `ahead`: whether the system runs this process before all others (`chrt -f 1`).
    """
    real_time = [getattr(os, name, None) for name in ("SCHED_FIFO", "SCHED_RR")]
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else -1.0
    return {
        "name": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "load": load,
        "ahead": hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) in real_time,
        "versions": f"vtprune {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
    }
