"""What is found in a model, and the share of the grids that each row of a batch gets."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace

import oracle
import pytest
import tiny
import torch
from conftest import shared_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
)

import vtprune
from vtprune.engine.plan import PruningPlan
from vtprune.engine.trace import Trace
from vtprune.errors import ModelError, PresetError
from vtprune.models.batch_layout import lay_out_batch, share_grids
from vtprune.models.generic import GenericFamily
from vtprune.models.structure import Structure, find_structure
from vtprune.preset import load_preset
from vtprune.tokens.layout import box


def structure_of(name: str = "llava_onevision") -> Structure:
    return find_structure(shared_model(name))


def unlisted(name: str = "llava_onevision") -> Structure:
    return dataclasses.replace(structure_of(name), family=GenericFamily(name))


# -- the parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_parts_of_every_family_are_found(name: str) -> None:
    model = shared_model(name)
    found = find_structure(model)
    assert found.decoder is model.get_decoder()
    assert found.layers == tuple(found.decoder.layers)
    assert found.num_heads == found.decoder.config.num_attention_heads
    assert found.num_heads * found.head_dim(0) == tiny.WIDTH
    assert found.hidden_size == tiny.WIDTH
    assert found.family.listed
    assert found.device.type == "cpu"


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("state", ["query", "key", "value"])
def test_a_projection_gives_all_heads_side_by_side(name: str, state: str) -> None:
    found = structure_of(name)
    config = found.decoder.config
    heads = config.num_attention_heads if state == "query" else config.num_key_value_heads
    projected = found.projection(1, state)(torch.randn(1, 3, tiny.WIDTH))
    assert projected.shape == (1, 3, heads * found.head_dim(0))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_final_norm_of_every_family_is_what_ends_its_decoder(name: str) -> None:
    model, found = shared_model(name), structure_of(name)
    ends: list[torch.Tensor] = []
    hook = found.final_norm.register_forward_hook(lambda *args: ends.append(args[2]))
    try:
        output = found.decoder(input_ids=torch.tensor([[3, 5, 7]]), use_cache=False)
    finally:
        hook.remove()
    assert len(ends) == 1
    assert torch.equal(output.last_hidden_state, ends[0])
    states = torch.randn(4, tiny.WIDTH)
    assert torch.equal(found.apply_final_norm(states), found.final_norm(states))
    assert model.get_decoder() is found.decoder


class Decoder(nn.Module):
    """A decoder whose parts have the names that are given."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])
        for name, part in parts.items():
            self.add_module(name, part)


@pytest.mark.parametrize("name", ["norm", "final_layernorm", "ln_f", "closing"])
def test_a_final_norm_of_any_name_is_found_beside_one_of_the_embeddings(name: str) -> None:
    norm = nn.LayerNorm(2)
    parts: dict[str, nn.Module] = {"embed": nn.Embedding(3, 2), name: norm, "head": nn.Linear(2, 2)}
    if name != "closing":
        parts = {"embedding_norm": nn.LayerNorm(2), **parts}
    found = dataclasses.replace(structure_of(), decoder=Decoder(**parts), hidden_size=2)
    assert found.final_norm is norm


@pytest.mark.parametrize("names", [[], ["before", "after"]])
def test_a_final_norm_that_cannot_be_told_is_refused(names: list[str]) -> None:
    decoder = Decoder(**{name: nn.RMSNorm(2) for name in names})
    found = dataclasses.replace(structure_of(), decoder=decoder, hidden_size=2)
    with pytest.raises(ModelError, match=f"its decoder has {len(names)} norms beside") as caught:
        found.apply_final_norm(torch.ones(1, 2))
    assert "no normed states" in caught.value.hint


def test_a_fused_projection_is_refused_with_a_way_out() -> None:
    layer = nn.Module()
    layer.self_attn = nn.Module()
    found = dataclasses.replace(structure_of(), layers=(layer,), model_type="phi3_v")
    with pytest.raises(ModelError, match="phi3_v: layer 0 has no separate query projection"):
        found.projection(0, "query")
    with pytest.raises(ModelError, match="phi3_v: layer 0 has no input_layernorm"):
        found.norm(0)


