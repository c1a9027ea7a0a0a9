"""Counted costs: the published figures, and torch's own counter on tiny models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracle
import pytest
import tiny
import torch
import zoo
from counted import AGREES, LLAVA_TOWER, WIDE_HEADS, count, uneven
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedModel,
)

import vtprune
from vtprune.models.cost import (
    CostError,
    decode_flops,
    head_flops,
    kv_bytes,
    layer_flops,
    layers_flops,
    plain_decoder,
    prefill_flops,
    state_bytes,
    vision_flops,
)
from vtprune.models.layer_cost import measure_decoder
from vtprune.models.structure import find_decoder

LLAVA_7B = plain_decoder(
    layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008, vocab=32064
)

# Layer average -> image tokens kept from layer 2 on, of 576, and what the method's paper counts:
# TFLOPs with 64 text tokens, the share that is saved, MiB of the image tokens' cache in half
# precision.
PUBLISHED = [(576, 576, 8.504, 0, 288.0), (192, 166, 3.350, 0.606, 95.8),
             (128, 98, 2.511, 0.705, 63.9), (64, 29, 1.665, 0.804, 31.6)]  # fmt: skip


@pytest.mark.parametrize(("average", "kept", "teraflops", "saved", "mebibytes"), PUBLISHED)
def test_llava_7b_costs_what_is_published(
    average: int, kept: int, teraflops: float, saved: float, mebibytes: float
) -> None:
    image = [576] * 2 + [kept] * 30
    assert average - 1 < sum(image) / 32 <= average
    flops = layers_flops(LLAVA_7B, [tokens + 64 for tokens in image])
    assert flops / 1e12 == pytest.approx(teraflops, abs=5e-4)
    assert 1 - flops / layers_flops(LLAVA_7B, [640] * 32) == pytest.approx(saved, abs=5e-4)
    assert kv_bytes(LLAVA_7B, image, 2) / 2**20 == pytest.approx(mebibytes, abs=0.06)


@pytest.mark.parametrize(("text", "whole_model"), [(86, False), (54, True)])
def test_the_published_saving_depends_on_the_text_and_on_what_is_counted(
    text: int, whole_model: bool
) -> None:
    # EntropyPrune's 68.2 % at a layer average of 128 names neither.
    around = vision_flops(LLAVA_TOWER, [(1, 24, 24)]) + head_flops(LLAVA_7B) if whole_model else 0
    full = around + layers_flops(LLAVA_7B, [576 + text] * 32)
    pruned = around + layers_flops(LLAVA_7B, [576 + text] * 2 + [98 + text] * 30)
    assert 1 - pruned / full == pytest.approx(0.682, abs=5e-4)


def test_equal_heads_give_entropyprunes_own_count() -> None:
    n, d, m = 640, LLAVA_7B.hidden, 11008
    assert layer_flops(LLAVA_7B, n, n) == 8 * n * d**2 + 4 * n**2 * d + 6 * n * d * m


def test_grouped_queries_save_key_and_value_projections_and_cache() -> None:
    grouped = plain_decoder(28, 3584, 28, 4, 128, 18944, 152064)
    n, d, kv, m = 1000, 3584, 512, 18944
    assert layer_flops(grouped, n, n) == 2 * n * d * (2 * d + 2 * kv) + 4 * n**2 * d + 6 * n * d * m
    assert kv_bytes(grouped, [n] * 28, 2) == 28 * n * 2 * kv * 2


def test_prefill_counts_the_output_head_once() -> None:
    tokens = [640] * 32
    head = prefill_flops(LLAVA_7B, tokens) - layers_flops(LLAVA_7B, tokens)
    assert head == head_flops(LLAVA_7B) == 2 * 4096 * 32064


@pytest.mark.parametrize("answer_tokens", [0, 1])
def test_the_first_answer_token_needs_no_decode_step(answer_tokens: int) -> None:
    assert decode_flops(LLAVA_7B, [640] * 32, answer_tokens) == 0


def test_decode_steps_add_up_one_by_one() -> None:
    tokens = [640] * 2 + [230] * 30
    steps = [
        sum(layer_flops(LLAVA_7B, 1, n + step) for n in tokens) + head_flops(LLAVA_7B)
        for step in range(1, 10)
    ]
    assert decode_flops(LLAVA_7B, tokens, 10) == pytest.approx(sum(steps), rel=1e-12)


@pytest.mark.parametrize("cost", [prefill_flops, lambda s, t: decode_flops(s, t, 2),
                                  lambda s, t: kv_bytes(s, t, 2)])  # fmt: skip
def test_a_count_missing_for_a_layer_is_refused(cost: Any) -> None:
    with pytest.raises(ValueError, match="31 token counts for 32 layers; give one a layer"):
        cost(LLAVA_7B, [640] * 31)


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("llama", {}, (6, 64, 4, 2, 16, 96, 320, True)),
        ("mistral", {"head_dim": 32, "sliding_window": None}, (6, 64, 4, 2, 32, 96, 320, True)),
        ("qwen2", {}, (6, 64, 4, 2, 16, 96, 320, True)),
        ("qwen3", {"head_dim": 32}, (6, 64, 4, 2, 32, 96, 320, True)),
        ("phi3", {"pad_token_id": 0, "sliding_window": None}, (6, 64, 4, 2, 16, 96, 320, True)),
        ("phi", {}, (6, 64, 4, 2, 16, 96, 320, False)),
    ],
)
def test_the_shape_of_a_model_is_read_from_its_modules(
    model_type: str, fields: dict[str, int], expected: tuple[int, ...]
) -> None:
    config = CONFIG_MAPPING[model_type](**(text_fields() | fields))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found, plain = measure_decoder(model), plain_decoder(*expected)  # type: ignore[arg-type]
    assert replace(found, by_layer=()) == replace(plain, by_layer=())
    assert found.by_layer == plain.by_layer


QWEN = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
        "decoder_sparse_step": 2, "mlp_only_layers": [3]}  # fmt: skip
DEEPSEEK = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
            "n_shared_experts": 2, "first_k_dense_replace": 2, "n_group": 1,
            "topk_group": 1}  # fmt: skip
ERNIE = {"moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 2, "moe_intermediate_size": 40,
         "moe_layer_start_index": 1, "moe_layer_end_index": 3}  # fmt: skip
LOCAL = {"num_local_experts": 5, "num_experts_per_tok": 2}
MIXED = {
    "dots1": DEEPSEEK,
    "ernie4_5_moe": ERNIE,
    "glm4_moe": DEEPSEEK,
    "gpt_oss": LOCAL,
    "granitemoe": LOCAL,
    "hunyuan_v1_moe": {"num_experts": 5, "moe_topk": 2},
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 24},
    "mixtral": LOCAL,
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 3},
    "phimoe": LOCAL,
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 24},
    "qwen3_moe": QWEN,
    "qwen3_vl_moe": {**QWEN, "rope_parameters": {"rope_type": "default",
                                                 "mrope_section": [2, 3, 3]}},
    "glm4v_moe": {**DEEPSEEK, "rope_parameters": {"rope_type": "default",
                                                  "mrope_section": [1, 1, 2]}},
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
          "out_hidden_size": 64, "deepstack_visual_indexes": []}  # fmt: skip


def mixture(model_type: str, **more: int) -> PreTrainedModel:
    """A tiny mixture of experts, run expert by expert."""
    ids = {f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos"))}
    fields = text_fields() | {"head_dim": 16} | ids | MIXED[model_type] | more
    if model_type in ("qwen3_vl_moe", "glm4v_moe"):
        config = CONFIG_MAPPING[model_type](text_config=fields, vision_config=VISION)
        made = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    else:
        config = CONFIG_MAPPING[model_type](**fields)
        made = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    run_experts_one_by_one(made)
    return made.eval()


def run_experts_one_by_one(model: PreTrainedModel) -> None:
    """torch counts no grouped products."""
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_experts_implementation"):
            module.config._experts_implementation = "eager"


@pytest.mark.parametrize("model_type", MIXED)
def test_the_flops_of_a_mixture_of_experts_are_what_torch_counts(model_type: str) -> None:
    model = mixture(model_type)
    shape = measure_decoder(model)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        cache = run_text(model, 50)[oracle.CACHE]
    counted = counter.get_total_flops()
    assert prefill_flops(shape, [50] * 6) == pytest.approx(counted, rel=AGREES)
    for layer in range(6):
        own = next(counts for path, counts in counter.get_flop_counts().items()
                   if path.endswith(f".layers.{layer}"))  # fmt: skip
        assert layer_flops(shape, 50, 50, layer) == pytest.approx(sum(own.values()), rel=AGREES)
    counted = count(lambda: [run_text(model, 1, cache) for _ in range(4)])
    assert decode_flops(shape, [50] * 6, 5) == pytest.approx(counted, rel=AGREES)


def test_experts_count_by_those_that_are_active() -> None:
    few = mixture("mixtral")
    many = mixture("mixtral", num_local_experts=40)
    flops = [layer_flops(measure_decoder(model), 10, 10) for model in (many, few)]
    assert flops[0] - flops[1] == pytest.approx(2 * 10 * 64 * 35)  # the router


OTHER_KINDS = ("qwen3_5", "glm5_next", "lfm3_vl", "nemotron_h_omni", "minicpmv4_6", "kimi_k25",
               "mistral4", "gemma4_unified", "gemma4-e2b", "gemma3n-e2b", "llama4-scout",
               "ernie4_5_vl_moe")  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        every = [*zoo.MODEL_TYPES, *zoo.MIXES]
        metafunc.parametrize("kind", every if metafunc.config.getoption("--zoo") else OTHER_KINDS)


def run_decoder(
    model: PreTrainedModel, tokens: int, before: int = 0, **given: Any
) -> tuple[int, Any]:
    """FLOPs of the decoder alone, as torch counts them, and its cache."""
    decoder = find_decoder(model)
    given.setdefault(oracle.CACHE, DynamicCache(config=decoder.config))
    ids = torch.arange(before, before + tokens)[None] % 900 + 10
    given["attention_mask"] = torch.ones(1, before + tokens, dtype=torch.long)
    embeds = model.get_input_embeddings()(ids)
    counted = count(lambda: decoder(inputs_embeds=embeds, use_cache=True, **given))
    return counted, given[oracle.CACHE]


def test_flops_and_bytes_of_other_kinds_of_layers_are_what_torch_counts(kind: str) -> None:
    if zoo.MIXES.get(kind, (kind,))[0] not in zoo.MODEL_TYPES or zoo.is_broken(kind):
        pytest.skip("this transformers has no such class, or a broken one")
    try:
        model = zoo.build(kind)
        shape = measure_decoder(model)
    except (CostError, ValueError, NotImplementedError, RuntimeError, AttributeError) as error:
        if kind in OTHER_KINDS:
            raise
        pytest.skip(f"not built, or not counted: {error}")
    model.set_attn_implementation("eager")
    run_experts_one_by_one(model)
    last = {} if shape.last_from is None else {"logits_to_keep": 1}
    counted, cache = run_decoder(model, 150, **last)
    assert layers_flops(shape, [150] * shape.layers) == pytest.approx(counted, rel=0.01)
    names = ("keys", "values", "prefill_keys", "prefill_values", "indexer_keys")
    held = [getattr(layer, name, None) for layer in cache.layers for name in names]
    kept = sum(value.numel() for value in held if isinstance(value, torch.Tensor))
    assert kv_bytes(shape, [150] * shape.layers, 1) == kept
    assert state_bytes(shape, 4) == 4 * sum(map(count_state, cache.layers))
    counted = sum(run_decoder(model, 1, 150 + step, **{oracle.CACHE: cache})[0] for step in (0, 1))
    if kind.startswith("inkling"):  # torch's stand-in for the kernel convolves two places, not one
        counted -= 2 * 2 * sum(map(_num_convolved, find_decoder(model).modules()))
    decoded = decode_flops(shape, [150] * shape.layers, 3) - 2 * head_flops(shape)
    assert decoded == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(
    ("name", "layer"), [("gemma4-e2b", 2), ("gemma4-e2b", 6), ("ernie4_5_vl_moe", 2)]
)
def test_a_pruned_answer_costs_what_torch_counts(name: str, layer: int | str) -> None:
    # The one shares keys between layers, of which the last go on with one token, if none of them
    # cuts; the other has experts for visual tokens alone.
    if zoo.MIXES.get(name, (name,))[0] not in zoo.MODEL_TYPES:
        pytest.skip("this transformers has no such class")
    model, batches = zoo.ready(name)
    model.set_attn_implementation("eager")
    run_experts_one_by_one(model)
    stages = {"stages": [{"at": layer, "method": "random", "keep": 0.5}]}
    with vtprune.pruning(model, stages) as trace:
        counted = count(lambda: model.generate(**batches[0], max_new_tokens=4))
    shape, tokens = measure_decoder(model), trace.tokens_by_layer()
    assert tokens[-1] == trace.text[0] + 8
    flops = prefill_flops(shape, tokens, trace.text[0]) + decode_flops(shape, tokens, 4)
    assert flops == pytest.approx(counted, rel=AGREES)


def test_layers_that_attend_to_pictures_alone_are_not_counted() -> None:
    with pytest.raises(CostError, match="MllamaCrossAttentionDecoderLayer layers are not counted"):
        measure_decoder(zoo.build("mllama"))


def _num_convolved(module: nn.Module) -> int:
    return module.weight.numel() if isinstance(module, nn.Conv1d) else 0


def count_state(layer: object) -> int:
    """The values that a layer of a cache holds beside keys and values."""
    total = 0
    for name in ("conv_states", "recurrent_states"):
        value = getattr(layer, name, ())
        parts = value.values() if isinstance(value, dict) else value
        parts = [parts] if isinstance(parts, torch.Tensor) else list(parts or ())
        total += sum(part.numel() for part in parts if isinstance(part, torch.Tensor))
    return total


def test_layers_that_are_not_counted_are_refused() -> None:
    if "qwen4_exp" not in zoo.MODEL_TYPES:
        pytest.skip("this transformers has no such class")
    with pytest.raises(CostError, match="Qwen4ExpTextQSAIndexer layers are not counted"):
        measure_decoder(zoo.skeleton("qwen4_exp"))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_prefill_flops_are_what_torch_counts(name: str) -> None:
    model = uneven(name)
    shape = measure_decoder(model)
    counted = count(lambda: run_text(model, 50))
    assert prefill_flops(shape, [50] * 6) == pytest.approx(counted, rel=AGREES)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_decode_flops_are_what_torch_counts(name: str) -> None:
    model = uneven(name)
    shape = measure_decoder(model)
    cache = run_text(model, 50)[oracle.CACHE]
    counted = count(lambda: [run_text(model, 1, cache) for _ in range(4)])
    assert decode_flops(shape, [50] * 6, 5) == pytest.approx(counted, rel=AGREES)


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("layer", [0, 5])
def test_layer_flops_are_what_torch_counts_for_one_layer(name: str, layer: int) -> None:
    model = uneven(name)
    shape = measure_decoder(model)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run_text(model, 50)
    counts = counter.get_flop_counts()
    (path,) = [path for path in counts if path.endswith(f".layers.{layer}")]
    counted = sum(counts[path].values())
    assert layer_flops(shape, 50, 50) == pytest.approx(counted, rel=AGREES)


@pytest.mark.parametrize("name", WIDE_HEADS)
def test_heads_may_be_wider_than_the_decoder(name: str) -> None:
    if name not in tiny.MODELS:
        pytest.skip("this transformers has no such model")
    shape = measure_decoder(uneven(name))
    assert (shape.hidden, shape.heads, shape.by_layer[0].cached) == (64, 4, 2 * 2 * 24)


def text_fields() -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
    }


def run_text(model: PreTrainedModel, tokens: int, cache: Any = None) -> Any:
    ids = torch.arange(tokens)[None] % 256
    return model(input_ids=ids, **{oracle.CACHE: cache}, use_cache=True, logits_to_keep=1)
