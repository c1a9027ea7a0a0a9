"""Pruned equals masked, whatever the model, the stage, the batch, the cache and the decoding."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial
from itertools import combinations, product

import oracle
import pytest
import tiny
import torch
import transformers
from conftest import shared_model
from packaging.version import Version
from transformers import StaticCache

import vtprune
from vtprune.engine.inputs import FeatureCache, PreparedInputs
from vtprune.engine.pixel_selection import TOWERS
from vtprune.errors import ModelError, PresetError
from vtprune.models.structure import find_structure

CASES = [(name, kind) for name in tiny.MODELS for kind in tiny.KINDS[name]]
SCHEDULES = {
    "input": [{"at": "input", "method": "random", "keep": 0.3}],
    "one_layer": [{"at": 2, "method": "entropy", "keep": 0.3}],
    "two_layers": [
        {"at": 1, "method": "entropy", "keep": 0.5},
        {"at": 4, "method": "random", "keep": 0.1},
    ],
    "input_and_layer": [
        {"at": "input", "method": "entropy", "keep": 0.6, "per": "frame"},
        {"at": 3, "method": "uniform", "keep": 0.2, "per": "tile"},
    ],
}
KERNELS, BATCHES, CACHES = ("sdpa", "eager"), ("one", "ragged"), ("dynamic", "static")
WAYS = list(product(SCHEDULES, KERNELS, BATCHES, CACHES))
LAYER_TWO = {"stages": SCHEDULES["one_layer"]}
BOTH = {"stages": SCHEDULES["input_and_layer"]}


def chosen_ways(number: int) -> list[tuple[str, str, str, str]]:
    """Return 8 of the 32 ways, in which every two of the four choices meet in all combinations.

    Of four cases that follow each other, each has other ways.
    """
    return [
        (
            schedule,
            attention,
            BATCHES[(first + second + number) % 2],
            CACHES[(first // 2 + second + number // 2) % 2],
        )
        for first, schedule in enumerate(SCHEDULES)
        for second, attention in enumerate(KERNELS)
    ]


def test_two_choices_meet_in_every_case_and_all_four_in_any_four_cases() -> None:
    for number in range(4):
        ways = chosen_ways(number)
        for one, other in combinations(range(4), 2):
            assert len({(way[one], way[other]) for way in ways}) == len(
                {(way[one], way[other]) for way in WAYS}
            )
        assert {way for four in range(4) for way in chosen_ways(number + four)} == set(WAYS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every case all ways where the table of docs/correctness.md is written, else some."""
    if metafunc.function is not test_pruned_equals_masked_at_prefill_and_decode:
        return
    every = metafunc.config.getoption("--correctness-table")
    metafunc.parametrize(
        ("name", "kind", "schedule", "attention", "batch", "cache"),
        [
            (*case, *way)
            for number, case in enumerate(CASES)
            for way in (WAYS if every else chosen_ways(number))
        ],
    )


def test_pruned_equals_masked_at_prefill_and_decode(
    name: str, kind: str, schedule: str, attention: str, batch: str, cache: str
) -> None:
    model = shared_model(name, attention)
    inputs = tiny.inputs(name, model, kind) if batch == "one" else tiny.ragged(name, model, kind)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    with vtprune.pruning(model, {"stages": SCHEDULES[schedule]}) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=8, **options)
    oracle.assert_masked(model, inputs, trace, tokens, logits)
    unpruned = oracle.generate(model, inputs, steps=1)[1]
    assert (logits[:, :1] - unpruned).abs().max() > 0.01, "the check would not notice a cut"


