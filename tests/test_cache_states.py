"""A cache that was cut, in any order of what can be done with it: equal to masked, or refused."""

from __future__ import annotations

import copy
import functools
import random
from dataclasses import dataclass, field

import pytest
import tiny
import torch
from conftest import shared_model
from transformers import DynamicCache, PreTrainedModel, StaticCache
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


@dataclass
class Walk:
    """A cache, and the prompt that it stands for, which the model without one is given whole."""

    model: PreTrainedModel
    unpruned: PreTrainedModel
    inputs: Batch
    static: bool
    trace: Trace
    random: random.Random
    cache: Cache | None = None
    drops: oracle.Drops = ()
    since: int = 0
    done: list[str] = field(default_factory=list)

    def prefill(self) -> None:
        config = self.model.get_decoder().config
        empty = (
            StaticCache(config, max_cache_len=300) if self.static else DynamicCache(config=config)
        )
        self.cache = self.cache or empty
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
        if self.static or not self.since:
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
        if self.static or self.random.random() < 0.5:
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
        if not self.static:
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


CASES = [
    (name, static, preset, rows)
    for name in ("llava_onevision", "llava")
    for static in (False, True)
    for preset in PRESETS
    for rows in ("one", "ragged")
]


@pytest.mark.parametrize(("name", "static", "preset", "rows"), CASES)
def test_every_state_of_a_pruned_cache_equals_masked(
    name: str, static: bool, preset: str, rows: str
) -> None:
    model = shared_model(name)
    inputs = (tiny.inputs if rows == "one" else tiny.ragged)(name, model, "image")
    order = random.Random(CASES.index((name, static, preset, rows)))
    with torch.no_grad(), vtprune.pruning(model, {"stages": PRESETS[preset]}) as trace:
        walk = Walk(model, another(name), dict(inputs), static, trace, order)
        walk.prefill()
        for act in order.choices(ACTS, k=8):
            walk.done.append(act)
            getattr(walk, act)()
