"""A long video that is streamed: CPU time and memory of the command, watched from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vtprune._dev.bench.decoding import write_clip
from vtprune._dev.bench.growth import exponent
from vtprune._dev.bench.tables import table

RATE = 2
"""Frames a second of the clips; one of them is taken a second."""
SHORT = ("--frames", "8")
STREAMED = ("--fps", "1", "--stream", "--tokens-after", "2048")
PAUSE = 0.05  # seconds between two looks at the memory


@dataclass(frozen=True)
class Watched:
    """One run of the command.

    Args:
        frames, visual: that it took.
        seconds: of CPU time, its decoder's included.
        memory: the largest sum of the resident bytes of its processes.
    """

    frames: int
    visual: int
    seconds: float
    memory: int


def measure_long_videos(folder: Path, minutes: Sequence[float], width: int, height: int) -> str:
    """Return a Markdown table of clips of so many minutes, and how CPU time grows with them."""
    rows: list[list[str]] = []
    points: list[tuple[float, float]] = []
    base = 0.0
    for number, length in enumerate(minutes):
        path = folder / f"clip-{length:g}min-{RATE}fps-{width}x{height}.mp4"
        write_clip(path, round(60 * length), width, height, RATE)
        name = f"{length:g} minutes"
        if not number:  # what starting and loading take, beside a few frames
            few = watch(path, SHORT)
            base = few.seconds
            rows.append(row(f"{name}, `{' '.join(SHORT)}`, not streamed", few))
        run = watch(path, STREAMED)
        points.append((length, run.seconds - base))
        rows.append(row(name, run))
        sys.stderr.write(" | ".join(rows[-1]) + "\n")
    head = ["clip", "frames", "visual tokens", "CPU seconds", "memory"]
    power = f"{exponent(points):.2f}" if len(points) > 1 else "not known from one length"
    return f"{table(head, rows)}\nLess the first row's seconds, time grows to the power {power}.\n"


def row(name: str, run: Watched) -> list[str]:
    """Return a row of the table."""
    return [
        name,
        f"{run.frames:,}",
        f"{run.visual:,}",
        f"{run.seconds:.1f}",
        f"{run.memory / 2**20:.0f} MiB",
    ]


def watch(path: Path, options: Sequence[str]) -> Watched:
    """Ask about a clip in a process of its own, and read its memory meanwhile; on Linux."""
    command = [sys.executable, "-m", "vtprune", "ask", str(path), "what happens?", "--json"]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    memory = 0
    while not (done := os.wait4(process.pid, os.WNOHANG))[0]:
        memory = max(memory, sum(resident_bytes(pid) for pid in process_tree(process.pid)))
        time.sleep(PAUSE)
    report = json.loads(process.stdout.read())
    used = done[2]
    return Watched(
        report["input"]["frames"], report["tokens"]["visual"], used.ru_utime + used.ru_stime, memory
    )


def process_tree(pid: int) -> list[int]:
    """Return a process and all that it has started."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return [pid]
    return [pid, *(each for child in text.split() for each in process_tree(int(child)))]


def resident_bytes(pid: int) -> int:
    """Return what a process holds in memory; 0 once it has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
