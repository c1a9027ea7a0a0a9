"""Presets by name, file or mapping, and the flags of one call over them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import cast

from vtprune.errors import PresetError, brief, list_faults, nearest_path, quote
from vtprune.preset.spec import (
    DEFAULT,
    FITS,
    LARGEST_WHOLE,
    DecodeSpec,
    Keep,
    Preset,
    StageSpec,
    StreamSpec,
    check_keep,
    check_place,
    check_stage,
    stream_of,
)
from vtprune.preset.yaml_file import read_yaml
from vtprune.pruners import METHODS, check_options, find_method
from vtprune.small_files import system_name

__all__ = [
    "DEFAULT",
    "DecodeSpec",
    "Keep",
    "Preset",
    "StageSpec",
    "StreamSpec",
    "find_preset",
    "load_preset",
    "override",
    "parse_keep",
    "preset_directory",
    "preset_names",
    "set_sampling",
]


def preset_directory() -> Path:
    """Return the folder of the packaged presets, in the wheel or in a checkout."""
    packaged = Path(__file__).resolve().parents[1] / "_presets"
    return packaged if packaged.is_dir() else packaged.parents[1] / "presets"


def preset_names() -> list[str]:
    """Return the names of the packaged presets."""
    return sorted(path.stem for path in preset_directory().glob("*.yaml"))


def load_preset(preset: str | Path | Mapping[str, object] | Preset | None) -> Preset:
    """Return a preset by its packaged name, its path, a mapping in the preset schema, or itself.

    >>> import vtprune
    >>> vtprune.load_preset("balanced").keep
    0.3
    >>> vtprune.load_preset({"keep": 0.5, "stages": [{"at": 2, "method": "fastv"}]}).keep
    0.5

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
    """Return the file of a preset that is given by packaged name or path."""
    text = system_name(str(name))  # may be anything: Path.is_file raises where a name is too long
    packaged = preset_directory() / f"{text}.yaml"
    if "/" not in text and "\\" not in text and os.path.isfile(packaged):
        return packaged
    if os.path.isfile(text):
        return Path(text)
    close = get_close_matches(text, preset_names(), n=1)
    meant = close[0] if close else nearest_path(text)
    hint = f"did you mean {meant}? " if meant else ""
    raise PresetError(
        f"no preset {quote(text)}: neither a packaged one nor a file",
        f"{hint}packaged: {', '.join(preset_names())} (vtprune presets list)",
    )


def parse_keep(text: str) -> Keep:
    """Return the value of `--keep`: "0.3", or "image=0.5,video=0.2".

    Raises:
        PresetError: not a number, not in (0, 1], or of no modality.
    """
    if "=" not in text:
        return check_keep(text)
    keeps: dict[str, str] = {}
    for part in text.split(","):
        modality, _, value = part.strip().partition("=")
        if modality in keeps:
            message = f"keep for {modality} is given twice: {brief(text)}"
            raise PresetError(message, "for example: image=0.5,video=0.2")
        keeps[modality] = value
    return check_keeps(keeps)


def check_keeps(keeps: Mapping[str, float | str]) -> dict[str, float]:
    """Return the kept fraction of each modality.

    Raises:
        PresetError: a modality that there is not, or no kept fraction.
    """
    for modality in keeps:
        if modality not in ("image", "video"):
            message = f"keep is given for {quote(modality)}, which is not image or video"
            raise PresetError(message, "for example: image=0.5,video=0.2")
    return {modality: check_keep(keep) for modality, keep in keeps.items()}


