"""How much of the prefill speed-up that FLOPs promise is real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from vtprune._dev.bench.results import Pass, Results, Side, run_in
from vtprune._dev.bench.subject import BenchSubject, build_subject, one_stage
from vtprune.evaluation.profiling.prompts import ProfiledMedia
from vtprune.evaluation.profiling.shapes import find_shape

UNPRUNED = "unpruned"


def measure_prefill(
    results: Results,
    model: str,
    shown: ProfiledMedia | None,
    places: Sequence[str],
    method: str,
    keep: float,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> list[Pass]:
    """Prefills without and with a cut at each of some places, in turn, on one model.

    The vision tower is built with few layers and runs once: it is not what is timed.
    """
    settings = {
        "model": model,
        "shown": "largest" if shown is None else name_of(shown),
        **run_in(device, dtype),
        "method": method,
        "keep": keep,
        "places": list(places),
    }

    def sides() -> Mapping[str, Side]:
        subject = build_subject(find_shape(model), shown, device, dtype)
        made = {at or UNPRUNED: partial(run, subject, at) for at in (None, *places)}
        if device.type != "cuda":
            return made
        waits = {name: count_syncs(side) for name, side in made.items()}
        return {name: partial(told, side, waits[name]) for name, side in made.items()}

    def told(side: Side, waits: float) -> dict[str, float]:
        return {**side(), "waits": waits}

    def run(subject: BenchSubject, at: str | None) -> dict[str, float]:
        preset = None if at is None else one_stage(at, method, keep)
        return {**subject.run(preset), "visual": float(subject.visual)}

    return results.measure("prefill", settings, sides, repeats, device)


def name_of(shown: ProfiledMedia) -> str:
    """An input as it is written on the command line."""
    if shown.paths:
        return ", ".join(path.rpartition("/")[2] for path in shown.paths)
    frames = f"{shown.frames}x" if shown.kind == "video" else ""
    return f"{frames}{shown.width}x{shown.height}"


def count_syncs(work: Side) -> float:
    """How often the host waits for the GPU during a run; the clock's own two are among them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    return float(sum(one.count for one in found.key_averages() if one.key in waits))