@pytest.mark.parametrize("layer", ["input", 1, 2, 3])
def test_features_that_enter_several_layers_follow_the_cut(layer: str | int) -> None:
    """Qwen3-VL adds features after layers 0, 1 and 2: the cut is before, among and past them."""
    model = shared_model("qwen3_vl")
    inputs = tiny.ragged("qwen3_vl", model, "mixed")
    with vtprune.pruning(
        model, {"stages": [{"at": layer, "method": "random", "keep": 0.3}]}
    ) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=3)
    oracle.assert_masked(model, inputs, trace, tokens, logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_keep_one_is_bit_identical_to_no_pruning(name: str, kind: str, attention: str) -> None:
    model = shared_model(name, attention)
    inputs = tiny.inputs(name, model, kind)
    expected = oracle.generate(model, inputs, steps=3)[1]
    with vtprune.pruning(model, "balanced", keep=1.0) as trace:
        logits = oracle.generate(model, inputs, steps=3)[1]
    assert torch.equal(logits, expected)
    assert trace.stages == []
    with vtprune.pruning(model, {"stages": [{"at": 2, "method": "random", "keep": 1.0}]}) as trace:
        logits = oracle.generate(model, inputs, steps=3)[1]
    assert torch.equal(logits, expected)
    assert trace.stages[0].before == trace.stages[0].after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_half_precision_runs_and_keep_one_is_bit_identical(name: str, dtype: torch.dtype) -> None:
    model = tiny.model(name, dtype=dtype)
    inputs = tiny.inputs(name, model, "image")
    expected = oracle.generate(model, inputs, steps=2)[1]
    with vtprune.pruning(model, keep=1.0):
        assert torch.equal(oracle.generate(model, inputs, steps=2)[1], expected)
    with vtprune.pruning(model, BOTH) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=4)
    masked = oracle.masked(model, inputs, oracle.dropped(trace, inputs), tokens)
    spread = expected.float().std()
    assert (logits.float() - masked.float()).abs().mean() < 0.05 * spread


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_model_is_as_before_after_the_block_and_after_an_exception(name: str) -> None:
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "image")
    expected = oracle.generate(model, inputs, steps=3)[1]  # a first run leaves marks of its own
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    marks = {module: dict(module.__dict__) for module in model.modules()}
    hooks = {m: (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()}
    handle = model.get_decoder().layers[4].register_forward_pre_hook(_stop)
    with pytest.raises(RuntimeError, match="stop here"), vtprune.pruning(model, BOTH):
        oracle.generate(model, inputs, steps=3)
    handle.remove()
    for module in model.modules():
        assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == hooks[module]
        assert module.__dict__.keys() == marks[module].keys()
    assert torch.equal(oracle.generate(model, inputs, steps=3)[1], expected)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def _stop(module: object, args: object) -> None:
    raise RuntimeError("stop here")


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_cache_is_really_shorter_from_the_cut_on(name: str) -> None:
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "image")
    prompt = inputs["input_ids"].shape[1]
    with torch.no_grad(), vtprune.pruning(model, BOTH) as trace:
        cache = model(**inputs, use_cache=True)[oracle.CACHE]
    lengths = [layer.get_seq_length() for layer in cache.layers]
    visual = len(trace.layouts[0])
    text = prompt - visual
    first, second = (max(1, int(keep * visual + 1e-6)) for keep in (0.6, 0.2))
    assert lengths == [text + first] * 3 + [text + second] * 3
    assert trace.visual_by_layer == [[first] * 3 + [second] * 3]
    assert cache.get_seq_length() == prompt


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_trace_names_the_columns_that_are_left(name: str, kind: str) -> None:
    model = shared_model(name)
    inputs = tiny.ragged(name, model, kind)
    ids = inputs["input_ids"]
    visual = torch.isin(ids, torch.tensor(sorted(find_structure(model).placeholder_ids())))
    with torch.no_grad(), vtprune.pruning(model, BOTH, seed=3) as trace:
        model(**inputs)
    assert [stage.layer for stage in trace.stages] == [0, 3]
    assert [stage.method for stage in trace.stages] == ["entropy", "uniform"]
    for row in range(2):
        columns = visual[row].nonzero().squeeze(1).tolist()
        assert trace.layouts[row].columns.tolist() == columns
        assert trace.stages[0].before[row] == len(columns)
        assert trace.stages[1].before[row] == trace.stages[0].after[row]
        before = set(columns)
        for stage in trace.stages:
            kept = stage.kept[row]
            assert kept == sorted(kept)
            assert set(kept) <= before
            assert len(kept) == stage.after[row]
            before = set(kept)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_random_is_the_same_alone_in_a_batch_and_in_beams(name: str) -> None:
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "image")
    pruned = {"stages": [{"at": 2, "method": "random", "keep": 0.3}]}
    kept = []
    for given, options in (
        (inputs, {}),
        (inputs, {"num_beams": 3}),
        (inputs, {"do_sample": True, "num_return_sequences": 2}),
        (tiny.ragged(name, model, "image"), {}),
    ):
        with torch.no_grad(), vtprune.pruning(model, pruned, seed=7) as trace:
            model.generate(**given, max_new_tokens=2, **options)
        shift = given["input_ids"].shape[1] - inputs["input_ids"].shape[1]
        rows = trace.stages[0].kept
        if given is not inputs:
            rows = rows[:1]
        kept += [[column - shift for column in row] for row in rows]
    assert len(kept) == 7
    assert all(row == kept[0] for row in kept)
    with torch.no_grad(), vtprune.pruning(model, pruned, seed=8) as trace:
        model(**inputs)
    assert trace.stages[0].kept[0] != kept[0]


