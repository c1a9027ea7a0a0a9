"""The tables of `vtprune tune`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vtprune.cli.console.facts import asked_fact, model_fact
from vtprune.cli.console.tables import labelled, plain_table, print_fitted, show_warning
from vtprune.cli.console.terminal import printable
from vtprune.cli.console.values import Values, dict_in, list_in, number_in

STYLES = {"chosen": "bold green", "holds": "green", "fails": "yellow"}


def show_tuning(tuned: Values, console: Console) -> None:
    """Print the search, the test on the held-out part, and the chosen preset.

    Args:
        tuned: `Tuning.to_dict()`, with "file": where the preset was written, or None.
    """
    accuracy = tuned["quality"] == "accuracy"
    what = "accuracy, as a share of the unpruned model's" if accuracy else "the same answer"
    console.print(Text.assemble(("searched ", "bold"), f"on {_part(tuned, 'search')}: {what}"))
    print_fitted(_searched(_trials(tuned, "trials"), number_in(tuned, "floor")), console)
    tested = _trials(tuned, "tested")
    if tested:
        console.print()
        head = f"on {_part(tuned, 'held_out')} held out, from the top until one fails"
        console.print(Text.assemble(("tested ", "bold"), head))
        print_fitted(_tested(tested), console)
    if tuned["chosen"]:
        console.print()
        console.print(Text.assemble(("found ", "bold"), printable(str(tuned["claim"]))))


def _trials(tuned: Values, key: str) -> Sequence[Values]:
    return cast("Sequence[Values]", list_in(tuned, key))


def _part(tuned: Values, key: str) -> str:
    return asked_fact(dict_in(tuned, key))


def _searched(trials: Sequence[Values], floor: float) -> Table:
    """Return a row for each candidate, a column for each keep; dim below the floor."""
    keeps = sorted({one["keep"] for one in trials} - {None}, key=float, reverse=True)  # type: ignore[arg-type]
    columns = [*keeps, *([None] if any(one["keep"] is None for one in trials) else [])]
    table = plain_table()
    table.add_column("keep", overflow="fold")
    for keep in columns:
        table.add_column("own" if keep is None else f"{keep:g}", justify="right")
    for name in dict.fromkeys(str(one["name"]) for one in trials):
        by_keep = {one["keep"]: one for one in trials if one["name"] == name}
        table.add_row(
            Text(printable(name)), *(_share(by_keep.get(keep), floor) for keep in columns)
        )
    return table


def _share(trial: Values | None, floor: float) -> Text:
    if trial is None:
        return Text("")
    if not trial["search"]:
        return Text("can't run", "yellow")
    mean = number_in(dict_in(trial, "search"), "mean")
    return Text(f"{mean:.1%}", "" if mean >= floor else "dim")


def _tested(tested: Sequence[Values]) -> Table:
    """Return a row for each tested candidate, in the order that the search fixed."""
    table = plain_table()
    table.add_column("", overflow="fold")
    for heading in ("keep", "kept", "quality\nkept", "lower\n95 %", "same\nanswer", "first\ntoken"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for one in tested:
        held_out = dict_in(one, "held_out")
        verdict = str(one["verdict"])
        cells = [""] * 5
        if held_out:
            shares = [number_in(held_out, key) for key in ("mean", "lower", "agreement")]
            kept = f"{number_in(held_out, 'keep_mean'):.0%}"
            speedup = f"{number_in(held_out, 'first_token_speedup'):.2f}x"
            cells = [kept, *(f"{share:.1%}" for share in shares), speedup]
        keep = "own" if one["keep"] is None else f"{one['keep']:g}"
        table.add_row(Text(printable(str(one["name"]))), keep, *cells,
                      Text(printable(verdict), STYLES.get(verdict, "dim")))  # fmt: skip
    return table


def show_notes(tuned: Values, console: Console) -> None:
    """Print which model was asked, where the preset was written, and the warnings."""
    lines = labelled()
    lines.add_row("model", Text(model_fact(dict_in(tuned, "model"), kernel=False)))
    if tuned["file"]:
        lines.add_row("wrote", Text(printable(str(tuned["file"]))))
    reasons = {
        f"{one['name']} can't run: {one['verdict']}"
        for one in _trials(tuned, "trials") if not one["search"]
    }  # fmt: skip
    console.print()
    console.print(lines)
    for one in [*sorted(reasons), *list_in(tuned, "warnings")]:
        show_warning(str(one), console)
