"""The schemas of preset and calibration files, and the check of a whole preset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from vtprune.errors import PresetError, quote
from vtprune.preset.figures import LONGEST_NAME
from vtprune.preset.spec import (
    LARGEST_WHOLE,
    STAGE_KEYS,
    StageSpec,
    check_place,
    check_side,
    check_stage,
)
from vtprune.preset.validation import Fault, Place, Schema, find_faults, report
from vtprune.pruners import METHODS, check_options, find_method

Keep = Annotated[float | None, Field(gt=0, le=1, description="a number in (0, 1]")]
FromZero = Annotated[
    int | None, Field(ge=0, le=LARGEST_WHOLE, description="a whole number from 0 on")
]
FromOne = Annotated[
    int | None, Field(ge=1, le=LARGEST_WHOLE, description="a whole number from 1 on")
]


class StageSchema(Schema):
    """A stage; `stage_faults` checks where it cuts, its method and the method's options."""

    model_config = ConfigDict(title="a stage", extra="allow")

    at: Any = None
    method: Any = None
    keep: Annotated[float | None, Field(ge=0, le=1, description="a number in [0, 1]")] = None
    per: Literal["all", "frame", "tile"] = Field("all", description="one of all, frame, tile")
    split: Literal["even", "entropy", "entropy-or-none"] = Field(
        "even", description="one of even, entropy, entropy-or-none"
    )
    positions: Literal["keep", "renumber"] = Field("keep", description="one of keep, renumber")
    optional: Annotated[bool, Field(strict=True, description="true or false")] = False


Stages = Annotated[
    list[StageSchema] | None, Field(min_length=1, description="a list of at least one stage")
]


class ImageSchema(Schema):
    keep: Keep = None
    max_tiles: FromZero = None
    stages: Stages = None


class VideoSchema(Schema):
    keep: Keep = None
    frames: FromOne = None
    fps: Annotated[float | None, Field(gt=0, description="a number above 0")] = None
    max_frames: FromOne = None
    stages: Stages = None


class DecodeSchema(Schema):
    model_config = ConfigDict(title="decode")

    every: Annotated[int, Field(ge=1, le=LARGEST_WHOLE, description="a whole number from 1 on")]
    keep: Annotated[float, Field(gt=0, le=1, description="a number in (0, 1]")]


class StreamSchema(Schema):
    frames: FromOne = None
    keep: Keep = None
    share: Literal["equal", "information"] | None = Field(
        None, description="one of equal, information"
    )


Name = Annotated[
    str,
    Field(
        min_length=1,
        max_length=LONGEST_NAME,
        description=f"text of 1 to {LONGEST_NAME} characters",
    ),
]
Sentence = Annotated[
    str, Field(min_length=1, max_length=300, description="text of 1 to 300 characters")
]
Percent = Annotated[float, Field(ge=0, le=100, description="a number from 0 to 100")]


class MeasuredSchema(Schema):
    model_config = ConfigDict(title="measured")

    model: Name
    questions: Annotated[int, Field(ge=1, le=LARGEST_WHOLE, description="a whole number from 1 on")]
    right: Percent
    source: Sentence
    unpruned: Percent | None = Field(None, description="a number from 0 to 100")
    keep: Keep = None
    note: Sentence | None = Field(None, description="text of 1 to 300 characters")
    media: Literal["pictures", "clips"] | None = Field(None, description="pictures or clips")


class PublishedSchema(Schema):
    model_config = ConfigDict(title="published")

    paper: Name
    model: Name
    benchmark: Sentence
    retained: Annotated[float, Field(gt=0, le=1000, description="a number above 0, at most 1000")]
    keep: Keep = None
    note: Sentence | None = Field(None, description="text of 1 to 300 characters")
    media: Literal["pictures", "clips"] | None = Field(None, description="pictures or clips")


class EvidenceSchema(Schema):
    model_config = ConfigDict(title="an entry of evidence")

    measured: MeasuredSchema | None = None
    published: PublishedSchema | None = None


def _stream_mapping(value: object) -> object:
    """Return the mapping that true or false stands for; other values as they are."""
    return ({} if value else None) if isinstance(value, bool) else value


class PresetSchema(Schema):
    model_config = ConfigDict(title="a preset")

    description: str | None = None
    keep: Keep = None
    tokens: FromOne = None
    tokens_after: FromOne = None
    fit: Literal["context", "memory"] | None = Field(None, description="one of context, memory")
    stream: Annotated[StreamSchema | None, BeforeValidator(_stream_mapping)] = Field(
        None, description="true, false or a mapping of frames, keep and share"
    )
    seed: FromZero = None
    decode: DecodeSchema | None = None
    keep_for_turns: Keep = None
    evidence: list[EvidenceSchema] | None = Field(
        None, max_length=20, description="a list of at most 20 figures, measured or published"
    )
    stages: Stages = None
    image: ImageSchema | None = None
    video: VideoSchema | None = None


class SourcesSchema(Schema):
    ecl: str | None = None
    horizon: str | None = None
    horizon_text: str | None = None


