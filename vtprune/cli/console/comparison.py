"""The table of `vtprune compare`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from vtprune.cli.console.facts import model_fact, read_fact
from vtprune.cli.console.tables import labelled, plain_table, print_fitted, show_warning
from vtprune.cli.console.terminal import printable
from vtprune.cli.console.values import duration, si
from vtprune.inference.wording import PAYS

if TYPE_CHECKING:
    from vtprune.evaluation.comparison import Comparison, ComparisonRow

WIDE = 110  # columns of a terminal from which on answers have room in the table
MEASURED = ("prefill", "first token", "realised")


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print the rows of a comparison; on a narrow terminal, their answers below the table."""
    rows = comparison.rows
    wide = console.width >= WIDE
    parts = _parts(comparison)
    table = plain_table()
    for heading in ("", "cuts at"):
        table.add_column(heading, overflow="fold")
    for part in parts:
        heading = part if wide else part.replace(" ", "\n")
        table.add_column(heading, justify="right", overflow="fold")
    if wide:
        table.add_column("answer", overflow="fold", ratio=1)
    for (is_first, keep), group in groupby(rows, key=lambda row: (row is rows[0], row.keep)):
        if not is_first:
            table.add_row()
            table.add_row(Text("own keeps" if keep is None else f"keep {keep:g}", "bold"))
        for row in group:
            figures = [Text(_figure(row, rows[0], part)) for part in parts]
            answer = [_answer(row)] if wide else []
            is_baseline = row.role == "baseline"
            name = Text(("  " if is_baseline and row.beside else "") + printable(row.name))
            table.add_row(name, Text(_places(row, wide)), *figures, *answer,
                          style="dim" if is_baseline else "")  # fmt: skip
    print_fitted(table, console)
    if not wide:
        console.print()
        for (label, text), names in _by_answer(rows).items():
            lines = labelled()
            lines.add_row(label, Text(text, "bold" if label == "answer" else "yellow"))
            lines.add_row("", Text("; ".join(names), "dim"))
            console.print(lines)


def show_notes(comparison: Comparison, console: Console) -> None:
    """Print what was read by which model, how to read the table, and whether pruning pays."""
    rows, pairs = comparison.rows, comparison.pairs
    lines = labelled()
    lines.add_row("read", Text(read_fact(comparison.input)))
    lines.add_row("model", Text(model_fact(comparison.model, kernel=False)))
    lines.add_row("table", "kept: tokens after each cut; mean: kept fraction over the layers")
    if any(row.evidence_kept is not None for row in rows):
        lines.add_row("", "evidence: share of the unpruned answer's, over the layers, like mean")
    flops = "vision, FLOPs: of tower and prefill" if _vision(rows) else "FLOPs: of the prefill"
    lines.add_row("", f"{flops}, relative to the unpruned model's")
    if pairs:
        times = f"{pairs} pairs" if pairs != 1 else "1 pair"
        lines.add_row("", f"prefill, first token: speed-ups, medians of {times} of runs")
        lines.add_row("", "realised: prefill speed-up as a share of what the FLOPs predict")
        if verdict := _verdict(rows):
            lines.add_row("", Text(verdict, "yellow"))
    console.print()
    console.print(lines)
    for warning in comparison.warnings:
        show_warning(warning, console)


def _parts(comparison: Comparison) -> list[str]:
    """Return the headings of the columns of figures."""
    parts = ["kept", "mean", *(["vision"] if _vision(comparison.rows) else []), "FLOPs"]
    if any(row.evidence_kept is not None for row in comparison.rows):
        parts.insert(2, "evidence")
    return [*parts, *(MEASURED if comparison.pairs else ()), "same"]


def _vision(rows: Sequence[ComparisonRow]) -> bool:
    """Return whether some row spares the vision tower work."""
    return len({row.flops.vision for row in rows if row.flops}) > 1


def _places(row: ComparisonRow, named: bool) -> str:
    """ "2 (ecl), 12 (horizon)": the layers that were cut at, with the names that they had."""
    if row.tokens is None:
        return row.at
    places = []
    for stage in row.tokens.stages:
        layer = str(stage.layer)
        if stage.at in (layer, "input", "pixels"):
            places.append(stage.at)
        else:
            places.append(f"{layer} ({stage.at})" if named else layer)
    return ", ".join(places)


def _figure(row: ComparisonRow, unpruned: ComparisonRow, part: str) -> str:
    """Return one figure of a row: the unpruned row's as it is, all others' relative to that.

    Args:
        part: the heading of its column; "-" stands where there is no figure.
    """
    if row.tokens is None:
        return "-"
    if part == "kept":
        counts = [stage.after for stage in row.tokens.stages] or [row.tokens.kept_after]
        return ", ".join(f"{count:,}" for count in counts)
    if part == "mean":
        return f"{row.tokens.keep_mean:.1%}"
    if part == "evidence":
        return "-" if row.evidence_kept is None else f"{row.evidence_kept:.1%}"
    if part == "same":
        return "yes" if row.same_answer else "no"
    if part in ("vision", "FLOPs"):
        flops, of_unpruned = _flops(row, part), _flops(unpruned, part)
        if flops is None or of_unpruned is None:
            return "-"
        if row is unpruned:
            return si(flops).strip()
        return f"{flops / of_unpruned:.1%}" if of_unpruned else "-"
    if part == "realised" and row is unpruned:
        return ""
    key = part.replace(" ", "_")
    if row is unpruned:
        return "-" if row.seconds is None else duration(row.seconds[key])
    if row.compare is None:
        return "-"
    if part == "realised":
        share = row.compare.realised_fraction
        return "-" if share is None else f"{share:.0%}"
    return f"{row.compare.speedup(key):.2f} x"


def _flops(row: ComparisonRow, part: str) -> float | None:
    """Return the FLOPs of the vision tower or of the prefill; None where they are not counted."""
    if row.flops is None:
        return None
    return row.flops.vision if part == "vision" else row.flops.prefill


def _answer(row: ComparisonRow) -> Text:
    """Return the answer of a row, or why it has none."""
    if row.error is not None:
        return Text(printable(row.error), "yellow")
    return Text(printable(row.answer or ""))


def _by_answer(rows: Sequence[ComparisonRow]) -> dict[tuple[str, str], list[str]]:
    """Return every answer, and every reason for none, once, with its label and its rows."""
    names: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        name = printable(row.name)
        if row.role != "unpruned":
            name += f" at {_places(row, named=False)}"
            name += "" if row.keep is None else f", keep {row.keep:g}"
        label = "answer" if row.error is None else "not run"
        names.setdefault((label, str(_answer(row))), []).append(name)
    return names


def _verdict(rows: Sequence[ComparisonRow]) -> str:
    """Return that pruning does not pay, where it does in no row that was asked for."""
    compared = [row.compare for row in rows if row.role == "asked" and row.compare]
    best = {
        part: max((compare.speedup(part) for compare in compared), default=PAYS)
        for part in ("prefill", "total")
    }
    if best["prefill"] < PAYS:
        return f"pruning does not pay here: {best['prefill']:.2f} x at best"
    if best["total"] < PAYS:
        return (f"pruning does not pay here: prefill {best['prefill']:.2f} x, the whole "
                f"{best['total']:.2f} x at best")  # fmt: skip
    return ""
