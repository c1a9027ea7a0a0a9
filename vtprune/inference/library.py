"""What Python code calls: a question, or many of them, in one line."""

from __future__ import annotations

import reprlib
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from vtprune.errors import MediaError, ModelError, VtpruneError
from vtprune.inference.answer_questions import answer_questions
from vtprune.inference.generate import Generation, Run, generate
from vtprune.inference.measuring import build_report
from vtprune.inference.prepare import group_alike, prepare_question, sampling_of, with_sampling
from vtprune.inference.prompt_media import (
    Media,
    PromptMedia,
    attempt,
    load_with_each_media,
    read_media,
)
from vtprune.inference.report import FailedReport, Report
from vtprune.media import Limits
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded, find_loaded, open_model
from vtprune.preset import Keep, Preset, load_preset, override


def ask(
    model: nn.Module | Loaded | str | Path | None,
    media: Media,
    question: str,
    preset: str | Path | Mapping[str, object] | Preset | None = None,
    keep: Keep | None = None,
    *,
    method: str | None = None,
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
    seed: int | None = None,
    sampling: Sampling | None = None,
    generation: Generation | None = None,
    limits: Limits | None = None,
    compare: bool = False,
) -> Report:
    """Answer one question about pictures or videos.

    >>> import vtprune
    >>> report = vtprune.ask(None, "clip.mp4", "what moves?", keep=0.3)
    >>> print(report.answer, report.tokens.kept_after)

    Args:
        model: a loaded transformers model (or what holds one, such as a PEFT model), what
            `vtprune.load` gave, a name as for `load`, or None for the embedded one.
        media: a file or several.
        preset: packaged name, path, mapping or Preset; None: "balanced".
        keep: the layer average of the kept fraction, for all modalities or by modality.
        method: one method in place of the preset's stages; `at` where it cuts, `options` its own.
        seed: of all random choices; None: the preset's.
        sampling: how much of the media is taken; None: as the preset says.
        generation: how the answer is chosen; None: greedily.
        limits: of what is read.
        compare: answer without pruning too, and measure the speed-up.

    Raises:
        VtpruneError: of any kind, with the way out.
    """
    return answer(
        model, [(media, question)], preset, keep, method=method, at=at, options=options, seed=seed,
        sampling=sampling, generation=generation, limits=limits, compare=compare,
    )[0]  # fmt: skip


def answer(
    model: nn.Module | Loaded | str | Path | None,
    items: Sequence[tuple[Media, str]],
    preset: str | Path | Mapping[str, object] | Preset | None = None,
    keep: Keep | None = None,
    *,
    method: str | None = None,
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
    seed: int | None = None,
    sampling: Sampling | None = None,
    generation: Generation | None = None,
    limits: Limits | None = None,
    compare: bool = False,
    batch_size: int = 8,
) -> list[Report]:
    """Answer a question about each item's media, many at once in left-padded batches.

    >>> import vtprune
    >>> items = [("clip.mp4", "what moves?"), ("page.png", "what is the total?")]
    >>> for report in vtprune.answer(None, items, keep=0.3):
    ...     print(report.error or report.answer)

    Args:
        items: (a file or several, a question).
        compare: answer without pruning too, one item at a time, and measure the speed-up.
        batch_size: the most items in one batch.
        model, preset, keep, method, at, options, seed, sampling, generation, limits: as of `ask`.

    Returns:
        One report an item, in order. An item that can't be answered has a FailedReport, whose
        `error` says why; that of all others is None. Seconds of vision, prefill, decode and total
        are the batch's. The total of the first batch is from this call on, which loads the model
        and reads all media; that of every other from the end of the batch before.

    Raises:
        VtpruneError: what concerns all items, or every item failed: then the first one's error.
    """
    began = time.perf_counter()
    check_call(model, items, batch_size)
    loads = model is None or isinstance(model, (str, Path))
    resolved = override(load_preset(preset), keep, method, at, options, seed)
    sampling = sampling or sampling_of(resolved)
    resolved = with_sampling(resolved, sampling)
    generation = generation or Generation(seed=resolved.seed)
    limits = limits or Limits()
    files = [[media] if isinstance(media, (str, Path)) else list(media) for media, _ in items]
    questions = [question for _, question in items]
    results: list[Report | VtpruneError]
    if compare:
        loaded = find_loaded(model)
        results = []
        for number, (paths, question) in enumerate(zip(files, questions, strict=True)):
            since = began if loads and not number else None
            one_report = answer_questions(
                loaded,
                paths,
                [question],
                resolved,
                sampling=sampling,
                generation=generation,
                limits=limits,
                compare=True,
                since=since,
            )
            results.append(attempt(partial(next, one_report)))
    else:
        loaded, media = read_all_media(model, files, sampling, resolved, limits)
        results = answer_batches(
            loaded, media, questions, resolved, generation, batch_size, began,
            loaded.seconds if loads else 0.0,
        )  # fmt: skip
    errors = [result for result in results if isinstance(result, VtpruneError)]
    if errors and len(errors) == len(items):
        raise errors[0]
    return [
        FailedReport(question, [str(path) for path in paths], result)
        if isinstance(result, VtpruneError)
        else result
        for result, question, paths in zip(results, questions, files, strict=True)
    ]


