"""`vtprune show`: which visual tokens were kept, as a picture, a page, or JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from vtprune import __version__
from vtprune.cli.drawing import load_to_draw, write_files
from vtprune.cli.flags import (
    generation_from,
    limits_from,
    media_and_questions,
    preset_from,
    sampling_from,
)
from vtprune.cli.help import Command
from vtprune.cli.options import DECODE, MAX_NEW_TOKENS, MEDIA, MODEL, ONE_WAY, Flags, takes
from vtprune.cli.results import check_saves, to_json
from vtprune.errors import VtpruneError, brief
from vtprune.pictures import FORMATS

if TYPE_CHECKING:
    from vtprune.inference.report import Report
    from vtprune.pictures.drawing import Drawing
    from vtprune.preset import Preset

EPILOG = """\b
Examples:
  vtprune show clip.mp4 "what happens?" --keep 0.3 --save kept.png
  vtprune show page.png "what is it?" --preset document --save kept.html
  vtprune show clip.mp4 "how many?" --methods entropy,random --save kept.html
  vtprune show page.png "what is it?" --presets document,fast --save kept.html
  vtprune show clip.mp4 "what moves?" --json
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("inputs", nargs=-1, metavar="MEDIA... QUESTION")
@takes(
    *ONE_WAY,
    *DECODE,
    "methods",
    "presets",
    *MODEL,
    *MEDIA,
    "system",
    "max_new_tokens",
    "json",
    "saves",
    "all_frames",
    "terminal",
    "quiet",
    default_words={"preset": "balanced", "max_new_tokens": str(MAX_NEW_TOKENS)},
    save=[
        ("the frames or pictures, kept tokens clear", ".png"),
        ("a page with a slider over the layers", ".html"),
        ("places and fates of all visual tokens", ".json"),
    ],
)
@click.version_option(__version__, "-V", "--version", message="vtprune %(version)s")
def show(inputs: tuple[str, ...], flags: Flags) -> None:
    """Draw which visual tokens were kept.

    Answers the QUESTION about MEDIA as vtprune ask does. The answer goes to standard output, then a
    miniature where no --save names a file, or with --terminal; --json prints the place and fate of
    every visual token in their stead.
    """
    from vtprune.cli.config import load_config

    user = load_config()
    paths, questions = media_and_questions(inputs, (), flags.allow_url)
    presets = _presets(flags, user)
    check_saves(flags.saves, FORMATS, paths)  # all that comes before is without torch

    from vtprune.cli import output
    from vtprune.pictures.drawing import draw

    with output.libraries_silenced():
        reports = _reports(flags, user, presets, paths, questions[0])
        drawing = draw(reports, limits=limits_from(flags), all_frames=flags.all_frames)
        _print(flags, drawing, reports)
        write_files(flags, drawing.makers())


def _presets(flags: Flags, user: Flags) -> list[Preset]:
    """Return the ways to prune: one, or one for each of --methods and --presets.

    Raises:
        VtpruneError: options of one way beside those of many.
    """
    if not (flags.methods or flags.presets):
        return [preset_from(flags, user)]
    many = "--methods" if flags.methods else "--presets"
    single = (("--method", flags.method), ("--preset", flags.presets and flags.preset),
              ("-o", flags.option))  # fmt: skip
    for name, value in single:
        if value:
            raise VtpruneError(
                f"{name} and {many} exclude each other",
                "give --preset, --method and -o for one way to prune",
            )
    for what, names in (("method", flags.methods), ("preset", flags.presets)):
        for name, times in Counter(names).items():
            if times > 1:
                message = f"{what} {brief(name)} is named {times} times"
                raise VtpruneError(message, "once is enough")
    by_method = [preset_from(replace(flags, method=method), user) for method in flags.methods]
    return by_method + [preset_from(replace(flags, preset=name), user) for name in flags.presets]


def _reports(
    flags: Flags, user: Flags, presets: list[Preset], paths: list[str], question: str
) -> list[Report]:
    """Load the model once, and answer under every preset."""
    from vtprune.cli.output import importing, progress_line

    with importing(flags.quiet):
        from vtprune.inference.answer_questions import answer_questions

    reports: list[Report] = []
    with progress_line(flags.quiet) as progress:
        loaded, media = load_to_draw(flags, user, presets[0], paths, progress)
        for number, preset in enumerate(presets):
            progress("answering", number, len(presets))
            reports += answer_questions(
                loaded,
                media.sources if number else media,
                [question],
                preset,
                sampling=sampling_from(preset, flags),
                generation=generation_from(flags, user, seed=preset.seed),
                limits=limits_from(flags),
            )
    return reports


def _print(flags: Flags, drawing: Drawing, reports: list[Report]) -> None:
    """Print the JSON; or the answers, the counts and the miniature."""
    from vtprune.cli.console import printable
    from vtprune.inference.wording import name_sources

    if flags.json:
        click.echo(to_json(drawing.to_dict()))
        return
    for run, report in zip(drawing.runs, reports, strict=True):
        head = f"{method_or_preset(report)}: " if len(reports) > 1 else ""
        click.echo(printable(head + report.answer))
        if flags.terminal or not flags.saves:
            from vtprune.pictures.miniature import draw_miniature

            click.echo(printable(draw_miniature(drawing, run)))
        if not flags.quiet:
            for number in range(len(run.stages)):
                click.echo(f"kept      {printable(head + run.stage_title(number))}", err=True)
    if not flags.quiet:
        for warning in name_sources([(method_or_preset(r), r.warnings) for r in reports]):
            click.echo(f"warning   {printable(warning)}", err=True)


def method_or_preset(report: Report) -> str:
    """Return the name of the method or preset that pruned a run."""
    return str(report.preset.method or report.preset.name)
