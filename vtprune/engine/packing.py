"""Rows of different length as one left-padded batch, and tensors gathered into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vtprune.device import send


@dataclass(frozen=True, eq=False)
class Packed:
    """B sequences packed to the right, padded on the left.

    Args:
        columns: for each row its (n_b,) int64 ascending columns of the batch it was cut from.
        index: (B, n) int64 column in every slot; 0 in a padding slot.
        valid: (B, n) bool, False in padding slots; None where there are none.
    """

    columns: tuple[torch.Tensor, ...]
    index: torch.Tensor
    valid: torch.Tensor | None

    @property
    def length(self) -> int:
        return int(self.index.shape[1])

    def slots(self, sample: int, columns: torch.Tensor) -> torch.Tensor:
        """Return the slots that hold a sample's columns."""
        held = self.columns[sample]
        return torch.searchsorted(held, columns) + self.length - len(held)


def pack(columns: Sequence[torch.Tensor]) -> Packed:
    """Pack the rows' columns, each (n_b,) int64 ascending, to the longest row."""
    length = max(len(row) for row in columns)
    if all(len(row) == length for row in columns):
        return Packed(tuple(columns), torch.stack(list(columns)), None)
    index = torch.zeros(len(columns), length, dtype=torch.long)
    valid = torch.zeros(len(columns), length, dtype=torch.bool)
    for number, row in enumerate(columns):
        index[number, length - len(row) :] = row
        valid[number, length - len(row) :] = True
    return Packed(tuple(columns), index, valid)


def repack(before: Packed, after: Packed) -> Packed:
    """Return `after` with its columns counted in the slots of `before`, which holds them all."""
    columns, index = [], torch.zeros_like(after.index)
    for number, left in enumerate(after.columns):
        row = before.slots(number, left)
        columns.append(row)
        index[number, after.length - len(row) :] = row
    return Packed(tuple(columns), index, after.valid)


def gather(states: torch.Tensor, index: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Take the slots `index`, (B, n), along `dim`; the dimension before it is B, or 1."""
    index = send(index, states.device)
    shape = list(states.shape)
    shape[dim - 1] = index.shape[0]
    states = states.expand(shape)
    shape[dim] = index.shape[1]
    around = [1] * states.dim()
    around[dim - 1], around[dim] = index.shape
    return states.gather(dim, index.view(around).expand(shape))


def gather_marked(
    marked: torch.Tensor, rows: torch.Tensor, packed: Packed, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the marked columns that are left after a cut, and their rows.

    Args:
        marked: (B, S) bool.
        rows: (V, d), one for each marked column, sample by sample.
        packed: what is left of the S columns.
        count: marked columns that are left.
    """
    index = send(packed.index, marked.device)
    number = (marked.flatten().cumsum(0) - 1).view_as(marked)  # (B, S) row of a marked column
    left = marked.gather(1, index)
    if packed.valid is not None:
        left &= send(packed.valid, marked.device)
    places = (~left).flatten().byte().argsort(stable=True)[:count]
    return left, rows[send(number.gather(1, index).flatten()[places], rows.device)]
