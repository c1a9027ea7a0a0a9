"""What a command asks under which variants, and how answers are scored."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vtprune.cli.flags import (
    check_at,
    generation_from,
    limits_from,
    read_question,
    sampling_from,
)
from vtprune.cli.options import Flags, method_options, refuse_unused
from vtprune.errors import VtpruneError, brief_path
from vtprune.inference.questions_file import KEYS

if TYPE_CHECKING:
    from vtprune.evaluation.needles.planting import NeedlePlan
    from vtprune.evaluation.runner import AskSettings
    from vtprune.evaluation.variants import VariantList
    from vtprune.inference.questions_file import Asked, FaultyRow
    from vtprune.media import AskedMedia
    from vtprune.preset import Preset

LONGEST = 64  # tokens of an answer
DEMO, DEMO_QUESTIONS = "demo", 200


def columns_from(flags: Flags, keys: Sequence[str] = KEYS) -> dict[str, str]:
    """Return which columns of a list hold what.

    Args:
        keys: that there are.

    Raises:
        VtpruneError: a part of --columns that is no KEY=COLUMN, or of another key.
    """
    columns: dict[str, str] = {}
    for part in flags.columns:
        key, _, column = (text.strip() for text in part.partition("="))
        if key not in keys or not column or key in columns:
            raise VtpruneError(
                f"--columns {part} is not KEY=COLUMN, once for each key",
                f"keys: {', '.join(keys)}; for example --columns file=image,question=text",
            )
        columns[key] = column
    return columns


def asked_paths(asked: Iterable[Asked]) -> list[str | Path]:
    """Return the files that questions are about, without what lies in tables."""
    from vtprune.media import MediaGroup

    media = dict.fromkeys(question.file for question in asked)
    items = [
        item for one in media for item in (one.items if isinstance(one, MediaGroup) else [one])
    ]
    return [item for item in items if isinstance(item, Path)]


def is_demo(source: str) -> bool:
    """Return whether the embedded world's questions are meant, and no file of that name."""
    return source == DEMO and not os.path.isfile(source)


@contextmanager
def demo_questions(limit: int | None, split: str) -> Iterator[list[Asked]]:
    """Yield the embedded world's questions, written to a folder that is removed afterwards."""
    from vtprune import demo
    from vtprune.inference.questions_file import read_questions

    num = DEMO_QUESTIONS if limit is None else limit
    if num < 1:
        raise VtpruneError(f"--limit {num} is out of range", "1 or more")
    with tempfile.TemporaryDirectory(prefix="vtprune-demo-") as folder:
        demo.write(folder, num, 0, split)
        yield read_questions(Path(folder) / "questions.jsonl")


def listed_or_media(
    inputs: Sequence[str], questions: Sequence[str], columns: Mapping[str, str]
) -> tuple[Sequence[Asked | FaultyRow], str]:
    """Return the questions of a list, or those given about every file, and their source's name.

    Args:
        columns: as of `read_questions`.

    Raises:
        VtpruneError: a list that is not alone.
    """
    from vtprune.inference.questions_file import Asked, read_askable
    from vtprune.inference.tables import is_list
    from vtprune.media import file_name

    lists = [name for name in inputs if is_list(name)]
    if lists:
        if len(inputs) > 1 or questions:
            raise VtpruneError(
                f"{lists[0]} has its own files and questions", "give it alone, without MEDIA and -q"
            )
        return read_askable(lists[0], columns), Path(lists[0]).name
    _refuse_columns()
    if not questions:
        raise click.UsageError(
            "Missing option '-q', or give a QUESTIONS.jsonl.", click.get_current_context()
        )
    texts = [read_question(text) for text in questions]
    asked = [Asked(Path(file_name(name)), text) for name in inputs for text in texts]
    return asked, f"{len(inputs)} files of one's own"


