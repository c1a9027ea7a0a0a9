"""A cache that was cut, in any order of what can be done with it: equal to masked, or refused."""

from __future__ import annotations

import copy
import functools
import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import tiny
import torch
from conftest import shared_model
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache, cache_utils
from transformers.cache_utils import Cache

import vtprune
from vtprune.engine.trace import Trace
from vtprune.evaluation.checking import oracle
from vtprune.models.seams import cache_argument

Batch = dict[str, torch.Tensor]
PRESETS: dict[str, list[dict[str, object]]] = {
    "input": [{"at": "input", "method": "random", "keep": 0.4}],
    "layer": [{"at": 2, "method": "random", "keep": 0.3}],
    "two": [
        {"at": "input", "method": "random", "keep": 0.7},
        {"at": 3, "method": "entropy", "keep": 0.2},
    ],
}
ACTS = ("decode", "question", "crop", "reorder", "fork", "empty")
LONGEST = 300


def recorded(config: PreTrainedConfig) -> Cache:
    """A cache whose windows can be taken back, as assisted generation makes it."""
    cache = DynamicCache(config=config)
    cache.activate_past_recording()
    return cache


CACHES: dict[str, Callable[[PreTrainedConfig], Cache]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config, max_cache_len=LONGEST),
    "recorded": recorded,
    "offloaded": lambda config: DynamicCache(config=config, offloading=True),
    "offloaded static": lambda config: StaticCache(config, LONGEST, offloading=True),
    "quantised": lambda config: cache_utils.QuantizedCache("fp8", config),
}
GROWING = ("dynamic", "recorded", "offloaded")
"""Those that transformers can crop, and take rows of by their numbers."""


@dataclass
class Walk:
    """A cache, and the prompt that it stands for, which the model without one is given whole."""

    model: PreTrainedModel
    unpruned: PreTrainedModel
    inputs: Batch
    kind: str
    trace: Trace
    random: random.Random
    cache: Cache | None = None
    drops: oracle.Drops = ()
    since: int = 0
    done: list[str] = field(default_factory=list)

    def prefill(self) -> None:
        self.cache = self.cache or CACHES[self.kind](self.model.get_decoder().config)
        logits = self.forward(self.inputs)
        self.drops, self.since = oracle.dropped(self.trace), 0
        self.check(logits)

    def forward(self, inputs: Batch) -> torch.Tensor:
        given = cache_argument(self.model, self.cache)
        return self.model(**inputs, **given, use_cache=True).logits

    def add(self, count: int) -> None:
        """Decode a token, or ask a further question, on the cache."""
        rows = len(self.inputs["input_ids"])
        new = torch.tensor([[self.random.randrange(32, 127) for _ in range(count)]] * rows)
        mask = torch.cat([self.inputs["attention_mask"], torch.ones_like(new)], dim=1)
        logits = self.forward({"input_ids": new, "attention_mask": mask})
        ids = torch.cat([self.inputs["input_ids"], new], dim=1)
        self.inputs |= {"input_ids": ids, "attention_mask": mask}
        self.since += count
        self.check(logits)

    def decode(self) -> None:
        self.add(1)

    def question(self) -> None:
        self.add(self.random.randint(2, 5))

    def crop(self) -> None:
        """Take the last tokens back, as assisted generation does."""
        if self.kind not in GROWING or not self.since:
            return
        count = self.random.randint(1, self.since)
        length = self.inputs["input_ids"].shape[1] - count
        self.cache.crop(-count)
        for name in ("input_ids", "attention_mask"):
            self.inputs[name] = self.inputs[name][:, :length]
        self.since -= count
        self.decode()

    def reorder(self) -> None:
        """Take rows of each other, as beams do."""
        rows = len(self.inputs["input_ids"])
        index = torch.tensor([self.random.randrange(rows) for _ in range(rows)])
        if self.kind not in GROWING or self.random.random() < 0.5:
            self.cache.reorder_cache(index)
        else:
            self.cache.batch_select_indices(index)
        self.inputs = {name: value[index] for name, value in self.inputs.items()}
        self.drops = [(layer, [columns[i] for i in index]) for layer, columns in self.drops]
        self.decode()

    def fork(self) -> None:
        """Go on with a copy."""
        self.cache = copy.deepcopy(self.cache)
        self.decode()

    def empty(self) -> None:
        """Use the cache for another prompt."""
        self.cache.reset()
        if "static" not in self.kind:
            self.cache = None
        length = self.inputs["input_ids"].shape[1] - self.since
        for name in ("input_ids", "attention_mask"):
            self.inputs[name] = self.inputs[name][:, :length]
        self.prefill()

    def check(self, logits: torch.Tensor) -> None:
        with oracle.masking(self.unpruned, self.drops):
            expected = self.unpruned(**self.inputs, use_cache=False).logits
        torch.testing.assert_close(logits[:, -1], expected[:, -1], atol=1e-5, rtol=0)


