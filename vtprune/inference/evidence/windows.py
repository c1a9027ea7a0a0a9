"""Windows of neighbouring visual tokens: within a frame, a base picture or a picture's tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from vtprune.errors import VtpruneError
from vtprune.inference.evidence import MapSettings
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

    @property
    def longest(self) -> int:
        """The most planes of a stack."""
        return max(planes for planes, _, _ in self.sizes)

    def places(self, most: int, settings: MapSettings) -> torch.Tensor:
        """Return no more than `most` windows through all frames.

        Where there are too many of the method's they stop to overlap, then grow up to the whole
        plane.

        Raises:
            VtpruneError: windows that were asked for are too many.
        """
        size, stride = settings.window_size, settings.stride or 1
        if settings.chooses_windows and (count := self.count(size, stride, self.longest)) > most:
            raise VtpruneError(
                f"windows of {size} at stride {stride} take {count} passes, but {most} are left "
                "for them",
                "give more --passes, or a larger --window or --stride",
            )
        largest = max(max(rows, cols) for _, rows, cols in self.sizes)
        while self.count(size, stride, self.longest) > most and (stride < size or size < largest):
            size += stride == size
            stride = size
        return self.windows(size, stride, self.longest)

    def times(self, most: int) -> torch.Tensor:
        """Return no more than `most` windows of whole frames of videos; none below two."""
        videos = torch.tensor([planes > 1 for planes, _, _ in self.sizes])[self.stack]
        steps = 1
        while sum(-(-planes // steps) for planes, _, _ in self.sizes if planes > 1) > most:
            if steps >= self.longest:
                break
            steps += 1
        largest = max(max(rows, cols) for _, rows, cols in self.sizes)
        windows = self.windows(largest, largest, steps)
        windows = windows[(windows & videos).any(1)]
        return windows if 1 < len(windows) <= most else windows[:0]


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


def over_time_first(
    cells: Cells,
    effect_of: Callable[[torch.Tensor], torch.Tensor],
    most: int,
    settings: MapSettings,
) -> torch.Tensor:
    """Return (N, parts) effects of windows of places, in a video weighted by those of its frames.

    What a video shows is in many frames, so that a window of one frame says little: here windows
    of whole frames say when, and windows through all frames say where.

    Args:
        effect_of: (R, N) bool windows -> (R, parts) effects.
        most: windows that may be tried.
        settings: of the windows of places; larger than the method's where they are too many.
    """
    times = cells.times(most // 3)
    places = cells.places(most - len(times), settings)
    effects = effect_of(torch.cat([times, places])).clamp_min(0)
    values = spread(places, effects[len(times) :])
    weights = spread(times, effects[: len(times)])  # (N, parts)
    for number in range(len(cells.sizes)):
        here = cells.stack == number
        mean = weights[here & cells.patch].mean(0)  # (parts,)
        values[here] *= torch.where(mean > 0, weights[here] / mean.clamp_min(1e-12), 1.0)
    return values
