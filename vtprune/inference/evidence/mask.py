"""Learned masks: the smallest part of the pictures under which the answer stays as probable.

Small mask vectors of several sizes are learned at once, each laid over the visual tokens by
interpolation; a token keeps its mask's share of itself, and is the mean token for the rest. The
loss asks that the answer stays (its log-probability) and that the masks are small (their mean). The
map is the mean of the masks of all sizes: coarse ones say where, fine ones say what.

Multiple dynamic masks, arXiv 2207.08046 (masks of several sizes, consistency, sparsity, laid over
each other). Differs: on visual tokens of a prompt, not on pixels; it starts at the answer's slope
(gradient) and not from chance, learns all sizes in one batch, and stops when the map is stable.
"""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

from vtprune.inference.evidence.probe import BACKWARD, Probe
from vtprune.inference.evidence.windows import Cells

SIDES = (2, 4, 8)
"""Rows and columns of the masks; no more than there are tokens."""
RATE, START = 0.4, 1.5
"""Step of Adam, and how far apart masks start that the slope tells apart."""
SMALL = 1.0
"""Weight of the masks' mean beside the loss of the answer."""
STABLE, TIMES = 0.02, 3
"""The change of the map under which a step counts as stable, and how many in a row end it."""
LEAST = 4
"""Steps under which nothing is learned."""


def mask(probe: Probe) -> torch.Tensor:
    """Return (N, parts) masks."""
    cells = Cells.of(probe.layout)
    sides = [side for number, side in enumerate(SIDES) if number == 0 or fits(cells, side)]
    per_step = len(sides) * (1 + BACKWARD)
    probe.check_passes(len(probe.parts) * (1 + BACKWARD + LEAST * per_step) + 1, "mask")
    base, maps = probe.base(), []
    for part in range(len(probe.parts)):
        steps = (probe.passes.left // (len(probe.parts) - part) - 1 - BACKWARD) // per_step
        maps.append(learn(probe, cells, sides, part, float(base[part]), steps))
    return torch.stack(maps, dim=1)


def fits(cells: Cells, side: int) -> bool:
    """Return whether a mask of a side is coarser than the tokens somewhere."""
    return any(max(rows, cols) >= side for _, rows, cols in cells.sizes)


def learn(
    probe: Probe, cells: Cells, sides: list[int], part: int, base: float, steps: int
) -> torch.Tensor:
    """Return the (N,) mask of one part of the answer.

    Args:
        base: its score with all tokens.
        steps: at most.
    """
    _, slope = probe.gradient(torch.ones(1, len(probe)), part)
    slope = slope[0].abs()
    start = START * (slope / slope.max().clamp_min(1e-12)).sqrt()
    vectors = [
        [coarse(cells, number, start, side) for number in range(len(cells.sizes))] for side in sides
    ]
    parameters = [grid.requires_grad_(True) for grids in vectors for grid in grids]
    adam = torch.optim.Adam(parameters, lr=RATE)
    before, calm = torch.zeros(len(probe)), 0
    for _ in range(steps):
        with torch.enable_grad():
            masks = torch.stack([lay(cells, grids, probe.present) for grids in vectors])  # (R, N)
        scores, slopes = probe.gradient(masks, part)
        # d/dm of (base - score) + SMALL x mean(m); the answer's part weighs no more than a nat.
        weight = (base - scores).clamp(0.05, 1.0)[:, None]
        gradient = -slopes * weight + SMALL / len(probe)
        adam.zero_grad()
        masks.backward(gradient)
        adam.step()
        merged = torch.stack([lay(cells, grids, probe.present) for grids in vectors]).mean(0)
        merged = merged.detach()
        calm = calm + 1 if float((merged - before).abs().max()) < STABLE else 0
        before = merged
        if calm >= TIMES:
            break
    return before


def coarse(cells: Cells, number: int, values: torch.Tensor, side: int) -> torch.Tensor:
    """Return (1, 1, planes, rows, cols) means of a stack's values in the cells of a mask."""
    planes, rows, cols = cells.sizes[number]
    full = torch.zeros(planes, rows, cols)
    here = (cells.stack == number) & cells.patch
    full[cells.time[here], cells.row[here], cells.col[here]] = values[here]
    size = (planes, min(side, rows), min(side, cols))
    return torch.nn.functional.adaptive_avg_pool3d(full[None, None], size).clone()


def lay(cells: Cells, grids: list[torch.Tensor], present: torch.Tensor) -> torch.Tensor:
    """Return the (N,) mask that a vector of each stack makes over the tokens."""
    mask = torch.zeros(len(cells.stack))
    for number, grid in enumerate(grids):
        full = interpolate(grid, cells.sizes[number], mode="trilinear", align_corners=False)[0, 0]
        here = cells.stack == number
        values = full[cells.time[here], cells.row[here], cells.col[here]]
        mask = mask.index_put((here.nonzero().squeeze(1),), values.sigmoid())
    return mask * present
