"""What commands write: answers on stdout, reports to a file, progress on stderr."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune.cli.console import (
    ProgressLine,
    printable,
    render,
    show_question,
    stderr_console,
    stdout_console,
)
from vtprune.errors import VtpruneError
from vtprune.inference.report import Report
from vtprune.saving import check_target

if TYPE_CHECKING:
    from rich.console import Console


class Transcript:
    """What one `ask` shows: answers on stdout as they are produced, the rest on stderr.

    Args:
        num_questions: how many will be answered.
        as_json: reports on stdout, in place of answers and tables.
        quiet: answers only.
    """

    def __init__(self, num_questions: int, as_json: bool = False, quiet: bool = False) -> None:
        self._num_questions = num_questions
        self._json, self._quiet = as_json, quiet
        self._console = stderr_console()
        self._progress = ProgressLine(self._console, silent=quiet)
        self._last: Report | None = None  # the report before
        self._begun = False  # some of this answer is on stdout
        self._in_line = False  # and its line has not ended

    def __enter__(self) -> Transcript:
        if not self._progress.shown:
            _hide_download_bars()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        self._end_line()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage of the work is."""
        self._end_line()
        self._progress.update(stage, done, total)

    def question(self, number: int, question: str) -> None:
        """Head an answer with its question where there are several."""
        self._progress.stop()
        if self._num_questions > 1 and not (self._json or self._quiet):
            show_question(number + 1, self._num_questions, question, self._console)
        self._progress.update("answering", 0, 0)  # until the first piece comes

    def text(self, piece: str) -> None:
        """Go on with the answer."""
        piece = printable(piece)
        if piece and not self._json:
            self._progress.stop()
            click.echo(piece, nl=False)
            self._begun, self._in_line = True, not piece.endswith("\n")

    def report(self, report: Report) -> None:
        """End the answer, and shows what it cost."""
        self._progress.stop()
        if self._json:
            click.echo(to_json(report.to_dict()))
            return
        if not self._begun:
            self.text(report.answer or "\n")
        self._end_line()
        self._begun = False
        if not self._quiet:
            render(report, self._console, self._last)
            self._last = report

    def _end_line(self) -> None:
        if self._in_line:
            click.echo()
            self._in_line = False


def to_json(report: Mapping[str, object]) -> str:
    """A report as JSON on one line, in ASCII, so that any terminal and file can hold it."""
    return json.dumps(finite(report), allow_nan=False)


def finite(value: object) -> object:
    """The same with None for what is no number: JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_targets(
    targets: Iterable[tuple[str, Path | None]], inputs: Sequence[str | Path] = ()
) -> None:
    """`check_target` for every place that a command writes to, and none of them in another.

    Args:
        targets: options and the paths that they gave; None where one was not given.
        inputs: what is read, and must not be written over.

    Raises:
        VtpruneError: as `check_target`; two files in one place; an input.
    """
    given = [(option, path) for option, path in targets if path is not None]
    for option, path in given:
        check_target(path, option)
        if os.path.exists(path) and any(
            os.path.exists(one) and os.path.samefile(path, one) for one in inputs
        ):
            raise VtpruneError(
                f"{option} {path} would be written over a file that is asked about",
                f"give {option} a name of its own",
            )
    if len({os.path.realpath(path) for _, path in given}) < len(given):
        places = ", ".join(f"{option} {path}" for option, path in given)
        raise VtpruneError(f"two files in one place: {places}", "give each a name of its own")


def show_tables(
    values: Mapping[str, object],
    as_json: bool,
    quiet: bool,
    tables: Callable[[Mapping[str, object], Console], None],
    notes: Callable[[Mapping[str, object], Console], None],
) -> None:
    """Show what a command found.

    Args:
        as_json: as one JSON object, in place of everything else.
        quiet: without the notes.
        tables: prints them, on standard output.
        notes: prints what helps to read them, on standard error.
    """
    if as_json:
        click.echo(to_json(values))
        return
    tables(values, stdout_console())
    if not quiet:
        notes(values, stderr_console())


@contextmanager
def progress_line(silent: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """What shows how far a stage of the work is, on standard error; gone at the end."""
    line = ProgressLine(stderr_console(), silent)
    if not line.shown:
        _hide_download_bars()
    try:
        yield line.update
    finally:
        line.stop()


@contextmanager
def libraries_silenced() -> Iterator[None]:
    """Keep warnings and log lines of other libraries off stderr: the report has its own."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _hide_download_bars() -> None:
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
