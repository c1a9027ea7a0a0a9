"""The tables of `vtprune evaluate --needle`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vtprune.cli.console.evaluation import missing_of, name_with_keep, row_name
from vtprune.cli.console.facts import model_fact
from vtprune.cli.console.tables import labelled, plain_table, print_fitted, show_warning
from vtprune.cli.console.terminal import printable
from vtprune.inference.wording import counted

if TYPE_CHECKING:
    from vtprune.evaluation.bootstrap import Estimate
    from vtprune.evaluation.needles.result import NeedleRow, NeedleTest

TABLES: Sequence[tuple[str, str]] = (
    ("tokens", "tokens of the needles that are kept, %, by size"),
    ("right", "right answers, %, by size"),
    ("same", "answers that are the unpruned model's, %, by size"),
)
"""Figure -> the heading of its table."""


def show_needles(test: NeedleTest, console: Console) -> None:
    """Print what every row keeps of needles, by size and by kind, and how small a detail it is."""
    rows = [row for row in test.rows if row.figures]
    for number, (figure, heading) in enumerate(TABLES):
        if any(getattr(one, figure) for row in rows for one in row.figures.values()):
            if number:
                console.print()
            console.print(Text(heading, "bold"))
            print_fitted(_by_size(rows, figure), console)
    console.print()
    console.print(Text("by kind, %: tokens kept, right answers, the unpruned model's answers",
                       "bold"))  # fmt: skip
    print_fitted(_by_kind(rows), console)
    lines = labelled()
    for row in rows:
        if row.role == "asked" and row.sentence:
            lines.add_row("details", Text(printable(f"{name_with_keep(row)} {row.sentence}")))
    for row in test.rows:
        missing = missing_of(row.needles, test.needles, "needle")
        for reason in row.errors:
            text = f"{name_with_keep(row)}{missing}: {reason}"
            lines.add_row("not run", Text(printable(text), "yellow"))
    if lines.row_count:
        console.print()
        console.print(lines)


def _by_size(rows: Sequence[NeedleRow], figure: str) -> Table:
    """Return a table of one figure, with the interval of each; a frame has no size."""
    unpruned = rows[0]
    keys: list[tuple[str | None, float | None]] = [(None, size) for size in unpruned.sizes]
    keys += [("frame", None)] * (("frame", None) in unpruned.figures)
    keys = [key for key in keys if unpruned.figures[key].count(figure)]
    table = plain_table()
    table.add_column("", overflow="fold")
    table.add_column("kept", justify="right")
    for kind, size in keys:
        one = unpruned.figures[kind, size]
        heading = f"{kind or f'{size:g}'}\nn={one.count(figure)}"
        table.add_column(heading, justify="right", no_wrap=True)
    for place, (keep, group) in enumerate(groupby(rows, key=lambda row: row.keep)):
        if place:
            table.add_row()
            table.add_row(Text("own keeps" if keep is None else f"keep {keep:g}", "bold"))
        for row in group:
            cells = [_cell(row, key, figure, unpruned) for key in keys]
            table.add_row(Text(row_name(row)), f"{row.keep_mean:.0%}", *cells,
                          style="dim" if row.role == "baseline" else "")  # fmt: skip
    return table


def _cell(
    row: NeedleRow,
    key: tuple[str | None, float | None],
    name: str,
    unpruned: NeedleRow,
    interval: bool = True,
) -> str:
    """Return a figure in percent; "" where it is not known.

    It has a star where it is of fewer needles than the unpruned model's.
    """
    figures = row.figures.get(key)
    figure: Estimate | None = None if figures is None else getattr(figures, name)
    if figures is None or figure is None:
        return ""
    star = "*" * (figures.count(name) < unpruned.figures[key].count(name))
    if not interval:
        return f"{figure.mean:.0%}{star}"
    mean, low, high = (100 * share for share in (figure.mean, figure.low, figure.high))
    return f"{mean:.0f} ({low:.0f}-{high:.0f}){star}"


def _by_kind(rows: Sequence[NeedleRow]) -> Table:
    """Return a table of the figures of each kind, of all sizes."""
    columns = [
        (kind, figure)
        for (kind, size), one in rows[0].figures.items()
        if kind is not None and size is None
        for figure, _ in TABLES
        if getattr(one, figure) is not None
    ]
    table = plain_table(gap=1)
    table.add_column("")
    for kind, figure in columns:
        table.add_column(f"{kind}\n{figure}", justify="right")
    for row in rows:
        cells = [
            _cell(row, (kind, None), figure, rows[0], interval=False) for kind, figure in columns
        ]
        table.add_row(Text(name_with_keep(row)), *cells,
                      style="dim" if row.role == "baseline" else "")  # fmt: skip
    return table


def show_notes(test: NeedleTest, console: Console) -> None:
    """Print what was planted, how to read the tables, and the warnings."""
    lines = labelled()
    planted = f"{counted(test.needles, 'needle')} in {counted(len(test.media), 'file')}"
    lines.add_row("planted", Text(planted))
    lines.add_row("model", Text(model_fact(test.model, kernel=False)))
    lines.add_row(
        "table",
        "sizes: widths as shares of the shorter side; in brackets 95 % intervals (bootstrap over "
        "files); kept, and tokens of a needle: averages over the layers (the JSON has what is left "
        "after the last cut, too); right: where the right answer is known; same: answers that are "
        "the unpruned model's; *: of fewer needles than n; random rows: means over seeds",
    )
    console.print()
    console.print(lines)
    for warning in test.warnings:
        show_warning(warning, console)