class MasksWindows(nn.Module):
    """A decoder whose source says that it makes masks with windows."""

    def forward(self) -> str:
        return "create_sliding_window_causal_mask"


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({}, None),
        ({"sliding_window": 8}, 8),  # Mistral names no switch
        ({"sliding_window": None}, None),
        ({"sliding_window": 8, "use_sliding_window": False}, None),
        ({"sliding_window": 8, "use_sliding_window": True}, 8),
        ({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, None),
        ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, 8),
    ],
)
def test_a_layers_window_is_what_its_config_says(
    config: dict[str, object], window: int | None
) -> None:
    decoder = MasksWindows()
    decoder.config = SimpleNamespace(**config)
    assert dataclasses.replace(structure_of(), decoder=decoder).window(0) == window


def test_a_window_that_a_decoder_makes_no_masks_with_is_none() -> None:
    decoder = nn.Module()
    decoder.config = SimpleNamespace(sliding_window=8)
    assert dataclasses.replace(structure_of(), decoder=decoder).window(0) is None


# -- what is refused ------------------------------------------------------------------------------


class Changed:
    """A model whose config and parts can be changed without changing the shared one."""

    def __init__(self, **changes: object) -> None:
        self.changes = changes

    def __enter__(self) -> PreTrainedModel:
        self.config = shared_model("llava_onevision").get_decoder().config
        self.before = dict(self.config.__dict__)
        self.config.__dict__.update(self.changes)
        return shared_model("llava_onevision")

    def __exit__(self, *error: object) -> None:
        self.config.__dict__.clear()
        self.config.__dict__.update(self.before)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_kv_shared_layers": 2}, "its layers share keys and values"),
        ({"hidden_size_per_layer_input": 8}, "its layers take an input of their own for every"),
        (
            {"layer_types": ["full_attention", "conv"]},
            "Qwen2Attention in its layers keeps no keys in the cache",
        ),
        ({"_attn_implementation_internal": "flex_attention"}, "attention 'flex_attention'"),
    ],
)
def test_a_decoder_that_cannot_be_cut_is_refused_with_the_reason(
    changes: dict[str, object], match: str
) -> None:
    with Changed(**changes) as model, pytest.raises(ModelError, match=match):
        find_structure(model)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        (None, 100),
        ({"rope_type": "default"}, 100),
        ({"rope_type": "dynamic", "factor": 2.0}, 200),
        ({"rope_type": "linear", "factor": 4.0}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}, 200),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 25}, 100),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 50}, 100),
        ({"full_attention": {"rope_type": "linear", "factor": 8.0}}, 100),
    ],
)
def test_a_stretched_rotary_embedding_has_more_positions(
    rope: dict[str, object] | None, positions: int
) -> None:
    with Changed(max_position_embeddings=100, rope_parameters=rope) as model:
        assert find_structure(model).num_positions == positions


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), object(), None])
def test_what_is_no_model_is_refused(thing: object) -> None:
    with pytest.raises(ModelError, match="not a transformers model with a decoder"):
        find_structure(thing)  # type: ignore[arg-type]


# -- other classes of transformers ----------------------------------------------------------------


OTHERS: dict[str, tuple[dict[str, object], str]] = {
    "gemma4": ({"use_bidirectional_attention": "all"}, "its tokens see all later ones"),
    "idefics": ({}, "its layers can attend to another sequence than their own"),
    "mllama": ({}, "its layers can attend to another sequence than their own"),
    "t5gemma2": ({}, "an encoder-decoder: its pictures go to the encoder"),
    "inkling2_loop": ({}, "its layers"),
}
"""Class -> changes of its language model's config, and why it is refused."""


@pytest.mark.parametrize("name", OTHERS)
def test_another_class_is_refused_with_the_reason(name: str) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    changes, match = OTHERS[name]
    config = CONFIG_MAPPING[name]()
    if changes:
        config.text_config = type(config.text_config)(**changes)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(ModelError, match=f"^{name}: {match}") as caught:
        find_structure(model)
    assert "vtprune models" in caught.value.hint


def glm4v_moe() -> PreTrainedModel:
    """A tiny GLM-4.5V: GLM-4.1V with experts, of no listed family."""
    fields = tiny.FAMILIES["glm4v"].config(partial(tiny.token, "glm4v"))
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    experts |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    text = {**fields.pop("text_config"), **experts}
    vision = fields.pop("vision_config")
    for one in (fields, text, vision):
        one.pop("model_type", None)
    config = CONFIG_MAPPING["glm4v_moe"](text_config=text, vision_config=vision, **fields)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.1)
    model.generation_config = GenerationConfig(pad_token_id=tiny.BYTES, do_sample=False)
    return model


