"""`vtprune evaluate`: does the answer survive?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune.cli.asking import (
    LONGEST,
    answers_option,
    check_choices,
    check_metric,
    demo_questions,
    is_demo,
    settings_from,
)
from vtprune.cli.flags import (
    Flags,
    check_ranges,
    limits_from,
    loading_from,
    method_options,
    rows_asked,
)
from vtprune.cli.help import SectionedCommand, section
from vtprune.cli.options import media_options, model_options, row_options
from vtprune.cli.results import (
    SUFFIXES,
    Makers,
    charts,
    check_saves,
    json_file,
    save_option,
    write_saves,
)

if TYPE_CHECKING:
    from vtprune.cli.config import Config
    from vtprune.evaluation.lineup import Lineup
    from vtprune.evaluation.run import Plan
    from vtprune.evaluation.summary import Evaluation
    from vtprune.inference.questions_file import Asked

EPILOG = """\b
Examples:
  vtprune evaluate questions.jsonl --model qwen2.5-vl-7b --answers a.jsonl
  vtprune evaluate questions.jsonl --methods entropy,divprune --save q.png
  vtprune evaluate demo --presets balanced,fast --keep 0.3
"""

_rows, _ask, _output = section("Rows"), section("Questions"), section("Output")


# fmt: off
@click.command(cls=SectionedCommand, epilog=EPILOG)
@click.argument("questions", metavar="QUESTIONS.jsonl")
@row_options()
@_rows("--beside", is_flag=True, help="Random and uniform again at the layers and counts of every "
       "row that cuts past the input.")
@_rows("--turns", is_flag=True, help="Every question again as the second of a conversation, on the "
       "tokens that the first one left.")
@_rows("--seeds", type=int, default=5, show_default=True, metavar="N",
       help="How many seeds, from --seed on, every random row is the mean of.")
@_ask("--limit", type=int, metavar="N", help="The most questions, evenly from the file.  "
      "[default: all; of demo 200]")
@_ask("--metric", default="auto", show_default=True, metavar="NAME",
      help="How answers are scored: auto, exact, contains, choice, number or anls.")
@_ask("--system", metavar="TEXT", help="System prompt.")
@_ask("--max-new-tokens", type=int, metavar="N", help=f"The longest answer.  [default: {LONGEST}]")
@model_options
@media_options
@answers_option
@_output("--json", is_flag=True, help="Print one JSON object instead of the table.")
@save_option(("everything", ".json"), ("the rows", ".csv"),
             ("accuracy against what is kept and against time, drawn", ".png or .svg"))
@_output("--quiet", is_flag=True, help="Print the table only.")
def evaluate(
    questions: str,
    beside: bool,
    turns: bool,
    seeds: int,
    limit: int | None,
    metric: str,
    answers: Path | None,
    **values: object,
) -> None:
    """Ask many questions with and without pruning: does the answer survive?

    QUESTIONS.jsonl has lines as `vtprune demo` writes them: file, question and, where known,
    answer, choices and kind; a file that turns out not to decode is left out and named. With
    answers the table shows accuracy; without, how often the answer is the unpruned model's. The
    baselines random (a mean over seeds), uniform and downsample stand beside, and intervals are of
    95 %, drawn by file. QUESTIONS "demo" is the embedded model's own test set.
    """
    # fmt: on
    from vtprune.cli import output
    from vtprune.cli.config import load_config
    from vtprune.cli.console.evaluation import show_evaluation, show_notes
    from vtprune.media import open_sources

    flags = Flags(**values)  # type: ignore[arg-type]
    user = load_config()
    check_ranges(flags)
    check_metric(metric)
    others = {"--answers": answers}
    check_saves(flags.saves, SUFFIXES, [questions], others)
    with output.libraries_silenced(), _questions(questions, limit) as asked:
        check_choices(metric, asked)
        lineup, plan = _plan(flags, user, asked, seeds, beside, turns)
        files = dict.fromkeys(one.file for one in asked)
        check_saves(flags.saves, SUFFIXES, list(files), others)
        open_sources(files, limits_from(flags))  # what can't be read is told before a long load
        found = _run(flags, user, lineup, plan, metric, answers, is_demo(questions))
        try:
            list(write_saves(flags.saves, _makers(found)))
        finally:  # a picture that can't be written costs no table
            output.show_tables(found.to_dict(), flags.json, flags.quiet, show_evaluation,
                               show_notes)  # fmt: skip


def _makers(found: Evaluation) -> Makers:
    def draw(kind: str) -> bytes:
        from vtprune.evaluation.plot import plot

        return plot(found, kind)

    return {
        ".json": lambda: json_file(found.to_dict()),
        ".csv": lambda: found.to_csv().encode(),
        **charts(draw),
    }


@contextmanager
def _questions(source: str, limit: int | None) -> Iterator[list[Asked]]:
    from vtprune.evaluation.run import first_questions
    from vtprune.inference.questions_file import read_questions

    if is_demo(source):
        with demo_questions(limit, "test") as asked:
            yield asked
    else:
        yield first_questions(read_questions(source), limit)


def _plan(
    flags: Flags, user: Config, asked: list[Asked], seeds: int, beside: bool, turns: bool
) -> tuple[Lineup, Plan]:
    """The rows that are wanted.

    Raises:
        PresetError: every fault of them.
    """
    from vtprune.evaluation.cells import cells_of
    from vtprune.evaluation.run import Plan

    lineup, cells = cells_of(
        *rows_asked(flags, user), at=flags.at, options=method_options(flags.option),
        seed=flags.seed, seeds=seeds, beside=beside, turns=turns,
    )  # fmt: skip
    return lineup, Plan(tuple(asked), tuple(cells), lineup.notes)


def _run(
    flags: Flags,
    user: Config,
    lineup: Lineup,
    plan: Plan,
    metric: str,
    answers: Path | None,
    demo: bool,
) -> Evaluation:
    from vtprune.cli.output import progress_line
    from vtprune.evaluation.run import evaluate
    from vtprune.models.loading import load

    settings = settings_from(flags, user, lineup.media, metric, demo)
    with progress_line(flags.quiet) as show:
        loaded = load(**loading_from(flags, user), on_progress=show)
        return evaluate(loaded, plan, settings, answers, show)
