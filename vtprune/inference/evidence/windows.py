"""Windows of neighbouring visual tokens: within a frame, a base picture or a picture's tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from vtprune.tokens.layout import PATCH, Layout


@dataclass(frozen=True, eq=False)
class Cells:
    """Where each of N tokens lies on the planes of its media.

    A plane is a video's frame, a picture's base picture, or its tiles together. Planes of one
    media item and kind have one number of `stack`; those of a video follow each other in `time`.
    A token that shows no patch (a newline) lies beside the last patch of its row.

    Args:
        stack, time, row, col: (N,) int64.
        patch: (N,) bool.
    """

    stack: torch.Tensor
    time: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor
    patch: torch.Tensor

    @classmethod
    def of(cls, layout: Layout) -> Cells:
        """Return the cells of a layout."""
        grid = layout.grid
        stack = torch.unique(
            torch.stack([layout.media, (grid.tile > 0).long()]), dim=1, return_inverse=True
        )[1]
        patch = grid.kind == PATCH
        row, col = grid.row.clone(), grid.col.clone()
        for number in range(int(stack.max()) + 1 if len(stack) else 0):
            here = stack == number
            if bool((here & patch).any()):
                row[here] = row[here].clamp(max=int(row[here & patch].max()))
                col[here] = col[here].clamp(max=int(col[here & patch].max()))
        return cls(stack, grid.frame, row, col, patch)

    @cached_property
    def sizes(self) -> list[tuple[int, int, int]]:
        """Of each stack its planes, rows and columns."""
        sizes = []
        for number in range(int(self.stack.max()) + 1):
            here = self.stack == number
            last = [int(axis[here].max()) for axis in (self.time, self.row, self.col)]
            sizes.append((last[0] + 1, last[1] + 1, last[2] + 1))
        return sizes

    def windows(self, size: int, stride: int, steps: int = 1) -> torch.Tensor:
        """Return (R, N) bool, the tokens of each window that holds a patch.

        Args:
            size: rows and columns of a window.
            stride: from one to the next.
            steps: planes of a video that a window takes together.
        """
        masks = []
        for number, (planes, rows, cols) in enumerate(self.sizes):
            inside = (self.stack == number) & self.patch
            for first in range(0, planes, steps):
                in_time = inside & (self.time >= first) & (self.time < first + steps)
                for top in starts(rows, size, stride):
                    in_rows = in_time & (self.row >= top) & (self.row < top + size)
                    for left in starts(cols, size, stride):
                        masks.append(in_rows & (self.col >= left) & (self.col < left + size))
        windows = torch.stack(masks)
        return windows[windows.any(1)]

    def count(self, size: int, stride: int, steps: int = 1) -> int:
        """Return how many windows of a size there are at most."""
        return sum(
            -(-planes // steps) * len(starts(rows, size, stride)) * len(starts(cols, size, stride))
            for planes, rows, cols in self.sizes
        )

    def fitting(self, most: int, size: int = 1, stride: int | None = None) -> torch.Tensor:
        """Return windows of at least a size that are no more than `most`.

        They grow in rows and columns up to the whole plane, then over planes.
        """
        largest = max(max(rows, cols) for _, rows, cols in self.sizes)
        longest = max(planes for planes, _, _ in self.sizes)
        step = stride or size
        while self.count(size, step) > most and size < largest:
            size += 1
            step = size
        steps = 1
        while self.count(size, step, steps) > most and steps < longest:
            steps += 1
        return self.windows(size, step, steps)


def starts(length: int, size: int, stride: int) -> list[int]:
    """Return where windows begin along an axis; the last one ends with it."""
    size = min(size, length)
    first = list(range(0, length - size + 1, stride))
    return first if first[-1] + size == length else [*first, length - size]


def spread(windows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return (N, parts): for each token the mean over the windows that hold it.

    Args:
        windows: (R, N) bool.
        values: (R, parts).
    """
    weights = windows.float()
    return weights.T @ values / weights.sum(0).clamp_min(1)[:, None]
