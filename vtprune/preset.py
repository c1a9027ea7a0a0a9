"""Presets: which stage cuts where, for which modality; YAML or a mapping in, a frozen Preset out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

import yaml

from vtprune.errors import PresetError, VtpruneError
from vtprune.pruners import check_options, find_method

DEFAULT = "balanced"
LARGEST_FILE = 65_536  # bytes of a preset; a longer one is a mistake or an attack
STAGE_KEYS = ("at", "method", "keep", "per", "split", "positions")
PRESET_KEYS = ("description", "keep", "seed", "stages", "image", "video")
IMAGE_KEYS = ("keep", "max_tiles", "stages")
VIDEO_KEYS = ("keep", "frames", "fps", "max_frames", "stages")
CHOICES = {"per": ("all", "frame", "tile"), "split": ("even",), "positions": ("keep",)}

Keep = float | Mapping[str, float]


@dataclass(frozen=True)
class StageSpec:
    """One stage as a preset says it.

    Args:
        at: "input", "ecl", "horizon", a layer number or a depth such as "60%".
        method: a registered method.
        keep: fraction of the original tokens left from here on; None for the free stage.
        per: "all", "frame" or "tile": the scope over which the budget is shared.
        split: "even".
        positions: "keep": kept tokens keep their position ids.
        options: every option of the method, defaults included.
    """

    at: str
    method: str
    keep: float | None = None
    per: str = "all"
    split: str = "even"
    positions: str = "keep"
    options: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The stage in the preset schema."""
        values: dict[str, object] = {"at": self.at, "method": self.method}
        if self.keep is not None:
            values["keep"] = self.keep
        return {**values, "per": self.per, "split": self.split, "positions": self.positions,
                **dict(self.options)}  # fmt: skip


@dataclass(frozen=True)
class ModalityPreset:
    """What a preset says about one modality; None where it says nothing."""

    keep: float | None = None
    stages: tuple[StageSpec, ...] | None = None
    max_tiles: int | None = None
    frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None


@dataclass(frozen=True)
class Preset:
    """Everything that decides what is cut."""

    name: str = "custom"
    description: str = ""
    keep: float | None = None
    seed: int = 0
    stages: tuple[StageSpec, ...] | None = None
    image: ModalityPreset = field(default_factory=ModalityPreset)
    video: ModalityPreset = field(default_factory=ModalityPreset)

    def __post_init__(self) -> None:
        for modality in ("image", "video"):
            if self._own(modality).stages or self.stages:
                self._check_budget(modality)

    def _own(self, modality: str) -> ModalityPreset:
        return self.image if modality == "image" else self.video

    def _check_budget(self, modality: str) -> None:
        keep, stages = self.keep_for(modality), self.stages_for(modality)
        free = [stage for stage in stages if stage.keep is None]
        if len(free) > 1:
            raise PresetError(
                f"preset {self.name}: the stages at {free[0].at} and {free[1].at} "
                f"({modality}) both have no keep; at most one can be free",
                f"give the stage at {free[1].at} a keep of its own",
            )
        if keep is not None and keep < 1 and not free:
            raise PresetError(
                f"preset {self.name}: every {modality} stage has its own keep, so keep {keep:g} "
                "sets nothing",
                f"remove the keep of the stage at {stages[0].at} ({stages[0].method}) to free it, "
                "or give no keep",
            )

    def stages_for(self, modality: str) -> tuple[StageSpec, ...]:
        """The stages of `modality`.

        Raises:
            PresetError: the preset has none for it.
        """
        stages = self._own(modality).stages or self.stages
        if not stages:
            raise PresetError(
                f"preset {self.name} has no stages for {modality}",
                f"add {modality}: stages: to it, or use --preset {DEFAULT} or --method",
            )
        return stages

    def keep_for(self, modality: str) -> float | None:
        """The layer average asked for `modality`; None where its stages' own keeps say it all."""
        own = self._own(modality).keep
        return self.keep if own is None else own

    def shared(self) -> bool:
        """Whether all modalities have the same stages and keep, and so one budget together."""
        same_stages = self.image.stages is None and self.video.stages is None
        return same_stages and self.keep_for("image") == self.keep_for("video")

    def to_dict(self) -> dict[str, object]:
        """The preset in its own schema, every stage with all its options."""
        out: dict[str, object] = {"name": self.name, "description": self.description,
                                  "keep": self.keep, "seed": self.seed}  # fmt: skip
        if self.stages is not None:
            out["stages"] = [stage.to_dict() for stage in self.stages]
        for modality, keys in (("image", IMAGE_KEYS), ("video", VIDEO_KEYS)):
            own = self._own(modality)
            values: dict[str, object] = {
                key: getattr(own, key)
                for key in keys
                if key != "stages" and getattr(own, key) is not None
            }
            if own.stages is not None:
                values["stages"] = [stage.to_dict() for stage in own.stages]
            if values:
                out[modality] = values
        return out


