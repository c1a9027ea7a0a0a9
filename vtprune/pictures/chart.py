"""What all charts share: a figure without a display, axes of shares, the file that comes out."""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
SMALL = 8  # points of a legend's text
NARROW = 0.1  # an axis of shares is no narrower: its ticks would all be called the same
KEPT = "visual tokens kept, average over the layers"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, of DPI dots each."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def to_bytes(figure: Figure, kind: str = "png") -> bytes:
    """A figure as a file.

    Args:
        kind: "png" or "svg".
    """
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
