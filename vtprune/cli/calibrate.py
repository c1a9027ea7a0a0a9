"""`vtprune calibrate`: questions in, where a model can be cut out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune.cli.asking import LONGEST, listed_or_media
from vtprune.cli.flags import (
    Flags,
    check_number,
    check_ranges,
    limits_from,
    loading_from,
    method_options,
    sampling_from,
)
from vtprune.cli.help import SectionedCommand, section
from vtprune.cli.options import media_options, search_options, uncalibrated_options
from vtprune.cli.results import CHARTS, charts, check_saves, json_file, save_option, write_saves
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from vtprune.cli.config import Config
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

_ask, _output = section("Questions"), section("Output")
_search = section("Search for a schedule")
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


# fmt: off
@click.command(cls=SectionedCommand, epilog=EPILOG)
@click.argument("inputs", nargs=-1, required=True, metavar="QUESTIONS.jsonl | MEDIA...")
@_ask("-q", "--question", multiple=True, metavar="TEXT",
      help="Asked about every MEDIA file; repeatable.")
@_ask("--system", metavar="TEXT", help="System prompt.")
@_ask("--max-new-tokens", type=int, metavar="N", help="The longest answer of the model itself, to "
      f"a question without one.  [default: {LONGEST}]")
@_ask("--windows", type=int, default=0, metavar="N", help="Measure, on N files, what the text "
      "reads from single 2 x 2 windows of tokens too.  [default: 0]")
@_ask("--seed", type=int, metavar="N", help="Seed of the intervals.  [default: 0]")
@uncalibrated_options
@media_options
@_search("--propose", type=float, metavar="KEEP", help="Try a few schedules that keep this "
         "fraction of the visual tokens, averaged over the layers.")
@search_options
@_search("--propose-preset", type=click.Path(path_type=Path), metavar="FILE",
         help="Write the best of them to FILE as a preset; --save writes the calibration, which is "
         "YAML too.")
@save_option(("the calibration, for --calibration of vtprune ask", ".yaml"),
             ("everything", ".json"), ("the curves drawn", ".png or .svg"), required=True)
@_output("--json", is_flag=True, help="Print everything as one JSON object.")
@_output("--quiet", is_flag=True, help="Print the tables only.")
def calibrate(
    inputs: tuple[str, ...],
    windows: int,
    propose: float | None,
    propose_preset: Path | None,
    **values: object,
) -> None:
    """Find the layers where a model can be cut, on questions of yours.

    The entropy collapse layer (ecl) is where the visual tokens begin to say the same; the
    information horizon is the layer from which on they are not needed at all. QUESTIONS.jsonl has
    lines as `vtprune demo` writes them: file, question and, where known, answer and kind; kinds
    number_*, ocr, text, document, chart and table count as text-heavy, and get a horizon of their
    own. With an answer, its probability is what counts; without, agreement: whether the unpruned
    model's own is still given. 50 files or more are wanted.
    """
    # fmt: on
    from vtprune.cli.calibrated import show_calibration
    from vtprune.cli.config import load_config
    from vtprune.cli.output import libraries_silenced, to_json

    flags = Flags(**values)  # type: ignore[arg-type]
    user = load_config()
    wanted = Wanted(
        windows, propose, flags.methods, method_options(flags.option), propose_preset
    )
    _check(flags, wanted)
    limits = limits_from(flags)
    asked, source = listed_or_media(inputs, flags.question, limits)
    check_saves(
        flags.saves,
        FORMATS,
        [*inputs, *(one.file for one in asked)],
        {"--propose-preset": propose_preset},
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


def _check(flags: Flags, wanted: Wanted) -> None:
    """Refuses what can't be, before anything is read."""
    from vtprune.evaluation.lineup import split_options
    from vtprune.preset import check_keep
    from vtprune.pruners import check_options, find_method

    check_ranges(flags)
    check_number("windows", wanted.windows, 0)
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
    flags: Flags, user: Config, wanted: Wanted, asked: list[Asked], source: str, limits: Limits
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
