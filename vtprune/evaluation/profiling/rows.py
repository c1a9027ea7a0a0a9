"""The rows of a profile: which presets at which keeps, and what each would keep of an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from vtprune.engine.plan import Group, Plan
from vtprune.engine.thinning import choose_units
from vtprune.engine.trace import Trace
from vtprune.errors import ModelError, PresetError, VtpruneError
from vtprune.evaluation.variants import split_options
from vtprune.inference.wording import with_options
from vtprune.models.structure import Structure, find_structure
from vtprune.preset import DEFAULT, Preset, StageSpec, load_preset, override, preset_names
from vtprune.preset.spec import PIXELS
from vtprune.pruners import METHODS, find_method
from vtprune.tokens.schedule import Schedule

if TYPE_CHECKING:
    from vtprune.evaluation.profiling.inputs import Case
    from vtprune.models.loading import Loaded

KEEPS = (1.0, 0.5, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Wanted:
    """One row before anything is known of its cost.

    Args:
        keep: the layer average that is asked for; None where a preset's own keeps say it all.
        name: of the preset whose row it is; None for a row of the list of keeps.
        preset: what is cut.
        method: that cuts in a row of the list of keeps; None: the stages of a preset.
        options: that were given of the method, or of those stages.
        base: that preset's name.
    """

    keep: float | None
    name: str | None
    preset: Preset
    method: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is cut."""
        return self.name is None and self.keep is not None and self.keep >= 1


@dataclass(frozen=True)
class Step:
    """One cut of a row.

    Args:
        spec: the stage, as the preset has it.
        modality: whose tokens it cuts.
        layer: the first layer that sees fewer.
        before, after: tokens of the modality.
        total: of the modality, in the prompt.
        media: it made the media smaller, before there was a prompt.
    """

    spec: StageSpec
    modality: str
    layer: int
    before: int
    after: int
    total: int
    media: bool = False


