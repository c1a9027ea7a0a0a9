"""What `show` and `explain` share: a model with the media of a prompt, and the files of --save."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vtprune.cli.flags import limits_from, loading_from, open_media, sampling_from
from vtprune.cli.options import Flags
from vtprune.cli.results import Makers, write_saves

if TYPE_CHECKING:
    from vtprune.inference.prompt_media import PromptMedia
    from vtprune.models.loading import Loaded, Progress
    from vtprune.preset import Preset


def load_to_draw(
    flags: Flags,
    user: Flags,
    preset: Preset,
    paths: list[str],
    on_progress: Progress,
    thumbnails: bool = True,
) -> tuple[Loaded, PromptMedia]:
    """Load the model, and meanwhile read the media; what can't be read is an error before that.

    Args:
        thumbnails: keep a small copy of every frame, for the drawing.
    """
    from vtprune.inference.prompt_media import load_with_media
    from vtprune.models.loading import open_model

    limits = limits_from(flags)
    sources = open_media(paths, limits)
    opened = open_model(**loading_from(flags, user), on_progress=on_progress)
    sampling = sampling_from(preset, flags)
    return load_with_media(opened, sources, sampling, preset, limits, on_progress, thumbnails)


def write_files(flags: Flags, makers: Makers) -> None:
    """Write the files of --save, and name them."""
    from vtprune.cli.console import printable

    for path in write_saves(flags.saves, makers):
        if not (flags.quiet or flags.json):
            click.echo(f"written   {printable(str(path))}", err=True)
