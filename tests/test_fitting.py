"""Budgets that fit: positions, or free memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import save_clip

import vtprune
from vtprune import device
from vtprune.engine import fitting
from vtprune.engine.fitting import PromptSize, fit_context, fit_memory
from vtprune.errors import ModelError, PresetError
from vtprune.inference.generate import Generation
from vtprune.models import cost
from vtprune.models.loading import Loaded, load
from vtprune.models.structure import find_structure
from vtprune.preset import load_preset, override

SHORT = Generation(max_new_tokens=4)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return save_clip(tmp_path / "clip", 6)


@pytest.fixture
def loaded(checkpoints) -> Loaded:  # type: ignore[no-untyped-def]
    return load(str(checkpoints("llava_onevision")))


def set_positions(loaded: Loaded, count: int) -> None:
    loaded.model.get_decoder().config.max_position_embeddings = count


def test_what_fits_the_positions_is_kept_and_told(loaded: Loaded, clip: Path) -> None:
    whole = vtprune.ask(loaded, clip, "what?", keep=1.0, generation=SHORT).tokens
    set_positions(loaded, whole.text + 4 + 10)
    report = vtprune.ask(
        loaded, clip, "what?", fit="context", method="random", at="input", generation=SHORT
    )
    assert report.tokens.kept_after == report.preset.fit_tokens == 10
    assert report.preset.stages[0].positions == "renumber"
    assert f"{whole.text} of text and 4 of the answer, leave 10" in str(report.preset.fit_reason)
    assert not any("positions" in warning for warning in report.warnings)
    assert report.to_dict()["preset"]["fit"] == "context"  # type: ignore[index]


def test_what_fits_as_it_is_is_not_cut(loaded: Loaded, clip: Path) -> None:
    report = vtprune.ask(loaded, clip, "what?", fit="context", generation=SHORT)
    assert report.tokens.keep_mean == 1
    assert str(report.preset.fit_reason).startswith("all fit")
    unpruned = vtprune.ask(loaded, clip, "what?", keep=1.0, generation=SHORT)
    assert report.answer == unpruned.answer


def test_a_context_that_has_room_for_nothing_is_refused(loaded: Loaded, clip: Path) -> None:
    set_positions(loaded, 8)
    with pytest.raises(ModelError, match="fit context: no visual token fits: 8 positions, less"):
        vtprune.ask(loaded, clip, "what?", fit="context", generation=SHORT)
    set_positions(loaded, -1)  # as some configs have it
    with pytest.raises(ModelError, match="does not say how many positions"):
        vtprune.ask(loaded, clip, "what?", fit="context", generation=SHORT)


def test_a_cut_past_the_input_can_not_fit_a_context(loaded: Loaded, clip: Path) -> None:
    set_positions(loaded, 30)
    with pytest.raises(PresetError, match="the first cut is at layer 1, and the layers before it"):
        vtprune.ask(loaded, clip, "what?", fit="context", method="random", at=1, generation=SHORT)


def test_what_fits_the_memory_is_kept_and_told(
    loaded: Loaded, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    structure = find_structure(loaded.model)
    whole = vtprune.ask(loaded, clip, "what?", keep=1.0, generation=SHORT).tokens
    size = PromptSize(whole.text, whole.visual, 4)
    needed = fitting.memory_needed(structure, loaded.decoder_shape, 0, size)
    monkeypatch.setattr(fitting, "free_memory", lambda _: int(needed(9) / 0.8) + 2)
    report = vtprune.ask(
        loaded, clip, "what?", fit="memory", method="random", at="input", generation=SHORT
    )
    assert report.tokens.kept_after == report.preset.fit_tokens == 9
    assert "of memory" in str(report.preset.fit_reason)
    monkeypatch.setattr(fitting, "free_memory", lambda _: 1000)
    with pytest.raises(ModelError, match=r"fit memory: one visual token of .* needs"):
        vtprune.ask(
            loaded, clip, "what?", fit="memory", method="random", at="input", generation=SHORT
        )


def test_prompts_of_a_batch_share_the_memory(loaded: Loaded) -> None:
    structure = find_structure(loaded.model)
    alone, shared = PromptSize(10, 500, 4), PromptSize(10, 500, 4, prompts=2)
    free = int(fitting.memory_needed(structure, loaded.decoder_shape, 0, alone)(400) / 0.8)
    one, two = (fit_memory(structure, 0, size, free) for size in (alone, shared))
    assert one.tokens in (399, 400)
    assert two.tokens < 200
    assert "for each prompt" in two.reason


def test_eager_attention_needs_memory_for_its_scores(checkpoints) -> None:  # type: ignore[no-untyped-def]
    size, free = PromptSize(10, 5000, 4), 2**24
    fits = []
    for kernel in ("sdpa", "eager"):
        structure = find_structure(
            load(str(checkpoints("llava_onevision")), attention=kernel).model
        )
        fits.append(fit_memory(structure, 0, size, free).tokens)
    assert fits[1] < fits[0] < 5000


def test_layers_before_a_cut_hold_all_tokens(loaded: Loaded) -> None:
    structure, size = find_structure(loaded.model), PromptSize(10, 500, 4)
    free = int(fitting.memory_needed(structure, loaded.decoder_shape, 2, size)(500) / 0.8)
    assert fit_memory(structure, 2, size, free + 2).tokens == 500
    assert fit_memory(structure, 2, size, free - 400).tokens < 500
    assert fit_context(structure, 0, PromptSize(10, 5, 4)).tokens == 5


def test_memory_is_counted_layer_by_layer_and_with_the_answer(loaded: Loaded) -> None:
    structure, shape = find_structure(loaded.model), loaded.decoder_shape
    value, layers = next(loaded.model.parameters()).dtype.itemsize, shape.layers

    def needed(first: int, answer: int) -> int:
        return fitting.memory_needed(structure, shape, first, PromptSize(10, 500, answer))(1)

    def cached(*counts: int) -> int:
        return cost.kv_bytes(shape, [*counts, *[counts[-1]] * (layers - len(counts))], value)

    assert needed(0, 4) - needed(0, 0) == cached(15) - cached(11)
    # Two layers hold 499 tokens more, and so many are worked on at once.
    more = cached(514, 514, 15) - cached(15) + value * cost.activations(shape) * 499
    assert needed(2, 4) - needed(0, 4) == more


def test_what_fits_to_the_last_position_or_byte_fits(loaded: Loaded) -> None:
    structure, size = find_structure(loaded.model), PromptSize(10, 500, 4)
    needed = fitting.memory_needed(structure, loaded.decoder_shape, 0, size)
    assert fit_memory(structure, 0, size, math.ceil(needed(1) / fitting.HEADROOM)).tokens == 1
    set_positions(loaded, 10 + 5 + 4)
    assert fit_context(structure, 3, PromptSize(10, 5, 4)).tokens == 5


def test_fit_is_a_budget_of_presets_and_flags() -> None:
    preset = load_preset({"fit": "memory", "stages": [{"at": "input", "method": "random"}]})
    assert preset.fit == preset.to_dict()["fit"] == "memory"
    assert override(preset, keep=0.5).fit is None
    changed = override(load_preset("balanced"), fit="context")
    assert (changed.keep, changed.fit, dict(changed.changed)) == (
        None,
        "context",
        {"fit": "context"},
    )
    with pytest.raises(PresetError, match=r"keep 0\.5 and fit context are two budgets"):
        override(load_preset("balanced"), keep=0.5, fit="context")
    with pytest.raises(PresetError, match="tokens 40 and fit context are two budgets"):
        override(load_preset("balanced"), tokens=40, fit="context")
    with pytest.raises(PresetError, match="fit 'all' is not one of context, memory"):
        override(load_preset("balanced"), fit="all")
    with pytest.raises(PresetError, match="one of context, memory"):
        load_preset({"fit": "all", "stages": [{"at": "input", "method": "random"}]})
    with pytest.raises(PresetError, match="fit memory with predictable at pixels alone"):
        override(load_preset("balanced"), method="predictable", fit="memory")
    stages = [{"at": "input", "method": "random", "keep": 0.5}]
    with pytest.raises(PresetError, match="so fit context sets nothing"):
        load_preset({"fit": "context", "stages": stages})


def test_a_control_group_bounds_the_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"CONTAINER": "5000", "CONTAINER_USED": "3000", "CONTAINER_PARTS": "inactive_file 700"}
    texts["MEMINFO"] = "MemAvailable: 100 kB"
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="ascii")
        monkeypatch.setattr(device, name, tmp_path / name)
    assert device.free_memory(torch.device("cpu")) == 2700
    (tmp_path / "CONTAINER").write_text("max", encoding="ascii")
    assert device.free_memory(torch.device("cpu")) == 102_400
