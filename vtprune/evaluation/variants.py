"""The variants of a comparison, evaluation or tuning: each is one way to prune, and one row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from vtprune.errors import PresetError, VtpruneError, brief, list_faults
from vtprune.inference.report import StageCount
from vtprune.inference.wording import with_options
from vtprune.preset import load_preset, override
from vtprune.preset.spec import ModalityPreset, Preset, StageSpec, check_keep, check_place
from vtprune.pruners import BASELINES, METHODS, OWN, check_options, find_method, find_profile
from vtprune.pruners.class_path import class_digest

KEEPS = (0.5, 0.3, 0.1)
SEEDS = 5  # of a random row; fewer say little about it
MATCHED = ("random", "uniform")
"""The baselines that can leave any count at any layer: they cut at the input, and again, as matched
baselines, at the layers and counts of other variants."""
UNPRUNED = "unpruned"
FOLLOW_UP = ", asked second"  # in rows and keys, which answers files hold

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Variant:
    """One way to prune.

    Args:
        role: "unpruned", "asked" or "baseline".
        method: its name; empty for a preset.
        preset: what is cut.
        keep: layer average that was asked for; None where the preset's own keeps say it all.
        at: where it cuts, as it was asked for.
        counts: (layer, kept tokens) of each cut that a matched baseline has to repeat.
        options: of the method, as given.
        error: why it can't run at all.
        matches: the variant whose layers and counts a matched baseline repeats on each question.
        repeat: number of the seed, from 0, where chance makes several runs one row.
        follow_up: each question is asked as the second of a conversation, on the tokens that the
            first question's prefill kept.
        stages_of: the preset whose stages cut, where a keep was asked for and not that preset.
    """

    role: str
    method: str
    preset: Preset
    keep: float | None
    at: str = ""
    counts: tuple[tuple[int, int], ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    error: VtpruneError | None = None
    matches: Variant | None = None
    repeat: int | None = None
    follow_up: bool = False
    stages_of: str | None = None

    @property
    def name(self) -> str:
        """The method with its options, or the preset's name."""
        return with_options(self.method, dict(self.options)) or str(self.preset.name)

    @property
    def row(self) -> str:
        """The row's name: method or preset, place and keep; all seeds share it."""
        return self._own_row + (FOLLOW_UP if self.follow_up else "")

    @property
    def _own_row(self) -> str:
        if self.matches is not None:
            return f"{self.method} beside {self.matches.row}"
        if self.role == UNPRUNED:
            return UNPRUNED
        return f"{self.name} at {self.at}" + ("" if self.keep is None else f" keep {self.keep:g}")

    @cached_property
    def key(self) -> str:
        """Its name in an answers file: the same from run to run as long as it cuts the same."""
        seed = "" if self.repeat is None else f" seed {self.preset.seed}"
        return self._key_of_all_seeds + seed + (FOLLOW_UP if self.follow_up else "")

    @property
    def _key_of_all_seeds(self) -> str:
        if self.matches is not None:
            return f"{self.method} beside {self.matches._key_of_all_seeds}"
        if self.role == UNPRUNED:
            return UNPRUNED
        first = replace(self.preset, seed=self.preset.seed - (self.repeat or 0))
        return f"{self._own_row} #{fingerprint(first)}"

    @property
    def is_random(self) -> bool:
        """Whether chance alone decides what is kept, so that one seed says little."""
        if self.method:
            return self.method == "random"
        stages = all_stages(self.preset)
        return bool(stages) and all(stage.method == "random" for stage in stages)


@dataclass(frozen=True)
class VariantList:
    """The variants that were asked for, and their baselines.

    Args:
        variants: keep by keep, without the unpruned one.
        media: the preset that says how frames and tiles are sampled for all of them.
        seed: of all random choices.
        notes: what the reader should know.
    """

    variants: tuple[Variant, ...]
    media: Preset
    seed: int = 0
    notes: tuple[str, ...] = ()


