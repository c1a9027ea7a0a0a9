"""The tables of `vtprune evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vtprune.cli.console.facts import asked_fact, model_fact
from vtprune.cli.console.tables import labelled, plain_table, print_fitted, show_warning
from vtprune.cli.console.terminal import printable
from vtprune.cli.console.values import Values, dict_in, list_in, number_in
from vtprune.inference.wording import with_options

AGAINST = {"unpruned": 100, "random": 120}
"""What a difference is to, and the columns of a terminal from which on it has room."""
INTERVAL = " with its 95 % interval (bootstrap over files)"
ACCURACY = f"accuracy{INTERVAL}; "
PERPLEXITY = "perplexity: of the unpruned answer under pruning; "
FOLLOW_UPS = (
    "second: each question as a follow-up to another about its file, on the tokens that the first "
    "one left; fresh: asked alone; unpruned: as a follow-up, without pruning; lost: points that "
    "asking second costs beyond what it costs the unpruned model, with its 95 % interval"
)
MOST_SPELT = 1e5  # a perplexity that is written out
MOST_REASONS = 5  # why something was not run


def show_evaluation(evaluation: Values, console: Console) -> None:
    """Print the rows of an evaluation, keep by keep.

    Args:
        evaluation: `Evaluation.to_dict()`.
    """
    rows = cast("list[Values]", list_in(evaluation, "rows"))
    run = [row for row in rows if row["questions"]]
    scored = bool(evaluation["labelled"])
    against = [name for name, least in AGAINST.items() if console.width >= least]
    table = plain_table()
    table.add_column("", overflow="fold")
    table.add_column("kept", justify="right")
    if scored:
        gaps = (f"against\n{name}" for name in against)
        for heading in ("accuracy", "95 %", "of\nunpruned", *gaps):
            table.add_column(heading, justify="right")
    same = ("same\nanswer", "KL") if scored else ("same\nanswer", "95 %", "KL", "perplexity")
    for heading in (*same, "prefill", "first\ntoken"):
        table.add_column(heading, justify="right")
    for place, (keep, group) in enumerate(groupby(run, key=lambda row: row["keep"])):
        if place:
            table.add_row()
            table.add_row(Text("own keeps" if keep is None else f"keep {keep:g}", "bold"))
        for row in group:
            style = "dim" if row["role"] == "baseline" else ""
            table.add_row(Text(_name(row)), *_cells(row, scored, against), style=style)
    print_fitted(table, console)
    if scored:
        console.print()
        print_fitted(_kinds(run), console)
    if any(row.get("second") for row in run):
        console.print()
        print_fitted(_follow_ups(run), console)
    reasons = _not_run(rows, number_in(evaluation, "questions"))
    lines = labelled()
    for reason, names in list(reasons.items())[:MOST_REASONS]:
        lines.add_row("not run", Text(printable(reason), "yellow"))
        lines.add_row("", Text("; ".join(names), "dim"))
    if len(reasons) > MOST_REASONS:
        lines.add_row("", Text(f"and {len(reasons) - MOST_REASONS} more reasons", "yellow"))
    if reasons:
        console.print()
        console.print(lines)


def _not_run(rows: Sequence[Values], total: float) -> dict[str, list[str]]:
    """Return every reason for which something could not be asked, with its rows."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        keep = "" if row["keep"] is None else f", keep {row['keep']:g}"
        answered = number_in(row, "questions")
        share = f" ({total - answered:.0f} of {total:.0f} questions)" if answered else ""
        for reason in list_in(row, "errors"):
            reasons.setdefault(str(reason), []).append(f"{_full_name(row)}{keep}{share}")
    return reasons


def _full_name(row: Values) -> str:
    """Return a row's name, of a matched baseline with the row that it matches."""
    _, beside, owner = str(row["row"]).partition(" beside ")
    return f"{row['method']} beside {owner.partition(' keep ')[0]}" if beside else _name(row)


def _name(row: Values) -> str:
    if row["role"] == "unpruned":
        return "unpruned"
    name = printable(
        str(row["preset"] or with_options(str(row["method"]), dict_in(row, "options")))
    )
    if " beside " in str(row["row"]):
        return f"  {name}, same cuts"
    return f"{name} at {row['at']}" if row["method"] else name


