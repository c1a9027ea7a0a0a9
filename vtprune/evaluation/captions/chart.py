"""A chart of sampled captions: how right against how different, a point a row."""

from __future__ import annotations

from vtprune.evaluation.captions.result import CIDER, SELF_CIDER, CaptionTest
from vtprune.inference.wording import counted
from vtprune.pictures.chart import INTERVALS, literal, mark_rows, new_figure, to_bytes

TITLE = 60  # characters of a model's name
AXES = {
    CIDER: "CIDEr-D by the references, 0 to 10",
    SELF_CIDER: "self-CIDEr: how different, 0 to 1",
    "distinct_2": "distinct-2", "distinct_1": "distinct-1",
}  # fmt: skip


def plot(test: CaptionTest, kind: str = "png") -> bytes:
    """Draw every row with its intervals: a colour a way to prune, a marker a keep.

    The baselines are hollow.

    Without references, distinct-2 is in CIDEr's place.

    Args:
        kind: of the file: "png", "svg" or "pdf".
    """
    across, up = [name for name in AXES if name in test.rows[0].figures][:2]
    figure = new_figure(9.9, 5.4)
    axes = figure.subplots()
    rows = sorted(test.rows, key=lambda row: row.role == "baseline")
    marks = mark_rows([(row.way, row.keep) for row in rows])
    for row, (colour, marker) in zip(rows, marks, strict=True):
        if not row.questions:
            continue
        x, y = row.figures[across], row.figures[up]
        axes.errorbar(
            x.mean,
            y.mean,
            xerr=[[max(x.mean - x.low, 0.0)], [max(x.high - x.mean, 0.0)]],
            yerr=[[max(y.mean - y.low, 0.0)], [max(y.high - y.mean, 0.0)]],
            linestyle="none",
            marker=marker,
            color=colour,
            markerfacecolor="white" if row.role == "baseline" else colour,
            elinewidth=0.8,
            label=literal(row.name, TITLE) + "*" * (row.questions < test.questions),
        )
    axes.set(xlabel=f"{AXES[across]} ({INTERVALS})", ylabel=AXES[up])
    axes.grid(alpha=0.3)
    asked = f"{counted(test.questions, 'question')}, {test.captions} captions each"
    if any(0 < row.questions < test.questions for row in test.rows):
        asked += "; *: fewer"
    axes.set_title(f"{literal(test.model.name, TITLE)}: {asked}", fontsize=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return to_bytes(figure, kind)
