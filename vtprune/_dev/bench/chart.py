"""How costs grow, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vtprune._dev.bench.results import Pass
from vtprune._dev.bench.tables import group, middle
from vtprune.pictures.chart import SMALL, new_figure, to_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_growth(passes: Sequence[Pass]) -> bytes:
    """A PNG: cost against visual tokens, and against frames, both axes logarithmic."""
    groups = group([one for one in passes if one.part == "growth"])
    groups.sort(key=lambda passes: passes[0].settings["frames"])
    figure = new_figure(12, 5)
    left, right = figure.subplots(1, 2)
    draw(left, groups, [one[0].sides["unpruned"]["visual"] for one in groups], "visual tokens")
    draw(right, groups, [float(one[0].settings["frames"]) for one in groups], "frames")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=SMALL)
    return to_bytes(figure)


def draw(axes: Axes, groups: Sequence[Sequence[Pass]], at: Sequence[float], name: str) -> None:
    """Prefills as lines, what of them is selection and hooks dashed, and a straight line beside."""
    for number, side in enumerate(groups[0][0].sides):
        prefill = [1000 * middle(one, side, "prefill") for one in groups]
        axes.plot(at, prefill, f"C{number}o-", label=f"{side}: prefill of two layers")
        if number:
            outside = [1000 * middle(one, side, "outside_layers") for one in groups]
            axes.plot(at, outside, f"C{number}o--", label=f"{side}: selection and hooks")
            if number == 1:
                line = [outside[0] * x / at[0] for x in at]
                axes.plot(at, line, color="0.6", linestyle=":", label="linear")
    axes.set(xscale="log", yscale="log", xlabel=name, ylabel="ms")
    axes.grid(alpha=0.3)
