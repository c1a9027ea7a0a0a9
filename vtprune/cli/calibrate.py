"""`vtprune calibrate`: questions in, where a model can be cut out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune.cli.asking import LONGEST, listed_or_media
from vtprune.cli.flags import (
    limits_from,
    loading_from,
    sampling_from,
)
from vtprune.cli.help import Command
from vtprune.cli.options import LOADING, MEDIA, Flags, method_options, takes
from vtprune.cli.results import CHARTS, charts, check_saves, json_file, write_saves
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from vtprune.evaluation.calibrate import Measured
    from vtprune.inference.questions_file import Asked
    from vtprune.media import Limits

EPILOG = """\b
Examples:
  vtprune calibrate questions.jsonl --model qwen2.5-vl-7b --save c.yaml
  vtprune calibrate *.jpg -q "what is shown?" --save c.yaml --save curves.png
  vtprune calibrate questions.jsonl --save c.yaml --propose 0.3 \\
    --propose-preset p.yaml
  vtprune ask clip.mp4 "what happens?" --calibration c.yaml --preset p.yaml
"""

FORMATS = (".yaml", ".yml", ".json", *CHARTS)


@dataclass(frozen=True)
class Wanted:
    """What is measured beside the two layers, and where everything goes.

    Args:
        windows: inputs whose token information is measured.
        keep: a budget to try schedules for.
        methods: that they select tokens by; () for the usual ones.
        options: of every one of them that has such an option.
        preset: where the best schedule is written as a preset; None: nowhere.
    """

    windows: int
    keep: float | None
    methods: tuple[str, ...]
    options: Mapping[str, str]
    preset: Path | None


@click.command(cls=Command, epilog=EPILOG)
@click.argument("inputs", nargs=-1, required=True, metavar="QUESTIONS.jsonl | MEDIA...")
@takes(
    "question",
    "system",
    "windows",
    "max_new_tokens",
    "seed",
    *LOADING,
    *MEDIA,
    "propose",
    "methods",
    "option",
    "propose_preset",
    "saves",
    "json",
    "quiet",
    default_words={
        "max_new_tokens": str(LONGEST),
        "methods": "spread,entropy,random,uniform, for --propose",
    },
    save=[
        ("the calibration, for --calibration of vtprune ask", ".yaml"),
        ("everything", ".json"),
        ("the curves drawn", ".png or .svg"),
    ],
    needs_save=True,
)
def calibrate(inputs: tuple[str, ...], flags: Flags) -> None:
    """Find the layers where a model can be cut, on questions of yours.

    The entropy collapse layer (ecl) is where the visual tokens begin to say the same; the
    information horizon is the layer from which on they are not needed at all. QUESTIONS.jsonl has
    lines as `vtprune demo` writes them: file, question and, where known, answer and kind; kinds
    number_*, ocr, text, document, chart and table count as text-heavy, and get a horizon of their
    own. With an answer, its probability is what counts; without, agreement: whether the unpruned
    model's own is still given. 50 files or more are wanted.
    """
    from vtprune.cli.calibrated import show_calibration
    from vtprune.cli.config import load_config
    from vtprune.cli.output import libraries_silenced, to_json

    user = load_config()
    wanted = Wanted(
        flags.windows,
        flags.propose,
        flags.methods,
        method_options(flags.option),
        flags.propose_preset,
    )
    _check(wanted)
    limits = limits_from(flags)
    asked, source = listed_or_media(inputs, flags.question, limits)
    check_saves(
        flags.saves,
        FORMATS,
        [*inputs, *(one.file for one in asked)],
        {"--propose-preset": flags.propose_preset},
    )
    written: list[Path] = []
    with libraries_silenced():
        measured = _measure(flags, user, wanted, asked, source, limits)
        try:
            for path in _write(flags.saves, wanted, measured):
                written.append(path)
        finally:  # a file that can't be written costs no table
            if flags.json:
                click.echo(to_json(measured.to_dict()))
            else:
                show_calibration(measured, written, flags.quiet)


def _check(wanted: Wanted) -> None:
    """Refuses what can't be, before anything is read."""
    from vtprune.evaluation.variants import split_options
    from vtprune.preset import check_keep
    from vtprune.pruners import check_options, find_method

    if wanted.keep is not None:
        check_keep(wanted.keep)
        for name in wanted.methods:
            find_method(name)
        if wanted.options:
            from vtprune.evaluation.calibrate.propose import SELECTORS

            split = split_options(wanted.methods or SELECTORS, wanted.options)
            for name, options in split.items():
                check_options(name, options)
    for option, given in (
        ("--methods", bool(wanted.methods)),
        ("-o", bool(wanted.options)),
        ("--propose-preset", wanted.preset is not None),
    ):
        if given and wanted.keep is None:
            raise VtpruneError(f"{option} without --propose", "give a budget: --propose 0.3")


def _measure(
    flags: Flags, user: Flags, wanted: Wanted, asked: list[Asked], source: str, limits: Limits
) -> Measured:
    from vtprune.cli.output import progress_line
    from vtprune.evaluation.calibrate import Settings, calibrate
    from vtprune.inference import run
    from vtprune.preset import Preset

    settings = Settings(
        sampling=sampling_from(Preset(), flags),
        generation=run.Generation(
            max_new_tokens=flags.max_new_tokens or LONGEST,
            system=flags.system if flags.system is not None else user.system or "",
        ),
        limits=limits,
        windows=wanted.windows,
        keep=wanted.keep,
        methods=wanted.methods,
        options=wanted.options,
        seed=flags.seed or 0,
    )
    with progress_line(flags.quiet) as show:
        loaded = run.load(**loading_from(flags, user), on_progress=show)
        return calibrate(loaded, asked, source, settings, show)


def _write(saves: Sequence[Path], wanted: Wanted, measured: Measured) -> Iterator[Path]:
    """Writes everything that has a place to be; each place as soon as it is written."""
    from vtprune.saving import save_file

    def draw(kind: str) -> bytes:
        from vtprune.evaluation.calibrate.plot import plot

        return plot(measured, kind)

    makers: dict[str, Callable[[], bytes]] = {
        **dict.fromkeys((".yaml", ".yml"), lambda: measured.calibration_text().encode()),
        ".json": lambda: json_file(measured.to_dict()),
        **charts(draw),
    }
    yield from write_saves(saves, makers)
    if wanted.preset is not None and measured.best() is not None:
        save_file(wanted.preset, measured.preset_text().encode(), "--propose-preset")
        yield wanted.preset
