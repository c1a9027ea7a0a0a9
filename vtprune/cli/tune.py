"""`vtprune tune`: the lowest keep that your own questions bear, as a preset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune.cli.asking import (
    LONGEST,
    check_choices,
    check_metric,
    demo_questions,
    is_demo,
    listed_or_media,
    settings_from,
)
from vtprune.cli.flags import (
    check_at,
    limits_from,
    loading_from,
    method_options,
)
from vtprune.cli.help import Command
from vtprune.cli.options import MEDIA, MODEL, ROWS, Flags, takes
from vtprune.cli.results import check_saves, json_file, write_saves
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from vtprune.evaluation.tuning.candidates import Plan
    from vtprune.evaluation.tuning.result import Tuned
    from vtprune.inference.questions_file import Asked

EPILOG = """\b
Examples:
  vtprune tune questions.jsonl --model qwen2.5-vl-7b --save mine.yaml
  vtprune tune *.mp4 -q "what happens?" --floor 0.95 --save mine.yaml
  vtprune tune demo --floor 0.9 --keep 0.7,0.5 --save mine.yaml
  vtprune ask clip.mp4 "what happens?" --preset mine.yaml
"""

FORMATS = (".yaml", ".yml", ".json")


@click.command(cls=Command, epilog=EPILOG)
@click.argument("inputs", nargs=-1, required=True, metavar="QUESTIONS.jsonl | MEDIA...")
@takes(
    "floor",
    *ROWS,
    *MODEL,
    *MEDIA,
    "question",
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
    save=[("the preset, with the evidence in it", ".yaml"), ("everything", ".json")],
    needs_save=True,
)
def tune(inputs: tuple[str, ...], flags: Flags) -> None:
    """Find the lowest keep that your own questions bear, and write it as a preset.

    QUESTIONS.jsonl has lines as `vtprune demo` writes them: file, question and, where known,
    answer, choices and kind. With an answer to every question, accuracy relative to the unpruned
    model is to be kept, else the unpruned model's answers. Candidates are searched on a third of
    the files and tested on the others; what is written holds --floor there with 95 % confidence.
    If nothing does, the exit code is 1 and no preset is written. To show 98 % it takes 223 files or
    more. QUESTIONS "demo" is the embedded model's own world.
    """
    from vtprune.cli.config import load_config
    from vtprune.cli.console import tuning
    from vtprune.cli.output import libraries_silenced, show_tables
    from vtprune.evaluation.tuning.candidates import plan

    user = load_config()
    metric, answers = flags.metric, flags.answers
    check_metric(metric)
    others = {"--answers": answers}
    check_saves(flags.saves, FORMATS, inputs, others)
    with libraries_silenced(), _questions(inputs, flags) as asked:
        check_choices(metric, asked)
        check_at(flags)
        made = plan(asked, flags.floor, flags.keeps, flags.presets, flags.methods, flags.seed or 0,
                    flags.at, method_options(flags.option))  # fmt: skip
        check_saves(flags.saves, FORMATS, list({one.file for one in asked}), others)
        found = _run(flags, user, made, metric, answers, is_demo(inputs[0]))
    told: dict[str, object] = {**found.to_dict(), "file": None}
    yaml = [path for path in flags.saves if path.suffix.lower() != ".json"]
    rest = [path for path in flags.saves if path not in yaml]
    makers = {
        **dict.fromkeys((".yaml", ".yml"), lambda: found.to_yaml().encode()),
        ".json": lambda: json_file(told),
    }
    try:
        for path in write_saves(yaml if found.chosen else (), makers):
            told["file"] = str(path)
        list(write_saves(rest, makers))
    finally:  # a file that can't be written costs no table
        show_tables(told, flags.json, flags.quiet, tuning.show_tuning, tuning.show_notes)
    if found.chosen is None:
        raise VtpruneError(*found.reason)


@contextmanager
def _questions(inputs: tuple[str, ...], flags: Flags) -> Iterator[list[Asked]]:
    from vtprune.evaluation.run import first_questions

    if len(inputs) == 1 and is_demo(inputs[0]):
        with demo_questions(flags.limit, "dev") as asked:
            yield asked
    else:
        asked = listed_or_media(inputs, flags.question, limits_from(flags))[0]
        yield first_questions(asked, flags.limit)


def _run(
    flags: Flags, user: Flags, made: Plan, metric: str, answers: Path | None, demo: bool
) -> Tuned:
    from vtprune.cli.output import progress_line
    from vtprune.evaluation.tuning.run import tune as search
    from vtprune.models.loading import load

    settings = settings_from(flags, user, made.lineup.media, metric, demo)
    with progress_line(flags.quiet) as show:
        loaded = load(**loading_from(flags, user), on_progress=show)
        return search(loaded, made, settings, answers, show)