def unpruned_variant(seed: int = 0) -> Variant:
    """Return the variant that all others are compared with."""
    return Variant(UNPRUNED, UNPRUNED, Preset(name=UNPRUNED, keep=1.0, seed=seed), 1.0)


def list_variants(
    methods: Sequence[str] = (),
    keeps: Sequence[float | str] = KEEPS,
    presets: Sequence[str | Path | Mapping[str, object] | Preset] = (),
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
    seed: int | None = None,
) -> VariantList:
    """List the methods and presets at every keep, each keep followed by its baselines.

    Args:
        methods: each at its own place, or at `at`.
        keeps: layer averages of the kept fraction.
        presets: names, paths, mappings or presets; each at every keep, or once where its stages
            set all their keeps themselves.
        options: of every method that has such an option.
        seed: of all random choices; None: the presets' own, else 0.

    Raises:
        PresetError: every fault of what was asked, all at once.
    """
    checked = _check(methods, keeps, presets, at, options or {}, seed)
    takes_keep = {id(preset): _takes_keep(preset) for preset in checked.presets}
    variants, notes = [], []
    for keep in checked.keeps:
        asked = [
            method_variant("asked", name, keep, at, own_options, seed)
            for name, own_options in checked.methods.items()
        ]
        asked += [
            _of_preset(preset, keep, seed) for preset in checked.presets if takes_keep[id(preset)]
        ]
        variants += asked
        for name in BASELINES:
            place = "input" if name in MATCHED else None
            baseline = method_variant("baseline", name, keep, place, {}, seed)
            if all(variant.preset != baseline.preset for variant in asked):
                variants.append(baseline)
    for preset in checked.presets:
        if not takes_keep[id(preset)]:
            variants.append(_of_preset(preset, None, seed))
            notes.append(f"preset {preset.name} sets every stage's keep itself: it has one row, at "
                         "none of the keeps that were asked for")  # fmt: skip
    media, sampling_notes = _shared_sampling(checked.presets)
    return VariantList(tuple(variants), media, seed or 0, (*notes, *sampling_notes))


@dataclass(frozen=True)
class _Checked:
    """What was asked for, with nothing wrong in it; methods with the options that each has."""

    keeps: list[float]
    presets: list[Preset]
    methods: dict[str, dict[str, str]]


def _check(
    methods: Sequence[str],
    keeps: Sequence[float | str],
    presets: Sequence[str | Path | Mapping[str, object] | Preset],
    at: str | int | None,
    options: Mapping[str, str],
    seed: int | None,
) -> _Checked:
    """Check everything that was asked for, and raise all faults as one."""
    faults: list[VtpruneError] = []

    def refuse_repeated(what: str, names: Iterable[str]) -> None:
        for name, times in Counter(names).items():
            if times > 1:
                message = f"{what} {brief(name)} is named {times} times"
                faults.append(PresetError(message, "once is enough"))

    if not methods and not presets:
        faults.append(PresetError("nothing to compare", "name --methods or --presets"))
    if not keeps:
        faults.append(PresetError("no keep to compare at", "for example: --keep 0.5,0.3,0.1"))
    budgets = _each(faults, check_keep, keeps)
    loaded = _each(faults, load_preset, presets)
    known = [name for name in dict.fromkeys(methods) if name in METHODS]
    by_method: dict[str, dict[str, str]] = {name: {} for name in known}
    for split in _each(faults, lambda names: split_options(names, options), [known]):
        by_method = split
    _each(faults, find_method, methods)
    _each(faults, lambda name: check_options(name, by_method[name]), known)
    _each(faults, check_place, [] if at is None else [at])
    _each(faults, lambda number: override(Preset(), seed=number), [seed])
    refuse_repeated("method", methods)
    refuse_repeated("preset", (str(preset.name) for preset in loaded))
    refuse_repeated("keep", (f"{keep:g}" for keep in budgets))
    if faults:
        raise PresetError(
            list_faults([fault.message for fault in faults]),
            list_faults([fault.hint for fault in faults if fault.hint]),
        )
    return _Checked(budgets, loaded, by_method)


