"""Answer questions about the same media, one after the other: prepare, generate, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from vtprune.engine.inputs import FeatureCache
from vtprune.errors import ModelError
from vtprune.inference.compare import compare_runs
from vtprune.inference.generate import Generation, generate
from vtprune.inference.measuring import build_report
from vtprune.inference.prepare import (
    PreparedQuestion,
    prepare_question,
    sampling_of,
    with_sampling,
)
from vtprune.inference.prompt_media import PromptMedia, read_in_full, read_media
from vtprune.inference.report import Report
from vtprune.media import Limits, Medium
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded, Progress
from vtprune.preset import Preset

SAMPLED_WARNING = (
    "the answer was sampled; the comparison holds a greedy answer of the pruned model against a "
    "greedy one of the unpruned"
)


def answer_questions(
    loaded: Loaded,
    paths: Sequence[Medium] | PromptMedia,
    questions: Sequence[str],
    preset: Preset,
    *,
    sampling: Sampling | None = None,
    generation: Generation | None = None,
    limits: Limits | None = None,
    compare: bool = False,
    since: float | None = None,
    startup: float = 0.0,
    on_text: Callable[[str], None] | None = None,
    on_question: Callable[[int, str], None] | None = None,
    on_progress: Progress | None = None,
) -> Iterator[Report]:
    """Answer questions about the same media, which are decoded and encoded once.

    Args:
        paths: pictures and videos, as files or in memory; or read already.
        sampling: how much of them; None: the preset's, else the family's own.
        compare: measure the unpruned model beside it, the vision tower included.
        since: when the command began that this is done for, which has loaded the model too, on
            `time.perf_counter`'s clock; None: with this call.
        startup: of the seconds since then, what interpreter and imports took.
        on_text: gets the pieces of an answer as they are produced.

    Yields:
        One report a question. Start-up, loading, media and vision seconds are in the first, which
        paid for them. The first's total is from `since` to the end of its answer, every other's
        from the beginning of its question; measuring for `compare` is in none.

    Raises:
        MediaError, ModelError, PresetError: with the way out.
    """
    began = time.perf_counter() if since is None else since
    sampling = sampling or sampling_of(preset)
    preset = with_sampling(preset, sampling)
    generation = generation or Generation(seed=preset.seed)
    limits = limits or Limits()
    prompt_media = paths
    if not isinstance(prompt_media, PromptMedia):
        prompt_media = read_media(loaded, prompt_media, sampling, preset, limits, on_progress)
    if compare and prompt_media.stream is not None:
        raise ModelError(
            f"{prompt_media.stream.source.name} is encoded in segments, and the unpruned run of a "
            "comparison holds all frames at once",
            "leave the comparison out, or give fewer frames, without --stream",
        )
    full = prompt_media
    if compare and prompt_media.full_size:
        full = read_in_full(loaded, prompt_media.sources, sampling, limits, on_progress)
    load = 0.0 if since is None else loaded.seconds
    features: FeatureCache = {}
    prepared: PreparedQuestion | None = None
    unpruned: PreparedQuestion | None = None
    for number, question in enumerate(questions):
        if on_question:
            on_question(number, question)
        if number:
            began, startup, load = time.perf_counter(), 0.0, 0.0
        prepared = prepare_question(loaded, prompt_media, question, generation, prepared)
        (run,) = generate(
            loaded, [prepared], preset, generation, features=features, listeners=[on_text]
        )
        report = build_report(
            loaded, prepared, preset, run, began=began, startup=startup, load=load
        )
        if number and report.flops.vision is not None:  # encoded for the first question
            report = replace(report, flops=replace(report.flops, vision=0.0))
        if compare:
            if full is not prompt_media:
                unpruned = prepare_question(loaded, full, question, generation, unpruned)
            compared = compare_runs(
                loaded, prepared, preset, generation, run, report, on_progress, unpruned
            )
            notes = (SAMPLED_WARNING,) if generation.temperature > 0 else ()
            report = replace(report, compare=compared, warnings=(*report.warnings, *notes))
        yield report
