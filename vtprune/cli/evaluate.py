"""`vtprune evaluate`: does the answer survive?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune.cli import complete
from vtprune.cli.flags import (
    Flags,
    check_ranges,
    limits_from,
    loading_from,
    method_options,
    rows_asked,
    sampling_from,
)
from vtprune.cli.help import SectionedCommand, section
from vtprune.cli.options import media_options, model_options, row_options
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from vtprune.config import Config
    from vtprune.evaluation.run import Plan
    from vtprune.evaluation.summary import Evaluation
    from vtprune.lineup import Lineup
    from vtprune.questions_file import Asked

LONGEST = 64
DEMO, DEMO_QUESTIONS = "demo", 200

EPILOG = """\b
Examples:
  vtprune evaluate questions.jsonl --model qwen2.5-vl-7b -o answers.jsonl
  vtprune evaluate questions.jsonl --methods entropy,divprune --plot q.png
  vtprune evaluate demo --presets balanced,fast --keep 0.3
"""

_rows, _ask, _output = section("Rows"), section("Questions"), section("Output")


# fmt: off
@click.command(cls=SectionedCommand, epilog=EPILOG)
@click.argument("questions", metavar="QUESTIONS.jsonl")
@row_options
@_rows("-O", "option", multiple=True, metavar="KEY=VALUE", shell_complete=complete.complete_option,
       help="An option of all --methods that have it; repeatable.")
@_rows("--beside", is_flag=True, help="Random and uniform again at the layers and counts of every "
       "row that cuts past the input.")
@_rows("--seeds", type=int, default=5, show_default=True, metavar="N",
       help="How many seeds every random row is the mean of.")
@_rows("--seed", type=int, metavar="N", help="The first seed.  [default: 0]")
@_ask("--limit", type=int, metavar="N", help="The most questions, evenly from the file.  "
      "[default: all; of demo 200]")
@_ask("--metric", default="auto", show_default=True, metavar="NAME",
      help="How answers are scored: auto, exact, contains, choice, number or anls.")
@_ask("--system", metavar="TEXT", help="System prompt.")
@_ask("--max-new-tokens", type=int, metavar="N", help=f"The longest answer.  [default: {LONGEST}]")
@model_options
@media_options
@_output("-o", "--output", "answers", type=click.Path(path_type=Path), metavar="FILE",
         help="Keep every answer in FILE, one line each; run again, it goes on from there.")
@_output("--json", is_flag=True, help="Print one JSON object instead of the table.")
@_output("--plot", type=click.Path(path_type=Path), metavar="FILE",
         help="Draw accuracy against what is kept, and against time, to FILE, a PNG.")
@_output("--quiet", is_flag=True, help="Print the table only.")
def evaluate(
    questions: str,
    beside: bool,
    seeds: int,
    limit: int | None,
    metric: str,
    answers: Path | None,
    plot: Path | None,
    **values: object,
) -> None:
    """Ask many questions with and without pruning: does the answer survive?

    QUESTIONS.jsonl has lines as `vtprune demo` writes them: file, question and, where known,
    answer, choices and kind. With answers the table shows accuracy; without, how often the answer
    is the unpruned model's. The baselines random (a mean over seeds), uniform and downsample stand
    beside, and intervals are of 95 %, drawn by file. QUESTIONS "demo" is the embedded model's own
    test set.
    """
    # fmt: on
    from vtprune.cli import output
    from vtprune.config import load_config

    flags = Flags(**values)  # type: ignore[arg-type]
    user = load_config()
    check_ranges(flags)
    _check_metric(metric)
    for option, path in (("-o", answers), ("--plot", plot)):
        if path is not None:
            output.check_target(path, option)
    with output.libraries_silenced(), _questions(questions, limit, flags) as asked:
        lineup, plan = _plan(flags, user, asked, seeds, beside)
        found = _run(flags, user, lineup, plan, metric, answers, questions == DEMO)
    if plot is not None:
        from vtprune.evaluation.plot import plot as draw

        output.save_file(plot, draw(found), "--plot")
    from vtprune.console import evaluation

    output.show_tables(
        found.to_dict(), flags.json, flags.quiet, evaluation.show_evaluation, evaluation.show_notes
    )


def _check_metric(metric: str) -> None:
    from vtprune.evaluation.scoring import METRICS

    if metric not in METRICS:
        raise VtpruneError(f"--metric {metric} is unknown", f"choose from {', '.join(METRICS)}")


@contextmanager
def _questions(source: str, limit: int | None, flags: Flags) -> Iterator[list[Asked]]:
    """The questions; those of the embedded world are written to a folder that goes afterwards."""
    from vtprune.evaluation.run import first_questions
    from vtprune.questions_file import read_questions

    if source != DEMO or Path(source).is_file():
        yield first_questions(read_questions(source), limit)
        return
    from vtprune import demo

    num = DEMO_QUESTIONS if limit is None else limit
    if num < 1:
        raise VtpruneError(f"--limit {num} is out of range", "1 or more")
    with tempfile.TemporaryDirectory(prefix="vtprune-demo-") as folder:
        demo.write(folder, num, 0)
        yield read_questions(Path(folder) / "questions.jsonl")


def _plan(
    flags: Flags, user: Config, asked: list[Asked], seeds: int, beside: bool
) -> tuple[Lineup, Plan]:
    """The rows that are wanted.

    Raises:
        PresetError: every fault of them.
    """
    from vtprune.evaluation.cells import cells_of
    from vtprune.evaluation.run import Plan

    lineup, cells = cells_of(
        *rows_asked(flags, user), at=flags.at, options=method_options(flags.option),
        seed=flags.seed, seeds=seeds, beside=beside,
    )  # fmt: skip
    return lineup, Plan(tuple(asked), tuple(cells), lineup.notes)


def _run(
    flags: Flags,
    user: Config,
    lineup: Lineup,
    plan: Plan,
    metric: str,
    answers: Path | None,
    is_demo: bool,
) -> Evaluation:
    from vtprune.cli.output import progress_line
    from vtprune.evaluation.answering import Settings
    from vtprune.evaluation.run import evaluate
    from vtprune.evaluation.scoring import score
    from vtprune.generation import Generation
    from vtprune.loading import load

    settings = Settings(
        sampling=sampling_from(lineup.media, flags),
        generation=Generation(
            flags.max_new_tokens or LONGEST,
            system=flags.system if flags.system is not None else user.system or "",
        ),
        limits=limits_from(flags),
        score=lambda asked, given: score(asked.answer or "", given, asked.choices, metric),
    )
    if is_demo and metric == "auto":
        settings = replace(settings, score=_demo_score)
    with progress_line(flags.quiet) as show:
        loaded = load(**loading_from(flags, user), on_progress=show)
        return evaluate(loaded, plan, settings, answers, show)


def _demo_score(asked: Asked, given: str) -> float:
    """Right is right whole: part of a clip's events counts as wrong, as in the model's card."""
    from vtprune.demo.score import score

    return float(score(asked.kind, asked.answer or "", given) == 1.0)