def _cells(row: Values, scored: bool, against: Sequence[str]) -> list[Text]:
    unpruned = row["role"] == "unpruned"
    cells = [Text(f"{number_in(row, 'keep_mean'):.0%}")]
    if scored:
        low, high = cast("Sequence[float]", row["interval"])
        cells += [Text(f"{number_in(row, 'accuracy'):.1%}"), Text(f"{low:.0%}-{high:.0%}", "dim")]
        relative = row["relative"]
        cells.append(Text("" if unpruned or relative is None else f"{relative:.1%}"))
        for name in against:
            gap = row.get(f"against_{name}")
            cells.append(Text("" if unpruned or gap is None else _gap(cast("Values", gap))))
    cells.append(Text("" if unpruned else f"{number_in(row, 'agreement'):.1%}"))
    if not scored:
        low, high = cast("Sequence[float]", row["agreement_interval"])
        cells.append(Text("" if unpruned else f"{low:.0%}-{high:.0%}", "dim"))
    cells.append(Text("" if unpruned else f"{number_in(row, 'divergence'):.3f}"))
    if not scored:
        loss = number_in(row, "perplexity")
        cells.append(Text(f"{loss:.2f}" if loss < MOST_SPELT else f"{loss:.0e}"))
    return [
        *cells,
        Text(f"{number_in(row, 'prefill_speedup'):.2f}x"),
        Text(f"{number_in(row, 'first_token_speedup'):.2f}x"),
    ]


def _gap(gap: Values) -> str:
    """Return a difference in points, with its interval."""
    mean, low, high = (100 * number_in(gap, name) for name in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _kind_row(row: Values) -> str:
    keep = f" {row['keep']:g}" if row["keep"] is not None and row["role"] != "unpruned" else ""
    return _name(row) + keep


def _kinds(rows: Sequence[Values]) -> Table:
    """Return the accuracy by kind of question."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in dict_in(row, "by_kind")))
    table = plain_table(gap=1)
    table.add_column("by kind")
    for kind in kinds:
        table.add_column((kind or "other").replace("_", "\n"), justify="right")
    for row in rows:
        shares = dict_in(row, "by_kind")
        cells = [Text(f"{number_in(shares, kind):.0%}" if kind in shares else "") for kind in kinds]
        style = "dim" if row["role"] == "baseline" else ""
        table.add_row(Text(_kind_row(row)), *cells, style=style)
    return table


def _follow_ups(rows: Sequence[Values]) -> Table:
    """Return the quality of follow-up questions, and of the same ones asked alone."""
    table = plain_table()
    table.add_column("second questions", overflow="fold")
    for heading in ("keep", "fresh", "second", "unpruned", "lost"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("question")
    for row in rows:
        second = dict_in(row, "second")
        if not second:
            continue
        unpruned = row["role"] == "unpruned"
        quality = "agreement" if second["accuracy"] is None else "accuracy"
        shares = [number_in(second, key) for key in ("fresh", quality, "unpruned")]
        keep = "" if unpruned or row["keep"] is None else f"{row['keep']:g}"
        by = "" if unpruned else "read" if row["reads_question"] else "blind"
        table.add_row(
            Text(_name(row)), keep, *(f"{share:.1%}" for share in shares),
            "" if unpruned else _lost(dict_in(second, "change")), by,
            style="dim" if row["role"] == "baseline" else "",
        )  # fmt: skip
    return table


def _lost(change: Values) -> str:
    """Return what is lost, in points, with its interval; a loss is a change below 0."""
    mean, low, high = (100 * number_in(change, key) for key in ("mean", "high", "low"))
    return f"{0 - mean:.1f} ({0 - low:.0f} to {0 - high:.0f})"


def show_notes(evaluation: Values, console: Console) -> None:
    """Print what was asked of which model, how to read the table, and the warnings."""
    lines = labelled()
    lines.add_row("asked", Text(asked_fact(evaluation)))
    lines.add_row("model", Text(model_fact(dict_in(evaluation, "model"), kernel=False)))
    scored = evaluation["labelled"]
    quality, same, loss = (ACCURACY, "", "") if scored else ("", INTERVAL, PERPLEXITY)
    lines.add_row("table", f"{quality}same answer: share of answers equal to the unpruned model's"
                  f"{same}; KL: divergence of the predictions of its first answer tokens; {loss}"
                  "prefill, first token: measured speed-ups, medians; random rows are means over "
                  "seeds")  # fmt: skip
    if any(row.get("second") for row in cast("list[Values]", list_in(evaluation, "rows"))):
        lines.add_row("", Text(FOLLOW_UPS))
    console.print()
    console.print(lines)
    for one in list_in(evaluation, "warnings"):
        show_warning(str(one), console)
