"""Counted costs of vision towers: torch's own counter on every family, and published shapes."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from counted import AGREES, LLAVA_TOWER, count, uneven, vision_flops
from transformers import CONFIG_MAPPING, PreTrainedModel

from vtprune.errors import ModelError
from vtprune.models import FAMILIES, cost
from vtprune.models.cost import VisionShape

CASES = [(name, kind) for name in tiny.MODELS for kind in tiny.KINDS[name]]
SIGLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIGLIP |= {"num_attention_heads": 2, "image_size": tiny.TILE, "patch_size": tiny.PATCH}
UNUSUAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a head that pools": ("llava_onevision", "image", {"vision_config":
        {**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": True}}),
    "CLS, and two layers": ("llava", "image",
        {"vision_feature_select_strategy": "full", "vision_feature_layer": [-2, -1]}),
    "CLS of frames alone": ("video_llava", "mixed", {"vision_feature_layer": [-2, -1]}),
    "frames pooled by convolution": ("llava_next_video", "mixed", {"spatial_pool_mode": "conv"}),
    "frames pooled in threes": ("llava_next_video", "video", {"spatial_pool_stride": 3}),
}  # fmt: skip


def encode(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Runs the encoders that there are pixels for."""
    for key in [key for key in tensors if key.startswith("pixel_values")]:
        encoder = getattr(model.model, f"get_{'video' if 'video' in key else 'image'}_features")
        takes = inspect.signature(encoder).parameters.keys() & tensors.keys()
        around = {name: tensors[name] for name in takes if "pixel_values" not in name}
        encoder(tensors[key], **around)  # what it calls its pixels depends on the release


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_tower_and_projector_flops_are_what_torch_counts(name: str, kind: str) -> None:
    model = uneven(name)
    tensors = tiny.inputs(name, model, kind)
    counted = count(lambda: encode(model, tensors))
    assert counted > 0
    assert vision_flops(model, tensors) == pytest.approx(counted, rel=AGREES)


@pytest.mark.skipif("gemma4" not in CONFIG_MAPPING, reason="this transformers has no Gemma 4")
@pytest.mark.parametrize("kind", ["image", "several", "video", "mixed"])
def test_flops_of_padded_patches_are_nearly_what_torch_counts(kind: str) -> None:
    # torch counts averages too, which Gemma 4 takes as a product; in so small a tower it shows.
    model = tiny.model("gemma4", attention="eager")
    tensors = tiny.inputs("gemma4", model, kind)
    counted = count(lambda: encode(model, tensors))
    assert vision_flops(model, tensors) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("case", UNUSUAL)
def test_flops_of_unusual_towers_are_what_torch_counts(case: str) -> None:
    name, kind, fields = UNUSUAL[case]
    usual = tiny.model(name, attention="eager")
    model = tiny.model(name, attention="eager", **fields)
    tensors = tiny.inputs(name, usual, kind)
    counted = count(lambda: encode(model, tensors))
    assert vision_flops(model, tensors) == pytest.approx(counted, rel=AGREES)
    assert counted != count(lambda: encode(usual, tensors))


def test_flops_of_a_plain_vit_are_nearly_what_torch_counts() -> None:
    # Its pooler is left out: one matrix, on one token.
    tower = {**SIGLIP, "model_type": "vit"}
    model = tiny.model("llava", attention="eager", vision_config=tower)
    tensors = tiny.inputs("llava", model, "image")
    counted = count(lambda: encode(model, tensors))
    assert vision_flops(model, tensors) == pytest.approx(counted - 2 * 32**2, rel=AGREES)


@pytest.mark.parametrize(
    "grid", [[(1, 8, 8)], [(1, 4, 10)], [(1, 12, 18)], [(3, 6, 14)], [(1, 8, 8), (2, 10, 6)]]
)
def test_flops_of_windows_are_what_torch_counts(grid: list[tuple[int, ...]]) -> None:
    model = uneven("qwen2_5_vl")
    shape = cost.vision_shape(model.config)
    assert shape is not None
    patches = sum(frames * rows * cols for frames, rows, cols in grid)
    pixels = torch.rand(patches, shape.inputs)
    counted = count(lambda: model.model.get_image_features(pixels, torch.tensor(grid)))
    assert cost.vision_flops(shape, grid) == pytest.approx(counted, rel=AGREES)


