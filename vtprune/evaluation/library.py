"""What Python code calls to measure many questions: evaluate, tune, calibrate and the like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.errors import MediaError, VtpruneError
from vtprune.evaluation import evaluate as evaluation
from vtprune.evaluation import tune as tuning
from vtprune.evaluation.calibration import calibrate as calibration
from vtprune.evaluation.calibration.result import CalibrationResult
from vtprune.evaluation.captions.measure import measure_captions
from vtprune.evaluation.captions.result import CaptionTest
from vtprune.evaluation.evaluate import Evaluation
from vtprune.evaluation.needles.measure import measure_needles
from vtprune.evaluation.needles.planting import NeedlePlan, plant_needles
from vtprune.evaluation.needles.result import NeedleTest
from vtprune.evaluation.reproduction.reproduce import Reproduction, run_table
from vtprune.evaluation.reproduction.tables import load_table
from vtprune.evaluation.runner import AskSettings
from vtprune.evaluation.scoring import check_choices, check_metric
from vtprune.evaluation.tuning_result import Tuning
from vtprune.evaluation.variants import KEEPS, SEEDS, VariantList, list_variants, repeat_variants
from vtprune.inference.generate import Generation
from vtprune.inference.library import check_model
from vtprune.inference.prepare import sampling_of
from vtprune.inference.prompt_media import Media, attempt
from vtprune.inference.questions_file import (
    Asked,
    FaultyRow,
    open_questions,
    read_askable,
    read_row,
)
from vtprune.media import Limits, media_list
from vtprune.models.base import Sampling
from vtprune.models.loading import find_loaded
from vtprune.preset import DEFAULT, Preset

if TYPE_CHECKING:
    from torch import nn

    from vtprune.evaluation.variants import Variant
    from vtprune.models.loading import Loaded, Progress

Question = Asked | Mapping[str, Any] | tuple[Media, str] | tuple[Media, str, object]
"""A row as a list has it, or (media, question), or (media, question, right answer or answers)."""
Questions = str | Path | Sequence[Question]
LONGEST = Generation(max_new_tokens=64)


def evaluate(
    model: nn.Module | Loaded | str | Path | None,
    questions: Questions,
    methods: Sequence[str] = (),
    keeps: Sequence[float | str] = KEEPS,
    *,
    presets: Sequence[str | Path | Mapping[str, object] | Preset] = (),
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
    seed: int | None = None,
    seeds: int = SEEDS,
    beside: bool = False,
    turns: bool = False,
    metric: str = "auto",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    sampling: Sampling | None = None,
    generation: Generation | None = None,
    limits: Limits | None = None,
    answers: Path | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Ask many questions with and without pruning, and compare the answers.

    >>> import vtprune
    >>> questions = [("clip.mp4", "what moves?", "a circle"), ("page.png", "the total?", "12")]
    >>> result = vtprune.evaluate(None, questions, ["entropy"], [0.3])
    >>> for row in result.rows:
    ...     print(row.name, row.accuracy)

    Args:
        model: as of `ask`.
        questions: a list's path, as `vtprune evaluate` takes it; or (media, question) or (media,
            question, right answer), with media as of `ask`, or mappings as the rows of a list.
        methods, keeps, presets, at, options, seed: as of `compare_methods`; with neither methods
            nor presets, the preset "balanced".
        seeds: runs of each row whose kept tokens are random.
        beside: add random and uniform at the layers and counts of every row.
        turns: ask every question again as the second of a conversation.
        metric: how answers are scored.
        columns: key -> the column of the list that holds it.
        limit: the most questions, evenly from the list.
        sampling, limits: as of `ask`.
        generation: how long answers may be; they are decoded greedily.
        answers: a file that keeps every answer, with which a stopped run goes on.

    Returns:
        The rows. A question that can't be asked is in `failed`, by its number in the list, with
        its error; the others are asked all the same.

    Raises:
        VtpruneError: of any kind, with the way out; no question can be asked.
    """
    check_model(model)
    listed = _list_variants(methods, keeps, presets, at, options, seed)
    variants = repeat_variants(listed, seeds, beside, turns)
    settings = _settings(metric, sampling or sampling_of(listed.media), generation, limits)
    asked, failed = _questions(questions, columns, limit, settings.limits, metric)
    result = evaluation.evaluate(
        find_loaded(model), asked, variants, settings, answers, on_progress, listed.notes
    )
    return replace(result, failed=failed)


