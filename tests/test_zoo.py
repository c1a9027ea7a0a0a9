"""Classes of transformers beside the listed families: exact, or refused with the reason.

`python -m pytest tests/test_zoo.py --zoo` runs every class of the image-text-to-text mapping of the
transformers at hand; without the option, the classes that once crashed or were wrong, and some of
each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest.mock import PropertyMock, patch

import layer_loop
import pytest
import torch
import zoo
from conftest import shared_model
from oracle import dropped, generate
from test_structure import Changed
from transformers import PreTrainedModel

import vtprune
from vtprune.errors import ModelError
from vtprune.models import FAMILIES
from vtprune.models.structure import find_structure

STAGES = {
    "input": [{"at": "input", "method": "uniform", "keep": 0.4}],
    "layer": [{"at": 2, "method": "random", "keep": 0.4}],
    "both": [
        {"at": "input", "method": "random", "keep": 0.7},
        {"at": 3, "method": "uniform", "keep": 0.3},
    ],
}
STEPS = 3
EXACT = (
    "aria",
    "paligemma",
    "glm4v_moe",
    "muse_glimmer",
    "mistral_large4",
    "gemma4-31b",
    "gemma4-e2b",
    "llama4-scout",
)
LATE = [
    {"at": 1, "method": "random", "keep": 0.7},
    {"at": 3, "method": "random", "keep": 0.5},
    {"at": 5, "method": "uniform", "keep": 0.2},
]
"""Between layers that make keys and those that share them."""
REFUSED = {
    "minimax_m3_vl": "layers of type minimax_m3_sparse choose the keys that they see by blocks",
    "unlimited_ocr": "layers of type reference_sliding_attention see some tokens by their place",
}
NOT_BUILT = ("evolla",)
"""In the mapping by mistake: transformers' auto class does not take its config."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "swept" in metafunc.fixturenames:
        every = metafunc.config.getoption("--zoo")
        # Of the listed families test_engine.py tries every kind of prompt.
        swept = [one for one in zoo.MODEL_TYPES if one not in FAMILIES and one not in NOT_BUILT]
        metafunc.parametrize("swept", [*swept, *zoo.MIXES] if every else EXACT)


def test_a_class_is_exact_or_refused(
    swept: str, request: pytest.FixtureRequest, record_property: Callable[[str, str], None]
) -> None:
    mixed = swept in zoo.MIXES
    if zoo.MIXES.get(swept, (swept,))[0] not in zoo.MODEL_TYPES:
        pytest.skip("this transformers has no such class")
    if zoo.is_broken(swept):
        pytest.skip("this transformers can't run the class, pruned or not")
    if request.config.getoption("--zoo") and not mixed and (reason := zoo.outcome(swept)):
        record_property("outcome", reason)
        assert swept not in EXACT, reason
        return
    model, batches = zoo.ready(swept)
    if mixed and not request.config.getoption("--zoo"):
        batches = batches[1:]  # the ragged one
    for batch in batches:
        for stages in (STAGES["both"], LATE) if mixed else STAGES.values():
            check(model, batch, stages, steps=8 if mixed else 3)
    record_property("outcome", "exact")


def check(
    model: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    stages: list[dict[str, object]],
    steps: int = 3,
) -> None:
    """Pruned equals masked, or the loop over the layers where some of them keep a state.

    With the model's kernel and with eager attention.
    """
    structure = find_structure(model)
    state, possible = structure.keeps_state(), structure.cut_layers
    stages = [
        {**stage, "at": stage["at"] if stage["at"] == "input" else
         next(n for n in (*possible, possible[-1]) if n >= stage["at"] or n == possible[-1])}
        for stage in stages
    ]  # fmt: skip
    if possible == (0,):  # of two cuts at the input the later one
        stages = [{**stages[-1], "at": "input"}]
    kernel = model.config._attn_implementation
    with vtprune.pruning(model, {"stages": stages}) as trace:
        tokens, logits = generate(model, batch, steps)
    whole = generate(model, batch, steps, tokens)[1]
    model.set_attn_implementation("eager")
    try:
        noise = float((generate(model, batch, steps, tokens)[1] - whole).abs().max())
        compare = layer_loop.loop if state else zoo.masked
        expected = compare(model, batch, dropped(trace, batch), tokens)
        if state:
            loop = layer_loop.loop(model, batch, [], tokens)
            noise = max(noise, float((loop - whole).abs().max()))
        with vtprune.pruning(model, {"stages": stages}) as again:
            eager = generate(model, batch, steps, tokens)[1]
    finally:
        model.set_attn_implementation(kernel)
    assert [one.kept for one in again.stages] == [one.kept for one in trace.stages]
    tolerance = max(2e-5, 5 * noise)  # of mixtures of experts, whose choices amplify rounding
    for pruned in (logits, eager):
        torch.testing.assert_close(pruned, expected, atol=tolerance, rtol=0)
    assert float((expected - whole).abs().max()) > 20 * tolerance  # something was dropped


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_class_that_is_not_exact_is_refused_with_the_true_reason(model_type: str) -> None:
    if model_type not in zoo.MODEL_TYPES:
        pytest.skip("this transformers has no such class")
    assert REFUSED[model_type] in zoo.outcome(model_type)


