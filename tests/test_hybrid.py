"""Decoders with linear attention and convolutions: pruned equals the loop over their layers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import layer_loop
import pytest
import tiny_processor
import torch
import transformers
import zoo
from oracle import dropped, generate
from packaging.version import Version
from prompts import prompt_with
from test_generic import with_videos
from test_pictures_places import ask
from transformers import PreTrainedModel

import vtprune
from vtprune.engine.inputs import PixelView, PreparedInputs
from vtprune.engine.kv_cache import fork_cache
from vtprune.engine.pixel_selection import TOWERS
from vtprune.errors import ModelError, PresetError
from vtprune.evaluation.calibration.entropy import entropy_curve
from vtprune.evaluation.calibration.layer_scores import drop_scores
from vtprune.inference.forced_answers import score_after_prefill, score_in_one_forward
from vtprune.inference.prepare import PreparedQuestion, batch_on_device
from vtprune.models import find_family
from vtprune.models.base import Files
from vtprune.models.generic import STEPS_APART
from vtprune.models.loading import Loaded, load
from vtprune.models.seams import cache_argument, cache_made
from vtprune.models.structure import find_structure
from vtprune.preset import preset_names
from vtprune.preset.calibration import Calibration
from vtprune.pruners import METHODS, create
from vtprune.pruners.base import ROTARY, TOWER
from vtprune.tokens.units import Units

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
EVERY = (
    "qwen3_5",
    "qwen3_5_moe",
    "lfm2_vl",
    "lfm3_vl",
    "minicpmv4_6",
    "minicpmv4_7",
    "minicpm_ocr",
    "nemotron_h_omni",
    "glm5_next",
    "inkling_mm_model",
    "inkling2",
)
SOME = ("qwen3_5",)
"""The classes of the default run."""
WITHOUT_ROTARY = ("nemotron_h_omni", "glm5_next", "inkling_mm_model", "inkling2")
"""The classes whose layers with attention have no rotary positions."""
ROWS = (((5, 28), 1), ((3, 12), 2), ((20, 13), 1))
"""For every prompt the text tokens before and after its pictures, and how many those are."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" in metafunc.fixturenames:
        every = metafunc.config.getoption("--zoo")
        metafunc.parametrize("model_type", EVERY if every else SOME)
    if "with_video" in metafunc.fixturenames:
        every = metafunc.config.getoption("--zoo")
        metafunc.parametrize("with_video", STEPS_APART if every else ["glm5_next"])


@functools.cache
def hybrid(model_type: str, layers: int = 8) -> tuple[PreTrainedModel, dict[str, Batch]]:
    """A small model in which layers of all kinds take turns, and prompts for it.

    The prompts of the batch have one length, and the second has two pictures: so a cut is what
    first makes padding.
    """
    if model_type not in zoo.MODEL_TYPES:
        pytest.skip("this transformers has no such class")
    model, _ = zoo.ready(model_type, layers)
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


