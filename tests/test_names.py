"""Short names of published models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vtprune.evaluation.profiling.shapes import packaged_shape
from vtprune.inference.roofline import count_weights
from vtprune.models.layer_cost import measure_decoder
from vtprune.models.names import aliases, closest_alias, hub_id_of
from vtprune.models.skeleton import build_skeleton

ALIASES = {alias.name: alias for alias in aliases()}
# Their configs say how wide a head is; elsewhere it is the width of the model over the heads.
OWN_HEAD_DIM = ("gemma-", "glm-4.5v", "internvl3.5", "mistral-small", "molmo2", "paligemma2",
                "qwen3-vl", "qwen3.")  # fmt: skip
# Parameters of vision tower, projector and a separate input embedding, where a name counts them and
# they are a large part of it.
BESIDE = {
    "qwen2-vl-2b": 0.67e9,
    "qwen3.5-9b": 1.5e9,
    "internvl3-1b": 0.44e9,
    "internvl3-2b": 0.54e9,
    "internvl3-38b": 5.5e9,
    "internvl3.5-1b": 0.46e9,
    "internvl3.5-38b": 5.5e9,
    "smolvlm2-256m": 0.12e9,
    "smolvlm2-500m": 0.15e9,
    "smolvlm2-2.2b": 0.53e9,
}


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_stands_for_a_hub_id_in_any_case(name: str) -> None:
    hub_id = ALIASES[name].hub_id
    assert hub_id.count("/") == 1
    assert hub_id_of(name) == hub_id_of(name.upper()) == hub_id


@pytest.mark.parametrize("name", ["llava-hf/llava-1.5-7b-hf", "./Model", "gpt", ""])
def test_what_is_no_alias_stays_as_it_is(name: str) -> None:
    assert hub_id_of(name) == name


def test_llava_next_alone_is_the_7b_vicuna_model() -> None:
    assert hub_id_of("llava-next") == "llava-hf/llava-v1.6-vicuna-7b-hf"


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_has_a_whole_decoder_shape(name: str) -> None:
    shape = SimpleNamespace(**ALIASES[name].decoder)
    if not name.startswith(OWN_HEAD_DIM):
        assert shape.heads * shape.head_dim == shape.hidden
    assert shape.heads % shape.kv_heads == 0


EXPERTS = ("qwen3-vl-30b-a3b", "qwen3-vl-235b-a22b", "qwen3.5-35b-a3b", "qwen3.6-35b-a3b",
           "glm-4.5v", "gemma-4-26b-a4b")  # fmt: skip
"""Mixtures of experts, whose weights follow from more than the decoder's plain sizes."""


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts_has_the_parameters_that_its_name_says(name: str) -> None:
    alias = ALIASES[name]
    model = build_skeleton(packaged_shape(alias).config)
    shape = measure_decoder(model)
    size = float(alias.parameters[:-1]) * 1e9
    assert count_weights(model) == pytest.approx(size, rel=0.05)
    active = {"30b": 3.3e9, "235b": 22e9, "35b": 3e9, "glm": 12e9,
              "26b": 3.8e9}  # fmt: skip
    expected = next(number for part, number in active.items() if part in name)
    weights = sum(cost.token for cost in shape.by_layer) / 2 + 2 * shape.vocab * shape.hidden
    assert weights == pytest.approx(expected, rel=0.25)


DECODERS = {"gemma-4-e2b": 4.6e9, "gemma-4-e4b": 7.5e9, "gemma-4-26b-a4b": 25.2e9,
            "gemma-4-31b": 30.7e9}  # fmt: skip
"""Published parameters of decoders whose layers differ, or that embed for each of their layers."""


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_of_uneven_layers_has_the_parameters_that_its_authors_say(name: str) -> None:
    model = build_skeleton(packaged_shape(ALIASES[name]).config)
    assert count_weights(model.get_decoder()) == pytest.approx(DECODERS[name], rel=0.01)
    whole = float(ALIASES[name].parameters[:-1]) * 1e9
    assert count_weights(model) == pytest.approx(whole, rel=0.02)


ALL_RUN = ("llama-4-scout", "llama4", "llama-4-maverick")
"""Mixtures of experts of which transformers runs every one for every token."""
UNEVEN = (*EXPERTS, *DECODERS, *ALL_RUN)


@pytest.mark.parametrize("name", [name for name in ALIASES if name not in UNEVEN])
def test_a_decoder_shape_has_about_the_parameters_that_its_name_says(name: str) -> None:
    alias = ALIASES[name]
    shape = SimpleNamespace(**alias.decoder)
    attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    layer = attention + 3 * shape.hidden * shape.intermediate
    parameters = shape.layers * layer + shape.vocab * shape.hidden + BESIDE.get(name, 0)
    size = float(alias.parameters[:-1]) * {"B": 1e9, "M": 1e6}[alias.parameters[-1]]
    assert parameters == pytest.approx(size, rel=0.15)


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_shows_a_calibration_with_a_source_for_each_figure(name: str) -> None:
    alias = ALIASES[name]
    found = alias.calibration
    layers = alias.decoder["layers"]
    assert 0 < found.ecl <= layers // 2
    assert found.ecl < found.horizon < layers
    shown = {"ecl", "horizon"} | ({"horizon_text"} if found.horizon_text is not None else set())
    assert set(found.sources) == shown
    kinds = ("paper (arXiv ", "released code (arXiv ", "third party (on arXiv ", "default")
    assert all(source.startswith(kinds) for source in found.sources.values())


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("llava-nxt", "llava-next"),
        ("qwen2.5vl-7b", "qwen2.5-vl-7b"),
        ("Qwen/Qwen2.5-VL-7B", "qwen2.5-vl-7b"),
        ("llava-hf/llava-1.5-7b", "llava-1.5-7b"),
        ("LLaVA-OneVision-05b", "llava-onevision-0.5b"),
        ("qwen3vl-8b", "qwen3-vl-8b"),
        ("OpenGVLab/InternVL3-14B", "internvl3-14b"),
        ("OpenGVLab/InternVL3_5-8B", "internvl3.5-8b"),
        ("OpenGVLab/InternVL3_5-38B", "internvl3.5-38b"),
        ("lmms-lab/llava-next-72b", "llava-next-72b"),
        ("lmms-lab/LLaVA-NeXT-Video-34B", "llava-next-video-34b"),
        ("gemma3-4b", "gemma-3-4b"),
        ("THUDM/GLM-4.1V-9B-Thinking", "glm-4.1v-9b"),
        ("mistralai/Voxtral", None),
        ("", None),
    ],
)
def test_a_misspelt_name_gets_the_alias_that_was_meant(misspelt: str, meant: str | None) -> None:
    assert closest_alias(misspelt) == meant


def test_kinds_of_input_are_those_of_the_families() -> None:
    from vtprune.models import find_family

    for alias in aliases():
        assert tuple(alias.inputs) == find_family(alias.model_type).modalities


def test_memory_of_weights_is_about_two_bytes_and_half_a_byte() -> None:
    memory = {alias.name: alias.memory_bytes for alias in aliases()}["llava-1.5-7b"]
    assert memory["bfloat16"] == 2 * 7_063_427_072
    assert 3.5e9 < memory["4bit"] < 5e9
