"""Counted costs: the published figures, and torch's own counter on tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from vtprune.cost import (
    DecoderShape,
    VisionShape,
    decode_flops,
    decoder_shape,
    head_flops,
    kv_bytes,
    layer_flops,
    layers_flops,
    prefill_flops,
    tile_units,
    vision_flops,
    vision_shape,
)
from vtprune.errors import ModelError

LLAVA_7B = DecoderShape(
    layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008, vocab=32064
)
TILE, PATCH = 56, 14
AGREES = 1e-3  # transformers 5.17 has a matrix product in its rotary embedding; 5.23 agrees exactly
FAMILIES = ("llava_onevision", "llava_onevision_pooled", "llava_next", "llava_full", "qwen2_5_vl")

# Layer average -> image tokens kept from layer 2 on, of 576, and what the method's paper counts:
# TFLOPs with 64 text tokens, MiB of the image tokens' cache in half precision.
PUBLISHED = [(576, 576, 8.504, 288.0), (192, 166, 3.350, 95.8), (128, 98, 2.511, 63.9),
             (64, 29, 1.665, 31.6)]  # fmt: skip


@pytest.mark.parametrize(("average", "kept", "teraflops", "mebibytes"), PUBLISHED)
def test_llava_7b_costs_what_is_published(
    average: int, kept: int, teraflops: float, mebibytes: float
) -> None:
    image = [576] * 2 + [kept] * 30
    flops = layers_flops(LLAVA_7B, [tokens + 64 for tokens in image])
    assert flops / 1e12 == pytest.approx(teraflops, abs=5e-4)
    assert kv_bytes(LLAVA_7B, image, 2) / 2**20 == pytest.approx(mebibytes, abs=0.06)


def test_equal_heads_give_entropyprunes_own_count() -> None:
    n, d, m = 640, LLAVA_7B.hidden, LLAVA_7B.intermediate
    assert layer_flops(LLAVA_7B, n, n) == 8 * n * d**2 + 4 * n**2 * d + 6 * n * d * m


def test_grouped_queries_save_key_and_value_projections_and_cache() -> None:
    grouped = DecoderShape(28, 3584, 28, 4, 128, 18944, 152064)
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
        ("mistral", {}, (6, 64, 4, 2, 16, 96, 320, True)),
        ("mistral", {"head_dim": 32}, (6, 64, 4, 2, 32, 96, 320, True)),
        ("qwen2", {}, (6, 64, 4, 2, 16, 96, 320, True)),
        ("qwen2_5_vl_text", {}, (6, 64, 4, 2, 16, 96, 320, True)),
        ("qwen3", {"head_dim": 32}, (6, 64, 4, 2, 32, 96, 320, True)),
        ("gemma3_text", {"head_dim": 8}, (6, 64, 4, 2, 8, 96, 320, True)),
        ("glm4v_text", {}, (6, 64, 4, 2, 16, 96, 320, True)),
        ("phi", {}, (6, 64, 4, 2, 16, 96, 320, False)),
    ],
)
def test_a_decoder_shape_comes_from_a_transformers_config(
    model_type: str, fields: dict[str, int], expected: tuple[int, ...]
) -> None:
    config = CONFIG_MAPPING[model_type](**(text_fields() | fields))
    assert decoder_shape(config) == DecoderShape(*expected)  # type: ignore[arg-type]


def test_a_config_without_key_value_heads_has_one_a_head() -> None:
    fields = {name: value for name, value in text_fields().items() if "key_value" not in name}
    assert decoder_shape(SimpleNamespace(**fields)).kv_heads == 4


def test_a_config_without_a_size_is_refused() -> None:
    with pytest.raises(ModelError, match="config of odd has no hidden_size"):
        decoder_shape(SimpleNamespace(model_type="odd"))


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(ModelError, match="qwen3_moe: the FLOPs of a mixture of experts"):
        decoder_shape(CONFIG_MAPPING["qwen3_moe"]())


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_flops_are_what_torch_counts(family: str) -> None:
    model = build(family)
    shape = decoder_shape(model.config.get_text_config())
    counted = count(lambda: run_text(model, 50))
    assert counted == pytest.approx(prefill_flops(shape, [50] * 6), rel=AGREES)


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_flops_are_what_torch_counts(family: str) -> None:
    model = build(family)
    shape = decoder_shape(model.config.get_text_config())
    cache = run_text(model, 50).past_key_values
    counted = count(lambda: [run_text(model, 1, cache) for _ in range(4)])
    assert counted == pytest.approx(decode_flops(shape, [50] * 6, 5), rel=AGREES)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_a_shortened_prompt_are_what_torch_counts(family: str) -> None:
    model = build(family)
    shape = decoder_shape(model.config.get_text_config())
    tokens = [50, 50, 17, 17, 17, 17]
    with cut(model, at=2, kept=17):
        caches = []
        prefill = count(lambda: caches.append(run_text(model, 50).past_key_values))
        decode = count(lambda: [run_text(model, 1, caches[0]) for _ in range(4)])
    assert prefill == pytest.approx(prefill_flops(shape, tokens), rel=AGREES)
    assert decode == pytest.approx(decode_flops(shape, tokens, 5), rel=AGREES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 5])
def test_layer_flops_are_what_torch_counts_for_one_layer(family: str, layer: int) -> None:
    model = build(family)
    shape = decoder_shape(model.config.get_text_config())
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run_text(model, 50)
    names = [name for name in counter.get_flop_counts() if name.endswith(f"model.layers.{layer}")]
    counted = sum(counter.get_flop_counts()[names[0]].values())
    assert counted == pytest.approx(layer_flops(shape, 50, 50), rel=AGREES)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2_5_vl"])
def test_tower_and_projector_flops_of_tiles_are_what_torch_counts(family: str) -> None:
    model = build(family)
    shape = vision_shape(model.config)
    assert shape is not None
    if model.config.model_type == "llava":
        pixels = torch.rand(2, 3, TILE, TILE)
        inputs: dict[str, Any] = {"pixel_values": pixels}
        units = tile_units(shape, pixels.shape)
    else:  # a 2 x 2 picture and a 1 x 2 one, padded to the same number of tiles
        pixels = torch.rand(2, 5, 3, TILE, TILE)
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[112, 112], [56, 112]])}
        units = tile_units(shape, pixels.shape, num_units=5 + 3)
    counted = count(lambda: model.model.get_image_features(**inputs))
    assert counted == pytest.approx(vision_flops(shape, units), rel=AGREES)


@pytest.mark.parametrize("family", ["llava_onevision", "llava_onevision_pooled"])
def test_tower_and_projector_flops_of_frames_are_what_torch_counts(family: str) -> None:
    model = build(family)
    shape = vision_shape(model.config)
    assert shape is not None
    pixels = torch.rand(1, 6, 3, TILE, TILE)
    counted = count(lambda: model.model.get_video_features(pixels))
    assert counted == pytest.approx(
        vision_flops(shape, tile_units(shape, pixels.shape)), rel=AGREES
    )


@pytest.mark.parametrize(
    "grid", [[(1, 8, 8)], [(1, 4, 10)], [(1, 12, 18)], [(3, 6, 14)], [(1, 8, 8), (2, 10, 6)]]
)
def test_qwen_tower_and_merger_flops_are_what_torch_counts(grid: list[tuple[int, ...]]) -> None:
    model = build("qwen2_5_vl")
    shape = vision_shape(model.config)
    assert shape is not None
    patches = sum(frames * rows * cols for frames, rows, cols in grid)
    pixels = torch.rand(patches, shape.inputs)
    counted = count(lambda: model.model.get_image_features(pixels, torch.tensor(grid)))
    assert counted == pytest.approx(vision_flops(shape, grid), rel=AGREES)


def test_qwen_windows_cost_less_than_full_attention() -> None:
    shape = vision_shape(build("qwen2_5_vl").config)
    assert shape is not None
    assert (shape.window, shape.full_layers, shape.merge) == (4, 1, 2)
    full = VisionShape(**(vars(shape) | {"window": 0}))
    assert vision_flops(shape, [(1, 16, 16)]) < vision_flops(full, [(1, 16, 16)])
    assert vision_flops(shape, [(1, 4, 4)]) == vision_flops(full, [(1, 4, 4)])


def test_an_unknown_tower_or_family_has_no_vision_shape() -> None:
    assert vision_shape(SimpleNamespace(model_type="fuyu")) is None
    tower = SimpleNamespace(model_type="pixtral")
    assert vision_shape(SimpleNamespace(model_type="llava", vision_config=tower)) is None


def text_fields() -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
    }


def build(family: str) -> PreTrainedModel:
    """A tiny random model with eager attention: the counter does not know sdpa on a CPU."""
    text = text_fields() | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    vision: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40}
    if family == "qwen2_5_vl":
        text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
        vision |= {"depth": 3, "num_heads": 2, "out_hidden_size": 64, "patch_size": PATCH}
        vision |= {"fullatt_block_indexes": [1], "window_size": 5 * PATCH}
        fields: dict[str, Any] = {"image_token_id": 300, "video_token_id": 301}
        kind = family
    else:
        vision |= {"num_hidden_layers": 3, "num_attention_heads": 2}
        vision |= {"image_size": TILE, "patch_size": PATCH}
        fields = {"image_token_index": 300}
        kind = "llava_onevision" if family.startswith("llava_onevision") else family
        if kind == "llava_onevision":
            text |= {"model_type": "qwen2"}
            vision |= {"model_type": "siglip_vision_model"}
            vision |= {"vision_use_head": family.endswith("pooled")}
            fields |= {"video_token_index": 301, "vision_aspect_ratio": "anyres_max_4"}
        else:
            text |= {"model_type": "llama"}
            vision |= {"model_type": "clip_vision_model"}
        if kind == "llava_full":  # CLS to the projector, features of two layers side by side
            kind = "llava"
            fields |= {"vision_feature_select_strategy": "full", "vision_feature_layer": [-2, -1]}
        else:
            fields |= {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
    configs: Any = CONFIG_MAPPING
    config = configs[kind](**fields, text_config=text, vision_config=vision)
    models: Any = AutoModelForImageTextToText
    model: PreTrainedModel = models.from_config(config, attn_implementation="eager").eval()
    return model


def run_text(model: PreTrainedModel, tokens: int, cache: Any = None) -> Any:
    ids = torch.arange(tokens)[None] % 256
    return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def count(run: Any) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@contextmanager
def cut(model: PreTrainedModel, at: int, kept: int) -> Iterator[None]:
    """Leaves the first `kept` tokens of a prompt from layer `at` on."""

    def shorten(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        queries = min(args[0].shape[1], kept)
        keys = queries + kwargs["past_key_values"].get_seq_length(layer.self_attn.layer_idx)
        kwargs["attention_mask"] = kwargs["attention_mask"][:, :, :queries, :keys]
        rotary = kwargs["position_embeddings"]
        kwargs["position_embeddings"] = tuple(part[..., :queries, :] for part in rotary)
        return (args[0][:, :queries], *args[1:]), kwargs

    layers = model.model.get_decoder().layers[at:]
    handles = [layer.register_forward_pre_hook(shorten, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
