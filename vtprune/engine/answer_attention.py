"""The attention of an answer's tokens to the visual ones, read while the answer is generated.

Each step's last query is the token that the next one is predicted from: its attention, mean over
heads, costs one row of a softmax a layer, and no forward of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vtprune.engine.hooks import Hooks, this_thread
from vtprune.engine.readings import KernelCall, KernelTap, last_row
from vtprune.engine.trace import Trace
from vtprune.errors import ModelError
from vtprune.models.structure import Structure


class AnswerAttention:
    """Attention rows of one answer: a batch of 1, without padding.

    Layers whose keys are as many hold the same tokens, so their rows are added up.

    Attributes:
        sums: keys of the prompt -> for every step its row, summed over the layers.
        layers: keys of the prompt -> the layers that have so many.
    """

    def __init__(self) -> None:
        self.sums: dict[int, list[torch.Tensor]] = {}
        self.layers: dict[int, list[int]] = {}
        self.group_of: dict[int, int] = {}
        self.step_of: dict[int, int] = {}

    def take(self, layer: int, call: KernelCall) -> None:
        """Add the last query's attention in one layer."""
        if len(call.query) != 1:
            raise ModelError("the attention of an answer is read one prompt at a time")
        with torch.no_grad():
            row = last_row(call)
        # The prompt; of layers that share keys transformers (5.23) asks for its last column alone.
        if call.query.shape[2] > 1 or layer not in self.group_of:
            length = len(row)
            self.group_of[layer], self.step_of[layer] = length, 0
            self.layers.setdefault(length, []).append(layer)
        group, step = self.group_of[layer], self.step_of[layer]
        self.step_of[layer] += 1
        rows = self.sums.setdefault(group, [])
        if step < len(rows):
            rows[step] = rows[step] + row
        else:
            rows.append(row)

    def to_visual(self, trace: Trace, length: int) -> torch.Tensor:
        """Return (steps, N) attention to the visual tokens of the prompt, mean over the layers.

        Args:
            trace: of the prefill; tokens that were dropped before a layer get nothing in it.
            length: columns of the prompt.
        """
        columns = trace.layouts[0].columns
        total = torch.zeros(max(map(len, self.sums.values()), default=0), len(columns))
        for group, rows in self.sums.items():
            present = columns_at(trace, self.layers[group][0], length)
            place = torch.searchsorted(present, columns)
            here = torch.isin(columns, present)
            for step, row in enumerate(rows):
                # A sliding window's cache holds the last keys alone.
                start = len(present) + step - len(row)
                slots = place - start
                seen = here & (slots >= 0)
                total[step, seen] += row.cpu()[slots[seen]]
        return total / max(sum(map(len, self.layers.values())), 1)


def columns_at(trace: Trace, layer: int, length: int) -> torch.Tensor:
    """Return the columns of the prompt that a layer sees, ascending."""
    present = torch.ones(length, dtype=torch.bool)
    for dropped in dropped_from(trace, layer):
        present[dropped] = False
    return present.nonzero().squeeze(1)


def dropped_from(trace: Trace, layer: int) -> Iterator[torch.Tensor]:
    """Yield the columns that each stage up to a layer dropped of the first sample."""
    columns = trace.layouts[0].columns
    for stage in trace.stages:
        if stage.layer <= layer:
            yield columns[~torch.isin(columns, torch.tensor(stage.kept[0], dtype=torch.long))]


@contextmanager
def read_answer_attention(structure: Structure) -> Iterator[AnswerAttention]:
    """Read the attention of what is generated inside the block, by this thread.

    Raises:
        ModelError: no layer's attention can be read.
    """
    reading = AnswerAttention()
    taps, reasons = [], []
    for number in range(len(structure.layers)):
        try:
            module = structure.attention_module(number)
            taps.append(KernelTap(module, functools.partial(reading.take, number)))
        except ModelError as reason:  # a layer without attention has none to read
            reasons.append(reason)
    if not taps:
        raise reasons[0]
    with Hooks(this_thread()) as hooks:
        for tap in taps:
            hooks.replace_during(tap.module, tap.registry, "get_interface", tap.get_interface)
        yield reading