def preset_directory() -> Path:
    """Where the packaged presets are: inside the wheel, or beside the package in a checkout."""
    packaged = Path(__file__).resolve().parent / "_presets"
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
        return _Reader("preset", {}).preset(preset, "custom")
    path = find_preset(preset)
    data, lines = read_yaml(path)
    return _Reader(str(preset), lines).preset(data, path.stem)


def find_preset(name: str | Path) -> Path:
    """The file of a preset given by packaged name or path."""
    text = str(name)
    packaged = preset_directory() / f"{text}.yaml"
    if "/" not in text and "\\" not in text and packaged.is_file():
        return packaged
    path = Path(text)
    if path.is_file():
        return path
    close = get_close_matches(text, preset_names(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise PresetError(
        f"no preset {text!r}: neither a packaged one nor a file",
        f"{hint}packaged: {', '.join(preset_names())} (vtprune presets list)",
    )


def read_yaml(path: Path) -> tuple[object, dict[tuple[str | int, ...], int]]:
    """A YAML file's data, and the line of every key and item by its path.

    Raises:
        PresetError: not readable, too large, not YAML, or with anchors (which can be made to
            grow without bound).
    """
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise PresetError(f"{path}: can't be read: {reason}", "give a YAML file") from error
    if len(raw) > LARGEST_FILE:
        raise PresetError(f"{path}: larger than {LARGEST_FILE} bytes", "give a YAML preset")
    lines: dict[tuple[str | int, ...], int] = {}
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise PresetError(f"{path}: anchors and aliases are not allowed", "write it out")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _note_lines(node, (), lines)
        return yaml.safe_load(text), lines
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise PresetError(f"{path}{where}: {problem}", "vtprune presets show balanced has an "
                          "example") from error  # fmt: skip


def _note_lines(
    node: yaml.Node, path: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int]
) -> None:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _note_lines(value, (*path, str(key.value)), lines)
            lines[(*path, str(key.value))] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _note_lines(item, (*path, number), lines)


class _Reader:
    """Checks data against the preset schema, and collects every fault before it raises."""

    def __init__(self, source: str, lines: Mapping[tuple[str | int, ...], int]) -> None:
        self.source = source
        self.lines = lines
        self.faults: list[str] = []

    def fault(self, path: tuple[str | int, ...], message: str) -> None:
        line = self.lines.get(path) or self.lines.get(path[:-1])
        name = ".".join(str(part) for part in path)
        self.faults.append(f"line {line}: {message}" if line else f"{name}: {message}")

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
                f"{self.source}: {'; '.join(self.faults)}",
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
        missing = [key for key in ("at", "method") if key not in item]
        for key in missing:
            self.fault(path, f"a stage needs {key}")
        at = self.place(item["at"], (*path, "at")) if "at" in item else None
        extra = {str(k): v for k, v in item.items() if k not in STAGE_KEYS}
        method = str(item.get("method", ""))
        options: dict[str, str] = {}
        if "method" in item:
            try:
                options = check_options(method, extra)
            except VtpruneError as error:
                key = next((k for k in extra if repr(k) in str(error)), "method")
                self.fault((*path, key), f"{error.message} ({error.hint})")
        keep = self.number(item, (*path, "keep"), low=0, high=1)
        if keep == 0:
            self.fault((*path, "keep"), "keep 0 drops every token, which only vtw may")
        choices = {key: self.choice(item, (*path, key)) for key in CHOICES}
        if missing or at is None:
            return None
        return StageSpec(at, method, keep, options=tuple(options.items()), **choices)

    def place(self, value: object, path: tuple[str | int, ...]) -> str | None:
        try:
            return check_place(value)
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
                close = get_close_matches(str(key), keys, n=1)
                also = f", did you mean {close[0]}?" if close else f" (keys: {', '.join(keys)})"
                self.fault((*path, str(key)), f"unknown key {key!r}{also}")
        return data

    def text(self, values: Mapping[str, object], path: tuple[str, ...]) -> str:
        value = values.get(path[-1])
        if value is not None and not isinstance(value, str):
            self.fault(path, f"{path[-1]} must be text")
        return value if isinstance(value, str) else ""

    def choice(self, values: Mapping[str, object], path: tuple[str | int, ...]) -> str:
        key = str(path[-1])
        value = str(values.get(key, CHOICES[key][0]))
        if value not in CHOICES[key]:
            self.fault(path, f"{key}: {value} is not one of {', '.join(CHOICES[key])}")
        return value

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
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if good:
            number = float(value)  # type: ignore[arg-type]
            good = (number > low or (number == low and not open_low)) and (
                high is None or number <= high
            )
            if good and number < float("inf"):
                return number
        span = f"{'(' if open_low else '['}{low:g}, {f'{high:g}]' if high else '...)'}"
        self.fault(path, f"{key}: {value!r} is not a number in {span}")
        return None

    def whole(self, values: Mapping[str, object], path: tuple[str, ...], low: int) -> int | None:
        value = values.get(path[-1])
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self.fault(path, f"{path[-1]}: {value!r} is not a whole number from {low} on")
            return None
        return value


def check_place(value: object) -> str:
    """A place as text.

    Raises:
        PresetError: not a place, or one that nothing can cut at.
    """
    text = str(value).strip()
    if text in ("input", "ecl", "horizon"):
        return text
    if not isinstance(value, (bool, float)) and text.isdigit() and text.isascii():
        return str(int(text))
    if text.endswith("%"):
        try:
            if 0 <= float(text[:-1]) < 100:
                return text
        except ValueError:
            pass
    if text == "pixels":
        raise PresetError("at: pixels: no method cuts before the vision tower yet", "use input")
    raise PresetError(
        f"at: {value} is not a place", 'use input, ecl, horizon, a layer number or a depth "60%"'
    )


def parse_keep(text: str) -> Keep:
    """`--keep`'s value: "0.3", or "image=0.5,video=0.2".

    Raises:
        PresetError: not a number, or not in (0, 1].
    """
    if "=" not in text:
        return check_keep(text)
    keeps = {}
    for part in text.split(","):
        modality, _, value = part.strip().partition("=")
        if modality not in ("image", "video"):
            raise PresetError(f"keep for {modality!r}: no such modality", "image=0.5,video=0.2")
        keeps[modality] = check_keep(value)
    return keeps


def check_keep(value: float | str) -> float:
    """A kept fraction in (0, 1].

    Raises:
        PresetError: not a number, or out of range.
    """
    try:
        keep = float(value)
    except (TypeError, ValueError):
        keep = float("nan")
    if not 0 < keep <= 1:
        raise PresetError(
            f"keep {value} is not a fraction in (0, 1]",
            "keep 0.3 keeps 30 % of the visual tokens; it is never a drop rate",
        )
    return keep


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
    """
    if at is not None and method is None:
        raise PresetError("--at without --method", "name the method that should cut there")
    stages, image, video = preset.stages, preset.image, preset.video
    if method is not None:
        place = check_place(find_method(method).at if at is None else at)
        stages = (StageSpec(place, method, options=_options(method, options or {})),)
        image, video = replace(image, stages=None), replace(video, stages=None)
    elif options:
        changed = [_apply(group, options) for group in (stages, image.stages, video.stages)]
        if not any(hit for _, hit in changed):
            raise PresetError(
                f"no stage of preset {preset.name} has the option {', '.join(options)}",
                "vtprune methods lists every method's options",
            )
        stages = changed[0][0]
        image, video = replace(image, stages=changed[1][0]), replace(video, stages=changed[2][0])
    top = preset.keep
    if isinstance(keep, str):
        keep = parse_keep(keep)
    if isinstance(keep, Mapping):
        unknown = set(keep) - {"image", "video"}
        if unknown:
            raise PresetError(f"keep for {unknown.pop()!r}: no such modality", "image or video")
        if "image" in keep:
            image = replace(image, keep=check_keep(keep["image"]))
        if "video" in keep:
            video = replace(video, keep=check_keep(keep["video"]))
    elif keep is not None:
        top = check_keep(keep)
        image, video = replace(image, keep=None), replace(video, keep=None)
    return replace(
        preset,
        stages=stages,
        image=image,
        video=video,
        keep=top,
        seed=preset.seed if seed is None else seed,
    )


def _options(method: str, options: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(check_options(method, options).items())


def _apply(
    stages: tuple[StageSpec, ...] | None, options: Mapping[str, str]
) -> tuple[tuple[StageSpec, ...] | None, bool]:
    """The stages with the options that their methods have, and whether any had one."""
    if stages is None:
        return None, False
    changed, hit = [], False
    for stage in stages:
        own = dict(stage.options)
        fitting = {key: value for key, value in options.items() if key in own}
        hit = hit or bool(fitting)
        changed.append(replace(stage, options=_options(stage.method, {**own, **fitting})))
    return tuple(changed), hit
