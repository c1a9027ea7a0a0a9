"""Coarse masks find regions, finer ones what carries the answer inside them.

First whole pictures, frames or runs of frames are exchanged for the mean token, and looked at
alone; what the answer loses and keeps by that is the region's effect. The region with the largest
effect is split: a run of frames in time, a frame in quarters, down to single tokens. It stays as
large as the answer needs it: where no part of it has SPLIT of its effect, the parts carry it only
together, and the region is not split further.

Hierarchical dynamic masks, arXiv 2301.04970 (regions by coarse masks, then finer ones inside), and
a mask's size by what the region needs, as in FeaInfNet, arXiv 2312.01871. Differs: regions are
tried, not learned, which takes no gradient.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from vtprune.inference.evidence.probe import Probe
from vtprune.inference.evidence.windows import Cells

FIRST = 8
"""Runs of frames that a video is divided into at first."""
SPLIT = 0.35
"""Share of a region's effect that one of its parts has to have."""


def hierarchical(probe: Probe) -> torch.Tensor:
    """Return (N, parts) effects."""
    probe.check_passes(4 * len(probe.parts), "hierarchical")
    cells, base = Cells.of(probe.layout), probe.base()
    none = probe.replaced(torch.zeros(1, len(probe)))[0]
    regions = first_regions(cells)
    effects = effects_of(probe, regions, base, none)  # (R, parts)
    maps = []
    for part in range(len(probe.parts)):
        most = probe.passes.left // (len(probe.parts) - part)
        maps.append(refine(probe, cells, regions, effects[:, part], part, base, none, most))
    return torch.stack(maps, dim=1)


def first_regions(cells: Cells) -> list[torch.Tensor]:
    """Return (N,) bool of each coarse region: pictures, their tiles, and runs of frames."""
    regions = []
    for number, (planes, _, _) in enumerate(cells.sizes):
        here = (cells.stack == number) & cells.patch
        for first, end in spans(0, planes, FIRST):
            regions.append(here & (cells.time >= first) & (cells.time < end))
    return [region for region in regions if bool(region.any())]


def spans(first: int, end: int, most: int) -> list[tuple[int, int]]:
    """Return at most so many spans of about one length."""
    count = min(most, end - first)
    edges = [first + (end - first) * n // count for n in range(count + 1)]
    return list(pairwise(edges))


def effects_of(
    probe: Probe, regions: list[torch.Tensor], base: torch.Tensor, none: torch.Tensor
) -> torch.Tensor:
    """Return (R, parts) how much the answer loses without a region, and keeps by it alone.

    Both are shares of what it loses without any token, each from 0 to 1.
    """
    masks = torch.stack(regions).float()
    scores = probe.replaced(torch.cat([1 - masks, masks]))
    without, alone = scores.split(len(regions))
    most = (base - none).clamp_min(1e-3)
    lost = ((base - without) / most).clamp(0, 1)
    kept = ((alone - none) / most).clamp(0, 1)
    return lost + kept


def refine(
    probe: Probe,
    cells: Cells,
    regions: list[torch.Tensor],
    effects: torch.Tensor,
    part: int,
    base: torch.Tensor,
    none: torch.Tensor,
    most: int,
) -> torch.Tensor:
    """Split the regions of the largest effect while passes are left; return the (N,) map.

    Args:
        most: passes that may be taken.
    """
    end = probe.passes.done + most
    values = torch.zeros(len(probe))
    for region, effect in zip(regions, effects.tolist(), strict=True):
        values[region] += effect / float(region.sum()) ** 0.5
    waiting = list(zip(effects.tolist(), regions, strict=True))
    while waiting:
        waiting.sort(key=lambda pair: -pair[0])
        effect, region = waiting.pop(0)
        children = split(cells, region)
        if effect <= 0 or len(children) < 2:
            continue
        if probe.passes.done + 2 * len(children) > end:
            break
        inside = effects_of(probe, children, base, none)[:, part].tolist()
        if max(inside) < SPLIT * effect:
            continue  # as large as the answer needs it
        for child, value in zip(children, inside, strict=True):
            values[child] += value / float(child.sum()) ** 0.5
            waiting.append((value, child))
    return values


def split(cells: Cells, region: torch.Tensor) -> list[torch.Tensor]:
    """Return the parts of a region: halves in time, else quarters; [] of a single token."""
    times = cells.time[region]
    first, last = int(times.min()), int(times.max())
    if last > first:
        middle = (first + last + 1) // 2
        return [region & (cells.time < middle), region & (cells.time >= middle)]
    parts = [region]
    for axis in (cells.row, cells.col):
        low, high = int(axis[region].min()), int(axis[region].max())
        if high > low:
            middle = (low + high + 1) // 2
            parts = [half for p in parts for half in (p & (axis < middle), p & (axis >= middle))]
    return [part for part in parts if bool(part.any())] if len(parts) > 1 else []