@functools.cache
def unpruned(
    model_type: str, prompts: str, kernel: str
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Tokens and logits of the unpruned model, and how far the loop is from it by rounding."""
    model, batches = hybrid(model_type)
    tokens, whole = generate(model, batches[prompts], STEPS)
    loop = layer_loop.loop(model, batches[prompts], [], tokens)
    return tokens, whole, float((loop - whole).abs().max())


def assert_loop(model_type: str, prompts: str, stages: Stages, **options: object) -> None:
    """Pruned is the loop over the layers, for every row alone."""
    model, batches = hybrid(model_type)
    batch, kernel = batches[prompts], model.config._attn_implementation
    tokens, whole, noise = unpruned(model_type, prompts, kernel)
    with vtprune.pruning(model, {"stages": stages}) as trace:
        logits = generate(model, batch, STEPS, tokens, **options)[1]
    tolerance = max(2e-5, 3 * noise)
    assert tolerance < 2e-4
    expected = layer_loop.loop(model, batch, dropped(trace, batch), tokens)
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=0)
    assert float((expected - whole).abs().max()) > 1000 * tolerance  # something was dropped


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("prompts", ["one", "several"])
def test_pruned_is_the_loop_over_the_layers(model_type: str, prompts: str, cut: str) -> None:
    assert_loop(model_type, prompts, CUTS[cut])


def test_a_bias_by_distances_counts_columns_from_the_first_layer_on() -> None:
    """Inkling's, which has one in every layer; the others of the kind run with --zoo."""
    if zoo.is_broken("inkling_mm_model"):
        pytest.skip("this transformers can't run the class, pruned or not")
    assert_loop("inkling_mm_model", "one", CUTS["input"])


def test_keep_1_changes_no_bit(model_type: str) -> None:
    model, batches = hybrid(model_type)
    for prompts, batch in batches.items():
        tokens, whole, _ = unpruned(model_type, prompts, model.config._attn_implementation)
        with vtprune.pruning(model, "balanced", keep=1):
            assert torch.equal(generate(model, batch, STEPS, tokens)[1], whole)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_kernels_and_caches_go_on_from_a_cut(model_type: str, kernel: str, cache: str) -> None:
    if model_type == "inkling2" and kernel == "sdpa":
        pytest.skip("it has no such kernel")
    if cache == "static" and "inkling" in model_type:
        pytest.skip("a static cache with a window narrower than the prompt fails unpruned")
    model, _ = hybrid(model_type)
    before = model.config._attn_implementation
    model.set_attn_implementation(kernel)
    try:
        assert_loop(model_type, "several", CUTS["three places"], cache_implementation=cache)
    finally:
        model.set_attn_implementation(before)


# -- an index over the positions of all keys ------------------------------------------------------

RUNS_OF_TOKENS = {
    "text_config.eos_token_id": 3,
    "text_config.number_of_conv_states": 3,
    "text_config.ple_layer_ids": [2, 3],
    "text_config.ple_embed_dim": 64,
    "text_config.ngram_vocab_size_base": 500,
}
"""Layers that add embeddings of the last tokens, by their ids."""


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> Iterator[PreTrainedModel]:
    """A small Qwen4."""
    if "qwen4_exp" not in zoo.MODEL_TYPES:
        pytest.skip("this transformers has no such class")
    monkeypatch.setitem(zoo.NARROW, "qwen4_exp", RUNS_OF_TOKENS)
    for made in (hybrid, unpruned):
        made.cache_clear()
    yield hybrid("qwen4_exp", 8)[0]
    for made in (hybrid, unpruned):
        made.cache_clear()


def test_where_an_index_has_all_positions_tokens_are_dropped_at_the_input_alone(
    indexed: PreTrainedModel, request: pytest.FixtureRequest
) -> None:
    """Ragged batches and eager attention behind --zoo: the index loops over all queries."""
    every = [("sdpa", "one"), ("sdpa", "several"), ("eager", "several")]
    for kernel, prompts in every if request.config.getoption("--zoo") else every[:1]:
        indexed.set_attn_implementation(kernel)
        assert_loop("qwen4_exp", prompts, CUTS["input"])
    named: Stages = [{"at": "horizon", "method": "divprune", "keep": 0.4}]
    with vtprune.pruning(indexed, {"stages": named}) as trace:
        generate(indexed, hybrid("qwen4_exp")[1]["one"], 1)
    assert trace.stages[0].layer == 0
    assert "layers of this model have the positions of all tokens" in " ".join(trace.warnings)
    with (
        pytest.raises(PresetError, match="the positions of all tokens that its decoder was given"),
        vtprune.pruning(indexed, {"stages": CUTS["layer 3"]}),
    ):
        pass


# -- before the vision tower ----------------------------------------------------------------------

PIXELS: Stages = [{"at": "pixels", "method": "predictable", "tolerance": 0}]


def test_frames_left_out_before_the_tower_are_not_there_for_the_layers(
    with_video: str, tmp_path: Path
) -> None:
    """The tower runs, on the steps that stay, and the decoder is the loop without the others."""
    if with_video not in zoo.MODEL_TYPES:
        pytest.skip("this transformers has no such class")
    loaded = with_videos(load(str(tiny_processor.build(with_video, tmp_path))))
    noise = torch.randint(0, 256, (4, 3, 64, 96), dtype=torch.uint8)
    long = noise[[0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]]  # every second is read
    short, picture = noise[[3, 3, 2, 2, 3, 3, 2, 2]], noise[:1]
    first = ask(loaded, [(long, 4.0)])
    others = [ask(loaded, [(short, 4.0)]), ask(loaded, [(picture, 0.0), (short, 4.0)])]
    assert_steps_left_out(loaded, [first])
    loaded.model.set_attn_implementation("eager")
    assert_steps_left_out(loaded, [first, *others])
    stages = [{**PIXELS[0], "optional": True}, {"at": "input", "method": "uniform", "keep": 0.4}]
    with vtprune.pruning(loaded.model, {"stages": stages}, inputs=first.for_engine()) as trace:
        generate(loaded.model, dict(first.tensors), 1)
    assert [stage.at for stage in trace.stages] == ["pixels", "input"]


def assert_steps_left_out(loaded: Loaded, questions: list[PreparedQuestion]) -> None:
    """Every second step of each video is not encoded, and every row is the loop without it."""
    model, prompts = loaded.model, [question.inputs for question in questions]
    batch = batch_on_device(loaded, prompts)
    sizes: list[int] = []
    tower = next(getattr(model.model, name) for name in TOWERS if hasattr(model.model, name))
    hook = tower.patch_embed.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    given = PreparedInputs.of(batch, prompts)
    with vtprune.pruning(model, {"stages": PIXELS}, inputs=given) as trace:
        tokens, logits = generate(model, batch, STEPS)
    hook.remove()
    whole = generate(model, batch, STEPS, tokens)[1]
    pictures = len(batch.get("pixel_values", ()))
    assert sum(sizes) == pictures + len(batch["pixel_values_videos"]) // 2
    drops = dropped(trace, batch)
    for number, prompt in enumerate(prompts):
        pixels = [len(grid) for kind, grid in prompt.media if kind == "image"]
        seen = len(trace.layouts[number]) - sum(pixels)
        assert len(trace.kept[number]) == seen // 2 + sum(pixels)
        padding = int((batch["attention_mask"][number] == 0).sum())
        columns = [(at, [[n - padding for n in rows[number]]]) for at, rows in drops]
        force = tokens[number : number + 1]
        (expected,) = layer_loop.loop(model, dict(prompt.tensors), columns, force)
        torch.testing.assert_close(logits[number], expected, atol=2e-5, rtol=0)
        assert float((expected - whole[number]).abs().max()) > 0.05  # something was dropped


REASONS = {
    "inkling_mm_model": "takes pictures alone, of which its processor does not tell which tile",
    "inkling2": "takes pictures alone, of which its processor does not tell which tile",
    "nemotron_h_omni": "has a vision tower of which it is not known that it looks at each frame by",
}


@pytest.mark.parametrize("kind", REASONS)
def test_other_towers_are_refused_at_pixels_with_the_reason(kind: str) -> None:
    model, batches = hybrid(kind)
    view = PixelView(batches["one"], [[Units("image", torch.zeros(1, 3, 8, 8))]])
    with (
        vtprune.pruning(model, {"stages": PIXELS}, inputs=PreparedInputs(pixels=view)),
        pytest.raises(ModelError, match=f"{kind} {REASONS[kind]}"),
    ):
        generate(model, batches["one"], 1)


# -- methods that read the layer before their cut -------------------------------------------------


def attending(model: PreTrainedModel) -> list[int]:
    return [n for n, memory in enumerate(find_structure(model).memories) if memory.keys]


def skip_where_all_attend(model: PreTrainedModel) -> None:
    if len(attending(model)) == len(find_structure(model).layers):
        pytest.skip("all of its layers attend")


def first_readable(model: PreTrainedModel) -> int:
    """The first layer with attention before it where tokens can be dropped."""
    possible = find_structure(model).cut_layers
    return next(n + 1 for n in attending(model) if n + 1 in possible)


@pytest.mark.parametrize("method", ["fastv", "entropy"])
def test_a_layer_number_without_attention_before_it_is_refused(
    model_type: str, method: str
) -> None:
    model, _ = hybrid(model_type)
    skip_where_all_attend(model)
    first = attending(model)[0]
    layers = ", ".join(map(str, attending(model)))
    message = (
        f"{method} reads the attention of the layer before its cut, and layer {first - 1} of "
        f"{model_type} has none .at: {first}.: the layers with attention are {layers}"
    )
    with (
        pytest.raises(PresetError, match=message) as caught,
        vtprune.pruning(model, {"stages": [{"at": first, "method": method, "keep": 0.3}]}),
    ):
        pass
    assert f"at: {first_readable(model)}" in caught.value.hint


def test_what_layer_0_does_not_project_is_not_read_at_the_input(model_type: str) -> None:
    model, _ = hybrid(model_type)
    skip_where_all_attend(model)
    stage = {"at": "input", "method": "entropy", "keep": 0.3}
    with (
        pytest.raises(PresetError, match=r"layer 0 of \w+ has none .at: input."),
        vtprune.pruning(model, {"stages": [stage]}),
    ):
        pass


@pytest.mark.parametrize("at", ["ecl", "20%"])
def test_a_named_place_moves_to_the_next_layer_with_attention_before_it(
    model_type: str, at: str
) -> None:
    model, batches = hybrid(model_type)
    skip_where_all_attend(model)
    stage = {"at": at, "method": "fastv", "keep": 0.3}
    with vtprune.pruning(model, {"stages": [stage]}) as trace:
        generate(model, batches["one"], 1)
    (moved,) = [warning for warning in trace.warnings if "moved" in warning]
    assert f"the cut at {at} moved from layer" in moved
    assert trace.stages[0].layer == first_readable(model)


def test_the_budget_moves_a_cut_only_to_layers_with_attention_before_them(model_type: str) -> None:
    """Half of the tokens on average can't be reached from layer 8 on, nor from 6, 5 ..."""
    if model_type == "inkling2":
        pytest.skip("refused: its attention has sinks")
    model, batches = hybrid(model_type)
    places = Calibration(7, 7, None, {}, "file")
    stages: Stages = [{"at": "ecl", "method": "fastv"}]
    with vtprune.pruning(model, {"stages": stages}, keep=0.7, calibration=places) as trace:
        generate(model, batches["one"], 1)
    assert trace.stages[0].layer - 1 in attending(model)
    assert trace.keep_mean() <= 0.7


def test_all_tokens_are_dropped_before_a_layer_that_allows_it() -> None:
    """Wherever the budget ends."""
    vtw = {"stages": [{"at": "ecl", "method": "vtw"}]}
    model, batches = hybrid("glm5_next")
    for layer in (2, 5, 6):
        with vtprune.pruning(model, vtw, keep=layer / 8) as trace:
            generate(model, batches["one"], 2)
        assert trace.stages[0].layer in find_structure(model).cut_layers
        assert 0 < trace.keep_mean() <= layer / 8


@pytest.mark.parametrize("preset", preset_names())
def test_packaged_presets_run(model_type: str, preset: str) -> None:
    model, batches = hybrid(model_type)
    with vtprune.pruning(model, preset, keep=0.7) as trace:
        logits = generate(model, batches["several"], 2)[1]
    assert logits.isfinite().all()
    assert all(0 < trace.keep_mean(row) <= 0.7 for row in range(3))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_runs_at_its_own_place(model_type: str, method: str) -> None:
    entry = METHODS[method]
    before_tower = entry.at == "pixels" or "image" not in entry.modalities
    if before_tower or {*create(method, {}).needs} & {*TOWER}:
        pytest.skip("this test has prepared pictures and no tower")
    model, batches = hybrid(model_type, 16)
    if model_type == "glm5_next" and "key" in create(method, {}).needs:  # made of a latent
        pytest.skip("refused: no separate key projection")
    if model_type == "inkling2" and {*create(method, {}).needs} & {"attention", "text_attention"}:
        pytest.skip("refused: its attention has sinks")
    if model_type == "inkling2" and {*create(method, {}).needs} & {"query", "key", "value"}:
        pytest.skip("in 5.24 its projections are no matrices alone")
    reads = {name.removeprefix("text_") for name in create(method, {}).needs}
    place, first = None, min(attending(model))
    if first and entry.at == "input" and reads & {"query", "key", "value"}:
        message = f"{method} reads the attention of the layer before its cut, and layer 0"
        with (
            pytest.raises(PresetError, match=message) as caught,
            vtprune.pruning(model, method=method, keep=0.7),
        ):
            pass
        place = str(first + 1)
        assert f"at: {place}" in caught.value.hint
    if {*create(method, {}).needs} & {*ROTARY} and model_type in WITHOUT_ROTARY:
        with (
            pytest.raises(ModelError, match="what rotary positions alone say can't be read"),
            vtprune.pruning(model, method=method, at=place, keep=0.7),
        ):
            generate(model, batches["one"], 2)
        return
    with vtprune.pruning(model, method=method, at=place, keep=0.7) as trace:
        generate(model, batches["one"], 2)
    layers = [stage.layer for stage in trace.stages]
    assert layers == sorted({*layers})
    if reads & {"attention", "query", "key", "value"}:
        # At the input a method reads what layer 0 would project.
        assert {max(layer - 1, 0) for layer in layers} <= {*attending(model)}


def test_no_cut_goes_before_a_layer_that_takes_over_a_choice_of_keys() -> None:
    if "glm5_next" not in zoo.MODEL_TYPES:
        pytest.skip("this transformers has no such class")
    model, batches = hybrid("glm5_next")
    message = (
        "layer 2 of glm5_next sees the keys that layer 1 chose .at: 2.: random can cut before "
        "layers 0, 1, 3, 4, 5, 7"
    )
    with (
        pytest.raises(PresetError, match=message) as caught,
        vtprune.pruning(model, {"stages": [{"at": 2, "method": "random", "keep": 0.3}]}),
    ):
        pass
    assert caught.value.hint == "at: 3"
    stages: Stages = [{"at": "25%", "method": "random", "keep": 0.3}]
    with vtprune.pruning(model, {"stages": stages}) as trace:
        generate(model, batches["one"], 1)
    assert any("the cut at 25% moved from layer 2 to 3" in text for text in trace.warnings)
    assert trace.stages[0].layer == 3


def test_layers_are_measured_where_choices_are_shared_and_tokens_have_several_states() -> None:
    if "glm5_next" not in zoo.MODEL_TYPES:
        pytest.skip("this transformers has no such class")
    model, batches = hybrid("glm5_next")
    loaded = Loaded("glm5_next", model, Files(model.config, None), find_family("glm5_next"))
    prompt = prompt_with(batches["one"], torch.tensor([40, 41]))
    curve = entropy_curve(loaded, prompt.tensors)
    assert len(curve) == 8
    assert all(0 < entropy < 1 for entropy in curve)
    (scores,) = drop_scores(loaded, [prompt], None, {})
    assert len(scores) == 9
    # No cut goes before layers 2 and 6, so there it is that of the next one.
    likelihoods = [score.first for score in scores]
    assert (likelihoods[2], likelihoods[6]) == (likelihoods[3], likelihoods[7])
    assert len({*likelihoods}) == 7


def test_an_answer_scores_the_same_at_once_and_from_the_cache(model_type: str) -> None:
    """With the positions that the model itself gives it."""
    model, batches = hybrid(model_type)
    loaded = Loaded(model_type, model, Files(model.config, None), find_family(model_type))
    prompt = prompt_with(batches["one"], torch.tensor([40, 41, 42]))
    stages: Stages = [{"at": first_readable(model), "method": "uniform", "keep": 0.4}]
    with vtprune.pruning(model, {"stages": stages}):
        once, stepwise = score_in_one_forward(loaded, prompt), score_after_prefill(loaded, prompt)
    assert once.probability == pytest.approx(stepwise.probability, rel=1e-3)


def test_more_cuts_than_layers_with_attention_before_them_are_refused() -> None:
    model, _ = hybrid("qwen3_5")
    with (
        pytest.raises(PresetError, match=r"pyramiddrop cuts 3 times .* qwen3_5 has 1 such layer"),
        vtprune.pruning(model, method="pyramiddrop", keep=0.7),
    ):
        pass


def test_the_query_is_read_without_the_gate_beside_it() -> None:
    model, batches = hybrid("qwen3_5")
    structure = find_structure(model)
    layer = structure.layers[3]
    seen: dict[str, torch.Tensor] = {}
    norm = layer.self_attn.q_norm
    hooks = [
        norm.register_forward_pre_hook(lambda _, args: seen.update(query=args[0].flatten(-2))),
        layer.self_attn.q_proj.register_forward_hook(lambda _, args, out: seen.update(all=out)),
    ]
    with torch.no_grad():
        model(**batches["one"])
    for hook in hooks:
        hook.remove()
    assert torch.equal(structure.without_gate(3, "query", seen["all"]), seen["query"])


# -- what goes on from the cache ------------------------------------------------------------------


def looped(
    model: PreTrainedModel, row: Batch, trace: vtprune.Trace, force: torch.Tensor
) -> torch.Tensor:
    """Logits (steps, V) of a prompt and one continuation, (1, steps)."""
    return layer_loop.loop(model, row, dropped(trace, row), force)[0]


@pytest.mark.parametrize("cut", ["input", "layer 1", "layer 3"])
def test_beams_and_samples_go_on_from_states_of_their_own(model_type: str, cut: str) -> None:
    if Version(transformers.__version__) < Version("5.18"):
        pytest.skip("its generation splits the pixels by their grids, and these are made up")
    model, batches = hybrid(model_type)
    row, steps = batches["one"], 6
    length = row["input_ids"].shape[1]
    call = {"max_new_tokens": steps, "min_new_tokens": steps, "disable_compile": True}
    call |= {"num_return_sequences": 3, "return_dict_in_generate": True}
    with vtprune.pruning(model, {"stages": CUTS[cut]}) as trace:
        torch.manual_seed(0)
        samples = model.generate(**row, **call, do_sample=True, output_logits=True)
        beams = model.generate(**row, **call, num_beams=3, do_sample=False, output_scores=True)
    for number in range(3):
        force = samples.sequences[number : number + 1, length:]
        logits = torch.stack(samples.logits, 1)[number]
        expected = looped(model, row, trace, force)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        force = beams.sequences[number : number + 1, length:]
        likelihoods = looped(model, row, trace, force).log_softmax(-1)
        score = likelihoods.gather(1, force[0, :, None]).mean()
        torch.testing.assert_close(beams.sequences_scores[number], score, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cut", ["input", "layer 1", "layer 3"])
def test_a_further_turn_goes_on_from_the_states(model_type: str, cut: str) -> None:
    model, batches = hybrid(model_type)
    row = batches["one"]
    length = row["input_ids"].shape[1]
    call = {"do_sample": False, "return_dict_in_generate": True, "disable_compile": True}
    with vtprune.pruning(model, {"stages": CUTS[cut]}) as trace:
        first = model.generate(**row, **call, max_new_tokens=4, min_new_tokens=4)
        ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13, 14, 15]])], 1)
        cache = cache_made(first)
        turns = [
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=one,
                **call,
                max_new_tokens=5,
                min_new_tokens=5,
                output_logits=True,
            )
            for one in (fork_cache(cache), cache)
        ]
    assert torch.equal(*(torch.stack(turn.logits) for turn in turns))  # neither changed the other
    expected = looped(model, row, trace, turns[0].sequences[:, length:])[-5:]
    torch.testing.assert_close(torch.cat(turns[0].logits), expected, atol=1e-4, rtol=0)