Count = Annotated[int, Field(ge=1, description="a whole number from 1 on")]
Layer = Annotated[int, Field(ge=0, description="a layer number, 0 or more")]


class CalibrationSchema(Schema):
    model_config = ConfigDict(title="a calibration", protected_namespaces=())

    model_type: str
    layers: Count
    hidden_size: Count
    ecl: Layer
    horizon: Layer
    horizon_text: Annotated[int | None, Field(ge=0, description="a layer number, 0 or more")] = None
    sources: SourcesSchema | None = None


def check_preset(data: object, source: object, lines: Mapping[Place, int]) -> None:
    """Refuse what is no preset.

    Args:
        source: the file, or what it is instead.
        lines: of the keys and items of a file.

    Raises:
        PresetError: names every fault.
    """
    data = _plain(data)
    faults = find_faults(PresetSchema, data)
    stages = dict(_stages(data))
    for place, stage in stages.items():
        faults += stage_faults(stage, place)
    faults += evidence_faults(data.get("evidence") if isinstance(data, dict) else None)
    video = data.get("video") if isinstance(data, dict) else None
    if isinstance(video, dict) and None not in (video.get("frames"), video.get("fps")):
        faults.append((("video", "fps"), "frames and fps exclude each other"))
    if not faults:
        for place, stage in stages.items():
            try:
                check_stage(StageSpec.from_dict(stage))
            except PresetError as error:
                faults.append((place, f"{error.message} ({error.hint})"))
        faults += order_faults(stages)
    if faults:
        faults.sort(key=lambda fault: lines.get(fault[0], 0))
        message = report(source, faults, lines)
        raise PresetError(message, "vtprune presets show balanced has an example")


def _plain(data: object) -> object:
    """Return mappings as dicts and tuples as lists, which is what a file holds."""
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    return [_plain(value) for value in data] if isinstance(data, (list, tuple)) else data


def _stages(data: object) -> Iterator[tuple[Place, dict[Any, Any]]]:
    """Yield every stage that is a mapping, with its place."""
    places: list[tuple[str, ...]] = [("stages",), ("image", "stages"), ("video", "stages")]
    for place in places:
        group: Any = data
        for key in place:
            group = group.get(key) if isinstance(group, dict) else None
        for number, stage in enumerate(group if isinstance(group, list) else ()):
            if isinstance(stage, dict):
                yield (*place, number), stage


def evidence_faults(entries: object) -> Iterator[Fault]:
    """Yield the entries of `evidence` that are not one figure."""
    for number, entry in enumerate(entries if isinstance(entries, list) else ()):
        if isinstance(entry, dict) and (entry.get("measured") is None) == (
            entry.get("published") is None
        ):
            yield ("evidence", number), "an entry of evidence is either measured or published"


def order_faults(stages: Mapping[Place, Mapping[str, Any]]) -> Iterator[Fault]:
    """Yield where a stage does not cut after an earlier one of its list, in any model."""
    latest: dict[object, tuple[float, str]] = {}
    named: set[tuple[object, str]] = set()
    for place, stage in stages.items():
        at = check_place(stage.get("at", "schedule"))
        if at in ("ecl", "horizon") and (place[:-1], at) in named:
            yield (*place, "at"), f"two stages cut at {at}, which is one layer of any model"
        named.add((place[:-1], at))
        depth = at.endswith("%")
        if not (depth or at == "input" or at.isdigit()):
            continue
        position = 0.0 if at == "input" else float(at.rstrip("%"))
        before, earlier = latest.get((place[:-1], depth), (-1.0, ""))
        if position <= before:
            yield (
                (*place, "at"),
                f"stages must cut at increasing layers: {at} comes after {earlier}",
            )
        latest[place[:-1], depth] = max(position, before), at


def stage_faults(stage: Mapping[Any, Any], place: Place) -> Iterator[Fault]:
    """Yield what is wrong with where a stage cuts, its method, the method's options and keep."""
    name = stage.get("method", "")
    name = name if isinstance(name, str) else quote(name)
    method = METHODS.get(name)
    scheduled = method is not None and method.at == "schedule"
    missing = [key for key in ("at", "method") if key not in stage]
    for key in missing:
        if key != "at" or not scheduled:
            yield place, f"a stage needs {key}"
    if "at" in stage:
        try:
            at = check_place(stage["at"])
            if method:
                check_side(name, at)
        except PresetError as error:
            yield (*place, "at"), f"{error.message} ({error.hint})"
    if method is None:
        if "method" in stage:
            try:
                find_method(name)
            except PresetError as error:
                yield (*place, "method"), f"{error.message} ({error.hint})"
        return
    for key, value in stage.items():
        if key in STAGE_KEYS or not isinstance(key, str):
            continue
        try:
            check_options(name, {key: value})
        except PresetError as error:
            yield (*place, key), f"{error.message} ({error.hint})"
    keep = stage.get("keep")
    if keep == 0 and not isinstance(keep, bool) and not method.drops_all:
        yield (*place, "keep"), "keep 0 drops every visual token, which only vtw may do"
    if keep and method.drops_all:
        yield (*place, "keep"), f"{name} drops every visual token: leave keep out, or set it to 0"