def test_windows_cost_less_than_full_attention() -> None:
    shape = cost.vision_shape(uneven("qwen2_5_vl").config)
    assert shape is not None
    assert (shape.window, shape.full_layers, shape.merge) == (4, 1, 2)
    full = VisionShape(**(vars(shape) | {"window": 0}))
    assert cost.vision_flops(shape, [(1, 16, 16)]) < cost.vision_flops(full, [(1, 16, 16)])
    assert cost.vision_flops(shape, [(1, 4, 4)]) == cost.vision_flops(full, [(1, 4, 4)])


def test_a_picture_costs_llava_7b_what_its_sizes_say() -> None:
    text, tower = {"hidden_size": 4096}, {"model_type": "clip_vision_model", "image_size": 336}
    tower |= {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096}
    config = plain({"model_type": "llava", "text_config": text,
                    "vision_config": tower | {"patch_size": 14}})  # fmt: skip
    assert cost.vision_shape(config) == LLAVA_TOWER
    n, d, m, out = 24 * 24 + 1, 1024, 4096, 4096
    layer = 8 * n * d**2 + 4 * n * d * m + 4 * n**2 * d
    embedding, projector = 2 * 576 * 588 * d, 2 * 576 * (d * out + out**2)
    units = cost.tile_units(LLAVA_TOWER, (1, 3, 336, 336))
    assert cost.tower_flops(LLAVA_TOWER, units) == embedding + 24 * layer
    assert cost.projector_flops(LLAVA_TOWER, units) == projector
    assert cost.vision_flops(LLAVA_TOWER, units) / 1e12 == pytest.approx(0.406, abs=5e-4)


def plain(fields: dict[str, Any]) -> SimpleNamespace:
    """A config as bare fields, of no class that knows defaults."""
    inner = {
        key: plain(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in fields.items()
    }
    return SimpleNamespace(**inner)


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("modality", ["image", "video"])
def test_a_vision_shape_needs_the_fields_of_a_config_alone(name: str, modality: str) -> None:
    config = tiny.config(name)
    shape = cost.vision_shape(config, modality)
    assert shape is not None
    assert cost.vision_shape(plain(config.to_dict()), modality) == shape


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_vision_shape(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such model")
    config = CONFIG_MAPPING[family]()
    if config.vision_config is None:  # Gemma 4 says none by default
        config = CONFIG_MAPPING[family](vision_config={})
    has_tower = family != "gemma4_unified"  # its patches go straight to the language model
    assert (cost.vision_shape(config) is not None) == has_tower


@pytest.mark.parametrize("family", ["llava", "llava_next_video", "video_llava", "gemma3"])
@pytest.mark.parametrize("modality", ["image", "video"])
def test_an_unknown_tower_has_no_vision_shape(family: str, modality: str) -> None:
    config = plain({"model_type": family, "vision_config": {"model_type": "pixtral"}})
    assert cost.vision_shape(config, modality) is None


def test_an_unknown_family_has_no_vision_shape() -> None:
    assert cost.vision_shape(SimpleNamespace(model_type="fuyu")) is None


@pytest.mark.parametrize("field", ["head_dim", "num_key_value_heads"])
@pytest.mark.skipif("molmo2" not in CONFIG_MAPPING, reason="this transformers has no Molmo2")
def test_a_tower_whose_heads_are_not_as_wide_as_it_has_no_vision_shape(field: str) -> None:
    config = tiny.config("molmo2")
    setattr(config.vision_config, field, 1)
    assert cost.vision_shape(config) is None


@pytest.mark.skipif("molmo2" not in CONFIG_MAPPING, reason="this transformers has no Molmo2")
def test_overlapping_tiles_need_the_number_of_tokens() -> None:
    shape = cost.vision_shape(tiny.config("molmo2"))
    assert shape is not None
    with pytest.raises(ValueError, match="tiles overlap; give the number of projected tokens"):
        cost.vision_flops(shape, [(1, 4, 4)])


def test_a_tower_without_a_size_is_refused() -> None:
    tower = {"hidden_size": 32, "patch_size": 14, "num_hidden_layers": 2}
    config = plain({"model_type": "internvl", "vision_config": tower, "text_config": {}})
    with pytest.raises(ModelError, match="SimpleNamespace has no intermediate_size"):
        cost.vision_shape(config)


def test_a_tower_without_a_list_is_refused() -> None:
    config = plain(tiny.config("qwen3_vl").to_dict())
    del config.vision_config.deepstack_visual_indexes
    with pytest.raises(ModelError, match="qwen3_vl_vision has no deepstack_visual_indexes"):
        cost.vision_shape(config)
