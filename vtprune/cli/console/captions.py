"""The tables of `vtprune evaluate --captions`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vtprune.cli.console.evaluation import missing_of, name_with_keep, row_name
from vtprune.cli.console.facts import asked_fact, model_fact
from vtprune.cli.console.tables import (
    labelled,
    list_failed,
    plain_table,
    print_fitted,
    show_warning,
)
from vtprune.cli.console.terminal import printable

if TYPE_CHECKING:
    from vtprune.evaluation.captions.result import CaptionRow, CaptionTest

HEADINGS = {
    "cider": "CIDEr", "self_cider": "self-CIDEr", "distinct_1": "distinct-1",
    "distinct_2": "distinct-2", "words": "words",
}  # fmt: skip


def show_captions(test: CaptionTest, console: Console) -> None:
    """Print how right and how different the captions of every row are, and what pruning changes."""
    rows = [row for row in test.rows if row.questions]
    print_fitted(_table(rows, test.questions, changes=False), console)
    if len(rows) > 1:
        console.print()
        console.print(Text("change from unpruned, paired by question", "bold"))
        print_fitted(_table(rows[1:], test.questions, changes=True), console)
    lines = labelled()
    for row in rows:
        if row.role == "asked" and row.verdict:
            lines.add_row("captions", Text(printable(f"{name_with_keep(row)}: {row.verdict}")))
    for row in test.rows:
        missing = missing_of(row.questions, test.questions, "question")
        for reason in row.errors:
            text = f"{name_with_keep(row)}{missing}: {reason}"
            lines.add_row("not run", Text(printable(text), "yellow"))
    list_failed(test.failed, test.questions, lines)
    if lines.row_count:
        console.print()
        console.print(lines)


def _table(rows: Sequence[CaptionRow], questions: int, changes: bool) -> Table:
    """Return the figures of the rows, or their differences from the unpruned model's.

    Args:
        questions: how many there are; a row of fewer has a star.
    """
    table = plain_table()
    table.add_column("", overflow="fold")
    for heading in ("kept", "n"):
        table.add_column(heading, justify="right")
    measures = [name for name in HEADINGS if any(name in row.figures for row in rows)]
    for name in measures:
        table.add_column(HEADINGS[name], justify="right", no_wrap=True)
    for place, (keep, group) in enumerate(groupby(rows, key=lambda row: row.keep)):
        if place or changes:
            if place:
                table.add_row()
            table.add_row(Text("own keeps" if keep is None else f"keep {keep:g}", "bold"))
        for row in group:
            figures = row.against_unpruned if changes else row.figures
            cells = [_cell(figures.get(name), changes, name) for name in measures]
            asked = f"{row.questions:,}{'*' * (row.questions < questions)}"
            table.add_row(Text(row_name(row)), f"{row.keep_mean:.0%}", asked, *cells,
                          style="dim" if row.role == "baseline" else "")  # fmt: skip
    return table


def _cell(figure: object, changes: bool, name: str) -> str:
    """Return a figure with its interval; "" where there is none."""
    mean, low, high = (getattr(figure, part, None) for part in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return ""
    form = ("+" if changes else "") + (".1f" if name == "words" else ".2f")
    return f"{mean:{form}} ({low:{form}}{' to ' if changes else '-'}{high:{form}})"


def show_notes(test: CaptionTest, console: Console) -> None:
    """Print how captions were sampled, how to read the tables, and the warnings."""
    lines = labelled()
    sampled = f"{test.captions} captions each, at temperature {test.temperature:g}"
    if test.top_p < 1:
        sampled += f", top-p {test.top_p:g}"
    lines.add_row("sampled", Text(f"{asked_fact(test.questions, len(test.media))}: {sampled}"))
    lines.add_row("model", Text(model_fact(test.model, kernel=False)))
    lines.add_row(
        "table",
        "CIDEr: CIDEr-D by the references, 0 to 10; self-CIDEr: how different the captions of a "
        "question are, 0 to 1; distinct-n: different n-grams as a share of the words; words: of a "
        "caption; in brackets 95 % intervals (bootstrap over files); *: of fewer questions than "
        "were asked; random rows: means over seeds",
    )
    console.print()
    console.print(lines)
    for warning in test.warnings:
        show_warning(warning, console)