@pytest.mark.parametrize("kind", ["several", "video"])
@pytest.mark.parametrize("at", ["input", 2])
def test_a_decoder_that_takes_positions_in_three_dimensions_is_exact(
    at: str | int, kind: str
) -> None:
    """GLM-4.5V hands its layers time, row and column ids beside the embeddings of them."""
    model = glm4v_moe()
    inputs = tiny.inputs("glm4v", model, kind)
    preset = {"stages": [{"at": at, "method": "random", "keep": 0.3}]}
    with vtprune.pruning(model, preset) as trace:
        tokens, logits = oracle.generate(model, inputs, 4)
    assert trace.stages[0].after < trace.stages[0].before
    unpruned = oracle.generate(model, inputs, 4, tokens)[1]
    assert (logits - unpruned).abs().max() > 0.01
    oracle.assert_masked(model, inputs, trace, tokens, logits)


# -- grids over rows ------------------------------------------------------------------------------


def grids(*sizes: int) -> list[object]:
    return [box(1, 1, size) for size in sizes]


def lengths(shared: object) -> list[list[int]]:
    return [[len(grid) for grid in row] for row in shared]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("sizes", "counts", "expected"),
    [
        ((4,), [4], [[4]]),
        ((4, 6), [10], [[4, 6]]),
        ((4, 6), [4, 6], [[4], [6]]),
        ((4, 6), [0, 10], [[], [4, 6]]),
        ((4, 6), [4, 0, 6], [[4], [], [6]]),
        ((4,), [4, 4, 4], [[4]] * 3),  # beams
        ((4, 6), [4, 4, 6, 6], [[4], [4], [6], [6]]),
        ((), [0, 0], [[], []]),
    ],
)
def test_every_row_gets_the_grids_of_its_media(
    sizes: tuple[int, ...], counts: list[int], expected: list[list[int]]
) -> None:
    shared = share_grids(grids(*sizes), counts)  # type: ignore[arg-type]
    assert shared is not None
    assert lengths(shared) == expected


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ((4, 6), [5, 5]),
        ((4, 6), [6, 4]),
        ((4,), [6]),
        ((4,), [8]),
        ((4, 6), [4, 6, 6, 4]),
        ((), [3]),
    ],
)
def test_grids_that_do_not_fit_the_rows_are_not_guessed(
    sizes: tuple[int, ...], counts: list[int]
) -> None:
    assert share_grids(grids(*sizes), counts) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("counts", [[3], [0], [4, 5]])
def test_fewer_placeholders_than_tokens_are_refused(counts: list[int]) -> None:
    with pytest.raises(ModelError, match=rf"only {sum(counts)} of 10 visual tokens") as caught:
        share_grids(grids(4, 6), counts)  # type: ignore[arg-type]
    assert "prefill_chunk_size" in caught.value.hint


# -- layouts of a batch ---------------------------------------------------------------------------


IMAGE, VIDEO = (tiny.token("llava_onevision", f"<{name}>") for name in ("image", "video"))


def test_runs_of_an_unlisted_family_with_text_between_them_are_two_pictures() -> None:
    ids = torch.tensor([[1, *[IMAGE] * 4, *range(2, 8), IMAGE, *[VIDEO] * 4]])
    layouts, warnings = lay_out_batch(unlisted(), ids, torch.ones_like(ids).bool(), {}, None)
    assert warnings == []
    assert layouts[0].columns.tolist() == [1, 2, 3, 4, 11, 12, 13, 14, 15]
    assert layouts[0].media.tolist() == [0] * 4 + [1] + [2] * 4
    assert layouts[0].modality.tolist() == [0] * 5 + [1] * 4
    assert layouts[0].grid.row.tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1]


def test_a_run_of_no_square_number_is_one_row_with_a_warning() -> None:
    ids = torch.tensor([[1, *[IMAGE] * 6, 2]])
    layouts, warnings = lay_out_batch(unlisted(), ids, torch.ones_like(ids).bool(), {}, None)
    assert layouts[0].grid.row.tolist() == [0] * 6
    assert "nothing in its inputs tells the rows and columns" in warnings[0]


def test_placeholders_in_the_padding_are_not_visual_tokens() -> None:
    ids = torch.tensor([[IMAGE, IMAGE, 1], [IMAGE, IMAGE, 1]])
    valid = torch.tensor([[True] * 3, [False, True, True]])
    layouts, _ = lay_out_batch(unlisted(), ids, valid, {}, None)
    assert [layout.columns.tolist() for layout in layouts] == [[0, 1], [1]]


