"""A name of transformers that moved is refused, and never gives a wrong number."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import tiny
import torch
import transformers
from conftest import shared_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

import vtprune
from vtprune.errors import ModelError
from vtprune.models import seams
from vtprune.models.loading import load

ROOT = Path(__file__).parents[1]
REFUSED = f"transformers {transformers.__version__}; tested: {seams.RANGE}".replace(".", r"\.")
LAYER_TWO = {"stages": [{"at": 2, "method": "random", "keep": 0.3}]}
INPUT = {"stages": [{"at": "input", "method": "random", "keep": 0.3}]}
BOTH = {"stages": [*INPUT["stages"], {"at": 3, "method": "uniform", "keep": 0.1}]}
PRESETS = {"input": INPUT, "layer": LAYER_TWO, "both": BOTH}


@pytest.fixture
def model() -> PreTrainedModel:
    return copy.deepcopy(shared_model("llava_onevision"))


def rename(forward: Callable[..., Any], old: str, new: str) -> Callable[..., Any]:
    """A forward of next month's release: it has the new name for an argument, and no old one."""
    signature = inspect.signature(forward)

    def renamed(*args: Any, **kwargs: Any) -> Any:
        if new in kwargs:
            kwargs[old] = kwargs.pop(new)
        return forward(*args, **kwargs)

    parameters = [
        one.replace(name=new) if one.name == old else one for one in signature.parameters.values()
    ]
    renamed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return renamed


def give_as(module: nn.Module, old: str, new: str) -> None:
    """Makes callers give an argument of a module by a new name, which its signature hides."""
    forward = module.forward

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if new in kwargs:
            kwargs[old] = kwargs.pop(new)
        return forward(*args, **kwargs)

    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {new if name == old else name: value for name, value in kwargs.items()}

    module.forward = renamed
    module.register_forward_pre_hook(give, with_kwargs=True)


def own(name: str) -> str:
    """What the installed transformers calls an argument."""
    return oracle.CACHE if name == "cache" else name


def assert_refused_or_right(model: PreTrainedModel, preset: Mapping[str, object]) -> bool:
    """Whether pruning was refused; else it must be what masking gives."""
    inputs = tiny.ragged("llava_onevision", model, "mixed")
    for options in ({}, {"cache_implementation": "static"}):
        try:
            with vtprune.pruning(model, preset) as trace:
                tokens, logits = oracle.generate(model, inputs, steps=3, **options)
        except ModelError as error:
            return bool(re.search(REFUSED, error.message))
        oracle.assert_masked(shared_model("llava_onevision"), inputs, trace, tokens, logits)
    return False


# -- the release ----------------------------------------------------------------------------------


def test_the_range_is_the_one_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"transformers{seams.RANGE}" in project["dependencies"]


@pytest.mark.parametrize("version", ["5.16.3", "5.25.0.dev0", "5.25.0", "6.0", "4.57.1"])
def test_a_release_outside_the_range_is_refused(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    for use in (lambda: vtprune.pruning(model).__enter__(), load):
        with pytest.raises(ModelError, match=r" is not .*>=5\.17,<5\.25") as caught:
            use()
        assert f"transformers {version}" in caught.value.message
        assert caught.value.hint == "pip install 'transformers>=5.17,<5.25'"


@pytest.mark.parametrize("version", ["5.17.0", "5.17.1", "5.23.0", "5.24.7", "5.24.0.post1"])
def test_a_release_inside_the_range_is_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    seams.check_version()


# -- arguments, when a block is entered -----------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "name"),
    [
        *(
            ("layer", n)
            for n in ("hidden_states", "attention_mask", "position_embeddings", "cache")
        ),
        *(("layer", n) for n in ("position_ids", "use_cache")),
        *(("decoder", n) for n in ("inputs_embeds", "attention_mask", "position_ids", "cache")),
        *(("inner", n) for n in ("input_ids", "attention_mask", "position_ids", "cache")),
        *(("inner", n) for n in ("pixel_values", "pixel_values_videos", "image_sizes")),
        *(("outer", n) for n in ("labels", "logits_to_keep", "cache", "pixel_values")),
    ],
)
def test_a_renamed_argument_is_refused_when_the_block_is_entered(
    model: PreTrainedModel, part: str, name: str
) -> None:
    decoder = model.get_decoder()
    module = {
        "layer": decoder.layers[4], "decoder": decoder, "inner": model.model, "outer": model
    }[part]  # fmt: skip
    assert own(name) in inspect.signature(module.forward).parameters
    module.forward = rename(module.forward, own(name), "next_name")
    with pytest.raises(ModelError, match=f"next_name.*{REFUSED}"), vtprune.pruning(model, BOTH):
        pass


