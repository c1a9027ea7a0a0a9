"""The tables of `vtprune evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vtprune.cli.console.facts import asked_fact, model_fact
from vtprune.cli.console.tables import (
    labelled,
    list_failed,
    plain_table,
    print_fitted,
    show_warning,
)
from vtprune.cli.console.terminal import printable
from vtprune.inference.wording import counted, with_options

if TYPE_CHECKING:
    from vtprune.evaluation.bootstrap import Difference
    from vtprune.evaluation.evaluate import Evaluation
    from vtprune.evaluation.rows import EvaluationRow

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


def show_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print the rows of an evaluation, keep by keep."""
    answered = [row for row in evaluation.rows if row.questions]
    scored = evaluation.labelled
    against = [name for name, least in AGAINST.items() if console.width >= least]
    table = plain_table()
    table.add_column("", overflow="fold")
    for heading in ("kept", "n"):
        table.add_column(heading, justify="right")
    if scored:
        gaps = (f"against\n{name}" for name in against)
        for heading in ("accuracy", "95 %", "of un-\npruned", *gaps):
            table.add_column(heading, justify="right")
    same = ("same\nanswer", "KL") if scored else ("same\nanswer", "95 %", "KL", "perplexity")
    for heading in (*same, "prefill", "first\ntoken"):
        table.add_column(heading, justify="right")
    for place, (keep, group) in enumerate(groupby(answered, key=lambda row: row.keep)):
        if place:
            table.add_row()
            table.add_row(Text("own keeps" if keep is None else f"keep {keep:g}", "bold"))
        for row in group:
            style = "dim" if row.role == "baseline" else ""
            figures = _figures(row, evaluation.questions, scored, against)
            table.add_row(Text(row_name(row)), *figures, style=style)
    print_fitted(table, console)
    if scored:
        console.print()
        print_fitted(_kinds(answered), console)
    if any(row.second for row in answered):
        console.print()
        print_fitted(_follow_ups(answered), console)
    reasons = _not_run(evaluation)
    lines = labelled()
    for reason, names in list(reasons.items())[:MOST_REASONS]:
        lines.add_row("not run", Text(printable(reason), "yellow"))
        lines.add_row("", Text("; ".join(names), "dim"))
    if len(reasons) > MOST_REASONS:
        lines.add_row("", Text(f"and {len(reasons) - MOST_REASONS} more reasons", "yellow"))
    list_failed(evaluation.failed, evaluation.questions, lines)
    if lines.row_count:
        console.print()
        console.print(lines)


def _not_run(evaluation: Evaluation) -> dict[str, list[str]]:
    """Return every reason for which something could not be asked, with its rows."""
    reasons: dict[str, list[str]] = {}
    total = evaluation.questions
    for row in evaluation.rows:
        keep = "" if row.keep is None else f", keep {row.keep:g}"
        missing = missing_of(row.questions, total, "question")
        for reason in row.errors:
            reasons.setdefault(reason, []).append(f"{_full_name(row)}{keep}{missing}")
    return reasons


def missing_of(asked: int, total: int, noun: str) -> str:
    """Return how many a row could not be asked, in brackets; "" where that is all, or none."""
    return f" ({total - asked} of {counted(total, noun)})" if 0 < asked < total else ""


def _full_name(row: EvaluationRow) -> str:
    """Return a row's name, of a matched baseline with the row that it matches."""
    _, beside, matched = row.name.partition(" beside ")
    return f"{row.method} beside {matched.partition(' keep ')[0]}" if beside else row_name(row)


