"""Mixtures of experts: pruned equals masked, and `ask` reports what is active."""

from __future__ import annotations

import functools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from conftest import save_noise
from oracle import assert_masked, dropped, generate
from tiny_base import TEXT
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedConfig
from transformers import PreTrainedModel as Model

import vtprune
from vtprune.cli import cli
from vtprune.models import cost
from vtprune.models.layer_cost import measure_decoder
from vtprune.models.structure import find_structure

EXPERTS: dict[str, Any] = {
    "num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": [1],
    "shared_expert_intermediate_size": 40,
}  # fmt: skip
MODELS = ("internvl-qwen3_moe", "internvl-qwen2_moe", "llava-mixtral", "qwen3_vl_moe")


def config(name: str) -> PreTrainedConfig:
    """A tiny config of a family with experts in its language model."""
    family = {"qwen3_vl_moe": "qwen3_vl"}.get(name, name.split("-")[0])
    fields = tiny.FAMILIES[family].config(partial(tiny.token, family))
    kind = fields.pop("model_type")
    text = {**fields["text_config"], **EXPERTS}
    if name == "qwen3_vl_moe":
        kind = name
        for part in ("text_config", "vision_config"):
            fields[part].pop("model_type", None)
    else:
        text |= {**TEXT, **EXPERTS, "model_type": name.split("-")[1], "head_dim": 16}
        text |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return CONFIG_MAPPING[kind](**{**fields, "text_config": text, "tie_word_embeddings": False})


@functools.cache
def model(name: str) -> Model:
    """A tiny model with random weights."""
    made = AutoModelForImageTextToText.from_config(config(name), attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, weight in sorted(made.named_parameters()):
            if weight.ndim > 1:
                scale = 0.075 if path == "lm_head.weight" else 0.15
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    made.generation_config = tiny.GenerationConfig(pad_token_id=tiny.BYTES, do_sample=False)
    return made.eval()


def family_of(name: str) -> str:
    return {"qwen3_vl_moe": "qwen3_vl"}.get(name, name.split("-")[0])


@pytest.mark.parametrize("batch", ["one", "ragged"])
@pytest.mark.parametrize("at", ["input", 2])
@pytest.mark.parametrize("name", MODELS)
def test_pruned_equals_masked_with_experts(name: str, at: str | int, batch: str) -> None:
    made, family = model(name), family_of(name)
    inputs = tiny.inputs(family, made, "image") if batch == "one" else tiny.ragged(family, made)
    stages = [{"at": at, "method": "random", "keep": 0.3}]
    with vtprune.pruning(made, {"stages": stages}) as trace:
        tokens, logits = generate(made, inputs, 4)
    assert trace.warnings == []
    assert any(columns for _, row in dropped(trace, inputs) for columns in row)
    assert_masked(made, inputs, trace, tokens, logits)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def build(name: str) -> Path:
        directory = tmp_path_factory.mktemp("moe") / name
        model(name).save_pretrained(directory)
        tiny.tokenizer(family_of(name)).save_pretrained(directory)
        tiny.write_files(family_of(name), directory)
        return directory

    return build


@pytest.mark.parametrize("name", MODELS)
def test_ask_answers_and_counts_the_active_experts(
    name: str, checkpoint: Any, tmp_path: Path
) -> None:
    picture = save_noise(tmp_path / "noise.png", 90, 150)
    args = ["ask", str(picture), "what?", "--model", str(checkpoint(name)), "--keep", "0.6",
            "--max-new-tokens", "3", "--json"]  # fmt: skip
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert not any("not counted" in one for one in report["warnings"])
    shape = measure_decoder(model(name))
    tokens, flops = report["tokens"], report["flops"]
    whole = tokens["visual"] + tokens["text"]
    assert flops["prefill_full"] == cost.prefill_flops(shape, [whole] * shape.layers)
    assert flops["prefill"] < flops["prefill_full"]
    assert flops["vision"] > 0
    assert report["model"]["family"] == model(name).config.model_type


def test_qwen3_vl_with_experts_is_a_listed_family() -> None:
    found = find_structure(model("qwen3_vl_moe"))
    assert found.family is not None


@pytest.mark.parametrize("kind", ["video", "mixed"])
def test_videos_of_qwen3_vl_with_experts_are_laid_out(kind: str) -> None:
    made = model("qwen3_vl_moe")
    inputs = tiny.inputs("qwen3_vl", made, kind, frames=6)
    stages = [{"at": "input", "method": "uniform", "keep": 0.5, "per": "frame"}]
    with vtprune.pruning(made, {"stages": stages}) as trace:
        tokens, logits = generate(made, inputs, 3)
    assert trace.warnings == []
    layout = trace.layouts[0]
    assert len(set(layout.grid.frame[layout.of_modality("video")].tolist())) == 3
    assert_masked(made, inputs, trace, tokens, logits)
