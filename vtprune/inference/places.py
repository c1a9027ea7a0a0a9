"""Where each visual token lies in its source: a box in pixels, and the frames and their times.

No family says how it resizes, pads, crops and tiles. So a picture of its own coordinates goes
through its real preparation: what comes out says of every pixel where in the source it is from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.inference.kept_tokens import KeptTokens, MediaItem
from vtprune.tokens.layout import KINDS, PATCH, Grid

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of the source."""
PICTURE = 250
"""The least blue of a pixel that is all picture; padding of any family is darker."""
EDGE = 2
"""Pixels along an edge that interpolation bends."""


@dataclass(frozen=True)
class TokenPlace:
    """Where one visual token lies.

    Args:
        column: of the original input_ids.
        item: number of the media item in the prompt.
        media: number of the file.
        frame: time step of a video; 0 for a picture.
        tile: 0 for the base picture and for frames.
        row, col: as of Grid.
        kind: "patch", "newline", "cls" or "separator".
        frames: the source's frame numbers that it was made of.
        seconds: their times; () for a picture.
        box: None for a token that shows no place: a newline, or padding alone.
    """

    column: int
    item: int
    media: int
    frame: int
    tile: int
    row: int
    col: int
    kind: str
    frames: tuple[int, ...]
    seconds: tuple[float, ...]
    box: Box | None

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it."""
        edges = None if self.box is None else [round(edge, 2) for edge in self.box]
        names = ("column", "media", "kind", "frame", "tile", "row", "col")
        return {
            **{name: getattr(self, name) for name in names},
            "seconds": list(self.seconds),
            "box": edges,
        }


@dataclass(frozen=True)
class Canvas:
    """Prepared pixels laid together, as straight lines from their places to the source's.

    Args:
        height, width: in prepared pixels.
        down, across: (first, per pixel) in pixels of the source.
        span: as of `Family.spans`.
    """

    height: int
    width: int
    down: tuple[float, float]
    across: tuple[float, float]
    span: tuple[float, float, float, float]


def find_places(kept: KeptTokens) -> list[TokenPlace]:
    """Return where each visual token of a prompt lies, in the order of the prompt."""
    layout, item_of = kept.layout, kept.layout.items()
    places: list[TokenPlace] = []
    coordinates = {number: prepare_coordinates(item) for number, item in enumerate(kept.media)}
    for number, (media, row) in enumerate(kept.items):
        index = (item_of == number).nonzero().squeeze(1)
        item = kept.media[media]
        grid = layout.grid.take(index)
        boxes = find_boxes(grid, item, coordinates[media], row)
        group = -(-len(item.index) // (int(grid.frame.max()) + 1))
        parts = layout.columns[index], grid.frame, grid.tile, grid.row, grid.col, grid.kind
        rows = zip(*(part.tolist() for part in parts), boxes, strict=True)
        for column, frame, tile, down, across, kind, box in rows:
            span = slice(frame * group, (frame + 1) * group)
            frames = item.index[span] if item.timestamps else ()
            seconds = item.timestamps[span]
            places.append(TokenPlace(column, number, media, frame, tile, down, across, KINDS[kind],
                                frames, seconds, box))  # fmt: skip
    return sorted(places, key=lambda place: place.column)


def prepare_coordinates(item: MediaItem) -> torch.Tensor | None:
    """Return what an item's preparation makes of a picture of coordinates, (rows, 3, h, w) uint8.

    Red grows with the column, green with the row, and blue is full: it is less in padding.
    """
    if item.transform is None:
        return None
    height, width = item.read_size
    down, across = [
        ((torch.arange(length) + 0.5) * (255 / length)).round().to(torch.uint8)
        for length in (height, width)
    ]
    picture = torch.full((1, 3, height, width), 255, dtype=torch.uint8)
    picture[0, 0], picture[0, 1] = across[None], down[:, None]
    return item.transform(picture.contiguous(memory_format=torch.channels_last))


def find_boxes(
    grid: Grid, item: MediaItem, coordinates: torch.Tensor | None, row: int
) -> list[Box | None]:
    """Return the boxes of one media item's tokens.

    Args:
        coordinates: from `prepare_coordinates`; None: the tokens divide the whole evenly.
        row: of the item's pixels, where the media item is one row of them.
    """
    size = (item.source.height, item.source.width)
    patches = grid.kind == PATCH
    tiled = patches & (grid.tile > 0)
    base_pixels = None if coordinates is None else _base_pixels(item, coordinates, row)
    base = _canvas(base_pixels, size, item.spans[0])
    boxes: list[Box | None] = [None] * len(grid)
    _fill(boxes, grid, patches & (grid.tile == 0), base, size)
    if not bool(tiled.any()):
        return boxes
    if coordinates is None or item.overlapping:
        canvas = _canvas(base_pixels, size, item.spans[1])
    else:
        canvas = _tiles_canvas(grid, item, coordinates, size)
    _fill(boxes, grid, tiled, canvas, size)
    return boxes


def _base_pixels(item: MediaItem, coordinates: torch.Tensor, row: int) -> torch.Tensor:
    if item.timestamps or len(coordinates) == 1:  # one frame's; all are prepared alike
        return coordinates[0]
    return coordinates[row or item.base]


def _tiles_canvas(
    grid: Grid, item: MediaItem, coordinates: torch.Tensor, size: tuple[int, int]
) -> Canvas | None:
    """Return the tiles of a picture laid together; None where they are nothing but padding."""
    tiles = torch.cat([coordinates[: item.base], coordinates[item.base + 1 :]])
    side = int(grid.row[grid.tile == 0].max()) + 1
    across = int(grid.col[grid.tile == 0].max()) + 1
    span = (0.0, 0.0, 1.0, 1.0)
    if item.plane is not None:
        rows, cols = item.plane.rows, item.plane.cols
        top, left = item.plane.above / (rows * side), item.plane.before / (cols * side)
        span = top, left, 1 - top, 1 - left
    else:
        patches = (grid.tile > 0) & (grid.kind == PATCH)
        rows = (int(grid.row[patches].max()) + 1) // side
        cols = (int(grid.col[patches].max()) + 1) // across
    height, width = tiles.shape[-2:]
    laid = tiles[: rows * cols].view(rows, cols, 3, height, width).permute(2, 0, 3, 1, 4)
    return _canvas(laid.reshape(3, rows * height, cols * width), size, span)


def _canvas(
    pixels: torch.Tensor | None, size: tuple[int, int], span: tuple[float, float, float, float]
) -> Canvas | None:
    """Return the straight lines from prepared pixels, (3, h, w) of coordinates, to the source."""
    if pixels is None:
        return Canvas(size[0], size[1], (0.0, 1.0), (0.0, 1.0), span)
    picture = pixels[2] >= PICTURE
    down = _line(pixels[1].double(), picture, size[0])
    across = _line(pixels[0].double().T, picture.T, size[1])
    if down is None or across is None:
        return None
    return Canvas(pixels.shape[1], pixels.shape[2], down, across, span)


def _line(values: torch.Tensor, picture: torch.Tensor, length: int) -> tuple[float, float] | None:
    """Return (first, per row) of the source's coordinate, fitted to the rows of `values`.

    Args:
        values: (n, m) coordinates, from 0 to 255, alike in a row.
        picture: (n, m) bool, where they are no padding.
        length: of the source.
    """
    counts = picture.sum(1)
    rows = counts.nonzero().squeeze(1)
    if not len(rows):
        return None
    if len(rows) > 8 * EDGE:
        rows = rows[EDGE:-EDGE]
    means = (values * picture).sum(1)[rows] / counts[rows]
    centres = rows.double() + 0.5
    spread = centres - centres.mean()
    slope = float((spread * means).sum() / spread.square().sum()) if len(rows) > 1 else 0.0
    if slope <= 0:  # a source of a pixel or so: it is all there
        first, last = float(rows[0]), float(rows[-1]) + 1
        return -first * length / (last - first), length / (last - first)
    scale = length / 255
    return float(means.mean() - slope * centres.mean()) * scale, slope * scale


def _fill(
    boxes: list[Box | None],
    grid: Grid,
    chosen: torch.Tensor,
    canvas: Canvas | None,
    size: tuple[int, int],
) -> None:
    """Set the boxes of the chosen tokens, which divide the canvas evenly."""
    index = chosen.nonzero().squeeze(1)
    if canvas is None or not len(index):
        return
    row, col = grid.row[index].double(), grid.col[index].double()
    top, left, bottom, right = canvas.span
    lines = []
    for place, start, end, pixels, line, length in (
        (col, left, right, canvas.width, canvas.across, size[1]),
        (row, top, bottom, canvas.height, canvas.down, size[0]),
    ):
        count = int(place.max()) + 1
        for step in (0, 1):
            pixel = (start + (place + step) * (end - start) / count) * pixels
            lines.append((line[0] + line[1] * pixel).clamp(0, length))
    x0, x1, y0, y1 = (line.tolist() for line in lines)
    for at, token in enumerate(index.tolist()):
        if x1[at] - x0[at] > 1e-6 and y1[at] - y0[at] > 1e-6:
            boxes[token] = (x0[at], y0[at], x1[at], y1[at])