def test_every_random_stage_draws_by_a_seed_of_its_own() -> None:
    model = shared_model("llava")
    stages = [{"at": at, "method": "random", "keep": keep} for at, keep in ((1, 0.6), (3, 0.3))]
    with torch.no_grad(), vtprune.pruning(model, {"stages": stages}, seed=5) as trace:
        model(**tiny.inputs("llava", model, "image"))
    left = trace.layouts[0].columns
    for number, record in enumerate(trace.stages):
        draw = torch.randperm(len(left), generator=torch.Generator().manual_seed(5 * 1009 + number))
        left = left[draw.topk(record.after[0]).indices.sort().values]
        assert record.kept == [left.tolist()]


def test_a_stage_that_leaves_all_that_is_there_chooses_nothing() -> None:
    model = shared_model("llava")
    stages = [
        {"at": 1, "method": "random", "keep": 0.3},
        {"at": 3, "method": "fastv", "keep": 0.3},
    ]
    with torch.no_grad(), vtprune.pruning(model, {"stages": stages}) as trace:
        model(**tiny.inputs("llava", model, "image"))
    first, second = trace.stages
    assert second.before == second.after == first.after
    assert second.kept == first.kept
    assert second.scores == [None]


@pytest.mark.parametrize("schedule", ["one_layer", "input_and_layer"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_beams_score_what_forced_decoding_of_their_answer_scores(name: str, schedule: str) -> None:
    if name in ("internvl", "aya_vision") and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("upstream repeats the tiles of a picture one by one for beams, unpruned too")
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "image")
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), vtprune.pruning(model, {"stages": SCHEDULES[schedule]}) as trace:
        out = model.generate(
            **inputs, max_new_tokens=6, num_beams=3, do_sample=False, length_penalty=0.0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    tokens = out.sequences[:, length:]
    one = [(layer, [columns[0]]) for layer, columns in oracle.dropped(trace, inputs)]
    logits = oracle.masked(model, inputs, one, tokens)
    expected = logits.log_softmax(-1).gather(2, tokens[:, :, None]).sum()
    torch.testing.assert_close(out.sequences_scores[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_without_a_cache_the_logits_are_the_same(name: str) -> None:
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "image")
    with vtprune.pruning(model, BOTH):
        tokens, cached = oracle.generate(model, inputs, steps=4)
        uncached = oracle.generate(model, inputs, steps=4, force=tokens, use_cache=False)[1]
    torch.testing.assert_close(uncached, cached, atol=1e-5, rtol=0)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_loop_of_plain_forwards_equals_generate(name: str, schedule: str, masked: bool) -> None:
    if masked and name.startswith(("qwen", "glm")):
        pytest.skip("upstream gives a masked plain forward positions of the whole prompt, unpruned")
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "image")
    preset = {"stages": SCHEDULES[schedule]}
    with vtprune.pruning(model, preset):
        tokens, expected = oracle.generate(model, inputs, steps=5)
    if not masked:
        inputs.pop("attention_mask")
    logits = []
    with torch.no_grad(), vtprune.pruning(model, preset):
        out = model(**inputs, use_cache=True)
        logits.append(out.logits[:, -1])
        for step in range(4):
            mask = {}
            if masked:
                length = inputs["input_ids"].shape[1] + step + 1
                mask = {"attention_mask": torch.ones(1, length, dtype=torch.long)}
            new = tokens[:, step : step + 1]
            out = model(input_ids=new, **{oracle.CACHE: out[oracle.CACHE]}, use_cache=True, **mask)
            logits.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(logits, 1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_forward_without_mask_and_cache_is_not_read_as_packed_sequences(name: str) -> None:
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "image")
    with torch.no_grad(), vtprune.pruning(model, BOTH):
        expected = model(**inputs, use_cache=True).logits[:, -1]
        inputs.pop("attention_mask")
        logits = model(**inputs, use_cache=False).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_second_question_goes_on_with_the_cache(name: str, schedule: str) -> None:
    """The whole conversation's ids are given again; the cached part is skipped."""
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "image")
    with torch.no_grad(), vtprune.pruning(model, {"stages": SCHEDULES[schedule]}) as trace:
        first = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
        gone = oracle.dropped(trace, inputs)
        more = torch.randint(32, 127, (1, 5), generator=torch.Generator().manual_seed(9))
        ids = torch.cat([first.sequences, more], dim=1)
        second = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{oracle.CACHE: first[oracle.CACHE]},
            max_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.stack(second.logits, dim=1)
    length = inputs["input_ids"].shape[1]
    forced = second.sequences[:, length:]
    expected = oracle.masked(model, inputs, gone, forced)[:, -5:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def two_turns(model, turns, first, second=None):  # type: ignore[no-untyped-def]
    """Logits behind a second prompt with a picture, and behind one more token.

    The prompt comes on a cache with two tokens decoded since the first.

    Args:
        first: the preset.
        second: that of the second prompt, in a block of its own; None: all in one block.
    """
    cache, mask = None, torch.zeros(len(turns[0]["input_ids"]), 0, dtype=torch.long)
    token = {"input_ids": torch.full((len(mask), 1), 65), "attention_mask": torch.ones_like}
    logits = []
    with ExitStack() as block, torch.no_grad():
        block.enter_context(vtprune.pruning(model, first))
        for step in (turns[0], token, token, turns[1], token):
            if step is turns[1] and second is not None:
                block.close()
                block.enter_context(vtprune.pruning(model, second))
            ids = step["input_ids"]
            own = step["attention_mask"]
            mask = torch.cat([mask, own(ids) if callable(own) else own], dim=1)
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            given = {**step, "attention_mask": mask, "position_ids": positions}
            out = model(**given, **{oracle.CACHE: cache}, use_cache=True)
            cache = out[oracle.CACHE]
            logits.append(out.logits[:, -1])
    return torch.stack(logits[-2:], dim=1)


def ragged_turns(name, model):  # type: ignore[no-untyped-def]
    """Two turns of a batch of two, row by row."""
    return [
        [tiny.inputs(name, model, "image", seed=seed),
         tiny.inputs(name, model, "image", seed=seed + 1, text=9, sizes=((200, 70),))]
        for seed in (0, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_new_picture_after_decoding_is_in_a_ragged_batch_as_alone(
    schedule: str, attention: str
) -> None:
    name = "llava_onevision"
    model = shared_model(name, attention)
    turns = ragged_turns(name, model)
    preset = {"stages": SCHEDULES[schedule]}
    together = two_turns(model, [tiny.left_pad(name, turn) for turn in turns], preset)
    alone = [two_turns(model, [turn[row] for turn in turns], preset) for row in (0, 1)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def cut_at(place: int | str | None) -> dict[str, object]:
    if place is None:
        return {"keep": 1, "stages": [{"at": "input", "method": "random"}]}
    return {"stages": [{"at": place, "method": "random", "keep": 0.3}]}


APART = [(2, 4), (4, 2), (2, "input"), ("input", 2), (2, None), ("input", None), (None, 2)]
"""Where a first and a second picture of a conversation are cut; None: nowhere."""


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("first", "second"), APART)
def test_a_new_picture_is_cut_wherever_the_one_before_was(
    first: int | str | None, second: int | str | None, attention: str
) -> None:
    name = "llava"
    model = shared_model(name, attention)
    turns = [tiny.inputs(name, model, "image", seed=seed) for seed in (0, 1)]
    ids = torch.cat([turn["input_ids"] for turn in turns], dim=1)
    with torch.no_grad(), vtprune.pruning(model, cut_at(first)) as trace:
        out = model(**turns[0], use_cache=True)
        drops = oracle.dropped(trace, turns[0])
    with torch.no_grad(), vtprune.pruning(model, cut_at(second)) as trace:
        given = {**turns[1], "attention_mask": torch.ones_like(ids)}
        out = model(**given, **{oracle.CACHE: out[oracle.CACHE]}, use_cache=True)
        behind = turns[0]["input_ids"].shape[1]
        drops += oracle.dropped(trace, turns[1], behind)
        token = torch.tensor([[65]])
        more = model(input_ids=token, **{oracle.CACHE: out[oracle.CACHE]}, use_cache=True)
    logits = torch.stack([out.logits[:, -1], more.logits[:, -1]], dim=1)
    whole = {
        "input_ids": ids,
        "pixel_values": torch.cat([turn["pixel_values"] for turn in turns]),
    }
    layers = sorted({layer for layer, _ in drops})
    joined = [(at, [[c for start, gone in drops if start <= at for c in gone[0]]]) for at in layers]
    expected = oracle.masked(model, whole, joined, token.expand(1, 2))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("first", "second"), APART)
def test_a_new_picture_that_is_cut_elsewhere_is_in_a_ragged_batch_as_alone(
    first: int | str | None, second: int | str | None, attention: str
) -> None:
    name = "llava_onevision"
    model = shared_model(name, attention)
    turns = ragged_turns(name, model)
    presets = cut_at(first), cut_at(second)
    together = two_turns(model, [tiny.left_pad(name, turn) for turn in turns], *presets)
    alone = [two_turns(model, [turn[row] for turn in turns], *presets) for row in (0, 1)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_prompt_lookup_gives_the_greedy_answer(name: str) -> None:
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "image", text=12)
    with torch.no_grad(), vtprune.pruning(model, LAYER_TWO):
        greedy = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        looked_up = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3
        )
    assert torch.equal(greedy, looked_up)


def test_decoding_runs_without_a_layer_hook() -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "image")
    layers = model.get_decoder().layers
    seen = []

    def count(module, args, kwargs):  # type: ignore[no-untyped-def]
        seen.append(sum(len(layer._forward_pre_hooks) for layer in layers))

    with torch.no_grad(), vtprune.pruning(model, BOTH):
        handle = model.get_decoder().norm.register_forward_pre_hook(count, with_kwargs=True)
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        handle.remove()
    assert seen[0] > 0
    assert seen[1:] == [0, 0, 0]


