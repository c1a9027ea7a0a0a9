"""What commands show: answers and tables on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TextIO

import click

from vtprune.cli.console import (
    ProgressLine,
    printable,
    render,
    show_question,
    stderr_console,
    stdout_console,
)
from vtprune.cli.results import ResultType, to_json
from vtprune.inference.report import Report

if TYPE_CHECKING:
    from rich.console import Console

IMPORT_SECONDS = 1.0  # that an import may take before it is told
IMPORTING = "importing torch and transformers"


class Transcript:
    """The output of one `ask`: answers on stdout as they are produced, the rest on stderr.

    Args:
        num_questions: how many questions will be answered.
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
        self._span = ""  # times of the segment that is asked about

    def __enter__(self) -> Transcript:
        if not self._progress.shown:
            _hide_download_bars()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        self._end_line()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show the progress of a stage of the work."""
        self._end_line()
        self._progress.update(stage, done, total)

    def question(self, number: int, question: str) -> None:
        """Head an answer with its question where there are several."""
        self._progress.stop()
        if self._num_questions > 1 and not (self._json or self._quiet):
            show_question(number + 1, self._num_questions, question, self._console)
        self._progress.update("answering", 0, 0)  # until the first piece comes

    def segment(self, span: tuple[float, float] | None) -> None:
        """Write the times of a segment before its answers; None: the video as a whole follows."""
        self._span = (
            "all"
            if span is None
            else " to ".join(str(timedelta(seconds=round(moment))) for moment in span)
        )

    def text(self, piece: str) -> None:
        """Print the next piece of the answer."""
        piece = printable(piece)
        if piece and not self._json:
            self._progress.stop()
            if self._span and not self._begun:
                click.echo(f"[{self._span}] ", nl=False)
            click.echo(piece, nl=False)
            self._begun, self._in_line = True, not piece.endswith("\n")

    def report(self, report: Report) -> None:
        """End the answer, and show its report."""
        self._progress.stop()
        if self._json:
            click.echo(to_json(report.to_dict()))
            return
        if not self._begun:
            self.text(report.answer or "\n")
        self._end_line()
        self._begun = False
        if not self._quiet and report.segment is None:
            render(report, self._console, self._last)
            self._last = report

    def _end_line(self) -> None:
        if self._in_line:
            click.echo()
            self._in_line = False


def print_line(line: str, stream: TextIO) -> None:
    """Print a line of JSON, in ASCII where the stream's encoding does not hold it."""
    try:
        line.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:  # the stream would write "?"
        line = json.dumps(json.loads(line))
    click.echo(line, file=stream)


def show_tables(
    result: ResultType,
    as_json: bool,
    quiet: bool,
    tables: Callable[[ResultType, Console], None],
    notes: Callable[[ResultType, Console], None],
) -> None:
    """Show the result of a command.

    Args:
        as_json: as one JSON object, in place of everything else.
        quiet: without the notes.
        tables: prints them, on standard output.
        notes: prints what helps to read them, on standard error.
    """
    if as_json:
        click.echo(to_json(result.to_dict()))
        return
    tables(result, stdout_console())
    if not quiet:
        notes(result, stderr_console())


@contextmanager
def progress_line(silent: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that shows the progress of a stage on standard error."""
    line = ProgressLine(stderr_console(), silent)
    if not line.shown:
        _hide_download_bars()
    try:
        yield line.update
    finally:
        line.stop()


@contextmanager
def importing(quiet: bool) -> Iterator[None]:
    """Say on a terminal, after a second, that libraries are being imported."""
    line = ProgressLine(stderr_console(), quiet)
    timer = threading.Timer(IMPORT_SECONDS, line.update, (IMPORTING, 0, 0))
    timer.daemon = True
    if line.shown:
        timer.start()
    try:
        yield
    finally:
        if line.shown:
            timer.cancel()
            timer.join()  # so that nothing is shown from here on
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
