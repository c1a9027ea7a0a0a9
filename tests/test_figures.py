"""Reported FLOPs, beside torch's own counter on whole answers of every family."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import save_clip, save_noise
from counted import AGREES, as_encoded, count, loaded, uneven

import vtprune
from vtprune import run
from vtprune.clock import time_runs
from vtprune.figures import compute_costs, measure_memory
from vtprune.models.base import Sampling
from vtprune.preset import load_preset, override
from vtprune.run import Generation

# Random choices need no FLOPs of their own.
CUTS: dict[str, list[dict[str, object]]] = {
    "input": [{"at": "input", "method": "random", "keep": 0.4}],
    "layers": [
        {"at": 1, "method": "random", "keep": 0.7},
        {"at": 3, "method": "random", "keep": 0.2},
    ],
}
CASES = [
    (name, kind, cuts)
    for name in tiny.MODELS
    for kind in tiny.KINDS[name]
    if kind in ("image", "video")
    for cuts in CUTS
]
TOKENS = 4


@pytest.mark.parametrize(("name", "kind", "cuts"), CASES)
def test_flops_of_a_pruned_answer_are_what_torch_counts(name: str, kind: str, cuts: str) -> None:
    model = uneven(name)
    tensors = tiny.inputs(name, model, kind)
    with vtprune.pruning(model, {"stages": CUTS[cuts]}) as trace:
        counted = count(lambda: model.generate(**tensors, max_new_tokens=TOKENS))
    flops, _ = compute_costs(loaded(model), as_encoded(model, tensors), trace, TOKENS, sample=0)
    whole = flops["vision"] + flops["prefill"] + flops["decode"]
    assert whole == pytest.approx(counted, rel=AGREES)
    assert flops["prefill"] < flops["prefill_full"]


@pytest.fixture
def media(tmp_path: Path) -> dict[str, list[Path]]:
    """Pictures that are cut into different numbers of tiles, and a video."""
    wide = save_noise(tmp_path / "wide.png", 60, 150)
    large = save_noise(tmp_path / "large.png", 170, 170)
    clip = save_clip(tmp_path / "clip", 4)
    return {"several": [wide, large], "video": [clip], "mixed": [large, clip]}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in tiny.MODELS for kind in tiny.KINDS[name] if kind != "image"],
)
def test_reported_flops_of_an_unpruned_answer_are_what_torch_counts(
    name: str, kind: str, checkpoints, media: dict[str, list[Path]]
) -> None:  # type: ignore[no-untyped-def]
    model = run.load(str(checkpoints(name)), attention="eager")
    preset, reports = override(load_preset(None), 1.0), []
    generation, sampling = Generation(max_new_tokens=TOKENS), Sampling(frames=4)

    def ask() -> None:
        reports.extend(run.ask(model, media[kind], ["what?"], preset, sampling=sampling,
                               generation=generation))  # fmt: skip

    counted = count(ask)
    flops = reports[0].flops
    whole = flops["vision"] + flops["prefill"] + flops["decode"]
    assert whole == pytest.approx(counted, rel=AGREES)
    assert not any("FLOPs" in note for note in reports[0].warnings)


def test_a_tower_that_is_not_known_is_warned_of(checkpoints, media, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("vtprune.cost.vision_shape", lambda config, modality="image": None)
    model = run.load(str(checkpoints("llava")))
    preset, short = override(load_preset(None), 1.0), Generation(max_new_tokens=1)
    report = next(run.ask(model, media["several"], ["what?"], preset, generation=short))
    assert report.flops["vision"] == 0
    assert "vision FLOPs of LLaVA-1.5 are not counted: they stand as 0" in report.warnings


def test_times_and_memory_are_those_of_the_gpu_that_has_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    second = torch.device("cuda:1")
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: {second: 7}[device])
    model = SimpleNamespace(device=second, parameters=lambda: [torch.zeros(3)])
    assert measure_memory(SimpleNamespace(model=model)) == {"weights": 12, "peak": 7}  # type: ignore[arg-type]
    assert len(time_runs(lambda: None, second, 2)) == 2
    assert waited == [second] * 4
