"""Cuts of the cache while decoding: each equals masking what it drops from the next token on."""

from __future__ import annotations

import functools

import oracle
import pytest
import tiny
import torch
import zoo
from conftest import shared_model
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import vtprune
from vtprune.engine.decoding import choose
from vtprune.engine.kv_cache import fork_cache, pruned_cache
from vtprune.engine.trace import StageRecord, Trace
from vtprune.errors import ModelError, PresetError
from vtprune.evaluation.checking.oracle import dropped_later
from vtprune.models.seams import cache_argument, cache_made
from vtprune.preset import DecodeSpec, override
from vtprune.tokens.schedule import fixed_count

Batch = dict[str, torch.Tensor]
DECODE = {"every": 3, "keep": 0.5}
STEPS = 9
PRESETS: dict[str, dict[str, object]] = {
    "alone": {"decode": DECODE},
    "after two cuts": {
        "stages": [
            {"at": "input", "method": "random", "keep": 0.9},
            {"at": 2, "method": "random", "keep": 0.6},
        ],
        "decode": DECODE,
    },
}


def check(
    model: PreTrainedModel, inputs: Batch, preset: object, cuts: int = 2, **options: object
) -> Trace:
    """Cut while decoding equals masked over all steps, and not the model on all tokens."""
    with vtprune.pruning(model, preset) as trace:
        tokens, logits = oracle.generate(model, inputs, STEPS, **options)
    later = dropped_later(trace)
    assert [steps for steps, _ in later] == [3 * (n + 1) for n in range(cuts)]
    drops = oracle.dropped(trace, inputs)
    expected = oracle.masked(model, inputs, drops, tokens, later=later)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    uncut = oracle.masked(model, inputs, drops, tokens)
    torch.testing.assert_close(logits[:, :4], uncut[:, :4], atol=1e-5, rtol=0)
    assert float((logits[:, 4:] - uncut[:, 4:]).abs().max()) > 1e-4
    return trace


