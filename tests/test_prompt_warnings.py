"""What a trace warns of before a prompt is prefilled."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from conftest import shared_model

import vtprune

INPUT = {"at": "input", "method": "uniform", "keep": 0.5}


def warnings_of(name: str, stages: list[dict[str, object]], **inputs: object) -> tuple[str, ...]:
    model = shared_model(name)
    given = {**tiny.inputs(name, model, "image"), **inputs}
    given = {key: value for key, value in given.items() if value is not None}
    with vtprune.pruning(model, {"stages": stages}) as trace, torch.no_grad():
        model.generate(**given, max_new_tokens=1, do_sample=False, disable_compile=True)
    return tuple(trace.warnings)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> int:
    """LLaVA with room for its text, and for a third of its picture."""
    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    most = inputs["input_ids"].shape[1] - visual + visual // 3
    monkeypatch.setattr(model.get_decoder().config, "max_position_embeddings", most)
    return most


def test_a_prompt_past_the_models_positions_says_what_fits(short: int) -> None:
    (warning,) = (one for one in warnings_of("llava", [INPUT]) if "positions" in one)
    found = re.search(rf"the model {short} positions: .*renumber that keeps (\S+) of its", warning)
    assert found is not None
    keep = float(found[1])
    fits = [{**INPUT, "positions": "renumber", "keep": keep}]
    assert not any("positions" in one for one in warnings_of("llava", fits))
    above = [{**INPUT, "positions": "renumber", "keep": keep + 0.25}]
    assert any("positions" in one for one in warnings_of("llava", above))


def test_a_prompt_that_fits_has_no_warning() -> None:
    assert not any("positions" in one for one in warnings_of("llava", [INPUT]))


def test_a_prompt_whose_text_alone_is_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = shared_model("llava").get_decoder().config
    monkeypatch.setattr(config, "max_position_embeddings", 3)
    assert any("fewer than its text alone" in one for one in warnings_of("llava", [INPUT]))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_missing_token_types_are_warned_of(name: str) -> None:
    assert not any("mm_token_type_ids" in one for one in warnings_of(name, [INPUT]))
    bare = warnings_of(name, [INPUT], mm_token_type_ids=None)
    assert any("have no mm_token_type_ids" in one for one in bare)


def test_reading_the_question_without_a_cache_is_warned_of() -> None:
    stages = [{"at": 2, "method": "fastv", "keep": 0.5}]
    assert not any("use_cache" in one for one in warnings_of("llava", stages))
    found = warnings_of("llava", stages, use_cache=False)
    assert any("so fastv chooses anew for each" in one for one in found)
    assert not any("use_cache" in one for one in warnings_of("llava", [INPUT], use_cache=False))
