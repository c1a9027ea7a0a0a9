"""Rows of figures as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from vtprune.errors import CONTROLS

FORMULA = re.compile(r"[=+@\t]|-[^\d.\s]")
"""The beginning of a text that a spreadsheet would take for a formula, which may run programs."""


def csv_text(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """Return one line a row under a line of the columns; a cell is empty where there is no figure.

    Args:
        columns: their names, in order; None: all that any row has.
    """
    file = io.StringIO(newline="")
    names = columns or list(dict.fromkeys(name for row in rows for name in row))
    assert all(row.keys() <= set(names) for row in rows), "a row has a column that has no name"
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(_cell, names))
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in names])
    return file.getvalue()


def flat(values: Mapping[str, object]) -> dict[str, object]:
    """Return a row whose blocks are columns.

    Of {"tokens": {"visual": 9}} the column is tokens_visual. Lists are one cell, their items
    apart by blanks; of cuts that were made, "layer:tokens left".
    """
    return dict(_columns(values, ""))


def with_ends(values: Mapping[str, object], names: Sequence[str]) -> dict[str, object]:
    """Return a row with `x_low` and `x_high` in place of intervals.

    Args:
        values: with `x_interval`, [low, high] or None, of each name x.
    """
    row = dict(values)
    for name in names:
        interval = row.pop(f"{name}_interval")
        low, high = interval if isinstance(interval, list) else (None, None)
        row |= {f"{name}_low": low, f"{name}_high": high}
    return row


def _columns(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _columns(value, f"{prefix}{name}_")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{name}", " ".join(map(_item, value))
        else:
            yield f"{prefix}{name}", value


def _item(value: object) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return f"{value['layer']}:{value['after']}" if "after" in value else json.dumps(value)


def _cell(value: object) -> object:
    if isinstance(value, str):
        text = CONTROLS.sub("", value)
        return f"'{text}" if FORMULA.match(text) else text
    missing = value is None or (isinstance(value, float) and not math.isfinite(value))
    return "" if missing else value
