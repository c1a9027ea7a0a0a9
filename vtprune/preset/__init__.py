"""Presets by name, file or mapping, and the flags of one call over them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import cast

from vtprune.errors import PresetError, brief, list_faults, quote
from vtprune.preset.spec import (
    DEFAULT,
    LARGEST_WHOLE,
    Keep,
    Preset,
    StageSpec,
    check_keep,
    check_place,
    check_stage,
)
from vtprune.preset.yaml_file import read_yaml
from vtprune.pruners import METHODS, Value, check_options, find_method

__all__ = [
    "DEFAULT",
    "Keep",
    "Preset",
    "StageSpec",
    "find_preset",
    "load_preset",
    "override",
    "parse_keep",
    "preset_directory",
    "preset_names",
    "sampled",
]


def preset_directory() -> Path:
    """Where the packaged presets are: inside the wheel, or beside the package in a checkout."""
    packaged = Path(__file__).resolve().parents[1] / "_presets"
    return packaged if packaged.is_dir() else packaged.parents[1] / "presets"


def preset_names() -> list[str]:
    """The packaged presets."""
    return sorted(path.stem for path in preset_directory().glob("*.yaml"))


def load_preset(preset: str | Path | Mapping[str, object] | Preset | None) -> Preset:
    """A preset by packaged name, path, mapping in the preset schema, or as it is.

    Raises:
        PresetError: not found, not readable, or not valid; every fault is named, with its line.
    """
    if isinstance(preset, Preset):
        return preset
    if preset is None:
        return load_preset(DEFAULT)
    if isinstance(preset, Mapping):
        return _check_and_build(preset, "preset", {}, "custom")
    path = find_preset(preset)
    data, lines = read_yaml(path)
    if path == preset_directory() / f"{preset}.yaml":  # packaged, and checked by our tests
        return Preset.from_dict(cast("Mapping[str, object]", data), path.stem)
    return _check_and_build(data, preset, lines, path.stem)


def _check_and_build(
    data: object, source: object, lines: Mapping[tuple[str | int, ...], int], name: str
) -> Preset:
    from vtprune.preset.schema import check_preset  # pydantic takes a tenth of a second

    check_preset(data, source, lines)
    return Preset.from_dict(cast("Mapping[str, object]", data), name)


def find_preset(name: str | Path) -> Path:
    """The file of a preset given by packaged name or path."""
    text = str(name)  # may be anything: Path.is_file raises where a name is too long
    packaged = preset_directory() / f"{text}.yaml"
    if "/" not in text and "\\" not in text and os.path.isfile(packaged):
        return packaged
    if os.path.isfile(text):
        return Path(text)
    close = get_close_matches(text, preset_names(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise PresetError(
        f"no preset {quote(text)}: neither a packaged one nor a file",
        f"{hint}packaged: {', '.join(preset_names())} (vtprune presets list)",
    )


def parse_keep(text: str) -> Keep:
    """`--keep`'s value: "0.3", or "image=0.5,video=0.2".

    Raises:
        PresetError: not a number, or not in (0, 1].
    """
    if "=" not in text:
        return check_keep(text)
    keeps: dict[str, float] = {}
    for part in text.split(","):
        modality, _, value = part.strip().partition("=")
        if modality not in ("image", "video"):
            raise PresetError(
                f"keep for {quote(modality)}: no such modality", "image=0.5,video=0.2"
            )
        if modality in keeps:
            raise PresetError(
                f"keep for {modality} is given twice: {brief(text)}", "image=0.5,video=0.2"
            )
        keeps[modality] = check_keep(value)
    return keeps


def override(
    preset: Preset,
    keep: Keep | str | None = None,
    method: str | None = None,
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
    seed: int | None = None,
) -> Preset:
    """`preset` under the flags of one call.

    Args:
        keep: a fraction for all modalities, or modality -> fraction.
        method: replaces the stages by one free stage of this method.
        at: where that stage cuts; None for the method's own place.
        options: for that stage, or for every stage whose method has such an option.
        seed: of all random choices.

    Raises:
        PresetError: a value out of range, an unknown name, or a keep that sets nothing.

    Returns:
        What runs: under `method` it has no preset's name or description, under other changes they
        are in `changed`.
    """
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise PresetError(
            f"seed {quote(seed)} is not a whole number from 0 on", "seed 0 is the default"
        )
    if seed is not None and seed > LARGEST_WHOLE:
        raise PresetError(
            f"seed {quote(seed)} is more than {LARGEST_WHOLE}", "seed 0 is the default"
        )
    if at is not None and method is None:
        raise PresetError("--at without --method", "name the method that should cut there")
    stages, image, video = preset.stages, preset.image, preset.video
    before = (stages, image.stages, video.stages)
    if method is not None:
        place = check_place(find_method(method).at if at is None else at)
        stages = (StageSpec(place, method, options=_options(method, options or {})),)
        check_stage(stages[0])
        image, video = replace(image, stages=None), replace(video, stages=None)
        if METHODS[method].units and keep is None:  # what is predictable goes, and no more
            preset = replace(preset, keep=None, stages=stages)
            image, video = replace(image, keep=None), replace(video, keep=None)
    elif options:
        groups = (stages, image.stages, video.stages)
        known = {key for group in groups for stage in group or () for key, _ in stage.options}
        if missing := [key for key in options if key not in known]:
            raise PresetError(
                f"no stage of {preset.label} has the option "
                f"{list_faults([brief(key) for key in missing])}",
                "vtprune methods lists every method's options",
            )
        stages, own, other = (_apply(group, options) for group in groups)
        image, video = replace(image, stages=own), replace(video, stages=other)
    top = preset.keep
    if isinstance(keep, str):
        keep = parse_keep(keep)
    if isinstance(keep, Mapping):
        unknown = set(keep) - {"image", "video"}
        if unknown:
            raise PresetError(
                f"keep for {quote(unknown.pop())}: no such modality", "image or video"
            )
        if "image" in keep:
            image = replace(image, keep=check_keep(keep["image"]))
        if "video" in keep:
            video = replace(video, keep=check_keep(keep["video"]))
    elif keep is not None:
        top = check_keep(keep)
        image, video = replace(image, keep=None), replace(video, keep=None)
    made = replace(
        preset,
        name=preset.name if method is None else None,
        stages=stages,
        image=image,
        video=video,
        keep=top,
        seed=preset.seed if seed is None else seed,
    )
    if made.name is None:  # what was given is all that it is
        return replace(made, description="", changed=())
    changes: dict[str, object] = {}
    if (stages, image.stages, video.stages) != before:
        changes |= options or {}
    if any(made.keep_for(one) != preset.keep_for(one) for one in ("image", "video")):
        changes["keep"] = dict(keep) if isinstance(keep, Mapping) else made.keep
    if made.seed != preset.seed:
        changes["seed"] = made.seed
    return made.change(changes) if changes else made


def sampled(
    preset: Preset,
    frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    max_tiles: int | None = None,
) -> Preset:
    """A preset that looks at as much of the media as was looked at, whatever it says itself."""
    video = replace(preset.video, frames=frames, fps=fps, max_frames=max_frames)
    image = replace(preset.image, max_tiles=max_tiles)
    changes = {
        key: getattr(new, key)
        for old, new in ((preset.image, image), (preset.video, video))
        for key in ("max_tiles", "frames", "fps", "max_frames")
        if getattr(old, key) != getattr(new, key)
    }
    made = replace(preset, image=image, video=video)
    return made.change(changes) if changes and preset.name else made


def _options(method: str, options: Mapping[str, object]) -> tuple[tuple[str, Value], ...]:
    return tuple(check_options(method, options).items())


def _apply(
    stages: tuple[StageSpec, ...] | None, options: Mapping[str, str]
) -> tuple[StageSpec, ...] | None:
    """The stages with the options that their methods have."""
    if stages is None:
        return None
    changed = []
    for stage in stages:
        own: dict[str, object] = dict(stage.options)
        fitting = {key: value for key, value in options.items() if key in own}
        changed.append(replace(stage, options=_options(stage.method, {**own, **fitting})))
    return tuple(changed)
