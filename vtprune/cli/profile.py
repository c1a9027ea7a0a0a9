"""`vtprune profile`: what pruning saves on this machine, without a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune.cli.flags import check_at, check_rows, limits_from
from vtprune.cli.help import Command
from vtprune.cli.options import LIMITS, ROWS, Flags, method_options, takes
from vtprune.cli.results import (
    CHARTS_TEXT,
    FULL_TEXT,
    SUFFIXES,
    check_saves,
    row_makers,
    save_and_show,
)
from vtprune.errors import VtpruneError, brief, path_hint

if TYPE_CHECKING:
    from vtprune.evaluation.profiling.prompts import ProfiledMedia
    from vtprune.evaluation.profiling.result import Profile

EPILOG = """\b
Examples:
  vtprune profile --model llava-next
  vtprune profile --model qwen2.5-vl-7b --image 1344x1344 --no-measure
  vtprune profile --model qwen3-vl-8b --gpu "H100 SXM"
  vtprune profile --model llava-onevision-0.5b --video 32x448x448 --save s.png
  vtprune profile clip.mp4 --model internvl3-8b --keep 0.5,0.2 --methods dart
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("media", nargs=-1, metavar="[MEDIA]...")
@takes(
    "model",
    "gpu",
    "device",
    "dtype",
    "attention",
    "calibration",
    "image",
    "video",
    "text_tokens",
    "answer_tokens",
    "frames",
    "max_tiles",
    *LIMITS,
    *ROWS,
    "seconds",
    "repeats",
    "no_measure",
    "json",
    "saves",
    "quiet",
    defaults={"keeps": ("1,0.5,0.3,0.2,0.1",)},
    default_words={
        "presets": "all packaged ones, each at its own keep",
        "methods": "the stages of the first preset, or of balanced",
    },
    save=[*FULL_TEXT, ("the speed-ups drawn", CHARTS_TEXT)],
)
def profile(media: tuple[str, ...], flags: Flags) -> None:
    """Measure what pruning saves on this machine, without a model's weights.

    Builds the model's shape with random weights (--model takes a config.json, too), lays out the
    real input, and shows for each keep and preset: tokens, FLOPs, memory, the speed-up that this
    machine's ceilings allow, and the one that was measured. Where the whole model would take
    longer than --seconds or not fit in memory, single layers are timed and summed. It ends with
    what limits the speed-up, and what would save more. --gpu predicts for a card that is not here.
    """
    from vtprune.media import check_file

    check_at(flags)
    check_rows(flags)
    check_gpu(flags)
    for name in media:
        check_file(name)
    sizes = [size for size in (flags.image, flags.video) if size]
    check_saves(flags.saves, SUFFIXES, [*media, *sizes])

    from vtprune.cli import output
    from vtprune.cli.config import load_config
    from vtprune.cli.console.profile import show_profile, show_warnings

    with output.libraries_silenced():
        result = run(flags, load_config(), profiled_media(media, flags))
        makers = row_makers(result, lambda kind: _draw(result, kind))
        save_and_show(result, flags, makers, show_profile, show_warnings)


def _draw(result: Profile, kind: str) -> bytes:
    from vtprune.evaluation.profiling.chart import draw_profile

    return draw_profile(result, kind)


def check_gpu(flags: Flags) -> None:
    """Refuse a card without a data sheet, one beside --device, and a dtype that it has not.

    Raises:
        VtpruneError: names the nearest cards, or its dtypes.
    """
    if flags.gpu is None:
        return
    from vtprune.evaluation.profiling.gpus import find_gpu

    gpu = find_gpu(flags.gpu)
    if flags.device is not None:
        raise VtpruneError(
            "--gpu and --device exclude each other", "--gpu predicts for a card that is not here"
        )
    if flags.dtype in ("float32", "bfloat16", "float16"):
        gpu.peak_of(flags.dtype)


def profiled_media(media: Sequence[str], flags: Flags) -> ProfiledMedia | None:
    """Return the input that was asked for; None for the family's own.

    Raises:
        VtpruneError: more than one of them, or what can't be read.
    """
    from vtprune.evaluation.profiling.prompts import open_media, parse_size
    from vtprune.media import file_name

    if sum(map(bool, (media, flags.image, flags.video))) > 1:
        raise VtpruneError("more than one input was given", "one of MEDIA, --image and --video")
    for text, kind in ((flags.image, "image"), (flags.video, "video")):
        if text is not None:
            size = parse_size(text, kind)
            if size is None and not Path(file_name(text)).exists():
                raise VtpruneError(
                    f"--{kind} {brief(text)} is no size, and there is no such file",
                    path_hint(
                        file_name(text),
                        "check the path, or give a size: for example --image 1344x1344, or --video "
                        "64x448x448",
                    ),
                )
            return size or open_media([file_name(text)], limits_from(flags))
    return open_media(list(map(file_name, media)), limits_from(flags)) if media else None


def run(flags: Flags, user: Flags, media: ProfiledMedia | None) -> Profile:
    """Make the profile, with progress on standard error."""
    from vtprune.cli.output import importing, progress_line

    with importing(flags.quiet):
        from vtprune.evaluation.profiling.profile import ProfileOptions, profile
        from vtprune.models.base import Sampling
    from vtprune.preset import check_keep

    options = ProfileOptions(
        device="auto" if flags.gpu else flags.device or user.device or "auto",
        gpu=flags.gpu,
        dtype=flags.dtype or user.dtype or "auto",
        attention=flags.attention or user.attention,
        text_tokens=flags.text_tokens,
        answer_tokens=flags.answer_tokens,
        seconds=flags.seconds,
        repeats=flags.repeats,
        timed=not flags.no_measure,
        calibration=flags.calibration,
        limits=limits_from(flags),
        sampling=Sampling(frames=flags.frames, max_tiles=flags.max_tiles),
    )
    with progress_line(flags.quiet) as show:
        return profile(
            flags.model or user.model,
            media,
            keeps=[check_keep(part) for part in flags.keeps],
            presets=flags.presets or None,
            methods=flags.methods,
            at=flags.at,
            method_options=method_options(flags.option),
            base=user.preset,
            seed=flags.seed,
            options=options,
            on_progress=show,
        )
