"""Decoders with linear attention and convolutions: pruned equals the loop over their layers."""

from __future__ import annotations

import functools

import layer_loop
import pytest
import torch
import zoo
from oracle import dropped, generate
from transformers import PreTrainedModel

import vtprune
from vtprune.models.structure import find_structure

Batch = dict[str, torch.Tensor]
Stages = list[dict[str, object]]
STEPS = 9  # the prompt and 8 decoded tokens
CUTS: dict[str, Stages] = {
    "input": [{"at": "input", "method": "uniform", "keep": 0.4}],
    "layer 1": [{"at": 1, "method": "random", "keep": 0.4}],
    "layer 3": [{"at": 3, "method": "random", "keep": 0.4}],
    "three places": [
        {"at": "input", "method": "random", "keep": 0.8},
        {"at": 1, "method": "uniform", "keep": 0.5},
        {"at": 5, "method": "random", "keep": 0.2},
    ],
}
EVERY = ("qwen3_5", "qwen3_5_moe", "lfm3_vl")
SOME = ("qwen3_5",)
"""The classes of the default run."""
ROWS = (((5, 28), 1), ((3, 12), 2), ((20, 13), 1))
"""For every prompt the text tokens before and after its pictures, and how many those are."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" in metafunc.fixturenames:
        every = metafunc.config.getoption("--zoo")
        metafunc.parametrize("model_type", EVERY if every else SOME)


@functools.cache
def hybrid(model_type: str) -> tuple[PreTrainedModel, dict[str, Batch]]:
    """A small model in which layers of all kinds take turns, and prompts for it.

    The prompts of the batch have one length, and the second has two pictures: so a cut is what
    first makes padding.
    """
    if model_type not in zoo.MODEL_TYPES:
        pytest.skip("this transformers has no such class")
    model, _ = zoo.ready(model_type, layers=8)
    structure = find_structure(model)
    rows = [
        zoo.inputs(model, structure, text, seed, pictures)
        for seed, (text, pictures) in enumerate(ROWS)
    ]
    shortest = min(row["input_ids"].shape[1] for row in rows)
    for row in rows:
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in row:
                row[name] = row[name][:, :shortest]
    return model, {"one": rows[1], "several": zoo.left_pad(rows)}


def assert_loop(
    model: PreTrainedModel, batch: Batch, stages: Stages, **options: object
) -> torch.Tensor:
    """Pruned is the loop over the layers, for every row alone; the logits are returned."""
    tokens, whole = generate(model, batch, STEPS)
    with vtprune.pruning(model, {"stages": stages}) as trace:
        logits = generate(model, batch, STEPS, tokens, **options)[1]
    noise = float((layer_loop.loop(model, batch, [], tokens) - whole).abs().max())
    tolerance = max(2e-5, 3 * noise)
    assert tolerance < 2e-4
    expected = layer_loop.loop(model, batch, dropped(trace, batch), tokens)
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=0)
    assert float((expected - whole).abs().max()) > 1000 * tolerance  # something was dropped
    return logits


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("prompts", ["one", "several"])
def test_pruned_is_the_loop_over_the_layers(model_type: str, prompts: str, cut: str) -> None:
    model, batches = hybrid(model_type)
    assert_loop(model, batches[prompts], CUTS[cut])


def test_keep_1_changes_no_bit(model_type: str) -> None:
    model, batches = hybrid(model_type)
    for batch in batches.values():
        tokens, whole = generate(model, batch, STEPS)
        with vtprune.pruning(model, "balanced", keep=1):
            assert torch.equal(generate(model, batch, STEPS, tokens)[1], whole)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_kernels_and_caches_go_on_from_a_cut(model_type: str, kernel: str, cache: str) -> None:
    model, batches = hybrid(model_type)
    before = model.config._attn_implementation
    model.set_attn_implementation(kernel)
    try:
        assert_loop(model, batches["several"], CUTS["three places"], cache_implementation=cache)
    finally:
        model.set_attn_implementation(before)
