"""Whether memory stays flat while a long video is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from vtprune._dev.bench.decoding import write_clip
from vtprune._dev.bench.results import Pass, Results, Side
from vtprune.media import open_source, read, sample_evenly

RATE = 10
STEPS = 10
THUMBNAIL = 8  # pixels: what is kept of a frame is nothing beside what is decoded


def measure_memory(
    results: Results, folder: Path, seconds: int, width: int, height: int, fps: float
) -> list[Pass]:
    """The process's memory after every tenth of a long clip, frames taken at `fps`."""
    settings = {"seconds": seconds, "size": f"{width}x{height}", "fps": fps}

    def sides() -> Mapping[str, Side]:
        path = folder / f"clip-{seconds}s-{width}x{height}.mp4"
        results.show(f"  {path.name}")
        write_clip(path, seconds, width, height, RATE)
        return {"vtprune": lambda: sample_memory(path, fps)}

    return results.measure("memory", settings, sides, 1, torch.device("cpu"), warm_up=False)


def sample_memory(path: Path, fps: float) -> dict[str, float]:
    """Bytes of the process before, and after each tenth of the frames."""
    figures = {"before": resident_bytes()}
    source = open_source(path)
    figures["opened"] = resident_bytes()

    def note(done: int, total: int) -> None:
        step = STEPS * done // total
        if step:
            figures.setdefault(f"{100 * step // STEPS} %", resident_bytes())

    index = sample_evenly(source, fps=fps)
    made = read(source, index, lambda pixels: shrunk(pixels), progress=note)
    return {**figures, "frames": float(len(made.index))}


def shrunk(pixels: torch.Tensor) -> torch.Tensor:
    """(n, 3, H, W) -> (n, 3, 8, 8), one pixel in so many."""
    down, across = pixels.shape[2] // THUMBNAIL, pixels.shape[3] // THUMBNAIL
    return pixels[:, :, ::down, ::across][:, :, :THUMBNAIL, :THUMBNAIL].clone()


def resident_bytes() -> float:
    """Of this process, now; on Linux."""
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    line = next(one for one in text.splitlines() if one.startswith("VmRSS"))
    return float(line.split()[1]) * 1024
