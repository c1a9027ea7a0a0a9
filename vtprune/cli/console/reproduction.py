"""The tables of `vtprune reproduce`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from vtprune.cli.console.facts import asked_fact
from vtprune.cli.console.tables import show_facts, show_table, show_warning

if TYPE_CHECKING:
    from vtprune.evaluation.reproduction.reproduce import ReproducedRow, Reproduction
    from vtprune.evaluation.reproduction.tables import PublishedTable


def show_tables(tables: Sequence[PublishedTable], console: Console) -> None:
    """Print one line for every table."""
    rows = [(table.name, table.model, str(len(table.rows)), table.paper) for table in tables]
    show_table(("table", "model", "<rows", "from"), rows, console)


def show_reproduction(result: Reproduction, console: Console) -> None:
    """Print published figures beside those that came out here."""
    if any(row.left is not None for row in result.rows):
        show_table(
            ("tokens left", "published", "here", "<FLOPs", "<here"),
            [_budget(row) for row in result.rows],
            console,
        )
    if result.evaluation is not None:
        if any(row.left is not None for row in result.rows):
            console.print()
        show_table(
            ("score, % of unpruned", "<published", "<here", "<95 %", "<difference", "<kept", "<n"),
            [_score(row) for row in result.rows],
            console,
        )
    facts = [("not run", f"{row.published.name}: {error}") for row in result.rows
             for error in row.errors]  # fmt: skip
    if facts:
        console.print()
        show_facts(facts, console)


def _budget(row: ReproducedRow) -> tuple[str, ...]:
    published = row.published
    return (
        published.name,
        _counts(published.left),
        "the same" if row.left == published.left else _counts(row.left or {}),
        "" if published.flops is None else f"-{published.flops:.1f}%",
        "" if row.flops is None else f"-{row.flops:.1f}%",
    )


def _counts(left: Mapping[int, int]) -> str:
    return ", ".join(f"{count:,} from {layer}" for layer, count in left.items())


def _score(row: ReproducedRow) -> tuple[str, ...]:
    published, gap = row.published.retained, row.difference
    return (
        row.published.name,
        "" if published is None else f"{published:.1f}",
        "" if row.retained is None else f"{row.retained:.1f}",
        "" if row.interval is None else f"{row.interval[0]:.1f}-{row.interval[1]:.1f}",
        "" if gap is None else f"{gap:+.1f}",
        "" if row.kept is None else f"{row.kept:.0%}",
        f"{row.questions:,}",
    )


def show_notes(result: Reproduction, console: Console) -> None:
    """Print what the table is of, what was run, and the warnings."""
    table = result.table
    facts = [
        ("table", f"{table.title}: {table.paper}; {table.model}, {table.benchmark}"),
        ("source", table.source),
        ("columns", "tokens left: from which layer on; FLOPs: of the prefill, saved; first as "
                    "published, then here"),
    ]  # fmt: skip
    model = result.model
    if result.evaluation is not None:
        asked = result.evaluation
        quality = "right answers" if asked.labelled else "answers that are the unpruned model's"
        count = asked_fact(asked.questions, asked.files)
        facts.append(("here", f"{model}, {count}: {quality}, as a share of the unpruned model's"))
    else:
        tokens = f"{result.tokens:,} visual tokens"
        facts.append(("here", f"{model}, {tokens}: budgets alone; a list of questions gives scores "
                              "too"))  # fmt: skip
    console.print()
    show_facts(facts, console)
    for warning in result.warnings:
        show_warning(warning, console)
