"""Which questions a command asks, and how their answers are scored."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune.cli.flags import limits_from, read_question, sampling_from
from vtprune.cli.options import Flags
from vtprune.errors import VtpruneError

if TYPE_CHECKING:
    from vtprune.evaluation.answering import Settings
    from vtprune.inference.questions_file import Asked
    from vtprune.media import Limits
    from vtprune.preset import Preset

LONGEST = 64  # tokens of an answer
DEMO, DEMO_QUESTIONS = "demo", 200


def check_metric(metric: str) -> None:
    """Refuses a metric that there is not.

    Raises:
        VtpruneError: names those there are.
    """
    from vtprune.evaluation.scoring import METRICS

    if metric not in METRICS:
        raise VtpruneError(f"--metric {metric} is unknown", f"choose from {', '.join(METRICS)}")


def check_choices(metric: str, asked: Sequence[Asked]) -> None:
    """Refuses to score by choices where there are none.

    Raises:
        VtpruneError: names the first such question.
    """
    bare = next((one for one in asked if not one.choices), None)
    if metric == "choice" and bare is not None:
        raise VtpruneError(
            f"--metric choice, but {bare.question!r} about {bare.file.name} has no choices",
            "give every question its choices, or another --metric",
        )


def is_demo(source: str) -> bool:
    """Whether the embedded world's questions are meant, and no file of that name."""
    return source == DEMO and not os.path.isfile(source)


@contextmanager
def demo_questions(limit: int | None, split: str) -> Iterator[list[Asked]]:
    """The embedded world's questions, written to a folder that goes afterwards."""
    from vtprune import demo
    from vtprune.inference.questions_file import read_questions

    num = DEMO_QUESTIONS if limit is None else limit
    if num < 1:
        raise VtpruneError(f"--limit {num} is out of range", "1 or more")
    with tempfile.TemporaryDirectory(prefix="vtprune-demo-") as folder:
        demo.write(folder, num, 0, split)
        yield read_questions(Path(folder) / "questions.jsonl")


def listed_or_media(
    inputs: Sequence[str], given: Sequence[str], limits: Limits
) -> tuple[list[Asked], str]:
    """The questions of a list, or those given, about every file; and what they are called.

    Raises:
        VtpruneError: a list that is not alone, or a file that can't be opened.
    """
    from vtprune.inference.questions_file import Asked, read_questions
    from vtprune.media import file_name, open_sources

    lists = [one for one in inputs if one.lower().endswith((".jsonl", ".json"))]
    if lists:
        if len(inputs) > 1 or given:
            raise VtpruneError(
                f"{lists[0]} brings its own files and questions", "give it alone, without -q"
            )
        asked, source = read_questions(lists[0]), Path(lists[0]).name
    elif given:
        questions = [read_question(one) for one in given]
        asked = [Asked(Path(file_name(one)), question) for one in inputs for question in questions]
        source = f"{len(inputs)} files of one's own"
    else:
        raise click.UsageError(
            "Missing option '-q', or give a QUESTIONS.jsonl.", click.get_current_context()
        )
    open_sources(dict.fromkeys(one.file for one in asked), limits)  # before a long load
    return asked, source


def settings_from(flags: Flags, user: Flags, media: Preset, metric: str, demo: bool) -> Settings:
    """How questions are asked and scored.

    Args:
        media: the preset that says how much of the media is looked at.
        demo: the questions are the embedded world's.
    """
    from vtprune.demo.score import rate
    from vtprune.evaluation.answering import Settings
    from vtprune.evaluation.scoring import score
    from vtprune.inference.generation import Generation

    settings = Settings(
        sampling=sampling_from(media, flags),
        generation=Generation(
            flags.max_new_tokens or LONGEST,
            system=flags.system if flags.system is not None else user.system or "",
        ),
        limits=limits_from(flags),
        score=lambda asked, given: score(asked.answer or "", given, asked.choices, metric),
        metric=metric,
    )
    if demo and metric == "auto":
        return replace(settings, score=rate, metric="demo")
    return settings
