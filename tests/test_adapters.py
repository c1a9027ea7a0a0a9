"""Adapters and other wrappers: what they hold is pruned as the merged model is."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import peft
import pytest
import tiny
import torch
from click.testing import CliRunner
from conftest import assert_refused, save_noise, shared_model
from oracle import generate
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

import vtprune
from vtprune.cli import COMMANDS, cli
from vtprune.errors import ModelError
from vtprune.inference.generate import Generation
from vtprune.models.loading import load, open_model
from vtprune.models.structure import find_structure
from vtprune.models.weights import INDEX, SINGLE

FAMILIES = ("llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")
METHODS = {
    "entropy": {"method": "entropy", "at": 2},
    "fastv": {"method": "fastv", "at": 2},
    "sparsevlm": {"method": "sparsevlm"},
    "dart": {"method": "dart", "at": 2},
    "spread": {"method": "spread", "at": 2},
    "visionzip": {"method": "visionzip", "at": "input"},
    "evs": {"method": "evs", "at": "input"},
    "balanced": {"preset": "balanced"},
}
NOISE = 1e-5


def lora(model: PreTrainedModel, **options: object) -> peft.PeftModel:
    """A copy of `model` with LoRA in all linear layers: tower, projector and decoder."""
    fields = {"r": 4, "target_modules": "all-linear", **options}
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields))
    return draw(wrapped)


def draw(wrapped: peft.PeftModel) -> peft.PeftModel:
    """Give an adapter weights as large as a few steps of training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, weight in sorted(wrapped.named_parameters()):
            if "lora_" in path or "modules_to_save" in path:
                weight += torch.randn(weight.shape, generator=generator) * 0.02
    return wrapped.eval()


@functools.cache
def pair(name: str) -> tuple[peft.PeftModel, PreTrainedModel]:
    """A model with LoRA, and the same one merged."""
    wrapped = lora(shared_model(name))
    return wrapped, copy.deepcopy(wrapped).merge_and_unload()


def pruned(
    opened: nn.Module, called: PreTrainedModel, inputs: dict[str, torch.Tensor], **how: object
) -> tuple[list[list[list[int]]], torch.Tensor]:
    """What every stage kept, and the logits of the prefill and two decode steps."""
    with vtprune.pruning(opened, keep=0.6, **how) as trace:
        _, logits = generate(called, inputs, 3)
    assert trace.warnings == []
    return [stage.kept for stage in trace.stages], logits


