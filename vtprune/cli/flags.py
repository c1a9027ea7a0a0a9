"""The options of one `ask`, checked, and what follows from them."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click

from vtprune.errors import VtpruneError, brief, quote
from vtprune.inference.questions_file import LONGEST_QUESTION, check_length

if TYPE_CHECKING:
    from vtprune.cli.config import Config
    from vtprune.media import Limits
    from vtprune.models.base import Sampling
    from vtprune.preset import Preset

EMBEDDED = "embedded"  # the name of the model that ships with the package
MAX_NEW_TOKENS = 256

RANGES = (
    ("frames", 1, math.inf),
    ("max_frames", 1, math.inf),
    ("max_tiles", 0, math.inf),
    ("max_pixels", 1, math.inf),
    ("dpi", 10, 1200),
    ("max_new_tokens", 1, math.inf),
    ("seed", 0, 2**63 - 1),
)
"""Whole numbers: option, least and greatest value."""


@dataclass(frozen=True)
class Flags:
    """What the user gave; None where nothing. A command sets those that it has."""

    model: str | None = None
    adapter: str | None = None
    device: str | None = None
    dtype: str | None = None
    attention: str | None = None
    quantize: str | None = None
    calibration: Path | None = None
    trust_remote_code: bool = False
    preset: str | None = None
    keep: str | None = None
    method: str | None = None
    keeps: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    at: str | None = None
    option: tuple[str, ...] = ()
    seed: int | None = None
    frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    start: float | None = None
    end: float | None = None
    max_tiles: int | None = None
    max_pixels: int | None = None
    allow_partial: bool = False
    decoder: str | None = None
    pages: str | None = None
    dpi: int | None = None
    question: tuple[str, ...] = ()
    system: str | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    compare: bool = False
    json: bool = False
    saves: tuple[Path, ...] = ()
    quiet: bool = False


def check_ranges(flags: Flags) -> None:
    """Refuses numbers out of range, options of no method, and options that exclude each other.

    Raises:
        VtpruneError: names the option, the value and the range.
    """
    method_options(flags.option)
    for name, low, high in RANGES:
        check_number(name, getattr(flags, name), low, high)
    if flags.fps is not None and not 0 < flags.fps < math.inf:
        raise _out_of_range("fps", flags.fps, "frames a second, above 0")
    if not 0 < flags.top_p <= 1:
        raise _out_of_range("top_p", flags.top_p, "above 0, up to 1; 1 leaves no token out")
    if not 0 <= flags.temperature < math.inf:
        raise _out_of_range("temperature", flags.temperature, "0 is greedy; 0.7 is usual else")
    if flags.frames is not None and flags.fps is not None:
        raise VtpruneError("--frames and --fps exclude each other", "give one of them")
    if fault := check_length(flags.system, "system prompt"):
        raise VtpruneError(fault, "give --system a shorter text")
    if flags.quiet and flags.json:
        raise VtpruneError("--quiet and --json exclude each other", "--json prints the report only")


def check_number(name: str, value: int | None, low: int, high: float = math.inf) -> None:
    """Refuses a whole number out of range.

    Raises:
        VtpruneError: names the option, the value and the range.
    """
    if value is not None and not low <= value <= high:
        rule = f"{low} or more" if high == math.inf else f"from {low} to {high}"
        raise _out_of_range(name, value, f"a whole number, {rule}")


def _out_of_range(name: str, value: float, rule: str) -> VtpruneError:
    return VtpruneError(f"--{name.replace('_', '-')} {quote(value)} is out of range", rule)


def media_and_questions(inputs: Sequence[str], asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """The media files, and the questions, of which "-" is read from standard input.

    Args:
        inputs: the positional arguments; the last is the question where `asked` is empty.
        asked: the questions given as options.

    Raises:
        click.UsageError: media or question are missing.
        VtpruneError: an empty question, or one that is a file.
    """
    from vtprune.media import file_name

    paths, questions = list(inputs), list(asked)
    if not questions and paths:
        questions = [paths.pop()]
        if paths and os.path.isfile(questions[0]):
            raise VtpruneError(
                f"the question {quote(questions[0])} is a file",
                "the question comes last: vtprune ask MEDIA... QUESTION",
            )
    if not paths:
        missing = "MEDIA" if asked else "QUESTION" if inputs else "MEDIA... QUESTION"
        raise click.UsageError(f"Missing argument '{missing}'.", click.get_current_context())
    return list(map(file_name, paths)), [read_question(question) for question in questions]


def read_question(question: str) -> str:
    """A question as it was given; "-" is read from standard input.

    Raises:
        VtpruneError: it is empty, or too long.
    """
    if question == "-":
        question = sys.stdin.read(LONGEST_QUESTION + 1)
        if not question.strip():
            raise VtpruneError(
                "the question from standard input is empty", "echo 'what happens?' | vtprune ... -"
            )
    if not question.strip():
        raise VtpruneError("the question is empty", "ask something")
    if fault := check_length(question):
        raise VtpruneError(fault, "ask a shorter question; a file's text is no question")
    # What a shell passes on may be no valid text; no tokenizer takes that.
    return question.strip().encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def method_options(pairs: Sequence[str]) -> dict[str, str]:
    """The `-o KEY=VALUE` options by key.

    Raises:
        VtpruneError: one has no "=", or a key is there twice.
    """
    options: dict[str, str] = {}
    for pair in pairs:
        key, _, value = (part.strip() for part in pair.partition("="))
        if not (key and value):
            raise VtpruneError(
                f"-o {brief(pair)} is not KEY=VALUE",
                "-o is an option of the method, such as -o norm=none; --save FILE writes the "
                "result",
            )
        if key in options:
            raise VtpruneError(
                f"-o {brief(key)} is given twice: {brief(options[key])} and {brief(value)}",
                "give it once",
            )
        options[key] = value
    return options


def rows_asked(flags: Flags, user: Config) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """The methods, keeps and presets of a table; the user's preset where none is named.

    Raises:
        VtpruneError: a place without methods that could cut there.
    """
    from vtprune.preset import DEFAULT

    presets = flags.presets
    if not (flags.methods or presets):
        presets = (user.preset or DEFAULT,)
    check_at(flags)
    return flags.methods, flags.keeps, presets


def check_at(flags: Flags) -> None:
    """Refuses a place without methods that could cut there."""
    if flags.at is not None and not flags.methods:
        raise VtpruneError("--at without --methods", "name the methods that should cut there")


def preset_from(flags: Flags, user: Config) -> Preset:
    """The user's preset under the flags.

    Raises:
        PresetError: it can't be read, or a flag does not fit it.
    """
    from vtprune.preset import load_preset, override

    return override(
        load_preset(flags.preset or user.preset),
        keep=flags.keep,
        method=flags.method,
        at=flags.at,
        options=method_options(flags.option),
        seed=flags.seed,
    )


class Loading(TypedDict):
    """The options of `run.load`."""

    name: str | None
    adapter: str | None
    device: str
    dtype: str
    attention: str | None
    quantize: str | None
    calibration: Path | None
    trust_remote_code: bool


def loading_from(flags: Flags, user: Config) -> Loading:
    """What `run.load` is told: the flags, over the user's config file."""
    name = flags.model if flags.adapter else flags.model or user.model
    return {
        "name": None if name == EMBEDDED and not flags.adapter else name,
        "adapter": flags.adapter,
        "device": flags.device or user.device or "auto",
        "dtype": flags.dtype or user.dtype or "auto",
        "attention": flags.attention or user.attention,
        "quantize": flags.quantize,
        "calibration": flags.calibration,
        "trust_remote_code": flags.trust_remote_code,
    }


