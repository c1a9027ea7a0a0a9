"""How the cost of a cut grows with the number of visual tokens and of frames."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from vtprune._dev.bench.prefill import UNPRUNED
from vtprune._dev.bench.results import Pass, Results, Side, run_in
from vtprune._dev.bench.subject import build_subject, narrow_shape, one_stage
from vtprune.evaluation.profiling.prompts import ProfiledMedia
from vtprune.pruners.similarity import HELD

FRAMES = (8, 12, 24, 48, 96, 192, 384, 512, 612)  # up to 30,000 tokens
DEPTH = 2  # layers: one before the cut and one after
SIDE = 196  # pixels; 49 tokens a frame of LLaVA-OneVision's
LONG = 10_000  # tokens from which on one run is seconds, and warming up changes nothing


def measure_growth(
    results: Results,
    model: str,
    frames: Sequence[int],
    methods: Sequence[str],
    keep: float,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> list[Pass]:
    """Two decoder layers of full width, cut between them, for more and more frames.

    The vision tower is narrow and sees small frames, and runs once: it is not what is timed.
    """
    made: list[Pass] = []
    for count in frames:
        settings = {
            "model": model,
            "frames": count,
            **run_in(device, dtype),
            "methods": list(methods),
            "keep": keep,
            "held": HELD,
        }

        def sides(count: int = count) -> Mapping[str, Side]:
            shown = ProfiledMedia("video", SIDE, SIDE, count)
            shape = narrow_shape(model, SIDE)
            subject = build_subject(shape, shown, device, dtype, depth=DEPTH)

            def run(method: str | None) -> dict[str, float]:
                preset = None if method is None else one_stage("1", method, keep)
                return {**subject.run(preset), "visual": float(subject.visual)}

            return {name or UNPRUNED: partial(run, name) for name in (None, *methods)}

        warm_up = count * 49 < LONG
        made += results.measure("growth", settings, sides, repeats, device, warm_up)
    return made


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """p of the power law y = c x^p through points (x, y), by least squares of the logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len(logs) < 2:
        return math.nan
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread if spread else math.nan