def tune(
    model: nn.Module | Loaded | str | Path | None,
    questions: Questions,
    floor: float = tuning.FLOOR,
    methods: Sequence[str] = (),
    keeps: Sequence[float | str] = tuning.KEEPS,
    *,
    presets: Sequence[str | Path | Mapping[str, object] | Preset] = (),
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
    seed: int = 0,
    metric: str = "auto",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    sampling: Sampling | None = None,
    generation: Generation | None = None,
    limits: Limits | None = None,
    answers: Path | None = None,
    on_progress: Progress | None = None,
) -> Tuning:
    """Find the lowest keep that holds on one's own questions.

    >>> import vtprune
    >>> result = vtprune.tune(None, "questions.jsonl", floor=0.9, keeps=[0.5, 0.3])
    >>> if result.chosen:
    ...     report = vtprune.ask(None, "clip.mp4", "what moves?", result.chosen.variant.preset)

    Args:
        floor: the share of the unpruned model's quality that has to be kept.
        methods, presets: with neither, all packaged presets that take a keep.
        model, questions, keeps, at, options, seed, metric, columns, limit, sampling, generation,
            limits, answers: as of `evaluate`.

    Returns:
        All that was tried and tested; `chosen` is None where nothing holds, `reason` says why.

    Raises:
        VtpruneError: of any kind, with the way out; where a question can't be asked, its error is
            in the result's `failed`.
    """
    check_model(model)
    settings_limits = limits or Limits()
    asked, failed = _questions(questions, columns, limit, settings_limits, metric)
    plan = tuning.plan_tuning(asked, floor, keeps, presets, methods, seed, at, options)
    sampling = sampling or sampling_of(plan.listed.media)
    settings = _settings(metric, sampling, generation, settings_limits)
    result = tuning.tune(find_loaded(model), plan, settings, answers, on_progress)
    return replace(result, failed=failed)


def calibrate(
    model: nn.Module | Loaded | str | Path | None,
    questions: Questions,
    *,
    source: str = "",
    windows: int = 0,
    propose: float | None = None,
    methods: Sequence[str] = (),
    options: Mapping[str, str] | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    sampling: Sampling | None = None,
    generation: Generation | None = None,
    limits: Limits | None = None,
    on_progress: Progress | None = None,
) -> CalibrationResult:
    """Find the layers where a model can be cut.

    >>> import vtprune
    >>> result = vtprune.calibrate(None, "questions.jsonl")
    >>> with vtprune.pruning(model, keep=0.3, calibration=result.calibration()):
    ...     output = model.generate(**inputs)

    Args:
        source: what the questions are called in the calibration; "": the list's name.
        windows: files on which to measure what the text reads from single windows of tokens.
        propose: a budget to try schedules for, by `methods` with `options`.
        seed: of the bootstrap.
        model, questions, columns, limit, sampling, generation, limits: as of `evaluate`.

    Raises:
        VtpruneError: of any kind, with the way out; where a question can't be asked, its error is
            in the result's `failed`.
    """
    check_model(model)
    settings = _settings("auto", sampling or Sampling(), generation, limits)
    asked, failed = _questions(questions, columns, limit, settings.limits)
    if not source:
        source = Path(questions).name if isinstance(questions, (str, Path)) else "one's own"
    wanted = calibration.CalibrationSettings(
        settings, windows, propose, tuple(methods), options or {}, seed
    )
    result = calibration.calibrate(find_loaded(model), asked, source, wanted, on_progress)
    return replace(result, failed=failed)


