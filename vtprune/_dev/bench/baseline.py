"""The same work in the plain published way, beside ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from vtprune._dev.bench.prefill import UNPRUNED
from vtprune._dev.bench.results import Pass, Results, Side, run_in
from vtprune._dev.bench.selection import HEAD_DIM, SHAPE, TEXT
from vtprune._dev.bench.subject import build_subject, one_stage
from vtprune.device import time_warm
from vtprune.engine.readings import AttentionRows, KernelCall, attention_rows
from vtprune.evaluation.profiling.prompts import ProfiledMedia
from vtprune.evaluation.profiling.shapes import find_shape
from vtprune.pruners.entropy import token_entropy

PLAIN, OURS = "plain", "ours"


def measure_scores(
    results: Results, num_tokens: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> list[Pass]:
    """Scores of one layer of a 7B decoder: attention received, and matrix entropy.

    Plain: the whole attention map, of which one row is used; float64 eigenvalues of the Gram matrix
    over the states' width. Between them the float64 Gram matrix over heads of the released code.
    """
    settings = {
        "tokens": num_tokens,
        **run_in(device, dtype),
    }

    def sides() -> Mapping[str, Side]:
        made: dict[str, Callable[[], object]] = {
            "whole attention map": partial(plain_attention, *states(num_tokens, device, dtype)),
            "attention, ours": partial(own_attention, *states(num_tokens, device, dtype)),
        }
        query = states(num_tokens, device, dtype)[0][0].transpose(0, 1)[:num_tokens]  # (N, H, D)
        made |= {
            "entropy, float64 over width": partial(plain_entropy, query),
            "entropy, float64 over heads": partial(token_entropy, query, "row", double=True),
            "entropy, ours": partial(token_entropy, query, "row"),
        }
        return {name: partial(timed, work, device) for name, work in made.items()}

    return results.measure("scores", settings, sides, repeats, device, warm_up=False)


def timed(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    return {"seconds": time_warm(work, device)}


def states(
    num_tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of one layer, (1, H, L, D), random."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, SHAPE.heads, num_tokens + TEXT, HEAD_DIM)
    query, key = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    return query.to(dtype), key.to(dtype)


def plain_attention(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What the last token attends to, from the map of all tokens."""
    length = query.shape[2]
    scores = query @ key.transpose(2, 3) * HEAD_DIM**-0.5  # (1, H, L, L)
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores.masked_fill_(future, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).mean(1)[0, -1]


def own_attention(query: torch.Tensor, key: torch.Tensor) -> object:
    """The same from one row, as the methods read it."""
    last = query.shape[2] - 1
    columns = torch.arange(last + 1)
    rows = AttentionRows(torch.tensor([last]), columns, columns)
    return attention_rows(KernelCall(query, key, HEAD_DIM**-0.5), [rows])


def plain_entropy(states: torch.Tensor) -> torch.Tensor:
    """(N,) matrix entropy through the D x D Gram matrices, float64.

    Args:
        states: (N, H, D).
    """
    scores = []
    for part in states.split(256):
        rows = part.double()
        rows = rows - rows.mean(dim=1, keepdim=True)
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        values = torch.linalg.eigvalsh(rows.transpose(1, 2) @ rows / rows.shape[1])
        values = values.clamp_min(1e-10)
        scores.append(-(values * values.log()).sum(dim=-1))
    return torch.cat(scores)


def measure_kernels(
    results: Results,
    model: str,
    shown: ProfiledMedia | None,
    keep: float,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> list[Pass]:
    """The same cut by attention, `fastv` at layer 2: eager attention in all layers, and ours."""
    settings = {
        "model": model,
        **run_in(device, dtype),
        "keep": keep,
    }

    def sides() -> Mapping[str, Side]:
        preset = one_stage("2", "fastv", keep)
        made: dict[str, Side] = {}
        for name, attention in ((PLAIN, "eager"), (OURS, "sdpa")):
            subject = build_subject(find_shape(model), shown, device, dtype, attention=attention)
            made[f"{UNPRUNED}, {attention}"] = partial(subject.run, None)
            made[f"{name}: fastv, {attention}"] = partial(subject.run, preset)
        return made

    return results.measure("kernels", settings, sides, repeats, device)
