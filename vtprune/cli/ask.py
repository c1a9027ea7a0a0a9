"""`vtprune ask`: media and questions in, answers and what they cost out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune import __version__
from vtprune.cli import complete
from vtprune.cli.flags import (
    Flags,
    check_ranges,
    media_and_questions,
    preset_from,
    sampling_from,
)
from vtprune.cli.help import Option, SectionedCommand

if TYPE_CHECKING:
    from vtprune.config import Config
    from vtprune.preset import Preset
    from vtprune.report import Report

EMBEDDED = "embedded"  # the name of the model that ships with the package
MAX_NEW_TOKENS = 256

EPILOG = """\b
Examples:
  vtprune ask clip.mp4 "what happens?" --keep 0.3
  vtprune ask page.png "what is the total?" --model qwen2.5-vl-7b --compare
  vtprune ask clip.mp4 -q "what moves?" -q "which colour is it?" --json
  vtprune ask clip.mp4 "how many?" --method entropy --at 2 -o norm=none
  echo "what is this?" | vtprune ask photo.jpg -
"""

_model = partial(click.option, cls=Option, section="Model")
_pruning = partial(click.option, cls=Option, section="Pruning")
_media = partial(click.option, cls=Option, section="Media")
_answer = partial(click.option, cls=Option, section="Answer")
_output = partial(click.option, cls=Option, section="Output")


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
          help="Where --method cuts: input, ecl, horizon, a layer number or a depth such as 60%.")
@_pruning("-o", "option", multiple=True, metavar="KEY=VALUE",
          shell_complete=complete.complete_option, help="An option of the method; repeatable.")
@_pruning("--seed", type=int, metavar="N", help="Seed of all random choices.  [default: 0]")
@_pruning("--compare", is_flag=True, help="Run without pruning too, and measure the speed-up.")
@_model("--model", metavar="NAME", shell_complete=complete.complete_model,
        help="Short name (vtprune models), hub id or directory.  [default: embedded, a small "
        "demonstration model]")
@_model("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, or map: spread over all "
        "there are.  [default: auto]")
@_model("--quantize", metavar="BITS", help="4bit or 8bit, by bitsandbytes.")
@_model("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16.  [default: auto]")
@_model("--attention", metavar="NAME", help="Attention kernel, by transformers' name: sdpa, eager, "
        "flash_attention_2.")
@_model("--calibration", type=click.Path(path_type=Path), metavar="FILE",
        help="Where ecl and horizon are in this model.")
@_model("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings.")
@_media("--frames", type=int, metavar="N", help="Frames of a video, evenly from first to last.  "
        "[default: the model's own sampling]")
@_media("--fps", type=float, metavar="RATE", help="Frames a second instead.")
@_media("--max-frames", type=int, metavar="N", help="The most frames.")
@_media("--start", type=float, metavar="SECONDS", help="Where to start in a video.")
@_media("--end", type=float, metavar="SECONDS", help="Where to end.")
@_media("--max-tiles", type=int, metavar="N", help="The most tiles of a picture.")
@_media("--max-pixels", type=int, metavar="N", help="The largest picture that is read, width x "
        "height.  [default: 178956970]")
@_media("--allow-partial", is_flag=True, help="Read what decodes of a damaged file.")
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
    if flags.save is not None:
        output.check_target(flags.save)
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
    from vtprune.media import Limits, open_sources

    limits = Limits(allow_partial=flags.allow_partial)
    if flags.max_pixels is not None:
        limits = replace(limits, max_pixels=flags.max_pixels)
    sources = open_sources(paths, limits)  # what can't be read is told before a long load
    generation = run.Generation(
        max_new_tokens=flags.max_new_tokens or user.max_new_tokens or MAX_NEW_TOKENS,
        temperature=flags.temperature,
        top_p=flags.top_p,
        system=flags.system if flags.system is not None else user.system or "",
        seed=preset.seed,
    )
    with Transcript(len(questions), flags.json, flags.quiet) as transcript:
        loaded = run.load(
            _model_name(flags.model or user.model),
            device=flags.device or user.device or "auto",
            dtype=flags.dtype or user.dtype or "auto",
            attention=flags.attention or user.attention,
            quantize=flags.quantize,
            calibration=flags.calibration,
            trust_remote_code=flags.trust_remote_code,
            on_progress=transcript.progress,
        )
        for report in run.ask(
            loaded,
            sources,
            questions,
            preset,
            sampling=sampling_from(preset, flags),
            generation=generation,
            limits=limits,
            compare=flags.compare,
            on_text=transcript.text,
            on_question=transcript.question,
            on_progress=transcript.progress,
        ):
            transcript.report(report)
            yield report


def _model_name(name: str | None) -> str | None:
    return None if name == EMBEDDED else name
