"""`vtprune evaluate`: does the answer survive?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from vtprune.cli.asking import (
    LONGEST,
    asked_media,
    asked_paths,
    asked_questions,
    is_demo,
    needles_from,
    settings_from,
    variants_from,
)
from vtprune.cli.flags import generation_from, loading_from
from vtprune.cli.help import Command
from vtprune.cli.options import MEDIA, MODEL, NEEDLES, ROWS, Flags, refuse_unused, takes
from vtprune.cli.results import (
    CHARTS_TEXT,
    FULL_TEXT,
    SUFFIXES,
    check_saves,
    row_makers,
    save_and_show,
)
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtprune.evaluation.variants import VariantList

TEMPERATURE = 1.0  # of captions; all other answers are greedy
DESCRIBE = "Describe it in one sentence."

EPILOG = """\b
Examples:
  vtprune evaluate questions.jsonl --model qwen2.5-vl-7b --answers a.jsonl
  vtprune evaluate questions.jsonl --methods entropy,divprune --save q.png
  vtprune evaluate demo --presets balanced,fast --keep 0.3
  vtprune evaluate *.jpg clip.mp4 --needle --model qwen2.5-vl-7b --keep 0.3
  vtprune evaluate captions.jsonl --captions 5 --model qwen2.5-vl-7b
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("inputs", nargs=-1, required=True, metavar="QUESTIONS.jsonl | MEDIA...")
@takes(
    *ROWS,
    "beside",
    "turns",
    "seeds",
    *MODEL,
    *MEDIA,
    "question",
    "columns",
    "limit",
    "metric",
    "system",
    *NEEDLES,
    "captions",
    "max_new_tokens",
    "temperature",
    "top_p",
    "answers",
    "json",
    "saves",
    "quiet",
    defaults={"keeps": ("0.5,0.3,0.1",), "temperature": TEMPERATURE},
    default_words={
        "presets": "balanced, where no method is named",
        "max_new_tokens": str(LONGEST),
    },
    save=[*FULL_TEXT, ("the rows, drawn", CHARTS_TEXT)],
)
def evaluate(inputs: tuple[str, ...], flags: Flags) -> None:
    """Ask many questions with and without pruning: does the answer survive?

    QUESTIONS.jsonl has lines as `vtprune demo` writes them: file, question and, where known,
    answer, choices and kind; a line that is wrong, or whose file is missing or can't be decoded, is
    named, counted and left out. With
    answers the table shows accuracy; without, how often the answer is the unpruned model's. The
    baselines random (a mean over seeds), uniform and downsample are always rows of the table.
    Intervals are of 95 %, by a bootstrap over files. QUESTIONS "demo" is the embedded model's own
    test set. With --needle, MEDIA need no questions: small changes are planted in them. With
    --captions, several answers to each question are sampled and compared.
    """
    from vtprune.cli.config import load_config

    user = load_config()
    check_saves(flags.saves, SUFFIXES, inputs, {"--answers": flags.answers})
    listed = variants_from(flags, user)
    _check(flags)
    if flags.needle:
        _needles(inputs, flags, user, listed)
    elif flags.captions is not None:
        _captions(inputs, flags, user, listed, flags.captions)
    else:
        _questions(inputs, flags, user, listed)


def _check(flags: Flags) -> None:
    """Refuse options of one way to evaluate beside another, in which they would change nothing."""
    if flags.needle and flags.captions is not None:
        raise VtpruneError("--needle and --captions exclude each other", "run one after the other")
    if flags.needle and flags.turns:
        raise VtpruneError(
            "--turns and --needle exclude each other: each medium has one needle, and one question",
            "leave one of them out",
        )
    if flags.needle:
        refuse_unused(["question"], "with --needle: each needle has a question of its own",
                      "leave it out")  # fmt: skip
        refuse_unused(["metric"], "with --needle: needles are scored by their kind", "leave it out")
    else:
        refuse_unused(NEEDLES, "without --needle: nothing is planted", "add --needle")
    if flags.captions is None:
        refuse_unused(["temperature", "top_p"],
                      "without --captions: all other answers are greedy",
                      "add --captions 5")  # fmt: skip
        return
    refuse_unused(["metric"], "with --captions: they are scored by CIDEr", "leave it out")
    for option, given in (("--turns", flags.turns), ("--beside", flags.beside)):
        if given:
            raise VtpruneError(f"{option} and --captions exclude each other", f"leave {option} out")


