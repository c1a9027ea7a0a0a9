"""The unpruned model beside the pruned one, on the same inputs and clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TYPE_CHECKING

import torch

from vtprune import cost
from vtprune.engine import pruning
from vtprune.generation import Generation, Run, generate

if TYPE_CHECKING:
    from vtprune.loading import Loaded, Progress
    from vtprune.models.base import Inputs
    from vtprune.preset import Preset
    from vtprune.report import Report

PAIRS = 5
PARTS = ("vision", "prefill", "decode", "first_token", "total")


def compare_runs(
    loaded: Loaded,
    inputs: Inputs,
    preset: Preset,
    generation: Generation,
    run: Run,
    report: Report,
    on_progress: Progress | None = None,
) -> Mapping[str, object]:
    """Answers and times with and without pruning.

    One warm-up each, then unpruned and pruned in ABBA order; both are greedy and forced to the
    length of the unpruned answer. Speed-ups are medians of the pairs' ratios; loading is left out.
    """
    steps = 2 * PAIRS + 2
    greedy = Generation(generation.max_new_tokens, system=generation.system)
    unpruned = timed(loaded, inputs, greedy, None)
    show(on_progress, 1, steps)
    length = max(1, len(unpruned.tokens))
    timed(loaded, inputs, greedy, preset, length)
    show(on_progress, 2, steps)
    before = report.seconds["preprocess"]
    media = report.seconds["media"]
    pairs = []
    for number in range(PAIRS):
        order = (None, preset) if number % 2 == 0 else (preset, None)
        took = {}
        for one in order:
            ran = timed(loaded, inputs, greedy, one, length)
            took["pruned" if one else "unpruned"] = add_up(ran.seconds, before, media)
            show(on_progress, 2 + 2 * number + len(took), steps)
        pairs.append(took)
    ratio = {
        part: median(pair["unpruned"][part] / max(pair["pruned"][part], 1e-9) for pair in pairs)
        for part in ("prefill", "first_token", "total")
    }
    predicted = report.flops["prefill_full"] / report.flops["prefill"]
    return {
        "answer": unpruned.answer,
        "same_answer": unpruned.answer == run.answer,
        "seconds": {part: median(pair["unpruned"][part] for pair in pairs) for part in PARTS},
        "prefill_speedup": ratio["prefill"],
        "prefill_predicted": predicted,
        "prefill_roofline": roofline_speedup(loaded, run),
        "realised_fraction": ratio["prefill"] / predicted,
        "first_token_speedup": ratio["first_token"],
        "total_speedup": ratio["total"],
    }


def show(on_progress: Progress | None, done: int, total: int) -> None:
    if on_progress:
        on_progress("comparing", done, total)


def timed(
    loaded: Loaded,
    inputs: Inputs,
    generation: Generation,
    preset: Preset | None,
    length: int | None = None,
) -> Run:
    """One generation with its own hooks; without a preset nothing is cut."""
    keep = None if preset else 1.0
    block = pruning(loaded.model, preset, keep, calibration=loaded.calibration, media=inputs.media)
    with block as trace:
        return generate(loaded, inputs.tensors, generation, trace, length=length)[0]


def add_up(seconds: Mapping[str, float], preprocess: float, media: float) -> dict[str, float]:
    first = preprocess + seconds["first_choice"]
    return {
        "vision": seconds["vision"],
        "prefill": seconds["prefill"],
        "decode": seconds["decode"],
        "first_token": first,
        "total": media + first + seconds["decode"],
    }


def roofline_speedup(loaded: Loaded, run: Run) -> float:
    """The prefill speed-up that this machine's measured ceilings allow.

    Every layer takes the longer of its arithmetic and the reading of its weights.
    """
    shape = cost.decoder_shape(loaded.model.get_decoder().config)
    flops, bandwidth = measure_ceilings(loaded.model.device, loaded.model.dtype)
    layers = loaded.model.get_decoder().layers
    weights = sum(weight.numel() for weight in layers.parameters()) / max(1, len(layers))
    read = weights * loaded.model.dtype.itemsize / bandwidth
    text, visual = run.trace.text[0], len(run.trace.layouts[0])

    def total(counts: list[int]) -> float:
        return sum(max(cost.layer_flops(shape, n, n) / flops, read) for n in counts)

    kept = [text + count for count in run.trace.visual_by_layer[0]]
    return total([text + visual] * shape.layers) / total(kept)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(FLOPs a second of a matrix product, bytes a second of a copy), the best of a few tries."""
    side = 4096 if device.type == "cuda" else 1024
    left = torch.randn(side, side, device=device).to(dtype)
    source = torch.randn(2**24, device=device)
    target = torch.empty_like(source)
    product = best(lambda: left @ left, device)
    copy = best(lambda: target.copy_(source), device)
    return 2 * side**3 / product, 2 * source.numel() * source.element_size() / copy


def best(work: Callable[[], object], device: torch.device, tries: int = 5) -> float:
    """Seconds of the fastest of a few runs."""
    fastest = float("inf")
    for _ in range(tries):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - started)
    return fastest