@pytest.mark.parametrize("name", ["pixel_values", "image_sizes", "batch_num_images"])
def test_a_renamed_argument_of_an_encoder_is_refused(model: PreTrainedModel, name: str) -> None:
    encode = rename(model.model.get_image_features, name, "next_name")
    model.model.__dict__["get_image_features"] = encode
    with pytest.raises(ModelError, match=f"get_image_features.*{REFUSED}"), vtprune.pruning(model):
        pass


@pytest.mark.parametrize("part", ["layer", "decoder"])
@pytest.mark.parametrize("default", [inspect.Parameter.empty, None])
def test_a_new_argument_of_the_decoder_is_refused(
    model: PreTrainedModel, part: str, default: object
) -> None:
    decoder = model.get_decoder()
    module = decoder.layers[0] if part == "layer" else decoder
    forward = module.forward

    def more(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    new = inspect.Parameter("token_kinds", inspect.Parameter.KEYWORD_ONLY, default=default)
    *others, kwargs = signature.parameters.values()
    more.__signature__ = signature.replace(parameters=[*others, new, kwargs])  # type: ignore[attr-defined]
    module.forward = more
    with pytest.raises(ModelError, match=f"takes token_kinds.*{REFUSED}"), vtprune.pruning(model):
        pass


@pytest.mark.parametrize("part", ["layer", "decoder", "inner"])
def test_a_forward_that_names_no_arguments_is_refused(model: PreTrainedModel, part: str) -> None:
    decoder = model.get_decoder()
    module = {"layer": decoder.layers[0], "decoder": decoder, "inner": model.model}[part]
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert assert_refused_or_right(model, BOTH) == (part != "inner")


@pytest.mark.parametrize("name", ["get_image_features", "layers", "get_decoder"])
def test_a_part_by_another_name_is_refused(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "layers":
        model.get_decoder().blocks = model.get_decoder()._modules.pop("layers")
    elif name == "get_decoder":
        monkeypatch.delattr(transformers.PreTrainedModel, name)
        monkeypatch.delattr(type(model), name, raising=False)
    else:
        for one in seams.ENCODERS.values():
            monkeypatch.delattr(type(model.model), one)
    with pytest.raises(ModelError, match=REFUSED), vtprune.pruning(model):
        pass


@pytest.mark.parametrize("name", ["cache", "attention_mask", "inputs_embeds", "config"])
def test_a_renamed_argument_of_a_mask_function_is_refused(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    masks = transformers.masking_utils
    monkeypatch.setattr(
        masks, "create_causal_mask", rename(masks.create_causal_mask, own(name), "next_name")
    )
    with pytest.raises(ModelError, match=f"next_name.*{REFUSED}"), vtprune.pruning(model):
        pass


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Cache, "get_seq_length"), (Cache, "update"), (Cache, "reset")],
)
def test_a_method_of_caches_by_another_name_is_refused(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    monkeypatch.setattr(owner, f"{name}_of_next_month", getattr(owner, name), raising=False)
    monkeypatch.delattr(owner, name)
    with pytest.raises(ModelError, match=f"{name}.*{REFUSED}"), vtprune.pruning(model):
        pass


@pytest.mark.parametrize("name", ["keys", "values", "get_seq_length"])
def test_a_layer_of_a_cache_without_a_known_part_is_refused(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Renamed(DynamicLayer):
        def __getattribute__(self, asked: str) -> object:
            if asked == name:
                raise AttributeError(asked)
            return super().__getattribute__(asked)

    monkeypatch.setattr(transformers.cache_utils, "DynamicLayer", Renamed)
    with pytest.raises(ModelError, match=f"has no {name}.*{REFUSED}"), vtprune.pruning(model):
        pass


def test_layers_of_an_unknown_type_are_refused(model: PreTrainedModel) -> None:
    model.get_decoder().config.layer_types = ["full_attention"] * 5 + ["paged_attention"]
    with pytest.raises(ModelError, match=f"paged_attention.*{REFUSED}"), vtprune.pruning(model):
        pass


# -- arguments, in a forward ----------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "name", ["attention_mask", "position_embeddings", "position_ids", "cache", "hidden_states"]
)
def test_an_argument_that_a_signature_hides_is_refused_or_harmless_in_layers(
    model: PreTrainedModel, preset: str, name: str
) -> None:
    for layer in model.get_decoder().layers:
        give_as(layer, own(name), "next_name")
    refused = assert_refused_or_right(model, PRESETS[preset])
    assert refused or preset == "input" or name == "hidden_states"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "cache", "inputs_embeds"])