class QuantizedLikeLayer(DynamicLayer):
    """Stands for the layers of a quantised cache, whose libraries are not installed."""


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["qwen2_vl", "llava", "qwen3_vl", "llava_onevision"])
def test_a_cut_while_decoding_equals_masked(
    name: str, preset: str, attention: str, cache: str, request: pytest.FixtureRequest
) -> None:
    usual = name == "qwen2_vl" and (preset != "alone" or (attention, cache) == ("sdpa", "dynamic"))
    if not usual and not request.config.getoption("--zoo"):
        pytest.skip("other families run with --zoo")
    model = shared_model(name, attention)
    trace = check(model, tiny.ragged(name, model), PRESETS[preset], cache_implementation=cache)
    for sample, layout in enumerate(trace.layouts):
        first = [row[sample] for row in (trace.visual_by_layer, trace.decoding[0].visual)]
        assert first[1] == [max(1, before // 2) for before in first[0]]
        assert max(first[0]) <= len(layout)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava_next_mistral", "gemma3", "aya_vision"])
@pytest.mark.parametrize("preset", PRESETS)
def test_layers_with_a_window_leave_their_share_of_what_is_in_it(
    name: str, preset: str, attention: str, request: pytest.FixtureRequest
) -> None:
    usual = (name, preset, attention) == ("gemma3", "after two cuts", "sdpa")
    if not usual and not request.config.getoption("--zoo"):
        pytest.skip("other families run with --zoo")
    model = tiny.model(name, attention)
    model.get_decoder().config.sliding_window = 24
    for cache in ("dynamic", "static") if attention == "sdpa" else ("dynamic",):
        check(model, tiny.ragged(name, model), PRESETS[preset], cache_implementation=cache)


@pytest.mark.parametrize("name", ["gemma4-e2b", "gemma3n-e2b"])
def test_layers_that_share_keys_see_what_is_left_of_them(name: str) -> None:
    if zoo.is_broken(name):
        pytest.skip("this transformers has no such class")
    model, batches = zoo.ready(name)
    for preset in PRESETS.values():
        check(model, zoo.left_pad(batches), preset)


def test_what_was_dropped_behind_the_layer_that_made_the_keys_does_not_come_back() -> None:
    """Gemma 4's last two layers take over keys, also of tokens that a cut took from them."""
    model = shared_model("gemma4")
    preset = {"stages": [{"at": 4, "method": "random", "keep": 0.5}], "decode": DECODE}
    trace = check(model, tiny.ragged("gemma4", model), preset)
    for sample, kept in enumerate(trace.stages[0].kept):
        dropped = {*trace.layouts[sample].columns.tolist()} - {*kept}
        left = [{*trace.decoding[0].left(sample, layer)} for layer in (3, 4, 5)]
        assert left[0] & dropped
        assert not (left[1] | left[2]) & dropped


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_hybrid_cuts_the_layers_that_have_keys(cache: str) -> None:
    model, batches = zoo.ready("qwen3_5", 8)
    batch = zoo.left_pad(batches[:1])
    check(model, batch, PRESETS["alone"], cache_implementation=cache)


def test_a_cut_while_decoding_leaves_no_more_padding_than_the_longest_row_asks_for() -> None:
    model = shared_model("llava_next")
    with vtprune.pruning(model, PRESETS["alone"]) as trace:
        oracle.generate(model, tiny.ragged("llava_next", model), 5)
    (cut,) = trace.decoding
    for columns in cut.columns:
        tokens = (columns >= 0).sum(1)
        assert columns.shape[1] == int(tokens.max())
        assert len({*tokens.tolist()}) == 2


def test_keep_1_changes_no_bit() -> None:
    model = shared_model("qwen2_vl")
    inputs = tiny.ragged("qwen2_vl", model)
    tokens, whole = oracle.generate(model, inputs, STEPS)
    stages = PRESETS["after two cuts"]["stages"]
    for preset, keep in (({"decode": {"every": 1, "keep": 1}}, None), (PRESETS["alone"], 1)):
        with vtprune.pruning(model, preset, keep) as trace:
            assert torch.equal(oracle.generate(model, inputs, STEPS, tokens)[1], whole)
        assert trace.decoding == []
    with vtprune.pruning(model, {"stages": stages}):
        pruned = oracle.generate(model, inputs, STEPS, tokens)[1]
    with vtprune.pruning(model, {"stages": stages, "decode": {"every": 1, "keep": 1}}):
        assert torch.equal(oracle.generate(model, inputs, STEPS, tokens)[1], pruned)


def test_what_was_attended_to_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model("qwen2_vl", "eager")
    inputs = tiny.inputs("qwen2_vl", model, "image")
    with vtprune.pruning(model, PRESETS["alone"]) as trace:
        tokens, _ = oracle.generate(model, inputs, 5)
    ids = torch.cat([inputs["input_ids"], tokens[:, :3]], dim=1)
    longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        longer["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, 3)], dim=1)
    with torch.no_grad():
        attention = model(**longer, output_attentions=True).attentions[-1]
    columns = trace.layouts[0].columns
    received = attention[0, :, -3:].mean(0).sum(0)[columns]
    count = len(columns) // 2
    expected = columns[received.topk(count).indices].sort().values.tolist()
    left = trace.decoding[0].left(0, 0)
    assert [column for column in left if column in columns.tolist()] == expected


def test_what_was_attended_to_in_a_window_stays() -> None:
    model = tiny.model("gemma3", "eager")
    inputs = tiny.inputs("gemma3", model, "several")
    config = model.get_decoder().config
    layer = max(n for n, kind in enumerate(config.layer_types) if kind == "sliding_attention")
    (visual,) = (inputs["input_ids"][0] == model.config.image_token_id).nonzero(as_tuple=True)
    held = visual[2:]
    total = inputs["input_ids"].shape[1] + 3
    config.sliding_window = total - int(held[0]) + 1  # which holds one key fewer
    with vtprune.pruning(model, PRESETS["alone"]) as trace:
        tokens, _ = oracle.generate(model, inputs, 5)
    ids = torch.cat([inputs["input_ids"], tokens[:, :3]], dim=1)
    types = torch.cat([inputs["token_type_ids"], torch.zeros_like(tokens[:, :3])], dim=1)
    longer = {**inputs, "input_ids": ids, "attention_mask": ids >= 0, "token_type_ids": types}
    with torch.no_grad():
        attention = model(**longer, output_attentions=True).attentions[layer]
    received = attention[0, :, -3:].mean(0).sum(0)[held]
    expected = held[received.topk(len(held) // 2).indices].sort().values.tolist()
    left = trace.decoding[0].left(0, layer)
    assert [column for column in left if column in held.tolist()] == expected


def test_a_share_may_be_chosen_evenly_for_later_questions() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4]])
    candidates = torch.ones(1, 8, dtype=torch.bool)
    kept = [choose(scores, candidates, 0.5, share)[0].nonzero().flatten().tolist()
            for share in (0, 0.4, 0.5, 1)]  # fmt: skip
    assert kept == [[0, 1, 2, 3], [0, 1, 2, 7], [0, 1, 3, 7], [1, 3, 5, 7]]
    candidates[0, 4:] = False
    assert int(choose(scores, candidates, 0.1).sum()) == 1


@pytest.mark.parametrize(("keep", "total"), [(0.53, 100), (0.21, 300), (0.13, 900)])
def test_a_share_of_the_cache_is_rounded_as_any_keep(keep: float, total: int) -> None:
    candidates = torch.ones(1, total, dtype=torch.bool)
    kept = choose(torch.rand(1, total), candidates, keep)
    assert int(kept.sum()) == fixed_count(keep, total) == round(keep * total)


def test_beams_and_quantised_caches_are_refused_with_the_reason() -> None:
    model = shared_model("qwen2_vl")
    inputs = tiny.inputs("qwen2_vl", model, "image")
    with vtprune.pruning(model, PRESETS["alone"]):
        with pytest.raises(ModelError, match=r"takes rows or tokens of it elsewhere \(reorder"):
            oracle.generate(model, inputs, STEPS, num_beams=2)
        cache = DynamicCache(config=model.config.get_text_config())
        for layer in cache.layers:
            layer.__class__ = QuantizedLikeLayer
        with pytest.raises(ModelError, match="quantised keys would be quantised anew"):
            model(**inputs, **cache_argument(model, cache), use_cache=True)


def test_a_fork_of_a_cache_goes_on_by_itself() -> None:
    model = shared_model("qwen2_vl")
    inputs = tiny.inputs("qwen2_vl", model, "image")
    token = inputs["input_ids"][:, -1:]
    with torch.no_grad(), vtprune.pruning(model, {"decode": {"every": 2, "keep": 0.5}}) as trace:
        cache = cache_made(model(**inputs, use_cache=True))
        model(input_ids=token, **cache_argument(model, cache))
        fork = fork_cache(cache)
        step = functools.partial(model, input_ids=token)
        logits = [
            [step(**cache_argument(model, one)).logits for _ in range(3)] for one in (fork, cache)
        ]
    assert len(trace.decoding) == 1  # the fork's is in no trace
    for one, other in zip(*logits, strict=True):
        assert torch.equal(one, other)


def test_a_further_question_of_two_tokens_counts_the_steps_anew() -> None:
    model = shared_model("qwen2_vl")
    inputs = tiny.inputs("qwen2_vl", model, "image")
    token = inputs["input_ids"][:, -1:]
    with torch.no_grad(), vtprune.pruning(model, {"decode": {"every": 2, "keep": 0.5}}) as trace:
        cache = cache_made(model(**inputs, use_cache=True))
        for length in (1, 2, 1, 1):
            model(input_ids=token.expand(-1, length), **cache_argument(model, cache))
        assert trace.decoding == []
        model(input_ids=token, **cache_argument(model, cache))
    assert [cut.steps for cut in trace.decoding] == [2]


def test_question_aware_stages_leave_a_share_to_a_question_blind_method() -> None:
    model = shared_model("qwen2_vl")
    inputs = tiny.ragged("qwen2_vl", model)

    def kept(method: str, keep: float, for_turns: float | None = None) -> list[set[int]]:
        preset = {"stages": [{"at": 2, "method": method, "keep": keep}]}
        with vtprune.pruning(model, preset, keep_for_turns=for_turns) as trace:
            tokens, logits = oracle.generate(model, inputs, 3)
        oracle.assert_masked(model, inputs, trace, tokens, logits)
        return list(map(set, trace.stages[0].kept))

    aware, mixed = kept("fastv", 0.5), kept("fastv", 0.5, 0.5)
    blind, alone = kept("spread", 0.25), kept("fastv", 0.5, 1)
    assert alone == kept("spread", 0.5) == kept("spread", 0.5, 0.5)
    for rows in zip(aware, mixed, blind, strict=True):
        assert len(rows[0]) == len(rows[1])
        assert rows[2] <= rows[1] != rows[0]


@torch.no_grad()
def test_a_share_for_later_questions_is_rounded_down_as_any_keep() -> None:
    """Half of 7 tokens are 3; the method's own best 4 of the others are kept."""
    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")

    def record(method: str, count: int, for_turns: float | None = None) -> StageRecord:
        stage = {"at": 2, "method": method, "keep": (count + 0.5) / 16}
        with vtprune.pruning(model, {"stages": [stage]}, keep_for_turns=for_turns) as trace:
            model(**inputs)
        assert trace.stages[0].before == [16]
        return trace.stages[0]

    (blind,), (aware,) = record("spread", 3).kept, record("fastv", 7).scores
    assert aware is not None
    scores = aware.by_column()
    others = sorted(scores.keys() - {*blind}, key=lambda column: -scores[column])
    assert record("fastv", 7, 0.5).kept == [sorted([*blind, *others[:4]])]


@torch.no_grad()
def test_a_second_picture_counts_from_where_its_conversation_began() -> None:
    model = shared_model("llava")
    turns = [tiny.inputs("llava", model, "image", seed=seed) for seed in (0, 1)]
    ids = torch.cat([turn["input_ids"] for turn in turns], dim=1)
    with vtprune.pruning(model, PRESETS["alone"]):
        cache = model(**turns[0], use_cache=True).past_key_values
        given = {**turns[1], "attention_mask": torch.ones_like(ids)}
        model(**given, **{oracle.CACHE: cache}, use_cache=True)
    pruned = pruned_cache(cache)
    assert pruned is not None
    assert pruned.decoding is not None
    visual = (ids[0] == model.config.image_token_id).nonzero().squeeze(1)
    assert torch.equal(pruned.decoding.visual[0], visual)


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ({"decode": {"every": 0, "keep": 0.5}}, "a whole number from 1 on"),
        ({"decode": {"every": 4}}, "keep"),
        ({"decode": {"every": 4, "keep": 2}}, r"a number in \(0, 1\]"),
        ({"keep": 0.3, "decode": DECODE}, "a keep or a number of tokens sets nothing"),
        ({"decode": DECODE, "keep_for_turns": 0}, r"a number in \(0, 1\]"),
    ],
)
def test_faults_of_a_preset_that_cuts_while_decoding(preset: object, message: str) -> None:
    with pytest.raises(PresetError, match=message):
        vtprune.load_preset(preset)


def test_flags_change_or_make_the_cuts_while_decoding() -> None:
    balanced = override(vtprune.load_preset("balanced"), decode_every=8, decode_keep=0.5)
    assert balanced.decode == DecodeSpec(8, 0.5)
    assert override(balanced, decode_keep=0.25).decode == DecodeSpec(8, 0.25)
    data = {key: value for key, value in balanced.to_dict().items() if key != "name"}
    assert vtprune.load_preset(data).decode == balanced.decode
    with pytest.raises(PresetError, match="decode_every needs decode_keep"):
        override(vtprune.load_preset("balanced"), decode_every=8)
    with pytest.raises(PresetError, match=r"decode_keep 1\.5 is not a fraction"):
        override(balanced, decode_keep=1.5)
