"""`vtprune explain`: what an answer rests on, as a table, a picture, a page, or JSON."""

from __future__ import annotations

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
from vtprune.cli.options import MAX_NEW_TOKENS, MEDIA, MODEL, ONE_WAY, Flags, takes
from vtprune.cli.results import TABLES, TABLES_TEXT, check_saves, table_makers, to_json
from vtprune.errors import VtpruneError
from vtprune.pictures import FORMATS

if TYPE_CHECKING:
    from vtprune.inference.evidence import MapSettings
    from vtprune.inference.evidence.explanation import Explanation
    from vtprune.pictures.evidence import EvidenceDrawing
    from vtprune.preset import Preset

EPILOG = """\b
Examples:
  vtprune explain clip.mp4 "what happens?" --save evidence.html
  vtprune explain page.png "what is the total?" --by occlusion --passes 400
  vtprune explain clip.mp4 "what moves?" --method entropy --keep 0.3
  vtprune explain clip.mp4 "what moves?" --by information --from-layer 8
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("inputs", nargs=-1, metavar="MEDIA... QUESTION")
@takes(
    "by",
    "passes",
    "window",
    "stride",
    "from_layer",
    *ONE_WAY,
    *MODEL,
    *MEDIA,
    "system",
    "max_new_tokens",
    "json",
    "saves",
    "all_frames",
    "terminal",
    "quiet",
    default_words={"preset": "no pruning", "max_new_tokens": str(MAX_NEW_TOKENS)},
    save=[
        ("the frames or pictures, what carries the answer lit", ".png"),
        ("a page with a map for each part of the answer", ".html"),
        ("places and shares of all visual tokens", ".json"),
        TABLES_TEXT,
    ],
)
@click.version_option(__version__, "-V", "--version", message="vtprune %(version)s")
def explain(inputs: tuple[str, ...], flags: Flags) -> None:
    """Show which places carry the answer.

    Answers the QUESTION as vtprune ask does, greedily and without pruning, then asks the frozen
    model again with visual tokens exchanged, masked or left out. A long answer gets a map for each
    sentence or event. With pruning options the pruned model is explained too, and the evidence
    kept is the share of the unpruned answer's evidence that lies on kept tokens.
    """
    from vtprune.cli.config import load_config
    from vtprune.inference.evidence import MapSettings

    user = load_config()
    paths, questions = media_and_questions(inputs, (), flags.allow_url)
    settings = MapSettings(flags.by, flags.passes, flags.window, flags.stride, flags.from_layer)
    preset = _preset(flags, user)
    check_saves(flags.saves, (*FORMATS, *TABLES), paths)  # all that comes before is without torch

    from vtprune.cli import output
    from vtprune.cli.console.evidence import show_explanation

    with output.importing(flags.quiet):
        from vtprune.pictures.evidence import EvidenceDrawing

    with output.libraries_silenced():
        explanation = _explain(flags, user, settings, preset, paths, questions[0])
        drawing = EvidenceDrawing(explanation, limits_from(flags), flags.all_frames)
        _print(flags, explanation, drawing)
        tables = table_makers(lambda console: show_explanation(explanation, console))
        write_files(flags, {**tables, **drawing.makers()})


def _preset(flags: Flags, user: Flags) -> Preset | None:
    """Return how to prune; None where no option asks for it."""
    budget = flags.keep or flags.tokens or flags.tokens_after or flags.fit
    if not any((budget, flags.preset, flags.method, flags.at, flags.option)):
        if flags.seed is not None:
            raise VtpruneError(
                "--seed changes nothing without pruning", "give --method, --preset or --keep too"
            )
        return None
    return preset_from(flags, user)


def _explain(
    flags: Flags,
    user: Flags,
    settings: MapSettings,
    preset: Preset | None,
    paths: list[str],
    question: str,
) -> Explanation:
    """Load the model, read the media, answer and explain."""
    from vtprune.cli.output import progress_line
    from vtprune.inference.evidence.ask import UNPRUNED
    from vtprune.inference.evidence.explain import explain_answer

    with progress_line(flags.quiet) as progress:
        draws = flags.terminal or bool(flags.saves)
        loaded, media = load_to_draw(flags, user, preset or UNPRUNED, paths, progress, draws)
        return explain_answer(
            loaded,
            media,
            question,
            settings,
            preset,
            sampling=sampling_from(preset or UNPRUNED, flags),
            generation=generation_from(flags, user),
            limits=limits_from(flags),
            on_progress=progress,
        )


def _print(flags: Flags, explanation: Explanation, drawing: EvidenceDrawing) -> None:
    """Print the JSON; or the answer, the miniature and the tables."""
    from vtprune.cli.console import printable, stderr_console
    from vtprune.cli.console.evidence import show_explanation

    if flags.json:
        click.echo(to_json(explanation.to_dict()))
        return
    click.echo(printable(explanation.answer))
    if flags.terminal:
        click.echo(printable(drawing.miniature()))
    if not flags.quiet:
        show_explanation(explanation, stderr_console())
