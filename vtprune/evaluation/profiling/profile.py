"""The steps of a profile: a shape, its inputs, its rows, their seconds, a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vtprune.errors import ModelError, VtpruneError
from vtprune.evaluation.profiling.gpus import Gpu, find_gpu
from vtprune.evaluation.profiling.machine import ProfiledModel, machine_of_gpu, measure_machine
from vtprune.evaluation.profiling.prompts import ProfiledMedia, ProfiledPrompts, largest_picture
from vtprune.evaluation.profiling.result import (
    Profile,
    PromptInfo,
    RowFigures,
    ShapeInfo,
    failed_row,
)
from vtprune.evaluation.profiling.row_times import RUN, Measurement, TimeBudget
from vtprune.evaluation.profiling.rows import (
    KEEPS,
    PlannedRow,
    is_preset,
    plan_row,
    profile_variants,
)
from vtprune.evaluation.profiling.shapes import Shape, find_shape
from vtprune.evaluation.profiling.timing import measure
from vtprune.evaluation.profiling.verdict import FEWEST_PASSES, VerdictFindings, judge
from vtprune.evaluation.variants import UNPRUNED, Variant
from vtprune.inference.measuring import describe_model, describe_versions, warn_of_late_cuts
from vtprune.inference.prepare import sampling_of
from vtprune.inference.roofline import weigh
from vtprune.inference.wording import counted
from vtprune.media import Limits
from vtprune.models import cost
from vtprune.models.base import Sampling
from vtprune.models.devices import find_device, find_dtype
from vtprune.models.loading import Loaded
from vtprune.models.skeleton import build_skeleton
from vtprune.preset import Preset
from vtprune.preset.calibration import read_calibration
from vtprune.tokens.layout import MODALITIES

if TYPE_CHECKING:
    from vtprune.models.loading import Progress

BUSY = 1.25  # the slowest pass of the unpruned row over its fastest, from which on it is said
TEXT_TOKENS, ANSWER_TOKENS, SECONDS, REPEATS = 64, 32, 60.0, 5


@dataclass(frozen=True)
class ProfileOptions:
    """How a profile is made.

    Args:
        device, dtype, attention: as for loading a model.
        text_tokens: all tokens of the prompt that are not visual.
        answer_tokens: of the answer that decoding is counted for.
        seconds: that measuring may take.
        repeats: the most passes over all rows.
        timed: whether anything is run; else tokens, FLOPs, bytes and the roofline only.
        how: "whole", "layers", or "auto": the whole model where it fits memory and budget.
        calibration: a file with the entropy collapse layer and the information horizon.
        sampling: how much of the media, before what a preset or the family says.
        limits: of what is read.
        gpu: a card that is not here, by the name of its data sheet: what it would take at its peaks
            is predicted, and nothing is run.
    """

    device: str = "auto"
    dtype: str = "auto"
    attention: str | None = None
    text_tokens: int = TEXT_TOKENS
    answer_tokens: int = ANSWER_TOKENS
    seconds: float = SECONDS
    repeats: int = REPEATS
    timed: bool = True
    how: str = "auto"
    calibration: Path | None = None
    sampling: Sampling = field(default_factory=Sampling)
    limits: Limits = field(default_factory=Limits)
    gpu: str | None = None


def profile(
    name: str | Path | None = None,
    media: ProfiledMedia | None = None,
    *,
    keeps: Sequence[float] = KEEPS,
    presets: Sequence[str | Preset] | None = None,
    methods: Sequence[str] = (),
    at: str | None = None,
    method_options: Mapping[str, str] | None = None,
    base: str | None = None,
    seed: int | None = None,
    options: ProfileOptions | None = None,
    on_progress: Progress | None = None,
) -> Profile:
    """Tell what pruning saves on this machine, from a model's shape alone.

    >>> import vtprune
    >>> profile = vtprune.profile("llava-next", keeps=[0.3])
    >>> profile.to_dict()["verdict"]

    Args:
        name: short name, hub id, directory or config file; None: the embedded model.
        media: the input; None: the largest picture that the model's family takes.
        keeps, presets, methods, at, method_options, base, seed: as of `profile_variants`.

    Raises:
        VtpruneError: of any kind, with the way out.
    """
    options = options or ProfileOptions()
    variants = profile_variants(keeps, presets, methods, at, method_options, base, seed)
    shape = find_shape(name)
    budget = TimeBudget(options.seconds)
    model = profiled_model(shape, options, on_progress)
    prompts = ProfiledPrompts(
        model.loaded, media or largest_picture(model.loaded), options.sampling,
        options.text_tokens, options.limits, on_progress,
    )  # fmt: skip
    planned = [plan_variant(prompts, variant) for variant in variants]
    unpruned = {
        one: plan_row(model.loaded, one.larger or one, variants[0]) for one in prompts.distinct
    }
    measurement = None
    if options.timed and not model.machine.predicted:
        rows = [*unpruned.values(), *(row for row in planned if not row.error)]
        measurement = measure(
            model, distinct_rows(rows), budget, options.repeats, options.how, on_progress
        )
    failed = measurement.errors if measurement else {}
    figures = {
        row: RowFigures(model, row, unpruned[row.prompt], options.answer_tokens, measurement)
        for row in planned
        if not row.error and row.key not in failed
    }
    verdict, findings = conclude(list(figures.values()))
    prompt = prompts.distinct[0]
    return Profile(
        model=describe_shape(shape, model),
        machine=model.machine,
        input=PromptInfo(
            **vars(prompt.describe()), visual_tokens=len(prompt.layout), text_tokens=prompt.text
        ),
        rows=[
            figures[row].result() if row in figures else failed_row(row, measurement)
            for row in planned
        ],
        verdict=verdict,
        findings=findings,
        measured=measurement.info if measurement else None,
        warnings=gather_warnings(shape, prompts, planned, measurement, list(figures.values())),
        version=describe_versions(),
    )


def profiled_model(
    shape: Shape, options: ProfileOptions, on_progress: Progress | None
) -> ProfiledModel:
    """Return the model's structure, and the device that it would run on, measured."""
    gpu = None if options.gpu is None else find_gpu(options.gpu)
    device = torch.device("meta") if gpu else find_device(options.device)
    if options.device == "map":
        raise ModelError("a profile is of one device", "--device auto, cpu, cuda or cuda:1")
    dtype = find_dtype(options.dtype, shape.config, device)
    if gpu and options.dtype == "auto":
        dtype = dtype_on(gpu, dtype)
    loaded = load_structure(shape, dtype, options.attention, options.calibration)
    if on_progress and not gpu:
        on_progress("measuring this machine", 0, 0)
    machine = machine_of_gpu(gpu, name_of(dtype)) if gpu else measure_machine(device, dtype)
    weights = weigh(loaded.model, dtype.itemsize)
    return ProfiledModel(loaded, device, dtype, machine, weights, options.attention)


