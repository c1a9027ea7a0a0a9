"""`vtprune ask`: media and questions in, answers and what they cost out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import click

from vtprune import __version__
from vtprune.cli.flags import (
    cache_from,
    generation_from,
    limits_from,
    loading_from,
    media_and_questions,
    open_media,
    preset_from,
    sampling_from,
)
from vtprune.cli.help import Command
from vtprune.cli.options import (
    CACHE,
    DECODE,
    MAX_NEW_TOKENS,
    MEDIA,
    MODEL,
    ONE_WAY,
    STREAM,
    Flags,
    takes,
)
from vtprune.cli.results import check_saves, json_file, to_json, write_saves
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from vtprune.inference.prompt_media import PromptMedia
    from vtprune.inference.report import Report
    from vtprune.media import Source
    from vtprune.preset import Preset

MINUTES = 10.0  # of a segment

EPILOG = """\b
Examples:
  vtprune ask clip.mp4 "what happens?" --keep 0.3
  vtprune ask page.png "what is the total?" --model qwen2.5-vl-7b --compare
  vtprune ask clip.mp4 -q "what moves?" -q "which colour is it?" --json
  vtprune ask clip.mp4 "how many?" --method entropy --at 2 -o norm=none
  echo "what is this?" | vtprune ask photo.jpg -
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("inputs", nargs=-1, metavar="MEDIA... QUESTION")
@takes(
    *ONE_WAY,
    *DECODE,
    *STREAM,
    "compare",
    *MODEL,
    *MEDIA,
    "segment",
    "per_segment",
    *CACHE,
    "question",
    "system",
    "max_new_tokens",
    "temperature",
    "top_p",
    "json",
    "saves",
    "shows",
    "quiet",
    default_words={"preset": "balanced", "max_new_tokens": str(MAX_NEW_TOKENS)},
    save=[("the report, of several questions a list", ".json"), ("one report a line", ".jsonl")],
)
@click.version_option(__version__, "-V", "--version", message="vtprune %(version)s")
def ask(inputs: tuple[str, ...], flags: Flags) -> None:
    """Answer a question about pictures or videos.

    MEDIA are files, or directories of numbered pictures, which are read as a video. The QUESTION -
    is read from standard input. The answer goes to standard output as it is produced, everything
    else to standard error.

    The config file (on Linux ~/.config/vtprune/config.yaml) can set {config_keys}.
    """
    from vtprune.cli import output
    from vtprune.cli.config import load_config

    began = click.get_current_context().obj or time.perf_counter()
    user = load_config()
    paths, questions = media_and_questions(inputs, flags.question, flags.allow_url)
    preset = preset_from(flags, user)
    check_saves(flags.saves, (".json", ".jsonl"), paths)
    _check_shows(flags, paths, questions)
    if flags.top_p < 1 and flags.temperature == 0:
        raise VtpruneError(
            f"--top-p {flags.top_p:g} changes nothing without --temperature: the likeliest token "
            "is always taken",
            "add --temperature 0.7, or leave --top-p out",
        )
    if flags.compare and flags.cache is not None:
        raise VtpruneError(
            "--compare and --cache exclude each other: a comparison measures the vision tower",
            "leave one of them out",
        )
    if flags.compare and preset.stream is not None:
        raise VtpruneError(
            "--compare and --stream exclude each other: an unpruned run holds all frames at once",
            "leave one of them out",
        )
    _check_segments(flags, paths)
    reports: list[Report] = []
    try:
        with output.libraries_silenced():
            for report in _answers(flags, user, preset, paths, questions, began):
                reports.append(report)
                _show(flags, report)
    finally:  # what was answered before a later question failed is saved too
        if reports and flags.saves:
            _save(flags, reports, several=len(questions) > 1 or flags.per_segment)


