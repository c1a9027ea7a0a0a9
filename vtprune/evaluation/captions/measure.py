"""Sample captions of every file under every variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vtprune.errors import VtpruneError
from vtprune.evaluation.captions.result import CaptionTest, caption_key, make_rows
from vtprune.evaluation.damaged import DamagedFiles
from vtprune.evaluation.evaluate import (
    default_places,
    file_names,
    rough_intervals,
    settings_head,
)
from vtprune.evaluation.records import AnswersFile, Record
from vtprune.evaluation.runner import AskSettings, FileRunner, group_by_file
from vtprune.evaluation.variants import UNPRUNED, Variant
from vtprune.inference.generate import Generation, generate
from vtprune.inference.measuring import describe_model, describe_versions
from vtprune.inference.questions_file import Asked

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded, Progress


def check_sampled(generation: Generation, number: int) -> None:
    """Refuse captions that could not be compared.

    Raises:
        VtpruneError: one caption of each file, or the same one each time.
    """
    if number < 2:
        raise VtpruneError(f"captions {number} is out of range", "2 or more, to compare them")
    if not generation.temperature > 0:
        raise VtpruneError(
            "captions are sampled, and temperature 0 gives the same one each time",
            "give --temperature 1",
        )


def measure_captions(
    loaded: Loaded,
    asked: Sequence[Asked],
    variants: Sequence[Variant],
    number: int,
    settings: AskSettings,
    path: Path | None = None,
    on_progress: Progress | None = None,
    notes: Sequence[str] = (),
) -> CaptionTest:
    """Sample captions under every variant, and compare them.

    A file that opens but can't be decoded is left out, as by `evaluate`.

    Args:
        asked: what asks for a caption of each file; its right answers are the references.
        number: of captions of each, with seeds from that of `settings.generation` on.
        settings: its generation samples.
        path: where the captions are kept, as of `evaluate`.

    Raises:
        VtpruneError: of any kind, with the way out.
    """
    generation = settings.generation
    check_sampled(generation, number)
    sampled_as = [generation.temperature, generation.top_p, generation.seed]
    head = {**settings_head(loaded, asked, settings), "captions": sampled_as}
    damaged = DamagedFiles()
    with AnswersFile(path, head, len(asked), asked) as answers:
        done = 0
        for numbers in group_by_file(asked):
            if on_progress:
                on_progress("captioning", done, len(asked))
            with damaged.leaving_out(asked[numbers[0]].file):
                _sample(loaded, asked, numbers, variants, number, settings, answers)
            done += len(numbers)
    left_out = damaged.warnings(asked)
    asked, records = damaged.without_damaged(asked, answers.records)
    files = file_names(asked)
    rows, rows_notes = make_rows(asked, variants, number, records)
    warnings = [*loaded.warnings, *notes, *default_places(loaded, variants), *left_out,
                *rough_intervals(len(files)), *rows_notes]  # fmt: skip
    return CaptionTest(
        model=describe_model(loaded),
        rows=tuple(rows),
        captions=number,
        temperature=generation.temperature,
        top_p=generation.top_p,
        questions=len(asked),
        version=describe_versions(),
        warnings=tuple(dict.fromkeys(warnings)),
        media=files,
    )


def _sample(
    loaded: Loaded,
    asked: Sequence[Asked],
    numbers: Sequence[int],
    variants: Sequence[Variant],
    captions: int,
    settings: AskSettings,
    answers: AnswersFile,
) -> None:
    """Sample what is missing of the captions of one file."""
    missing = [
        (place, question, variant, turn)
        for place, question in enumerate(numbers)
        for variant in variants
        for turn in range(captions)
        if not answers.has(question, caption_key(variant, turn))
    ]
    if not missing:
        return
    # nothing is forced: one token stands for the answers that it would want
    known = [torch.zeros(1, dtype=torch.long)] * len(numbers)
    runner = FileRunner(loaded, [asked[question] for question in numbers], settings, known=known)
    for place, question, variant, turn in missing:
        key = caption_key(variant, turn)
        seed = settings.generation.seed + turn
        try:
            if variant.error is not None:
                raise variant.error
            prompt = runner.sampled(variant.preset).prompts[place]
            (run,) = generate(
                loaded,
                [prompt.prepared],
                variant.preset,
                replace(settings.generation, seed=seed),
                features=runner.features,
            )
        except VtpruneError as error:
            if variant.role == UNPRUNED:
                raise
            answers.add([Record(question, key, error=error.message)])
            continue
        keep_mean = run.trace.keep_mean(run.sample)
        prefill = run.seconds.get("prefill", 0.0)
        answers.add([Record(question, key, run.answer, keep_mean=keep_mean, prefill=prefill)])
