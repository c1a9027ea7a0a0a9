"""Keep the frames of a video that show something else than the kept one before them.

Idea: a frame is dropped if a small thumbnail of it is that of the last kept frame. Where a scene
changes, which is where most of the thumbnail changes at once, a frame is kept. Frames are dropped
whole, before the vision tower encodes them.

Why it works: frames at a fixed rate repeat a scene that stands still and miss one that is short. By
what they show, a few frames can hold all that a clip has to show.

Paper: none for this rule; frames chosen by a threshold on the change since the last kept one are
as old as video summaries.
Official code: none.
Differences: no threshold has to be guessed for a budget. The smallest one is searched that leaves
few enough frames of all videos of the prompt together; each try is one pass, so the time is linear
in the frames. Of the frames that the next smaller threshold leaves besides, evenly many fill up the
budget. The change of a scene counts more than all else: it goes only where there are more scenes
than frames to keep, and then the weakest. The first frame of a video always stays. Positions and
times are kept. `predictable` compares all pixels, and goes on by the worst place alone; here
thumbnails decide, and for a budget all of their cells count, those that change most the most.

Options:
    tolerance: 2 (default); the most levels, of 255, by which any of the 16 x 16 cells of a dropped
        frame may differ from the last kept frame, in the colour where it differs most. A budget
        raises it.
    scene: 30 (default); the levels, of 255, by which the thumbnail's cells and colours differ on
        average from the frame before where a scene changes.
    time: 0 (default); the levels that the whole length of the video counts as, besides what
        changed, where a budget is met: a frame is the sooner kept, the longer ago the last one is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from vtprune.tokens.units import Units, count_tokens

CELLS = 16
"""Cells along a side of a thumbnail."""
LEVELS = 256.0
"""More than any two frames differ."""
TRIES = 20
"""Halvings of the threshold: 512 levels to less than a thousandth of one."""


@dataclass(frozen=True)
class Scenes:
    tolerance: float = 2.0
    scene: float = 30.0
    time: float = 0.0

    def keep(self, units: Units) -> list[int]:
        if units.modality != "video":
            return list(range(len(units)))
        thumbnails = thumbnails_of(units)
        scenes = self.scene_changes(thumbnails)
        kept = [0]
        for number in range(1, len(units)):
            worst = (thumbnails[number] - thumbnails[kept[-1]]).abs().max()
            if number in scenes or float(worst) > self.tolerance:
                kept.append(number)
        return kept

    def shrink(
        self,
        media: Sequence[Units],
        kept: Sequence[Sequence[int]],
        sizes: Sequence[Sequence[int]],
        most: int,
    ) -> list[list[int]]:
        clips = [thumbnails_of(units) for units in media]
        changes = [self.scene_changes(thumbnails) for thumbnails in clips]

        def walk(threshold: float) -> list[list[int]]:
            items = zip(clips, kept, changes, strict=True)
            return [changed(*item, self.time, threshold) for item in items]

        low, high = 0.0, 2 * (LEVELS + self.time)
        more, fewer = [list(numbers) for numbers in kept], walk(high)
        for _ in range(TRIES):
            middle = (low + high) / 2
            tried = walk(middle)
            if count_tokens(tried, sizes) > most:
                low, more = middle, tried
            else:
                high, fewer = middle, tried
        return fill_up(fewer, more, sizes, most)

    def scene_changes(self, thumbnails: torch.Tensor) -> dict[int, float]:
        """Return the units at which a scene changes, and by how many levels.

        Args:
            thumbnails: (n, G, 3, CELLS, CELLS).
        """
        if len(thumbnails) < 2:
            return {}
        levels = (thumbnails[1:] - thumbnails[:-1]).abs().mean((2, 3, 4)).amax(1)
        numbered = enumerate(levels.tolist(), start=1)
        return {number: level for number, level in numbered if level > self.scene}


def thumbnails_of(units: Units) -> torch.Tensor:
    """Return (n, G, 3, CELLS, CELLS) float32: the mean colour of every cell of every unit."""
    each = [
        functional.adaptive_avg_pool2d(units.unit(number).float(), CELLS)
        for number in range(len(units))
    ]
    return torch.stack(each)


def changed(
    thumbnails: torch.Tensor,
    numbers: Sequence[int],
    scenes: Mapping[int, float],
    time: float,
    threshold: float,
) -> list[int]:
    """Return those of some units that differ from the last returned one by more than a threshold.

    Args:
        thumbnails: (n, G, 3, CELLS, CELLS), of all units.
        numbers: ascending; the first always stays.
        scenes: unit -> by how many levels the scene changes there, on top of all that another unit
            can have.
        time: levels that the whole length of the video counts as.
        threshold: levels, the root of the mean square over the cells.
    """
    left = list(numbers[:1])
    for number in numbers[1:]:
        if number in scenes:
            change = LEVELS + time + scenes[number]
        else:
            change = float((thumbnails[number] - thumbnails[left[-1]]).square().mean().sqrt())
            change += time * (number - left[-1]) / len(thumbnails)
        if change > threshold:
            left.append(number)
    return left


def fill_up(
    kept: Sequence[Sequence[int]],
    more: Sequence[Sequence[int]],
    sizes: Sequence[Sequence[int]],
    most: int,
) -> list[list[int]]:
    """Add to the kept units evenly many of others, as far as their tokens fit.

    Args:
        kept, more: units of every item.
        sizes: tokens of every unit of each.
        most: the tokens that there may be.
    """
    filled = [list(numbers) for numbers in kept]
    left = most - count_tokens(kept, sizes)
    others = [
        (item, number)
        for item, numbers in enumerate(more)
        for number in sorted({*numbers} - {*kept[item]})
    ]
    share = left / max(sum(sizes[item][number] for item, number in others), 1)
    due = sizes[others[0][0]][others[0][1]] / 2 if others else 0.0
    evenly: list[tuple[int, int]] = []
    rest: list[tuple[int, int]] = []
    for item, number in others:
        due += sizes[item][number] * min(share, 1.0)
        takes = sizes[item][number] <= due
        due -= sizes[item][number] * takes
        (evenly if takes else rest).append((item, number))
    for item, number in evenly + rest:
        if sizes[item][number] <= left:
            filled[item].append(number)
            left -= sizes[item][number]
    return [sorted(numbers) for numbers in filled]
