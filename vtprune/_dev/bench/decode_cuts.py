"""Decoding with and without cuts of the KV cache meanwhile: seconds a token, and bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vtprune._dev.bench.subject import Subject
from vtprune.engine import pruning
from vtprune.engine.inputs import PreparedInputs
from vtprune.engine.kv_cache import fork_cache, pruned_cache
from vtprune.inference.forced_answers import logits_to_keep_argument
from vtprune.models.seams import cache_argument, cache_made
from vtprune.preset.spec import DecodeSpec, Preset

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


@dataclass(frozen=True)
class Decoded:
    """One answer of a fixed length.

    Args:
        seconds: of all its tokens.
        last: of a token after the last cut, median.
        keys: bytes of the keys and values that the cache holds at the end.
    """

    seconds: float
    last: float
    keys: int


def compare_decoding(
    subject: Subject, decode: DecodeSpec, tokens: int, repeats: int
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
def prefilled(subject: Subject, preset: Preset) -> Iterator[Cache]:
    """Prefill the subject's prompt in a block that stays open."""
    loaded = subject.loaded
    inputs = PreparedInputs.of(subject.tensors, [subject.case.inputs])
    with torch.no_grad(), pruning(loaded.model, preset, inputs=inputs):
        keep = logits_to_keep_argument(loaded, 1)
        yield cache_made(loaded.model(**subject.tensors, use_cache=True, **keep))


def decode_tokens(subject: Subject, cache: Cache, tokens: int) -> Decoded:
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
    """Return the ratios of without to with cuts: medians of the pairs, lowest and highest."""
    lines = []
    for name, values in {
        "tokens a second, whole answer": [one.seconds / other.seconds for one, other in pairs],
        "tokens a second, last quarter": [one.last / other.last for one, other in pairs],
        "bytes of keys and values, uncut / cut": [one.keys / other.keys for one, other in pairs],
    }.items():
        middle, low, high = statistics.median(values), min(values), max(values)
        lines.append(f"{name}: {middle:.2f} x ({low:.2f} to {high:.2f})\n")
    first = pairs[0]
    lines.append(
        f"uncut: {1000 * statistics.median(p[0].seconds for p in pairs) / tokens:.0f} ms a token, "
        f"{first[0].keys / 1e6:.1f} MB; cut: "
        f"{1000 * statistics.median(p[1].seconds for p in pairs) / tokens:.0f} ms, "
        f"{first[1].keys / 1e6:.1f} MB at the end\n"
    )
    return "".join(lines)
