"""The order of a profile: a shape, its inputs, its rows, their seconds, a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from vtprune import __version__
from vtprune.errors import ModelError
from vtprune.evaluation.profiling.build import build_skeleton
from vtprune.evaluation.profiling.cases import Cases, Options
from vtprune.evaluation.profiling.figures import Found, failed_row, make_row
from vtprune.evaluation.profiling.inputs import describe_case, largest_picture
from vtprune.evaluation.profiling.machine import ProfiledModel, measure_machine, weigh
from vtprune.evaluation.profiling.row_times import RUN, Measurement, TimeBudget
from vtprune.evaluation.profiling.rows import (
    KEEPS,
    PlannedRow,
    is_preset,
    plan_row,
    profile_variants,
)
from vtprune.evaluation.profiling.shapes import Shape, find_shape
from vtprune.evaluation.profiling.shown import Shown
from vtprune.evaluation.profiling.timing import measure
from vtprune.evaluation.profiling.verdict import FEWEST_PASSES, Verdict, judge
from vtprune.inference.csv_file import csv_text, flat
from vtprune.inference.figures import describe_model
from vtprune.inference.wording import counted
from vtprune.models import cost
from vtprune.models.devices import find_device, find_dtype
from vtprune.models.loading import Loaded
from vtprune.preset.calibration import read_calibration

if TYPE_CHECKING:
    from vtprune.models.loading import Progress

BUSY = 1.25  # the slowest pass of the unpruned row over its fastest, from which on it is said


@dataclass(frozen=True)
class Profile:
    """What `profile` gives.

    Args:
        model: as in a report, and `source`: where its shape comes from.
        machine: the device, its name and its measured ceilings.
        input: as in a report, and its visual and text tokens.
        rows: the unpruned model first; see `figures.make_row`.
        verdict: in sentences.
        findings: the verdict's parts: limited_by, pays, best, best_told_apart.
        measured: how the seconds were measured: whole or layers, passes, seconds, and the size of
            the smaller input that they were scaled from; None where nothing was measured.
        warnings: what the reader should know before believing a figure.
        version: of vtprune, torch and transformers.
    """

    model: Mapping[str, object]
    machine: Mapping[str, object]
    input: Mapping[str, object]
    rows: tuple[Mapping[str, object], ...]
    verdict: str
    findings: Mapping[str, object] = field(default_factory=dict)
    measured: Mapping[str, object] | None = None
    warnings: tuple[str, ...] = ()
    version: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Plain dicts, lists, strings and numbers."""
        return {**vars(self), "rows": list(self.rows), "warnings": list(self.warnings)}

    def to_csv(self) -> str:
        """One line a row, its blocks as columns, under a line of their names."""
        same = {
            **{key: self.model[key] for key in ("device", "dtype", "attention")},
            "model": self.model["name"],
            "machine": self.machine["name"],
            "passes": (self.measured or {}).get("passes"),
        }
        return csv_text([{**same, **flat(row)} for row in self.rows])


def profile(
    name: str | None = None,
    shown: Shown | None = None,
    *,
    keeps: Sequence[float] = KEEPS,
    presets: Sequence[str] | None = None,
    methods: Sequence[str] = (),
    at: str | None = None,
    method_options: Mapping[str, str] | None = None,
    base: str | None = None,
    seed: int | None = None,
    options: Options | None = None,
    on_progress: Progress | None = None,
) -> Profile:
    """What pruning saves on this machine, from a model's shape alone.

    Args:
        name: short name, hub id, directory or config file; None: the embedded model.
        shown: the input; None: the largest picture that the model's family takes.
        keeps, presets, methods, at, method_options, base, seed: as of `profile_variants`.

    Raises:
        VtpruneError: of any kind, with the way out.
    """
    options = options or Options()
    variants = profile_variants(keeps, presets, methods, at, method_options, base, seed)
    shape = find_shape(name)
    budget = TimeBudget(options.seconds)
    model = find_profiled(shape, options, on_progress)
    shown = shown or largest_picture(model.loaded)
    cases = Cases(model.loaded, shown, options, on_progress)
    planned = [cases.plan(one) for one in variants]
    plain = {
        id(case): plan_row(model.loaded, case.larger or case, variants[0]) for case in cases.made
    }
    measured = None
    if options.timed:
        fine = [*plain.values(), *(row for row in planned if not row.error)]
        measured = measure(model, distinct(fine), budget, options.repeats, options.how,
                           on_progress)  # fmt: skip
    found = [
        Found(model, row, plain[id(row.case)], options.answer_tokens, measured)
        for row in planned
        if not (row.error or (measured and row.key in measured.errors))
    ]
    by_row = {id(one.planned): one for one in found}
    verdict = conclude(found, measured is not None, options)
    return Profile(
        model=describe(shape, model),
        machine=asdict(model.machine),
        input=describe_case(cases.made[0]),
        rows=tuple(
            make_row(by_row[id(row)]) if id(row) in by_row else failed_row(row, measured)
            for row in planned
        ),
        verdict=verdict.text,
        findings={
            "limited_by": verdict.limit,
            "pays": verdict.pays,
            "best": verdict.best,
            "best_told_apart": verdict.apart,
        },
        measured=describe_measured(measured),
        warnings=gather_warnings(shape, cases, planned, measured, found),
        version=versions(),
    )