def evaluate_needles(
    model: nn.Module | Loaded | str | Path | None,
    media: Media,
    methods: Sequence[str] = (),
    keeps: Sequence[float | str] = KEEPS,
    *,
    plan: NeedlePlan | None = None,
    presets: Sequence[str | Path | Mapping[str, object] | Preset] = (),
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
    seed: int | None = None,
    seeds: int = SEEDS,
    beside: bool = False,
    sampling: Sampling | None = None,
    generation: Generation | None = None,
    limits: Limits | None = None,
    answers: Path | None = None,
    on_progress: Progress | None = None,
) -> NeedleTest:
    """Plant small changes in one's own media: which of them does pruning keep?

    >>> import vtprune
    >>> plan = vtprune.NeedlePlan(sizes=(0.05, 0.1), count=4)
    >>> result = vtprune.evaluate_needles(
    ...     None, ["a.jpg", "clip.mp4"], ["divprune"], [0.3], plan=plan
    ... )
    >>> for row in result.rows:
    ...     print(row.name, row.sentence)

    Args:
        media: pictures and clips, as of `ask`; one that can't be read is left out, and the result's
            warnings say so.
        plan: which needles; default: all kinds that the media allow. The embedded model knows the
            things of its own world alone: `makers=vtprune.demo.needles.WORLD_MAKERS`.
        model, methods, keeps, presets, at, options, seed, seeds, beside, sampling, generation,
            limits, answers: as of `evaluate`.

    Raises:
        VtpruneError: of any kind, with the way out.
    """
    check_model(model)
    listed = _list_variants(methods, keeps, presets, at, options, seed)
    settings = _settings("auto", sampling or sampling_of(listed.media), generation, limits)
    loaded = find_loaded(model)
    needles, notes = plant_needles(
        loaded, media_list(media), plan or NeedlePlan(), settings.sampling, settings.limits
    )
    variants = repeat_variants(listed, seeds, beside)
    return measure_needles(
        loaded, needles, variants, settings, answers, on_progress, (*listed.notes, *notes)
    )


def evaluate_captions(
    model: nn.Module | Loaded | str | Path | None,
    questions: Questions,
    methods: Sequence[str] = (),
    keeps: Sequence[float | str] = KEEPS,
    *,
    number: int = 5,
    presets: Sequence[str | Path | Mapping[str, object] | Preset] = (),
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
    seed: int | None = None,
    seeds: int = SEEDS,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    sampling: Sampling | None = None,
    generation: Generation | None = None,
    limits: Limits | None = None,
    answers: Path | None = None,
    on_progress: Progress | None = None,
) -> CaptionTest:
    """Sample captions with and without pruning: do they get poorer, or more alike?

    >>> import vtprune
    >>> questions = [("clip.mp4", "describe the clip", ["a circle falls"])]
    >>> result = vtprune.evaluate_captions(None, questions, ["divprune"], [0.3])
    >>> for row in result.rows:
    ...     print(row.name, row.figures["cider"])

    Args:
        questions: what asks for a caption, as of `evaluate`; right answers are the references.
        number: of captions of each, 2 or more.
        generation: how they are sampled; default: temperature 1, 64 tokens at most.
        model, methods, keeps, presets, at, options, seed, seeds, columns, limit, sampling, limits,
            answers: as of `evaluate`.

    Raises:
        VtpruneError: of any kind, with the way out; where a question can't be asked, its error is
            in the result's `failed`.
    """
    check_model(model)
    listed = _list_variants(methods, keeps, presets, at, options, seed)
    settings = _settings("auto", sampling or sampling_of(listed.media), None, limits)
    sampled = generation or replace(LONGEST, temperature=1.0, seed=seed or 0)
    asked, failed = _questions(questions, columns, limit, settings.limits)
    result = measure_captions(
        find_loaded(model),
        asked,
        repeat_variants(listed, seeds),
        number,
        replace(settings, generation=sampled),
        answers,
        on_progress,
        listed.notes,
    )
    return replace(result, failed=failed)


