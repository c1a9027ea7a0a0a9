"""Which rows a comparison has: what was asked for, and the baselines beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from vtprune.errors import PresetError, VtpruneError, brief, list_faults
from vtprune.inference.wording import with_options
from vtprune.preset import load_preset, override
from vtprune.preset.spec import ModalityPreset, Preset, StageSpec, check_keep, check_place
from vtprune.pruners import BASELINES, METHODS, check_options, find_method

KEEPS = (0.5, 0.3, 0.1)
DRAWN = ("random", "uniform")
"""The baselines that can leave any count at any layer: they stand at the input, and again wherever
an asked method cuts."""
UNPRUNED = "unpruned"

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One row before it has run.

    Args:
        role: "unpruned", "asked" or "baseline".
        method: its name; empty for a preset.
        preset: what is cut.
        keep: the layer average that was asked for; None where the preset's own keeps say it all.
        at: where it cuts, as it was asked for.
        counts: (layer, tokens left) of each cut, which a baseline shares with the asked row that
            it stands beside; empty for every other row.
        options: of the method, as they were given.
        error: why it can't run at all.
    """

    role: str
    method: str
    preset: Preset
    keep: float | None
    at: str = ""
    counts: tuple[tuple[int, int], ...] = ()
    error: VtpruneError | None = None
    options: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """What the row is called."""
        return with_options(self.method, dict(self.options)) or str(self.preset.name)


@dataclass(frozen=True)
class Lineup:
    """What a comparison is of.

    Args:
        entries: the rows, keep by keep, without the unpruned one.
        media: the preset that says how much of the media all rows look at.
        seed: of all random choices.
        notes: what the reader should know.
    """

    entries: tuple[Entry, ...]
    media: Preset
    seed: int = 0
    notes: tuple[str, ...] = ()


def unpruned(seed: int = 0) -> Entry:
    """The row that every other is measured against."""
    return Entry(UNPRUNED, UNPRUNED, Preset(name=UNPRUNED, keep=1.0, seed=seed), 1.0)


def line_up(
    methods: Sequence[str] = (),
    keeps: Sequence[float | str] = KEEPS,
    presets: Sequence[str | Path | Mapping[str, object] | Preset] = (),
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
    seed: int | None = None,
) -> Lineup:
    """The rows of a comparison, keep by keep: what was asked for, then the baselines.

    Args:
        methods: each at its own place, or at `at`.
        keeps: layer averages of the kept fraction.
        presets: names, paths, mappings or presets; each at every keep, or once where its stages
            say all their keeps themselves.
        options: of every method that has such an option.
        seed: of all random choices; None: the presets' own, else 0.

    Raises:
        PresetError: every fault of what was asked, all at once.
    """
    budgets, loaded, own = _checked(methods, keeps, presets, at, options or {}, seed)
    entries, notes = [], []
    for keep in budgets:
        asked = [_method("asked", name, keep, at, own[name], seed) for name in own]
        asked += [_preset(one, keep, seed) for one in loaded if _takes_keep(one)]
        entries += asked
        for name in BASELINES:
            place = "input" if name in DRAWN else None
            entry = _method("baseline", name, keep, place, {}, seed)
            if all(one.preset != entry.preset for one in asked):
                entries.append(entry)
    for one in (one for one in loaded if not _takes_keep(one)):
        entries.append(_preset(one, None, seed))
        notes.append(f"preset {one.name} says all its keeps itself: it has one row, beside none of "
                     "the keeps that were asked for")  # fmt: skip
    media, told = _shared_media(loaded)
    return Lineup(tuple(entries), media, seed or 0, (*notes, *told))


def _checked(
    methods: Sequence[str],
    keeps: Sequence[float | str],
    presets: Sequence[str | Path | Mapping[str, object] | Preset],
    at: str | int | None,
    options: Mapping[str, str],
    seed: int | None,
) -> tuple[list[float], list[Preset], dict[str, dict[str, str]]]:
    """Keeps, presets, and the methods with their own options; or every fault of them."""
    faults: list[VtpruneError] = []
    if not methods and not presets:
        faults.append(PresetError("nothing to compare", "name --methods or --presets"))
    if not keeps:
        faults.append(PresetError("no keep to compare at", "for example: --keep 0.5,0.3,0.1"))
    budgets = _all(faults, (partial(check_keep, keep) for keep in keeps))
    loaded = _all(faults, (partial(load_preset, one) for one in presets))
    known = [name for name in dict.fromkeys(methods) if name in METHODS]
    own: dict[str, dict[str, str]] = {name: {} for name in known}
    for split in _all(faults, [partial(split_options, known, options)]):
        own = split
    _all(faults, (partial(find_method, name) for name in methods))
    _all(faults, (partial(check_options, name, own[name]) for name in known))
    _all(faults, (partial(check_place, place) for place in (at,) if place is not None))
    _all(faults, [partial(override, Preset(), seed=seed)])
    _once(faults, "method", methods)
    _once(faults, "preset", (str(preset.name) for preset in loaded))
    _once(faults, "keep", (f"{keep:g}" for keep in budgets))
    if faults:
        raise PresetError(
            list_faults([fault.message for fault in faults]),
            list_faults([fault.hint for fault in faults if fault.hint]),
        )
    return budgets, loaded, own


