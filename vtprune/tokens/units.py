"""Frames and tiles that a vision tower encodes one by one, so that each can be dropped alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

Region = tuple[float, float, float, float]
"""(top, left, bottom, right) of a part of a picture, in fractions of its height and width; past the
picture's edges there is black padding."""
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one media item: frames, or steps of a few frames, or tiles.

    A picture whose tiles are not told apart, or share tokens, is one unit.

    Args:
        modality: "image" or "video".
        pixels: (R, 3, h, w) uint8, as they were before they were normalised: frames in order, or
            the base picture and its tiles in the order in which the tower gets them.
        group: frames of a video that are encoded together; the last one fills its group up.
        regions: for each of a picture's R rows the part of the whole that it shows; WHOLE is the
            base picture. Empty: the picture is one unit.
    """

    modality: str
    pixels: torch.Tensor
    group: int = 1
    regions: tuple[Region, ...] = ()

    def __len__(self) -> int:
        if self.modality == "video":
            return -(-len(self.pixels) // self.group)
        return len(self.regions) or 1

    @property
    def rows(self) -> int:
        """Rows of the tower's input: frames, steps of a few frames, or all tiles of a picture."""
        return len(self) if self.modality == "video" else len(self.pixels)

    @property
    def base(self) -> int:
        """The number of the unit that is never dropped: the first frame, the base picture."""
        return self.regions.index(WHOLE) if self.regions else 0

    @property
    def in_one_piece(self) -> bool:
        """Whether the tiles of the picture can only be dropped together."""
        return len(self) < self.rows

    def unit(self, number: int) -> torch.Tensor:
        """(group, 3, h, w) uint8 of one unit; (1, 3, h, w) of a tile."""
        if self.modality != "video":
            return self.pixels[number : number + 1]
        frames = self.pixels[number * self.group : (number + 1) * self.group]
        missing = self.group - len(frames)
        return torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]) if missing else frames

    def place(self, number: int) -> tuple[int, int]:
        """Return (frame, tile) of a unit, as a Layout counts them."""
        if self.modality == "video":
            return number, 0
        if number == self.base:
            return 0, 0
        return 0, number + 1 if number < self.base else number

    def rows_kept(self, kept: Sequence[int]) -> torch.Tensor:
        """(rows,) bool: which of its rows the tower gets, where it gets the units `kept`."""
        rows = torch.zeros(self.rows, dtype=torch.bool)
        if kept:
            rows[slice(None) if self.in_one_piece else list(kept)] = True
        return rows


@dataclass(frozen=True)
class FullSizeCounts:
    """Token counts of the prompt as it would be had its media not been made smaller.

    Args:
        visual: modality -> visual tokens.
        more_text: text tokens, such as markers between tiles, that it would have more.
    """

    visual: Mapping[str, int]
    more_text: int = 0

    def total(self, modality: str = "all") -> int:
        """Return the visual tokens of a modality, or of all."""
        return sum(self.visual.values()) if modality == "all" else self.visual.get(modality, 0)


def count_tokens(kept: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]) -> int:
    """Return how many tokens the kept units of all items have.

    Args:
        kept: units of every item.
        sizes: tokens of every unit of each.
    """
    pairs = zip(kept, sizes, strict=True)
    return sum(of_item[unit] for units, of_item in pairs for unit in units)