def test_a_decoder_without_a_size_is_refused() -> None:
    with (
        Changed(num_attention_heads=None) as model,
        pytest.raises(ModelError, match="its decoder's config has no num_attention_heads"),
    ):
        find_structure(model)


def test_a_decoder_whose_layers_differ_in_a_size_is_refused() -> None:
    model = shared_model("llava_onevision")
    ambiguous = RuntimeError("'hidden_size' is a per-layer attribute and may vary across layers")
    config = PropertyMock(side_effect=ambiguous)
    with (
        patch.object(type(model.get_decoder().config), "hidden_size", config, create=True),
        pytest.raises(ModelError, match="its layers differ in hidden_size"),
    ):
        find_structure(model)


def test_layers_without_positions_stay_so_when_positions_are_renumbered() -> None:
    model, (batch, _) = zoo.ready("muse_glimmer")

    def without_positions(stages: list[dict[str, object]]) -> list[list[int]]:
        """For each forward the layers that were given no position embeddings."""
        found: list[list[int]] = []

        def see(number: int, module: object, args: object, kwargs: dict[str, object]) -> None:
            if number == 0:
                found.append([])
            if kwargs["position_embeddings"] is None:
                found[-1].append(number)

        hooks = [
            layer.self_attn.register_forward_pre_hook(partial(see, number), with_kwargs=True)
            for number, layer in enumerate(model.get_decoder().layers)
        ]
        with vtprune.pruning(model, {"stages": stages}):
            generate(model, batch, 2)
        for hook in hooks:
            hook.remove()
        return found

    cut = {"at": 1, "method": "uniform", "keep": 0.4}
    kept, renumbered = (
        without_positions([{**cut, "positions": one}]) for one in ("keep", "renumber")
    )
    assert kept == renumbered
    assert kept[0]


def test_a_model_that_drops_tokens_of_videos_itself_is_refused() -> None:
    if "nemotron_h_omni" not in zoo.MODEL_TYPES:
        pytest.skip("this transformers has no such class")
    model = zoo.skeleton("nemotron_h_omni")
    find_structure(model)
    model.video_pruning_rate = 0.7
    with pytest.raises(ModelError, match="it drops 70% of a video's tokens itself") as caught:
        find_structure(model)
    assert "model.video_pruning_rate = 0 in Python" in caught.value.hint


def test_queries_scaled_by_their_place_are_so_by_columns_where_no_layer_has_a_window() -> None:
    """A prompt that is longer than the scale's step, and shorter than the model's chunks."""
    model, (_, batch) = zoo.ready("llama4")
    for layer in find_structure(model).layers:
        layer.self_attn.floor_scale, layer.self_attn.attn_scale = 8, 0.5  # type: ignore[union-attr]
    check(model, batch, STAGES["input"])


def test_a_picture_in_several_pieces_of_a_prompt_is_refused() -> None:
    """transformers gives each piece the features of its own placeholders."""
    model, (batch, _) = zoo.ready("aria")
    cut = {"stages": [{"at": "input", "method": "uniform", "keep": 0.4}]}
    with vtprune.pruning(model, cut), pytest.raises(ModelError) as caught:
        model.generate(**batch, max_new_tokens=3, prefill_chunk_size=5)
    assert "prefill_chunk_size" in caught.value.hint


def test_a_decoder_that_makes_no_cache_is_pruned_without_one() -> None:
    """Granite 4 Vision's leaves making it to generation."""
    if zoo.is_broken("granite4_vision"):
        pytest.skip("this transformers can't run the class, pruned or not")
    model, (batch, _) = zoo.ready("granite4_vision")
    with vtprune.pruning(model, {"stages": STAGES["both"]}), torch.no_grad():
        output = model(**batch, use_cache=True)
        generated = generate(model, batch, 1)[1]
    assert output.past_key_values is None
    torch.testing.assert_close(output.logits[:, -1:], generated, atol=1e-5, rtol=0)
