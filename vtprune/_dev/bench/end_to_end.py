"""How much sooner the first token of a real clip comes, the vision tower counted."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from vtprune._dev.bench.prefill import UNPRUNED
from vtprune._dev.bench.results import Pass, Results, Side, run_in
from vtprune._dev.bench.subject import BenchSubject, build_subject, stages_of
from vtprune.evaluation.profiling.prompts import ProfiledMedia
from vtprune.evaluation.profiling.shapes import find_shape
from vtprune.models.base import Sampling
from vtprune.preset import Preset

CLIPS = {
    "bottles_40s.mp4": " (bottle-detection.mp4 of github.com/intel-iot-devkit/sample-videos, "
    "CC BY 4.0: 640 x 360, 40 s, a camera that stands still)"
}
"""Clips that figures are published of -> where they are from."""
PIXELS = {"at": "pixels", "method": "predictable"}


def rows_of(pixels: float, keep: float) -> dict[str, Preset | None]:
    """What is compared: one stage each that leaves `keep`, and each behind a stage at the pixels.

    Args:
        pixels: the fraction that the stage before the vision tower leaves.
        keep: the fraction that is left in the end.
    """
    late = {
        "uniform at input": {"at": "input", "method": "uniform", "keep": keep},
        "entropy at input": {"at": "input", "method": "entropy", "keep": keep},
        "entropy at layer 2": {"at": "2", "method": "entropy", "keep": keep},
    }
    early = {**PIXELS, "keep": pixels}
    rows: dict[str, Preset | None] = {UNPRUNED: None}
    rows |= {name: stages_of([stage]) for name, stage in late.items()}
    rows |= {f"pixels, {name}": stages_of([early, stage]) for name, stage in late.items()}
    return rows


def measure_end_to_end(
    results: Results,
    model: str,
    clip: Path,
    frames: int,
    pixels: float,
    keep: float,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> list[Pass]:
    """First tokens about a real clip: the frames' preparation, the whole tower, the prefill."""
    settings = {
        "model": model,
        "clip": clip.name,
        "frames": frames,
        **run_in(device, dtype),
        "pixels": pixels,
        "keep": keep,
    }

    def sides() -> Mapping[str, Side]:
        subject = build_subject(
            find_shape(model), ProfiledMedia("video", paths=(str(clip),)), device, dtype,
            tower=True, sampling=Sampling(frames=frames),
        )  # fmt: skip
        rows = rows_of(pixels, keep)
        return {name: partial(run, subject, preset) for name, preset in rows.items()}

    def run(subject: BenchSubject, preset: Preset | None) -> dict[str, float]:
        return {**subject.run(preset, tower=True), "visual": float(subject.visual)}

    return results.measure("end-to-end", settings, sides, repeats, device)
