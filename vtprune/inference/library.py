"""What Python code calls: a question, or many of them, in one line."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from vtprune.errors import ModelError, VtpruneError, quote
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
from vtprune.media import Limits, Medium, media_list, name_of
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded, find_loaded, open_model
from vtprune.preset import Keep, Preset, StreamSpec, load_preset, override


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
    on_text: Callable[[str], None] | None = None,
    tokens: int | None = None,
    tokens_after: int | None = None,
    fit: str | None = None,
    decode_every: int | None = None,
    decode_keep: float | None = None,
    keep_for_turns: float | None = None,
    stream: bool | Mapping[str, object] | StreamSpec | None = None,
) -> Report:
    """Answer one question about pictures or videos.

    >>> import vtprune
    >>> report = vtprune.ask(None, "clip.mp4", "what moves?", keep=0.3)
    >>> print(report.answer, report.tokens.kept_after)

    Args:
        model: a loaded transformers model (or what holds one, such as a PEFT model), what
            `vtprune.load` gave, a name as for `load`, or None for the embedded one.
        media: a picture or a video, or several in a list: paths, Pillow pictures, bytes, open
            files, arrays of uint8 (H, W, 3), or (T, H, W, 3), which is a video of one frame a
            second, or `Clip`. A list of pictures is several pictures.
        preset: packaged name, path, mapping or Preset; None: "balanced".
        keep: the layer average of the kept fraction, for all modalities or by modality.
        method: one method in place of the preset's stages; `at` where it cuts, `options` its own.
        seed: of all random choices; None: the preset's.
        sampling: how much of the media is taken; None: as the preset says.
        generation: how the answer is chosen; None: greedily.
        limits: of what is read.
        compare: answer without pruning too, and measure the speed-up.
        on_text: gets the pieces of the answer as they are produced. What it raises ends the answer.
        tokens: in place of a keep: the most visual tokens, averaged over the decoder's layers.
        tokens_after: in place of a keep: the most visual tokens that the first cut leaves.
        fit: in place of a keep: what they fit into: "context", the model's positions with room for
            question and answer, or "memory", the free memory of the model's device.
        decode_every, decode_keep: cut the KV cache after each so many decoded tokens, to this share
            of the visual tokens in it; None: as the preset says.
        keep_for_turns: share of what is kept for the question that is chosen without it.
        stream: encode a long video in segments, and cut each before the next one is encoded: True,
            or a mapping with frames, keep and share; None: as the preset says, and where its frames
            do not fit the memory; False: never asked for.

    Raises:
        VtpruneError: of any kind, with the way out.
    """
    return answer(
        model, [(media, question)], preset, keep, method=method, at=at, options=options, seed=seed,
        sampling=sampling, generation=generation, limits=limits, compare=compare,
        on_text=None if on_text is None else lambda _, text: on_text(text),
        tokens=tokens, tokens_after=tokens_after, fit=fit,
        decode_every=decode_every, decode_keep=decode_keep, keep_for_turns=keep_for_turns,
        stream=stream,
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
    on_text: Callable[[int, str], None] | None = None,
    tokens: int | None = None,
    tokens_after: int | None = None,
    fit: str | None = None,
    decode_every: int | None = None,
    decode_keep: float | None = None,
    keep_for_turns: float | None = None,
    stream: bool | Mapping[str, object] | StreamSpec | None = None,
) -> list[Report]:
    """Answer a question about each item's media, many at once in left-padded batches.

    >>> import vtprune
    >>> items = [("clip.mp4", "what moves?"), ("page.png", "what is the total?")]
    >>> for report in vtprune.answer(None, items, keep=0.3):
    ...     print(report.error or report.answer)

    Args:
        items: (media, question): media as of `ask`.
        compare: answer without pruning too, one item at a time, and measure the speed-up.
        batch_size: the most items in one batch.
        on_text: gets the number of an item and the next piece of its answer, as they are produced.
        model, preset, keep, method, at, options, seed, sampling, generation, limits, tokens,
        tokens_after, fit, decode_every, decode_keep, keep_for_turns, stream: as of `ask`.

    Returns:
        One report an item, in order. An item that can't be answered has a FailedReport, whose
        `error` says why; that of all others is None. Seconds of vision, prefill, decode and total
        are the batch's. The total of the first batch is from this call on, which loads the model
        and reads all media; that of every other from the end of the batch before.

    Raises:
        VtpruneError: what concerns all items, or every item failed: then the first one's error.
    """
    began = time.perf_counter()
    check_model(model)
    if not batch_size >= 1:
        raise VtpruneError(
            f"batch_size is {batch_size}, but must be at least 1",
            "use 1 to answer one item at a time",
        )
    loads = model is None or isinstance(model, (str, Path))
    resolved = override(
        load_preset(preset),
        keep,
        method,
        at,
        options,
        seed,
        tokens,
        tokens_after,
        fit,
        decode_every,
        decode_keep,
        keep_for_turns,
        stream,
    )
    sampling = sampling or sampling_of(resolved)
    resolved = with_sampling(resolved, sampling)
    generation = generation or Generation(seed=resolved.seed)
    limits = limits or Limits()
    checked = [attempt(partial(check_item, item)) for item in items]
    results: list[Report | VtpruneError]
    if compare:
        loaded = find_loaded(model)
        results = []
        for number, item in enumerate(checked):
            if isinstance(item, VtpruneError):
                results.append(item)
                continue
            since = began if loads and not number else None
            one_report = answer_questions(
                loaded,
                item[0],
                [item[1]],
                resolved,
                sampling=sampling,
                generation=generation,
                limits=limits,
                compare=True,
                since=since,
                on_text=None if on_text is None else partial(on_text, number),
            )
            results.append(attempt(partial(next, one_report)))
    else:
        loaded, media = read_all_media(model, checked, sampling, resolved, limits)
        questions = ["" if isinstance(item, VtpruneError) else item[1] for item in checked]
        results = answer_batches(
            loaded, media, questions, resolved, generation, batch_size, began,
            loaded.seconds if loads else 0.0, on_text,
        )  # fmt: skip
    errors = [result for result in results if isinstance(result, VtpruneError)]
    if errors and len(errors) == len(items):
        raise errors[0]
    return [
        FailedReport(*_describe(item), result) if isinstance(result, VtpruneError) else result
        for result, item in zip(results, items, strict=True)
    ]


def _describe(item: object) -> tuple[str, list[str]]:
    """Return the question of an item and the names of its media, as far as it has them."""
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        return "", []
    media, question = item
    listed = media if isinstance(media, (list, tuple)) else [media]
    return str(question), [name_of(each) for each in listed]


def check_model(model: object) -> None:
    """Refuse a model that is none, and no name of one.

    Raises:
        ModelError: with what may be given.
    """
    if model is not None and not isinstance(model, (str, Path, Loaded, nn.Module)):
        raise ModelError(
            f"the model is {quote(model)}, which is no model and no name of one",
            "give a transformers model, what vtprune.load returned, a name or path, or None",
        )


def check_question(question: object) -> None:
    """Refuse a question that is no text.

    Raises:
        VtpruneError: with its value.
    """
    if not isinstance(question, str):
        raise VtpruneError(
            f"the question is {quote(question)}, but must be text",
            "give the question as a string",
        )


def check_item(item: object) -> tuple[list[Medium], str]:
    """Return the media and the question of an item.

    Raises:
        VtpruneError: it is no pair of media and a question.
    """
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        raise VtpruneError(
            f"the item is {quote(item)}, but must be media and a question",
            'give pairs, such as ("clip.mp4", "what moves?")',
        )
    media, question = item
    listed = media_list(media)
    check_question(question)
    return listed, question


def read_all_media(
    model: nn.Module | Loaded | str | Path | None,
    items: Sequence[tuple[list[Medium], str] | VtpruneError],
    sampling: Sampling,
    preset: Preset,
    limits: Limits,
) -> tuple[Loaded, list[PromptMedia | VtpruneError]]:
    """Return the model and each item's media; both are read at once where it has to be loaded."""
    prompts = [item if isinstance(item, VtpruneError) else item[0] for item in items]
    if prompts and (model is None or isinstance(model, (str, Path))):
        errors = [item for item in items if isinstance(item, VtpruneError)]
        if len(errors) == len(prompts):
            raise errors[0]
        opened = open_model(None if model is None else str(model))
        return load_with_each_media(opened, prompts, sampling, preset, limits)
    loaded = find_loaded(model)
    return loaded, [
        paths
        if isinstance(paths, VtpruneError)
        else attempt(partial(read_media, loaded, paths, sampling, preset, limits))
        for paths in prompts
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
    on_text: Callable[[int, str], None] | None = None,
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
        listeners = () if on_text is None else [partial(on_text, number) for number in numbers]
        run = partial(generate, loaded, batch, preset, generation, listeners=listeners)
        runs = attempt(run)
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
