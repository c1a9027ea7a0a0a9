"""What a prompt is warned of: inputs that are missing, positions past the model's, no cache."""

from __future__ import annotations

import pytest
import tiny
import torch
from conftest import shared_model
from oracle import generate
from test_structure import Changed

import vtprune
from vtprune.engine.refusals import fitting_keep

MROPE = [
    name for name in tiny.MODELS
    if "mrope_section" in (tiny.config(name).get_text_config().rope_parameters or {})
]  # fmt: skip


def warnings(name: str, inputs: dict[str, torch.Tensor], how: str = "generate") -> list[str]:
    """What a pruned prompt is warned of."""
    model = shared_model(name)
    stages = [{"at": 2, "method": "uniform", "keep": 0.5}]
    with vtprune.pruning(model, {"stages": stages}) as trace, torch.no_grad():
        generate(model, inputs, 2) if how == "generate" else model(**inputs)
    return trace.warnings


# -- inputs that are missing ----------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("how", ["generate", "forward"])
def test_whole_inputs_are_not_warned_of(name: str, how: str) -> None:
    assert warnings(name, tiny.inputs(name, shared_model(name), "image"), how) == []


@pytest.mark.parametrize("name", MROPE)
def test_a_model_that_is_not_told_what_is_visual_is_warned_of(name: str) -> None:
    inputs = tiny.inputs(name, shared_model(name), "image")
    del inputs["mm_token_type_ids"]
    (warning,) = warnings(name, inputs)
    assert warning.startswith("mm_token_type_ids is missing: its pictures are placed like text")
    assert "return_mm_token_type_ids=True" in warning


@pytest.mark.parametrize("name", MROPE)
def test_positions_of_the_callers_own_need_no_types(name: str) -> None:
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "image")
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    positions = model.model.get_rope_index(**{key: inputs[key] for key in keys})[0]
    del inputs["mm_token_type_ids"]
    assert warnings(name, inputs | {"position_ids": positions}, "forward") == []


@pytest.mark.parametrize(
    ("name", "missing"), [("gemma3", "token_type_ids"), ("molmo2", "mm_token_type_ids")]
)
@pytest.mark.parametrize("how", ["generate", "forward"])
def test_pictures_that_are_masked_like_text_are_warned_of(
    name: str, missing: str, how: str
) -> None:
    if name not in tiny.MODELS:
        pytest.skip("this transformers has no such model")
    inputs = tiny.inputs(name, shared_model(name), "image")
    del inputs[missing]
    (warning,) = warnings(name, inputs, how)
    assert warning.startswith(f"{missing} is missing: its pictures are masked like text")


# -- positions ------------------------------------------------------------------------------------


def test_a_prompt_past_the_models_positions_says_what_fits() -> None:
    inputs = tiny.inputs("llava_onevision", shared_model("llava_onevision"), "image")
    length = inputs["input_ids"].shape[1]
    with Changed(max_position_embeddings=length - 20):
        (warning,) = warnings("llava_onevision", inputs)
        assert (
            f"the prompt has {length} positions, and this model was made for {length - 20}"
            in warning
        )
        visual = 76
        keep = int(100 * (visual - 20) / visual) / 100
        assert f"keep {keep:g} or less fits in a stage at the input" in warning
        assert "positions: renumber" in warning


def kept_warnings(keep: float, positions: str, at: str | int = "input") -> list[str]:
    model = shared_model("llava_onevision")
    inputs = tiny.ragged("llava_onevision", model)
    stages = [{"at": at, "method": "uniform", "keep": keep, "positions": positions}]
    with vtprune.pruning(model, {"stages": stages}) as trace, torch.no_grad():
        model(**inputs)
    return trace.warnings


def test_the_keep_that_is_said_to_fit_fits_and_the_next_does_not() -> None:
    """In a batch of two prompts of different length."""
    inputs = tiny.ragged("llava_onevision", shared_model("llava_onevision"))
    with Changed(max_position_embeddings=int(inputs["attention_mask"].sum(1).min()) - 30):
        (warning,) = kept_warnings(1, "keep")
        keep = float(warning.split("keep ")[1].split()[0])
        assert 0 < keep < 1
        assert kept_warnings(keep, "renumber") == []
        (still,) = kept_warnings(keep + 0.02, "renumber")
        assert still.split("; ")[1] == warning.split("; ")[1]
        assert kept_warnings(keep, "keep") == [warning]
        assert kept_warnings(keep, "renumber", at=1) == [warning]


