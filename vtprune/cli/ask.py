"""`vtprune ask`: media and questions in, answers and what they cost out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune import __version__
from vtprune.cli import complete
from vtprune.cli.flags import (
    MAX_NEW_TOKENS,
    Flags,
    check_ranges,
    limits_from,
    loading_from,
    media_and_questions,
    preset_from,
    sampling_from,
)
from vtprune.cli.help import Option, SectionedCommand, section
from vtprune.cli.options import media_options, model_options

if TYPE_CHECKING:
    from vtprune.config import Config
    from vtprune.gathering import Gathered
    from vtprune.media import Source
    from vtprune.preset import Preset
    from vtprune.report import Report

EPILOG = """\b
Examples:
  vtprune ask clip.mp4 "what happens?" --keep 0.3
  vtprune ask page.png "what is the total?" --model qwen2.5-vl-7b --compare
  vtprune ask clip.mp4 -q "what moves?" -q "which colour is it?" --json
  vtprune ask clip.mp4 "how many?" --method entropy --at 2 -o norm=none
  echo "what is this?" | vtprune ask photo.jpg -
"""

_pruning, _answer, _output = section("Pruning"), section("Answer"), section("Output")


# fmt: off
@click.command(cls=SectionedCommand, epilog=EPILOG)
@click.argument("inputs", nargs=-1, metavar="MEDIA... QUESTION")
@_pruning("--keep", metavar="FRACTION", help="Kept fraction of the visual tokens, averaged over "
          "the decoder's layers: 0.3, or image=0.5,video=0.2.")
@_pruning("--preset", metavar="NAME", shell_complete=complete.complete_preset,
          help="A packaged preset or a file.  [default: balanced]")
@_pruning("--method", metavar="NAME", shell_complete=complete.complete_method,
          help="One method in place of the preset's stages.")
@_pruning("--at", metavar="PLACE", shell_complete=complete.complete_place,
          help="Where --method cuts: pixels, input, ecl, horizon, a layer number or a depth such "
          "as 60%.")
@_pruning("-o", "option", multiple=True, metavar="KEY=VALUE",
          shell_complete=complete.complete_option, help="An option of the method; repeatable.")
@_pruning("--seed", type=int, metavar="N", help="Seed of all random choices.  [default: 0]")
@_pruning("--compare", is_flag=True, help="Run without pruning too, and measure the speed-up.")
@model_options
@media_options
@_answer("-q", "--question", multiple=True, metavar="TEXT", help="A question; repeatable. Every "
         "positional argument is then media, and is encoded once.")
@_answer("--system", metavar="TEXT", help="System prompt.")
@_answer("--max-new-tokens", type=int, metavar="N", help=f"The longest answer.  "
         f"[default: {MAX_NEW_TOKENS}]")
@_answer("--temperature", type=float, default=0.0, metavar="T",
         help="Above 0: sample the answer.  [default: 0]")
@_answer("--top-p", type=float, default=1.0, metavar="P", help="Sample from the likeliest tokens "
         "that make up P.  [default: 1]")
@_output("--json", is_flag=True, help="Print the report as JSON instead of the answer, one line a "
         "question.")
@_output("--save", type=click.Path(path_type=Path), metavar="FILE",
         help="Write the report as JSON to FILE too.")
@_output("--quiet", is_flag=True, help="Print the answer only.")
@click.version_option(
    __version__, "-V", "--version", message="vtprune %(version)s", cls=Option, section="Other"
)
def ask(inputs: tuple[str, ...], **values: object) -> None:
    """Answer a question about pictures or videos.

    MEDIA are files, or directories of numbered pictures, which are read as a video. The QUESTION -
    is read from standard input. The answer goes to standard output as it is produced, everything
    else to standard error.

    The config file (on Linux ~/.config/vtprune/config.yaml) can set model, preset, device, dtype,
    attention, system and max_new_tokens.
    """
    from vtprune.cli import output
    from vtprune.config import load_config

    flags = Flags(**values)  # type: ignore[arg-type]
    user = load_config()
    paths, questions = media_and_questions(inputs, flags.question)
    check_ranges(flags)
    preset = preset_from(flags, user)
    output.check_targets({"--save": flags.save}, paths)
    with output.libraries_silenced():
        reports = [
            report.to_dict() for report in _answers(flags, user, preset, paths, questions)
        ]
    if flags.save is not None:
        output.save_reports(flags.save, reports)
# fmt: on


def _answers(
    flags: Flags, user: Config, preset: Preset, paths: list[str], questions: list[str]
) -> Iterator[Report]:
    """Loads the model and answers one question after the other, each shown as it is done."""
    from vtprune import run
    from vtprune.cli.output import Transcript
    from vtprune.media import open_sources

    limits = limits_from(flags)
    sources = open_sources(paths, limits)  # what can't be read is told before a long load
    generation = run.Generation(
        max_new_tokens=flags.max_new_tokens or user.max_new_tokens or MAX_NEW_TOKENS,
        temperature=flags.temperature,
        top_p=flags.top_p,
        system=flags.system if flags.system is not None else user.system or "",
        seed=preset.seed,
    )
    with Transcript(len(questions), flags.json, flags.quiet) as transcript:
        opened = run.open_model(**loading_from(flags, user), on_progress=transcript.progress)
        sampling = sampling_from(preset, flags)
        media: Sequence[Source] | Gathered = sources
        if flags.compare:  # what is measured has the machine to itself
            loaded = opened.load()
        else:
            loaded, (media,) = run.load_and_gather(
                opened, [sources], sampling, preset, limits, transcript.progress
            )
        for report in run.ask(
            loaded,
            media,
            questions,
            preset,
            sampling=sampling,
            generation=generation,
            limits=limits,
            compare=flags.compare,
            on_text=transcript.text,
            on_question=transcript.question,
            on_progress=transcript.progress,
        ):
            transcript.report(report)
            yield report
