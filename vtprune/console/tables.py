"""What all tables are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from vtprune.console.terminal import printable

BAR = 14  # characters of a full bar
LABEL = 8  # characters of the left column
NAME = 20  # characters that a name has before it is folded, in a line of NARROW or more
NARROW = 72


@dataclass(frozen=True)
class Bar:
    """A bar of which `share` is full."""

    share: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(BAR, options.max_width)
        full = min(width, max(round(self.share * width), 1 if self.share > 0 else 0))
        solid, shade = ("#", ".") if options.ascii_only else ("█", "░")
        yield Text.assemble((solid * full, "cyan"), (shade * (width - full), "dim"))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(6, BAR)


def labelled(*justify: JustifyMethod, label: int = LABEL) -> Table:
    """A table without lines whose left column labels the rest; text is taken literally."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", width=label, no_wrap=True)
    for side in justify or ("left",):
        table.add_column(justify=side, overflow="fold")
    return table


def plain_table(gap: int = 2) -> Table:
    """A table without lines, with dim headings and columns `gap` apart."""
    return Table(box=None, pad_edge=False, header_style="dim", padding=(0, gap, 0, 0))


def print_fitted(table: Table, console: Console) -> None:
    """Prints a plain table; where it is too wide for its line, first its columns move together.

    The first column, of names, gives way last.
    """
    endless = console.options.update_width(10_000)
    names = table.columns[0]
    if console.width >= NARROW:
        width = max(console.measure(cell, options=endless).maximum for cell in names.cells)
        names.min_width = min(width, NAME)
    if console.measure(table, options=endless).maximum > console.width:
        table.padding = (0, 1, 0, 0)
    console.print(table)


def warning(text: str) -> Table:
    """A line of what the reader should know."""
    lines = labelled()
    lines.add_row(Text("warning", "yellow"), Text(printable(text), "yellow"))
    return lines


def show_table(headings: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    """Prints rows under headings; a heading that begins with "<" is of numbers, set to the right.

    The last column is folded where it is too long for its line.
    """
    table = plain_table()
    for number, heading in enumerate(headings):
        right, last = heading.startswith("<"), number == len(headings) - 1
        table.add_column(
            heading.removeprefix("<"), justify="right" if right else "left", no_wrap=not last
        )
    for row in rows:
        table.add_row(*(printable(cell) for cell in row))
    console.print(table)


def show_facts(facts: Iterable[tuple[str, str]], console: Console) -> None:
    """Prints lines with a label each."""
    lines = labelled()
    for label, text in facts:
        lines.add_row(label, Text(printable(text)))
    console.print(lines)


def show_warning(text: str, console: Console) -> None:
    """Prints what the reader should know."""
    console.print(warning(text))
