"""The consoles of standard output and error, and the progress line."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from datetime import timedelta

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.segment import Segment

from vtprune.errors import CONTROLS

BAR = 14  # characters of the progress bar
PLAIN_SECONDS = 10  # at least, between two plain lines of progress
SIZES = ("COLUMNS", "LINES")
"""Environment variables that say how large the terminal is."""


class PrintableConsole(Console):
    """A console that shows nothing that could steer a terminal, whatever it is given."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


def stderr_console() -> Console:
    """Return the console for all but the answer; plain text in a pipe and under NO_COLOR."""
    return _console(stderr=True)


def stdout_console() -> Console:
    """Return the console for the tables that a command is asked for."""
    return _console(stderr=False)


def _console(stderr: bool) -> Console:
    # Of other sizes rich would print nothing, or end.
    environ = {name: value for name, value in os.environ.items()
               if name not in SIZES or re.fullmatch("0*[1-9][0-9]{0,4}", value)}  # fmt: skip
    return PrintableConsole(
        stderr=stderr,
        _environ=environ,
        highlight=False,
        emoji=False,
        markup=False,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
    )


def printable(text: str) -> str:
    """Return text from a model, or of a user, without what could steer a terminal."""
    return CONTROLS.sub("", text)


class ProgressLine:
    """A line that shows the progress of the work, and is removed at the end.

    Where there is no terminal: one plain line now and then, and it stays.

    Args:
        console: where.
        silent: never show anything.
    """

    def __init__(self, console: Console, silent: bool = False) -> None:
        self.shown = console.file.isatty() and not console.is_dumb_terminal and not silent
        self._silent = silent
        self._last = time.monotonic()
        self._console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._stage = ""
        self._counted = False
        self._began: tuple[str, float, int] = ("", 0.0, 0)  # a stage, when, and how far it was

    def update(self, stage: str, done: int, total: int) -> None:
        """Show `done` of `total` of a stage; with a total of 0 or 1, that the stage is running."""
        counts = f"{done:,} of {total:,}" if total > 1 else ""
        now = time.monotonic()
        if stage != self._began[0] or done < self._began[2]:
            self._began = (stage, now, done)
        if not self.shown:
            if not self._silent and now - self._last >= PLAIN_SECONDS:
                self._last = now
                pace = ", ".join(["", *self._pace(done, total, now)])
                self._console.print(f"{stage} {counts}{pace}".rstrip(), soft_wrap=True)
            return
        if (stage, total > 1) != (self._stage, self._counted) or (total and done >= total):
            self.stop()
        if total and done >= total:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}", style="dim", markup=False),
                BarColumn(bar_width=BAR, complete_style="cyan", pulse_style="cyan"),
                TextColumn("{task.fields[counts]}", style="dim", markup=False),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", style="dim", markup=False),
                console=self._console,
                transient=True,
            )
            self._task = self._progress.add_task(stage, total=None, counts="", left="")
            self._stage, self._counted = stage, total > 1
            self._progress.start()
        if total > 1:
            left = "".join(self._pace(done, total, now)[1:])
            self._progress.update(self._task, completed=done, total=total, counts=counts, left=left)

    def _pace(self, done: int, total: int, now: float) -> list[str]:
        """Return the rate of a stage and the time that it has left; [] where nothing is known."""
        _, began, first = self._began
        if total <= 1 or now <= began or done <= first:
            return []
        rate = (done - first) / (now - began)
        left = timedelta(seconds=round((total - done) / rate))
        return [f"{rate:,.{2 if rate < 10 else 0}f} a second", f"{left} left"]

    def stop(self) -> None:
        """Remove the line."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._stage = None, ""
