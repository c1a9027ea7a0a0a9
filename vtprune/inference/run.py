"""The order of events: media, inputs, generation under pruning, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from vtprune.engine import pruning
from vtprune.engine.inputs import FeatureCache, PreparedInputs
from vtprune.inference.ahead import load_and_gather
from vtprune.inference.batching import collate, group_alike
from vtprune.inference.compare import compare_runs
from vtprune.inference.figures import build_report, uncounted
from vtprune.inference.gathering import Gathered, gather, gather_for
from vtprune.inference.generation import Generation, Run, generate
from vtprune.inference.memory import fitting_errors
from vtprune.inference.prompts import as_sampled, encode, ready, sampling_of, to_device
from vtprune.inference.report import Report
from vtprune.media import Limits, Source
from vtprune.models.base import Inputs, Sampling
from vtprune.models.loading import Loaded, Progress, adopt, load, open_model
from vtprune.models.upstream import quiet
from vtprune.preset import Keep, Preset, load_preset, override

__all__ = [
    "Gathered",
    "Generation",
    "Loaded",
    "answer",
    "ask",
    "gather",
    "load",
    "load_and_gather",
    "open_model",
]

Media = str | Path | Sequence[str | Path]
GREEDY = (
    "the answer was sampled; the comparison holds a greedy answer of the pruned model against a "
    "greedy one of the unpruned"
)
"""What a comparison beside a sampled answer warns of."""


def ask(
    loaded: Loaded,
    paths: Sequence[str | Path | Source] | Gathered,
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
    """Answers questions about the same media, which are decoded and encoded once.

    Args:
        paths: pictures, videos, or directories of numbered pictures; or opened, or read, already.
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
    preset = as_sampled(preset, sampling)
    generation = generation or Generation(seed=preset.seed)
    limits = limits or Limits()
    gathered = paths
    if not isinstance(gathered, Gathered):
        gathered = gather_for(loaded, gathered, sampling, preset, limits, on_progress)
    full = gathered
    if compare and gathered.whole:
        full = gather(loaded, gathered.sources, sampling, limits, on_progress)
    pixels: dict[str, torch.Tensor] = {}
    encoded: FeatureCache = {}
    for number, question in enumerate(questions):
        if on_question:
            on_question(number, question)
        started = time.perf_counter()
        if number:
            began, startup = started, 0.0
        inputs = encode(loaded, gathered, question, generation)
        tensors = to_device(loaded, {**inputs.tensors, **pixels})
        inputs = replace(inputs, tensors=tensors)
        pixels = {name: value for name, value in tensors.items() if name.startswith("pixel")}
        spent = {"preprocess": time.perf_counter() - started}
        if number == 0:
            spent["preprocess"] += gathered.resize_seconds
            spent["load"] = 0.0 if since is None else loaded.seconds
            spent["media"] = gathered.media_seconds
        run = pruned(loaded, tensors, preset, generation, on_text, encoded, [inputs])[0]
        run = replace(run, seconds={**run.seconds, **spent})
        made = finish(loaded, gathered, inputs, question, preset, run, began, startup)
        if number and made.flops.vision is not None:  # encoded for the first question
            made = replace(made, flops=replace(made.flops, vision=0.0))
        if compare:
            plain = None
            if full is not gathered:
                plain = ready(loaded, full, question, generation).side(None, again=number > 0)
            with quiet():
                beside = compare_runs(
                    loaded, inputs, preset, generation, run, made, on_progress, plain
                )
            made = replace(made, compare=beside)
            if generation.temperature > 0:
                made = replace(made, warnings=(*made.warnings, GREEDY))
        yield made


def pruned(
    loaded: Loaded,
    tensors: Mapping[str, torch.Tensor],
    preset: Preset,
    generation: Generation,
    on_text: Callable[[str], None] | None = None,
    encoded: FeatureCache | None = None,
    prompts: Sequence[Inputs] = (),
) -> list[Run]:
    """One generation under the preset; a run for every row of the batch.

    Args:
        tensors: of the batch, on the model's device.
        prompts: its rows, which say what is shown; needed for stages at `pixels`.
    """
    block = pruning(
        loaded.model,
        preset,
        threads="own",
        calibration=loaded.calibration,
        inputs=PreparedInputs.of(tensors, prompts, encoded),
    )
    with quiet(), block as trace, fitting_errors(loaded, preset, trace):
        return generate(loaded, tensors, generation, trace, on_text)


def finish(
    loaded: Loaded,
    gathered: Gathered,
    inputs: Inputs,
    question: str,
    preset: Preset,
    run: Run,
    began: float,
    startup: float = 0.0,
) -> Report:
    """The report of one run, with everything that its reader was to be warned of.

    Args:
        began: when its work did, on `time.perf_counter`'s clock.
        startup: of the seconds since then, what interpreter and imports took.
    """
    total = time.perf_counter() - began
    made = build_report(loaded, gathered.read, gathered.decoders, inputs, question, preset, run,
                        total, startup)  # fmt: skip
    notes = [*loaded.warnings, *gathered.warnings, *run.warnings, *uncounted(loaded, made)]
    readers = preset.question_aware_methods()
    if readers and run.trace.stages:
        notes.append(f"{' and '.join(readers)} chose by the question: a second one in the same "
                     "conversation would find only what this one left")  # fmt: skip
    return replace(made, warnings=tuple(dict.fromkeys(notes)))


