"""What was kept in half blocks, for a terminal that shows text alone.

A cell is a token, two rows of them a line: full where both were kept, empty where both were
dropped.
"""

from __future__ import annotations

from vtprune.pictures.drawing import Drawing, DrawnRun, Panel

WIDTH = 78  # columns of a terminal that the miniature keeps to
BLOCKS = {(False, False): "·", (True, False): "▀", (False, True): "▄", (True, True): "█"}
CELLS = 36  # the most columns of a panel: larger ones are drawn at a part of their columns


def draw_miniature(drawing: Drawing, run: DrawnRun) -> str:
    """Return the panels of the sheet after the last stage, several side by side."""
    keys = set(drawing.sheet())
    return beside([panel_lines(run, panel) for panel in run.panels if panel.key in keys])


def beside(blocks: list[list[str]]) -> str:
    """Return blocks of lines, each as wide as its first, as many side by side as fit."""
    lines: list[str] = []
    row: list[list[str]] = []
    for block in [*blocks, None]:
        used = sum(len(one[0]) + 2 for one in row)
        if row and (block is None or used + len(block[0]) > WIDTH):
            tallest = max(map(len, row))
            for number in range(tallest):
                cells = [one[number] if number < len(one) else " " * len(one[0]) for one in row]
                lines.append("  ".join(cells).rstrip())
            row = []
        if block is not None:
            row.append(block)
    return "\n".join(lines)


def panel_lines(run: DrawnRun, panel: Panel) -> list[str]:
    """Return the lines of a panel, all as wide as the widest, its title first."""
    last = len(run.stages)
    rows = max(token.place.row for token in panel.tokens) + 1
    cols = max(token.place.col for token in panel.tokens) + 1
    step = -(-cols // CELLS)  # tokens to a cell
    kept: set[tuple[int, int]] = set()
    for token in panel.tokens:
        if token.present(last):
            kept.add((token.place.row // step, token.place.col // step))
    high, wide = -(-rows // step), -(-cols // step)
    lines = [
        "".join(BLOCKS[(row, col) in kept, (row + 1, col) in kept] for col in range(wide))
        for row in range(0, high, 2)
    ]
    lines = [f"{run.title(panel)} {panel.count(last)}/{len(panel.tokens)}", *lines, ""]
    width = max(map(len, lines))
    return [line.ljust(width) for line in lines]