def check_call(model: object, items: Sequence[tuple[Media, str]], batch_size: int) -> None:
    """Refuse arguments that are of another type, or say nothing to answer about.

    Raises:
        VtpruneError: the first of them.
    """
    if model is not None and not isinstance(model, (str, Path, Loaded, nn.Module)):
        raise ModelError(
            f"the model is {reprlib.repr(model)}, which is no model and no name of one",
            "give a transformers model, what vtprune.load returned, a name or path, or None",
        )
    if not batch_size >= 1:
        raise VtpruneError(
            f"batch_size is {batch_size}, but must be at least 1",
            "use 1 to answer one item at a time",
        )
    for media, question in items:
        files = [media] if isinstance(media, (str, Path)) else media
        if not isinstance(files, Sequence) or not all(isinstance(f, (str, Path)) for f in files):
            raise MediaError(
                f"the media are {reprlib.repr(media)}, but must be a path or a list of paths",
                "give the path of a picture or video, or several in a list",
            )
        if not files:
            raise MediaError(
                "the list of media is empty, but a question needs at least one file",
                "give the path of a picture or video, or several in a list",
            )
        if not isinstance(question, str):
            raise VtpruneError(
                f"the question is {reprlib.repr(question)}, but must be text",
                "give the question as a string",
            )


def read_all_media(
    model: nn.Module | Loaded | str | Path | None,
    prompts: Sequence[Sequence[str | Path]],
    sampling: Sampling,
    preset: Preset,
    limits: Limits,
) -> tuple[Loaded, list[PromptMedia | VtpruneError]]:
    """Return the model and each prompt's media; both are read at once where it has to be loaded."""
    if prompts and (model is None or isinstance(model, (str, Path))):
        opened = open_model(None if model is None else str(model))
        return load_with_each_media(opened, prompts, sampling, preset, limits)
    loaded = find_loaded(model)
    return loaded, [
        attempt(partial(read_media, loaded, paths, sampling, preset, limits)) for paths in prompts
    ]


def answer_batches(
    loaded: Loaded,
    media: Sequence[PromptMedia | VtpruneError],
    questions: Sequence[str],
    preset: Preset,
    generation: Generation,
    batch_size: int,
    began: float,
    load: float,
) -> list[Report | VtpruneError]:
    """Answer one question about each of the media; an item that fails has its error."""
    prepared = [
        item
        if isinstance(item, VtpruneError)
        else attempt(partial(prepare_question, loaded, item, question, generation, on_device=False))
        for item, question in zip(media, questions, strict=True)
    ]
    good = {n: item for n, item in enumerate(prepared) if not isinstance(item, VtpruneError)}
    results: dict[int, Report | VtpruneError] = {
        n: item for n, item in enumerate(prepared) if isinstance(item, VtpruneError)
    }

    def run_batch(numbers: Sequence[int]) -> dict[int, Run | VtpruneError]:
        """Return the runs of a batch; one that fails is run item by item."""
        batch = [good[number] for number in numbers]
        runs = attempt(partial(generate, loaded, batch, preset, generation))
        if not isinstance(runs, VtpruneError):
            note = f"one of a batch of {len(runs)}: seconds from vision on are the batch's"
            notes = (note,) if len(runs) > 1 else ()
            return {n: run.noting(*notes) for n, run in zip(numbers, runs, strict=True)}
        if len(numbers) == 1:
            return {numbers[0]: runs}
        return {n: result for n in numbers for result in run_batch([n]).values()}

    order = list(good)
    first = min(good, default=0)
    for places in group_alike([good[number].tensors for number in order], batch_size):
        for number, run in run_batch([order[place] for place in places]).items():
            if isinstance(run, VtpruneError):
                results[number] = run
                continue
            results[number] = build_report(loaded, good[number], preset, run, began=began,
                                           load=0.0 if number != first else load)  # fmt: skip
        began = time.perf_counter()
    return [results[number] for number in range(len(questions))]