def test_a_prompt_whose_text_alone_does_not_fit_says_so() -> None:
    inputs = tiny.inputs("llava_onevision", shared_model("llava_onevision"), "image")
    with Changed(max_position_embeddings=5):
        (warning,) = warnings("llava_onevision", inputs)
    assert warning.endswith("the text alone does not fit: give less of it")


def test_a_prompt_that_fits_is_not_warned_of() -> None:
    inputs = tiny.inputs("llava_onevision", shared_model("llava_onevision"), "image")
    with Changed(max_position_embeddings=inputs["input_ids"].shape[1]):
        assert warnings("llava_onevision", inputs) == []


def test_a_model_that_does_not_say_how_many_positions_it_has_is_not_warned_of() -> None:
    name = "llava_onevision"
    with Changed(max_position_embeddings=None):
        assert warnings(name, tiny.inputs(name, shared_model(name), "image")) == []


def test_positions_in_space_are_fewer_than_tokens() -> None:
    """Of time, row and column the largest counts, and there is no renumbering."""
    model = shared_model("qwen2_vl")
    inputs = tiny.inputs("qwen2_vl", model, "image", sizes=((280, 280),))
    config, length = model.get_decoder().config, inputs["input_ids"].shape[1]
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    end = int(model.model.get_rope_index(**{key: inputs[key] for key in keys})[0].max()) + 1
    assert end < length
    before = config.max_position_embeddings
    try:
        config.max_position_embeddings = end
        assert warnings("qwen2_vl", inputs) == []
        config.max_position_embeddings = end - 1
        (warning,) = warnings("qwen2_vl", inputs)
    finally:
        config.max_position_embeddings = before
    assert warning.startswith(f"the prompt has {end} positions, and this model was made for")
    assert warning.endswith("fewer frames, or smaller pictures, fit")


@pytest.mark.parametrize(
    ("text", "visual", "room", "keep"),
    [([10], [100], 60, 0.5), ([10, 20], [100, 100], 60, 0.4), ([10], [300], 110, 0.33),
     ([70], [100], 60, -0.1), ([10, 10], [0, 50], 35, 0.5)],
)  # fmt: skip
def test_the_fitting_keep_is_that_of_the_fullest_sample(
    text: list[int], visual: list[int], room: int, keep: float
) -> None:
    assert fitting_keep(text, visual, room) == pytest.approx(keep)


# -- no cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "use_cache", "warned"),
    [("fastv", False, True), ("fastv", True, False), ("uniform", False, False)],
)
def test_a_method_that_reads_the_question_chooses_anew_without_a_cache(
    method: str, use_cache: bool, warned: bool
) -> None:
    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")
    stages = [{"at": 2, "method": method, "keep": 0.3}]
    with vtprune.pruning(model, {"stages": stages}) as trace:
        generate(model, inputs, 3, use_cache=use_cache)
    assert trace.prefills == (1 if use_cache else 3)
    said = [
        one for one in trace.warnings if "without a cache (use_cache=False) fastv choose" in one
    ]
    assert len(said) == warned


def test_another_prompt_without_a_cache_is_not_a_growing_one() -> None:
    model = shared_model("llava")
    stages = [{"at": 2, "method": "fastv", "keep": 0.3}]
    with vtprune.pruning(model, {"stages": stages}) as trace, torch.no_grad():
        for seed in (0, 1):
            model(**tiny.inputs("llava", model, "image", seed=seed, text=6 + seed), use_cache=False)
    assert trace.prefills == 2
    assert trace.warnings == []


def test_a_longer_prompt_with_a_cache_of_its_own_is_not_a_growing_one() -> None:
    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -1:]], dim=1)
    longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    stages = [{"at": 2, "method": "fastv", "keep": 0.3}]
    with vtprune.pruning(model, {"stages": stages}) as trace, torch.no_grad():
        model(**inputs)  # without use_cache the model makes a cache
        model(**longer)
    assert trace.prefills == 2
    assert trace.warnings == []
