"""Compiled layers: pruned as uncompiled ones, few graphs, and what can't be compiled."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from click.testing import CliRunner
from conftest import save_clip, shared_model
from torch import nn
from transformers import PreTrainedModel

import vtprune
from vtprune.cli import cli
from vtprune.errors import ModelError
from vtprune.models import compiling
from vtprune.models.compiling import CompileCost, CompiledModel, compile_model, compiled_model
from vtprune.models.fixed_cache import own_length_cache
from vtprune.models.structure import find_decoder

NAME, STEPS = "llava_onevision", 8
TEXT = ("input_ids", "attention_mask")
STAGE_TWO = {"stages": [{"at": 2, "method": "random", "keep": 0.4}]}
THREE_STAGES = {
    "stages": [
        {"at": "input", "method": "visionzip", "contextual": "none", "keep": 0.6},
        {"at": 2, "method": "fastv", "keep": 0.4},
        {"at": 4, "method": "entropy", "keep": 0.2},
    ]
}
"""They read the tower's attention, attention in layer 1, and queries in layer 3."""


@pytest.fixture
def many_graphs(request: pytest.FixtureRequest) -> None:
    """Skip a test that takes long, unless it is asked for."""
    if not request.config.getoption("--compiled"):
        pytest.skip("--compiled is not given")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A model whose layers are compiled: traced, without a compiler behind."""
    made = tiny.model(NAME)
    compile_model(made, backend="eager")
    return made


def of(model: PreTrainedModel) -> CompiledModel:
    compiled = compiled_model(model)
    assert compiled is not None
    return compiled


def run(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], static: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of an answer, and their logits."""
    cache = own_length_cache(find_decoder(model).config, STEPS) if static else None
    given = {} if cache is None else {oracle.CACHE: cache}
    output = model.generate(**inputs, **given, max_new_tokens=STEPS, do_sample=False,
                            output_logits=True, return_dict_in_generate=True,
                            disable_compile=True)  # fmt: skip
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, 1)


@pytest.mark.parametrize("preset", [STAGE_TWO, THREE_STAGES])
def test_compiled_and_pruned_equals_masked(
    model: PreTrainedModel, preset: dict[str, object]
) -> None:
    check_masked(model, preset, static=False)


@pytest.mark.parametrize("preset", [STAGE_TWO, THREE_STAGES])
def test_a_static_cache_of_layers_with_their_own_lengths_equals_masked(
    preset: dict[str, object],
) -> None:
    check_masked(shared_model(NAME), preset, static=True)


@pytest.mark.usefixtures("many_graphs")
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_compiled_and_pruned_equals_masked_in_every_family(name: str, static: bool) -> None:
    for attention in ("sdpa", "eager"):
        made = tiny.model(name, attention)
        compile_model(made, backend="eager")
        for preset in (STAGE_TWO, {"stages": THREE_STAGES["stages"][1:]}):
            check_masked(made, preset, static, name, attention)
        assert of(made).functions


def check_masked(
    model: PreTrainedModel,
    preset: dict[str, object],
    static: bool,
    name: str = NAME,
    attention: str = "sdpa",
) -> None:
    """A ragged batch, pruned, is the uncompiled model with what was dropped masked."""
    plain = shared_model(name, attention)
    inputs = tiny.ragged(name, plain, tiny.KINDS[name][-1])
    with vtprune.pruning(model, preset) as trace:
        tokens, logits = run(model, inputs, static)
    first, last = trace.stages[0].before, trace.stages[-1].after
    assert all(after < before for before, after in zip(first, last, strict=True))
    oracle.assert_masked(plain, inputs, trace, tokens, logits)
    assert (logits - run(plain, inputs)[1]).abs().max() > 0.1


def test_keep_one_is_the_compiled_model_bit_for_bit(model: PreTrainedModel) -> None:
    inputs = tiny.ragged(NAME, model, "image")
    expected = run(model, inputs)[1]
    with vtprune.pruning(model, keep=1.0):
        torch.testing.assert_close(run(model, inputs)[1], expected, atol=0, rtol=0)


