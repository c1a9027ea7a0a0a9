"""Explain an answer: ask, make its maps on the frozen model, and say what pruning kept of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from vtprune.engine.inputs import FeatureCache
from vtprune.errors import ModelError
from vtprune.inference.evidence import DEFAULT, PASSES, READS_ATTENTION, MapSettings
from vtprune.inference.evidence.ask import (
    UNPRUNED,
    ExplainedAnswer,
    answer_to_explain,
    encode_in_segments,
    masked_by_pruning,
)
from vtprune.inference.evidence.explanation import (
    EvidenceKept,
    EvidenceMap,
    ExplainedRun,
    Explanation,
    evidence_kept,
    to_shares,
)
from vtprune.inference.evidence.probe import Passes
from vtprune.inference.generate import Generation
from vtprune.inference.kept_tokens import KeptTokens, keep_record
from vtprune.inference.library import check_model, check_question
from vtprune.inference.prepare import prepare_question, sampling_of
from vtprune.inference.prompt_media import Media, PromptMedia, read_in_full, read_media
from vtprune.inference.wording import name_sources
from vtprune.media import Limits, media_list
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded, find_loaded
from vtprune.models.structure import find_structure
from vtprune.preset import Keep, Preset, load_preset, override

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtprune.inference.evidence.probe import Probe, Progress


def explain(
    model: nn.Module | Loaded | str | Path | None,
    media: Media,
    question: str,
    by: str = DEFAULT,
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
    passes: int = PASSES,
    window: int | None = None,
    stride: int | None = None,
    from_layer: int = 0,
    tokens: int | None = None,
    tokens_after: int | None = None,
    on_progress: Progress | None = None,
) -> Explanation:
    """Answer one question, and map how much each visual token carries the answer's probability.

    >>> import vtprune
    >>> explanation = vtprune.explain(None, "clip.mp4", "what moves?", keep=0.3)
    >>> print(explanation.answer, explanation.kept)
    >>> explanation.runs[0].region(explanation.runs[0].maps[0])

    Args:
        by: the method of the maps.
        passes: forward passes that the maps of an answer may take.
        window, stride: rows and columns of a window of tokens, and from one to the next, of
            `occlusion` and `information`; None: as the passes allow.
        from_layer: the first layer in which `information` leaves tokens out.
        model, media, question: as of `ask`.
        preset, keep, method, at, options, seed, tokens, tokens_after: how to prune, as of `ask`;
            with none of them it is not pruned.
        sampling, limits: as of `ask`.
        generation: how long the answer may be; it is decoded greedily.
        on_progress: gets the stage, the passes done, and how many it will be at most.

    Raises:
        VtpruneError: of any kind, with the way out.
    """
    check_model(model)
    check_question(question)
    settings = MapSettings(by, passes, window, stride, from_layer)
    given = (preset, keep, method, at, options, tokens, tokens_after)
    resolved = None
    if any(value is not None for value in given):
        resolved = override(
            load_preset(preset), keep, method, at, options, seed, tokens, tokens_after
        )
    paths = media_list(media)
    sampling = sampling or sampling_of(resolved or UNPRUNED)
    limits = limits or Limits()
    loaded = find_loaded(model)
    read = read_media(loaded, paths, sampling, resolved, limits)
    return explain_answer(
        loaded, read, question, settings, resolved,
        sampling=sampling, generation=generation, limits=limits, on_progress=on_progress,
    )  # fmt: skip


def explain_answer(
    loaded: Loaded,
    media: PromptMedia,
    question: str,
    settings: MapSettings | None = None,
    preset: Preset | None = None,
    *,
    sampling: Sampling | None = None,
    generation: Generation | None = None,
    limits: Limits | None = None,
    on_progress: Progress | None = None,
) -> Explanation:
    """Explain the answer to a question about media that were read.

    Args:
        settings: of the maps.
        preset: how to prune; None: the unpruned model alone.
        on_progress: gets the stage, the passes done, and how many it will be at most.
    """
    settings = settings or MapSettings()
    by, layer = settings.by, settings.from_layer
    layers = len(find_structure(loaded.model).layers)
    if not 0 <= layer < layers:
        raise ModelError(
            f"layer {layer} is none of the {layers} of {loaded.name}", f"0 to {layers - 1}"
        )
    generation = (generation or Generation()).greedy
    features: FeatureCache = {}
    full = media
    if media.full_size:
        assert sampling is not None
        full = read_in_full(loaded, media.sources, sampling, limits or Limits(), on_progress)
    reads = by in READS_ATTENTION
    prepared = encode_in_segments(loaded, prepare_question(loaded, full, question, generation))
    answers = [answer_to_explain(loaded, prepared, UNPRUNED, generation, features, reads)]
    if preset is not None:
        if media is not full:
            prepared = prepare_question(loaded, media, question, generation)
            prepared = encode_in_segments(loaded, prepared)
        answers.append(answer_to_explain(loaded, prepared, preset, generation, features, reads))
    if by != "attention":  # what can't be repeated is an error before the unpruned map is made
        masked_by_pruning(answers[-1].run.trace, 1 + int(answers[-1].layout.columns.max()))
    runs = [
        map_run(answer, settings, one or UNPRUNED, on_progress)
        for answer, one in zip(answers, (UNPRUNED, preset), strict=False)
    ]
    notes = name_sources([(run.name, a.run.warnings) for run, a in zip(runs, answers, strict=True)])
    warnings, kept = list(dict.fromkeys([*loaded.warnings, *media.warnings, *notes])), None
    if preset is not None:
        first, last = runs
        if len(first.kept.layout) == len(last.kept.layout):
            kept = kept_of_maps(first, last.kept)
        else:
            warnings.append("the pruned model gets smaller media: what it kept of the unpruned "
                            "answer's evidence can't be told by token")  # fmt: skip
    return Explanation(by, tuple(runs), kept, tuple(warnings))


def kept_of_maps(unpruned: ExplainedRun, pruned: KeptTokens) -> EvidenceKept:
    """Return what a pruned run kept of the evidence of an unpruned one, all its parts alike."""
    shares = torch.stack([evidence.shares for evidence in unpruned.maps]).mean(0)
    return evidence_kept(shares, unpruned.kept.layout, pruned.stages, pruned.num_layers)


def map_run(
    answer: ExplainedAnswer,
    settings: MapSettings,
    preset: Preset = UNPRUNED,
    on_progress: Progress | None = None,
) -> ExplainedRun:
    """Return the maps of an answer.

    Raises:
        ModelError: the places of its tokens are not known, or the model can't be explained so.
    """
    started = time.perf_counter()
    kept = keep_record(answer.loaded, answer.prepared, answer.run.trace, answer.run.sample)
    if kept is None:
        raise ModelError("the places of the prompt's visual tokens are not known")
    counted = Passes(settings.passes, on_progress)
    if preset is not UNPRUNED:
        counted.stage = "explaining the pruned answer: forward pass"
    values, probabilities = map_values(answer, settings, counted)
    maps = [
        EvidenceMap(part.text, probability, to_shares(values[:, number]))
        for number, (part, probability) in enumerate(zip(answer.parts, probabilities, strict=True))
    ]
    return ExplainedRun(
        kept=kept,
        name="unpruned" if preset is UNPRUNED else preset.method or preset.name or "pruned",
        keep_mean=answer.run.trace.keep_mean(answer.run.sample),
        question=answer.prepared.question,
        answer=answer.run.answer,
        model=answer.loaded.name,
        maps=tuple(maps),
        passes=counted.done,
        seconds=time.perf_counter() - started,
    )


def map_values(
    answer: ExplainedAnswer, settings: MapSettings, passes: Passes
) -> tuple[torch.Tensor, Sequence[float | None]]:
    """Return the (N, parts) map of an answer, and the parts' probabilities."""
    by = settings.by
    if by == "attention":
        attended = answer.attended()
        assert attended is not None
        return attended, [None] * len(answer.parts)
    probe = answer.probe(passes, settings)
    make = cast(
        "Callable[[Probe], torch.Tensor]",
        getattr(import_module(f"vtprune.inference.evidence.{by}"), by),
    )
    base = probe.base()
    return make(probe), base.exp().tolist()
