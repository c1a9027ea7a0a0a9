"""From the options of a command to its preset, model, media and questions."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click

from vtprune.cli.options import MAX_NEW_TOKENS, Flags, method_options
from vtprune.errors import VtpruneError, quote
from vtprune.models import EMBEDDED

if TYPE_CHECKING:
    from vtprune.inference.generate import Generation
    from vtprune.media import Limits, Source
    from vtprune.models.base import Sampling
    from vtprune.preset import Preset

STDIN = "-"  # as a medium or a question: what standard input holds


def media_and_questions(
    inputs: Sequence[str], asked: Sequence[str], hosts: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Return the media files and the questions; the question "-" is read from standard input.

    Args:
        inputs: the positional arguments; the last is the question where `asked` is empty.
        asked: the questions given as options.
        hosts: of --allow-url.

    Raises:
        click.UsageError: media or question are missing.
        VtpruneError: an empty question, or one that is a file.
    """
    from vtprune.media import file_name
    from vtprune.media.addresses import ADDRESS
    from vtprune.media.source import local_path

    paths, questions = list(inputs), list(asked)
    if [*paths, *questions].count(STDIN) > 1:
        raise VtpruneError(
            "- is given twice, and standard input is read once",
            "give - for one picture or video, or for the question",
        )
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
    files = list(map(file_name, paths))
    local = [file for file in files if file != STDIN and not ADDRESS.match(file)]
    for file in filter(ADDRESS.match, files):
        check_address(file, hosts)
    for file in local:
        local_path(file)  # what can't be read is refused before torch is imported
    from vtprune.media import check_file  # readers take a tenth of a second to import

    for file in local:
        check_file(file)
    return files, [read_question(question) for question in questions]


def check_address(address: str, hosts: Sequence[str]) -> None:
    """Refuse an http or https address whose host --allow-url does not name.

    Raises:
        MediaError: with the way out.
    """
    from vtprune.media.addresses import allowed_host
    from vtprune.media.source import local_path

    if hosts:
        allowed_host(address, [host.lower() for host in hosts])
    else:
        local_path(address)


def open_media(paths: Sequence[str], limits: Limits) -> list[Source]:
    """Open media files; "-" is what standard input holds.

    Raises:
        MediaError: one can't be read.
    """
    from vtprune.media import Stored, open_sources

    piped = Stored("standard input", lambda: sys.stdin.buffer.read(limits.max_bytes + 1))
    return open_sources([piped if path == STDIN else path for path in paths], limits)


def read_question(question: str) -> str:
    """Return a question as it was given; "-" is read from standard input.

    Raises:
        VtpruneError: it is empty, or too long.
    """
    from vtprune.inference.questions_file import LONGEST_QUESTION, check_length

    if question == STDIN:
        question = sys.stdin.read(LONGEST_QUESTION + 1)
        if not question.strip():
            raise VtpruneError(
                "the question from standard input is empty", "echo 'what happens?' | vtprune ... -"
            )
    if not question.strip():
        raise VtpruneError(
            "the question is empty", 'write the question in quotation marks: "what happens?"'
        )
    if fault := check_length(question):
        raise VtpruneError(fault, "ask a shorter question; describe the file instead of pasting it")
    # What a shell passes on may be no valid text; no tokenizer takes that.
    return question.strip().encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def check_at(flags: Flags) -> None:
    """Refuse a place without methods that could cut there."""
    if flags.at is not None and not flags.methods:
        raise VtpruneError("--at needs --methods", "name the methods that cut there")


def check_rows(flags: Flags) -> None:
    """Refuse names of methods and presets that are unknown.

    Raises:
        PresetError: with the nearest names.
    """
    from vtprune.preset import load_preset
    from vtprune.pruners import find_method

    for method in flags.methods:
        find_method(method)
    for name in flags.presets:
        load_preset(name)


def preset_from(flags: Flags, user: Flags) -> Preset:
    """Return the user's preset with the flags over it.

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
        tokens=flags.tokens,
        tokens_after=flags.tokens_after,
        fit=flags.fit,
        decode_every=flags.decode_every,
        decode_keep=flags.decode_keep,
        keep_for_turns=flags.keep_for_turns,
        stream=stream_from(flags),
    )


def stream_from(flags: Flags) -> dict[str, object] | None:
    """Return how a long video is encoded in segments; None: as the preset says.

    Raises:
        VtpruneError: an option of segments without --stream.
    """
    values: dict[str, object] = {
        "frames": flags.stream_frames,
        "keep": flags.stream_keep,
        "share": flags.stream_share,
    }
    given = {name: value for name, value in values.items() if value is not None}
    if flags.stream:
        return given
    if given:
        raise VtpruneError(
            f"--stream-{next(iter(given))} changes nothing without --stream", "add --stream"
        )
    return None


class Loading(TypedDict):
    """The arguments of `models.loading.load`."""

    name: str | None
    adapter: str | None
    device: str
    dtype: str
    attention: str | None
    quantize: str | None
    calibration: Path | None
    compile: bool
    trust_remote_code: bool


def loading_from(flags: Flags, user: Flags) -> Loading:
    """Return how the model is loaded: the flags, over the user's config file."""
    name = flags.model if flags.adapter else flags.model or user.model
    return {
        "name": None if name == EMBEDDED and not flags.adapter else name,
        "adapter": flags.adapter,
        "device": flags.device or user.device or "auto",
        "dtype": flags.dtype or user.dtype or "auto",
        "attention": flags.attention or user.attention,
        "quantize": flags.quantize,
        "calibration": flags.calibration,
        "compile": flags.compile,
        "trust_remote_code": flags.trust_remote_code,
    }


class Caching(TypedDict):
    """The arguments of `models.loading.load` for a cache of media."""

    cache: Path | None
    cache_bytes: int


def cache_from(flags: Flags) -> Caching:
    """Return where decoded and encoded media are kept, and how much of them."""
    return {"cache": flags.cache, "cache_bytes": int(flags.cache_size * 10**9)}


def limits_from(flags: Flags) -> Limits:
    """Return the limits on media files: size, damage, pages and decoder.

    Raises:
        VtpruneError: --pages in a form that can't be read, or --allow-url that is no host.
    """
    from vtprune.media import Limits
    from vtprune.media.addresses import check_host

    limits = Limits(
        allow_partial=flags.allow_partial, pages=flags.pages, decoder=flags.decoder or "auto",
        hosts=tuple(map(check_host, flags.allow_url)),
    )  # fmt: skip
    return replace(
        limits, max_pixels=flags.max_pixels or limits.max_pixels, dpi=flags.dpi or limits.dpi
    )


def generation_from(
    flags: Flags, user: Flags, *, seed: int = 0, longest: int | None = None
) -> Generation:
    """Return how an answer is decoded; greedily by commands that take no temperature.

    Args:
        user: the config file's settings.
        longest: the most tokens of an answer; None: the flag's, else the config file's.
    """
    from vtprune.inference.generate import Generation

    return Generation(
        max_new_tokens=longest or flags.max_new_tokens or user.max_new_tokens or MAX_NEW_TOKENS,
        temperature=flags.temperature,
        top_p=flags.top_p,
        system=flags.system if flags.system is not None else user.system or "",
        seed=seed,
    )


def sampling_from(preset: Preset, flags: Flags) -> Sampling:
    """Return the sampling of frames and tiles: the preset's, with the flags over it.

    --frames replaces a preset's fps and max_frames, --fps its frames.
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
