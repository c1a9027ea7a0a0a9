"""A family by the recipe of docs/families.md: one class and one line of the registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny
import torch
from conftest import save_noise, shared_model
from test_pictures_places import ask
from torch.nn.functional import avg_pool2d
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    PreTrainedConfig,
)

import vtprune
from vtprune.models import FAMILIES, preprocess
from vtprune.models.base import Files, Grids, VisionInputs
from vtprune.models.llava import CLIP, Llava
from vtprune.models.loading import load
from vtprune.tokens.layout import box


class PooledConfig(LlavaConfig):
    model_type = "pooled_llava"


class PooledModel(LlavaModel):
    """Its features are pooled two by two."""

    def get_image_features(self, pixel_values: torch.Tensor, **options: Any) -> Any:
        output = super().get_image_features(pixel_values, **options)
        sides = (tiny.TILE // tiny.PATCH, -1)
        squares = [rows.T.unflatten(1, sides) for rows in output.pooler_output]
        output.pooler_output = tuple(avg_pool2d(square, 2).flatten(1).T for square in squares)
        return output


class PooledForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = PooledConfig

    def __init__(self, config: PooledConfig) -> None:
        super().__init__(config)
        self.model = PooledModel(config)
        self.post_init()


class Pooled(Llava):
    """Half as many rows and columns as patches; its file of preparation has one size."""

    name = "Pooled"
    model_types = ("pooled_llava",)

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> Grids:
        pixels = vision["image"]["pixel_values"]
        assert isinstance(pixels, torch.Tensor)
        side = config.vision_config.image_size // config.vision_config.patch_size // 2
        return {"image": [box(1, side, side)] * len(pixels)}

    def picture_recipe(self, files: Files) -> preprocess.Recipe:
        edge = files.image.get("edge", 224)
        sizes = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
        return preprocess.recipe_over(sizes, CLIP)


def test_a_class_and_a_registry_line_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_type, kinds = PooledConfig.model_type, AutoModelForImageTextToText._model_mapping
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, model_type, PooledConfig)
    monkeypatch.setitem(kinds._extra_content, PooledConfig, PooledForConditionalGeneration)
    monkeypatch.setitem(FAMILIES, model_type, f"{__name__}:Pooled")
    values = {**tiny.config("llava").to_dict(), "model_type": model_type}
    model = PooledForConditionalGeneration(PooledConfig(**values))
    model.load_state_dict(shared_model("llava").state_dict())
    model.save_pretrained(tmp_path)
    tiny.tokenizer("llava").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"edge": tiny.TILE}))
    loaded = load(str(tmp_path))
    assert type(loaded.family) is Pooled
    cut = {"stages": [{"at": "input", "method": "uniform", "keep": 0.5}]}
    picture = save_noise(tmp_path / "picture.png", 90, 150)
    (report,) = vtprune.answer(
        loaded, [(picture, "what?")], cut, generation=vtprune.Generation(max_new_tokens=2)
    )
    assert (report.tokens.visual, report.tokens.kept_after) == (4, 2)
    noise = torch.randint(0, 256, (1, 3, 90, 150), dtype=torch.uint8)
    inputs = dict(ask(loaded, [(noise, 0.0)]).tensors)
    with vtprune.pruning(loaded.model, cut) as trace:
        tokens, logits = oracle.generate(loaded.model, inputs)
    oracle.assert_masked(loaded.model, inputs, trace, tokens, logits)
    whole = oracle.generate(loaded.model, inputs, force=tokens)[1]
    assert float((logits - whole).abs().max()) > 1e-3  # something was dropped
