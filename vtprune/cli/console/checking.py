"""The table of `vtprune check`: how far pruned is from what it has to equal, and the noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from vtprune.cli.console.facts import model_fact, read_fact
from vtprune.cli.console.tables import labelled, plain_table, print_fitted, show_warning
from vtprune.cli.console.terminal import printable
from vtprune.inference.wording import counted

if TYPE_CHECKING:
    from vtprune.evaluation.checking.result import CheckedCase, CheckedMedia, CheckResult

STYLES = {"equal": "green", "DIFFERS": "bold red"}
VERDICTS = {"equal": "bold green", "different": "bold red"}
CACHES = ("dynamic", "static")
MISSING = "-"
MOST_NOTES = 6


def show_check(result: CheckResult, console: Console) -> None:
    """Print a row for each input, cut and batch, what has a reason, and the verdict."""
    title = f": largest difference of the logits, prompt and {result.steps} decoded tokens"
    console.print(Text.assemble((f"pruned - {result.rule}", "bold"), title))
    table = plain_table()
    for heading in ("input", "cut", "prompts"):
        table.add_column(heading, overflow="fold")
    for heading in ("dynamic\ncache", "static\ncache", "noise", "effect\nof cut"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    noise = {(noise.input, noise.prompts): noise.value for noise in result.noise}
    previous = ""
    for cases in _groups(result.cases):
        first = cases[0]
        if previous not in ("", first.input):
            table.add_row("")
        previous = first.input
        differences = {case.cache: case.difference for case in cases}
        effects = [case.effect for case in cases if case.effect is not None]
        outcomes = list(dict.fromkeys(case.outcome for case in cases))
        table.add_row(
            *(printable(text) for text in (first.input, first.cut, first.prompts)),
            *(_number(differences.get(cache)) for cache in CACHES),
            _number(noise[first.input, first.prompts]),
            f"{effects[0]:.2g}" if effects else MISSING,
            Text("/".join(outcomes), STYLES.get(outcomes[0], "yellow") if len(outcomes) == 1
                 else "yellow"),
        )  # fmt: skip
    print_fitted(table, console)
    console.print()
    lines = labelled()
    notes = [f"{outcome}: {'; '.join(places)}: {reason}" for outcome, reason, places in
             _reasons(result.cases)]  # fmt: skip
    for note in notes[:MOST_NOTES]:
        lines.add_row("note", Text(printable(note)))
    if len(notes) > MOST_NOTES:
        lines.add_row("note", Text(f"{len(notes) - MOST_NOTES} more: --json has all"))
    style = VERDICTS.get(result.verdict, "yellow")
    lines.add_row("verdict", Text(printable(result.claim()), style))
    console.print(lines)


def show_notes(result: CheckResult, console: Console) -> None:
    """Print which model was checked on what, how to read the table, and the warnings."""
    model = result.model
    lines = labelled()
    for checked in result.inputs:
        lines.add_row("read", Text(_input_fact(checked)))
    lines.add_row("model", Text(model_fact(model)))
    versions = result.version.to_dict().items()
    lines.add_row("with", Text(printable(", ".join(f"{name} {text}" for name, text in versions))))
    lines.add_row("ragged", Text("two prompts of different length, padded on the left"))
    if result.noise:
        sources = " or ".join(dict.fromkeys(noise.source for noise in result.noise))
        noise_note = (
            f"how far the unpruned model is from itself ({sources}), at least one step of "
            f"{model.dtype}; pruned and {result.rule} are equal up to "
            f"{result.noise[0].factor:g} times that"
        )
        lines.add_row("noise", Text(noise_note))
    lines.add_row("effect", Text("by how much the cut changes the logits"))
    console.print()
    console.print(lines)
    for warning in result.warnings:
        show_warning(warning, console)


def _input_fact(checked: CheckedMedia) -> str:
    """Return what one input holds."""
    media = checked.media
    if checked.input == "files":
        return read_fact(media)
    parts = counted(media.frames, "frame") if media.frames else counted(media.tiles, "tile")
    return f"{checked.input} made here: {media.width} x {media.height}, {parts}"


def _groups(cases: Sequence[CheckedCase]) -> list[list[CheckedCase]]:
    """Return the cases of each row of the table, in the order of input, cut and batch."""
    groups: dict[tuple[str, str], dict[str, list[CheckedCase]]] = {}
    for case in cases:
        by_batch = groups.setdefault((case.input, case.cut), {})
        by_batch.setdefault(case.prompts, []).append(case)
    return [row for by_batch in groups.values() for row in by_batch.values()]


def _reasons(cases: Sequence[CheckedCase]) -> list[tuple[str, str, list[str]]]:
    """Return outcome and reason of the cases that have one, with the places that share them."""
    by_reason: dict[tuple[str, str], list[CheckedCase]] = {}
    for case in sorted(cases, key=lambda case: case.outcome == "DIFFERS"):
        if case.reason:
            by_reason.setdefault((case.outcome, case.reason), []).append(case)
    return [(*key, _places(alike, cases)) for key, alike in by_reason.items()]


def _places(alike: Sequence[CheckedCase], cases: Sequence[CheckedCase]) -> list[str]:
    """Return where some of the cases are; all cases of an input and a cut are one place."""
    places: list[str] = []
    totals = Counter((case.input, case.cut) for case in cases)
    counts = Counter((case.input, case.cut) for case in alike)
    for (name, cut), count in counts.items():
        if count == totals[name, cut]:
            places.append(f"{name}, {cut}")
        else:
            places += [f"{name}, {cut}, {case.prompts}, {case.cache}"
                       for case in alike if (case.input, case.cut) == (name, cut)]  # fmt: skip
    return places


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1e}"
