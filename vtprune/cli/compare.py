"""`vtprune compare`: several methods, one question, one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune.cli import complete
from vtprune.cli.flags import (
    MAX_NEW_TOKENS,
    Flags,
    check_ranges,
    limits_from,
    loading_from,
    media_and_questions,
    method_options,
    rows_asked,
    sampling_from,
)
from vtprune.cli.help import SectionedCommand, section
from vtprune.cli.options import media_options, model_options, row_options
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from vtprune.comparison import Comparison
    from vtprune.config import Config
    from vtprune.lineup import Lineup

EPILOG = """\b
Examples:
  vtprune compare clip.mp4 "what moves?" --methods entropy,vtw --keep 0.5,0.3
  vtprune compare page.png "what is the total?" --presets balanced,document
  vtprune compare clip.mp4 "how many?" --methods entropy --csv table.csv \\
    --plot speed.png
"""

_rows, _time = section("Rows"), section("Measuring")
_answer, _output = section("Answer"), section("Output")


# fmt: off
@click.command(cls=SectionedCommand, epilog=EPILOG)
@click.argument("inputs", nargs=-1, metavar="MEDIA... QUESTION")
@row_options
@_rows("-o", "option", multiple=True, metavar="KEY=VALUE", shell_complete=complete.complete_option,
       help="An option of all --methods that have it; repeatable.")
@_rows("--seed", type=int, metavar="N", help="Seed of all random choices.  [default: 0]")
@_time("--repeats", type=int, default=5, show_default=True, metavar="N",
       help="How often each row is timed, beside the unpruned model.")
@_time("--no-measure", is_flag=True, help="Answers and counts only, which is much faster.")
@model_options
@media_options
@_answer("--system", metavar="TEXT", help="System prompt.")
@_answer("--max-new-tokens", type=int, metavar="N", help=f"The longest answer.  "
         f"[default: {MAX_NEW_TOKENS}]")
@_output("--json", is_flag=True, help="Print one JSON object instead of the table.")
@_output("--csv", type=click.Path(path_type=Path), metavar="FILE",
         help="Write the table to FILE too, one line a row.")
@_output("--plot", type=click.Path(path_type=Path), metavar="FILE",
         help="Draw the speed-ups against what is kept to FILE, a PNG.")
@_output("--quiet", is_flag=True, help="Print the table only.")
def compare(
    inputs: tuple[str, ...],
    repeats: int,
    no_measure: bool,
    csv: Path | None,
    plot: Path | None,
    **values: object,
) -> None:
    """Compare methods and presets on one question.

    The table has the unpruned model first, then every method and preset at every keep, and always
    the baselines: random, uniform and downsample, and random and uniform again with the layers and
    counts of each row that cuts deeper than the input. Every row is timed beside the unpruned
    model. MEDIA and QUESTION are as for `vtprune ask`.
    """
    # fmt: on
    from vtprune.cli import output
    from vtprune.config import load_config
    from vtprune.console.comparison import show_comparison, show_notes

    flags = Flags(**values)  # type: ignore[arg-type]
    user = load_config()
    paths, questions = media_and_questions(inputs, ())
    check_ranges(flags)
    lineup = _line_up(flags, user)
    if repeats < 1:
        raise VtpruneError(f"--repeats {repeats} is out of range", "1 or more; 5 to rely on")
    if plot is not None and no_measure:
        raise VtpruneError("--plot and --no-measure exclude each other", "it draws speed-ups")
    output.check_picture(plot)
    output.check_targets({"--csv": csv, "--plot": plot}, paths)
    with output.libraries_silenced():
        found = _run(flags, user, paths, questions[0], lineup, 0 if no_measure else repeats)
        try:
            _save(found, csv, plot)
        finally:  # a file that can't be written costs no table, a reader who goes away no file
            output.show_tables(found.to_dict(), flags.json, flags.quiet, show_comparison,
                               show_notes)  # fmt: skip
    if all(row.error for row in found.rows if row.role == "asked"):
        raise VtpruneError("nothing of what was asked could be run", "each row says why")


def _save(found: Comparison, csv: Path | None, plot: Path | None) -> None:
    from vtprune.cli.output import save_file

    if csv is not None:
        save_file(csv, found.to_csv().encode(), "--csv")
    if plot is not None:
        from vtprune.speed_chart import draw_speed

        save_file(plot, draw_speed(found), "--plot")


def _line_up(flags: Flags, user: Config) -> Lineup:
    """The rows that are wanted.

    Raises:
        PresetError: every fault of them.
    """
    from vtprune.lineup import line_up

    options = method_options(flags.option)
    return line_up(*rows_asked(flags, user), at=flags.at, options=options, seed=flags.seed)


def _run(
    flags: Flags, user: Config, paths: list[str], question: str, lineup: Lineup, repeats: int
) -> Comparison:
    """Loads the model and runs every row."""
    from vtprune import contest, run
    from vtprune.cli.output import progress_line
    from vtprune.media import open_sources

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
            on_progress=show,
        )
