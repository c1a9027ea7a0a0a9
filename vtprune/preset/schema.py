"""Checks presets against the schema; every fault is named, with its line."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from difflib import get_close_matches

from vtprune.errors import PresetError, VtpruneError, brief, brief_path, list_faults, quote
from vtprune.preset.spec import (
    CHOICES,
    IMAGE_KEYS,
    LARGEST_WHOLE,
    PRESET_KEYS,
    STAGE_KEYS,
    VIDEO_KEYS,
    ModalityPreset,
    Preset,
    StageSpec,
    check_place,
    check_side,
    check_stage,
)
from vtprune.pruners import METHODS, Value, check_options


class Reader:
    """Checks data against the preset schema, and collects every fault before it raises."""

    def __init__(self, source: str, lines: Mapping[tuple[str | int, ...], int]) -> None:
        self.source = source
        self.lines = lines
        self.faults: list[str] = []

    def fault(self, path: tuple[str | int, ...], message: str) -> None:
        line = self.lines.get(path) or self.lines.get(path[:-1])
        where = f"line {line}" if line else brief(".".join(str(part) for part in path))
        self.faults.append(f"{where}: {message}" if where else message)

    def preset(self, data: object, name: str) -> Preset:
        values = self.mapping(data, (), PRESET_KEYS)
        preset = {
            "description": self.text(values, ("description",)),
            "keep": self.number(values, ("keep",), low=0, high=1, open_low=True),
            "seed": self.whole(values, ("seed",), low=0) or 0,
            "stages": self.stages(values, ("stages",)),
            "image": self.modality(values, "image", IMAGE_KEYS),
            "video": self.modality(values, "video", VIDEO_KEYS),
        }
        if self.faults:
            raise PresetError(
                f"{brief_path(self.source)}: {list_faults(self.faults)}",
                "vtprune presets show balanced has an example",
            )
        return Preset(name=name, **preset)  # type: ignore[arg-type]

    def modality(
        self, values: Mapping[str, object], name: str, keys: tuple[str, ...]
    ) -> ModalityPreset:
        if values.get(name) is None:
            return ModalityPreset()
        own = self.mapping(values[name], (name,), keys)
        fields: dict[str, object] = {}
        for key in keys:
            if key == "stages":
                fields[key] = self.stages(own, (name, key))
            elif key == "keep":
                fields[key] = self.number(own, (name, key), low=0, high=1, open_low=True)
            elif key == "fps":
                fields[key] = self.number(own, (name, key), low=0, open_low=True)
            else:
                fields[key] = self.whole(own, (name, key), low=0 if key == "max_tiles" else 1)
        if fields.get("frames") is not None and fields.get("fps") is not None:
            self.fault((name, "fps"), "frames and fps exclude each other")
        return ModalityPreset(**fields)  # type: ignore[arg-type]

    def stages(
        self, values: Mapping[str, object], path: tuple[str | int, ...]
    ) -> tuple[StageSpec, ...] | None:
        items = values.get(str(path[-1]))
        if items is None:
            return None
        if not isinstance(items, (list, tuple)) or not items:
            self.fault(path, "stages must be a list of at least one stage")
            return None
        specs = [self.stage(item, (*path, number)) for number, item in enumerate(items)]
        return tuple(spec for spec in specs if spec is not None)

    def stage(self, item: object, path: tuple[str | int, ...]) -> StageSpec | None:
        if not isinstance(item, Mapping):
            self.fault(path, "a stage is a mapping with at and method")
            return None
        method = item.get("method", "")
        method = method if isinstance(method, str) else quote(method)
        if method in METHODS and METHODS[method].schedule:
            item = {"at": "schedule", **item}
        missing = [key for key in ("at", "method") if key not in item]
        for key in missing:
            self.fault(path, f"a stage needs {key}")
        at = self.place(item["at"], (*path, "at"), method) if "at" in item else None
        extra = {
            k if isinstance(k, str) else quote(k): v for k, v in item.items() if k not in STAGE_KEYS
        }
        options = self.options(method, extra, path) if "method" in item else {}
        keep = self.number(item, (*path, "keep"), low=0, high=1)
        withdraws = method in METHODS and METHODS[method].drops_all
        if keep == 0 and not withdraws:
            self.fault((*path, "keep"), "keep 0 drops every token, which only vtw may")
        if keep and withdraws:
            self.fault((*path, "keep"), f"{method} drops every token: its keep is 0, or none")
        choices = {key: self.choice(item, (*path, key)) for key in CHOICES}
        if missing or at is None:
            return None
        spec = StageSpec(at, method, keep, options=tuple(options.items()), **choices)
        if method in METHODS and not any(fault for fault in self.faults):
            try:
                check_stage(spec)
            except PresetError as error:
                self.fault(path, f"{error.message} ({error.hint})")
        return spec

    def options(
        self, method: str, extra: Mapping[str, object], path: tuple[str | int, ...]
    ) -> dict[str, Value]:
        """All options of a stage's method; each one that is wrong is a fault of its own."""
        options: dict[str, Value] = {}
        try:
            options = check_options(method, {})
        except VtpruneError as error:
            self.fault((*path, "method"), f"{error.message} ({error.hint})")
            return options
        for key, value in extra.items():
            try:
                options[key] = check_options(method, {key: value})[key]
            except VtpruneError as error:
                self.fault((*path, key), f"{error.message} ({error.hint})")
        return options

    def place(self, value: object, path: tuple[str | int, ...], method: str) -> str | None:
        try:
            place = check_place(value)
            if method in METHODS:
                check_side(method, place)
            return place
        except PresetError as error:
            self.fault(path, f"{error.message} ({error.hint})")
            return None

    def mapping(
        self, data: object, path: tuple[str | int, ...], keys: tuple[str, ...]
    ) -> Mapping[str, object]:
        if not isinstance(data, Mapping):
            self.fault(path, f"{path[-1] if path else 'a preset'} must be a mapping of keys")
            return {}
        for key in data:
            if key not in keys:
                name = key if isinstance(key, str) else quote(key)
                close = get_close_matches(name, keys, n=1)
                also = f", did you mean {close[0]}?" if close else f" (keys: {', '.join(keys)})"
                self.fault((*path, name), f"unknown key {quote(key)}{also}")
        return data

    def text(self, values: Mapping[str, object], path: tuple[str, ...]) -> str:
        value = values.get(path[-1])
        if value is not None and not isinstance(value, str):
            self.fault(path, f"{path[-1]} must be text")
        return value if isinstance(value, str) else ""

    def choice(self, values: Mapping[str, object], path: tuple[str | int, ...]) -> str:
        key = str(path[-1])
        value = values.get(key, CHOICES[key][0])
        if value not in CHOICES[key]:
            self.fault(path, f"{key}: {brief(value)} is not one of {', '.join(CHOICES[key])}")
        return brief(value)

    def number(
        self,
        values: Mapping[str, object],
        path: tuple[str | int, ...],
        low: float,
        high: float | None = None,
        open_low: bool = False,
    ) -> float | None:
        key = str(path[-1])
        value = values.get(key)
        if value is None:
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            top = sys.float_info.max if high is None else high
            if low <= value <= top and not (open_low and value == low):
                return float(value)
        span = f"{'(' if open_low else '['}{low:g}, {f'{high:g}]' if high else '...)'}"
        self.fault(path, f"{key}: {quote(value)} is not a number in {span}")
        return None

    def whole(self, values: Mapping[str, object], path: tuple[str, ...], low: int) -> int | None:
        value = values.get(path[-1])
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self.fault(path, f"{path[-1]}: {quote(value)} is not a whole number from {low} on")
            return None
        if value > LARGEST_WHOLE:
            self.fault(path, f"{path[-1]}: {quote(value)} is more than {LARGEST_WHOLE}")
            return None
        return value