def reproduce(
    table: str | Path,
    questions: Questions | None = None,
    *,
    model: str | Path | None = None,
    seed: int | None = None,
    seeds: int = SEEDS,
    metric: str = "auto",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    sampling: Sampling | None = None,
    generation: Generation | None = None,
    limits: Limits | None = None,
    calibration: Path | None = None,
    answers: Path | None = None,
    on_progress: Progress | None = None,
) -> Reproduction:
    """Put a published table's figures beside those that come out here.

    >>> import vtprune
    >>> for row in vtprune.reproduce("entropyprune-llava-1.5").rows:
    ...     print(row.published.name, row.flops)

    Args:
        table: a packaged one, or a YAML file with the same keys.
        questions: as of `evaluate`; None: tokens and FLOPs alone, without weights.
        model: as of `profile`; default: the table's own.
        calibration: a file of the model's own layers.
        seed, seeds, metric, columns, limit, sampling, generation, limits, answers: as of
            `evaluate`.

    Raises:
        VtpruneError: of any kind, with the way out.
    """
    published = load_table(str(table))
    model = str(model or published.model)
    if questions is None:
        return run_table(published, model, seed, seeds, calibration, on_progress)

    settings = _settings(metric, sampling or Sampling(), generation, limits)
    asked, failed = _questions(questions, columns, limit, settings.limits, metric)

    def ask(variants: Sequence[Variant]) -> tuple[Sequence[Asked], Evaluation]:
        loaded = find_loaded(model)
        result = evaluation.evaluate(loaded, asked, variants, settings, answers, on_progress)
        return asked, replace(result, failed=failed)

    return run_table(published, model, seed, seeds, calibration, on_progress, ask)


def _list_variants(
    methods: Sequence[str],
    keeps: Sequence[float | str],
    presets: Sequence[str | Path | Mapping[str, object] | Preset],
    at: str | int | None,
    options: Mapping[str, str] | None,
    seed: int | None,
) -> VariantList:
    """Return the variants of a table; of the preset "balanced" where nothing is named."""
    presets = presets or ([] if methods else [DEFAULT])
    return list_variants(methods, keeps, presets, at, options, seed)


def _settings(
    metric: str, sampling: Sampling, generation: Generation | None, limits: Limits | None
) -> AskSettings:
    """Return how questions are asked.

    Raises:
        VtpruneError: a metric that there is not.
    """
    check_metric(metric)
    return AskSettings(sampling, (generation or LONGEST).greedy, limits or Limits(), metric=metric)


def _questions(
    questions: Questions,
    columns: Mapping[str, str] | None,
    limit: int | None,
    limits: Limits,
    metric: str = "auto",
) -> tuple[list[Asked], dict[int, VtpruneError]]:
    """Return the questions that can be asked, and the errors of the others by their numbers.

    Raises:
        VtpruneError: a list that can't be read, no question that can be asked, or a metric that
            does not fit one.
    """
    if isinstance(questions, (str, Path)):
        listed: list[Asked | FaultyRow | VtpruneError] = [*read_askable(questions, columns)]
    else:
        listed = [attempt(partial(_asked, item)) for item in questions]
    asked, failed = open_questions(listed, limits, limit)
    check_choices(metric, asked)
    return asked, failed


def _asked(item: object) -> Asked:
    """Return one question.

    Raises:
        VtpruneError: it is none.
    """
    if isinstance(item, Asked):
        return item
    if isinstance(item, (list, tuple)) and len(item) in (2, 3):
        item = {"file": item[0], "question": item[1], "answer": item[2] if item[2:] else None}
    result = read_row(item, Path())
    if isinstance(result, Asked):
        return result
    raise MediaError("; ".join(result), 'a question is ("clip.mp4", "what moves?", "a circle")')
