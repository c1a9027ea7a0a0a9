"""`vtprune compare`: several methods on one question, as one table."""

from __future__ import annotations

import time

import click

from vtprune.cli.asking import variants_from
from vtprune.cli.flags import (
    generation_from,
    limits_from,
    loading_from,
    media_and_questions,
    open_media,
    sampling_from,
)
from vtprune.cli.help import Command
from vtprune.cli.options import MAX_NEW_TOKENS, MEDIA, MODEL, ROWS, Flags, takes
from vtprune.cli.results import (
    CHARTS,
    CHARTS_TEXT,
    FULL_TEXT,
    SUFFIXES,
    check_saves,
    row_makers,
    save_and_show,
)
from vtprune.errors import VtpruneError

EPILOG = """\b
Examples:
  vtprune compare clip.mp4 "what moves?" --methods entropy,vtw --keep 0.5,0.3
  vtprune compare page.png "what is the total?" --presets balanced,document
  vtprune compare clip.mp4 "how many?" --methods entropy --save table.csv \\
    --save speed.png
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("inputs", nargs=-1, metavar="MEDIA... QUESTION")
@takes(
    *ROWS,
    "repeats",
    "no_measure",
    "evidence",
    *MODEL,
    *MEDIA,
    "system",
    "max_new_tokens",
    "json",
    "saves",
    "quiet",
    defaults={"keeps": ("0.5,0.3,0.1",)},
    default_words={
        "presets": "balanced, where no method is named",
        "max_new_tokens": str(MAX_NEW_TOKENS),
    },
    save=[*FULL_TEXT, ("the speed-ups drawn", CHARTS_TEXT)],
)
def compare(inputs: tuple[str, ...], flags: Flags) -> None:
    """Compare methods and presets on one question.

    The table has the unpruned model first, then every method and preset at every keep, and always
    the baselines random, uniform and downsample. Every row that cuts deeper than the input is
    followed by its matched baselines: random and uniform at the same layers and counts. Speed-ups
    are over the unpruned model, whose runs alternate with those of each row. MEDIA and QUESTION are
    as for `vtprune ask`.
    """
    from vtprune.cli.config import load_config

    began = click.get_current_context().obj or time.perf_counter()
    user = load_config()
    paths, questions = media_and_questions(
        inputs, (), flags.allow_url
    )  # before what takes seconds to import

    from vtprune.cli import output
    from vtprune.cli.console.comparison import show_comparison, show_notes

    listed = variants_from(flags, user)
    check_saves(flags.saves, SUFFIXES, paths)
    drawn = [path for path in flags.saves if path.suffix.lower() in CHARTS]
    if drawn and flags.no_measure:
        raise VtpruneError(
            f"--save {drawn[0]} and --no-measure exclude each other", "a chart draws speed-ups"
        )
    with output.importing(flags.quiet):
        from vtprune.evaluation.compare import run_comparison
        from vtprune.evaluation.comparison_chart import draw_speed
        from vtprune.models.loading import load

    limits = limits_from(flags)
    startup = time.perf_counter() - began
    with output.libraries_silenced():
        sources = open_media(paths, limits)  # what can't be read is an error before a long load
        with output.progress_line(flags.quiet) as show:
            result = run_comparison(
                load(**loading_from(flags, user), on_progress=show),
                sources,
                questions[0],
                listed,
                sampling=sampling_from(listed.media, flags),
                generation=generation_from(flags, user),
                limits=limits,
                repeats=0 if flags.no_measure else flags.repeats,
                since=began,
                startup=startup,
                evidence=flags.evidence,
                on_progress=show,
            )
        makers = row_makers(result, lambda kind: draw_speed(result, kind))
        save_and_show(result, flags, makers, show_comparison, show_notes)
    if all(row.error for row in result.rows if row.role == "asked"):
        raise VtpruneError("nothing of what was asked could be run", "each row says why")