def _each(faults: list[VtpruneError], function: Callable[[S], T], values: Iterable[S]) -> list[T]:
    """Return the function of every value; what it raises is added to the faults."""
    results = []
    for value in values:
        try:
            results.append(function(value))
        except VtpruneError as error:
            faults.append(error)
    return results


def _shared_sampling(presets: Sequence[Preset]) -> tuple[Preset, list[str]]:
    """Return the preset whose sampling of frames and tiles all rows share, and what to note."""
    settings = {
        preset.name: (
            preset.image.max_tiles,
            preset.video.frames,
            preset.video.fps,
            preset.video.max_frames,
        )
        for preset in presets
    }
    setting = [
        preset for preset in presets
        if any(value is not None for value in settings[preset.name])
    ]  # fmt: skip
    if len({settings[preset.name] for preset in setting}) == 1:
        return setting[0], []
    names = ", ".join(str(preset.name) for preset in setting)
    note = (f"presets {names} sample different frames or tiles when used alone; here all rows see "
            "the same: as many as --frames, --fps and --max-tiles say, else the model's own "
            "choice")  # fmt: skip
    return Preset(), [note] if setting else []


def method_variant(
    role: str,
    name: str,
    keep: float,
    at: str | int | None,
    options: Mapping[str, str],
    seed: int | None,
) -> Variant:
    """Return the variant of a method; one that can't cut at that place holds the error."""
    place = METHODS[name].at if at is None else check_place(at)
    preset = Preset(None, keep=keep)
    variant = Variant(role, name, preset, keep, place, options=tuple(options.items()))
    try:
        return replace(variant, preset=override(Preset(), keep, name, at, options, seed))
    except PresetError as error:
        return replace(variant, error=error)


def _of_preset(preset: Preset, keep: float | None, seed: int | None) -> Variant:
    preset = override(preset, keep, seed=seed)
    places = dict.fromkeys(stage.at for stage in all_stages(preset))
    return Variant("asked", "", preset, keep, ", ".join(places))


def all_stages(preset: Preset) -> list[StageSpec]:
    """Return the stages of a preset, those of all modalities."""
    groups = (preset.stages, preset.image.stages, preset.video.stages)
    return [stage for group in groups for stage in group or ()]


def _takes_keep(preset: Preset) -> bool:
    """Whether a stage of the preset leaves its keep to the layer average."""
    try:
        override(preset, KEEPS[0])
    except PresetError:
        return False
    return True


