"""Speed-ups of a profile against what is kept, beside what FLOPs and the machine allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from vtprune.pictures.chart import SMALL, literal, new_figure, show_speed_ups, to_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = 90  # characters
Values = Mapping[str, object]
LINES = {
    "prefill_predicted": ("by FLOPs", "--", "0.45"),
    "prefill_roofline": ("roofline of this machine", ":", "0.45"),
    "prefill_speedup": ("prefill, measured", "-", "C0"),
    "first_token_speedup": ("first token, measured", "-", "C1"),
    "first_token_roofline": ("first token, roofline of this machine", ":", "C1"),
}
"""Figure of `compare` -> its name, its line and its colour."""
MEASURED = {"prefill_speedup": "-", "first_token_speedup": "--"}
"""Figures that are drawn of every method where there are several, and their lines."""
PRESETS = {
    "prefill_speedup": "presets: prefill, measured",
    "prefill_roofline": "presets: prefill, roofline of this machine",
}


def draw_profile(profile: Values, kind: str = "png") -> bytes:
    """A picture, PNG or SVG: the speed-ups of the keeps as lines, those of the presets as crosses.

    Where several methods cut at the keeps, each has a colour.
    """
    rows = [row for row in cast("Sequence[Values]", profile["rows"]) if "error" not in row]
    keeps = sorted((row for row in rows if row["preset"] is None), key=kept)
    methods = list(dict.fromkeys(str(row["method"]) for row in keeps if row["method"]))
    figure = new_figure(8, 5)
    axes = figure.subplots()
    if len(methods) > 1:
        plain = [row for row in keeps if row["stages_of"] is None and row["method"] is None]
        for number, method in enumerate(methods):
            own = [row for row in keeps if row["method"] == method]
            draw_method(axes, [*own, *plain], f"C{number}", method)
    else:
        for name, (label, line, colour) in LINES.items():
            draw_line(axes, keeps, name, line, colour, label)
        draw_spread(axes, keeps)
    draw_presets(axes, [row for row in rows if row["preset"] is not None])
    show_speed_ups(axes, title(profile))
    axes.legend(fontsize=SMALL)
    return to_bytes(figure, kind)


def draw_method(axes: Axes, rows: Sequence[Values], colour: str, method: str) -> None:
    """What was measured of one method, and what its FLOPs promise."""
    for name, line in {**MEASURED, "prefill_predicted": ":"}.items():
        draw_line(axes, rows, name, line, colour, f"{method}: {LINES[name][0]}")


def draw_line(
    axes: Axes, rows: Sequence[Values], name: str, line: str, colour: str, label: str
) -> None:
    """One figure of rows, where all have it."""
    if all(name in cast("Values", row["compare"]) for row in rows):
        values = [figure_of(row, name) for row in rows]
        marker = "o" if name in MEASURED else ""
        axes.plot([kept(row) for row in rows], values, line, color=colour, label=label,
                  marker=marker)  # fmt: skip


def draw_spread(axes: Axes, rows: Sequence[Values]) -> None:
    """From the slowest to the fastest pass."""
    spread = [(kept(row), cast("Values", row["compare"]).get("prefill_spread")) for row in rows]
    known = [(at, cast("Sequence[float]", found)) for at, found in spread if found]
    if known:
        at, ranges = zip(*known, strict=True)
        axes.fill_between(at, [low for low, _ in ranges], [high for _, high in ranges],
                          color="C0", alpha=0.15, linewidth=0,
                          label="prefill, slowest to fastest pass")  # fmt: skip


def draw_presets(axes: Axes, rows: Sequence[Values]) -> None:
    """A cross for every preset's prefill: measured, else the limit."""
    for number, row in enumerate(rows):
        compare = cast("Values", row["compare"])
        name = "prefill_speedup" if "prefill_speedup" in compare else "prefill_roofline"
        point = (kept(row), figure_of(row, name))
        axes.plot(*point, "x", color="C0", label="" if number else PRESETS[name])
        axes.annotate(literal(str(row["preset"]), TITLE), point, fontsize=SMALL,
                      textcoords="offset points", xytext=(4, 4))  # fmt: skip


def kept(row: Values) -> float:
    return cast(float, cast("Values", row["tokens"])["keep_mean"])


def figure_of(row: Values, name: str) -> float:
    return cast(float, cast("Values", row["compare"])[name])


def title(profile: Values) -> str:
    """The model, the input and the machine."""
    model, shown = cast("Values", profile["model"]), cast("Values", profile["input"])
    machine = cast("Values", profile["machine"])
    told = (f"{model['name']}, {model['dtype']}, {shown['visual_tokens']} visual tokens, "
            f"{machine['name']}")  # fmt: skip
    return literal(told, TITLE)
