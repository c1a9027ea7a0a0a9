"""`--save FILE`: where a command's result goes, in the format that the file's suffix names."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from rich.console import Console

    from vtprune.cli.options import Flags

CHARTS = (".png", ".svg", ".pdf")
TABLES = (".csv", ".md", ".tex")
"""What every command with tables can write."""
SUFFIXES = (".json", *TABLES, *CHARTS)
"""What a command can write whose result is rows of figures."""
TABLES_TEXT = ("the tables", ".csv, .md or .tex")
FULL_TEXT = (
    ("everything", ".json"), ("all figures of the rows", ".csv"), ("the tables", ".md or .tex"),
)  # fmt: skip
LIST_TEXT = (("everything", ".json"), TABLES_TEXT)
CHARTS_TEXT = ".png, .svg or .pdf"
"""What --save writes, and as which suffixes, for the help."""
Makers = Mapping[str, Callable[[], bytes]]
"""Suffix -> a function that makes the bytes of such a file."""


def check_saves(
    saves: Sequence[Path],
    suffixes: Sequence[str],
    inputs: Sequence[str | Path] = (),
    others: Mapping[str, Path | None] | None = None,
    option: str = "--save",
) -> None:
    """Refuse places that can't be written to, and names whose suffix is no format.

    Args:
        suffixes: of the formats that there are.
        inputs: files that are read, and must not be written over.
        others: option -> another file that the command writes.
        option: that names the places.

    Raises:
        VtpruneError: as `check_target`; two files in one place; an input; an unknown suffix.
    """
    from vtprune.saving import check_target  # a hundredth of a second, which --help spares

    targets = [*((option, path) for path in saves), *(others or {}).items()]
    given = [(flag, path) for flag, path in targets if path is not None]
    for flag, path in given:
        check_target(path, flag)
        if os.path.exists(path) and any(
            os.path.exists(file) and os.path.samefile(path, file) for file in inputs
        ):
            raise VtpruneError(
                f"{flag} {path} would be written over a file that the command reads",
                f"give {flag} a name of its own",
            )
    if len({os.path.realpath(path) for _, path in given}) < len(given):
        places = ", ".join(f"{flag} {path}" for flag, path in given)
        raise VtpruneError(f"two files in one place: {places}", "give each a name of its own")
    for path in saves:
        if path.suffix.lower() not in suffixes:
            names = ", ".join(f"{path.stem or 'result'}{suffix}" for suffix in suffixes)
            raise VtpruneError(
                f"{option} {path}: its suffix names no format of this command", f"name it {names}"
            )


def write_saves(saves: Sequence[Path], makers: Makers, option: str = "--save") -> Iterator[Path]:
    """Write every file, and yield it as soon as it is there."""
    from vtprune.saving import save_file

    for path in saves:
        save_file(path, makers[path.suffix.lower()](), option)
        yield path


class Result(Protocol):
    """The result of a command."""

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it."""


ResultType = TypeVar("ResultType", bound=Result)


class Rows(Result, Protocol):
    """A result that is rows of figures."""

    def to_csv(self) -> str:
        """Return a line for each row."""


def row_makers(result: Rows, draw: Callable[[str], bytes]) -> Makers:
    """Return the makers of every file of a result.

    Args:
        draw: makes its chart; gets "png", "svg" or "pdf".
    """
    return {
        ".json": lambda: json_file(result.to_dict()),
        ".csv": lambda: result.to_csv().encode(),
        **charts(draw),
    }


def save_and_show(
    result: ResultType,
    flags: Flags,
    makers: Makers,
    tables: Callable[[ResultType, Console], None],
    notes: Callable[[ResultType, Console], None],
) -> None:
    """Write the files of a result, and show it, also where a file can't be written.

    Args:
        makers: of its files; those of the printed tables are added.
        tables, notes: print it, and what helps to read it.
    """
    from vtprune.cli.output import show_tables

    printed = table_makers(lambda console: tables(result, console),
                           lambda console: notes(result, console))  # fmt: skip
    try:
        list(write_saves(flags.saves, {**printed, **makers}))
    finally:
        show_tables(result, flags.json, flags.quiet, tables, notes)


def list_and_save(value: object, flags: Flags, show: Callable[[Console], None]) -> None:
    """Write what a command lists to files, and print it: as JSON, or as a table.

    Args:
        value: as JSON has it.
        show: prints it.
    """
    import click

    check_saves(flags.saves, (".json", *TABLES))
    list(write_saves(flags.saves, {**table_makers(show), ".json": lambda: json_file(value)}))
    if flags.json:
        click.echo(json.dumps(finite(value), indent=2))
    else:
        from vtprune.cli.console import stdout_console

        show(stdout_console())


def table_makers(*shows: Callable[[Console], None]) -> Makers:
    """Return the makers of the printed tables: CSV, Markdown and LaTeX.

    Args:
        shows: print them; lines with labels are facts about them.
    """

    def written(write: str) -> Callable[[], bytes]:
        def make() -> bytes:
            from vtprune.cli.console import table_files

            recorded = table_files.record(*shows)
            return str(getattr(table_files, write)(recorded)).encode("utf-8", "replace")

        return make

    return {".csv": written("to_csv"), ".md": written("to_markdown"), ".tex": written("to_latex")}


def json_file(value: object) -> bytes:
    """Return a result as a JSON file."""
    return (json.dumps(finite(value), indent=2, allow_nan=False) + "\n").encode()


def to_json(result: Mapping[str, object]) -> str:
    """Return a result as JSON on one line, in ASCII, so that any terminal and file can hold it."""
    return json.dumps(finite(result), allow_nan=False)


def finite(value: object) -> object:
    """Return a value with None for what is no number: JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def charts(draw: Callable[[str], bytes]) -> dict[str, Callable[[], bytes]]:
    """Return the makers of a chart in every format that there is.

    Args:
        draw: gets "png", "svg" or "pdf".
    """
    return {suffix: partial(draw, suffix.removeprefix(".")) for suffix in CHARTS}
