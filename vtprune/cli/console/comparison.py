"""The table of `vtprune compare`."""

from __future__ import annotations

from itertools import groupby
from typing import cast

from rich.console import Console
from rich.text import Text

from vtprune.cli.console.facts import model_fact, read_fact
from vtprune.cli.console.tables import labelled, plain_table, print_fitted, show_warning
from vtprune.cli.console.terminal import printable
from vtprune.cli.console.values import Values, counted_in, dict_in, duration, list_in, number_in, si
from vtprune.inference.wording import PAYS, with_options

WIDE = 110  # columns of a terminal from which on answers have room in the table
MEASURED = ("prefill", "first token", "realised")


def show_comparison(comparison: Values, console: Console) -> None:
    """Print the rows of a comparison; where the terminal is narrow, their answers after them.

    Args:
        comparison: `Comparison.to_dict()`.
        console: where to.
    """
    rows = cast("list[Values]", list_in(comparison, "rows"))
    wide = console.width >= WIDE
    parts = _parts(comparison, rows)
    table = plain_table()
    for heading in ("", "cuts at"):
        table.add_column(heading, overflow="fold")
    for part in parts:
        heading = part if wide else part.replace(" ", "\n")
        table.add_column(heading, justify="right", overflow="fold")
    if wide:
        table.add_column("answer", overflow="fold", ratio=1)
    for (first, keep), group in groupby(rows, key=lambda row: (row is rows[0], row["keep"])):
        if not first:
            table.add_row()
            table.add_row(Text("own keeps" if keep is None else f"keep {keep:g}", "bold"))
        for row in group:
            cells = [Text(_cell(row, rows[0], part)) for part in parts]
            said = [_answer(row)] if wide else []
            style = "dim" if row["role"] == "baseline" else ""
            inward = "  " if row["role"] == "baseline" and row.get("beside") else ""
            name = Text(inward + _name(row))
            table.add_row(name, Text(_places(row, wide)), *cells, *said, style=style)
    print_fitted(table, console)
    if not wide:
        console.print()
        for (label, answer), names in _by_answer(rows).items():
            lines = labelled()
            lines.add_row(label, Text(answer, "bold" if label == "answer" else "yellow"))
            lines.add_row("", Text("; ".join(names), "dim"))
            console.print(lines)


def show_notes(comparison: Values, console: Console) -> None:
    """Print what was read by which model, how to read the table, and whether pruning pays."""
    rows = cast("list[Values]", list_in(comparison, "rows"))
    pairs = comparison["pairs"]
    lines = labelled()
    lines.add_row("read", Text(read_fact(dict_in(comparison, "input"))))
    lines.add_row("model", Text(model_fact(dict_in(comparison, "model"), kernel=False)))
    lines.add_row("table", "kept: tokens after each cut; mean: kept fraction over the layers")
    flops = "vision, FLOPs: of tower and prefill" if _vision(rows) else "FLOPs: of the prefill"
    lines.add_row("", f"{flops}, relative to the unpruned model's")
    if pairs:
        times = f"{pairs} pairs" if pairs != 1 else "1 pair"
        lines.add_row("", f"prefill, first token: speed-ups, medians of {times} of runs")
        lines.add_row("", "realised: prefill speed-up as a share of what the FLOPs predict")
        if verdict := _verdict(rows):
            lines.add_row("", Text(verdict, "yellow"))
    console.print()
    console.print(lines)
    for one in list_in(comparison, "warnings"):
        show_warning(str(one), console)


def _parts(comparison: Values, rows: list[Values]) -> list[str]:
    """Return the columns of figures."""
    parts = ["kept", "mean", *(["vision"] if _vision(rows) else []), "FLOPs"]
    return [*parts, *(MEASURED if comparison["pairs"] else ()), "same"]


def _vision(rows: list[Values]) -> bool:
    """Return whether some row spares the vision tower work."""
    return len({number_in(dict_in(row, "flops"), "vision") for row in rows if "flops" in row}) > 1


def _name(row: Values) -> str:
    method = row["method"]
    name = with_options(str(method), dict_in(row, "options")) if method else None
    return printable(str(name or dict_in(row, "preset").get("name")))


def _places(row: Values, named: bool) -> str:
    """ "2 (ecl), 12 (horizon)": the layers that were cut at, with the names that they had."""
    stages = cast("list[Values]", list_in(dict_in(row, "tokens"), "stages"))
    if "error" in row:
        return str(row["at"])
    places = []
    for stage in stages:
        at, layer = str(stage["at"]), str(stage["layer"])
        plain = at in (layer, "input", "pixels")
        places.append(at if plain else f"{layer} ({at})" if named else layer)
    return ", ".join(places)


def _cell(row: Values, base: Values, part: str) -> str:
    """Return one figure: of the unpruned row as it is, of every other relative to that."""
    if "error" in row:
        return "-"
    tokens, compare = dict_in(row, "tokens"), dict_in(row, "compare")
    if part == "kept":
        stages = cast("list[Values]", list_in(tokens, "stages"))
        left = [stage["after"] for stage in stages] or [tokens["kept_after"]]
        return ", ".join(f"{count:,}" for count in left)
    if part == "mean":
        return f"{number_in(tokens, 'keep_mean'):.1%}"
    if part == "same":
        return "yes" if row["same_answer"] else "no"
    if part in ("vision", "FLOPs"):
        key = "vision" if part == "vision" else "prefill"
        flops, unpruned = (counted_in(dict_in(one, "flops"), key) for one in (row, base))
        if flops is None or unpruned is None:
            return "-"
        if row is base:
            return si(flops).strip()
        return f"{flops / unpruned:.1%}" if unpruned else "-"
    if part == "realised":
        if row is base:
            return ""
        realised = counted_in(compare, "realised_fraction")
        return "-" if realised is None else f"{realised:.0%}"
    key = part.replace(" ", "_")
    if row is base:
        return duration(number_in(dict_in(row, "seconds"), key))
    return f"{number_in(compare, f'{key}_speedup'):.2f} x"


def _answer(row: Values) -> Text:
    if "error" in row:
        return Text(printable(str(row["error"])), "yellow")
    return Text(printable(str(row["answer"])))


def _by_answer(rows: list[Values]) -> dict[tuple[str, str], list[str]]:
    """Return every answer, and every reason for none, once, with its label and its rows."""
    given: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        who = _name(row)
        if row["role"] != "unpruned":
            who += f" at {_places(row, named=False)}"
            who += "" if row["keep"] is None else f", keep {row['keep']:g}"
        label = "not run" if "error" in row else "answer"
        given.setdefault((label, str(_answer(row))), []).append(who)
    return given


def _verdict(rows: list[Values]) -> str:
    """Return that pruning does not pay, where it does in no row that was asked for."""
    compared = [dict_in(row, "compare") for row in rows if row["role"] == "asked"]
    best = {
        part: max((number_in(one, f"{part}_speedup") for one in compared if one), default=PAYS)
        for part in ("prefill", "total")
    }
    if best["prefill"] < PAYS:
        return f"pruning does not pay here: {best['prefill']:.2f} x at best"
    if best["total"] < PAYS:
        return (f"pruning does not pay here: prefill {best['prefill']:.2f} x, the whole "
                f"{best['total']:.2f} x at best")  # fmt: skip
    return ""
