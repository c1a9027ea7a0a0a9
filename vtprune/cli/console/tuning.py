"""The tables of `vtprune tune`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vtprune.cli.console.facts import model_fact
from vtprune.cli.console.tables import (
    labelled,
    list_failed,
    plain_table,
    print_fitted,
    show_warning,
)
from vtprune.cli.console.terminal import printable

if TYPE_CHECKING:
    from vtprune.evaluation.tuning_result import Trial, Tuning

STYLES = {"chosen": "bold green", "holds": "green", "fails": "yellow"}


def show_tuning(tuning: Tuning, console: Console) -> None:
    """Print the search, the test on the held-out part, and the chosen preset."""
    accuracy = tuning.quality == "accuracy"
    quality = "accuracy, as a share of the unpruned model's" if accuracy else "the same answer"
    console.print(Text.assemble(("searched ", "bold"), f"on {tuning.search}: {quality}"))
    print_fitted(_searched(tuning.trials, tuning.floor), console)
    if tuning.tested:
        console.print()
        head = f"on {tuning.held_out} held out, from the top until one fails"
        console.print(Text.assemble(("tested ", "bold"), head))
        print_fitted(_tested(tuning.tested), console)
    if tuning.chosen:
        console.print()
        console.print(Text.assemble(("found ", "bold"), printable(tuning.claim())))
    if tuning.failed:
        lines = labelled()
        list_failed(tuning.failed, tuning.search.questions + tuning.held_out.questions, lines)
        console.print()
        console.print(lines)


def _searched(trials: Sequence[Trial], floor: float) -> Table:
    """Return a row for each candidate, a column for each keep; dim below the floor."""
    keeps = {trial.variant.keep for trial in trials}
    columns = sorted(keeps, key=lambda keep: -1.0 if keep is None else keep, reverse=True)
    table = plain_table()
    table.add_column("keep", overflow="fold")
    for keep in columns:
        table.add_column("own" if keep is None else f"{keep:g}", justify="right")
    for name in dict.fromkeys(trial.name for trial in trials):
        by_keep = {trial.variant.keep: trial for trial in trials if trial.name == name}
        table.add_row(
            Text(printable(name)), *(_share(by_keep.get(keep), floor) for keep in columns)
        )
    return table


def _share(trial: Trial | None, floor: float) -> Text:
    """Return the share of the unpruned quality that a candidate kept in the search."""
    if trial is None:
        return Text("")
    if trial.searched is None:
        return Text("can't run", "yellow")
    mean = trial.searched.quality.mean
    return Text(f"{mean:.1%}", "" if mean >= floor else "dim")


def _tested(tested: Sequence[Trial]) -> Table:
    """Return a row for each tested candidate, in the order that the search fixed."""
    table = plain_table()
    table.add_column("", overflow="fold")
    for heading in ("keep", "kept", "quality\nkept", "lower\n95 %", "same\nanswer", "first\ntoken"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for trial in tested:
        outcome, keep = trial.held_out, trial.variant.keep
        figures = [""] * 5
        if outcome:
            shares = (outcome.quality.mean, outcome.quality.lower, outcome.agreement)
            figures = [f"{outcome.keep_mean:.0%}", *(f"{share:.1%}" for share in shares),
                       f"{outcome.first_token_speedup:.2f}x"]  # fmt: skip
        table.add_row(
            Text(printable(trial.name)), "own" if keep is None else f"{keep:g}", *figures,
            Text(printable(trial.verdict), STYLES.get(trial.verdict, "dim")),
        )  # fmt: skip
    return table


def show_notes(tuning: Tuning, console: Console) -> None:
    """Print which model was asked, where the preset was written, and the warnings."""
    lines = labelled()
    lines.add_row("model", Text(model_fact(tuning.model, kernel=False)))
    if tuning.file is not None:
        lines.add_row("written", Text(printable(tuning.file)))
    reasons = {
        f"{trial.name} can't run: {trial.verdict}"
        for trial in tuning.trials
        if trial.searched is None
    }
    console.print()
    console.print(lines)
    for warning in [*sorted(reasons), *tuning.warnings]:
        show_warning(warning, console)
