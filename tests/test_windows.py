"""Layers with a sliding window see by original columns: past it too, pruned equals masked."""

from __future__ import annotations

from collections.abc import Mapping

import oracle
import pytest
import tiny
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

import vtprune
from vtprune.engine.attention_mask import mask_by_columns
from vtprune.errors import ModelError
from vtprune.models.structure import find_structure

WIDTH = 16
STAGES = {
    "input": [{"at": "input", "method": "random", "keep": 0.5}],
    "layer": [{"at": 2, "method": "random", "keep": 0.4}],
    "all": [
        {"at": "input", "method": "random", "keep": 0.8},
        {"at": 1, "method": "uniform", "keep": 0.5},
        {"at": 4, "method": "random", "keep": 0.2},
    ],
}
WINDOWED = ("llava_next_mistral", "gemma3", "aya_vision")
"""All layers have a window; some, and pictures are seen both ways; some, the others have NoPE."""


def windowed(name: str, width: int = WIDTH, attention: str = "sdpa") -> PreTrainedModel:
    """A tiny model whose windowed layers see the last `width` tokens only."""
    model = tiny.model(name, attention)
    model.get_decoder().config.sliding_window = width
    return model


def check(model: PreTrainedModel, inputs: dict[str, torch.Tensor], stages: object) -> None:
    """Pruned equals masked over 8 steps, and neither equals the model on all tokens."""
    with vtprune.pruning(model, {"stages": stages}) as trace:
        tokens, logits = oracle.generate(model, inputs)
    oracle.assert_masked(model, inputs, trace, tokens, logits)
    whole = oracle.generate(model, inputs, 8, tokens)[1]
    assert float((logits - whole).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("stages", "attention"),
    [*((stages, "sdpa") for stages in STAGES), ("all", "eager")],
)
@pytest.mark.parametrize("name", WINDOWED)
def test_a_prompt_past_the_window_equals_masked(name: str, stages: str, attention: str) -> None:
    model = windowed(name, attention=attention)
    kind = "several" if "several" in tiny.KINDS[name] else "image"
    check(model, tiny.ragged(name, model), STAGES[stages])
    if stages == "all":
        check(model, tiny.inputs(name, model, kind), STAGES[stages])


@pytest.mark.parametrize("stages", STAGES)
def test_an_answer_that_leaves_the_pictures_behind_equals_masked(stages: str) -> None:
    name = "llava_next_mistral"
    model = windowed(name)
    inputs = tiny.ragged(name, model)
    model.get_decoder().config.sliding_window = inputs["input_ids"].shape[1] + 3
    with vtprune.pruning(model, {"stages": STAGES[stages]}) as trace:
        tokens, logits = oracle.generate(model, inputs, 12)
    oracle.assert_masked(model, inputs, trace, tokens, logits)
    assert not trace.warnings


@pytest.mark.parametrize("where", ["config", "static", "plain"])
@pytest.mark.parametrize("name", ["llava_next_mistral", "gemma3"])
def test_every_kind_of_cache_holds_what_a_window_sees(name: str, where: str) -> None:
    model = windowed(name)
    config = model.get_decoder().config
    batch = tiny.ragged(name, model)
    cache = {
        "config": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=400),
        "plain": DynamicCache,
    }[where]()
    with vtprune.pruning(model, {"stages": STAGES["all"]}) as trace:
        tokens, logits = oracle.generate(model, batch, 8, past_key_values=cache)
    oracle.assert_masked(model, batch, trace, tokens, logits)


def turns(
    model: PreTrainedModel,
    first: Mapping[str, torch.Tensor],
    second: Mapping[str, torch.Tensor],
    third: torch.Tensor,
) -> list[torch.Tensor]:
    """Logits of two prompts, one on top of the other, and of tokens one by one after them."""
    cache, logits = DynamicCache(config=model.get_decoder().config), []
    mask = first["attention_mask"][:, :0]
    steps = [{"input_ids": part} for part in third.split(1, dim=1)]
    for given in (first, second, *steps):
        new = given.get("attention_mask", torch.ones_like(given["input_ids"]))
        mask = torch.cat([mask, new], dim=1)
        more = {**given, "attention_mask": mask, oracle.CACHE: cache}
        with torch.no_grad():
            logits.append(model(**more, use_cache=True).logits[:, -1])
    return logits


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize("stages", ["input", "layer", "all"])
def test_a_further_turn_past_the_window_equals_masked(stages: str, kind: str) -> None:
    name = "llava_next_mistral"
    model = windowed(name)
    first, second = tiny.ragged(name, model), tiny.ragged(name, model, kind)
    third = torch.randint(32, 127, (2, 4), generator=torch.Generator().manual_seed(5))
    with vtprune.pruning(model, {"stages": STAGES[stages]}) as trace:
        pruned = turns(model, first, second, third)
    drops = []
    with vtprune.pruning(model, {"stages": STAGES[stages]}) as trace:
        for turn in (first, second):
            with torch.no_grad():
                model(**turn)
            past = 0 if turn is first else first["input_ids"].shape[1]
            if turn is first or kind == "image":
                drops.append(oracle.dropped(trace, turn))
    joined = {
        layer: [
            [*columns, *(column + first["input_ids"].shape[1] for column in later)]
            for columns, later in zip(rows, more, strict=True)
        ]
        for (layer, rows), (_, more) in zip(drops[0], drops[-1], strict=True)
    } if kind == "image" else dict(drops[0])  # fmt: skip
    assert past
    with oracle.masking(model, list(joined.items())):
        expected = turns(model, first, second, third)
    for one, other in zip(pruned, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_keep_one_is_bit_identical(cache: str) -> None:
    model = windowed("llava_next_mistral")
    inputs = tiny.inputs("llava_next_mistral", model, "image")
    options = {"cache_implementation": "static"} if cache == "static" else {}
    expected = oracle.generate(model, inputs, steps=3, **options)[1]
    with vtprune.pruning(model, keep=1.0):
        assert torch.equal(oracle.generate(model, inputs, steps=3, **options)[1], expected)


# -- flash attention, whose own window counts kept tokens ------------------------------------------


def test_a_prompt_past_the_window_is_refused_for_flash_attention() -> None:
    model = windowed("llava_next_mistral")
    inputs = tiny.inputs("llava_next_mistral", model, "image")
    model.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    with (
        pytest.raises(ModelError, match="which flash_attention_2 counts in kept tokens"),
        vtprune.pruning(model, {"stages": STAGES["layer"]}),
    ):
        model(**inputs)


def test_flash_attention_is_told_for_one_token_which_keys_it_sees() -> None:
    model = windowed("llava_next_mistral")
    model.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    structure = find_structure(model)
    keys, query = torch.tensor([[0, 1, -1, 7, 9]]), torch.tensor([[9]])
    hidden = torch.zeros(1, 1, 8)
    mask = mask_by_columns(structure, query, keys, 5, 8, hidden)
    assert mask.tolist() == [[False, False, False, True, True]]
    with pytest.raises(ModelError, match="takes no mask a query"):
        mask_by_columns(structure, torch.tensor([[8, 9]]), keys, 5, 8, hidden)
