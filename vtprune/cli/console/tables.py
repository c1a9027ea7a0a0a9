"""Tables without lines that fit the terminal, and labelled facts and warnings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from vtprune.cli.console.table_files import TableRecorder
from vtprune.cli.console.terminal import printable
from vtprune.errors import VtpruneError

BAR = 14  # characters of a full bar
LABEL = 8  # characters of the left column
MOST_FAILED = 5  # questions named one by one


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
    """Return a table without lines whose left column labels the rest; text is taken literally."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", width=label, no_wrap=True)
    for side in justify or ("left",):
        table.add_column(justify=side, overflow="fold", no_wrap=side == "right")
    return table


def list_failed(failed: Mapping[int, VtpruneError], asked: int, lines: Table) -> None:
    """Add the questions of a list that could not be asked, beside those that were."""
    if failed:
        total = asked + len(failed)
        lines.add_row("left out", Text(f"{len(failed):,} of {total:,} questions", "yellow"))
    for error in list(failed.values())[:MOST_FAILED]:  # its message names the line or the file
        lines.add_row("", Text(printable(error.message), "dim"))
    if len(failed) > MOST_FAILED:
        lines.add_row("", Text(f"and {len(failed) - MOST_FAILED} more", "dim"))


def plain_table(gap: int = 2) -> Table:
    """Return a table without lines, with dim headings and columns `gap` apart."""
    return Table(box=None, pad_edge=False, header_style="dim", padding=(0, gap, 0, 0))


def print_fitted(table: Table, console: Console) -> None:
    """Print a plain table with every cell whole, however narrow the line is.

    Where it is too wide, first its columns move together, then its texts are wrapped at blanks,
    the names in the first column last; where not even that is enough, it becomes several tables,
    each with the names. A number is never cut. A recorder keeps the table as it is.
    """
    if isinstance(console, TableRecorder):
        console.table(table)
        return
    endless = console.options.update_width(10_000)
    spans = [_span(column, console, endless) for column in table.columns]
    gap = table.padding[1]
    if sum(most + gap for _, most in spans) - gap > console.width:
        gap = 1
    if sum(least + gap for least, _ in spans) - gap > console.width:
        least, most = spans[0]
        spans[0] = max(least, min(most, console.width // 2)), most
    for number, group in enumerate(_groups([least for least, _ in spans], console.width, gap)):
        if number:
            console.print()
        console.print(_part(table, group, spans, console.width, gap))


def _span(column: Column, console: Console, options: ConsoleOptions) -> tuple[int, int]:
    """Return the smallest width of a column that cuts no word, and the one that wraps nothing."""
    cells = [column.header, *column.cells]
    measured = [console.measure(cell, options=options) for cell in cells]
    most = max((width.maximum for width in measured), default=0)
    if column.justify == "right":
        return most, most
    return max((width.minimum for width in measured), default=0), most


def _groups(widths: Sequence[int], room: int, gap: int) -> list[list[int]]:
    """Return the columns of each table, by their numbers: as many as fit beside the first."""
    groups = [[0]]
    used = widths[0]
    for number, width in enumerate(widths[1:], 1):
        if used + gap + width > room and len(groups[-1]) > 1:
            groups.append([0])
            used = widths[0]
        groups[-1].append(number)
        used += gap + width
    return groups


def _part(
    table: Table, group: Sequence[int], spans: Sequence[tuple[int, int]], room: int, gap: int
) -> Table:
    """Return some columns of a table; free width goes to the first column that needs it."""
    left = room - gap * (len(group) - 1) - sum(spans[number][0] for number in group)
    part = plain_table(gap)
    for number in group:
        least, most = spans[number]
        more = max(0, min(left, most - least))
        left -= more
        source = table.columns[number]
        # What is wider than its line, a name without blanks, goes on in the next one.
        width = min(least + more, max(1, room))
        part.add_column(source.header, justify=source.justify, width=width, overflow="fold")
    columns = [list(table.columns[number].cells) for number in group]
    for row, cells in zip(table.rows, zip(*columns, strict=True), strict=True):
        part.add_row(*cells, style=row.style)
    return part


def fitted(lines: Table, console: Console) -> Table:
    """Return a labelled table; where it is too wide, without bars and its figures in one column."""
    endless = console.options.update_width(10_000)
    spans = [_span(column, console, endless) for column in lines.columns]
    spans[0] = LABEL, LABEL
    gap = lines.padding[1]
    if sum(least + gap for least, _ in spans) - gap <= console.width:
        return lines
    narrow = labelled()
    for label, *cells in zip(*(column.cells for column in lines.columns), strict=True):
        texts = [cell if isinstance(cell, Text) else Text(cell) for cell in cells
                 if isinstance(cell, (str, Text)) and cell]  # fmt: skip
        narrow.add_row(label, Text("  ").join(texts))
    return narrow


def warning(text: str) -> Table:
    """Return a line with a warning."""
    lines = labelled()
    lines.add_row(Text("warning", "yellow"), Text(printable(text), "yellow"))
    return lines


def show_table(headings: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    """Print rows under headings; a heading that begins with "<" is of numbers, set to the right."""
    table = plain_table()
    for heading in headings:
        right = heading.startswith("<")
        table.add_column(heading.removeprefix("<"), justify="right" if right else "left")
    for row in rows:
        table.add_row(*(printable(cell) for cell in row))
    print_fitted(table, console)


def show_facts(facts: Iterable[tuple[str, str]], console: Console) -> None:
    """Print labelled lines."""
    lines = labelled()
    for label, text in facts:
        lines.add_row(label, Text(printable(text)))
    console.print(lines)


def show_warning(text: str, console: Console) -> None:
    """Print a warning."""
    console.print(warning(text))