def test_text_alone_is_left_alone() -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "text")
    expected = oracle.generate(model, inputs, steps=3)[1]
    with vtprune.pruning(model, BOTH) as trace:
        assert torch.equal(oracle.generate(model, inputs, steps=3)[1], expected)
    assert trace.prefills == 0


def test_text_behind_a_prompt_whose_encoder_failed_is_left_alone() -> None:
    model = shared_model("llava")
    text = tiny.inputs("llava", model, "text")
    expected = oracle.generate(model, text, steps=2)[1]

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with vtprune.pruning(model, BOTH) as trace:
        hook = model.model.vision_tower.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"), torch.no_grad():
            model(**tiny.inputs("llava", model, "image"))
        hook.remove()
        assert torch.equal(oracle.generate(model, text, steps=2)[1], expected)
    assert trace.prefills == 0


def test_a_placeholder_without_pictures_is_refused_in_a_short_prompt_too() -> None:
    model = shared_model("llava")
    ids = torch.tensor([[65, model.config.image_token_id]])
    with vtprune.pruning(model, BOTH), pytest.raises(ModelError, match="no pictures for them"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_modalities_can_have_their_own_stages_and_keeps() -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "mixed")
    preset = {
        "image": {"stages": [{"at": 2, "method": "entropy", "keep": 0.5}]},
        "video": {"stages": [{"at": 4, "method": "random", "keep": 0.25}]},
    }
    with vtprune.pruning(model, preset) as trace:
        tokens, logits = oracle.generate(model, inputs)
    assert [(one.modality, one.layer) for one in trace.stages] == [("image", 2), ("video", 4)]
    oracle.assert_masked(model, inputs, trace, tokens, logits)
    with (
        torch.no_grad(),
        vtprune.pruning(model, "fast", keep={"image": 1.0, "video": 0.2}) as trace,
    ):
        model(**inputs)
    assert {one.modality for one in trace.stages} == {"video"}