def assert_alike(first: tuple[object, torch.Tensor], second: tuple[object, torch.Tensor]) -> None:
    assert first[0] == second[0]
    torch.testing.assert_close(first[1], second[1], atol=NOISE, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_with_lora_is_pruned_as_the_merged_one(name: str, method: str) -> None:
    wrapped, merged = pair(name)
    kind = "video" if method == "evs" else "image"
    inputs = tiny.inputs(name, merged, kind)
    how = {**METHODS[method]}
    if method == "evs":
        how["modality"] = "video"  # of placeholders that pictures share
    expected = pruned(merged, merged, inputs, **how)
    assert_alike(pruned(wrapped, wrapped, inputs, **how), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_adapter_of_these_tests_changes_logits(name: str) -> None:
    inputs = tiny.inputs(name, shared_model(name), "image")
    logits = [generate(model, inputs, 1)[1] for model in (pair(name)[1], shared_model(name))]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


@pytest.mark.parametrize("opened", ["base", "wrapper"])
@pytest.mark.parametrize("called", ["base", "wrapper"])
def test_base_and_wrapper_are_pruned_whichever_the_block_was_given(
    opened: str, called: str
) -> None:
    wrapped, merged = pair("qwen2_5_vl")
    inputs = tiny.inputs("qwen2_5_vl", merged, "image")
    models = {"base": wrapped.get_base_model(), "wrapper": wrapped}
    assert_alike(
        pruned(models[opened], models[called], inputs, method="spread", at=2),
        pruned(merged, merged, inputs, method="spread", at=2),
    )


@pytest.mark.parametrize("how", ["add_adapter", "load_adapter"])
def test_an_adapter_inside_a_transformers_model_is_pruned_as_the_merged_one(
    how: str, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    wrapped, merged = pair("llava_onevision")
    model = copy.deepcopy(shared_model("llava_onevision"))
    if how == "load_adapter":
        wrapped.save_pretrained(tmp_path)
        model.load_adapter(str(tmp_path))
    else:
        model.add_adapter(wrapped.peft_config["default"])
        adapted = dict(wrapped.get_base_model().named_parameters())
        with torch.no_grad():
            for path, weight in model.named_parameters():
                weight.copy_(adapted[path])
    inputs = tiny.inputs("llava_onevision", merged, "image")
    expected = pruned(merged, merged, inputs, preset="balanced")
    assert_alike(pruned(model.eval(), model, inputs, preset="balanced"), expected)


@pytest.mark.parametrize(
    "saved",
    [("multi_modal_projector", "embed_tokens", "lm_head"), ("vision_tower",), ("self_attn",),
     ("input_layernorm",)],
)  # fmt: skip
@pytest.mark.parametrize("method", ["fastv", "spread", "entropy"])
def test_modules_to_save_are_pruned_as_the_merged_ones(saved: tuple[str, ...], method: str) -> None:
    targets = ["up_proj", "down_proj"]
    wrapped = lora(
        shared_model("llava_onevision"), target_modules=targets, modules_to_save=list(saved)
    )
    merged = copy.deepcopy(wrapped).merge_and_unload()
    inputs = tiny.inputs("llava_onevision", merged, "image")
    how = METHODS[method] | ({"at": "input"} if method == "entropy" else {})
    expected = pruned(merged, merged, inputs, **how)
    assert_alike(pruned(wrapped, wrapped, inputs, **how), expected)


class Wrapper(nn.Module):
    """A user's own module around a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


@contextmanager
def hooked(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The model with accelerate's hooks on all its modules."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules

    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
    try:
        yield model
    finally:
        remove_hook_from_submodules(model)


@contextmanager
def held(wrap: Callable[[nn.Module], nn.Module], model: nn.Module) -> Iterator[nn.Module]:
    yield wrap(model)


WRAPPERS = {
    "module": functools.partial(held, Wrapper),
    "data parallel": functools.partial(held, nn.DataParallel),
    "accelerate": hooked,
}


def forward(
    model: nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[list[list[list[int]]], torch.Tensor]:
    """What every stage of one forward kept, and its logits."""
    with vtprune.pruning(model, keep=0.6, method="spread", at=2) as trace, torch.no_grad():
        logits = model(**inputs).logits
    return [stage.kept for stage in trace.stages], logits


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_other_wrappers_are_pruned_as_what_they_hold(name: str, wrapper: str) -> None:
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "image")
    expected = forward(model, inputs)
    with WRAPPERS[wrapper](model) as wrapped:
        assert_alike(forward(wrapped, inputs), expected)


def test_a_module_around_a_peft_model_is_pruned_as_the_merged_one() -> None:
    wrapped, merged = pair("llava_onevision")
    inputs = tiny.inputs("llava_onevision", merged, "image")
    assert_alike(forward(Wrapper(wrapped), inputs), forward(merged, inputs))


def test_a_wrapper_is_left_as_it_was_found() -> None:
    wrapped, _ = pair("llava_onevision")
    before = {path: dict(module.__dict__) for path, module in wrapped.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in wrapped.modules())
    pruned(wrapped, wrapped, tiny.inputs("llava_onevision", wrapped, "image"), preset="balanced")
    assert {path: set(module.__dict__) for path, module in wrapped.named_modules()} == {
        path: set(values) for path, values in before.items()
    }
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in wrapped.modules())
    assert after == hooks


# -- what is refused ------------------------------------------------------------------------------

PROMPTS = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=6, num_attention_heads=2,
        token_dim=64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROMPTS)
def test_an_adapter_that_adds_tokens_is_refused(kind: str) -> None:
    wrapped = peft.get_peft_model(copy.deepcopy(shared_model("llava")), PROMPTS[kind])
    with pytest.raises(ModelError, match="puts tokens of its own before the prompt") as caught:
        find_structure(wrapped)
    assert "such as LoRA" in caught.value.hint


def test_an_adapter_that_acts_from_a_place_on_is_refused() -> None:
    wrapped = lora(shared_model("llava"), alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match=r"'default' \(LORA\) acts from a place in the prompt on"):
        find_structure(wrapped)


def test_an_adapter_that_is_not_active_is_not_refused() -> None:
    wrapped = lora(shared_model("llava"))
    wrapped.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM",
                                                 alora_invocation_tokens=[5, 6]))  # fmt: skip
    assert find_structure(wrapped).model is wrapped.get_base_model()


def test_a_wrapper_of_several_models_is_refused() -> None:
    both = nn.ModuleList([shared_model("llava"), shared_model("qwen2_vl")])
    with pytest.raises(ModelError, match="ModuleList holds several transformers models"):
        find_structure(both)


def test_a_compiled_wrapper_is_refused() -> None:
    with pytest.raises(ModelError, match="Module is compiled, and hooks do not run"):
        find_structure(torch.compile(Wrapper(shared_model("llava"))))


# -- adapters on disk -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # type: ignore[no-untyped-def]
    """A base model, an adapter for it, both merged, and a picture."""
    base, folder = checkpoints("llava_onevision"), tmp_path_factory.mktemp("adapters")
    wrapped = lora(AutoModelForImageTextToText.from_pretrained(base))
    wrapped.save_pretrained(folder / "adapter")
    merged = shutil.copytree(base, folder / "merged")
    wrapped.merge_and_unload().save_pretrained(merged)
    picture = save_noise(folder / "noise.png", 90, 150)
    return {"base": base, "adapter": folder / "adapter", "merged": merged, "picture": picture}


def copy_of(adapter: Path, tmp_path: Path, **changes: object) -> Path:
    """A copy of an adapter whose config says something else."""
    directory = shutil.copytree(adapter, tmp_path / "changed")
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def reports(args: Sequence[str], picture: Path) -> dict[str, object]:
    command = ["ask", str(picture), "what?", "--keep", "0.6", "--max-new-tokens", "4", "--json"]
    result = CliRunner().invoke(cli, [*command, *args])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "args",
    [("--model", "{base}", "--adapter", "{adapter}"), ("--adapter", "{adapter}"),
     ("--model", "{adapter}")],
)  # fmt: skip
def test_ask_with_an_adapter_gives_what_the_merged_model_gives(
    args: tuple[str, ...], saved: dict[str, Path]
) -> None:
    adapted = reports([one.format(**saved) for one in args], saved["picture"])
    merged = reports(["--model", str(saved["merged"])], saved["picture"])
    plain = reports(["--model", str(saved["base"])], saved["picture"])
    for block in ("answer", "tokens", "flops"):
        assert adapted[block] == merged[block]
    assert adapted["tokens"] != plain["tokens"]
    assert adapted["warnings"] == []
    assert adapted["model"]["name"] == str(saved["base"])
    assert adapted["model"]["adapter"] == str(saved["adapter"])
    assert "adapter" not in plain["model"]


def test_a_table_is_counted_on_an_adapters_base_model(saved: dict[str, Path]) -> None:
    args = ["reproduce", "schedules-llava-1.5", "--json", "--adapter", str(saved["adapter"])]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.stderr
    counted = vtprune.reproduce("schedules-llava-1.5", model=str(saved["base"]))
    assert json.loads(result.stdout) == json.loads(json.dumps(counted.to_dict()))


def test_a_base_model_in_shards_is_adapted_as_a_whole_one(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(saved["base"], tmp_path / "sharded")
    (base / SINGLE).unlink()
    model = AutoModelForImageTextToText.from_pretrained(saved["base"])
    model.save_pretrained(base, max_shard_size="100KB")
    assert not (base / SINGLE).exists()
    assert len({*json.loads((base / INDEX).read_text())["weight_map"].values()}) > 2
    adapted = reports(["--model", str(base), "--adapter", str(saved["adapter"])], saved["picture"])
    merged = reports(["--model", str(saved["merged"])], saved["picture"])
    for block in ("answer", "tokens", "flops"):
        assert adapted[block] == merged[block]
    assert adapted["warnings"] == []


def test_the_report_names_the_adapter(saved: dict[str, Path]) -> None:
    args = ["ask", str(saved["picture"]), "what?", "--adapter", str(saved["adapter"]),
            "--max-new-tokens", "2"]  # fmt: skip
    result = CliRunner().invoke(cli, args)
    lines = " ".join(result.stderr.split())
    assert f"model {saved['base']} with {saved['adapter']}:" in lines


def test_a_base_model_that_is_not_there_is_given_with_model(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    moved = copy_of(saved["adapter"], tmp_path, base_model_name_or_path="/elsewhere/base")
    with pytest.raises(
        ModelError, match=r"its base model '/elsewhere/base' .* is not there"
    ) as got:
        load(adapter=str(moved))
    assert got.value.hint == f"give its base model: --model MODEL --adapter {moved}"
    assert load(saved["base"], adapter=moved).adapter == str(moved)


def test_answers_of_a_peft_model_of_the_callers_own(saved: dict[str, Path]) -> None:
    base = AutoModelForImageTextToText.from_pretrained(saved["base"])
    wrapped = peft.PeftModel.from_pretrained(base, str(saved["adapter"])).eval()
    items = [(saved["picture"], "what?")]
    generation = Generation(max_new_tokens=4)
    (own,) = vtprune.answer(wrapped, items, keep=0.6, generation=generation)
    (merged,) = vtprune.answer(str(saved["merged"]), items, keep=0.6, generation=generation)
    assert own.answer == merged.answer
    assert own.tokens == merged.tokens


def test_the_adapters_own_tokenizer_and_template_count(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    own = copy_of(saved["adapter"], tmp_path)
    tiny.tokenizer("llava_onevision").save_pretrained(own)
    template = (own / "chat_template.jinja").read_text()
    (own / "chat_template.jinja").write_text("Answer in one word.\n" + template)
    opened = open_model(adapter=str(own))
    assert str(opened.files.processor["chat_template"]).startswith("Answer in one word.")
    assert opened.files.image  # the base model's


@pytest.mark.parametrize("embeddings", [False, True])
def test_an_adapter_beside_tied_weights_leaves_the_others_alone(
    embeddings: bool, tmp_path: Path
) -> None:
    base = tiny.build("llava", tmp_path / "base", tie_word_embeddings=True)
    model = AutoModelForImageTextToText.from_pretrained(base)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    wrapped = lora(model, target_modules=["lm_head", "q_proj"])
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=embeddings)
    loaded = load(adapter=str(tmp_path / "adapter"))
    if not embeddings:  # saved with the adapter, they are not tied any more
        assert "can't be merged into these weights" in loaded.warnings[0]
    inputs = tiny.inputs("llava", loaded.model, "image")
    with torch.no_grad():
        logits = [one(**inputs).logits for one in (wrapped, loaded.model)]
    torch.testing.assert_close(*logits, atol=NOISE, rtol=0)


@pytest.mark.parametrize(
    ("break_it", "message", "hint"),
    [
        (lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
         "its weights are pickled (adapter_model.bin), which are not loaded", "save them as"),
        (lambda d: (d / "adapter_model.safetensors").unlink(),
         "no adapter_model.safetensors there", "copy all files"),
        (lambda d: (d / "adapter_config.json").unlink(), "neither a directory with", "save_pretr"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "is not a JSON object", "again"),
        (lambda d: (d / "adapter_config.json").write_text('{"peft_type": "NEW"}'),
         "can't be read by peft", "newer peft"),
        (lambda d: os.truncate(d / "adapter_model.safetensors", 3000),
         "a weights file is damaged", "again"),
    ],
)  # fmt: skip
def test_an_adapter_that_is_not_whole_is_refused(
    break_it: Callable[[Path], object], message: str, hint: str,
    saved: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    directory = copy_of(saved["adapter"], tmp_path)
    break_it(directory)
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        load(str(saved["base"]), adapter=str(directory))
    assert str(directory) in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "ADAPTION_PROMPT"])
def test_an_adapter_of_another_kind_is_refused_before_weights_are_read(
    kind: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    config = {"peft_type": kind, "base_model_name_or_path": str(saved["base"])}
    directory = copy_of(saved["adapter"], tmp_path)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"the adapter \S+ \({kind}\) (puts|adds)"):
        open_model(adapter=str(directory))


def test_another_models_adapter_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="another model's adapter") as caught:
        load("embedded", adapter=str(saved["adapter"]))
    assert str(saved["base"]) in caught.value.hint
    fewer = copy_of(saved["adapter"], tmp_path, target_modules=["q_proj"])
    with pytest.raises(ModelError, match="has weights for parts that this model does not have"):
        load(adapter=str(fewer))


def test_two_adapters_are_refused(saved: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"is an adapter, and .* is another one"):
        load(str(saved["adapter"]), adapter=str(saved["adapter"]))


def test_a_missing_peft_is_named_with_its_extra(
    saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtprune.models.devices.find_spec", lambda name: None)
    result = CliRunner().invoke(
        cli, ["ask", str(saved["picture"]), "what?", "--adapter", str(saved["adapter"])]
    )
    assert_refused(result, rf"Error: the adapter {saved['adapter']} needs the package peft")
    assert "pip install 'vtprune[adapters]'" in result.stderr


def test_profile_asks_for_the_base_model(saved: dict[str, Path]) -> None:
    result = CliRunner().invoke(cli, ["profile", "--model", str(saved["adapter"])])
    assert_refused(result, rf"Error: {saved['adapter']}: an adapter, where a model is needed")


def test_every_command_that_loads_weights_takes_an_adapter() -> None:
    takes = {
        name
        for name in COMMANDS
        if any(one.name == "adapter" for one in cli.get_command(click.Context(cli), name).params)
    }
    loads = {
        name
        for name in COMMANDS
        if any(one.name == "quantize" for one in cli.get_command(click.Context(cli), name).params)
    }
    assert takes == loads >= {"ask", "compare", "evaluate", "calibrate", "tune"}