@dataclass(frozen=True, eq=False)
class Planned:
    """One row as it would be cut.

    Args:
        wanted: what was asked for.
        case: the input that it is about.
        steps: its cuts, in order of their layers.
        visual: visual tokens that each of the decoder's layers sees.
        error: why it can't be cut like that; empty where it can.
        encoded: modality -> rows that the vision tower gets of each item, where not all.
    """

    wanted: Wanted
    case: Case
    steps: tuple[Step, ...] = ()
    visual: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    error: str = ""
    encoded: Mapping[str, list[int]] | None = None

    @property
    def cuts(self) -> tuple[Step, ...]:
        """The steps of the model's own run."""
        return tuple(step for step in self.steps if not step.media)

    @property
    def counts(self) -> tuple[int, ...]:
        """All tokens that each layer sees."""
        return tuple(self.case.text + count for count in self.visual)

    @property
    def trace(self) -> Trace:
        """The trace of such a run, as far as its costs go."""
        return Trace(
            layouts=[self.case.layout],
            text=[self.case.text],
            visual_by_layer=[list(self.visual)],
            encoded=[dict(self.encoded)] if self.encoded else [],
            whole=[self.case.inputs.whole] if self.case.inputs.whole else [],
        )

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for rows that are cut alike."""
        every = len(self.case.layout)
        steps = tuple(
            replace(
                step,
                spec=replace(step.spec, at=PIXELS * (step.spec.at == PIXELS), keep=None),
                modality="all" if step.total == every else step.modality,
            )
            for step in self.steps
        )
        return (self.case, steps)


def want_rows(
    keeps: Sequence[float] = KEEPS,
    presets: Sequence[str] | None = None,
    methods: Sequence[str] = (),
    at: str | None = None,
    options: Mapping[str, str] | None = None,
    base: str | None = None,
    seed: int | None = None,
) -> list[Wanted]:
    """The rows of a profile: the keeps first, the largest before; then the presets.

    Args:
        keeps: fractions in (0, 1]; 1 is always among them.
        presets: names or files; None: all packaged ones.
        methods: that cut in the rows of the keeps, each in rows of its own; none: the stages of the
            first preset that takes a keep.
        at: where all methods cut; None: each at its own place.
        options: of every method that has such an option; without methods, of those stages.
        base: the preset that they are tried before "balanced", where `presets` names none.

        seed: of all random choices; None: the presets' own, else 0.

    Raises:
        PresetError: an unknown name, or a value out of range.
    """
    named = [load_preset(name) for name in (preset_names() if presets is None else presets)]
    tried = ([base] if base else []) if presets is None else named
    first = find_free([*map(load_preset, tried), load_preset(DEFAULT)])
    for name in methods:
        find_method(name)
    own = split_options(methods, options or {}) if methods else {}
    rows = [Wanted(1.0, None, override(first, 1.0))]
    for keep in sorted({*keeps} - {1.0}, reverse=True):
        for name in methods:
            preset = override(first, keep, name, at, own[name], seed)
            rows.append(Wanted(keep, None, preset, name, own[name]))
        if not methods:
            preset = override(first, keep, at=at, options=options, seed=seed)
            rows.append(Wanted(keep, None, preset, None, options or {}, first.name))
    named = [override(preset, seed=seed) for preset in named]
    return [*rows, *(Wanted(preset.keep, preset.name, preset) for preset in named)]


def find_free(presets: Sequence[Preset]) -> Preset:
    """The first preset whose stages leave a keep to be set."""
    for preset in presets:
        try:
            override(preset, 0.5)
        except PresetError:
            continue
        return preset
    raise AssertionError("the default preset takes a keep")


def plan_row(loaded: Loaded, case: Case, wanted: Wanted) -> Planned:
    """What a row would keep of an input, by the same rules as pruning itself.

    Args:
        loaded: its model may be without weights.
    """
    trace = Trace()
    structure = find_structure(loaded.model)
    if wanted.whole:
        return Planned(wanted, case, visual=(len(case.layout),) * len(structure.layers))
    try:
        plan = Plan(wanted.preset, structure, loaded.calibration, trace)
        groups = plan.groups_for([case.layout])
        thinning = None
        if any(group.at_pixels is not None for group in groups):
            thinning = choose_units(plan, [case.layout], [case.inputs.units])
        gone = thinning.gone if thinning else [torch.zeros(0, dtype=torch.long)]
        whole = [case.inputs.whole] if case.inputs.whole else []
        steps = []
        for group in groups:
            (schedule,) = plan.solve(group, [case.layout], gone, whole)
            steps += find_steps(group, schedule, case)
        check_windows(structure, case)
    except VtpruneError as error:
        return Planned(wanted, case, error=error.message)
    steps.sort(key=lambda step: step.layer)
    cuts = [step for step in steps if not step.media]
    visual = count_by_layer(len(case.layout), len(structure.layers), cuts)
    made = Planned(wanted, case, tuple(steps), tuple(visual), tuple(trace.warnings))
    return replace(made, encoded=thinning.encoded()[0]) if thinning else made


def find_steps(group: Group, schedule: Schedule, case: Case) -> list[Step]:
    """The cuts of one budget, and before them what made the media smaller."""
    own = present = len(case.layout.of_modality(group.modality))
    steps = []
    if case.inputs.whole and group.stages and METHODS[group.stages[0].method].media:
        full = case.inputs.whole.total(group.modality)
        steps.append(Step(group.stages[0], group.modality, 0, full, own, full, media=True))
    for cut in schedule.cuts:
        stage = group.stages[cut.stage]
        steps.append(Step(stage, group.modality, cut.layer, present, cut.count, own))
        present = cut.count
    return steps


def as_cut(row: Planned, visual: Sequence[int] | None) -> Planned:
    """A row with the counts that were really left: some methods keep fewer than they may.

    Args:
        visual: that every layer saw; None: as planned.
    """
    if visual is None or tuple(visual) == row.visual:
        return row
    steps, present = [], len(row.case.layout)
    for step in row.steps:
        if step.media:
            steps.append(step)
            continue
        left = visual[step.layer]
        steps.append(replace(step, before=present, after=left))
        present = left
    return replace(row, steps=tuple(steps), visual=tuple(visual))


def check_windows(structure: Structure, case: Case) -> None:
    """Refuses what the engine would."""
    window, length = structure.narrowest_window, case.text + len(case.layout)
    if window is not None and length > window:
        raise ModelError(
            f"the prompt has {length} tokens, and layers of this model see the last {window} only "
            "(sliding window): dropping tokens would widen what they see"
        )


def name_of(row: Planned) -> str:
    """What a row is called in a sentence."""
    wanted = row.wanted
    if wanted.name is not None:
        return f"preset {wanted.name}"
    keep = f"keep {wanted.keep:g}"
    if wanted.method is None:
        return keep
    return f"{with_options(wanted.method, wanted.options)} at {keep}"


def count_by_layer(total: int, num_layers: int, steps: Sequence[Step]) -> list[int]:
    """Visual tokens that each layer sees."""
    present, counts = total, []
    for layer in range(num_layers):
        present -= sum(step.before - step.after for step in steps if step.layer == layer)
        counts.append(present)
    return counts