@pytest.mark.parametrize("name", tiny.MODELS)
def test_dropping_every_visual_token_equals_masking_them_all(name: str) -> None:
    model = shared_model(name)
    inputs = tiny.ragged(name, model, "image")
    stages = [{"at": 1, "method": "entropy", "keep": 0.5}, {"at": 4, "method": "vtw", "keep": 0}]
    with vtprune.pruning(model, {"stages": stages}) as trace:
        tokens, logits = oracle.generate(model, inputs)
    assert trace.stages[1].after == [0, 0]
    oracle.assert_masked(model, inputs, trace, tokens, logits)
    with torch.no_grad(), vtprune.pruning(model, method="vtw", keep=0.5) as trace:
        model(**inputs)
    assert [stage.layer for stage in trace.stages] == [3]
    assert trace.keep_mean() == 0.5


def test_equal_quotas_are_kept_in_every_frame() -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "video")
    with (
        torch.no_grad(),
        vtprune.pruning(
            model, {"stages": [{"at": 2, "method": "entropy", "keep": 0.5, "per": "frame"}]}
        ) as trace,
    ):
        model(**inputs)
    frames = trace.kept[0].grid.frame.bincount().tolist()
    assert sum(frames) == len(trace.layouts[0]) // 2
    assert max(frames) - min(frames) <= 1