def test_prompts_of_new_lengths_and_other_cuts_compile_nothing(model: PreTrainedModel) -> None:
    inputs = tiny.ragged(NAME, model, "image")
    with vtprune.pruning(model, STAGE_TWO):
        run(model, inputs)
    before = of(model).cost
    assert before.graphs
    assert before.seconds > 0
    for keep in (0.2, 0.5, 0.8):
        text = {name: torch.cat([inputs[name], inputs[name][:, -1:]], 1) for name in TEXT}
        inputs = inputs | text
        stage = {"at": 3, "method": "random", "keep": keep}
        with vtprune.pruning(model, {"stages": [stage]}):
            run(model, inputs)
    assert of(model).cost.since(before).graphs == 0


def test_a_second_model_is_not_charged_with_the_graphs_of_the_first(
    model: PreTrainedModel,
) -> None:
    inputs = tiny.ragged(NAME, model, "image")
    second = tiny.model(NAME)
    compile_model(second, backend="eager")
    for compiled in (model, second):
        with vtprune.pruning(compiled, STAGE_TWO):
            run(compiled, inputs)
    assert of(model).cost.graphs
    assert of(second).functions
    assert of(second).cost == CompileCost()


def test_layers_of_a_static_cache_keep_lengths_of_their_own() -> None:
    model = shared_model(NAME)
    inputs = tiny.ragged(NAME, model, "video")
    cache = own_length_cache(find_decoder(model).config, STEPS)
    shapes: list[list[tuple[int, int]]] = []

    def note(*_: object) -> None:
        shapes.append([(layer.keys.shape[-2], layer.keys.data_ptr()) for layer in cache.layers])

    handle = find_decoder(model).register_forward_hook(note)
    try:
        with vtprune.pruning(model, STAGE_TWO) as trace:
            model.generate(**inputs, **{oracle.CACHE: cache}, max_new_tokens=STEPS,
                           do_sample=False, disable_compile=True)  # fmt: skip
    finally:
        handle.remove()
    lost = trace.stages[0].before[0] - trace.stages[0].after[0]
    lengths = [length for length, _ in shapes[0]]
    assert lost > 0
    assert lengths == [lengths[0]] * 2 + [lengths[0] - lost] * 4
    assert shapes[1:] == shapes[:-1]
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.usefixtures("many_graphs")
def test_outputs_inside_the_layers_are_captured_as_ever() -> None:
    eager = tiny.model(NAME, "eager")
    inputs = tiny.inputs(NAME, eager, "image")
    with torch.no_grad():
        expected = eager(**inputs, output_attentions=True).attentions
        compile_model(eager, backend="eager")
        eager(**inputs, output_hidden_states=True)
        for got, want in zip(
            eager(**inputs, output_attentions=True).attentions, expected, strict=True
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("many_graphs")
def test_a_copy_runs_its_own_weights(model: PreTrainedModel) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.get_decoder().layers.parameters():
            weight.zero_()
        inputs = tiny.inputs(NAME, model, "image")
        changed = other(**inputs).logits - model(**inputs).logits
    assert changed.abs().max() > 0.1


@pytest.mark.usefixtures("many_graphs")
def test_the_report_says_what_compiling_took_and_leaves_it_out_of_the_rest(
    checkpoints: Callable[[str], Path], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_FUNCTIONS", {})  # other tests' graphs would fit
    loaded = vtprune.load(str(checkpoints(NAME)))
    plain = vtprune.ask(loaded, picture, "what is it?", preset="balanced", keep=0.3)
    compile_model(loaded.model, backend="eager", static_cache=True)
    first, second = (
        vtprune.ask(loaded, picture, "what is it?", preset="balanced", keep=0.3) for _ in range(2)
    )
    assert first.answer == second.answer == plain.answer
    assert plain.compile is None
    assert first.compile
    assert first.compile.graphs > 0
    assert first.compile.seconds > first.seconds.prefill + first.seconds.decode
    assert second.compile
    assert (second.compile.graphs, second.compile.recompiles) == (0, 0)
    assert first.to_dict()["compile"]["layers"] == first.model.layers  # type: ignore[index]


@pytest.mark.usefixtures("many_graphs")
def test_what_segments_of_a_video_compile_is_in_the_report_and_not_in_preprocessing(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_FUNCTIONS", {})
    loaded = vtprune.load(str(checkpoints(NAME)))
    compile_model(loaded.model, backend="eager")
    clip = save_clip(tmp_path / "clip", 4)
    first, second = (vtprune.ask(loaded, clip, "what?", stream={"frames": 2}) for _ in range(2))
    assert first.compile
    assert second.compile
    cost = of(loaded.model).cost
    assert (first.compile.graphs, second.compile.graphs) == (cost.graphs, 0)
    assert first.compile.seconds == pytest.approx(cost.seconds)
    assert first.seconds.preprocess < second.seconds.preprocess + 0.1 * cost.seconds


def test_layers_that_keep_a_state_run_as_they_are() -> None:
    compiled = compile_model(tiny.model("qwen3_5"), backend="eager")
    assert 0 < compiled.layers < compiled.num_layers
    assert "keeps a state" in compiled.notes()[0]


@pytest.mark.usefixtures("many_graphs")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_runs_what_compiled_layers_need() -> None:
    plain, made = shared_model(NAME), tiny.model(NAME)
    compile_model(made)
    inputs = tiny.inputs(NAME, plain, "image")
    with torch.no_grad(), vtprune.pruning(made, STAGE_TWO) as trace:
        logits = made(**inputs).logits[:, -1:]
    tokens = logits.argmax(-1)
    oracle.assert_masked(plain, inputs, trace, tokens, logits)
    assert of(made).cost.graphs


# -- what is refused -----------------------------------------------------------------------------


def compile_forward(module: nn.Module) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


@pytest.mark.parametrize("part", ["model", "inner", "decoder", "layer", "attention"])
@pytest.mark.parametrize("how", [nn.Module.compile, compile_forward])
def test_a_part_that_its_user_compiled_is_refused(
    part: str, how: Callable[[nn.Module], None]
) -> None:
    model = tiny.model(NAME)
    layer = model.get_decoder().layers[3]
    parts = {
        "model": model,
        "inner": model.model,
        "decoder": model.get_decoder(),
        "layer": layer,
        "attention": layer.self_attn,
    }
    how(parts[part])
    refused = pytest.raises(ModelError, match="is compiled")
    with refused as raised, vtprune.pruning(model, STAGE_TWO):
        pass
    assert "compile_model" in raised.value.hint


def test_a_model_that_its_user_compiled_is_refused() -> None:
    compiled = torch.compile(tiny.model(NAME))
    with pytest.raises(ModelError, match="is compiled"), vtprune.pruning(compiled, STAGE_TWO):
        pass


def test_a_replaced_forward_is_not_compiled_over() -> None:
    model = tiny.model(NAME)
    layer = model.get_decoder().layers[0]
    layer.mlp.forward = layer.mlp.forward
    with pytest.raises(ModelError, match="has been replaced"):
        compile_model(model, backend="eager")


@pytest.mark.parametrize(
    ("given", "match"),
    [({"backend": "nothing"}, "backend 'nothing'"), ({"mode": "fastest"}, "mode 'fastest'")],
)
def test_what_torch_does_not_have_is_refused(given: dict[str, str], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        compile_model(shared_model(NAME), **given)  # type: ignore[arg-type]


def test_without_a_compiler_the_command_says_the_way_out(
    monkeypatch: pytest.MonkeyPatch, picture: Path
) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    result = CliRunner().invoke(cli, ["ask", "--device", "cpu", "--compile", str(picture), "?"])
    assert result.exit_code == 1
    assert "C++ compiler" in result.stderr
    assert "install one" in result.stderr
