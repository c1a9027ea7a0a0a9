"""`vtprune calibrate`: the layers where a model can be cut, measured on questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune.cli.asking import (
    LONGEST,
    asked_paths,
    columns_from,
    listed_or_media,
    settings_from,
)
from vtprune.cli.flags import limits_from, loading_from
from vtprune.cli.help import Command
from vtprune.cli.options import LOADING, MEDIA, Flags, method_options, takes
from vtprune.cli.results import (
    CHARTS,
    CHARTS_TEXT,
    TABLES,
    TABLES_TEXT,
    charts,
    check_saves,
    json_file,
    table_makers,
    to_json,
    write_saves,
)
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from vtprune.evaluation.calibration.result import CalibrationResult

EPILOG = """\b
Examples:
  vtprune calibrate questions.jsonl --model qwen2.5-vl-7b --save c.yaml
  vtprune calibrate *.jpg -q "what is shown?" --save c.yaml --save curves.png
  vtprune calibrate questions.jsonl --save c.yaml --propose 0.3 \\
    --propose-preset p.yaml
  vtprune ask clip.mp4 "what happens?" --calibration c.yaml --preset p.yaml
"""

FORMATS = (".yaml", ".yml", ".json", *TABLES, *CHARTS)


@click.command(cls=Command, epilog=EPILOG)
@click.argument("inputs", nargs=-1, required=True, metavar="QUESTIONS.jsonl | MEDIA...")
@takes(
    "question",
    "columns",
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
    "contribute",
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
        TABLES_TEXT,
        ("the curves drawn", CHARTS_TEXT),
    ],
)
def calibrate(inputs: tuple[str, ...], flags: Flags) -> None:
    """Find the layers where a model can be cut, on your own questions.

    At the entropy collapse layer (ecl) the visual tokens become alike; from the information horizon
    on, answers do not need them at all. QUESTIONS.jsonl has lines as `vtprune demo` writes them:
    file, question and, where known, answer and kind; kinds number_*, ocr, text, document, chart and
    table count as text-heavy, and get their own horizon. Quality is the probability of the right
    answer; for questions without one, whether the unpruned model's answer is still given. Draws of
    files say how sure each layer is. Use 50 files or more. --save or --contribute has to be given.
    """
    from vtprune.cli.config import load_config
    from vtprune.cli.console import stderr_console, stdout_console
    from vtprune.cli.console.calibration import show_calibration, show_notes
    from vtprune.cli.output import importing, libraries_silenced, progress_line
    from vtprune.inference.questions_file import open_questions
    from vtprune.preset import Preset

    user = load_config()
    if not (flags.saves or flags.contribute):
        raise click.UsageError("Missing option '--save'.", click.get_current_context())
    check_saves(flags.saves, FORMATS, inputs, {"--propose-preset": flags.propose_preset})
    _check(flags)
    listed, source = listed_or_media(inputs, flags.question, columns_from(flags))
    asked, failed = open_questions(listed, limits_from(flags))
    files: list[str | Path] = [*inputs, *asked_paths(asked)]
    check_saves(flags.saves, FORMATS, files, {"--propose-preset": flags.propose_preset})
    with importing(flags.quiet):
        from vtprune.evaluation.calibration.calibrate import CalibrationSettings
        from vtprune.evaluation.calibration.calibrate import calibrate as run
        from vtprune.models.loading import load

    settings = CalibrationSettings(
        settings_from(flags, user, Preset()),
        flags.windows,
        flags.propose,
        flags.methods,
        method_options(flags.option),
        flags.seed or 0,
    )
    written: list[Path] = []
    with libraries_silenced():
        with progress_line(flags.quiet) as show:
            loaded = load(**loading_from(flags, user), on_progress=show)
            measured = replace(run(loaded, asked, source, settings, show), failed=failed)
        try:
            for path in _write(flags, measured):
                written.append(path)
        finally:  # also where a file can't be written
            if flags.json:
                click.echo(to_json(measured.to_dict()))
            else:
                tables = stderr_console() if flags.contribute else stdout_console()
                if not (flags.contribute and flags.quiet):
                    show_calibration(measured, tables)
                if not flags.quiet:
                    show_notes(measured, written, stderr_console())
                if flags.contribute:
                    click.echo(measured.contribution(), nl=False)


def _check(flags: Flags) -> None:
    """Refuse methods and options that don't fit, before anything is read."""
    if flags.contribute and flags.json:
        raise VtpruneError("--contribute and --json exclude each other",
                           "--contribute prints YAML; run it again for JSON")  # fmt: skip
    from vtprune.evaluation.calibration.schedules import SELECTORS
    from vtprune.evaluation.variants import split_options
    from vtprune.preset import check_keep
    from vtprune.pruners import check_options, find_method

    listed = method_options(flags.option)
    if flags.propose is None:
        for option, value in (("--methods", flags.methods), ("-o", listed),
                              ("--propose-preset", flags.propose_preset)):  # fmt: skip
            if value:
                raise VtpruneError(f"{option} without --propose", "give a budget: --propose 0.3")
        return
    check_keep(flags.propose, "--propose: keep")
    for name in flags.methods:
        find_method(name)
    for name, options in split_options(flags.methods or SELECTORS, listed).items():
        check_options(name, options)


def _write(flags: Flags, measured: CalibrationResult) -> Iterator[Path]:
    """Write every file that was asked for, and yield it as soon as it is there."""
    from vtprune.cli.console.calibration import show_calibration, show_notes
    from vtprune.evaluation.calibration.chart import plot
    from vtprune.saving import save_file

    makers: dict[str, Callable[[], bytes]] = {
        **table_makers(
            lambda console: show_calibration(measured, console),
            lambda console: show_notes(measured, (), console),
        ),
        **dict.fromkeys((".yaml", ".yml"), lambda: measured.calibration_text().encode()),
        ".json": lambda: json_file(measured.to_dict()),
        **charts(lambda kind: plot(measured, kind)),
    }
    yield from write_saves(flags.saves, makers)
    if flags.propose_preset is not None and measured.best() is not None:
        save_file(flags.propose_preset, measured.preset_text().encode(), "--propose-preset")
        yield flags.propose_preset
