"""`vtprune compare`: several methods, one question, one table."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from vtprune.cli.flags import (
    limits_from,
    loading_from,
    media_and_questions,
    method_options,
    rows_asked,
    sampling_from,
)
from vtprune.cli.help import Command
from vtprune.cli.options import MAX_NEW_TOKENS, MEDIA, MODEL, ROWS, Flags, takes
from vtprune.cli.results import (
    CHARTS,
    SUFFIXES,
    Makers,
    charts,
    check_saves,
    json_file,
    write_saves,
)
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from vtprune.evaluation.variants import VariantList
    from vtprune.inference.comparison import Comparison

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
    save=[("everything", ".json"), ("the rows", ".csv"), ("the speed-ups drawn", ".png or .svg")],
)
def compare(inputs: tuple[str, ...], flags: Flags) -> None:
    """Compare methods and presets on one question.

    The table has the unpruned model first, then every method and preset at every keep, and always
    the baselines: random, uniform and downsample, and random and uniform again with the layers and
    counts of each row that cuts deeper than the input. Every row is timed beside the unpruned
    model. MEDIA and QUESTION are as for `vtprune ask`.
    """
    from vtprune.cli import output
    from vtprune.cli.config import load_config
    from vtprune.cli.console.comparison import show_comparison, show_notes

    began = click.get_current_context().obj or time.perf_counter()
    user = load_config()
    paths, questions = media_and_questions(inputs, ())
    lineup = _list_variants(flags, user)
    check_saves(flags.saves, SUFFIXES, paths)
    drawn = [path for path in flags.saves if path.suffix.lower() in CHARTS]
    if drawn and flags.no_measure:
        raise VtpruneError(
            f"--save {drawn[0]} and --no-measure exclude each other", "a chart draws speed-ups"
        )
    with output.libraries_silenced():
        repeats = 0 if flags.no_measure else flags.repeats
        found = _run(flags, user, paths, questions[0], lineup, repeats, began)
        try:
            list(write_saves(flags.saves, _makers(found)))
        finally:  # a file that can't be written costs no table, a reader who goes away no file
            output.show_tables(found.to_dict(), flags.json, flags.quiet, show_comparison,
                               show_notes)  # fmt: skip
    if all(row.error for row in found.rows if row.role == "asked"):
        raise VtpruneError("nothing of what was asked could be run", "each row says why")


def _makers(found: Comparison) -> Makers:
    def draw(kind: str) -> bytes:
        from vtprune.pictures.speed_chart import draw_speed

        return draw_speed(found, kind)

    return {
        ".json": lambda: json_file(found.to_dict()),
        ".csv": lambda: found.to_csv().encode(),
        **charts(draw),
    }


def _list_variants(flags: Flags, user: Flags) -> VariantList:
    """The rows that are wanted.

    Raises:
        PresetError: every fault of them.
    """
    from vtprune.evaluation.variants import list_variants

    options = method_options(flags.option)
    return list_variants(*rows_asked(flags, user), at=flags.at, options=options, seed=flags.seed)


def _run(
    flags: Flags,
    user: Flags,
    paths: list[str],
    question: str,
    lineup: VariantList,
    repeats: int,
    began: float,
) -> Comparison:
    """Loads the model and runs every row.

    Args:
        began: when the command did.
    """
    from vtprune.cli.output import progress_line
    from vtprune.evaluation import contest
    from vtprune.inference import run
    from vtprune.media import open_sources

    startup = time.perf_counter() - began
    limits = limits_from(flags)
    sources = open_sources(paths, limits)  # what can't be read is told before a long load
    system = flags.system if flags.system is not None else user.system or ""
    longest = flags.max_new_tokens or user.max_new_tokens or MAX_NEW_TOKENS
    with progress_line(flags.quiet) as show:
        return contest.run_lineup(
            run.load(**loading_from(flags, user), on_progress=show),
            sources,
            question,
            lineup,
            sampling=sampling_from(lineup.media, flags),
            generation=run.Generation(longest, system=system),
            limits=limits,
            repeats=repeats,
            since=began,
            startup=startup,
            on_progress=show,
        )
