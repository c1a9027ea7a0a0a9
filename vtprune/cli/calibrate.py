"""`vtprune calibrate`: questions in, where a model can be cut out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune.cli import complete
from vtprune.cli.asking import LONGEST, listed_or_media
from vtprune.cli.flags import (
    Flags,
    check_number,
    check_ranges,
    limits_from,
    loading_from,
    sampling_from,
)
from vtprune.cli.help import SectionedCommand, section
from vtprune.cli.options import media_options, uncalibrated_options
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from vtprune.calibrate import Measured
    from vtprune.config import Config
    from vtprune.media import Limits
    from vtprune.questions_file import Asked

EPILOG = """\b
Examples:
  vtprune calibrate questions.jsonl --model qwen2.5-vl-7b -o calibration.yaml
  vtprune calibrate *.jpg -q "what is shown?" -q "how many?" -o c.yaml
  vtprune calibrate questions.jsonl -o c.yaml --propose 0.3 \\
    --propose-preset p.yaml
  vtprune ask clip.mp4 "what happens?" --calibration c.yaml --preset p.yaml
"""

_ask, _output = section("Questions"), section("Output")
_search = section("Search for a schedule")


@dataclass(frozen=True)
class Wanted:
    """What is measured beside the two layers, and where everything goes.

    Args:
        windows: inputs whose token information is measured.
        keep: a budget to try schedules for.
        methods: that they select tokens by; () for the usual ones.
        files: option -> what is written there.
    """

    windows: int
    keep: float | None
    methods: tuple[str, ...]
    files: dict[str, Path]


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
@_search("--methods", metavar="NAME,...", shell_complete=complete.complete_methods,
         help="What they select tokens by.  [default: spread,entropy,random,uniform]")
@_search("--propose-preset", type=click.Path(path_type=Path), metavar="FILE",
         help="Write the best of them to FILE as a preset.")
@_output("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE",
         help="Write the calibration to FILE, for --calibration of vtprune ask.")
@_output("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the curves to FILE, "
         "a PNG.  [default: beside -o]")
@_output("--json", is_flag=True, help="Print everything as one JSON object.")
@_output("--quiet", is_flag=True, help="Print the tables only.")
def calibrate(
    inputs: tuple[str, ...],
    windows: int,
    propose: float | None,
    methods: str | None,
    propose_preset: Path | None,
    output: Path,
    plot: Path | None,
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
    from vtprune.cli.output import check_picture, check_targets, libraries_silenced, to_json
    from vtprune.config import load_config

    flags = Flags(**values)  # type: ignore[arg-type]
    user = load_config()
    files = {"-o": output, "--plot": plot or output.with_suffix(".png")}
    if propose_preset is not None:
        files["--propose-preset"] = propose_preset
    chosen = tuple(name.strip() for name in (methods or "").split(",") if name.strip())
    wanted = Wanted(windows, propose, chosen, files)
    _check(flags, wanted)
    check_picture(files["--plot"])
    limits = limits_from(flags)
    asked, source = listed_or_media(inputs, flags.question, limits)
    check_targets(files, [*inputs, *(one.file for one in asked)])
    written: list[Path] = []
    with libraries_silenced():
        measured = _measure(flags, user, wanted, asked, source, limits)
        try:
            for path in _write(wanted, measured):
                written.append(path)
        finally:  # a file that can't be written costs no table
            if flags.json:
                click.echo(to_json(measured.to_dict()))
            else:
                show_calibration(measured, written, flags.quiet)


def _check(flags: Flags, wanted: Wanted) -> None:
    """Refuses what can't be, before anything is read."""
    from vtprune.preset import check_keep
    from vtprune.pruners import find_method

    check_ranges(flags)
    check_number("windows", wanted.windows, 0)
    if wanted.keep is not None:
        check_keep(wanted.keep)
        for name in wanted.methods:
            find_method(name)
    for option, given in (
        ("--methods", bool(wanted.methods)),
        ("--propose-preset", "--propose-preset" in wanted.files),
    ):
        if given and wanted.keep is None:
            raise VtpruneError(f"{option} without --propose", "give a budget: --propose 0.3")


def _measure(
    flags: Flags, user: Config, wanted: Wanted, asked: list[Asked], source: str, limits: Limits
) -> Measured:
    from vtprune import run
    from vtprune.calibrate import Settings, calibrate
    from vtprune.cli.output import progress_line
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
        seed=flags.seed or 0,
    )
    with progress_line(flags.quiet) as show:
        loaded = run.load(**loading_from(flags, user), on_progress=show)
        return calibrate(loaded, asked, source, settings, show)


def _write(wanted: Wanted, measured: Measured) -> Iterator[Path]:
    """Writes everything that has a place to be; each place as soon as it is written."""
    from vtprune.calibrate.plot import plot
    from vtprune.cli.output import save_file

    make: dict[str, Callable[[], bytes]] = {
        "-o": lambda: measured.calibration_text().encode(),
        "--plot": lambda: plot(measured),
    }
    if measured.best() is not None:
        make["--propose-preset"] = lambda: measured.preset_text().encode()
    for option, path in wanted.files.items():
        if option in make:
            save_file(path, make[option](), option)
            yield path
