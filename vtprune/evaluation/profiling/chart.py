"""Speed-ups of a profile by what is kept, beside what FLOPs and the machine allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vtprune.evaluation.profiling.result import MeasuredSpeedups, Profile, ProfileRow
from vtprune.pictures.chart import (
    SMALL,
    draw_interval,
    line_colours,
    literal,
    new_figure,
    show_speed_ups,
    to_bytes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


TITLE = 90  # characters
LINES = {
    "prefill_predicted": ("by FLOPs", "--", "0.45"),
    "prefill_roofline": ("roofline of this machine", ":", "0.45"),
    "prefill_speedup": ("prefill, measured", "-", "C0"),
    "first_token_speedup": ("first token, measured", "-", "C1"),
    "first_token_roofline": ("first token, roofline of this machine", ":", "C1"),
}
"""Speed-up in `compare` -> its name, its line and its colour."""
OF_METHODS = {"prefill_speedup": "-", "first_token_speedup": "--", "prefill_predicted": ":"}
"""Speed-ups that are drawn of every method where there are several, and their lines."""


def draw_profile(profile: Profile, kind: str = "png") -> bytes:
    """Draw the speed-ups of the keeps as lines, those of the presets as crosses.

    Where several methods cut at the keeps, each has a colour.

    Args:
        kind: "png", "svg" or "pdf".
    """
    rows = profile.good_rows
    keeps = sorted((row for row in rows if row.preset is None), key=kept)
    methods = list(dict.fromkeys(row.method for row in keeps if row.method))
    figure = new_figure(8, 5)
    axes = figure.subplots()
    if len(methods) > 1:
        colours = line_colours(methods)
        for method in methods:
            of_method = [row for row in keeps if row.method in (method, None)]
            for name, line in OF_METHODS.items():
                label = f"{method}: {LINES[name][0]}"
                draw_line(axes, of_method, name, line, colours[method], label)
            draw_spread(axes, of_method, colours[method])
    else:
        for name, (label, line, colour) in LINES.items():
            draw_line(axes, keeps, name, line, colour, label)
        draw_spread(axes, keeps, "C0")
    draw_presets(axes, [row for row in rows if row.preset is not None])
    show_speed_ups(axes, title(profile))
    axes.legend(fontsize=SMALL)
    return to_bytes(figure, kind)


def draw_line(
    axes: Axes, rows: Sequence[ProfileRow], name: str, line: str, colour: str, label: str
) -> None:
    """Draw one speed-up of rows, where all have it."""
    if all(hasattr(row.compare, name) for row in rows):
        values = [getattr(row.compare, name) for row in rows]
        marker = "o" if name.endswith("speedup") else ""
        axes.plot(list(map(kept, rows)), values, line, color=colour, label=label, marker=marker)


def draw_spread(axes: Axes, rows: Sequence[ProfileRow], colour: str) -> None:
    """Draw what is between the slowest and the fastest pass of the prefill."""
    spreads = [(kept(row), row.compare.prefill_speedup, *row.compare.prefill_spread)
               for row in rows if isinstance(row.compare, MeasuredSpeedups)]  # fmt: skip
    if spreads:
        x, measured, low, high = zip(*spreads, strict=True)
        draw_interval(axes, x, measured, low, high, colour)


def draw_presets(axes: Axes, rows: Sequence[ProfileRow]) -> None:
    """Draw a cross for every preset's prefill: measured, else at the roofline."""
    for number, row in enumerate(rows):
        measured = isinstance(row.compare, MeasuredSpeedups)
        name = "prefill_speedup" if measured else "prefill_roofline"
        point = (kept(row), getattr(row.compare, name))
        axes.plot(*point, "x", color="C0", label="" if number else f"presets: {LINES[name][0]}")
        axes.annotate(literal(str(row.preset), TITLE), point, fontsize=SMALL,
                      textcoords="offset points", xytext=(4, 4))  # fmt: skip


def kept(row: ProfileRow) -> float:
    return row.tokens.keep_mean


def title(profile: Profile) -> str:
    """The model, the input and the machine."""
    text = (f"{profile.model.name}, {profile.model.dtype}, {profile.input.visual_tokens} visual "
            f"tokens, {profile.machine.name}")  # fmt: skip
    return literal(text, TITLE)