def test_a_listed_family_says_so_where_the_place_of_its_tokens_is_not_known() -> None:
    ids = torch.tensor([[1, IMAGE, IMAGE, 2]])
    layouts, warnings = lay_out_batch(structure_of(), ids, ids > 0, {}, None)
    assert len(layouts[0]) == 2
    assert "the image tokens do not match the media that were encoded" in warnings[0]


@pytest.mark.parametrize(
    ("modality", "vision", "expected"),
    [(None, {}, 0), ("video", {}, 1), ("image", {}, 0), (None, {"video": {}}, 1),
     (None, {"video": {}, "image": {}}, 0), ("image", {"video": {}}, 0)],
)  # fmt: skip
def test_a_shared_placeholder_holds_what_the_caller_or_the_encoder_says(
    modality: str | None, vision: dict[str, dict[str, object]], expected: int
) -> None:
    config = SimpleNamespace(image_token_id=7, video_token_id=7)
    shared = dataclasses.replace(unlisted(), config=config)  # type: ignore[arg-type]
    ids = torch.tensor([[1, 7, 7]])
    layouts, _ = lay_out_batch(shared, ids, ids > 0, vision, modality)
    assert layouts[0].modality.tolist() == [expected] * 2


# -- plans ----------------------------------------------------------------------------------------


def plan(preset: object, trace: Trace | None = None) -> PruningPlan:
    return PruningPlan(load_preset(preset), structure_of(), None, trace or Trace())  # type: ignore[arg-type]


def test_a_free_stage_without_any_keep_is_refused_before_anything_runs() -> None:
    with pytest.raises(PresetError, match=r"the stage at 2 \(random\) has no keep, and no keep"):
        plan({"stages": [{"at": 2, "method": "random"}]})


def test_a_default_calibration_is_said_once_and_only_where_it_is_used() -> None:
    trace = Trace()
    plan({"keep": 0.5, "stages": [{"at": 2, "method": "random"}]}, trace)
    assert trace.warnings == []
    plan({"keep": 0.5, "stages": [{"at": "ecl", "method": "random"}]}, trace)
    plan({"keep": 0.5, "stages": [{"at": "ecl", "method": "random"}]}, trace)
    assert [warning[:30] for warning in trace.warnings] == ["ecl 2 by default, not measured"]
    plan({"keep": 0.5, "stages": [{"at": "horizon", "method": "random"}]}, trace)
    assert len(trace.warnings) == 2
    assert trace.warnings[1].startswith("horizon 4 by default, not measured")


def test_keep_one_needs_no_stage_to_fit_the_model() -> None:
    preset = {"keep": 1, "stages": [{"at": 60, "method": "random"}]}
    assert plan(preset).group("all").stages == ()
    with pytest.raises(PresetError, match="this model has 6 decoder layers"):
        plan({**preset, "keep": 0.5})


def test_the_largest_seed_draws() -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "image")
    kept = []
    for seed in (0, 2**63 - 1):
        preset = {"seed": seed, "stages": [{"at": "input", "method": "random", "keep": 0.3}]}
        with vtprune.pruning(model, preset) as trace, torch.no_grad():
            model(**inputs)
        kept.append(trace.stages[0].kept)
    assert kept[0] != kept[1]


def test_frames_without_a_token_are_spoken_of() -> None:
    model = shared_model("qwen2_5_vl")
    inputs = tiny.inputs("qwen2_5_vl", model, "video", frames=12)
    stages = [{"at": 1, "method": "uniform", "keep": 0.1, "per": "frame"}]
    with vtprune.pruning(model, {"stages": stages}) as trace, torch.no_grad():
        model(**inputs)
    assert trace.stages[0].after == [3]
    assert any("kept in 6 frames: evenly spaced frames keep one" in w for w in trace.warnings)


@pytest.mark.parametrize("per", ["all", "frame"])
def test_dropping_all_is_not_spoken_of_as_few_tokens_for_many_groups(per: str) -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "video")
    stages = [{"at": 2, "method": "vtw", "keep": 0, "per": per}]
    with vtprune.pruning(model, {"stages": stages}) as trace, torch.no_grad():
        model(**inputs)
    assert trace.stages[0].after == [0]
    assert trace.warnings == []