def split_options(methods: Sequence[str], options: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Give each method those of the options that it has.

    Raises:
        PresetError: options that no method has.
    """
    has = {name: {option.name for option in METHODS[name].options} for name in methods}
    missing = [key for key in options if not any(key in known for known in has.values())]
    if missing:
        what = f"none of {', '.join(has)} has" if has else "no method was named that has"
        raise PresetError(
            f"{what} the option {list_faults([brief(key) for key in missing])}",
            "vtprune methods NAME lists a method's options",
        )
    return {
        name: {key: value for key, value in options.items() if key in known}
        for name, known in has.items()
    }


# -- matched baselines -----------------------------------------------------------------------------


def matched_baselines(variant: Variant, stages: Sequence[StageCount]) -> list[Variant]:
    """Return `random` and `uniform` at the layers and counts that a variant has cut to.

    Args:
        stages: `tokens.stages` of its report.

    Returns:
        Nothing where it cut at the input only, or kept no token to choose.
    """
    counts = counts_after_cuts(stages)
    if not any(layer for layer, _ in counts) or not any(kept for _, kept in counts):
        return []
    places = ", ".join(str(layer) if layer else "input" for layer, _ in counts)
    return [
        Variant("baseline", method, _preset_with_counts(variant.preset.seed, stages, method),
                variant.keep, places, counts)
        for method in MATCHED
    ]  # fmt: skip


def counts_after_cuts(stages: Sequence[StageCount]) -> tuple[tuple[int, int], ...]:
    """Return (layer, kept tokens) of each cut; of several cuts at one place, the last."""
    return tuple((stage.layer, stage.after) for stage in _last_at_each_place(stages))


def _last_at_each_place(stages: Sequence[StageCount]) -> list[StageCount]:
    return list({(stage.modality, stage.layer): stage for stage in stages}.values())


def _preset_with_counts(seed: int, stages: Sequence[StageCount], method: str) -> Preset:
    """Return a preset that cuts at the same layers to the same counts by another method."""
    totals = {stage.modality: stage.before for stage in reversed(stages)}
    specs: dict[str, list[StageSpec]] = {}
    for stage in _last_at_each_place(stages):
        modality, kept, layer = stage.modality, stage.after, stage.layer
        total = totals[modality]
        name = method if kept else "vtw"  # the only method that may keep nothing
        spec = StageSpec(
            at=str(layer) if layer else "input",
            method=name,
            keep=kept / total if total else 1.0,
            options=tuple(check_options(name, {}).items()),
        )
        specs.setdefault(modality, []).append(spec)
    if "all" in specs:
        return Preset(None, seed=seed, stages=tuple(specs["all"]))
    image, video = (
        ModalityPreset(stages=tuple(specs[name])) if name in specs else ModalityPreset(keep=1.0)
        for name in ("image", "video")
    )
    return Preset(None, seed=seed, image=image, video=video)


# -- seeds and follow-up questions -----------------------------------------------------------------


def group_by_row(variants: Iterable[Variant]) -> dict[str, list[Variant]]:
    """Return row -> its variants, which differ by their seeds."""
    groups: dict[str, list[Variant]] = {}
    for variant in variants:
        groups.setdefault(variant.row, []).append(variant)
    return groups


def repeat_variants(
    listed: VariantList, seeds: int = SEEDS, matched: bool = False, follow_ups: bool = False
) -> list[Variant]:
    """List what an evaluation runs: the unpruned variant, and each listed one for its seeds.

    Args:
        seeds: runs of each row whose kept tokens are random.
        matched: add random and uniform at the layers and counts of every variant that was asked
            for and cuts past the input.
        follow_ups: add each question as a follow-up, but for matched baselines.

    Raises:
        PresetError: fewer than one seed.
    """
    if seeds < 1:
        raise PresetError(
            f"seeds {seeds} is out of range", f"1 or more; {SEEDS} give a reliable mean"
        )
    variants = [unpruned_variant(listed.seed)]
    for variant in listed.variants:
        runs = _for_seeds(variant, seeds)
        variants += runs
        if not matched or variant.role != "asked":
            continue
        for method in MATCHED:
            baseline = Variant("baseline", method, Preset(None), variant.keep, variant.at,
                               matches=runs[0])  # fmt: skip
            variants += _for_seeds(baseline, seeds)
    if not follow_ups:
        return variants
    return variants + [
        replace(variant, follow_up=True) for variant in variants if variant.matches is None
    ]


def _for_seeds(variant: Variant, seeds: int) -> list[Variant]:
    """Return the variant once for every seed where its choices are random, else once."""
    if not variant.is_random:
        return [variant]
    preset = variant.preset
    return [
        replace(variant, repeat=number, preset=replace(preset, seed=preset.seed + number))
        for number in range(seeds)
    ]


def fingerprint(preset: Preset) -> str:
    """Return a few digits that change with anything that a preset cuts, and with its methods."""
    stages = [stage for modality in ("image", "video") for stage in preset.stages_for(modality)]
    profiles = [find_profile(stage.method) for stage in stages if stage.at == "schedule"]
    schedules = [(profile.depths, profile.fractions(0.1)) for profile in profiles]
    methods = {stage.method: class_digest(OWN[stage.method]) for stage in stages
               if stage.method in OWN}  # fmt: skip
    text = f"{replace(preset, description='')} {schedules}{methods or ''}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]
