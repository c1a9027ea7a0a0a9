"""What compiling the layers saves, unpruned and pruned, prefill and decoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from vtprune._dev.bench.prefill import UNPRUNED, name_of
from vtprune._dev.bench.results import Pass, Results, Side, run_in
from vtprune._dev.bench.subject import BenchSubject, build_subject
from vtprune.evaluation.profiling.model_runs import run_once
from vtprune.evaluation.profiling.prompts import ProfiledMedia
from vtprune.evaluation.profiling.shapes import find_shape
from vtprune.models.compiling import CompiledForward, CompiledModel, compile_model
from vtprune.preset import Preset, load_preset, override

STATIC = "static cache"
CACHES = {"growing": "compiled", "static": f"compiled, {STATIC}"}


def measure_compiled(
    results: Results,
    model: str,
    shown: ProfiledMedia | None,
    preset: str,
    keep: float,
    steps: int,
    caches: Sequence[str],
    mode: str | None,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> list[Pass]:
    """Eager and compiled, unpruned and pruned, in turn, on one model.

    Args:
        steps: tokens decoded after the first.
        caches: "growing", "static": what compiled layers decode on.
        mode: of `torch.compile`.
    """
    settings = {
        "model": model,
        "shown": "largest" if shown is None else name_of(shown),
        **run_in(device, dtype),
        "preset": preset,
        "keep": keep,
        "steps": steps,
        "mode": mode or "default",
    }
    ways = ["eager", *(CACHES[cache] for cache in caches)]
    if len(caches) < len(CACHES):
        settings["caches"] = list(caches)

    def sides() -> Mapping[str, Side]:
        subject = build_subject(find_shape(model), shown, device, dtype)
        compiled = compile_model(subject.loaded.model, mode=mode)
        pruned = override(load_preset(preset), keep)
        return {
            f"{how}, {name}": partial(run, subject, compiled, how, cut, steps)
            for how in ways
            for name, cut in ((UNPRUNED, None), ("pruned", pruned))
        }

    return results.measure("compiled", settings, sides, repeats, device)


def run(
    subject: BenchSubject, compiled: CompiledModel, how: str, preset: Preset | None, steps: int
) -> dict[str, float]:
    """Generate once; return seconds without those of compiling, and what compiling took."""
    before = compiled.cost
    with switch_layers(subject.loaded.model, compiled, how):
        ran = run_once(
            subject.loaded, subject.tensors, subject.case, preset, steps, subject.encoded
        )
    cost = compiled.cost.since(before)
    return {
        "prefill": ran.seconds["prefill"],
        "decode_per_token": ran.seconds["decode"] / steps,
        "select": ran.seconds["select"],
        "visual": float(subject.visual),
        "kept": float(ran.trace.visual_by_layer[0][-1]),
        "compile": cost.seconds,
        "graphs": float(cost.graphs),
        "recompiles": float(cost.recompiles),
    }


@contextmanager
def switch_layers(model: nn.Module, compiled: CompiledModel, how: str) -> Iterator[None]:
    """Run the layers inside the block as `how` says: eager, or compiled with a kind of cache."""
    forwards = {
        module: vars(module)["forward"]
        for module in model.modules()
        if isinstance(vars(module).get("forward"), CompiledForward)
    }
    cache, compiled.static_cache = compiled.static_cache, STATIC in how
    try:
        for module in forwards if how == "eager" else ():
            del vars(module)["forward"]
        yield
    finally:
        compiled.static_cache = cache
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
