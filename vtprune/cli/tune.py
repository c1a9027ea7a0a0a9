"""`vtprune tune`: the lowest keep that holds on your own questions, as a preset."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from vtprune.cli.asking import (
    LONGEST,
    asked_paths,
    asked_questions,
    is_demo,
    settings_from,
    variants_from,
)
from vtprune.cli.flags import check_at, loading_from
from vtprune.cli.help import Command
from vtprune.cli.options import MEDIA, MODEL, ROWS, Flags, method_options, takes
from vtprune.cli.results import (
    TABLES,
    TABLES_TEXT,
    check_saves,
    json_file,
    save_and_show,
    write_saves,
)
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from pathlib import Path

EPILOG = """\b
Examples:
  vtprune tune questions.jsonl --model qwen2.5-vl-7b --save mine.yaml
  vtprune tune *.mp4 -q "what happens?" --floor 0.95 --save mine.yaml
  vtprune tune demo --floor 0.9 --keep 0.7,0.5 --save mine.yaml
  vtprune ask clip.mp4 "what happens?" --preset mine.yaml
"""

FORMATS = (".yaml", ".yml", ".json", *TABLES)


@click.command(cls=Command, epilog=EPILOG)
@click.argument("inputs", nargs=-1, required=True, metavar="QUESTIONS.jsonl | MEDIA...")
@takes(
    "floor",
    *ROWS,
    *MODEL,
    *MEDIA,
    "question",
    "columns",
    "limit",
    "metric",
    "system",
    "max_new_tokens",
    "saves",
    "answers",
    "json",
    "quiet",
    defaults={"keeps": ("0.7,0.5,0.4,0.3,0.2,0.1",)},
    default_words={
        "presets": "all packaged ones, where no method is named",
        "max_new_tokens": str(LONGEST),
    },
    save=[("the preset, with the evidence in it", ".yaml"), ("everything", ".json"), TABLES_TEXT],
    needs_save=True,
)
def tune(inputs: tuple[str, ...], flags: Flags) -> None:
    """Find the lowest keep that holds on your own questions, and write it as a preset.

    QUESTIONS.jsonl has lines as `vtprune demo` writes them: file, question and, where known,
    answer, choices and kind; a line that can't be asked is named, counted and left out. Quality is
    accuracy relative to the unpruned model where every question has an answer, else agreement with
    the unpruned model's answers. Presets and methods are searched on a third of the files and
    tested on the others; the preset that is written keeps at least --floor of the quality there,
    with 95 % confidence. If none does, the exit code is 1 and no preset is written. Showing 98 %
    takes 223 files or more. QUESTIONS "demo" is the embedded model's own world.
    """
    from vtprune.cli.config import load_config
    from vtprune.cli.console import tuning
    from vtprune.cli.output import importing, libraries_silenced, progress_line

    user = load_config()
    others = {"--answers": flags.answers}
    read: list[str | Path] = [*inputs, *flags.presets]
    if flags.calibration is not None:
        read.append(flags.calibration)
    check_saves(flags.saves, FORMATS, read, others)
    with libraries_silenced(), asked_questions(inputs, flags, "dev") as (asked, failed):
        check_at(flags)
        if flags.methods or flags.presets:
            variants_from(flags, user)  # all that is wrong with them, before torch is imported
        with importing(flags.quiet):
            from vtprune.evaluation.tune import plan_tuning
            from vtprune.evaluation.tune import tune as run
            from vtprune.models.loading import load

        plan = plan_tuning(asked, flags.floor, flags.keeps, flags.presets, flags.methods,
                           flags.seed or 0, flags.at, method_options(flags.option))  # fmt: skip
        check_saves(flags.saves, FORMATS, asked_paths(asked), others)
        settings = settings_from(flags, user, plan.listed.media, is_demo(inputs[0]))
        with progress_line(flags.quiet) as show:
            loaded = load(**loading_from(flags, user), on_progress=show)
            result = replace(run(loaded, plan, settings, flags.answers, show), failed=failed)
    presets = [path for path in flags.saves if path.suffix.lower() in (".yaml", ".yml")]
    others_saved = tuple(path for path in flags.saves if path not in presets)
    preset_makers = dict.fromkeys((".yaml", ".yml"), lambda: result.to_yaml().encode())
    try:
        for path in write_saves(presets if result.chosen else (), preset_makers):
            result = replace(result, file=str(path))
    finally:  # also where a file can't be written
        save_and_show(
            result,
            replace(flags, saves=others_saved),
            {".json": lambda: json_file(result.to_dict())},
            tuning.show_tuning,
            tuning.show_notes,
        )
    if result.chosen is None:
        raise VtpruneError(*result.reason)
