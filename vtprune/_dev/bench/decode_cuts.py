"""Decoding with and without cuts of the KV cache meanwhile: seconds a token, and bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vtprune._dev.bench.subject import BenchSubject
from vtprune._dev.bench.tables import spread
from vtprune.engine import pruning
from vtprune.engine.inputs import PreparedInputs
from vtprune.engine.kv_cache import fork_cache, pruned_cache
from vtprune.inference.forced_answers import prefill
from vtprune.models.seams import cache_argument
from vtprune.preset.spec import DecodeSpec, Preset

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


@dataclass(frozen=True)
class Decoded:
    """One answer of a fixed length.

    Args:
        seconds: of all its tokens.
        last: of a token after the last cut, median.
        cache_bytes: of the keys and values that the cache holds at the end.
    """

    seconds: float
    last: float
    cache_bytes: int


def compare_decoding(
    subject: BenchSubject, decode: DecodeSpec, tokens: int, repeats: int
) -> list[tuple[Decoded, Decoded]]:
    """Return answers without and with cuts, in turns, on the cache of one prefill."""
    with prefilled(subject, Preset(decode=decode)) as cache:
        decode_tokens(subject, fork_cache(cache), 2)  # a warm-up
        pairs = []
        for _ in range(repeats):
            uncut = fork_cache(cache)
            note = pruned_cache(uncut)
            assert note is not None
            note.decoding = None
            pairs.append(
                (
                    decode_tokens(subject, uncut, tokens),
                    decode_tokens(subject, fork_cache(cache), tokens),
                )
            )
    return pairs


@contextmanager
def prefilled(subject: BenchSubject, preset: Preset) -> Iterator[Cache]:
    """Prefill the subject's prompt in a block that stays open."""
    loaded = subject.loaded
    inputs = PreparedInputs.of(subject.tensors, [subject.case.inputs])
    with torch.no_grad(), pruning(loaded.model, preset, inputs=inputs):
        yield prefill(loaded, subject.tensors)[1]


def decode_tokens(subject: BenchSubject, cache: Cache, tokens: int) -> Decoded:
    """Decode tokens one by one."""
    model = subject.loaded.model
    argument = cache_argument(model, cache)
    ids = torch.full((1, 1), 100, device=model.device)
    laps = []
    for _ in range(tokens):
        started = time.perf_counter()
        output = model(input_ids=ids, use_cache=True, **argument)
        ids = output.logits[:, -1:].argmax(-1)
        laps.append(time.perf_counter() - started)
    states = [getattr(layer, name) for layer in cache.layers for name in ("keys", "values")]
    held = sum(int(tensor.nbytes) for tensor in states)
    return Decoded(sum(laps), statistics.median(laps[-max(tokens // 4, 1) :]), held)


def describe(pairs: list[tuple[Decoded, Decoded]], tokens: int) -> str:
    """Return medians of the pairs' ratios, uncut to cut, with the least and the greatest."""
    lines = []
    for name, values in {
        "tokens a second, cut to uncut, whole answer": [
            uncut.seconds / cut.seconds for uncut, cut in pairs
        ],
        "tokens a second, cut to uncut, last quarter": [
            uncut.last / cut.last for uncut, cut in pairs
        ],
        "bytes of keys and values, uncut to cut": [
            uncut.cache_bytes / cut.cache_bytes for uncut, cut in pairs
        ],
    }.items():
        lines.append(f"{name}: {spread(values)}\n")
    for name, answers in zip(("uncut", "cut"), zip(*pairs, strict=True), strict=True):
        seconds = statistics.median(answer.seconds for answer in answers) / tokens
        megabytes = answers[0].cache_bytes / 1e6
        lines.append(f"{name}: {1000 * seconds:.0f} ms a token, {megabytes:.1f} MB at the end\n")
    return "".join(lines)