def test_padding_between_cached_tokens_and_new_ones_is_refused(model_type: str) -> None:
    model, batches = hybrid(model_type)
    batch = batches["several"]
    with vtprune.pruning(model, {"stages": CUTS["layer 1"]}):
        out = model.generate(**batch, max_new_tokens=2, min_new_tokens=2, disable_compile=True,
                             return_dict_in_generate=True)  # fmt: skip
        ids = torch.cat([out.sequences, torch.tensor([[0, 11]] + [[11, 12]] * 2)], 1)
        mask = torch.ones_like(ids)
        mask[0, -2] = 0
        with pytest.raises(ModelError, match="new tokens of different number on top of a cached"):
            model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache_made(out),
                           max_new_tokens=2, disable_compile=True)  # fmt: skip


def test_a_cache_that_needs_its_block_changes_no_state_outside(model_type: str) -> None:
    """Refused at the first layer with a state, so that in a block it can still go on."""
    model, batches = hybrid(model_type)
    with vtprune.pruning(model, {"stages": CUTS["layer 1"]}):
        out = model(**batches["several"], use_cache=True)
    cache = cache_made(out)
    state = copy.deepcopy(cache.layers[0].conv_states[0])
    one = torch.full((3, 1), 11)
    with pytest.raises(ModelError, match="pruned in a block that has been left"):
        model(input_ids=one, **cache_argument(model, cache))
    assert torch.equal(cache.layers[0].conv_states[0], state)


def test_threads_with_cuts_of_their_own_give_what_each_gives_alone(model_type: str) -> None:
    model, batches = hybrid(model_type)
    cuts = list(CUTS.values())

    def run(stages: Stages, threads: str) -> torch.Tensor:
        with vtprune.pruning(model, {"stages": stages}, threads=threads):
            return generate(model, batches["several"], 4)[1]

    alone = [run(stages, "all") for stages in cuts]
    with ThreadPoolExecutor(len(cuts)) as pool:
        together = list(pool.map(lambda stages: run(stages, "own"), cuts))
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