def _shared_media(presets: Sequence[Preset]) -> tuple[Preset, list[str]]:
    """The preset that says how much of the media all rows look at, and what is to be said of it."""
    asking = {
        one.name: (one.image.max_tiles, one.video.frames, one.video.fps, one.video.max_frames)
        for one in presets
    }
    saying = [one for one in presets if any(value is not None for value in asking[one.name])]
    if len({asking[one.name] for one in saying}) == 1:
        return saying[0], []
    names = ", ".join(str(one.name) for one in saying)
    note = (f"presets {names} look at different frames or tiles when alone; here all rows look at "
            "the same: as many as --frames, --fps and --max-tiles say, else the model's own "
            "choice")  # fmt: skip
    return Preset(), [note] if saying else []


def _method(
    role: str,
    name: str,
    keep: float,
    at: str | int | None,
    options: Mapping[str, str],
    seed: int | None,
) -> Entry:
    """A method's row; one that can't cut at that place says so in it."""
    place = METHODS[name].at if at is None else check_place(at)
    entry = Entry(role, name, Preset(None, keep=keep), keep, place, options=tuple(options.items()))
    try:
        return replace(entry, preset=override(Preset(), keep, name, at, options, seed))
    except PresetError as error:
        return replace(entry, error=error)


def _preset(preset: Preset, keep: float | None, seed: int | None) -> Entry:
    made = override(preset, keep, seed=seed)
    groups = (made.stages, made.image.stages, made.video.stages)
    places = dict.fromkeys(stage.at for group in groups for stage in group or ())
    return Entry("asked", "", made, keep, ", ".join(places))


def beside(entry: Entry, stages: Sequence[Mapping[str, object]]) -> list[Entry]:
    """`random` and `uniform` at the layers and counts of what an asked row has cut.

    Args:
        entry: the asked row.
        stages: `tokens.stages` of its report.

    Returns:
        Nothing where it cut before the first layer only, or left nothing to choose from.
    """
    counts = counts_of(stages)
    if not any(layer for layer, _ in counts) or not any(left for _, left in counts):
        return []
    places = ", ".join(str(layer) if layer else "input" for layer, _ in counts)
    return [
        Entry("baseline", name, _repeated(entry.preset, stages, name), entry.keep, places, counts)
        for name in DRAWN
    ]


def counts_of(stages: Sequence[Mapping[str, object]]) -> tuple[tuple[int, int], ...]:
    """(layer, tokens left) of each cut of a report; of several at one place, of the last."""
    return tuple((_whole(one["layer"]), _whole(one["after"])) for one in _last(stages).values())


def _last(stages: Sequence[Mapping[str, object]]) -> dict[object, Mapping[str, object]]:
    return {(stage["modality"], stage["layer"]): stage for stage in stages}


def _repeated(preset: Preset, stages: Sequence[Mapping[str, object]], method: str) -> Preset:
    """Cuts at the same explicit layers to the same counts, by another method."""
    whole = {stage["modality"]: _whole(stage["before"]) for stage in reversed(stages)}
    told: dict[str, list[StageSpec]] = {}
    for stage in _last(stages).values():
        modality, left, layer = str(stage["modality"]), _whole(stage["after"]), stage["layer"]
        total = whole[modality]
        name = method if left else "vtw"  # the one that may leave nothing, wherever it does
        told.setdefault(modality, []).append(
            StageSpec(
                at=str(layer) if layer else "input",
                method=name,
                keep=left / total if total else 1.0,
                options=tuple(check_options(name, {}).items()),
            )
        )
    if "all" in told:
        return Preset(None, seed=preset.seed, stages=tuple(told["all"]))
    image, video = (
        ModalityPreset(stages=tuple(told[name])) if name in told else ModalityPreset(keep=1.0)
        for name in ("image", "video")
    )
    return Preset(None, seed=preset.seed, image=image, video=video)


def _takes_keep(preset: Preset) -> bool:
    """Whether a layer average says anything to a preset."""
    try:
        override(preset, KEEPS[0])
    except PresetError:
        return False
    return True


def _all(faults: list[VtpruneError], makers: Iterable[Callable[[], T]]) -> list[T]:
    """What can be made; what can't is a fault."""
    made = []
    for make in makers:
        try:
            made.append(make())
        except VtpruneError as error:
            faults.append(error)
    return made


def _once(faults: list[VtpruneError], what: str, names: Iterable[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            faults.append(
                PresetError(f"{what} {brief(name)} is named {times} times", "once is enough")
            )


def split_options(methods: Sequence[str], options: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The options that each method has, of those that are given to all.

    Raises:
        PresetError: options that no method has.
    """
    has = {name: {option.name for option in METHODS[name].options} for name in methods}
    missing = [key for key in options if not any(key in known for known in has.values())]
    if missing:
        what = f"none of {', '.join(has)} has" if has else "no method was named that has"
        raise PresetError(
            f"{what} the option {list_faults([brief(key) for key in missing])}",
            "vtprune methods lists every method's options",
        )
    return {
        name: {key: value for key, value in options.items() if key in known}
        for name, known in has.items()
    }


def _whole(value: object) -> int:
    assert isinstance(value, int)
    return value