def _check_segments(flags: Flags, paths: list[str]) -> None:
    """Refuse segments of several files, and what is of one answer.

    Raises:
        VtpruneError: with the way out.
    """
    if not flags.per_segment:
        if flags.segment is not None:
            raise VtpruneError(
                "--segment changes nothing without --per-segment", "add --per-segment"
            )
        return
    if len(paths) > 1:
        raise VtpruneError(
            f"--per-segment is for one video, not {len(paths)} files", "ask about them one by one"
        )
    for given, option in ((flags.compare, "--compare"), (flags.shows, "--show")):
        if given:
            raise VtpruneError(
                f"{option} is for one answer, and --per-segment gives several",
                f"leave {option} out, or choose a part by --start and --end",
            )


def _check_shows(flags: Flags, paths: list[str], questions: list[str]) -> None:
    """Refuse drawings of several questions, and places and formats that are none.

    Raises:
        VtpruneError: as `check_saves`.
    """
    if not flags.shows:
        return
    from vtprune.pictures import FORMATS

    if len(questions) > 1:
        raise VtpruneError(
            f"--show draws one question, not {len(questions)}", "ask them one by one"
        )
    check_saves(flags.shows, FORMATS, [*paths, *flags.saves], option="--show")
    if {path.resolve() for path in flags.shows} & {path.resolve() for path in flags.saves}:
        raise VtpruneError("--show and --save name the same file", "give each a name of its own")


def _show(flags: Flags, report: Report) -> None:
    """Draw what was kept where --show says."""
    if flags.shows:
        from vtprune.pictures.drawing import draw

        drawing = draw(report, limits=limits_from(flags))
        list(write_saves(flags.shows, drawing.makers(), "--show"))


def _save(flags: Flags, reports: list[Report], several: bool) -> None:
    """Write the reports where --save says: one object, or of several questions a list."""
    values = [report.to_dict() for report in reports]
    makers = {
        ".json": lambda: json_file(values if several else values[0]),
        ".jsonl": lambda: "".join(to_json(report) + "\n" for report in values).encode(),
    }
    list(write_saves(flags.saves, makers))


def _answers(
    flags: Flags,
    user: Flags,
    preset: Preset,
    paths: list[str],
    questions: list[str],
    began: float,
) -> Iterator[Report]:
    """Load the model and yield the report of each question, shown as soon as it is answered.

    Args:
        began: when the command did.
    """
    from vtprune.cli.output import Transcript, importing

    with importing(flags.quiet):
        from vtprune.inference.answer_questions import answer_questions
        from vtprune.inference.prompt_media import load_with_media
        from vtprune.inference.time_segments import answer_by_segment
        from vtprune.models.loading import open_model

    startup = time.perf_counter() - began
    limits = limits_from(flags)
    sources = open_media(paths, limits)  # what can't be read is told before a long load
    generation = generation_from(flags, user, seed=preset.seed)
    with Transcript(len(questions), flags.json, flags.quiet) as transcript:
        opened = open_model(
            **loading_from(flags, user), **cache_from(flags), on_progress=transcript.progress
        )
        sampling = sampling_from(preset, flags)
        ask: Callable[..., Iterator[Report]]
        if flags.per_segment:
            minutes = MINUTES if flags.segment is None else flags.segment
            ask = partial(
                answer_by_segment, opened.load(), sources[0], questions, preset, minutes,
                on_segment=transcript.segment,
            )  # fmt: skip
        else:
            media: Sequence[Source] | PromptMedia = sources
            if flags.compare:  # what is measured has the machine to itself
                loaded = opened.load()
            else:
                loaded, media = load_with_media(
                    opened, sources, sampling, preset, limits, transcript.progress,
                    bool(flags.shows),
                )  # fmt: skip
            ask = partial(answer_questions, loaded, media, questions, preset, compare=flags.compare)
        for report in ask(
            sampling=sampling,
            generation=generation,
            limits=limits,
            since=began,
            startup=startup,
            on_text=transcript.text,
            on_question=transcript.question,
            on_progress=transcript.progress,
        ):
            transcript.report(report)
            yield report
