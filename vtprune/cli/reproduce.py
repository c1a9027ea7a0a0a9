"""`vtprune reproduce`: a published table beside one's own figures."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click

from vtprune.cli.asking import LONGEST, asked_paths, asked_questions, is_demo, settings_from
from vtprune.cli.flags import loading_from
from vtprune.cli.help import Command
from vtprune.cli.options import LOADING, MEDIA, MODEL, Flags, refuse_unused, takes
from vtprune.cli.results import TABLES, check_saves, json_file, list_and_save, save_and_show

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vtprune.errors import VtpruneError
    from vtprune.evaluation.evaluate import Evaluation
    from vtprune.evaluation.runner import AskSettings
    from vtprune.evaluation.variants import Variant
    from vtprune.inference.questions_file import Asked
    from vtprune.models.loading import Progress

FORMATS = (".json", *TABLES)
WHICH_MODEL = ("model", "adapter")
ASKING = ("seeds", *MEDIA, "columns", "limit", "metric", "system", "max_new_tokens", "answers")
OF_QUESTIONS = (*ASKING, *(name for name in LOADING if name not in WHICH_MODEL))
"""Options that change nothing where no questions are given."""
OF_TABLE = ("seed", *WHICH_MODEL, "calibration")
"""Options that change nothing where no table is given."""
EPILOG = """\b
Examples:
  vtprune reproduce
  vtprune reproduce entropyprune-llava-1.5
  vtprune reproduce entropyprune-llava-1.5 gqa.jsonl --metric exact
  vtprune reproduce embedded demo --limit 100
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("table", required=False, metavar="[TABLE]")
@click.argument("questions", required=False, metavar="[QUESTIONS.jsonl]")
@takes(
    "seed",
    *MODEL,
    *ASKING,
    "json",
    "saves",
    "quiet",
    default_words={"model": "that of the table", "max_new_tokens": str(LONGEST)},
    save=[("everything", ".json"), ("the rows", ".csv"), ("the tables", ".md or .tex")],
)
def reproduce(table: str | None, questions: str | None, flags: Flags) -> None:
    """Run a published table, and put its figures beside those that come out here.

    TABLE is a packaged one, or a YAML file with the same keys; without it, the packaged ones are
    listed. Its rows have the keeps, layers, positions and norms of their authors' code. Alone, it
    gives tokens and FLOPs, without weights; with QUESTIONS.jsonl, a list as vtprune evaluate takes
    it, also the score of every row as a share of the unpruned model's, with its interval.
    """
    from vtprune.cli.config import load_config
    from vtprune.cli.console.reproduction import show_notes, show_reproduction, show_tables
    from vtprune.evaluation.reproduction.tables import load_table, table_names

    if questions is None:
        refuse_unused(OF_QUESTIONS, "without QUESTIONS.jsonl: nothing is asked",
                      "give a list of questions")  # fmt: skip
    if table is None:
        refuse_unused(OF_TABLE, "without TABLE: the packaged tables are listed", "name a table")
        tables = [load_table(name) for name in table_names()]
        list_and_save([one.to_dict() for one in tables], flags,
                      lambda console: show_tables(tables, console))  # fmt: skip
        return
    user = load_config()
    published = load_table(table)
    others = {"--answers": flags.answers}
    check_saves(flags.saves, FORMATS, [questions] if questions else [], others)
    if flags.model is None and not flags.adapter:
        flags = replace(flags, model=published.model)

    from vtprune.cli import output
    from vtprune.preset import Preset

    with output.libraries_silenced(), _opened(questions, flags) as (asked, failed):
        check_saves(flags.saves, FORMATS, asked_paths(asked), others)
        with output.importing(flags.quiet):
            from vtprune.evaluation.reproduction.reproduce import run_table
            from vtprune.models.loading import find_base
        model, _ = find_base(loading_from(flags, user)["name"], flags.adapter)
        with output.progress_line(flags.quiet) as show:
            ask = None
            if questions is not None:
                settings = settings_from(flags, user, Preset(), is_demo(questions))
                ask = partial(_evaluate, asked, failed, settings, flags, user, show)
            result = run_table(
                published, model, flags.seed, flags.seeds, flags.calibration, show, ask
            )
        makers = {
            ".json": lambda: json_file(result.to_dict()),
            ".csv": lambda: result.to_csv().encode(),
        }
        save_and_show(result, flags, makers, show_reproduction, show_notes)


def _opened(
    questions: str | None, flags: Flags
) -> AbstractContextManager[tuple[list[Asked], dict[int, VtpruneError]]]:
    """Return the questions of a list and the errors of those that can't be asked; or none."""
    if questions is None:
        return nullcontext(([], {}))
    return asked_questions([questions], flags, "test", media=False)


def _evaluate(
    asked: list[Asked],
    failed: Mapping[int, VtpruneError],
    settings: AskSettings,
    flags: Flags,
    user: Flags,
    show: Progress,
    variants: Sequence[Variant],
) -> tuple[list[Asked], Evaluation]:
    """Ask questions under every row."""
    from vtprune.evaluation.evaluate import evaluate
    from vtprune.models.loading import load

    loaded = load(**loading_from(flags, user), on_progress=show)
    result = evaluate(loaded, asked, variants, settings, flags.answers, show)
    return asked, replace(result, failed=failed)
