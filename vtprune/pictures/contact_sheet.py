"""What was kept as one PNG: a row a frame or picture, a column a stage, and a caption."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageEnhance

from vtprune.pictures.drawing import Drawing, DrawnRun, Panel, scaled
from vtprune.pictures.lettering import HEAD, LINE, TEXT, draw_text, fit_lines, text_width

Row = tuple[Panel, Image.Image]
"""A panel and the picture behind it."""
PAPER, INK, GREY = (255, 255, 255), (20, 20, 20), (110, 110, 110)
DIM, WASH = 0.35, 0.8
"""Brightness of a dropped token; how white a part is that no token shows."""
GAP = 10
MOST_HEIGHT = 1200
"""Pixels above which rows go on in a second block beside the first; more where there are many."""
ASPECT = 2.0
"""How many times as wide as high a large sheet is, about."""
COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
    (204, 121, 167), (120, 94, 240),
)  # fmt: skip
"""Of the tokens that others were merged into; told apart by the colour-blind too."""


def draw_sheet(drawing: Drawing) -> bytes:
    """Return the PNG of a drawing, its runs side by side."""
    keys = drawing.sheet()
    drawing.read_pictures(keys)
    sheet = arrange([draw_run(drawing, run, keys) for run in drawing.runs])
    file = io.BytesIO()
    sheet.save(file, "PNG", compress_level=4)
    return file.getvalue()


def arrange(runs: Sequence[Image.Image]) -> Image.Image:
    """Return the pictures of runs side by side, in as many lines as bring them near to ASPECT."""
    width, height = max(run.width for run in runs), max(run.height for run in runs)

    def distortion(columns: int) -> float:
        lines = -(-len(runs) // columns)
        return abs(math.log(columns * width / (lines * height) / ASPECT))

    columns = min(range(1, len(runs) + 1), key=distortion)
    lines = [runs[first : first + columns] for first in range(0, len(runs), columns)]
    heights = [max(run.height for run in line) for line in lines]
    size = max(sum(run.width for run in line) for line in lines), sum(heights)
    sheet, top = Image.new("RGB", size, PAPER), 0
    for line, line_height in zip(lines, heights, strict=True):
        left = 0
        for run in line:
            sheet.paste(run, (left, top))
            left += run.width
        top += line_height
    return sheet


def draw_run(drawing: Drawing, run: DrawnRun, keys: list[tuple[int, int, bool]]) -> Image.Image:
    """Return one way to prune: its rows of panels, in blocks side by side, over a caption."""
    rows = [(panel, drawing.picture(run, panel)) for panel in run.panels if panel.key in keys]
    columns = max(len(run.stages), 1)
    blocks = [draw_block(run, block) for block in split_rows(rows, columns)]
    width = max(sum(block.width for block in blocks) + 2 * GAP, 640)
    chosen_by = drawing.runs[0].name.partition(":")[0] if run is not drawing.runs[0] else ""
    caption = caption_lines(run, len(rows), width - 2 * GAP, chosen_by)
    top = GAP + LINE * len(caption) + GAP
    sheet = Image.new("RGB", (width, top + max(block.height for block in blocks) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for line, (text, colour) in enumerate(caption):
        draw_text(pen, (GAP, GAP + line * LINE), text, colour, HEAD)
    paste_beside(sheet, blocks, top)
    return sheet


def paste_beside(sheet: Image.Image, blocks: Sequence[Image.Image], top: int) -> None:
    """Put blocks side by side, a line before each that goes on where the one before ended."""
    left = GAP
    for number, block in enumerate(blocks):
        sheet.paste(block, (left, top))
        if number:
            edge = [(left - GAP // 2, top), (left - GAP // 2, top + block.height)]
            ImageDraw.Draw(sheet).line(edge, GREY)
        left += block.width


def split_rows(rows: list[Row], columns: int) -> list[list[Row]]:
    """Return the rows in blocks of about the same height, as many as bring them near to ASPECT.

    Args:
        columns: pictures in a row.
    """
    heights = [picture.height + LINE + GAP for _, picture in rows]
    width = columns * (max(picture.width for _, picture in rows) + GAP)
    limit = max(MOST_HEIGHT, math.sqrt(sum(heights) * width / ASPECT))
    target = sum(heights) / math.ceil(sum(heights) / limit)
    blocks: list[list[Row]] = []
    used = 0
    for row, height in zip(rows, heights, strict=True):
        if not blocks or used + height / 2 > target:
            blocks.append([])
            used = 0
        blocks[-1].append(row)
        used += height
    return blocks


def draw_block(run: DrawnRun, rows: list[Row]) -> Image.Image:
    """Return some rows, one below the other, under the titles of the stages."""
    columns = max(len(run.stages), 1)
    titles = [run.stage_title(stage) for stage in range(columns)]
    labels = [
        [f"{run.title(panel)} · {panel.count(after)} of {len(panel.tokens)}" for panel, _ in rows]
        for after in range(1 if run.stages else 0, columns + 1 if run.stages else 1)
    ]
    texts = [*titles, *(label for column in labels for label in column)]
    wide = max(*(picture.width for _, picture in rows), *(text_width(text, TEXT) for text in texts))
    height = LINE + sum(picture.height + LINE + GAP for _, picture in rows)
    block = Image.new("RGB", (columns * (wide + GAP) + GAP, height), PAPER)
    pen = ImageDraw.Draw(block)
    for stage in range(columns):
        x, y = stage * (wide + GAP), LINE
        draw_text(pen, (x, 0), titles[stage], INK, TEXT)
        for number, (panel, picture) in enumerate(rows):
            draw_text(pen, (x, y), labels[stage][number], GREY, TEXT)
            drawn = draw_panel(run, panel, picture, stage + 1 if run.stages else 0)
            block.paste(drawn, (x, y + LINE - 3))
            y += picture.height + LINE + GAP
    return block


def caption_lines(
    run: DrawnRun, shown: int, width: int, chosen_by: str = ""
) -> list[tuple[str, tuple[int, int, int]]]:
    """Return the lines of a caption, and their colours.

    Args:
        shown: panels that are drawn.
        width: pixels of a line.
        chosen_by: the run that the panels were chosen by, where it is another.
    """
    answered = [
        (f"Question: {run.question}", INK),
        (f"Answer: {run.answer or '(empty)'}", INK),
    ]
    names = [*run.files, run.model]
    texts = [
        *(answered if run.question else []),
        (run.name, GREY),
        (" · ".join(name for name in names if name), GREY),
    ]  # fmt: skip
    texts += [(text, GREY) for text in (run.legend, run.not_drawn) if text]
    if shown < len(run.panels):
        by = f" by {chosen_by}" if chosen_by else ""
        texts.append((f"{shown} of {len(run.panels)} frames: those with the most and the fewest "
                      f"tokens kept{by}", GREY))  # fmt: skip
    return [(line, colour) for text, colour in texts for line in fit_lines(text, HEAD, width)]


def draw_panel(run: DrawnRun, panel: Panel, picture: Image.Image, after: int) -> Image.Image:
    """Return a picture with its kept tokens clear and its dropped ones dimmed.

    Args:
        after: how many stages have cut.
    """
    item = run.item_of(panel)
    white = Image.new("RGB", picture.size, PAPER)
    drawn = Image.blend(picture, white, WASH)
    dim = ImageEnhance.Brightness(ImageEnhance.Color(picture).enhance(0.3)).enhance(DIM)
    merged = {
        token.merged_into
        for token in panel.tokens
        if token.merged_into is not None and not token.present(after)
    }
    outlines = []
    for token in panel.tokens:
        assert token.place.box is not None
        box = scaled(token.place.box, item, picture.size)
        if box[2] <= box[0] or box[3] <= box[1]:
            continue
        if token.present(after):
            drawn.paste(picture.crop(box), box[:2])
            if token.place.column in merged:
                outlines.append((box, colour_of(token.place.column)))
            continue
        part = dim.crop(box)
        if token.merged_into is not None:
            tint = Image.new("RGB", part.size, colour_of(token.merged_into))
            part = Image.blend(part, tint, 0.45)
        drawn.paste(part, box[:2])
    pen = ImageDraw.Draw(drawn)
    for box, colour in outlines:
        pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=colour, width=2)
    if panel.tiled:
        for box in tile_boxes(run, panel, picture.size):
            pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=(255, 255, 255))
    pen.rectangle((0, 0, picture.width - 1, picture.height - 1), outline=GREY)  # paper is white too
    return drawn


def tile_boxes(
    run: DrawnRun, panel: Panel, size: tuple[int, int]
) -> list[tuple[int, int, int, int]]:
    """Return the boxes around the tokens of each tile."""
    tiles: dict[int, list[tuple[int, int, int, int]]] = {}
    for token in panel.tokens:
        assert token.place.box is not None
        box = scaled(token.place.box, run.item_of(panel), size)
        tiles.setdefault(token.place.tile, []).append(box)
    return [
        (min(b[0] for b in boxes), min(b[1] for b in boxes),
         max(b[2] for b in boxes), max(b[3] for b in boxes))
        for boxes in tiles.values()
    ]  # fmt: skip


def colour_of(column: int) -> tuple[int, int, int]:
    """Return the colour of what was merged into a token; mixed, so that most neighbours differ."""
    return COLOURS[zlib.crc32(str(column).encode()) % len(COLOURS)]
