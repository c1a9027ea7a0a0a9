"""`vtprune evaluate`: does the answer survive?"""

from __future__ import annotations

from dataclasses import replace

import click

from vtprune.cli.asking import (
    LONGEST,
    asked_paths,
    asked_questions,
    is_demo,
    settings_from,
    variants_from,
)
from vtprune.cli.flags import loading_from
from vtprune.cli.help import Command
from vtprune.cli.options import MEDIA, MODEL, ROWS, Flags, takes
from vtprune.cli.results import (
    CHARTS_TEXT,
    FULL_TEXT,
    SUFFIXES,
    check_saves,
    row_makers,
    save_and_show,
)

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
    "columns",
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
    save=[*FULL_TEXT, ("accuracy against what is kept and against time, drawn", CHARTS_TEXT)],
)
def evaluate(questions: str, flags: Flags) -> None:
    """Ask many questions with and without pruning: does the answer survive?

    QUESTIONS.jsonl has lines as `vtprune demo` writes them: file, question and, where known,
    answer, choices and kind; a line that is wrong, or whose file is missing or can't be decoded, is
    named, counted and left out. With
    answers the table shows accuracy; without, how often the answer is the unpruned model's. The
    baselines random (a mean over seeds), uniform and downsample are always rows of the table.
    Intervals are of 95 %, by a bootstrap over files. QUESTIONS "demo" is the embedded model's own
    test set.
    """
    from vtprune.cli import output
    from vtprune.cli.config import load_config
    from vtprune.cli.console.evaluation import show_evaluation, show_notes

    user = load_config()
    others = {"--answers": flags.answers}
    check_saves(flags.saves, SUFFIXES, [questions], others)
    listed = variants_from(flags, user)
    with (
        output.libraries_silenced(),
        asked_questions([questions], flags, "test", media=False) as (asked, failed),
    ):
        check_saves(flags.saves, SUFFIXES, asked_paths(asked), others)
        with output.importing(flags.quiet):
            from vtprune.evaluation.evaluate import evaluate as run
            from vtprune.evaluation.evaluation_chart import plot
            from vtprune.evaluation.variants import repeat_variants
            from vtprune.models.loading import load

        variants = repeat_variants(listed, flags.seeds, flags.beside, flags.turns)
        settings = settings_from(flags, user, listed.media, is_demo(questions))
        with output.progress_line(flags.quiet) as show:
            loaded = load(**loading_from(flags, user), on_progress=show)
            result = run(loaded, asked, variants, settings, flags.answers, show, listed.notes)
        result = replace(result, failed=failed)
        makers = row_makers(result, lambda kind: plot(result, kind))
        save_and_show(result, flags, makers, show_evaluation, show_notes)
