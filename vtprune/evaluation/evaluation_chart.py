"""A chart of an evaluation: quality by kept fraction, and by the time to the first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vtprune.evaluation.evaluate import Evaluation
from vtprune.evaluation.rows import EvaluationRow
from vtprune.inference.wording import counted, with_options
from vtprune.pictures.chart import KEPT, literal, new_figure, show_kept, show_shares, to_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = 60  # characters of a model's name
MARKERS = "os^Dvx"


def plot(evaluation: Evaluation, kind: str = "png") -> bytes:
    """Draw quality by keep and by measured time to the first token, a line a method or preset.

    Args:
        kind: of the file: "png" or "svg".
    """
    base, *rows = evaluation.rows
    lines: dict[str, list[EvaluationRow]] = {}
    for row in rows:
        if row.questions:
            lines.setdefault(_label(row), []).append(row)
    figure = new_figure(9.9, 9.4)
    upper, lower = figure.subplots(2, 1)
    for number, (label, own) in enumerate(lines.items()):
        style: dict[str, object] = {
            "label": label,
            "color": f"C{number % 10}",
            "marker": MARKERS[number // 10 % len(MARKERS)],
            "linestyle": "dashed" if own[0].role == "baseline" else "solid",
            "linewidth": 1.3,
            "markersize": 4,
        }
        _by_keep(upper, own, style)
        _by_time(lower, own, style)
    what = "accuracy" if evaluation.labelled else "same answer as unpruned"
    for axes in (upper, lower):
        if base.questions:
            axes.axhline(base.quality.mean, color="0.4", linewidth=0.8, linestyle=(0, (4, 3)))
        show_shares(axes, "y")
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
    show_kept(upper, f"{KEPT} (bands: 95 %, bootstrap over files)")
    show_shares(lower, "x")
    lower.set_xlabel(
        "time to the first token, in percent of the unpruned one's (vision tower counted)"
    )
    count = f"{counted(evaluation.questions, 'question')} about {counted(evaluation.files, 'file')}"
    name = literal(str(evaluation.model.get("name", "")), TITLE)
    upper.set_title(f"{name}: {count}; the dashed level is the unpruned model", fontsize=10)
    if lines:
        upper.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return to_bytes(figure, kind)


def _label(row: EvaluationRow) -> str:
    if " beside " in row.name:
        return f"{row.method} beside {row.name.split(' beside ')[1].split(' keep ')[0]}"
    name = row.method and with_options(row.method, row.options)
    return f"{name} at {row.at}" if name else str(row.preset)


def _by_keep(axes: Axes, rows: Sequence[EvaluationRow], style: Mapping[str, object]) -> None:
    rows = sorted(rows, key=lambda row: row.keep_mean)
    found = [row.quality for row in rows]
    kept = [row.keep_mean for row in rows]
    axes.plot(kept, [one.mean for one in found], **style)  # type: ignore[arg-type]
    if rows[0].role == "asked":
        low, high = [one.low for one in found], [one.high for one in found]
        axes.fill_between(kept, low, high, color=str(style["color"]), alpha=0.12, linewidth=0)


def _by_time(axes: Axes, rows: Sequence[EvaluationRow], style: Mapping[str, object]) -> None:
    rows = sorted(rows, key=lambda row: row.keep_mean)
    times = [1 / max(row.first_token_speedup, 1e-9) for row in rows]
    axes.plot(times, [row.quality.mean for row in rows], **style)  # type: ignore[arg-type]
