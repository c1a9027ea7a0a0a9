"""Models split over places: layers in memory and layers on disk stand in for two devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from conftest import save_noise
from oracle import generate

import vtprune
from vtprune.models.loading import Loaded, load

pytest.importorskip("accelerate", reason="device maps need accelerate")
ON_DISK = (3, 4)  # layers; the others are in memory


def split(directory: Path, folder: Path, patch: pytest.MonkeyPatch) -> Loaded:
    """Load a model with some decoder layers on disk, as `--device map` does where memory ends."""
    plain = load(str(directory)).model
    prefix = next(path for path, module in plain.named_modules() if module is plain.get_decoder())
    layers = [f"{prefix}.layers.{layer}" for layer in ON_DISK]
    places = dict.fromkeys(layers, "disk") | {
        path: "cpu"
        for path, _ in plain.named_parameters()
        if not path.startswith(tuple(f"{layer}." for layer in layers))
    }
    options = {"device_map": places, "offload_folder": str(folder)}
    patch.setattr("vtprune.models.loading.loading_options", lambda *args: dict(options))
    return load(str(directory), device="map")


@pytest.mark.parametrize(
    ("name", "at"), [("llava_onevision", 3), ("qwen3_vl", 4), ("llava_onevision", 5)]
)
def test_a_cut_crosses_devices_exactly(
    name: str, at: str | int, checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    plain = load(str(checkpoints(name)))
    loaded = split(checkpoints(name), tmp_path, monkeypatch)
    layers = loaded.model.get_decoder().layers
    devices = [next(layer.parameters()).device.type for layer in layers]
    assert devices == ["meta" if k in ON_DISK else "cpu" for k in range(len(layers))]
    inputs = tiny.inputs(name, plain.model, "image")
    outcomes = []
    for model in (plain.model, loaded.model):
        with vtprune.pruning(model, method="entropy", at=at, keep=0.9) as trace:
            ids, logits = generate(model, inputs, 8)
        outcomes.append((trace.stages[0].kept, ids, logits))
    assert len(outcomes[0][0][0]) < trace.stages[0].before[0]
    assert outcomes[0][0] == outcomes[1][0]
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    torch.testing.assert_close(outcomes[0][2], outcomes[1][2], atol=1e-6, rtol=0)


def test_a_split_model_is_asked_as_a_whole_one(
    checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    picture = save_noise(tmp_path / "noise.png", 90, 150)
    directory = checkpoints("llava_onevision")
    plain = load(str(directory))
    loaded = split(directory, tmp_path, monkeypatch)
    few = vtprune.Generation(max_new_tokens=8)
    reports = [
        vtprune.answer(model, [(picture, "what?")], preset="fast", keep=0.5, generation=few)[0]
        for model in (plain, loaded)
    ]
    assert reports[0].answer == reports[1].answer
    assert reports[0].tokens == reports[1].tokens