def override(
    preset: Preset,
    keep: Keep | str | None = None,
    method: str | None = None,
    at: str | int | None = None,
    options: Mapping[str, str] | None = None,
    seed: int | None = None,
    tokens: int | None = None,
    tokens_after: int | None = None,
    fit: str | None = None,
    decode_every: int | None = None,
    decode_keep: float | None = None,
    keep_for_turns: float | None = None,
    stream: bool | Mapping[str, object] | StreamSpec | None = None,
) -> Preset:
    """Return `preset` under the flags of one call.

    Args:
        keep: a fraction for all modalities, or modality -> fraction.
        tokens, tokens_after, fit: a budget in place of a keep: as of `Preset`.
        stream: how a long video is encoded in segments; True: as `StreamSpec` says, False: never.
        method: replaces the stages by one free stage of this method.
        at: where that stage cuts; None for the method's own place.
        options: for that stage, or for every stage whose method has such an option.
        seed: of all random choices.
        decode_every, decode_keep: cuts of the KV cache while decoding: `every` and `keep` of
            `DecodeSpec`. None: the preset's; where that has none, one of them needs the other.
        keep_for_turns: as of `Preset`.

    Raises:
        PresetError: a value out of range, an unknown name, or a keep that sets nothing.

    Returns:
        What runs. Under `method` it has no preset's name or description; other changes are in
        `changed`.
    """
    _check_seed(seed)
    if at is not None and method is None:
        raise PresetError("a place to cut (at) needs a method", "name the method that cuts there")
    stages, image, video, shared_keep = preset.stages, preset.image, preset.video, preset.keep
    if method is not None:
        place = check_place(find_method(method).at if at is None else at)
        checked = check_options(method, options or {})
        stages = (StageSpec(place, method, options=tuple(checked.items())),)
        check_stage(stages[0])
        image, video = replace(image, stages=None), replace(video, stages=None)
        if METHODS[method].units and keep is None:  # what is predictable goes, and no more
            shared_keep = None
            image, video = replace(image, keep=None), replace(video, keep=None)
    elif options:
        _check_known(options, preset)
        stages = _set_options(stages, options)
        image = replace(image, stages=_set_options(image.stages, options))
        video = replace(video, stages=_set_options(video.stages, options))
    if isinstance(keep, str):
        keep = parse_keep(keep)
    if isinstance(keep, Mapping):
        keeps = check_keeps(keep)
        image = replace(image, keep=keeps.get("image", image.keep))
        video = replace(video, keep=keeps.get("video", video.keep))
    elif keep is not None:
        shared_keep = check_keep(keep)
        image, video = replace(image, keep=None), replace(video, keep=None)
    for name, value in (("tokens", tokens), ("tokens_after", tokens_after)):
        if value is not None:
            _check_whole(name, value, 1, "--tokens 4096 is 4,096 visual tokens")
    if fit is not None and fit not in FITS:
        raise PresetError(f"fit {quote(fit)} is not one of {', '.join(FITS)}", "--fit context")
    if tokens is not None or tokens_after is not None or fit is not None:
        if keep is not None:
            budgets = {"tokens": tokens, "tokens_after": tokens_after, "fit": fit}
            other = next(f"{key} {given}" for key, given in budgets.items() if given is not None)
            raise PresetError(f"keep {brief(keep)} and {other} are two budgets", "give one of them")
        shared_keep = None
        image, video = replace(image, keep=None), replace(video, keep=None)
    elif keep is None:
        tokens, tokens_after, fit = preset.tokens, preset.tokens_after, preset.fit
    result = replace(
        preset,
        name=preset.name if method is None else None,
        stages=stages,
        image=image,
        video=video,
        keep=shared_keep,
        tokens=tokens,
        tokens_after=tokens_after,
        fit=fit,
        stream=preset.stream if stream is None else stream_of(stream),
        seed=preset.seed if seed is None else seed,
        decode=_override_decode(preset.decode, decode_every, decode_keep),
        keep_for_turns=preset.keep_for_turns
        if keep_for_turns is None
        else check_keep(keep_for_turns, "keep_for_turns"),
    )
    if result.name is None:  # the flags say all that it is
        return replace(result, description="", evidence=(), changed=())
    changes: dict[str, object] = {}
    if result.every_stage() != preset.every_stage():
        changes |= options or {}
        result = replace(result, evidence=())
    if any(result.keep_for(which) != preset.keep_for(which) for which in ("image", "video")):
        changes["keep"] = dict(keep) if isinstance(keep, Mapping) else result.keep
    changes |= {
        name: value
        for name, value in (("tokens", tokens), ("tokens_after", tokens_after), ("fit", fit))
        if value is not None and value != getattr(preset, name)
    }
    if changes.get("keep", 1) is None:  # a budget is in its place
        del changes["keep"]
    if result.decode != preset.decode:
        changes["decode"] = result.decode.to_dict() if result.decode else "none"
    if result.keep_for_turns != preset.keep_for_turns:
        changes["keep_for_turns"] = result.keep_for_turns
    if result.stream != preset.stream:
        changes["stream"] = result.stream.changed if result.stream else False
    if result.seed != preset.seed:
        changes["seed"] = result.seed
    return result.note_changes(changes) if changes else result


def _override_decode(
    decode: DecodeSpec | None, every: int | None, keep: float | None
) -> DecodeSpec | None:
    """Return the cuts while decoding under the flags of one call."""
    if every is None and keep is None:
        return decode
    if every is not None:
        _check_whole("decode_every", every, 1, "16 cuts after each 16 decoded tokens")
    if keep is not None and check_keep(keep, "decode_keep") == 1 and decode is None:
        return None
    every = decode.every if every is None and decode else every
    keep = decode.keep if keep is None and decode else keep
    if every is None or keep is None:
        name, other = ("every", "keep") if keep is None else ("keep", "every")
        raise PresetError(
            f"decode_{name} needs decode_{other}: cuts while decoding need both",
            "--decode-every 16 --decode-keep 0.5",
        )
    return DecodeSpec(every, float(keep))


def set_sampling(
    preset: Preset,
    frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    max_tiles: int | None = None,
) -> Preset:
    """Return a preset with the frame sampling and tiles of a run in place of its own."""
    video = replace(preset.video, frames=frames, fps=fps, max_frames=max_frames)
    image = replace(preset.image, max_tiles=max_tiles)
    changes = {
        key: getattr(new, key)
        for old, new in ((preset.image, image), (preset.video, video))
        for key in ("max_tiles", "frames", "fps", "max_frames")
        if getattr(old, key) != getattr(new, key)
    }
    result = replace(preset, image=image, video=video)
    return result.note_changes(changes) if changes and preset.name else result


def _check_seed(seed: object) -> None:
    if seed is not None:
        _check_whole("seed", seed, 0, "seed 0 is the default")


def _check_whole(name: str, value: object, least: int, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PresetError(f"{name} {quote(value)} is not a whole number from {least} on", hint)
    if value > LARGEST_WHOLE:
        raise PresetError(f"{name} {quote(value)} is more than {LARGEST_WHOLE}", hint)


def _check_known(options: Mapping[str, str], preset: Preset) -> None:
    """Refuse options that no stage of a preset has."""
    option_names = {key for stage in preset.every_stage() for key, _ in stage.options}
    if missing := [brief(key) for key in options if key not in option_names]:
        raise PresetError(
            f"no stage of {preset.label} has the option {list_faults(missing)}",
            "vtprune methods NAME lists a method's options",
        )


def _set_options(
    stages: tuple[StageSpec, ...] | None, options: Mapping[str, str]
) -> tuple[StageSpec, ...] | None:
    """Return the stages with those of the options that their methods have."""
    if stages is None:
        return None
    changed = []
    for stage in stages:
        values = dict(stage.options)
        values |= {key: value for key, value in options.items() if key in values}
        checked = check_options(stage.method, values)
        changed.append(replace(stage, options=tuple(checked.items())))
    return tuple(changed)
