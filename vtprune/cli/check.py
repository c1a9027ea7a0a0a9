"""`vtprune check`: pruned equals masked, on this machine, with this model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from vtprune.cli.flags import (
    limits_from,
    loading_from,
    sampling_from,
)
from vtprune.cli.help import Command
from vtprune.cli.options import MEDIA, MODEL, Flags, method_options, takes
from vtprune.cli.results import TABLES, TABLES_TEXT, check_saves, json_file, save_and_show
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from vtprune.evaluation.checking.cuts import CheckOptions
    from vtprune.evaluation.checking.result import CheckResult
    from vtprune.media import Source

EPILOG = """\b
Examples:
  vtprune check
  vtprune check --model qwen2.5-vl-7b --dtype bfloat16
  vtprune check clip.mp4 --model DIR --attention eager --json
  vtprune check page.png --model internvl3-8b --preset document
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("media", nargs=-1, metavar="[MEDIA]...")
@takes(
    "keep",
    "preset",
    "method",
    "at",
    "option",
    "seed",
    *MODEL,
    *MEDIA,
    "json",
    "saves",
    "quiet",
    default_words={
        "keep": "half of the tokens after each cut",
        "method": "random",
        "preset": "cuts of one method",
    },
    save=[("the result", ".json"), TABLES_TEXT],
)
def check(media: tuple[str, ...], flags: Flags) -> None:
    """Prove on this machine that a pruned model equals the masked one.

    A model whose layers keep a state (linear attention, convolutions) is compared with a loop over
    its layers, each on the tokens that are left there.

    Runs the model with visual tokens cut at its input, at one layer, at two layers and before the
    vision tower, for one prompt and a left-padded batch of two, with a dynamic and a static cache.
    Each case is compared with the unpruned model whose attention mask hides the same tokens, over
    the prompt and 8 decoded tokens; a difference counts where it exceeds the unpruned model's own
    numerical noise. All MEDIA go into one prompt; without any, a picture and a clip are drawn.

    The exit code is 0 only if no case differs and the cuts at the input and at one layer were
    compared; a case that the model does not take has a row with the reason.
    """
    from vtprune.cli import output
    from vtprune.cli.config import load_config
    from vtprune.cli.console.checking import show_check, show_notes

    user = load_config()
    check_saves(flags.saves, (".json", *TABLES), media)
    options = options_from(flags)

    from vtprune.media import open_sources

    with output.libraries_silenced():
        sources = open_sources(list(media), limits_from(flags)) if media else []
        result = run(flags, user, options, sources)
    makers = {".json": lambda: json_file(result.to_dict())}
    save_and_show(result, flags, makers, show_check, show_notes)
    if not result.proven:
        raise VtpruneError(*result.failure())


def options_from(flags: Flags) -> CheckOptions:
    """Return the cuts to check.

    Raises:
        VtpruneError: flags that exclude each other, or a keep that is no fraction.
    """
    from vtprune.preset import check_keep, find_preset

    if flags.preset is not None and (flags.method is not None or flags.at is not None):
        other = "--method" if flags.method is not None else "--at"
        raise VtpruneError(f"--preset and {other} exclude each other", "a preset has its own cuts")
    if flags.at is not None and flags.method is None:
        raise VtpruneError("--at needs --method", "name the method that cuts there")
    keep = None if flags.keep is None else check_keep(flags.keep)
    if flags.preset is not None:
        find_preset(flags.preset)

    from vtprune.evaluation.checking.cuts import CheckOptions

    return CheckOptions(
        keep=keep,
        method=flags.method or "random",
        at=flags.at,
        options=method_options(flags.option),
        preset=flags.preset,
        seed=flags.seed or 0,
    )


def run(flags: Flags, user: Flags, options: CheckOptions, sources: Sequence[Source]) -> CheckResult:
    """Run the check, with progress on standard error."""
    from vtprune.cli.output import importing, progress_line

    with importing(flags.quiet):
        from vtprune.evaluation.checking.check import check as run_check
        from vtprune.evaluation.checking.cuts import choose_cuts, media_preset
        from vtprune.evaluation.checking.inputs import draw_media, gather_files
        from vtprune.models.loading import load
        from vtprune.models.structure import find_structure

    kinds = {source.kind for source in sources} or set(options.modalities)
    choose_cuts(options, 8, kinds)  # what can't be checked is an error before a long load
    sampling, limits = sampling_from(media_preset(options), flags), limits_from(flags)
    with progress_line(flags.quiet) as show:
        loaded = load(**loading_from(flags, user), on_progress=show)
        if sources:
            inputs = gather_files(loaded, sources, sampling, limits, show)
        else:
            inputs = draw_media(loaded, sampling, options.modalities)
        kinds = {kind for one in inputs for kind in one.kinds}
        cuts = choose_cuts(options, len(find_structure(loaded.model).layers), kinds)
        return run_check(loaded, inputs, cuts, show)
