"""Seconds of the output head, timed once and on its own: in large vocabularies it is slow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn

from vtprune.device import now

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEW = 128  # rows of the head that is left for other runs; tokens are chosen among them
SOME = 8192  # rows that are timed first
LONG = 0.02  # of the budget


@dataclass(frozen=True)
class HeadSeconds:
    """Of the whole head, at one position.

    Args:
        prefill: of a position cut out of a prompt's states, as models do; on some CPUs that takes
            another, slower way through the matrix product.
        decode: of a position on its own.
    """

    prefill: float = 0.0
    decode: float = 0.0


def time_head(model: PreTrainedModel, tokens: int, budget: float) -> HeadSeconds:
    """Times the head; where that would take long, a part of its rows.

    Args:
        tokens: of the prompt.
        budget: seconds that measuring may take.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return HeadSeconds()
    weight = head.weight
    states = torch.zeros(1, tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)
    cut = states[:, -1:, :]  # not a copy: its strides are the prompt's
    own = torch.zeros(1, 1, weight.shape[1], device=weight.device, dtype=weight.dtype)
    return HeadSeconds(*(time_rows(one, weight, LONG * budget) for one in (cut, own)))


def time_rows(states: torch.Tensor, weight: torch.Tensor, long: float) -> float:
    """Seconds of a product with all rows of a weight; from a part of them where it takes `long`."""
    some = min(SOME, len(weight))
    expected = time_product(states, weight[:some]) * len(weight) / some
    return expected if expected > long else time_product(states, weight)


def time_product(states: torch.Tensor, weight: torch.Tensor) -> float:
    """The median of a few times, the first left out."""
    took = []
    for _ in range(4):
        started = now(weight.device)
        nn.functional.linear(states, weight)
        took.append(now(weight.device) - started)
    return median(took[1:])


@contextmanager
def small_head(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the output head has few rows."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        yield
        return
    weight, bias = head.weight, head.bias
    try:
        head.weight = nn.Parameter(weight[:FEW], requires_grad=False)
        if bias is not None:
            head.bias = nn.Parameter(bias[:FEW], requires_grad=False)
        yield
    finally:
        head.weight, head.bias = weight, bias