def test_an_argument_that_a_signature_hides_is_refused_in_the_decoder(
    model: PreTrainedModel, preset: str, name: str
) -> None:
    give_as(model.get_decoder(), own(name), "next_name")
    assert assert_refused_or_right(model, PRESETS[preset])


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "cache", "input_ids"])
def test_an_argument_that_a_signature_hides_is_refused_in_the_inner_model(
    family: str, name: str
) -> None:
    model = copy.deepcopy(shared_model(family))
    inputs = tiny.ragged(family, model, "image")
    give_as(model.model, own(name), "next_name")
    with (
        pytest.raises(ModelError, match=f"is given next_name.*{REFUSED}"),
        vtprune.pruning(model, BOTH),
    ):
        oracle.generate(model, inputs, steps=2)


@pytest.mark.parametrize("preset", PRESETS)
def test_states_and_masks_given_by_place_are_cut_as_those_given_by_name(
    model: PreTrainedModel, preset: str
) -> None:
    for layer in model.get_decoder().layers:
        _give_by_place(layer)
    assert not assert_refused_or_right(model, PRESETS[preset])


def _give_by_place(layer: nn.Module) -> None:
    order = [n for n in inspect.signature(layer.forward).parameters if n != "kwargs"]

    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        named = {**dict(zip(order, args, strict=False)), **kwargs}
        placed = tuple(named.pop(name, None) for name in order)
        return placed, named

    layer.register_forward_pre_hook(give, with_kwargs=True)


# -- caches ---------------------------------------------------------------------------------------


class Output(dict[str, object]):
    """What a decoder of next month gives back."""

    def __getattr__(self, name: str) -> object:
        return self[name]


def test_a_cache_is_found_in_an_output_whatever_its_name() -> None:
    cache, states = DynamicCache(), torch.zeros(1)
    assert seams.output_cache(Output(last_hidden_state=states, key_values=cache)) is cache
    assert seams.output_cache((states, cache)) is cache
    assert seams.output_cache(Output(last_hidden_state=states)) is None
    with pytest.raises(ModelError, match=f"holds no cache.*{REFUSED}"):
        seams.cache_made(Output(logits=torch.zeros(1)))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_tuple_for_an_output_is_marked_as_well(model: PreTrainedModel, preset: str) -> None:
    inputs = tiny.inputs("llava_onevision", model, "image")
    with torch.no_grad(), vtprune.pruning(model, PRESETS[preset]):
        output = model(**inputs, use_cache=True, return_dict=False)
        cache = seams.output_cache(output)
        assert cache is not None
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        token = output[0][:, -1:].argmax(-1)
        again = model(input_ids=token, **{oracle.CACHE: cache}, use_cache=True)
    with vtprune.pruning(model, PRESETS[preset]):
        expected = oracle.generate(model, inputs, steps=2)[1][:, 1]
    torch.testing.assert_close(again.logits[:, -1], expected, atol=1e-5, rtol=0)


