"""Reported FLOPs, beside torch's own counter on whole answers of every family."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from click.testing import CliRunner
from conftest import save_clip, save_noise
from counted import AGREES, as_encoded, count, loaded, uneven
from transformers import PreTrainedModel

import vtprune
from vtprune.cli import cli
from vtprune.device import time_runs
from vtprune.inference.answer_questions import answer_questions
from vtprune.inference.generate import Generation
from vtprune.inference.measuring import compute_costs, measure_memory
from vtprune.inference.report import MemoryBytes, Report
from vtprune.models import cost
from vtprune.models.base import Sampling
from vtprune.models.layer_cost import measure_decoder
from vtprune.models.loading import load
from vtprune.preset import load_preset, override

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
    whole = flops.vision + flops.prefill + flops.decode
    assert whole == pytest.approx(counted, rel=AGREES)
    assert flops.prefill < flops.prefill_full


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
    model = load(str(checkpoints(name)), attention="eager")
    preset, reports = override(load_preset(None), 1.0), []
    generation, sampling = Generation(max_new_tokens=TOKENS), Sampling(frames=4)

    def ask() -> None:
        reports.extend(
            answer_questions(
                model, media[kind], ["what?"], preset, sampling=sampling, generation=generation
            )
        )

    counted = count(ask)
    flops = reports[0].flops
    whole = flops.vision + flops.prefill + flops.decode
    assert whole == pytest.approx(counted, rel=AGREES)
    assert not any("FLOPs" in note for note in reports[0].warnings)


def test_a_tower_that_no_family_knows_is_counted_on_shapes(checkpoints, media, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    model = load(str(checkpoints("llava")))
    preset, short = override(load_preset(None), 1.0), Generation(max_new_tokens=1)

    def ask() -> Report:
        return next(answer_questions(model, media["several"], ["what?"], preset, generation=short))

    known = ask().flops.vision
    monkeypatch.setattr("vtprune.models.cost.vision_shape", lambda config, modality="image": None)
    assert ask().flops.vision == pytest.approx(known, rel=AGREES)


def test_a_tower_that_can_not_be_counted_is_warned_of(checkpoints, media, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def refuse(model: PreTrainedModel, tensors: object) -> None:
        raise cost.uncounted(model.config, "such an encoder")

    monkeypatch.setattr("vtprune.models.cost.vision_shape", lambda config, modality="image": None)
    monkeypatch.setattr("vtprune.models.encoder_cost.count_encoder", refuse)
    model = load(str(checkpoints("llava")))
    preset, short = override(load_preset(None), 1.0), Generation(max_new_tokens=1)
    report = next(answer_questions(model, media["several"], ["what?"], preset, generation=short))
    assert report.flops.vision is None
    assert report.warnings == (
        "vision FLOPs are null: llava: the FLOPs of such an encoder are not counted",
    )


def test_several_reports_measure_the_decoder_once(checkpoints, media, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    measured = []
    monkeypatch.setattr(
        "vtprune.models.loading.measure_decoder",
        lambda model: measured.append(model) or measure_decoder(model),
    )
    model = load(str(checkpoints("llava")))
    preset, short = override(load_preset(None), 1.0), Generation(max_new_tokens=1)
    questions = ["what?", "and where?"]
    reports = list(answer_questions(model, media["several"], questions, preset, generation=short))
    assert [report.flops.prefill > 0 for report in reports] == [True, True]
    assert measured == [model.model]


@pytest.fixture
def uncounted(checkpoints, monkeypatch: pytest.MonkeyPatch) -> str:  # type: ignore[no-untyped-def]
    """A checkpoint whose language model has layers that are not counted."""

    def refuse(layer: object, config: object) -> None:
        raise cost.uncounted(config, "such layers")

    monkeypatch.setattr("vtprune.models.layer_cost._measure_layer", refuse)
    return str(checkpoints("internvl"))


UNCOUNTED = "qwen2: the FLOPs of such layers are not counted"


def test_flops_that_are_not_counted_do_not_lose_the_answer(uncounted, media) -> None:  # type: ignore[no-untyped-def]
    command = ["ask", str(media["several"][0]), "what?", "--model", uncounted, "--keep", "0.5"]
    command += ["--max-new-tokens", "2", "--compare"]
    shown = CliRunner().invoke(cli, command)
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.stderr.splitlines()]
    assert all([name, "-"] in lines for name in ("prefill", "decode", "total"))
    assert UNCOUNTED in " ".join(shown.stderr.split())
    report = json.loads(CliRunner().invoke(cli, [*command, "--json"]).stdout, parse_constant=int)
    assert isinstance(report["answer"], str)
    assert report["flops"].pop("vision") > 0
    assert set(report["flops"].values()) == set(report["kv_cache_bytes"].values()) == {None}
    assert report["compare"]["prefill_predicted"] is report["compare"]["realised_fraction"] is None
    assert report["compare"]["prefill_speedup"] > 0


def test_compare_shows_a_dash_for_flops_that_are_not_counted(  # type: ignore[no-untyped-def]
    uncounted, media, tmp_path
) -> None:
    command = ["compare", str(media["several"][0]), "what?", "--model", uncounted]
    command += ["--methods", "random", "--max-new-tokens", "2", "--repeats", "1"]
    shown = CliRunner().invoke(cli, command)
    assert shown.exit_code == 0, shown.output
    assert " - " in shown.stdout
    table = tmp_path / "speed.png"
    drawn = CliRunner().invoke(cli, [*command, "--save", str(table)])
    assert drawn.exit_code == 0, drawn.output


def test_a_profile_without_flops_is_refused_with_the_reason(uncounted) -> None:  # type: ignore[no-untyped-def]
    result = CliRunner().invoke(cli, ["profile", "--model", uncounted])
    assert result.exit_code == 1
    assert f"a profile needs FLOPs, and {UNCOUNTED}" in " ".join(result.stderr.split())


def test_times_and_memory_are_those_of_the_gpu_that_has_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    second = torch.device("cuda:1")
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: {second: 7}[device])
    model = SimpleNamespace(device=second, parameters=lambda: [torch.zeros(3)])
    assert measure_memory(SimpleNamespace(model=model)) == MemoryBytes(weights=12, peak=7)  # type: ignore[arg-type]
    assert len(time_runs(lambda: None, second, 2)) == 2
    assert waited == [second] * 4
