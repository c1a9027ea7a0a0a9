"""`vtprune evaluate`: does the answer survive?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune.cli.asking import (
    LONGEST,
    check_choices,
    check_metric,
    demo_questions,
    is_demo,
    settings_from,
)
from vtprune.cli.flags import (
    limits_from,
    loading_from,
    method_options,
    rows_asked,
)
from vtprune.cli.help import Command
from vtprune.cli.options import MEDIA, MODEL, ROWS, Flags, takes
from vtprune.cli.results import (
    SUFFIXES,
    Makers,
    charts,
    check_saves,
    json_file,
    write_saves,
)

if TYPE_CHECKING:
    from vtprune.evaluation.run import Plan
    from vtprune.evaluation.summary import Evaluation
    from vtprune.evaluation.variants import VariantList
    from vtprune.inference.questions_file import Asked

EPILOG = """\b
Examples:
  vtprune evaluate questions.jsonl --model qwen2.5-vl-7b --answers a.jsonl
  vtprune evaluate questions.jsonl --methods entropy,divprune --save q.png
  vtprune evaluate demo --presets balanced,fast --keep 0.3
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("questions", metavar="QUESTIONS.jsonl")
@takes(
    *ROWS,
    "beside",
    "turns",
    "seeds",
    *MODEL,
    *MEDIA,
    "limit",
    "metric",
    "system",
    "max_new_tokens",
    "answers",
    "json",
    "saves",
    "quiet",
    defaults={"keeps": ("0.5,0.3,0.1",)},
    default_words={
        "presets": "balanced, where no method is named",
        "max_new_tokens": str(LONGEST),
    },
    save=[
        ("everything", ".json"),
        ("the rows", ".csv"),
        ("accuracy against what is kept and against time, drawn", ".png or .svg"),
    ],
)
def evaluate(questions: str, flags: Flags) -> None:
    """Ask many questions with and without pruning: does the answer survive?

    QUESTIONS.jsonl has lines as `vtprune demo` writes them: file, question and, where known,
    answer, choices and kind; a file that turns out not to decode is left out and named. With
    answers the table shows accuracy; without, how often the answer is the unpruned model's. The
    baselines random (a mean over seeds), uniform and downsample stand beside, and intervals are of
    95 %, drawn by file. QUESTIONS "demo" is the embedded model's own test set.
    """
    from vtprune.cli import output
    from vtprune.cli.config import load_config
    from vtprune.cli.console.evaluation import show_evaluation, show_notes
    from vtprune.media import open_sources

    user = load_config()
    metric, answers = flags.metric, flags.answers
    check_metric(metric)
    others = {"--answers": answers}
    check_saves(flags.saves, SUFFIXES, [questions], others)
    with output.libraries_silenced(), _questions(questions, flags.limit) as asked:
        check_choices(metric, asked)
        lineup, plan = _plan(flags, user, asked)
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


def _plan(flags: Flags, user: Flags, asked: list[Asked]) -> tuple[VariantList, Plan]:
    """The rows that are wanted.

    Raises:
        PresetError: every fault of them.
    """
    from vtprune.evaluation.run import Plan
    from vtprune.evaluation.variants import list_variants, repeat_variants

    lineup = list_variants(
        *rows_asked(flags, user), at=flags.at, options=method_options(flags.option), seed=flags.seed
    )
    cells = repeat_variants(lineup, flags.seeds, flags.beside, flags.turns)
    return lineup, Plan(tuple(asked), tuple(cells), lineup.notes)


def _run(
    flags: Flags,
    user: Flags,
    lineup: VariantList,
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
