"""A chart of a comparison: speed-ups by kept fraction, measured and predicted by FLOPs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vtprune.evaluation.comparison import Comparison, ComparisonRow
from vtprune.pictures.chart import (
    GREY,
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

PANELS = {"prefill": "prefill", "first_token": "first token (preprocessing and vision included)"}
MARKS = {"random": "x", "uniform": "+", "downsample": "v"}
TITLE = 110  # characters of a line


@dataclass
class Series:
    """The rows of one method, preset or baseline, over the keeps.

    Args:
        label: in the legend.
        owner: the asked row that it is, or matches; empty for any other baseline.
        points: (fraction kept, measured speed-up, speed-up by FLOPs) of each panel.
        spreads: lowest and highest measured speed-up of each point.
    """

    label: str
    owner: str
    name: str
    points: Mapping[str, list[tuple[float, float, float]]] = field(
        default_factory=lambda: {panel: [] for panel in PANELS}
    )
    spreads: Mapping[str, list[tuple[float, float]]] = field(
        default_factory=lambda: {panel: [] for panel in PANELS}
    )


def draw_speed(comparison: Comparison, kind: str = "png") -> bytes:
    """Draw a chart with a panel for the prefill and one for the first token.

    Each row that was asked for is a line with dots in its own colour, in front of the others, with
    the span of its pairs of runs, and a dashed line for what the FLOPs predict; its matched
    baselines have its colour, the other baselines are grey. Of more than seven rows the others are
    grey, too.

    Args:
        kind: "png", "svg" or "pdf".
    """
    series = collect_series(comparison)
    lines = len(series) + sum(line.name == line.owner for line in series)
    figure = new_figure(13, max(5, 0.2 * lines))
    axes = dict(zip(PANELS, figure.subplots(1, len(PANELS)), strict=True))
    colours = line_colours(line.owner for line in series if line.owner)
    for panel, panel_axes in axes.items():
        for line in series:
            draw_series(panel_axes, line, panel, colours.get(line.owner, GREY))
        show_speed_ups(panel_axes, PANELS[panel])
    handles, labels = axes["prefill"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=SMALL)
    figure.suptitle(title(comparison), fontsize=10)
    return to_bytes(figure, kind)


def title(comparison: Comparison) -> str:
    """Return model, visual tokens and question on one line, without mathematics in it."""
    tokens = comparison.rows[0].tokens
    assert tokens is not None
    text = (f"{comparison.model.name}, {tokens.visual} visual tokens: "
            f"{comparison.question}")  # fmt: skip
    return literal(text, TITLE)


def collect_series(comparison: Comparison) -> list[Series]:
    """Return what was measured by method; points by kept fraction."""
    unpruned = comparison.rows[0].flops
    vision = unpruned.vision if unpruned else None
    series_by_row: dict[tuple[str, str], Series] = {}
    for row in comparison.rows[1:]:
        if row.compare is None or row.tokens is None or row.flops is None:
            continue
        owner = row.name if row.role == "asked" else row.beside[0] if row.beside else ""
        label = row.name if row.role == "asked" else f"{row.name} {place(row, owner)}"
        series = series_by_row.setdefault((row.name, owner), Series(label, owner, row.name))
        full, prefill, encoded = row.flops.prefill_full, row.flops.prefill, row.flops.vision
        predicted = dict.fromkeys(series.points, math.nan)  # is not drawn
        if full and prefill:
            predicted["prefill"] = full / prefill
            if vision and encoded is not None:
                predicted["first_token"] = (vision + full) / (encoded + prefill)
        for panel, points in series.points.items():
            speedup = row.compare.speedup(panel)
            points.append((row.tokens.keep_mean, speedup, predicted[panel]))
            series.spreads[panel].append(row.compare.spread(panel))
    return list(series_by_row.values())


def place(row: ComparisonRow, owner: str) -> str:
    """Return where a baseline cuts, for the legend."""
    return f"where {owner} cuts" if owner else f"at {row.at}"


def draw_series(axes: Axes, series: Series, panel: str, colour: str) -> None:
    """Draw a line of what was measured, and for an asked row one of what the FLOPs predict."""
    asked = series.name == series.owner
    points = sorted(zip(series.points[panel], series.spreads[panel], strict=True))
    kept, measured, predicted = zip(*(point for point, _ in points), strict=True)
    axes.plot(
        kept, measured, color=colour, label=series.label, marker="o" if asked else
        MARKS.get(series.name, "s"), linewidth=2 if asked else 1, alpha=1 if asked else 0.7,
        zorder=3 if asked else 2,
    )  # fmt: skip
    if asked:
        low, high = zip(*(spread for _, spread in points), strict=True)
        draw_interval(axes, kept, measured, low, high, colour)
        axes.plot(kept, predicted, color=colour, linestyle="--", marker="_", linewidth=1,
                  label=f"{series.label}, by FLOPs")  # fmt: skip