def test_pixels_are_encoded_once_where_the_caller_keeps_them() -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "image")
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    encoded: FeatureCache = {}
    logits = []
    for _ in range(2):
        with vtprune.pruning(model, LAYER_TWO, inputs=PreparedInputs(features=encoded)):
            logits.append(oracle.generate(model, inputs, steps=2)[1])
    handle.remove()
    assert len(calls) == 1
    assert torch.equal(*logits)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_pixels_are_encoded_once_for_generation_and_for_plain_forwards(
    name: str, kind: str
) -> None:
    model = shared_model(name)
    inputs = tiny.inputs(name, model, kind)
    calls: list[int] = []
    towers = [getattr(model.model, tower, None) for tower in TOWERS]
    handles = [one.register_forward_hook(lambda *_: calls.append(1)) for one in towers if one]
    encoded: FeatureCache = {}
    with vtprune.pruning(model, LAYER_TWO, inputs=PreparedInputs(features=encoded)):
        expected = oracle.generate(model, inputs, steps=1)[1]
    num = len(calls)
    with (
        torch.no_grad(),
        vtprune.pruning(model, LAYER_TWO, inputs=PreparedInputs(features=encoded)),
    ):
        logits = model(**inputs, logits_to_keep=1, use_cache=True).logits
    for handle in handles:
        handle.remove()
    assert len(calls) == num > 0
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_prompts_of_different_modalities_follow_each_other_in_one_block(name: str) -> None:
    model = shared_model(name)
    prompts = {kind: tiny.inputs(name, model, kind) for kind in ("image", "video", "mixed", "text")}
    alone = {}
    for kind, inputs in prompts.items():
        with vtprune.pruning(model, BOTH):
            alone[kind] = oracle.generate(model, inputs, steps=2)[1]
    with vtprune.pruning(model, BOTH):
        for first in prompts:
            for second in prompts:
                for kind in (first, second):
                    logits = oracle.generate(model, prompts[kind], steps=2)[1]
                    assert torch.equal(logits, alone[kind]), (first, second)


def forward_both(model, inputs, cache):  # type: ignore[no-untyped-def]
    """Logits of a prompt and of one token after it, by plain forwards on a cache."""
    mask = inputs["attention_mask"]
    new = torch.full((len(mask), 1), 65)
    with torch.no_grad():
        first = model(**inputs, **{oracle.CACHE: cache}, use_cache=True)
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        second = model(input_ids=new, attention_mask=mask, **{oracle.CACHE: cache}, use_cache=True)
    return torch.cat([first.logits[:, -1], second.logits[:, -1]])


@pytest.mark.parametrize("where", ["same block", "keep one", "outside"])
def test_a_cache_that_was_emptied_remembers_nothing_of_what_was_cut(where: str) -> None:
    name = "llava_onevision"
    model = shared_model(name)
    config = model.get_decoder().config
    pictures, text = tiny.ragged(name, model, "image"), tiny.ragged(name, model, "text")
    expected = forward_both(model, text, StaticCache(config=config, max_cache_len=400))
    cache = StaticCache(config=config, max_cache_len=400)
    with vtprune.pruning(model, BOTH):
        forward_both(model, pictures, cache)
        cache.reset()
        if where == "same block":
            logits = forward_both(model, text, cache)
    if where == "keep one":
        with vtprune.pruning(model, keep=1.0):
            logits = forward_both(model, text, cache)
    if where == "outside":
        logits = forward_both(model, text, cache)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


# -- what is refused -----------------------------------------------------------------------------


