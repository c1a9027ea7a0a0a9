"""The table of `vtprune check`: pruned minus masked, and the noise of the unpruned model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from rich.console import Console
from rich.text import Text

from vtprune.cli.console.facts import model_fact, read_fact
from vtprune.cli.console.tables import labelled, plain_table, print_fitted, show_warning
from vtprune.cli.console.terminal import printable
from vtprune.cli.console.values import Values, dict_in, list_in, number_in
from vtprune.inference.wording import counted

STYLES = {"equal": "green", "DIFFERS": "bold red"}
VERDICTS = {"equal": "bold green", "different": "bold red"}
CACHES = ("dynamic", "static")
MISSING = "-"
MOST = 6  # notes that are shown


def show_check(checked: Values, console: Console) -> None:
    """Print a row for each input, cut and batch, what has a reason, and the verdict.

    Args:
        checked: `CheckResult.to_dict()`.
    """
    steps = f"{number_in(checked, 'steps'):.0f}"
    what = f": largest difference of the logits, prompt and {steps} decoded tokens"
    console.print(Text.assemble(("pruned - masked", "bold"), what))
    table = plain_table()
    for heading in ("input", "cut", "prompts"):
        table.add_column(heading, overflow="fold")
    for heading in ("dynamic\ncache", "static\ncache", "noise", "effect\nof cut"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    noise = {_batch(one): one for one in _rows(checked, "noise")}
    last = ""
    for cells in _groups(checked):
        first = cells[0]
        if last not in ("", str(first["input"])):
            table.add_row("")
        last = str(first["input"])
        by_cache = {str(cell["cache"]): cell for cell in cells}
        effects = [cell["effect"] for cell in cells if cell["effect"] is not None]
        outcomes = list(dict.fromkeys(str(cell["outcome"]) for cell in cells))
        table.add_row(
            *(printable(str(first[key])) for key in ("input", "cut", "prompts")),
            *(_number(by_cache.get(cache, {}).get("difference")) for cache in CACHES),
            _number(noise[_batch(first)]["value"]),
            f"{effects[0]:.2g}" if effects else MISSING,
            Text("/".join(outcomes), STYLES.get(outcomes[0], "yellow") if len(outcomes) == 1
                 else "yellow"),
        )  # fmt: skip
    print_fitted(table, console)
    console.print()
    lines = labelled()
    notes = [f"{outcome}: {'; '.join(places)}: {reason}" for outcome, reason, places in
             _reasons(checked)]  # fmt: skip
    for note in notes[:MOST]:
        lines.add_row("note", Text(printable(note)))
    if len(notes) > MOST:
        lines.add_row("note", Text(f"{len(notes) - MOST} more: --json has all"))
    verdict = str(checked["verdict"])
    lines.add_row(
        "verdict", Text(printable(str(checked["claim"])), VERDICTS.get(verdict, "yellow"))
    )
    console.print(lines)


def show_notes(checked: Values, console: Console) -> None:
    """Print which model was checked on what, how to read the table, and the warnings."""
    version, model = dict_in(checked, "version"), dict_in(checked, "model")
    noise = _rows(checked, "noise")
    sources = " or ".join(dict.fromkeys(str(one["source"]) for one in noise))
    factor = number_in(noise[0], "factor") if noise else 0
    lines = labelled()
    for one in _rows(checked, "inputs"):
        lines.add_row("read", Text(_input_fact(one)))
    lines.add_row("model", Text(model_fact(model)))
    lines.add_row("with", Text(printable(", ".join(f"{k} {v}" for k, v in version.items()))))
    lines.add_row("ragged", Text("two prompts of different length, padded on the left"))
    noise_note = (
        f"how far the unpruned model is from itself ({sources}), at least one step of "
        f"{model['dtype']}; pruned and masked are equal up to {factor:g} times that"
    )
    lines.add_row("noise", Text(noise_note))
    lines.add_row("effect", Text("by how much the cut changes the logits"))
    console.print()
    console.print(lines)
    for warning in list_in(checked, "warnings"):
        show_warning(str(warning), console)


def _input_fact(one: Values) -> str:
    """Return what one input holds."""
    if one["input"] == "files":
        return read_fact(one)
    kind = "frame" if one["frames"] else "tile"
    parts = counted(int(number_in(one, f"{kind}s")), kind)
    return f"{one['input']} made here: {one['width']} x {one['height']}, {parts}"


def _rows(checked: Values, key: str) -> Sequence[Values]:
    return cast("Sequence[Values]", list_in(checked, key))


def _batch(one: Values) -> tuple[object, object]:
    return one["input"], one["prompts"]


def _groups(checked: Values) -> list[list[Values]]:
    """Return the cases of each row, in the order of input, cut and batch."""
    groups: dict[tuple[object, ...], list[Values]] = {}
    cells = _rows(checked, "cells")
    for key in dict.fromkeys((cell["input"], cell["cut"]) for cell in cells):
        for cell in cells:
            if (cell["input"], cell["cut"]) == key:
                groups.setdefault((*key, cell["prompts"]), []).append(cell)
    return list(groups.values())


def _reasons(checked: Values) -> list[tuple[str, str, list[str]]]:
    """Return outcome and reason of the cases that have one, with the places that share them."""
    cells = _rows(checked, "cells")
    by_reason: dict[tuple[str, str], list[Values]] = {}
    for cell in sorted(cells, key=lambda one: one["outcome"] == "DIFFERS"):
        if cell["reason"]:
            by_reason.setdefault((str(cell["outcome"]), str(cell["reason"])), []).append(cell)
    return [(*key, _places(some, cells)) for key, some in by_reason.items()]


def _places(some: Sequence[Values], cells: Sequence[Values]) -> list[str]:
    """Return where some of the cases are; all cases of an input and a cut are one place."""
    places: list[str] = []
    for key in dict.fromkeys((cell["input"], cell["cut"]) for cell in some):
        alike = [cell for cell in some if (cell["input"], cell["cut"]) == key]
        if len(alike) == sum((cell["input"], cell["cut"]) == key for cell in cells):
            places.append(f"{key[0]}, {key[1]}")
        else:
            places += [f"{key[0]}, {key[1]}, {one['prompts']}, {one['cache']}" for one in alike]
    return places


def _number(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, float) else MISSING