def _questions(inputs: Sequence[str], flags: Flags, user: Flags, listed: VariantList) -> None:
    """Ask the questions of a list."""
    from vtprune.cli import output
    from vtprune.cli.console.evaluation import show_evaluation, show_notes

    if len(inputs) > 1 and not flags.question:
        raise VtpruneError(
            f"{len(inputs)} lists of questions are given, and one is taken",
            "give one list, or media and -q; media without questions are for --needle",
        )
    with (
        output.libraries_silenced(),
        asked_questions(inputs, flags, "test", media=bool(flags.question)) as (asked, failed),
    ):
        check_saves(flags.saves, SUFFIXES, asked_paths(asked), {"--answers": flags.answers})
        with output.importing(flags.quiet):
            from vtprune.evaluation.evaluate import evaluate as run
            from vtprune.evaluation.evaluation_chart import plot
            from vtprune.evaluation.variants import repeat_variants
            from vtprune.models.loading import load

        variants = repeat_variants(listed, flags.seeds, flags.beside, flags.turns)
        settings = settings_from(flags, user, listed.media, is_demo(inputs[0]))
        with output.progress_line(flags.quiet) as show:
            loaded = load(**loading_from(flags, user), on_progress=show)
            result = run(loaded, asked, variants, settings, flags.answers, show, listed.notes)
        result = replace(result, failed=failed)
        makers = row_makers(result, lambda kind: plot(result, kind))
        save_and_show(result, flags, makers, show_evaluation, show_notes)


def _needles(inputs: Sequence[str], flags: Flags, user: Flags, listed: VariantList) -> None:
    """Plant needles in the media, and ask about them."""
    from vtprune.cli import output
    from vtprune.cli.console.needles import show_needles, show_notes

    loading = loading_from(flags, user)
    with output.libraries_silenced(), asked_media(inputs, flags, "test") as media:
        paths = [str(medium) for medium in media]
        check_saves(flags.saves, SUFFIXES, paths, {"--answers": flags.answers})
        with output.importing(flags.quiet):
            from vtprune.demo.needles import WORLD_MAKERS, has_world_words_alone
            from vtprune.evaluation.needles.chart import plot
            from vtprune.evaluation.needles.measure import measure_needles
            from vtprune.evaluation.needles.planting import plant_needles
            from vtprune.evaluation.variants import repeat_variants
            from vtprune.models.loading import load

        plan = needles_from(flags)
        settings = settings_from(flags, user, listed.media)
        with output.progress_line(flags.quiet) as show:
            loaded = load(**loading, on_progress=show)
            if has_world_words_alone(loaded.files.tokenizer):
                plan = replace(plan, makers=WORLD_MAKERS)
            show("planting needles", 0, 0)
            needles, notes = plant_needles(loaded, media, plan, settings.sampling, settings.limits)
            result = measure_needles(
                loaded,
                needles,
                repeat_variants(listed, flags.seeds, flags.beside),
                settings,
                flags.answers,
                show,
                (*listed.notes, *notes),
            )
        makers = row_makers(result, lambda kind: plot(result, kind))
        save_and_show(result, flags, makers, show_needles, show_notes)


def _captions(
    inputs: Sequence[str], flags: Flags, user: Flags, listed: VariantList, number: int
) -> None:
    """Sample captions, and compare them."""
    from vtprune.cli import output
    from vtprune.cli.console.captions import show_captions, show_notes
    from vtprune.inference.tables import is_list

    if not (flags.question or any(map(is_list, inputs)) or is_demo(inputs[0])):
        flags = replace(flags, question=(DESCRIBE,))
    with (
        output.libraries_silenced(),
        asked_questions(inputs, flags, "test") as (asked, failed),
    ):
        if is_demo(inputs[0]):
            asked = [question for question in asked if question.kind == "what_happens"]
        check_saves(flags.saves, SUFFIXES, asked_paths(asked), {"--answers": flags.answers})
        with output.importing(flags.quiet):
            from vtprune.evaluation.captions.chart import plot
            from vtprune.evaluation.captions.measure import check_sampled, measure_captions
            from vtprune.evaluation.variants import repeat_variants
            from vtprune.models.loading import load

        settings = settings_from(flags, user, listed.media)
        longest = settings.generation.max_new_tokens
        sampling = generation_from(flags, user, seed=flags.seed or 0, longest=longest)
        check_sampled(sampling, number)
        with output.progress_line(flags.quiet) as show:
            loaded = load(**loading_from(flags, user), on_progress=show)
            result = measure_captions(
                loaded,
                asked,
                repeat_variants(listed, flags.seeds),
                number,
                replace(settings, generation=sampling),
                flags.answers,
                show,
                listed.notes,
            )
        result = replace(result, failed=failed)
        makers = row_makers(result, lambda kind: plot(result, kind))
        save_and_show(result, flags, makers, show_captions, show_notes)
