"""A chart of an evaluation: quality by kept fraction, and by the time to the first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vtprune.evaluation.evaluate import Evaluation
from vtprune.evaluation.rows import EvaluationRow
from vtprune.inference.wording import counted, with_options
from vtprune.pictures.chart import (
    INTERVALS,
    KEPT,
    MARKERS,
    PALETTE,
    draw_interval,
    line_colours,
    literal,
    new_figure,
    show_kept,
    show_shares,
    to_bytes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = 60  # characters of a model's name


def plot(evaluation: Evaluation, kind: str = "png") -> bytes:
    """Draw an evaluation.

    Args:
        kind: of the file: "png", "svg" or "pdf".
    """
    return plot_rows(evaluation.rows, evaluation.model.name, evaluation.questions,
                     evaluation.files, evaluation.labelled, kind)  # fmt: skip


def plot_rows(
    rows: Sequence[EvaluationRow],
    model: str,
    questions: int,
    files: int,
    labelled: bool = True,
    kind: str = "png",
) -> bytes:
    """Draw quality by keep and by measured time to the first token, a line a method or preset.

    What was asked for has colours of its own, and is in front of the baselines. The legend says how
    many questions each line is of, with a star where not all were asked.

    Args:
        rows: the unpruned one first.
        model: its name.
        questions, files: how many there are.
        labelled: quality is accuracy; else agreement with the unpruned model.
        kind: of the file: "png", "svg" or "pdf".
    """
    unpruned = rows[0]
    lines: dict[str, list[EvaluationRow]] = {}
    asked_first = sorted(rows[1:], key=lambda row: row.role == "baseline")
    for row in asked_first:
        if row.questions:
            lines.setdefault(_label(row), []).append(row)
    colours = line_colours(lines)
    figure = new_figure(9.9, 9.4)
    upper, lower = figure.subplots(2, 1)
    for number, (label, points) in enumerate(lines.items()):
        style: dict[str, object] = {
            "label": f"{literal(label, TITLE)} ({_counts(points, questions)})",
            "color": colours[label],
            "marker": MARKERS[number // len(PALETTE) % len(MARKERS)],
            "linestyle": "dashed" if points[0].role == "baseline" else "solid",
            "zorder": 2 if points[0].role == "baseline" else 3,
            "linewidth": 1.3,
            "markersize": 4,
        }
        _by_keep(upper, points, style)
        _by_time(lower, points, style)
    quality = "accuracy" if labelled else "same answer as unpruned"
    for axes in (upper, lower):
        if unpruned.questions:
            axes.axhline(unpruned.quality.mean, color="0.4", linewidth=0.8, linestyle=(0, (4, 3)))
        show_shares(axes, "y")
        axes.set_ylabel(quality)
        axes.grid(alpha=0.3)
    fewer = any(row.questions < questions for points in lines.values() for row in points)
    note = "; *: fewer questions were asked" if fewer else ""
    show_kept(upper, f"{KEPT} (bands and {INTERVALS}{note})")
    show_shares(lower, "x")
    lower.set_xlabel(
        "time to the first token, in percent of the unpruned one's (vision tower counted)"
    )
    count = f"{counted(questions, 'question')} about {counted(files, 'file')}"
    name = literal(model, TITLE)
    upper.set_title(f"{name}: {count}; the dashed level is the unpruned model", fontsize=10)
    if lines:
        upper.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return to_bytes(figure, kind)


def _counts(rows: Sequence[EvaluationRow], questions: int) -> str:
    """Return how many questions a line is of: "n = 24", or with a star where fewer than all."""
    low, high = (pick(row.questions for row in rows) for pick in (min, max))
    span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"n = {span}{'*' * (low < questions)}"


def _label(row: EvaluationRow) -> str:
    if " beside " in row.name:
        return f"{row.method} beside {row.name.split(' beside ')[1].split(' keep ')[0]}"
    name = row.method and with_options(row.method, row.options)
    return f"{name} at {row.at}" if name else str(row.preset)


def _by_keep(axes: Axes, rows: Sequence[EvaluationRow], style: Mapping[str, object]) -> None:
    rows = sorted(rows, key=lambda row: row.keep_mean)
    quality = [row.quality for row in rows]
    kept = [row.keep_mean for row in rows]
    axes.plot(kept, [estimate.mean for estimate in quality], **style)  # type: ignore[arg-type]
    if rows[0].role == "asked":
        low, high = [one.low for one in quality], [one.high for one in quality]
        draw_interval(axes, kept, [one.mean for one in quality], low, high, str(style["color"]))


def _by_time(axes: Axes, rows: Sequence[EvaluationRow], style: Mapping[str, object]) -> None:
    rows = sorted(rows, key=lambda row: row.keep_mean)
    times = [1 / max(row.first_token_speedup, 1e-9) for row in rows]
    axes.plot(times, [row.quality.mean for row in rows], **style)  # type: ignore[arg-type]