@pytest.fixture(params=["dynamic", "static"])
def cache_options(request: pytest.FixtureRequest) -> dict[str, str]:
    return {} if request.param == "dynamic" else {"cache_implementation": "static"}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_decoder_that_goes_on_with_another_cache_is_refused(
    model: PreTrainedModel, preset: str, cache_options: dict[str, str]
) -> None:
    decoder = model.get_decoder()
    forward = decoder.forward

    @functools.wraps(forward)
    def swap(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output[oracle.CACHE] = copy.deepcopy(output[oracle.CACHE])
        return output

    decoder.forward = swap
    inputs = tiny.inputs("llava_onevision", model, "image")
    with (
        pytest.raises(ModelError, match=f"not the one that it was given.*{REFUSED}"),
        vtprune.pruning(model, PRESETS[preset]),
    ):
        oracle.generate(model, inputs, steps=2, **cache_options)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_layer_that_leaves_the_cache_as_it_was_is_refused(
    model: PreTrainedModel, preset: str, cache_options: dict[str, str]
) -> None:
    layer = model.get_decoder().layers[4]
    forward = layer.forward

    @functools.wraps(forward)
    def forget(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, oracle.CACHE: None})

    layer.forward = forget
    inputs = tiny.inputs("llava_onevision", model, "image")
    with (
        pytest.raises(ModelError, match=f"layer 4 of the cache holds 0 keys.*{REFUSED}"),
        vtprune.pruning(model, PRESETS[preset]),
    ):
        oracle.generate(model, inputs, steps=2, **cache_options)


def test_a_decoder_that_was_asked_for_a_cache_and_gives_none_is_refused(
    model: PreTrainedModel,
) -> None:
    def outside(module: nn.Module, args: Any, output: Any) -> Any:
        output[oracle.CACHE] = None
        return output

    model.get_decoder().register_forward_hook(outside)
    inputs = tiny.inputs("llava_onevision", model, "image")
    with (
        torch.no_grad(),
        pytest.raises(ModelError, match=f"does not hold its cache.*{REFUSED}"),
        vtprune.pruning(model, INPUT),
    ):
        model(**inputs, use_cache=True)