@contextmanager
def asked_questions(
    inputs: Sequence[str],
    flags: Flags,
    split: str,
    media: bool = True,
) -> Iterator[tuple[list[Asked], dict[int, VtpruneError]]]:
    """Yield the questions of a list, those about media, or the embedded world's.

    Beside them are the errors of those that can't be asked, by their numbers.

    Args:
        split: of the embedded world, "dev" or "test".
        media: inputs may be media files; else a list, whatever its name.

    Raises:
        VtpruneError: as `listed_or_media`; a metric or limit that does not fit.
    """
    from vtprune.evaluation.scoring import check_choices, check_metric
    from vtprune.inference.questions_file import open_questions, read_askable
    from vtprune.serving.requests import is_media

    check_metric(flags.metric, "--metric")
    if len(inputs) == 1 and is_demo(inputs[0]):
        if flags.question:
            raise VtpruneError(f"{DEMO} has its own questions", "leave -q out")
        _refuse_columns()
        with demo_questions(flags.limit, split) as asked:
            check_choices(flags.metric, asked, "--metric")
            yield asked, {}
    else:
        if not media and is_media(inputs[0]):
            raise VtpruneError(
                f"{brief_path(inputs[0])}: a picture or video, and no list of questions",
                'vtprune evaluate takes media with -q "what is it?", --needle or --captions 5',
            )
        columns = columns_from(flags)
        listed = (
            listed_or_media(inputs, flags.question, columns)[0]
            if media
            else read_askable(inputs[0], columns)
        )
        asked, failed = open_questions(listed, limits_from(flags), flags.limit)
        check_choices(flags.metric, asked, "--metric")
        yield asked, failed


@contextmanager
def asked_media(inputs: Sequence[str], flags: Flags, split: str) -> Iterator[list[AskedMedia]]:
    """Yield the files of a list, or media as they are given, or the embedded world's; each once.

    Args:
        split: as of `asked_questions`.

    Raises:
        VtpruneError: a list that is not alone, or is wrong; no file opens.
    """
    from vtprune.inference.questions_file import Asked, limit_questions, open_questions
    from vtprune.inference.tables import is_list
    from vtprune.media import MediaGroup, file_name

    if any(is_list(name) for name in inputs) or (len(inputs) == 1 and is_demo(inputs[0])):
        with asked_questions(inputs, replace(flags, question=()), split) as (asked, _):
            groups = (
                each.file.items if isinstance(each.file, MediaGroup) else (each.file,)
                for each in asked
            )
            yield list(dict.fromkeys(medium for group in groups for medium in group))
    else:
        _refuse_columns()
        files: list[AskedMedia] = [
            Path(file_name(name)) for name in limit_questions(inputs, flags.limit)
        ]
        open_questions([Asked(file, "") for file in files], limits_from(flags))
        yield files


def _refuse_columns() -> None:
    refuse_unused(["columns"], "without a list of questions of your own", "leave it out")


def needles_from(flags: Flags) -> NeedlePlan:
    """Return which needles are planted.

    Raises:
        VtpruneError: a kind that there is not, or a size that is no share.
    """
    from vtprune.evaluation.needles.planting import NeedlePlan

    try:
        sizes = tuple(float(size) for size in flags.needle_sizes)
    except ValueError:
        raise VtpruneError(
            f"--needle-sizes {','.join(flags.needle_sizes)} are not all numbers",
            "shares of the shorter side, such as --needle-sizes 0.05,0.1",
        ) from None
    return NeedlePlan(
        flags.needle_kinds, sizes, flags.needle_count, flags.needle_frames, flags.seed or 0
    )


def variants_from(flags: Flags, user: Flags) -> VariantList:
    """Return the variants of a table; of the user's preset where none is named.

    Raises:
        VtpruneError: every fault of what was asked.
    """
    from vtprune.evaluation.variants import list_variants
    from vtprune.preset import DEFAULT

    check_at(flags)
    presets = flags.presets
    if not (flags.methods or presets):
        presets = (user.preset or DEFAULT,)
    options = method_options(flags.option)
    return list_variants(flags.methods, flags.keeps, presets, flags.at, options, flags.seed)


def settings_from(flags: Flags, user: Flags, media: Preset, demo: bool = False) -> AskSettings:
    """Return how questions are asked and scored.

    Args:
        media: the preset that says how frames and tiles are sampled.
        demo: the questions are the embedded world's.
    """
    from vtprune.demo.score import rate
    from vtprune.evaluation.runner import AskSettings

    metric = flags.metric
    settings = AskSettings(
        sampling=sampling_from(media, flags),
        generation=generation_from(flags, user, longest=flags.max_new_tokens or LONGEST).greedy,
        limits=limits_from(flags),
        metric=metric,
    )
    if demo and metric == "auto":
        return replace(settings, score=rate, metric="demo")
    return settings