class NamedRow(Protocol):
    """A row of any table of variants."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def preset(self) -> str | None: ...
    @property
    def method(self) -> str | None: ...
    @property
    def at(self) -> str: ...
    @property
    def keep(self) -> float | None: ...
    @property
    def options(self) -> Mapping[str, str]: ...


def row_name(row: NamedRow) -> str:
    """Return what a row is called in tables that are ordered by keep."""
    if row.role == "unpruned":
        return "unpruned"
    name = printable(row.preset or with_options(str(row.method), row.options))
    if " beside " in row.name:
        return f"  {name}, same cuts"
    return f"{name} at {row.at}" if row.method else name


def name_with_keep(row: NamedRow) -> str:
    """Return what a row is called where its keep is not beside it."""
    keep = f" {row.keep:g}" if row.keep is not None and row.role != "unpruned" else ""
    return row_name(row) + keep


def _figures(
    row: EvaluationRow, questions: int, scored: bool, against: Sequence[str]
) -> list[Text]:
    """Return the figures of a row; of the unpruned one without those that compare with it.

    Args:
        questions: how many there are; a row of fewer has a star.
    """
    pruned = row.role != "unpruned"
    accuracy, agreement = row.accuracy, row.agreement
    fewer = "*" * (row.questions < questions)
    figures = [Text(f"{row.keep_mean:.0%}"), Text(f"{row.questions:,}{fewer}")]
    if scored:
        relative = row.relative if pruned else None
        figures += [
            Text("" if accuracy is None else f"{accuracy.mean:.1%}"),
            Text("" if accuracy is None else f"{accuracy.low:.0%}-{accuracy.high:.0%}", "dim"),
            Text("" if relative is None else f"{relative:.1%}"),
        ]
        gaps = {"unpruned": row.against_unpruned, "random": row.against_random}
        figures += [Text(_gap(gaps[name]) if pruned else "") for name in against]
    figures.append(Text(f"{agreement.mean:.1%}" if pruned else ""))
    if not scored:
        figures.append(Text(f"{agreement.low:.0%}-{agreement.high:.0%}" if pruned else "", "dim"))
    figures.append(Text(f"{row.divergence:.3f}" if pruned else ""))
    if not scored:
        spelt = row.perplexity < MOST_SPELT
        figures.append(Text(f"{row.perplexity:.2f}" if spelt else f"{row.perplexity:.0e}"))
    return [*figures, Text(f"{row.prefill_speedup:.2f}x"), Text(f"{row.first_token_speedup:.2f}x")]


def _gap(gap: Difference | None) -> str:
    """Return a difference in points, with its interval; "" without one."""
    if gap is None:
        return ""
    mean, low, high = (100 * share for share in (gap.mean, gap.low, gap.high))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _kinds(rows: Sequence[EvaluationRow]) -> Table:
    """Return the accuracy by kind of question."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.by_kind))
    table = plain_table(gap=1)
    table.add_column("by kind")
    for kind in kinds:
        asked = max(row.kind_questions.get(kind, 0) for row in rows)
        count = f"\nn={asked:,}" if asked else ""
        table.add_column((kind or "other").replace("_", "\n") + count, justify="right")
    for row in rows:
        by_kind = row.by_kind
        most = {kind: max(other.kind_questions.get(kind, 0) for other in rows) for kind in kinds}
        shares = [
            Text(f"{by_kind[kind]:.0%}{'*' * (row.kind_questions.get(kind, 0) < most[kind])}"
                 if kind in by_kind else "")
            for kind in kinds
        ]  # fmt: skip
        style = "dim" if row.role == "baseline" else ""
        table.add_row(Text(name_with_keep(row)), *shares, style=style)
    return table


def _follow_ups(rows: Sequence[EvaluationRow]) -> Table:
    """Return the quality of follow-up questions, and of the same ones asked alone."""
    table = plain_table()
    table.add_column("second questions", overflow="fold")
    for heading in ("keep", "n", "fresh", "second", "unpruned", "lost"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("question")
    for row in rows:
        second = row.second
        if second is None:
            continue
        unpruned = row.role == "unpruned"
        shares = (second.fresh, second.quality.mean, second.unpruned)
        keep = "" if unpruned or row.keep is None else f"{row.keep:g}"
        question = "" if unpruned else "read" if row.reads_question else "blind"
        table.add_row(
            Text(row_name(row)), keep, f"{second.questions:,}",
            *(f"{share:.1%}" for share in shares),
            "" if unpruned else _lost(second.change), question,
            style="dim" if row.role == "baseline" else "",
        )  # fmt: skip
    return table


def _lost(change: Difference) -> str:
    """Return what is lost, in points, with its interval; a loss is a change below 0."""
    mean, low, high = (100 * share for share in (change.mean, change.high, change.low))
    return f"{0 - mean:.1f} ({0 - low:.0f} to {0 - high:.0f})"


def show_notes(evaluation: Evaluation, console: Console) -> None:
    """Print what was asked of which model, how to read the table, and the warnings."""
    lines = labelled()
    lines.add_row("asked", Text(asked_fact(evaluation.questions, evaluation.files)))
    lines.add_row("model", Text(model_fact(evaluation.model, kernel=False)))
    scored = evaluation.labelled
    stars = any(0 < row.questions < evaluation.questions for row in evaluation.rows)
    fewer = ", * fewer than all" if stars else ""
    quality, same, loss = (ACCURACY, "", "") if scored else ("", INTERVAL, PERPLEXITY)
    lines.add_row(
        "table",
        f"n: questions that were asked{fewer}; {quality}same answer: share of answers equal to the "
        f"unpruned model's{same}; KL: divergence of the predictions of its first answer tokens; "
        f"{loss}prefill, first token: measured speed-ups, medians; random rows: means over seeds",
    )
    if any(row.second for row in evaluation.rows):
        lines.add_row("", Text(FOLLOW_UPS))
    console.print()
    console.print(lines)
    for warning in evaluation.warnings:
        show_warning(warning, console)
