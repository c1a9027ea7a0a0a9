"""Where the visual tokens of a prompt sit: frame x tile x row x col.

For example, `box(2, 3, 4)` is the grid of a video of 2 frames with 3 x 4 tokens each, and
`lay_out({"video": columns}, {"video": [box(2, 3, 4)]})` puts it at 24 columns of `input_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

# What a visual token shows. Everything but PATCH comes from the vision path too, and counts.
PATCH, NEWLINE, CLS, SEPARATOR = 0, 1, 2, 3
KINDS = ("patch", "newline", "cls", "separator")
MODALITIES = ("image", "video")


@dataclass(frozen=True, eq=False)
class Grid:
    """Coordinates of the n tokens of one media item, in the order of the prompt.

    Args:
        frame: (n,) int64, time step; 0 for a still picture. Where a model merges frames in time
            (Qwen's temporal patches) it counts the merged steps.
        tile: (n,) int64, 0 for the base picture of a tiled image, then the tiles row by row.
        row: (n,) int64, row inside the frame; for tiles: inside the whole picture, and for the
            base picture inside that.
        col: (n,) int64, column likewise. A newline sits one past the last column of its row.
        kind: (n,) int64, PATCH, NEWLINE, CLS or SEPARATOR.
    """

    frame: torch.Tensor
    tile: torch.Tensor
    row: torch.Tensor
    col: torch.Tensor
    kind: torch.Tensor

    def __len__(self) -> int:
        return int(self.frame.shape[0])

    def take(self, index: torch.Tensor) -> Grid:
        """Return the tokens at `index`, (k,) int64, in that order."""
        return Grid(
            self.frame[index], self.tile[index], self.row[index], self.col[index], self.kind[index]
        )

    def at_frame(self, frame: int) -> Grid:
        """Return the same tokens, all of time step `frame`."""
        return replace(self, frame=torch.full_like(self.frame, frame))


def box(num_frames: int, num_rows: int, num_cols: int, tile: int = 0) -> Grid:
    """Return a block of num_frames x num_rows x num_cols patches, all in one tile."""
    frame, row, col = torch.meshgrid(
        torch.arange(num_frames), torch.arange(num_rows), torch.arange(num_cols), indexing="ij"
    )
    flat = frame.reshape(-1)
    return Grid(
        flat,
        torch.full_like(flat, tile),
        row.reshape(-1),
        col.reshape(-1),
        torch.full_like(flat, PATCH),
    )


def single(kind: int, frame: int = 0, tile: int = 0, row: int = 0, col: int = 0) -> Grid:
    """Return one token, such as a trailing newline (its frame and tile are those it closes)."""
    values = [torch.tensor([value]) for value in (frame, tile, row, col, kind)]
    return Grid(*values)


def join(grids: Sequence[Grid]) -> Grid:
    """Return the tokens of several grids one after the other; coordinates stay as they are."""
    return Grid(
        torch.cat([grid.frame for grid in grids]),
        torch.cat([grid.tile for grid in grids]),
        torch.cat([grid.row for grid in grids]),
        torch.cat([grid.col for grid in grids]),
        torch.cat([grid.kind for grid in grids]),
    )


@dataclass(frozen=True, eq=False)
class Layout:
    """The N visual tokens of one sample of a batch.

    Args:
        columns: (N,) int64, ascending columns of `input_ids` that hold visual tokens.
        modality: (N,) int64, index into MODALITIES.
        media: (N,) int64, number of the media item in the prompt, counted over both modalities.
        grid: coordinates of the N tokens.
    """

    columns: torch.Tensor
    modality: torch.Tensor
    media: torch.Tensor
    grid: Grid

    def __len__(self) -> int:
        return int(self.columns.shape[0])

    def take(self, index: torch.Tensor) -> Layout:
        """Return the tokens at `index`, (k,) int64 ascending."""
        return Layout(
            self.columns[index], self.modality[index], self.media[index], self.grid.take(index)
        )

    def of_modality(self, modality: str) -> torch.Tensor:
        """Return the (n,) int64 index of the tokens of `modality`; of all tokens for "all"."""
        if modality == "all":
            return torch.arange(len(self))
        return (self.modality == MODALITIES.index(modality)).nonzero().squeeze(1)

    def items(self) -> torch.Tensor:
        """Return the (N,) int64 number of each token's media item, counting those with tokens."""
        return torch.unique(self.media, return_inverse=True)[1]

    def groups(self, per: str) -> torch.Tensor:
        """Return the (N,) int64 number of each token's group, from 0, in prompt order.

        per: "all" is one group; "frame" one a media item and frame; "tile" one a media item,
        frame and tile (a video's frame is one tile).
        """
        if per == "all":
            return torch.zeros(len(self), dtype=torch.long)
        key = torch.stack(
            [
                self.media,
                self.grid.frame,
                self.grid.tile if per == "tile" else torch.zeros_like(self.media),
            ]
        )
        return torch.unique(key, dim=1, return_inverse=True)[1]

    def previous(self) -> torch.Tensor:
        """Return the (N,) int64 index of each token's predecessor in its video; -1 for none.

        That is the one at the same tile, row and column of the nearest earlier frame that has one.
        """
        before = torch.full((len(self),), -1, dtype=torch.long)
        if not len(self):
            return before
        grid = self.grid
        key = torch.stack([self.media, grid.tile, grid.row, grid.col, grid.kind])
        place = torch.unique(key, dim=1, return_inverse=True)[1]
        order = grid.frame.argsort(stable=True)
        order = order[place[order].argsort(stable=True)]  # by place, then by frame
        again = place[order[1:]] == place[order[:-1]]
        before[order[1:][again]] = order[:-1][again]
        return before

    def in_first_frame(self) -> torch.Tensor:
        """Return (N,) bool: the tokens of the first frame of each media item."""
        if not len(self):
            return torch.zeros(0, dtype=torch.bool)
        item = self.items()
        first = torch.full((int(item.max()) + 1,), int(self.grid.frame.max()))
        first = first.scatter_reduce(0, item, self.grid.frame, "amin")
        return self.grid.frame == first[item]


def empty_layout() -> Layout:
    """Return the layout of a sample without visual tokens."""
    none = torch.zeros(0, dtype=torch.long)
    return Layout(none, none, none, Grid(none, none, none, none, none))


def lay_out(columns: dict[str, torch.Tensor], grids: dict[str, Sequence[Grid]]) -> Layout:
    """Return the layout of one sample from its placeholder columns and the grids of its media.

    Args:
        columns: modality -> (n,) ascending columns of its placeholders.
        grids: modality -> its media items' grids in prompt order; their lengths add up to n.

    Raises:
        ValueError: the grids of a modality do not add up to its placeholders.
    """
    parts: list[tuple[torch.Tensor, int, Grid]] = []
    for modality, modality_columns in columns.items():
        items = grids.get(modality, ())
        total = sum(len(grid) for grid in items)
        if total != len(modality_columns):
            raise ValueError(
                f"{len(modality_columns)} {modality} placeholders, {total} tokens in the grids"
            )
        at = 0
        for grid in items:
            parts.append((modality_columns[at : at + len(grid)], MODALITIES.index(modality), grid))
            at += len(grid)
    parts = [part for part in parts if len(part[2])]
    if not parts:
        return empty_layout()
    parts.sort(key=lambda part: int(part[0][0]))
    joined = torch.cat([part[0] for part in parts])
    kinds = torch.cat([torch.full_like(part[0], part[1]) for part in parts])
    media = torch.cat([torch.full_like(part[0], number) for number, part in enumerate(parts)])
    layout = Layout(joined, kinds, media, join([part[2] for part in parts]))
    return layout.take(joined.argsort(stable=True))
