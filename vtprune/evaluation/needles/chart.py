"""A chart of a test with needles: what is kept of their tokens, and of the answers, by size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtprune.evaluation.needles.result import NeedleTest
from vtprune.inference.wording import counted
from vtprune.pictures.chart import (
    INTERVALS,
    draw_interval,
    literal,
    mark_rows,
    new_figure,
    show_shares,
    to_bytes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (("tokens", "share of the needles' tokens kept"), ("same", "same answer as unpruned"))
WIDTH = "width of the needle, in percent of the shorter side"
TITLE = 60  # characters of a model's name


def plot(test: NeedleTest, kind: str = "png") -> bytes:
    """Draw a line a row: a colour a way to prune, a marker a keep, the baselines dashed.

    Args:
        kind: of the file: "png", "svg" or "pdf".
    """
    figure = new_figure(9.9, 9.4)
    panels = figure.subplots(2, 1)
    for axes, (name, label) in zip(panels, PANELS, strict=True):
        _draw(axes, test, name)
        axes.set(ylabel=label, xlabel=f"{WIDTH} (bands and {INTERVALS})")
        for which in ("x", "y"):
            show_shares(axes, which)
        axes.grid(alpha=0.3)
    planted = f"{counted(test.needles, 'needle')} in {counted(len(test.media), 'file')}"
    if any(0 < row.needles < test.needles for row in test.rows):
        planted += "; *: fewer"
    panels[0].set_title(f"{literal(test.model.name, TITLE)}: {planted}", fontsize=10)
    panels[0].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return to_bytes(figure, kind)


def _draw(axes: Axes, test: NeedleTest, name: str) -> None:
    rows = sorted(test.rows[1:], key=lambda row: row.role == "baseline")
    marks = mark_rows([(row.way, row.keep) for row in rows])
    for row, (colour, marker) in zip(rows, marks, strict=True):
        if not row.sizes:
            continue
        figures = [getattr(row.figures[None, size], name) for size in row.sizes]
        asked = row.role == "asked"
        axes.plot(
            row.sizes,
            [one.mean for one in figures],
            label=literal(row.name, TITLE) + "*" * (row.needles < test.needles),
            color=colour,
            linestyle="solid" if asked else "dashed",
            marker=marker,
            linewidth=1.3,
            markersize=4,
        )
        if asked:
            low, high = [one.low for one in figures], [one.high for one in figures]
            draw_interval(axes, row.sizes, [one.mean for one in figures], low, high, colour)
