"""What every table and sentence tells in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PAYS = 1.05
"""A measured speed-up below this is none."""


def counted(number: int, what: str, several: str = "") -> str:
    """ "1 file", "2 files".

    Args:
        several: where that is not `what` with an "s".
    """
    return f"{number:,} {what if number == 1 else several or what + 's'}"


def with_options(method: str, options: Mapping[str, object]) -> str:
    """ "entropy", "entropy (norm=none)", "balanced (stream, seed=3)"."""
    flat: dict[str, object] = {}
    for key, value in options.items():
        parts = value.items() if isinstance(value, Mapping) else ()
        flat |= {f"{key}.{name}": part for name, part in parts} or {key: value}
    pairs = ", ".join(key if value is True else f"{key}={value}" for key, value in flat.items())
    return f"{method} ({pairs})" if pairs else method


NAMED = 3
"""The most rows that a warning names."""


def name_sources(warnings: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Return each warning once, after the names of the rows that it comes from.

    None are named where it is of all rows, or names the method or preset of its rows itself.

    Args:
        warnings: (name, its warnings) of each row.
    """
    names: dict[str, list[str]] = {}
    for name, notes in warnings:
        for note in dict.fromkeys(notes):
            names.setdefault(note, []).append(name)
    lines = []
    for note, rows in names.items():
        more = [f"{len(rows) - NAMED} more"] if len(rows) > NAMED else []
        sources = ", ".join([*rows[:NAMED], *more])
        first = note.split(maxsplit=1)[0].rstrip(":")
        named = len(rows) == len(warnings) or {row.split(maxsplit=1)[0] for row in rows} == {first}
        lines.append(note if named else f"{sources}: {note}")
    return lines