def limits_from(flags: Flags) -> Limits:
    """What is read of media files: how large they may be, whether damaged, which pages.

    Raises:
        MediaError: --pages in a form that can't be read.
    """
    from vtprune.media import Limits

    limits = Limits(
        allow_partial=flags.allow_partial, pages=flags.pages, decoder=flags.decoder or "auto"
    )
    return replace(
        limits, max_pixels=flags.max_pixels or limits.max_pixels, dpi=flags.dpi or limits.dpi
    )


def sampling_from(preset: Preset, flags: Flags) -> Sampling:
    """How much of the media is looked at: the preset's word, under the flags.

    A flag's frames replace a preset's fps and cap, a flag's fps the preset's frames.
    """
    from vtprune.models.base import Sampling

    video = preset.video
    frames, fps, max_frames = video.frames, video.fps, video.max_frames
    if flags.frames is not None:
        frames, fps, max_frames = flags.frames, None, None
    elif flags.fps is not None:
        frames, fps = None, flags.fps
    return Sampling(
        frames=frames,
        fps=fps,
        max_frames=max_frames if flags.max_frames is None else flags.max_frames,
        start=flags.start,
        end=flags.end,
        max_tiles=preset.image.max_tiles if flags.max_tiles is None else flags.max_tiles,
    )
