"""`calibrate`: every file is measured once, then all of them give the layers to cut at."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING

import numpy as np
import torch

from vtprune.engine.plan import PruningPlan
from vtprune.engine.trace import Trace
from vtprune.errors import ModelError, PresetError
from vtprune.evaluation.bootstrap import drawn_changes, relative_change
from vtprune.evaluation.calibration.entropy import entropy_curve, find_collapse
from vtprune.evaluation.calibration.horizon import Horizon, find_horizon, quality
from vtprune.evaluation.calibration.layer_scores import drop_scores, open_prefix, token_information
from vtprune.evaluation.calibration.result import (
    CalibrationResult,
    CalibrationSample,
    TokenInformation,
)
from vtprune.evaluation.calibration.schedules import (
    SELECTORS,
    CandidateSchedule,
    TriedSchedule,
    list_schedules,
    rank_schedules,
)
from vtprune.evaluation.damaged import DamagedFiles
from vtprune.evaluation.records import Record
from vtprune.evaluation.runner import UNPRUNED_PRESET, AskSettings, FileRunner, group_by_file
from vtprune.evaluation.variants import Variant
from vtprune.inference.forced_answers import Score, score
from vtprune.inference.measuring import describe_model, describe_versions
from vtprune.inference.out_of_memory import FEWER, as_memory_error
from vtprune.inference.questions_file import Asked
from vtprune.media import AskedMedia
from vtprune.models.structure import find_structure
from vtprune.models.transformers_messages import quiet
from vtprune.preset.calibration import Calibration
from vtprune.preset.spec import StageSpec
from vtprune.tokens.solver import solve

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded, Progress

ENOUGH_INPUTS = 50  # for an entropy collapse layer
TOKENS_ENOUGH = 2**20  # visual tokens, of which one is next to nothing
GROUPS = ("general", "text-heavy")


@dataclass(frozen=True, eq=False)
class FileScores:
    """What was measured on one file.

    Args:
        asked: the questions about it.
        answers: token ids of their right answers, or of the unpruned model's.
        scores: of each answer, with all visual tokens dropped from layer 0, 1, ... L-1; last:
            unpruned.
        curve: the matrix entropy by layer.
        information: (L, W) what the text reads from each window; None where it was not measured.
        modality: "image", "video" or "mixed".
    """

    asked: Sequence[Asked]
    answers: Sequence[torch.Tensor]
    scores: Sequence[tuple[Score, ...]]
    curve: tuple[float, ...]
    information: torch.Tensor | None
    modality: str


@dataclass(frozen=True)
class CalibrationSettings:
    """How a calibration is done.

    Args:
        asking: how the questions are asked; the unpruned model answers those without an answer.
        windows: files whose token information is measured.
        keep: a budget to propose schedules for; None for none.
        methods: that the schedules select tokens by; () takes the usual ones.
        options: of every one of them that has such an option.
        seed: of the bootstrap.
    """

    asking: AskSettings = field(default_factory=AskSettings)
    windows: int = 0
    keep: float | None = None
    methods: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0


def calibrate(
    loaded: Loaded,
    asked: Sequence[Asked],
    source: str = "",
    settings: CalibrationSettings | None = None,
    on_progress: Progress | None = None,
) -> CalibrationResult:
    """Find the entropy collapse layer and the information horizon of a model.

    Every file is read, encoded and prefilled once; the answers to all questions about it are then
    scored with all visual tokens dropped from each layer on. Files follow each other, so memory
    does not grow with their number. A file that opens but can't be decoded is left out, as by
    `evaluate`.

    Args:
        source: what the questions are called in the calibration.

    Raises:
        VtpruneError: of any kind, with the way out.
    """
    started = time.perf_counter()
    settings = settings or CalibrationSettings()
    files = [[asked[number] for number in numbers] for numbers in group_by_file(asked)]
    if settings.keep is not None:  # an unknown method is an error before anything runs
        _schedules(loaded, settings, Calibration(1, 1, None, {}, "default"))
    # A damaged file leaves its turn to the next one.
    turns = sorted({n * len(files) // settings.windows for n in range(settings.windows)})
    warnings = list(loaded.warnings)
    measured_files = []
    damaged = DamagedFiles()
    for number, questions in enumerate(files):
        if on_progress:
            on_progress("calibrating", number, len(files))
        file = questions[0].file
        with damaged.leaving_out(file), _naming_file(loaded, file):
            runner = FileRunner(loaded, questions, settings.asking, right_answers=True)
            warnings += [note for note in runner.notes if note not in warnings]
            windows = bool(turns) and turns[0] <= number
            measured_files.append(_measure_file(runner, windows, warnings))
            if windows:
                turns.pop(0)
    warnings += damaged.warnings(asked)
    asked, _ = damaged.without_damaged(asked, {})
    labelled = sum(question.answer is not None for question in asked)
    if 0 < labelled < len(asked):
        warnings.append(
            f"{labelled} of {len(asked)} questions have a right answer: its probability counts, "
            "and for the others agreement, which weighs more; better calibrate on each kind apart"
        )
    measured = _conclude(loaded, measured_files, source, settings, warnings)
    if settings.keep is not None:
        known = measured.calibration()
        schedules, notes = _reachable(loaded, _schedules(loaded, settings, known), settings, known)
        tried = _propose(loaded, measured_files, settings, schedules, known, on_progress)
        measured = replace(measured, tried=tried, warnings=(*measured.warnings, *notes))
    return replace(measured, seconds=time.perf_counter() - started)


@contextmanager
def _naming_file(loaded: Loaded, file: AskedMedia) -> Iterator[None]:
    """Silence other libraries; running out of memory names the file and the way out."""
    message = f"out of memory on {loaded.model.device} with {file}"
    with quiet(), as_memory_error(lambda: (message, FEWER)):
        yield


def _measure_file(runner: FileRunner, windows: bool, warnings: list[str]) -> FileScores:
    """Measure entropy, scores by layer and, of chosen files, token information."""
    loaded, features, prompts = runner.loaded, runner.features, runner.full.prompts
    first = prompts[0]
    prefix = open_prefix(loaded, first, features)
    inputs = first.without_pixels(features)
    curve = prefix.curve if prefix else entropy_curve(loaded, first.tensors, inputs)
    shares_prefix = [prefix is not None and prefix.fits(prompt) for prompt in prompts]
    together = [prompt for prompt, fits in zip(prompts, shares_prefix, strict=True) if fits]
    shared = iter(drop_scores(loaded, together, prefix, features))
    scores = [
        next(shared)
        if fits  # else the question comes before its pictures
        else drop_scores(
            loaded, [prompt], prefix and open_prefix(loaded, prompt, features), features
        )[0]
        for prompt, fits in zip(prompts, shares_prefix, strict=True)
    ]
    information = None
    if windows and prefix:
        information = token_information(loaded, first, prefix, scores[0])
    elif windows:
        warnings.append(
            f"{first.asked.file}: token information needs visual tokens without text in between"
        )
    answers = [prompt.answer for prompt in prompts]
    kinds = {item.source.kind for item in first.prepared.media.items}
    modality = kinds.pop() if len(kinds) == 1 else "mixed"
    return FileScores(runner.asked, answers, scores, curve, information, modality)


def _conclude(
    loaded: Loaded,
    files: Sequence[FileScores],
    source: str,
    settings: CalibrationSettings,
    warnings: list[str],
) -> CalibrationResult:
    """Return what all files give together."""
    collapse = find_collapse(torch.tensor([file.curve for file in files]), settings.seed)
    if len(files) < ENOUGH_INPUTS:
        warnings.append(
            f"the entropy collapse layer is of {len(files)} inputs; {ENOUGH_INPUTS} or more are "
            "wanted"
        )
    if collapse.drop <= 0:
        warnings.append("entropy does not fall in the first half of the layers: the model has no "
                        "entropy collapse layer")  # fmt: skip
    rows = [pair for file in files for pair in zip(file.asked, file.scores, strict=True)]
    horizons = {}
    for group in GROUPS:
        of_group = [row for row in rows if row[0].text_heavy == (group == "text-heavy")]
        if of_group:
            horizons[group] = _horizon(of_group, settings.seed)
    config = loaded.decoder_config
    model = {"name": loaded.name, "family": loaded.family.name,
             "model_type": str(loaded.model.config.model_type),
             "layers": len(collapse.curve), "hidden_size": int(config.hidden_size)}  # fmt: skip
    return CalibrationResult(
        model=model,
        source=source,
        questions=len(rows),
        labelled=sum(asked.answer is not None for asked, _ in rows),
        inputs=len(files),
        collapse=collapse,
        horizons=horizons,
        information=_information(files),
        keep=settings.keep,
        warnings=tuple(dict.fromkeys(warnings)),
        day=date.today().isoformat(),
        media=list(dict.fromkeys(str(asked.file) for asked, _ in rows)),
        sample=CalibrationSample(
            revision=describe_model(loaded).revision,
            versions=describe_versions().to_dict(),
            modalities=dict(Counter(file.modality for file in files)),
            kinds=tuple(sorted({asked.kind for asked, _ in rows if asked.kind})),
            seed=settings.seed,
        ),
    )


def _horizon(rows: Sequence[tuple[Asked, tuple[Score, ...]]], seed: int) -> Horizon:
    values = np.array([[quality(asked, score) for score in scores] for asked, scores in rows])
    exact = np.array([[score.greedy for score in scores] for _, scores in rows])
    files = [str(asked.file) for asked, _ in rows]
    before, after = values[:, -1].tolist(), values[:, :-1]
    change = relative_change(before, after, files, seed)
    drawn = drawn_changes(before, after, files, seed)
    return find_horizon(change, exact.mean(axis=0)[:-1].tolist(), drawn)


def _information(files: Sequence[FileScores]) -> TokenInformation | None:
    measured = [file.information for file in files if file.information is not None]
    if not measured:
        return None
    mean = torch.cat(measured, dim=1).mean(dim=1)
    largest = torch.stack([windows.abs().amax(dim=1) for windows in measured]).mean(dim=0)
    return TokenInformation(tuple(mean.tolist()), tuple(largest.tolist()), len(measured))


def _schedules(
    loaded: Loaded, settings: CalibrationSettings, calibration: Calibration
) -> list[CandidateSchedule]:
    assert settings.keep is not None
    structure, selectors = find_structure(loaded.model), settings.methods or SELECTORS
    plan = PruningPlan(UNPRUNED_PRESET, structure, calibration, Trace())

    def layers_to_cut(stage: Mapping[str, object]) -> Sequence[int]:
        layers = plan.layers_to_cut(StageSpec.from_dict(stage))
        return range(plan.num_layers) if layers is None else layers

    return list_schedules(
        settings.keep, plan.num_layers, calibration, selectors, settings.options, layers_to_cut
    )


def _reachable(
    loaded: Loaded,
    schedules: Sequence[CandidateSchedule],
    settings: CalibrationSettings,
    calibration: Calibration,
) -> tuple[list[CandidateSchedule], list[str]]:
    """Return the schedules that meet the budget with tokens enough, and of the others why not."""
    assert settings.keep is not None
    structure, reachable, notes = find_structure(loaded.model), [], []
    for schedule in schedules:
        variant = schedule.variant(settings.keep)
        try:
            if variant.error is not None:
                raise variant.error
            plan = PruningPlan(variant.preset, structure, calibration, Trace())
            places = [stage.place for stage in plan.group("all").stages]
            solve(places, settings.keep, plan.num_layers, TOKENS_ENOUGH)
        except (PresetError, ModelError) as error:
            notes.append(f"{schedule.name} is not tried: {error.message}")
        else:
            reachable.append(schedule)
    return reachable, notes


def _propose(
    loaded: Loaded,
    files: Sequence[FileScores],
    settings: CalibrationSettings,
    schedules: Sequence[CandidateSchedule],
    calibration: Calibration,
    on_progress: Progress | None,
) -> tuple[TriedSchedule, ...]:
    """Try schedules on a second reading of the files; return the best first."""
    assert settings.keep is not None
    variants = [schedule.variant(settings.keep) for schedule in schedules]
    records: list[Record] = []
    failed: set[str] = set()
    first = 0
    for number, file in enumerate(files):
        if on_progress:
            on_progress("trying schedules", number, len(files))
        with _naming_file(loaded, file.asked[0].file):
            runner = FileRunner(loaded, file.asked, settings.asking, True, file.answers)
            for place in range(len(file.asked)):
                for variant in variants:
                    if variant.key in failed:
                        continue
                    record = score_variant(runner, place, first + place, variant, calibration)
                    records.append(record)
                    if record.error:
                        failed.add(variant.key)
        first += len(file.asked)
    asked = [question for file in files for question in file.asked]
    scores = [of_layers[-1] for file in files for of_layers in file.scores]
    before = [quality(*pair) for pair in zip(asked, scores, strict=True)]
    return rank_schedules(schedules, variants, asked, records, before)


def score_variant(
    runner: FileRunner, place: int, number: int, variant: Variant, calibration: Calibration
) -> Record:
    """Return a record whose score is the quality of a question's answer under a variant.

    Args:
        place: of the question among those about the file.
        number: of the question among all.
    """
    asked = runner.asked[place]
    try:
        if variant.error is not None:
            raise variant.error
        forced = runner.force(place, variant.preset, calibration)
    except (PresetError, ModelError) as error:
        return Record(number, variant.key, error=error.message)
    scored = score(forced.logits, runner.full.prompts[place].answer)
    return Record(number, variant.key, score=quality(asked, scored), same=scored.greedy,
                  keep_mean=forced.keep_mean)  # fmt: skip
