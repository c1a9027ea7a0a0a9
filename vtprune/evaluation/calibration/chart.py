"""A chart of the curves of a calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtprune.evaluation.calibration.horizon import TOLERANCE
from vtprune.evaluation.calibration.result import CalibrationResult, TokenInformation
from vtprune.inference.wording import counted
from vtprune.pictures.chart import SMALL, literal, new_figure, to_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORST = -0.3  # a change below is cut off: near the input an answer may lose all it has
TITLE = 90  # characters


def plot(measured: CalibrationResult, kind: str = "png") -> bytes:
    """Draw entropy, what dropping all visual tokens costs, and token information, by layer.

    Args:
        kind: of the file: "png" or "svg".
    """
    count = 2 if measured.information is None else 3
    figure = new_figure(8, 3.6 * count)
    panels = figure.subplots(count, 1, sharex=True)
    draw_entropy(panels[0], measured)
    draw_change(panels[1], measured)
    if measured.information is not None:
        draw_information(panels[2], measured.information)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=SMALL)
    panels[-1].set_xlabel("layer")
    panels[-1].set_xticks(range(0, measured.num_layers, max(1, measured.num_layers // 16)))
    name = f"{measured.model['name']}, {measured.source}"
    figure.suptitle(literal(name, TITLE))
    return to_bytes(figure, kind)


def draw_entropy(axes: Axes, measured: CalibrationResult) -> None:
    """Draw the mean curve, and the entropy collapse layer."""
    collapse = measured.collapse
    label = f"mean of {counted(measured.inputs, 'input')}"
    agreed = f"{collapse.share:.0%} agree" + ("" if collapse.drop > 0 else ", no fall")
    axes.plot(collapse.curve, marker="o", markersize=4, label=label)
    axes.axvline(collapse.layer, color="black", linestyle="--", linewidth=1,
                 label=f"ecl: layer {collapse.layer} ({agreed})")  # fmt: skip
    axes.set(title="matrix entropy of the visual tokens that enter a layer", ylabel="entropy")


def draw_change(axes: Axes, measured: CalibrationResult) -> None:
    """Draw the change of quality with its lower bound, and the horizons."""
    for number, (group, horizon) in enumerate(measured.horizons.items()):
        mean, lower = horizon.change.mean, horizon.change.lower
        colour, missing = f"C{number}", "" if horizon.layer is not None else ", no horizon found"
        axes.plot(
            mean,
            color=colour,
            marker="o",
            markersize=4,
            label=f"{group} ({horizon.asked()}){missing}",
        )
        axes.fill_between(range(len(mean)), lower, mean, color=colour, alpha=0.2, linewidth=0)
        if horizon.layer is not None:
            axes.axvline(horizon.layer, color=colour, linestyle="--", linewidth=1,
                         label=f"horizon: layer {horizon.layer}")  # fmt: skip
    most = f"{-TOLERANCE:.0%}: the most that may be lost"
    axes.axhline(-TOLERANCE, color="black", linestyle=":", linewidth=1, label=most)
    axes.set(title="all visual tokens dropped from a layer on, down to the lower 95 % bound",
             ylabel=f"change of the\n{measured.quality()}")  # fmt: skip
    axes.set_ylim(bottom=max(axes.get_ylim()[0], WORST))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def draw_information(axes: Axes, information: TokenInformation) -> None:
    """Draw what the text reads from single windows."""
    axes.plot(information.mean, marker="o", markersize=4, label="mean")
    axes.plot(information.largest, marker="o", markersize=4, label="largest of an input")
    axes.axhline(0, color="black", linestyle=":", linewidth=1)
    axes.set(
        title="what the text reads from single 2 x 2 windows from a layer on",
        ylabel=f"probability of the\nfirst answer token, {counted(information.inputs, 'input')}",
    )