def gather_warnings(
    shape: Shape,
    cases: Cases,
    rows: Sequence[PlannedRow],
    measured: Measurement | None,
    found: Sequence[Found],
) -> tuple[str, ...]:
    """What the reader should know before believing a figure, each once."""
    notes = [*shape.warnings, *cases.warnings, *(measured.warnings if measured else ())]
    notes += doubts(found) if measured else ()
    notes += [note for row in rows for note in row.warnings if "by default" in note]
    if not cases.what.paths and any(row.encoded for row in rows):
        notes.append(
            "the pixels are random, and what goes at pixels depends on what is shown: give a file"
        )
    return tuple(dict.fromkeys(notes))


def doubts(found: Sequence[Found]) -> list[str]:
    """Why the rows' times are less comparable than they seem."""
    notes = []
    plain = found[0].times
    assert plain is not None
    took = [one.prefill for one in plain.passes]
    if max(took) > BUSY * min(took):
        notes.append(
            f"the machine was busy: the same unpruned prefill took {min(took):.2g} to "
            f"{max(took):.2g} s; rows whose ranges overlap are not told apart"
        )
    if len(took) < FEWEST_PASSES:
        notes.append(
            f"{counted(len(took), 'pass', 'passes')} can't tell rows apart, {FEWEST_PASSES} can: "
            "a larger --seconds makes room for them"
        )
    for number, less in enumerate(found):
        more = next((one for one in reversed(found[:number]) if one.same_cuts(less)), None)
        if more and less.prefill_seconds > more.prefill_seconds:
            notes.append(
                f"{less.row.name} was measured slower than {more.row.name}, which keeps "
                "more: they differ by less than the noise"
            )
    above = [one.row.name for one in found if one.times and one.above_roofline]
    if above:
        notes.append(
            f"{', '.join(above)}: faster than the roofline, whose ceilings were measured at "
            "another moment and in other shapes"
        )
    ways = {one.times.how for one in found if one.times}
    if len(ways) > 1:
        other = [one.row.name for one in found if one.times and one.times.how != RUN]
        notes.append(
            f"{', '.join(other)}: summed or scaled from layers of other rows (~), and so not "
            "comparable with those that ran to within a few percent; a larger --seconds runs them"
        )
    return notes


def find_profiled(shape: Shape, options: Options, on_progress: Progress | None) -> ProfiledModel:
    """The model's structure, and the device that it would run on, measured."""
    device = find_device(options.device)
    if options.device == "map":
        raise ModelError("a profile is of one device", "--device auto, cpu, cuda or cuda:1")
    dtype = find_dtype(options.dtype, shape.config, device)
    shape.config.dtype = dtype
    try:
        cost.decoder_shape(shape.config.get_text_config())
    except cost.CostError as error:
        raise ModelError(
            f"{shape.name}: a profile needs FLOPs, and {error.message}",
            "vtprune ask --compare and vtprune compare measure without them",
        ) from error
    loaded = without_weights(shape, options)
    if on_progress:
        on_progress("measuring this machine", 0, 0)
    machine = measure_machine(device, dtype)
    weights = weigh(loaded.model, dtype.itemsize)
    return ProfiledModel(loaded, device, dtype, machine, weights, options.attention)


def distinct(rows: Sequence[PlannedRow]) -> list[PlannedRow]:
    """The rows without those that are cut as another one is, case by case, uncut ones first."""
    first: dict[object, PlannedRow] = {}
    for row in rows:
        first.setdefault(row.key, row)
    order = list(dict.fromkeys(id(row.case) for row in rows))
    return sorted(first.values(), key=lambda row: (order.index(id(row.case)), bool(row.cuts)))


def conclude(found: Sequence[Found], timed: bool, options: Options) -> Verdict:
    """The verdict on the rows that could be cut."""
    pruned = [one for one in found if one.row.cuts]
    if not pruned:
        return Verdict("Nothing is cut in any row.", "", False, "")
    nearest = min(
        pruned,
        key=lambda one: (is_preset(one.row.variant), abs((one.row.variant.keep or 0) - 0.3)),
    )
    facts = [one.facts() for one in found]
    verdict = judge(facts, nearest.facts(), options.answer_tokens)
    if timed:
        return verdict
    told = "Nothing was timed; this is what the machine's ceilings allow."
    return replace(verdict, text=f"{told} {verdict.text}")


def describe(shape: Shape, model: ProfiledModel) -> dict[str, object]:
    """The report's `model`, and where the shape is from."""
    return {
        **describe_model(model.loaded).to_dict(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "source": shape.source,
    }


def describe_measured(measured: Measurement | None) -> dict[str, object] | None:
    if measured is None:
        return None
    return {
        "how": measured.how,
        "passes": measured.passes,
        "seconds": measured.seconds,
        "scaled": measured.scaled,
    }


def versions() -> dict[str, str]:
    import transformers

    return {
        "vtprune": __version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def without_weights(shape: Shape, options: Options) -> Loaded:
    """The model's structure on the "meta" device, with what is known of its inputs."""
    model = build_skeleton(shape.config, options.attention)
    calibration = None
    if options.calibration is not None:
        text = shape.config.get_text_config()
        calibration = read_calibration(
            options.calibration,
            text.num_hidden_layers,
            model_type=str(shape.config.model_type),
            hidden=text.hidden_size,
        )
    return Loaded(shape.name, model, shape.files, shape.family, calibration)