@pytest.mark.parametrize("preset", ["input", "both"])
def test_new_tokens_placed_by_the_length_of_the_shorter_cache_are_refused(
    model: PreTrainedModel, preset: str
) -> None:
    """As if a release asked caches for their length by another name."""
    forward = model.model.forward

    @functools.wraps(forward)
    def place(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs[oracle.CACHE]
        past = type(cache).get_seq_length(cache)
        if past:
            kwargs["position_ids"] = torch.tensor([[past]])
        return forward(*args, **kwargs)

    model.model.forward = place
    inputs = tiny.inputs("llava_onevision", model, "image")
    with (
        pytest.raises(ModelError, match=f"at position .* inside the prompt.*{REFUSED}"),
        vtprune.pruning(model, PRESETS[preset]),
    ):
        oracle.generate(model, inputs, steps=2)


@pytest.mark.parametrize("preset", ["layer", "both"])
def test_a_cut_cache_that_lost_its_mark_is_refused(model: PreTrainedModel, preset: str) -> None:
    inputs = tiny.inputs("llava_onevision", model, "image")
    with torch.no_grad(), vtprune.pruning(model, PRESETS[preset]):
        cache = model(**inputs, use_cache=True)[oracle.CACHE]
        copied = DynamicCache()
        copied.layers = cache.layers
        token = inputs["input_ids"][:, -1:]
        with pytest.raises(ModelError, match=f"lost what was cut.*{REFUSED}"):
            model(input_ids=token, **{oracle.CACHE: copied}, use_cache=True)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_copy_of_a_cut_cache_is_one_as_well(
    model: PreTrainedModel, preset: str, copied: Callable[[Cache], Cache]
) -> None:
    inputs = tiny.inputs("llava_onevision", model, "image")
    token = inputs["input_ids"][:, -1:]
    logits = []
    for change in (lambda cache: cache, copied):
        with torch.no_grad(), vtprune.pruning(model, PRESETS[preset]):
            cache = change(model(**inputs, use_cache=True)[oracle.CACHE])
            for _ in range(2):
                given = {"input_ids": token, oracle.CACHE: cache}
                logits.append(model(**given, use_cache=True).logits)
    assert torch.equal(logits[1], logits[3])


def test_a_cache_that_is_none_of_transformers_is_refused(model: PreTrainedModel) -> None:
    inputs = tiny.inputs("llava_onevision", model, "image")
    del inputs["attention_mask"]
    for cache in (((torch.zeros(1),),), object()):
        with (
            torch.no_grad(),
            pytest.raises(ModelError, match="no list of layers"),
            vtprune.pruning(model, INPUT),
        ):
            model(**inputs, **{oracle.CACHE: cache}, use_cache=True)


def test_a_sliding_window_that_the_config_hides_is_refused(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    cache.layers = [transformers.cache_utils.DynamicSlidingWindowLayer(sliding_window=4)] * 6
    inputs = tiny.inputs("llava_onevision", model, "image")
    with (
        torch.no_grad(),
        pytest.raises(ModelError, match=f"layer 0 of the cache has a sliding window.*{REFUSED}"),
        vtprune.pruning(model, INPUT),
    ):
        model(**inputs, **{oracle.CACHE: cache}, use_cache=True)


# -- attention kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scaling", "attention_mask"])
def test_a_kernel_that_is_given_arguments_by_other_names_is_refused(name: str) -> None:
    from vtprune.engine.readings import read_call

    states = torch.zeros(1, 2, 3, 4)
    given: dict[str, object] = {"scaling": 0.5, "attention_mask": None, "dropout": 0.0}
    assert read_call(states, states, (), given).scale == 0.5
    given["next_name"] = given.pop(name)
    with pytest.raises(ModelError, match=f"attention kernel.*{REFUSED}"):
        read_call(states, states, (), given)
    with pytest.raises(ModelError, match=f"is given sinks.*{REFUSED}"):
        read_call(states, states, (None,), {"scaling": 0.5, "sinks": torch.zeros(2)})


def test_a_tower_whose_output_has_other_names_is_refused() -> None:
    from vtprune.engine.pixel_selection import ReducedTower

    rows = torch.tensor([True, False])
    reduced = ReducedTower(rows, tokens=rows.repeat_interleave(3))
    output = reduced.after_tower(nn.Identity(), (), SimpleNamespace(pooler_output=torch.ones(3, 2)))
    assert output.pooler_output.sum(1).tolist() == [2.0] * 3 + [0.0] * 3  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=f"no pooler_output or deepstack_features.*{REFUSED}"):
        reduced.after_tower(nn.Identity(), (), SimpleNamespace(pooled=torch.ones(3, 2)))


# -- one place ------------------------------------------------------------------------------------


def test_the_names_that_were_renamed_stand_in_one_module() -> None:
    for path in (ROOT / "vtprune").rglob("*.py"):
        if path.name != "seams.py":
            text = path.read_text(encoding="utf-8")
            assert not [name for name in seams.RENAMED if name in text], path