@functools.cache
def another(name: str) -> PreTrainedModel:
    """A model with the same weights, outside of all blocks."""
    return tiny.model(name)


def walk(
    model: PreTrainedModel, unpruned: PreTrainedModel, inputs: Batch, preset: str, kind: str,
    order: random.Random,
) -> None:  # fmt: skip
    with torch.no_grad(), vtprune.pruning(model, {"stages": PRESETS[preset]}) as trace:
        walked = Walk(model, unpruned, dict(inputs), kind, trace, order)
        walked.prefill()
        for act in order.choices(ACTS, k=8):
            walked.done.append(act)
            getattr(walked, act)()


CASES = [
    (name, kind, preset, rows)
    for name in ("llava_onevision", "llava")
    for kind in ("dynamic", "static")
    for preset in PRESETS
    for rows in ("one", "ragged")
]


@pytest.mark.parametrize(("name", "kind", "preset", "rows"), CASES)
def test_every_state_of_a_pruned_cache_equals_masked(
    name: str, kind: str, preset: str, rows: str
) -> None:
    model = shared_model(name)
    inputs = (tiny.inputs if rows == "one" else tiny.ragged)(name, model, "image")
    order = random.Random(CASES.index((name, kind, preset, rows)))
    walk(model, another(name), inputs, preset, kind, order)


# -- caches of other kinds -------------------------------------------------------------------------


class NoStream:
    """Stands for a stream of a GPU: everything has happened before the next line."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass


@pytest.mark.parametrize("kind", ["offloaded", "offloaded static"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_state_of_an_offloaded_cache_equals_masked(
    preset: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers' own calls for offloading, with the CPU on both sides."""
    offloads: list[int] = []
    offload = Cache.offload

    def noted(cache: Cache, layer: int, *args: object, **kwargs: object) -> None:
        offloads.append(layer)
        offload(cache, layer, *args, **kwargs)

    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    monkeypatch.setattr(Cache, "offload", noted)
    name = "llava_onevision"
    model = shared_model(name)
    order = random.Random(f"{preset} {kind}")
    walk(model, another(name), tiny.ragged(name, model, "image"), preset, kind, order)
    assert set(offloads) == set(range(model.get_decoder().config.num_hidden_layers))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_state_of_a_quantised_cache_equals_masked(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantised layer's own storage, with values that lose nothing in it."""
    layer = getattr(cache_utils, "Fp8QuantizedLayer", None)
    if layer is None:
        pytest.skip("this transformers has no quantised cache that needs no package")
    monkeypatch.setattr(layer, "_quantize", lambda self, states, scale=None: (states, 1.0))
    name = "llava_onevision"
    model = shared_model(name)
    order = random.Random(f"{preset} quantised")
    walk(model, another(name), tiny.ragged(name, model, "image"), preset, "quantised", order)


@pytest.mark.parametrize(("backend", "package"), [("quanto", "optimum"), ("hqq", "hqq")])
def test_a_quantised_cache_without_its_package_is_refused(backend: str, package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    model = shared_model("llava_onevision")
    options = {"cache_implementation": "quantized", "cache_config": {"backend": backend}}
    inputs = tiny.inputs("llava_onevision", model, "image")
    with (
        vtprune.pruning(model, {"stages": PRESETS["two"]}),
        pytest.raises(ImportError, match=f"(?i){package}"),
    ):
        model.generate(**inputs, **options, max_new_tokens=1)


@functools.cache
def windowed() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model all of whose layers see the last 24 tokens alone, and its like outside of blocks."""
    models = tiny.model("llava_next_mistral"), tiny.model("llava_next_mistral")
    for model in models:
        model.get_decoder().config.sliding_window = 24
    return models


@pytest.mark.parametrize("rows", ["one", "ragged"])
@pytest.mark.parametrize("kind", ["recorded", "static"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_state_of_a_cache_with_windows_equals_masked(
    preset: str, kind: str, rows: str
) -> None:
    model, unpruned = windowed()
    name = "llava_next_mistral"
    inputs = (tiny.inputs if rows == "one" else tiny.ragged)(name, model, "image")
    walk(model, unpruned, inputs, preset, kind, random.Random(f"{preset} {kind} {rows}"))