def load_structure(
    shape: Shape, dtype: torch.dtype, attention: str | None = None, calibration: Path | None = None
) -> Loaded:
    """Return a model without weights, whose FLOPs can be counted.

    Args:
        attention: the kernel; None leaves it to transformers.
        calibration: a file with the model's own layers; None: the packaged one.

    Raises:
        VtpruneError: of any kind; FLOPs that can't be counted.
    """
    shape.config.dtype = dtype
    text = shape.config.get_text_config()
    model = build_skeleton(shape.config, attention)
    measured = None
    if calibration is not None:
        measured = read_calibration(
            calibration,
            text.num_hidden_layers,
            model_type=str(shape.config.model_type),
            hidden=text.hidden_size,
        )
    loaded = Loaded(shape.name, model, shape.files, shape.family, measured)
    if isinstance(loaded.measured_decoder, cost.CostError):
        raise ModelError(
            f"{shape.name}: a profile needs FLOPs, and {loaded.measured_decoder.message}",
            "vtprune ask --compare and vtprune compare measure without them",
        )
    return loaded


def dtype_on(gpu: Gpu, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a checkpoint on a card, some of which have no bfloat16."""
    return dtype if name_of(dtype) in gpu.peak else torch.float16


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plan_variant(prompts: ProfiledPrompts, variant: Variant) -> PlannedRow:
    """Return a variant's row on its input: that of its own sampling, downsampled where it does."""
    preset = variant.preset
    sampling = sampling_of(preset) if is_preset(variant) else Sampling()
    downsamples = any(preset.downsampling_stage(modality) for modality in MODALITIES)
    try:
        prompt = prompts.find(sampling)
        if downsamples and variant.role != UNPRUNED:
            prompt = prompts.find(sampling, preset, prompt)
    except VtpruneError as error:
        return PlannedRow(variant, prompts.distinct[0], error=error.message)
    return plan_row(prompts.loaded, prompt, variant)


def distinct_rows(rows: Sequence[PlannedRow]) -> list[PlannedRow]:
    """Return the rows that are not cut as another one is, input by input, uncut ones first."""
    distinct: dict[object, PlannedRow] = {}
    for row in rows:
        distinct.setdefault(row.key, row)
    order = list(dict.fromkeys(row.prompt for row in rows))
    return sorted(distinct.values(), key=lambda row: (order.index(row.prompt), bool(row.cuts)))


def conclude(rows: Sequence[RowFigures]) -> tuple[str, VerdictFindings]:
    """Return the verdict on the rows that could be cut, spoken of the keep nearest to 0.3."""
    pruned = [one for one in rows if one.row.cuts]
    if not pruned:
        return "Nothing is cut in any row.", VerdictFindings()
    reference = min(
        pruned,
        key=lambda one: (is_preset(one.row.variant), abs((one.row.keep or 0) - 0.3)),
    )
    verdict, findings = judge([one.for_verdict() for one in rows], reference.for_verdict())
    if reference.times:
        return verdict, findings
    machine = reference.model.machine
    note = "Nothing was timed; this is what the machine's ceilings allow."
    if machine.predicted:
        note = f"Predicted from the data sheet of {machine.name}; nothing was timed."
    return f"{note} {verdict}", findings


def describe_shape(shape: Shape, model: ProfiledModel) -> ShapeInfo:
    """Return the report's `model`, and where the shape is from."""
    described = {
        **vars(describe_model(model.loaded)),
        "device": model.machine.device,
        "dtype": name_of(model.dtype),
    }
    return ShapeInfo(**described, source=shape.source)


# -- warnings --------------------------------------------------------------------------------------


def gather_warnings(
    shape: Shape,
    prompts: ProfiledPrompts,
    rows: Sequence[PlannedRow],
    measurement: Measurement | None,
    figures: Sequence[RowFigures],
) -> list[str]:
    """Return what the reader should know before believing a figure, each once."""
    warnings = [*shape.warnings, *prompts.warnings]
    if measurement:
        warnings += [*measurement.warnings, *warn_of_passes(figures[0]), *warn_of_rows(figures)]
    warnings += [warning for row in rows for warning in row.warnings if "by default" in warning]
    for figure in figures:
        flops = figure.flops
        warnings += warn_of_late_cuts(figure.model.loaded, flops.prefill, flops.prefill_full)
    warnings += warn_of_prediction(figures)
    if not prompts.media.paths and any(row.encoded for row in rows):
        warnings.append(
            "the pixels are random, and what a method drops at pixels depends on the picture or "
            "video: give a file"
        )
    return list(dict.fromkeys(warnings))


def warn_of_passes(unpruned: RowFigures) -> list[str]:
    """Return why all rows' times are less comparable than they seem."""
    assert unpruned.times is not None
    seconds = [one.prefill for one in unpruned.times.passes]
    warnings = []
    if max(seconds) > BUSY * min(seconds):
        warnings.append(
            f"the machine was busy: the same unpruned prefill took {min(seconds):.2g} to "
            f"{max(seconds):.2g} s; rows whose ranges overlap are not told apart"
        )
    if len(seconds) < FEWEST_PASSES:
        warnings.append(
            f"{counted(len(seconds), 'pass', 'passes')} can't tell rows apart, {FEWEST_PASSES} "
            "can: a larger --seconds makes room for them"
        )
    return warnings


def warn_of_prediction(figures: Sequence[RowFigures]) -> list[str]:
    """Return what a card's data sheet does not say, and which rows do not fit its memory."""
    if not figures or not figures[0].model.machine.predicted:
        return []
    machine = figures[0].model.machine
    warnings = [
        f"predicted from a data sheet ({machine.source}): no run reaches its peaks, so that all "
        "seconds are the least that the card could take; preparing the pixels is not in them"
    ]
    peaks = {row.row.name: row.model.peak_bytes(row.row.counts) for row in figures}
    large = [name for name, peak in peaks.items() if peak > machine.free_bytes]
    if large:
        most, memory = max(peaks.values()) / 1e9, machine.free_bytes / 1e9
        names = "no row" if len(large) == len(peaks) else f"not {', '.join(large)}"
        warnings.append(
            f"{names} fits the memory of {machine.name}: {memory:.0f} GB, where up to {most:.1f} "
            "GB are needed; the seconds are as if it did"
        )
    return warnings


def warn_of_rows(rows: Sequence[RowFigures]) -> list[str]:
    """Return which rows' times contradict what is known, or were measured in different ways."""
    warnings, prefill = [], [one.times.typical.prefill for one in rows if one.times]
    for number, row in enumerate(rows):
        larger = next((at for at in reversed(range(number)) if rows[at].same_way(row)), None)
        if larger is not None and prefill[number] > prefill[larger]:
            warnings.append(
                f"{row.row.name} was measured slower than {rows[larger].row.name}, which keeps "
                "more: they differ by less than the noise"
            )
    above = [one.row.name for one in rows if one.above_roofline]
    if above:
        warnings.append(
            f"{', '.join(above)}: faster than the roofline, whose ceilings were measured at "
            "another moment and in other shapes"
        )
    other = [one.row.name for one in rows if one.times and one.times.how != RUN]
    if other and len(other) < len(rows):
        warnings.append(
            f"{', '.join(other)}: summed or scaled from layers of other rows (~), and so not "
            "comparable with those that ran to within a few percent; a larger --seconds runs them"
        )
    return warnings
