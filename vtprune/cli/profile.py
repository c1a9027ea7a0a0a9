"""`vtprune profile`: what pruning saves on this machine, without a model's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from vtprune.cli.flags import (
    EMBEDDED,
    Flags,
    check_at,
    check_number,
    check_ranges,
    limits_from,
    method_options,
)
from vtprune.cli.help import SectionedCommand, section
from vtprune.cli.options import limit_options, row_options, shape_options
from vtprune.cli.results import (
    SUFFIXES,
    Makers,
    charts,
    check_saves,
    json_file,
    save_option,
    write_saves,
)
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from vtprune.cli.config import Config
    from vtprune.evaluation.profiling.profile import Profile
    from vtprune.evaluation.profiling.shown import Shown

EPILOG = """\b
Examples:
  vtprune profile --model llava-next
  vtprune profile --model qwen2.5-vl-7b --image 1344x1344 --no-measure
  vtprune profile --model llava-onevision-0.5b --video 32x448x448 --save s.png
  vtprune profile clip.mp4 --model internvl3-8b --keep 0.5,0.2 --methods dart
"""

_input, _time, _output = section("Input"), section("Measuring"), section("Output")


# fmt: off
@click.command(cls=SectionedCommand, epilog=EPILOG)
@click.argument("media", nargs=-1, metavar="[MEDIA]...")
@shape_options
@_input("--image", metavar="SIZE", help="A picture of this size, such as 1344x1344, or a file.  "
        "[default: the largest that the family takes]")
@_input("--video", metavar="SIZE", help="A video: frames, width and height, such as 64x448x448; "
        "or a file.")
@_input("--text-tokens", type=int, metavar="N", default=64, show_default=True,
        help="All tokens of the prompt that are not visual.")
@_input("--answer-tokens", type=int, metavar="N", default=32, show_default=True,
        help="Tokens of the answer, for what decoding costs.")
@_input("--frames", type=int, metavar="N", help="Frames of a video file, evenly.  [default: the "
        "model's own sampling]")
@_input("--max-tiles", type=int, metavar="N", help="The most tiles of a picture.")
@limit_options
@row_options(
    keeps="1,0.5,0.3,0.2,0.1",
    presets="Presets with a row each, at their own keep.  [default: all packaged ones]",
    methods="Methods that cut in the rows of --keep.  [default: the stages of the first of "
    "--presets, or of balanced]",
)
@_time("--seconds", type=float, metavar="S", default=60.0, show_default=True,
       help="How long measuring may take.")
@_time("--repeats", type=int, metavar="N", default=5, show_default=True,
       help="The most passes over all rows.")
@_time("--no-measure", is_flag=True, help="Counts, and what the machine's ceilings allow; no model "
       "is built.")
@_output("--json", is_flag=True, help="Print one JSON object instead of the tables.")
@save_option(("everything", ".json"), ("the rows", ".csv"), ("the speed-ups drawn", ".png or .svg"))
@_output("--quiet", is_flag=True, help="No warnings and no progress.")
def profile(
    media: tuple[str, ...],
    image: str | None,
    video: str | None,
    text_tokens: int,
    answer_tokens: int,
    seconds: float,
    repeats: int,
    no_measure: bool,
    **values: object,
) -> None:
    """Tell what pruning saves on this machine, without a model's weights.

    Builds the model's shape with random weights, lays out the real input, and shows for each keep
    and preset: tokens, FLOPs, memory, the speed-up that this machine's ceilings allow, and the one
    that was measured. Where the whole model would take longer than --seconds or not fit in memory,
    single layers are timed and summed. It ends with what limits the case, and what would pay more.
    """
    # fmt: on
    from vtprune.cli import output
    from vtprune.cli.config import load_config
    from vtprune.cli.console.profile import show_profile, show_warnings

    flags, user = Flags(**values), load_config()  # type: ignore[arg-type]
    check_ranges(flags)
    numbers = {"text_tokens": text_tokens, "answer_tokens": answer_tokens, "repeats": repeats}
    for name, value in numbers.items():
        check_number(name, value, 1)
    if not 0 < seconds < math.inf:
        raise VtpruneError(f"--seconds {seconds:g} is out of range", "above 0; 60 is usual")
    check_at(flags)
    check_saves(flags.saves, SUFFIXES, [*media, *filter(None, (image, video))])
    with output.libraries_silenced():
        shown = what_is_shown(media, image, video, flags)
        told = run(flags, user, shown, {**numbers, "seconds": seconds, "timed": not no_measure})
        found = told.to_dict()
        try:
            list(write_saves(flags.saves, _makers(told, found)))
        finally:  # a picture that can't be written costs no table
            output.show_tables(found, flags.json, flags.quiet, show_profile, show_warnings)


def _makers(told: Profile, found: Mapping[str, object]) -> Makers:
    def draw(kind: str) -> bytes:
        from vtprune.pictures.profile_chart import draw_profile

        return draw_profile(found, kind)

    return {
        ".json": lambda: json_file(found),
        ".csv": lambda: told.to_csv().encode(),
        **charts(draw),
    }


def what_is_shown(
    media: Sequence[str], image: str | None, video: str | None, flags: Flags
) -> Shown | None:
    """The input that was asked for; None for the family's own.

    Raises:
        VtpruneError: more than one of them, or what can't be read.
    """
    from vtprune.evaluation.profiling.shown import open_media, parse_picture, parse_video
    from vtprune.media import file_name

    if sum(map(bool, (media, image, video))) > 1:
        raise VtpruneError("more than one input was given", "one of MEDIA, --image and --video")
    if image is not None:
        made, paths = parse_picture(image), [file_name(image)]
    elif video is not None:
        made, paths = parse_video(video), [file_name(video)]
    else:
        made, paths = None, list(map(file_name, media))
    if made is not None or not paths:
        return made
    return open_media(paths, limits_from(flags))


def run(flags: Flags, user: Config, shown: Shown | None, numbers: dict[str, Any]) -> Profile:
    """The profile, with progress on standard error."""
    from vtprune.cli.output import progress_line
    from vtprune.evaluation.profiling.cases import Options
    from vtprune.evaluation.profiling.profile import profile
    from vtprune.models.base import Sampling
    from vtprune.preset import check_keep

    name = flags.model or user.model
    keeps = [check_keep(part) for part in flags.keeps]
    options = Options(
        device=flags.device or user.device or "auto",
        dtype=flags.dtype or user.dtype or "auto",
        attention=flags.attention or user.attention,
        calibration=flags.calibration,
        limits=limits_from(flags),
        sampling=Sampling(frames=flags.frames, max_tiles=flags.max_tiles),
        **numbers,
    )
    with progress_line(flags.quiet) as show:
        return profile(
            None if name == EMBEDDED else name,
            shown,
            keeps=keeps,
            presets=flags.presets or None,
            methods=flags.methods,
            at=flags.at,
            method_options=method_options(flags.option),
            base=user.preset,
            seed=flags.seed,
            options=options,
            on_progress=show,
        )
