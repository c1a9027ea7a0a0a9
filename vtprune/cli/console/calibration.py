"""The tables of `vtprune calibrate`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vtprune.cli.console import show_facts, show_table, show_warning
from vtprune.cli.console.tables import labelled, list_failed

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from vtprune.evaluation.bootstrap import Gap
    from vtprune.evaluation.calibration.horizon import Horizon
    from vtprune.evaluation.calibration.result import CalibrationResult, TokenInformation

TableCells = tuple[list[str], list[list[str]]]
TABLE = (
    "fall: of the entropy from the layer before; general, text-heavy: change of the quality, "
    "relative to the unpruned model's, when all visual tokens are dropped from that layer on; "
    "lower: its lower 95 % bound; exact: share of answers that greedy decoding still gives; draws: "
    "of files, with replacement; of a horizon the first layers from which on the mean change, and "
    "not its lower bound, is at -1 % or above"
)
SCHEDULES = (
    "behind: share of the unpruned quality that is lost beyond what the best loses, with its 95 % "
    "interval (bootstrap over files); alike: the interval holds 0"
)


def show_calibration(measured: CalibrationResult, console: Console) -> None:
    """Print what was measured."""
    show_table(*_layers(measured), console)
    console.print()
    show_facts(_facts(measured), console)
    if measured.failed:
        lines = labelled()
        list_failed(measured.failed, measured.questions, lines)
        console.print(lines)
    if measured.information:
        console.print()
        show_table(*_windows(measured.information), console)
    if measured.tried:
        console.print()
        show_table(*_schedules(measured), console)
        console.print()
        show_facts([("propose", measured.proposal() or "no schedule meets this budget")], console)


def show_notes(measured: CalibrationResult, written: Sequence[Path], console: Console) -> None:
    """Print how to read the tables, the warnings, and which files hold the result."""
    show_facts([("table", TABLE)], console)
    if measured.tried:
        show_facts([("", SCHEDULES)], console)
    for warning in measured.warnings:
        show_warning(warning, console)
    if written:
        show_facts([("written", ", ".join(map(str, written)))], console)


def _layers(measured: CalibrationResult) -> TableCells:
    """Return a row for each layer: entropy, and what dropping all visual tokens from it on does."""
    headings = ["<layer", "<entropy", "<fall"]
    for group in measured.horizons:
        headings += [f"<{group}", "<lower", "<exact"]
    curve = measured.collapse.curve
    rows = []
    for layer, entropy in enumerate(curve):
        fall = f"{curve[layer - 1] - entropy:+.3f}" if layer else ""
        row = [str(layer), f"{entropy:.3f}", fall]
        for horizon in measured.horizons.values():
            change = horizon.change
            row += [f"{change.mean[layer]:+.1%}", f"{change.lower[layer]:+.1%}",
                    f"{horizon.exact[layer]:.0%}"]  # fmt: skip
        rows.append(row)
    return headings, rows


def _windows(information: TokenInformation) -> TableCells:
    """Return a row for each layer: what the text reads from single 2 x 2 windows from it on."""
    headings = ["<layer", "<window, mean", "<largest"]
    rows = [
        [str(layer), f"{mean:+.4f}", f"{largest:.4f}"]
        for layer, (mean, largest) in enumerate(
            zip(information.mean, information.largest, strict=True)
        )
    ]
    return headings, rows


def _facts(measured: CalibrationResult) -> Iterable[tuple[str, str]]:
    from vtprune.inference.wording import counted

    collapse = measured.collapse
    fall = f"falls by {collapse.drop:.3f}" if collapse.drop > 0 else "does not fall before half way"
    yield (
        "ecl",
        f"layer {collapse.layer}: entropy {fall}; {collapse.share:.0%} of "
        f"{counted(measured.inputs, 'input')} agree; it is {collapse.certainty()}",
    )
    for group, horizon in measured.horizons.items():
        yield "horizon", f"{group}: {_horizon(horizon)}"
    yield "measure", f"{measured.quality()}, in {measured.seconds:.0f} s"


def _horizon(horizon: Horizon) -> str:
    if horizon.layer is None:
        text = f"not found ({horizon.asked()}): {horizon.reason()}"
        return f"{text}; {horizon.certainty()}" if horizon.certainty() else text
    lowest = min(horizon.change.lower[horizon.layer :])
    text = f"layer {horizon.layer} ({horizon.asked()}): the lower bound is {lowest:+.1%} from there"
    return "; ".join(filter(None, (text, horizon.certainty(), horizon.reason())))


def _schedules(measured: CalibrationResult) -> TableCells:
    """Return a row for each schedule; with intervals where there are files enough."""
    few = bool(measured.too_few())
    headings = ["<keep", "<change", "<lower", "<exact", "<behind", "<95 %", "", "schedule"]
    rows = []
    for number, tried in enumerate(measured.tried):
        if tried.change is None or tried.behind is None:
            rows.append([*[""] * 7, f"{tried.schedule.name}: {tried.unreachable}"])
            continue
        alike = "too few files" if few else "alike"
        rows.append([
            f"{tried.keep_mean:.3f}",
            f"{tried.change.mean[0]:+.1%}",
            f"{tried.change.lower[0]:+.1%}",
            f"{tried.exact:.0%}",
            f"{tried.behind.mean:.1%}" if number else "",
            _interval(tried.behind) if number else "",
            "best" if number == 0 else "" if tried.apart else alike,
            tried.schedule.name,
        ])  # fmt: skip
    table = [headings, *rows]
    if few:
        bounds = [headings.index("<lower"), headings.index("<95 %")]
        table = [[cell for place, cell in enumerate(row) if place not in bounds] for row in table]
    return table[0], table[1:]


def _interval(gap: Gap) -> str:
    if gap.low is None or gap.high is None:
        return ""
    return f"{gap.low:.1%} to {gap.high:.1%}"
