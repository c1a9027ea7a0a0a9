"""Second questions of an evaluation, as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from vtprune.cli.console.tables import plain_table
from vtprune.cli.console.values import Values, dict_in, number_in

LEGEND = (
    "second: each question again, after another one about its file, in one conversation on the "
    "tokens that the first one left; fresh: asked alone; unpruned: second, nothing pruned; lost: "
    "points that asking second costs more than it costs the unpruned model, with its 95 % interval"
)


def second_table(rows: Sequence[Values], name: Callable[[Values], str]) -> Table:
    """Quality of second questions, beside the same ones asked fresh.

    Args:
        name: what a row is called.
    """
    table = plain_table()
    table.add_column("second questions", overflow="fold")
    for heading in ("keep", "fresh", "second", "unpruned", "lost"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("question")
    for row in rows:
        own = dict_in(row, "second")
        if not own:
            continue
        unpruned = row["role"] == "unpruned"
        accuracy = own["accuracy"]
        second = number_in(own, "agreement" if accuracy is None else "accuracy")
        shares = [number_in(own, "fresh"), second, number_in(own, "unpruned")]
        keep = "" if unpruned or row["keep"] is None else f"{row['keep']:g}"
        by = "" if unpruned else "read" if row["reads_question"] else "blind"
        table.add_row(
            Text(name(row)), keep, *(f"{share:.1%}" for share in shares),
            "" if unpruned else _lost(dict_in(own, "change")), by,
            style="dim" if row["role"] == "baseline" else "",
        )  # fmt: skip
    return table


def _lost(change: Values) -> str:
    """What is lost, in points, with its interval: a change below 0 is a loss above it."""
    mean, low, high = (100 * number_in(change, key) for key in ("mean", "high", "low"))
    return f"{0 - mean:.1f} ({0 - low:.0f} to {0 - high:.0f})"
