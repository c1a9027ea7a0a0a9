"""What all charts share: a figure without a display, axes of shares, the file that comes out."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING

from vtprune.errors import CONTROLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
SMALL = 8  # points of a legend's text
NARROW = 0.1  # an axis of shares is no narrower: its ticks would all be called the same
GREY = "0.45"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255")
"""Colours that the colour-blind can tell apart, too; the eighth is grey."""
MARKERS = "os^DvxP*<>"
INTERVALS = "bars: 95 %, bootstrap over files"
KEPT = "visual tokens kept, average over the layers"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, of DPI dots each."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def line_colours(names: Iterable[str]) -> dict[str, str]:
    """Return the colour of each line: the first ones have one of their own, the others are grey.

    Args:
        names: of the lines, the most important first.
    """
    distinct = dict.fromkeys(names)
    return dict(zip(distinct, chain(PALETTE, repeat(GREY)), strict=False))


def mark_rows(rows: Sequence[tuple[str, object]]) -> list[tuple[str, str]]:
    """Return colour and marker of each row: a colour a way to prune, a marker a keep.

    Ways beyond the colours are grey, and have markers of their own.

    Args:
        rows: (way, keep) of each, the most important first.
    """
    colours = line_colours(way for way, _ in rows)
    keeps = list(dict.fromkeys(keep for _, keep in rows))
    first = {way: max(0, number - len(PALETTE) + 1) for number, way in enumerate(colours)}
    return [
        (colours[way], MARKERS[(first[way] * len(keeps) + keeps.index(keep)) % len(MARKERS)])
        for way, keep in rows
    ]


def draw_interval(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    colour: str,
) -> None:
    """Draw from low to high around a line: a band, and bars where it has one point or two."""
    if len(x) > 2:
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        return
    below = [max(0.0, value - least) for value, least in zip(values, low, strict=True)]
    above = [max(0.0, most - value) for value, most in zip(values, high, strict=True)]
    axes.errorbar(x, values, yerr=[below, above], fmt="none", ecolor=colour, elinewidth=1,
                  capsize=3, zorder=3)  # fmt: skip


def to_bytes(figure: Figure, kind: str = "png") -> bytes:
    """A figure as a file.

    Args:
        kind: "png", "svg" or "pdf".
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        # SVG takes no control characters, nor lone surrogates.
        printable = CONTROLS.sub("", text.get_text())
        text.set_text(printable.encode("utf-8", "replace").decode())
    picture = io.BytesIO()
    figure.savefig(picture, format=kind)
    return picture.getvalue()


def literal(text: str, most: int) -> str:
    """Text of at most so many characters on one line, without mathematics in it."""
    return textwrap.shorten(text, most, placeholder=" ...").replace("$", r"\$")


def show_shares(axes: Axes, which: str) -> None:
    """Shares in whole percent on the "x" or "y" axis, once they are drawn."""
    from matplotlib.ticker import MaxNLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))  # no 2.5, which is not whole
    axis.set_major_formatter("{x:.0%}")
    low, high = axis.get_view_interval()
    if high - low < NARROW:
        middle = (low + high) / 2
        axes.set(**{f"{which}lim": (middle - NARROW / 2, middle + NARROW / 2)})


def show_kept(axes: Axes, label: str = KEPT) -> None:
    """What is kept, in percent, on the x axis."""
    axes.set_xlabel(label)
    show_shares(axes, "x")


def show_speed_ups(axes: Axes, title: str = "") -> None:
    """Speed-ups against what is kept, once they are drawn; a line where there is none."""
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(title=title, ylabel="times as fast as unpruned")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    show_kept(axes)
