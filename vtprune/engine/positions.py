"""Position ids without gaps, from the cuts on that renumber them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vtprune.engine.packing import gather
from vtprune.engine.present import Present


class Positions:
    """The position ids of a prompt, where a stage gives new ones.

    Args:
        first: as `first_positions` gives them; None where no stage does.

    Attributes:
        now: (B, n) of the sequence as it is now; None as long as they are the original ones.
    """

    def __init__(self, first: torch.Tensor | None) -> None:
        self.first = first
        self.now: torch.Tensor | None = None
        self.shifts: list[tuple[int, torch.Tensor]] = []

    def follow(self, present: Present, layer: int, renumber: bool, device: torch.device) -> None:
        """Those after a cut.

        Args:
            renumber: whether a stage of this cut gives new ones.
        """
        if renumber:
            assert self.first is not None
            packed = present.packed
            lengths = torch.tensor([len(row) for row in packed.columns])
            slots = torch.arange(packed.length)[None] - (packed.length - lengths)[:, None]
            self.now = (self.first[:, :1] + slots.clamp_min(0)).to(device)
            end = self.first[:, 0] + lengths
            self.shifts.append((layer, self.first[:, 1] - end))
        elif self.now is not None:
            self.now = gather(self.now, present.last_cut.index)

    def by_layer(self, num_layers: int) -> list[torch.Tensor | None]:
        """For every layer the (B,) int64 by which its positions are less than the original ones.

        None where they are the original ones; empty where all are.
        """
        if not self.shifts:
            return []
        found: list[torch.Tensor | None] = []
        for layer in range(num_layers):
            own = [shift for first, shift in self.shifts if first <= layer]
            found.append(own[-1] if own else None)
        return found


def first_positions(positions: object, columns: Sequence[torch.Tensor], past: int) -> torch.Tensor:
    """(B, 2) int64: every sample's first position in this forward, and the one after its last.

    Args:
        positions: (B or 1, S) as the decoder was given them; None: columns counted from `past`.
    """
    rows = []
    for sample, row in enumerate(columns):
        if isinstance(positions, torch.Tensor):
            own = positions[min(sample, len(positions) - 1)].cpu()
            rows.append([int(own[row[0]]), int(own[row[-1]]) + 1])
        else:
            rows.append([past + int(row[0]), past + int(row[-1]) + 1])
    return torch.tensor(rows)