def answer(
    model: nn.Module | Loaded | str | Path | None,
    items: Sequence[tuple[Media, str]],
    preset: str | Path | Mapping[str, object] | Preset | None = None,
    keep: Keep | None = None,
    *,
    sampling: Sampling | None = None,
    generation: Generation | None = None,
    limits: Limits | None = None,
    compare: bool = False,
    batch_size: int = 8,
) -> list[Report]:
    """Answers a question about each item's media, many at once in left-padded batches.

    Args:
        model: a loaded transformers model (or what holds one, such as a PEFT model), a name as for
            `load`, or None for the embedded one.
        items: (a file or several, a question).
        preset: packaged name, path, mapping or Preset; None: "balanced".
        keep: layer average of the kept fraction, for all modalities or by modality.
        compare: measure the unpruned model beside it, one item at a time.
        batch_size: the most items in one batch.

    Returns:
        One report an item, in order; seconds of vision, prefill, decode and total are its
        batch's. The total of the first batch is from this call on, which loads the model and reads
        all media; that of every other from the end of the batch before.

    Raises:
        VtpruneError: of any kind, with the way out.
    """
    began = time.perf_counter()
    loads = model is None or isinstance(model, (str, Path))
    resolved = override(load_preset(preset), keep)
    sampling = sampling or sampling_of(resolved)
    resolved = as_sampled(resolved, sampling)
    generation = generation or Generation(seed=resolved.seed)
    limits = limits or Limits()
    paths = [[media] if isinstance(media, (str, Path)) else list(media) for media, _ in items]
    questions = [question for _, question in items]
    if compare:
        loaded = find_loaded(model)
        return [
            report
            for number, (files, question) in enumerate(zip(paths, questions, strict=True))
            for report in ask(loaded, files, [question], resolved, sampling=sampling,
                              generation=generation, limits=limits, compare=True,
                              since=began if loads and not number else None)
        ]  # fmt: skip
    loaded, gathered = _load_and_gather(model, paths, sampling, resolved, limits)
    inputs: list[Inputs] = []
    spent: list[dict[str, float]] = []
    for files, question in zip(gathered, questions, strict=True):
        started = time.perf_counter()
        inputs.append(encode(loaded, files, question, generation))
        preprocess = time.perf_counter() - started + files.resize_seconds
        load = loaded.seconds if loads and not spent else 0.0
        spent.append({"load": load, "media": files.media_seconds, "preprocess": preprocess})
    reports: dict[int, Report] = {}
    for numbers in group_alike([one.tensors for one in inputs], batch_size):
        batch = collate([inputs[number].tensors for number in numbers], pad_id(loaded))
        rows = [inputs[number] for number in numbers]
        tensors = to_device(loaded, batch)
        runs = pruned(loaded, tensors, resolved, generation, prompts=rows)
        for number, run in zip(numbers, runs, strict=True):
            run = replace(run, seconds={**run.seconds, **spent[number]})
            if len(numbers) > 1:
                note = f"one of a batch of {len(numbers)}: seconds from vision on are the batch's"
                run = replace(run, warnings=(*run.warnings, note))
            reports[number] = finish(
                loaded, gathered[number], inputs[number], questions[number], resolved, run, began
            )
        began = time.perf_counter()
    return [reports[number] for number in range(len(items))]


def _load_and_gather(
    model: nn.Module | Loaded | str | Path | None,
    prompts: Sequence[Sequence[str | Path]],
    sampling: Sampling,
    preset: Preset,
    limits: Limits,
) -> tuple[Loaded, list[Gathered]]:
    """A model and the media of some prompts, both at once where the model has to be loaded."""
    if prompts and (model is None or isinstance(model, (str, Path))):
        opened = open_model(None if model is None else str(model))
        return load_and_gather(opened, prompts, sampling, preset, limits)
    loaded = find_loaded(model)
    return loaded, [gather_for(loaded, files, sampling, preset, limits) for files in prompts]


def find_loaded(model: nn.Module | Loaded | str | Path | None) -> Loaded:
    """A model that is loaded already, is found by its name, or is the embedded one."""
    if model is None or isinstance(model, (str, Path)):
        return load(None if model is None else str(model))
    return model if isinstance(model, Loaded) else adopt(model)


def pad_id(loaded: Loaded) -> int:
    """The token that fills short rows up; it is masked, so any will do."""
    own = loaded.files.tokenizer.pad_token_id
    return int(own) if isinstance(own, int) else 0
