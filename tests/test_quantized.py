"""Quantised checkpoints: loaded through transformers, or refused before a weight is read."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from conftest import shared_model
from safetensors.torch import load_file, save_file
from torch import nn

import vtprune
from vtprune.errors import ModelError
from vtprune.models.loading import load, open_model
from vtprune.models.weights import SINGLE

CONFIGS: dict[str, dict[str, object]] = {
    "gptq": {"bits": 4, "group_size": 128, "desc_act": False},
    "awq": {"bits": 4, "group_size": 128, "zero_point": True},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"format": "float-quantized", "config_groups": {}},
    "torchao": {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
    "aqlm": {},
    "hqq": {"quant_config": {}},
    "exl2": {"bits": 4.0},
}
PACKAGES = {
    "gptq": "optimum|gptqmodel", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed.tensors", "torchao": "torchao", "aqlm": "aqlm", "hqq": "hqq",
    "exl2": "which this transformers does not know",
}  # fmt: skip


def quantized(source: Path, target: Path, method: str, **values: object) -> Path:
    """A copy of a checkpoint whose config says that its weights are quantised."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **values}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("method", CONFIGS)
def test_a_missing_package_is_named_before_weights_are_read(
    method: str, checkpoints, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    directory = quantized(checkpoints("llava"), tmp_path / "model", method, **CONFIGS[method])
    (directory / SINGLE).unlink()
    with pytest.raises(ModelError, match=PACKAGES[method]) as caught:
        open_model(str(directory))
    assert caught.value.message.startswith(f"{directory}: its weights are quantised ({method})")
    assert "checkpoint that is not quantised" in caught.value.hint


def test_quantize_is_refused_where_the_weights_are_already(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    directory = quantized(checkpoints("llava"), tmp_path / "model", "fp8")
    with pytest.raises(ModelError, match=r"its weights are quantised \(fp8\) already") as caught:
        open_model(str(directory), quantize="4bit")
    assert "leave --quantize out" in caught.value.hint


def write_fp8(source: Path, target: Path, block: int) -> dict[str, torch.Tensor]:
    """Quantise the decoder's linear weights of a checkpoint in blocks; return them as widened."""
    weights, widened = load_file(source / SINGLE), {}
    for key in [key for key in weights if "language_model.model.layers" in key]:
        weight = weights[key]
        if weight.ndim != 2:
            continue
        rows, cols = weight.shape[0] // block, weight.shape[1] // block
        blocks = weight.view(rows, block, cols, block)
        scale = blocks.abs().amax((1, 3)) / 448
        narrow = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        weights[key] = narrow.view(weight.shape)
        weights[key.removesuffix("weight") + "weight_scale_inv"] = scale
        widened[key] = (narrow.float() * scale[:, None, :, None]).view(weight.shape)
    save_file(weights, target / SINGLE, metadata={"format": "pt"})
    return widened


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs these weights as they are")
def test_fp8_weights_are_widened_where_no_gpu_is(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("accelerate", reason="quantised weights need accelerate")
    source = checkpoints("llava")
    directory = quantized(
        source, tmp_path / "model", "fp8", weight_block_size=[16, 16],
        modules_to_not_convert=["vision_tower", "multi_modal_projector", "lm_head"],
    )  # fmt: skip
    widened = write_fp8(source, directory, 16)
    loaded = load(str(directory), dtype="float32")
    assert "are widened to bfloat16" in loaded.warnings[0]
    key = "layers.1.mlp.up_proj.weight"
    weight = loaded.model.get_decoder().layers[1].mlp.up_proj.weight
    expected = next(value for name, value in widened.items() if name.endswith(key))
    torch.testing.assert_close(weight.float(), expected, atol=2e-2, rtol=1e-2)
    inputs = tiny.inputs("llava", loaded.model, "image")
    with torch.no_grad():
        full = loaded.model(**inputs).logits[:, -1]
        with vtprune.pruning(loaded.model, method="entropy", at=2, keep=0.5) as trace:
            pruned = loaded.model(**inputs).logits[:, -1]
    assert trace.stages[0].after[0] < trace.stages[0].before[0]
    assert not torch.equal(full, pruned)


class QuantLinear(nn.Module):
    """A stand-in for quantised linear layers: integer weights, no parameter of a float dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scale)
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.qweight * self.scales, self.bias)


def replace_linears(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, kind(child))
        else:
            replace_linears(child, kind)
    return module


def widen(module: nn.Module) -> nn.Module:
    """The same model with plain linear layers of what the quantised ones hold."""
    for name, child in module.named_children():
        if isinstance(child, QuantLinear):
            linear = nn.Linear(child.in_features, child.out_features, child.bias is not None)
            linear.weight.data = child.qweight * child.scales
            if child.bias is not None:
                linear.bias.data = child.bias.clone()
            setattr(module, name, linear)
        else:
            widen(child)
    return module


@pytest.mark.parametrize(
    ("name", "method"),
    [("llava_onevision", "entropy"), ("qwen2_5_vl", "fastv"), ("qwen3_vl", "sparsevlm")],
)
def test_quantised_linear_layers_are_pruned_as_what_they_hold(name: str, method: str) -> None:
    model = copy.deepcopy(shared_model(name))
    replace_linears(model.get_decoder(), QuantLinear)
    plain = widen(copy.deepcopy(model))
    inputs = tiny.inputs(name, model, "image")
    outcomes = []
    for each in (model, plain):
        with vtprune.pruning(each, method=method, keep=0.6) as trace, torch.no_grad():
            logits = each(**inputs).logits
        outcomes.append(([stage.kept for stage in trace.stages], logits))
    assert outcomes[0][0] == outcomes[1][0]
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1], atol=1e-5, rtol=0)
    with torch.no_grad():
        assert model(**inputs).logits.shape != outcomes[0][1].shape  # tokens were dropped