def test_a_chunked_prefill_is_refused() -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "video")
    with pytest.raises(ModelError, match="visual tokens"), torch.no_grad():  # noqa: SIM117
        with vtprune.pruning(model, LAYER_TWO):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)


def test_labels_are_refused() -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "image")
    with pytest.raises(ModelError, match="labels"), vtprune.pruning(model, LAYER_TWO):
        model(**inputs, labels=inputs["input_ids"])


def test_columns_to_keep_logits_of_are_refused() -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "image")
    with pytest.raises(ModelError, match="logits_to_keep"), vtprune.pruning(model, LAYER_TWO):
        model(**inputs, logits_to_keep=torch.tensor([3]))


def test_embeddings_without_ids_are_refused() -> None:
    model = shared_model("llava_onevision")
    embeds = torch.randn(1, 12, tiny.WIDTH)
    with pytest.raises(ModelError, match="inputs_embeds"), vtprune.pruning(model, LAYER_TWO):
        model(inputs_embeds=embeds)


def test_a_block_inside_a_block_is_refused_and_the_outer_one_goes_on() -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "image")
    with torch.no_grad(), vtprune.pruning(model, LAYER_TWO) as trace:
        with pytest.raises(ModelError, match="enclosing block"), vtprune.pruning(model, BOTH):
            pass
        model(**inputs)
    assert trace.stages[0].after[0] < trace.stages[0].before[0]


def test_a_decoder_whose_layers_keep_no_keys_is_refused() -> None:
    model = copy.copy(tiny.model("llava_onevision"))
    model.get_decoder().config.layer_types = ["linear_attention"] * tiny.LAYERS
    with (
        pytest.raises(ModelError, match="none of its layers attends"),
        vtprune.pruning(model, LAYER_TWO),
    ):
        pass


def test_a_model_without_pictures_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=50,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with pytest.raises(ModelError, match=r"pixel values|llama"), vtprune.pruning(model, LAYER_TWO):
        pass


@pytest.mark.parametrize(
    ("preset", "keep", "match"),
    [
        ({"stages": [{"at": 9, "method": "random", "keep": 0.3}]}, None, "6 decoder layers"),
        ({"stages": [{"at": 2, "method": "random"}]}, None, "no keep"),
        ({"stages": [{"at": 4, "method": "random"}]}, 0.3, "lowest reachable keep is 0.6"),
        ({"stages": [{"at": 4, "method": "random", "keep": 0.3}]}, 0.5, "sets nothing"),
        ({"seed": -1, "stages": SCHEDULES["input"]}, None, "seed: -1"),
        ("balanced", 1.5, r"\(0, 1\]"),
        ("no-such", 0.5, "no preset"),
    ],
)
def test_a_preset_that_does_not_fit_is_refused(preset: object, keep: object, match: str) -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "image")
    with pytest.raises(PresetError, match=match), vtprune.pruning(model, preset, keep):
        model(**inputs)


def test_a_static_cache_that_is_used_again_for_a_new_prompt_is_right() -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "image")
    cache = StaticCache(config=model.get_decoder().config, max_cache_len=400)
    with vtprune.pruning(model, BOTH):
        expected = oracle.generate(model, inputs, steps=3)[1]
        oracle.generate(model, inputs, steps=3, **{oracle.CACHE: cache})
        cache.reset()
        again = oracle.generate(model, inputs, steps=3, **{oracle.CACHE: cache})[1]
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "kind", "missing"),
    [
        ("gemma4", "image", "image_position_ids"),
        ("gemma4", "video", "num_frames_per_video"),
        ("molmo2", "image", "image_token_pooling"),
        ("qwen2_vl", "video", "video_grid_thw"),
        ("llava_next", "image", "image_sizes"),
    ],
)
def test_pixels_without_what_belongs_to_them_are_refused(
    name: str, kind: str, missing: str
) -> None:
    if name not in tiny.FAMILIES:
        pytest.skip("not in this transformers")
    model = shared_model(name)
    inputs = tiny.inputs(name, model, kind)
    if missing not in inputs:
        pytest.skip("not taken by this transformers")
    del inputs[missing]
    message = f"^{name}: the pixels of {kind}s were given without .*{missing}"
    for call in (model, partial(model.generate, max_new_tokens=1)):
        with (
            vtprune.pruning(model, "balanced", keep=0.4),
            torch.no_grad(),
            pytest.raises(ModelError, match=message),
        ):
            call(**inputs)
