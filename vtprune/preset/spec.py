"""The parts of a preset: stages, budgets, and the sampling of frames and tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vtprune.errors import PresetError, brief, quote
from vtprune.preset.figures import Figure, figure_of, to_entry
from vtprune.pruners import METHODS, check_options, reads_question

DEFAULT = "balanced"
PIXELS = "pixels"  # before the vision tower
STAGE_KEYS = ("at", "method", "keep", "per", "split", "positions", "optional")
IMAGE_KEYS = ("keep", "max_tiles", "stages")
VIDEO_KEYS = ("keep", "frames", "fps", "max_frames", "stages")

MOST_DIGITS = 60  # of a layer's number: Python converts no more than some thousands
LARGEST_WHOLE = 2**63 - 1
"""Of a seed, and of a number of frames or tiles: torch's random generator takes no more."""

FITS = ("context", "memory")
"""What `fit` works the kept tokens out from."""

SHARES = ("equal", "information")
"""How segments of a streamed video share what their cuts leave."""

SHARED = ("all", "even", "keep")
"""A stage's per, split and positions where it says nothing."""

Keep = float | Mapping[str, float]


@dataclass(frozen=True)
class StageSpec:
    """One stage as a preset says it.

    Args:
        at: "pixels", "input", "ecl", "horizon", a layer number, a depth such as "60%", or
            "schedule": the method's own.
        method: a registered method.
        keep: fraction of the original tokens left from here on; None for the free stage.
        per: "all", "frame" or "tile": the scope over which the budget is shared.
        split: how frames or tiles share the budget: "even"; "entropy": more to those that carry
            more information; "entropy-or-none": likewise, and one may get none.
        positions: "keep": kept tokens keep their position ids; "renumber": they get new ones
            without gaps.
        options: every option of the method, defaults included.
        optional: leave a stage at "pixels" out, with a warning, where there are no pixels to
            compare, or no tower that is known to encode frames one by one.
    """

    at: str
    method: str
    keep: float | None = None
    per: str = "all"
    split: str = "even"
    positions: str = "keep"
    options: tuple[tuple[str, str | float], ...] = ()
    optional: bool = False

    @classmethod
    def from_dict(cls, stage: Mapping[str, Any]) -> StageSpec:
        """Return the stage that `to_dict` gives: its method's defaults are filled in."""
        name, keep = stage["method"], stage.get("keep")
        options = {key: value for key, value in stage.items() if key not in STAGE_KEYS}
        scopes = {
            key: stage[key] for key in ("per", "split", "positions", "optional") if key in stage
        }
        return cls(
            check_place(stage.get("at", "schedule")),  # left out only where there is a schedule
            name,
            None if keep is None else float(keep),
            options=tuple(check_options(name, options).items()),
            **scopes,
        )

    def to_dict(self) -> dict[str, object]:
        """Return the stage in the preset schema."""
        values: dict[str, object] = {"at": self.at, "method": self.method}
        if self.keep is not None:
            values["keep"] = self.keep
        if self.optional:
            values["optional"] = True
        return {**values, "per": self.per, "split": self.split, "positions": self.positions,
                **dict(self.options)}  # fmt: skip


@dataclass(frozen=True)
class DecodeSpec:
    """Cuts of the KV cache while an answer is decoded.

    Args:
        every: decoded tokens from one cut to the next.
        keep: share of the visual tokens in the cache that each cut leaves; 1: all, without a cut.
    """

    every: int
    keep: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> DecodeSpec | None:
        """Return what a preset's `decode` says; None where it says nothing."""
        return cls(data["every"], float(data["keep"])) if data else None

    def to_dict(self) -> dict[str, object]:
        """Return it in the preset schema."""
        return {"every": self.every, "keep": self.keep}


@dataclass(frozen=True)
class ModalityPreset:
    """What a preset says about one modality; None where it says nothing."""

    keep: float | None = None
    stages: tuple[StageSpec, ...] | None = None
    max_tiles: int | None = None
    frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> ModalityPreset:
        """Return what a preset's `image` or `video` says."""
        return cls(**{**(data or {}), "stages": _stages_of(data or {})})


def _stages_of(data: Mapping[str, Any]) -> tuple[StageSpec, ...] | None:
    stages = data.get("stages")
    return None if stages is None else tuple(map(StageSpec.from_dict, stages))


@dataclass(frozen=True)
class StreamSpec:
    """How a long video is encoded in segments, each cut before the next one is encoded.

    Args:
        frames: of a segment.
        keep: fraction of a segment's tokens that its cut leaves, on average over the segments;
            None: twice what the preset keeps of the whole video.
        share: how segments share that: "equal", or by "information": more to those whose tokens
            differ more.

    Raises:
        PresetError: a value out of range.
    """

    frames: int = 32
    keep: float | None = None
    share: str = "equal"

    def __post_init__(self) -> None:
        frames = self.frames
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
            raise PresetError(
                f"{quote(self.frames)} frames a segment: must be a whole number from 1 on",
                "32 is the default",
            )
        if self.keep is not None:
            check_keep(self.keep, "keep of stream")
        if self.share not in SHARES:
            raise PresetError(
                f"share {quote(self.share)} of segments is not one of {', '.join(SHARES)}",
                "equal is the default",
            )

    def to_dict(self) -> dict[str, object]:
        """Return it in the preset schema."""
        values = {"frames": self.frames, "keep": self.keep, "share": self.share}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def changed(self) -> dict[str, object] | bool:
        """What is not as by default; True where all is."""
        usual = StreamSpec().to_dict()
        return {
            name: value for name, value in self.to_dict().items() if usual.get(name) != value
        } or True


@dataclass(frozen=True)
class Preset:
    """Everything that decides what is cut.

    >>> import vtprune
    >>> preset = vtprune.load_preset("balanced")
    >>> report = vtprune.ask(None, "clip.mp4", "what moves?", preset=preset, keep=0.2)

    Args:
        name: of the preset; None where `--method` put one method in the place of its stages.
        description: its own, as long as nothing but the seed is changed in it.
        tokens: in place of a keep, the most visual tokens of a prompt, averaged over the layers.
        tokens_after: in place of a keep, the most that the first cut of the stage without a keep
            leaves.
        fit: in place of a keep, what the visual tokens past the input have to fit into: "context",
            the model's positions with room for the answer; or "memory", the device's free memory.
        decode: cuts of the KV cache while an answer is decoded; None: none. At keep 1 there are
            none either.
        keep_for_turns: share of what is kept for a question that is chosen without it, for later
            questions on the same cache; None: 0.
        stream: encode a video in segments; None: at once, where it fits the memory.
        evidence: figures that the stages rest on; none where a flag changes the stages.
        changed: what was changed in the preset, as (flag, value).
    """

    name: str | None = "custom"
    description: str = ""
    keep: float | None = None
    seed: int = 0
    stages: tuple[StageSpec, ...] | None = None
    tokens: int | None = None
    tokens_after: int | None = None
    fit: str | None = None
    stream: StreamSpec | None = None
    image: ModalityPreset = field(default_factory=ModalityPreset)
    video: ModalityPreset = field(default_factory=ModalityPreset)
    decode: DecodeSpec | None = None
    keep_for_turns: float | None = None
    evidence: tuple[Figure, ...] = ()
    changed: tuple[tuple[str, object], ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.decode is not None and not self.every_stage():
            self._check_decode_alone()
        for modality in ("image", "video"):
            if self._of(modality).stages or self.stages:
                self._check_budget(modality)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], name: str) -> Preset:
        """Return the preset that a checked mapping in the preset schema says.

        Raises:
            PresetError: its keeps contradict each other.
        """
        return cls(
            name,
            data.get("description") or "",
            data.get("keep"),
            data.get("seed") or 0,
            _stages_of(data),
            data.get("tokens"),
            data.get("tokens_after"),
            data.get("fit"),
            stream_of(data.get("stream")),
            ModalityPreset.from_dict(data.get("image")),
            ModalityPreset.from_dict(data.get("video")),
            DecodeSpec.from_dict(data.get("decode")),
            data.get("keep_for_turns"),
            tuple(map(figure_of, data.get("evidence") or ())),
        )

    @property
    def method(self) -> str | None:
        """Return the method that was asked for in place of a preset; None where it is a preset."""
        return None if self.name else next((stage.method for stage in self.every_stage()), None)

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"preset {self.name}" if self.name else f"method {self.method}"

    def note_changes(self, changes: Mapping[str, object]) -> Preset:
        """Return the preset with a note of its changes; its description goes unless it holds."""
        seed_alone = not changes.keys() - {"seed"}
        return replace(
            self,
            description=self.description if seed_alone else "",
            changed=tuple({**dict(self.changed), **changes}.items()),
        )

    def every_stage(self) -> list[StageSpec]:
        """Return the stages for all modalities, then those for images and for videos."""
        groups = (self.stages, self.image.stages, self.video.stages)
        return [stage for group in groups for stage in group or ()]

    def _of(self, modality: str) -> ModalityPreset:
        return self.image if modality == "image" else self.video

    def _check_budget(self, modality: str) -> None:
        keep, stages = self.keep_for(modality), self.stages_for(modality)
        self._check_tokens(keep)
        if any(stage.at == PIXELS for stage in stages[1:]):
            raise PresetError(
                f"{self.label}: a stage at pixels ({modality}) comes after another one, but "
                "it acts before the vision tower, and so before all others",
                "put it first; a preset can have one stage at pixels",
            )
        for stage in stages:
            if stage.optional and (stage.at != PIXELS or METHODS[stage.method].media or
                                   len(stages) == 1):  # fmt: skip
                raise PresetError(
                    f"{self.label}: optional: true at {stage.at} ({stage.method}, {modality}) is "
                    "for a stage at pixels that drops frames, tiles or patches before other stages",
                    "leave optional away",
                )
        first = stages[0].keep if stages[0].at == PIXELS else None
        for stage in stages[1:]:
            if first is not None and stage.keep is not None and stage.keep > first:
                raise PresetError(
                    f"{self.label}: keep {stage.keep:g} at {stage.at} comes after keep "
                    f"{first:g} at pixels: tokens that were cut can't come back",
                    "a stage's keep is a fraction of the original tokens and can only fall",
                )
        if METHODS[stages[0].method].media and stages[0].keep is None and len(stages) > 1:
            raise PresetError(
                f"{self.label}: the stage at pixels ({stages[0].method}, {modality}) has no "
                "keep, and others follow it",
                "give it a keep of its own, the fraction that it leaves to them",
            )
        free = [
            stage
            for stage in stages
            if stage.keep is None and (stage.at != PIXELS or len(stages) == 1)
        ]
        if self.fit is not None and len(stages) == 1 and stages[0].at == PIXELS:
            raise PresetError(
                f"{self.label}: fit {self.fit} with {stages[0].method} at pixels alone, which "
                "drops whole frames and tiles, or makes media smaller",
                "add a stage at the input, or use --preset balanced",
            )
        if len(free) > 1:
            raise PresetError(
                f"{self.label}: the stages at {free[0].at} and {free[1].at} "
                f"({modality}) both have no keep; at most one stage can take the rest of the "
                "budget",
                f"give the stage at {free[1].at} a keep of its own",
            )
        if keep is not None and keep < 1 and not free:
            kept = next(stage for stage in stages if stage.keep is not None)
            raise PresetError(
                f"{self.label}: every {modality} stage has its own keep, so keep {keep:g} "
                "sets nothing",
                f"remove the keep of the stage at {kept.at} ({kept.method}) to free it, "
                "or give no keep",
            )
        if self.has_budget and not free:
            kept = next(stage for stage in stages if stage.keep is not None)
            budget = f"a budget of {self.budget} tokens" if self.fit is None else f"fit {self.fit}"
            raise PresetError(
                f"{self.label}: every {modality} stage has its own keep, so {budget} sets nothing",
                f"remove the keep of the stage at {kept.at} ({kept.method}) to free it",
            )

    def _check_decode_alone(self) -> None:
        """Refuse a budget of the prefill where cuts are made while decoding alone."""
        keeps = [self.keep_for(modality) for modality in ("image", "video")]
        if self.has_budget or any(keep is not None and keep < 1 for keep in keeps):
            raise PresetError(
                f"{self.label}: it has no stages, so a keep or a number of tokens sets nothing: "
                "decode has a keep of its own",
                "add stages, or give no keep",
            )

    def _check_tokens(self, keep: float | None) -> None:
        """Refuse two budgets."""
        names = {"keep": keep, "tokens": self.tokens, "tokens_after": self.tokens_after}
        given = [f"{name} {value:g}" for name, value in names.items() if value is not None]
        given += [] if self.fit is None else [f"fit {self.fit}"]
        if len(given) > 1:
            raise PresetError(
                f"{self.label}: {given[0]} and {given[1]} are two budgets",
                "give one: keep is a fraction, tokens a layer average, tokens_after what the first "
                "cut leaves, fit what positions or memory leave room for",
            )

    def stages_for(self, modality: str) -> tuple[StageSpec, ...]:
        """Return the stages for `modality`.

        Raises:
            PresetError: the preset has none for it.
        """
        stages = self._of(modality).stages or self.stages
        if not stages and self.decode is not None and not self.every_stage():
            return ()  # it cuts while decoding alone
        if not stages:
            raise PresetError(
                f"{self.label} has no stages for {modality}",
                f"add {modality}: stages: to it, or use --preset {DEFAULT} or --method",
            )
        return stages

    def frame_and_tile_stage(self) -> StageSpec | None:
        """Return the stage that drops frames and tiles before the vision tower; None: none does."""
        stages = [self._stage_before_tower(modality) for modality in ("image", "video")]
        return next((stage for stage in stages if stage and METHODS[stage.method].units), None)

    def without_optional_stages(self) -> Preset:
        """Return the preset as it is where nothing can go before the vision tower."""

        def required(stages: tuple[StageSpec, ...] | None) -> tuple[StageSpec, ...] | None:
            return stages and tuple(stage for stage in stages if not stage.optional)

        return replace(
            self,
            stages=required(self.stages),
            image=replace(self.image, stages=required(self.image.stages)),
            video=replace(self.video, stages=required(self.video.stages)),
        )

    def downsampling_stage(self, modality: str) -> StageSpec | None:
        """Return the stage that makes media smaller before they are prepared; None: none does."""
        stage = self._stage_before_tower(modality)
        return stage if stage and METHODS[stage.method].media else None

    def _stage_before_tower(self, modality: str) -> StageSpec | None:
        keep, stages = self.keep_for(modality), self._of(modality).stages or self.stages
        if stages and stages[0].at == PIXELS and (keep is None or keep < 1):
            return stages[0]
        return None

    def keep_for(self, modality: str) -> float | None:
        """Return the layer average asked for `modality`; None where its stages' keeps decide."""
        keep = self._of(modality).keep
        return self.keep if keep is None else keep

    @property
    def budget(self) -> int | None:
        """Return the visual tokens asked for in place of a keep; None where there is a keep."""
        return self.tokens_after if self.tokens is None else self.tokens

    @property
    def has_budget(self) -> bool:
        """Whether something else than a keep says how many tokens are left."""
        return self.budget is not None or self.fit is not None

    def with_fitting(self, tokens: int) -> Preset:
        """Return the preset with what was found to fit in place of `fit`."""
        return replace(self, fit=None, tokens_after=tokens)

    def keep_before_tower(self, modality: str, visual: int) -> float | None:
        """Return the fraction that a stage at `pixels` leaves if it is the only one.

        Args:
            visual: visual tokens of the prompt, of all modalities.
        """
        if self.budget is None:
            return self.keep_for(modality)
        return min(1.0, self.budget / max(visual, 1))

    def budget_for(self, modality: str, visual: int, size: int) -> tuple[float | None, int | None]:
        """Return the layer average for a prompt, and what the first cut leaves in place of it.

        Args:
            visual: visual tokens of the prompt, of all modalities; each has its share of a budget
                in tokens.
            size: those of the modality.
        """
        if self.tokens_after is not None:
            return None, max(1, self.tokens_after * size // max(visual, 1))
        return self.keep_before_tower(modality, visual), None

    def keeps_all(self) -> bool:
        """Return whether nothing of any modality is to be dropped: keep 1, whatever the stages."""
        keeps = [self.keep_for(modality) for modality in ("image", "video")]
        return all(keep is not None and keep >= 1 for keep in keeps)

    def shares_one_budget(self) -> bool:
        """Whether all modalities have the same stages and keep, and so one budget together."""
        same_stages = self.image.stages is None and self.video.stages is None
        return same_stages and self.keep_for("image") == self.keep_for("video")

    def question_aware_methods(self) -> tuple[str, ...]:
        """Return the methods of its stages that keep tokens for the question.

        With none the preset is question-blind: a second question in a conversation finds the
        tokens that it would have been given itself.
        """
        names = [
            stage.method
            for stage in self.every_stage()
            if reads_question(stage.method, dict(stage.options), stage.at)
        ]
        return tuple(dict.fromkeys(names))

    def to_dict(self) -> dict[str, object]:
        """Return the preset in its own schema, every stage with all its options."""
        out: dict[str, object] = {"name": self.name, "description": self.description,
                                  "keep": self.keep, "seed": self.seed}  # fmt: skip
        for name, tokens in (("tokens", self.tokens), ("tokens_after", self.tokens_after)):
            if tokens is not None:
                out[name] = tokens
        if self.fit is not None:
            out["fit"] = self.fit
        if self.decode is not None:
            out["decode"] = self.decode.to_dict()
        if self.keep_for_turns is not None:
            out["keep_for_turns"] = self.keep_for_turns
        if self.stream is not None:
            out["stream"] = self.stream.to_dict()
        if self.stages is not None:
            out["stages"] = [stage.to_dict() for stage in self.stages]
        for modality, keys in (("image", IMAGE_KEYS), ("video", VIDEO_KEYS)):
            part = self._of(modality)
            values: dict[str, object] = {
                key: getattr(part, key)
                for key in keys
                if key != "stages" and getattr(part, key) is not None
            }
            if part.stages is not None:
                values["stages"] = [stage.to_dict() for stage in part.stages]
            if values:
                out[modality] = values
        if self.evidence:
            out["evidence"] = [to_entry(figure) for figure in self.evidence]
        return out


def check_place(value: object) -> str:
    """Return a place as text.

    Raises:
        PresetError: not a place.
    """
    text = (value if isinstance(value, str) else quote(value)).strip()
    if text in (PIXELS, "input", "ecl", "horizon", "schedule"):
        return text
    if not isinstance(value, (bool, float)) and text.isdecimal() and text.isascii():
        layer = text.lstrip("0") or "0"
        if len(layer) <= MOST_DIGITS:
            return layer
    if text.endswith("%"):
        try:
            if 0 <= float(text[:-1]) < 100:
                return text
        except ValueError:
            pass
    raise PresetError(
        f"at: {brief(value)} is not a place",
        'use pixels, input, ecl, horizon, a layer number or a depth "60%"',
    )


def stream_of(value: object) -> StreamSpec | None:
    """Return what a preset's, or an argument's, `stream` says.

    Raises:
        PresetError: neither true nor false, nor a mapping of frames, keep and share.
    """
    if value is None or isinstance(value, StreamSpec):
        return value
    if isinstance(value, bool):
        return StreamSpec() if value else None
    if isinstance(value, Mapping) and not set(value) - {"frames", "keep", "share"}:
        return StreamSpec(**value)
    raise PresetError(
        f"stream {quote(value)} is not true, false, or a mapping of frames, keep and share",
        "stream: true, or stream: {frames: 32, keep: 0.5, share: equal}",
    )


def check_stage(stage: StageSpec) -> None:
    """Refuse a stage whose parts contradict each other.

    Raises:
        PresetError: with the way out.
    """
    method = METHODS[stage.method]
    check_side(stage.method, stage.at)
    if stage.at == PIXELS and (stage.per, stage.split, stage.positions) != SHARED:
        raise PresetError(
            f"per, split or positions for {stage.method} at pixels, where there are no tokens yet",
            "give it keep and its own options alone",
        )
    if stage.at == "schedule":
        if not method.schedule:
            raise PresetError(
                f"at: schedule: {stage.method} has no schedule of its own",
                "use input, ecl, horizon, a layer number or a depth",
            )
        if stage.keep is not None:
            raise PresetError(
                f"keep {stage.keep:g} for the schedule of {stage.method}: its cuts are solved from "
                "the preset's keep",
                "give the keep to the preset, or a place to the stage",
            )
    if stage.split != "even" and stage.per == "all":
        raise PresetError(
            f"split: {stage.split} shares a budget over frames or tiles, and per is all",
            "add per: frame or per: tile",
        )
    if stage.at == "input" and method.lowest:
        raise PresetError(
            f"{stage.method} reads what the layer before its cut does, and there is none "
            "at the input",
            "use at: 1 or later, ecl or horizon",
        )


def check_side(method: str, at: str) -> None:
    """Refuse a method on the wrong side of the vision tower.

    Raises:
        PresetError: with the way out.
    """
    early = METHODS[method].before_tower
    if (at == PIXELS) == early:
        return
    others = ", ".join(name for name, spec in METHODS.items() if spec.before_tower != early)
    if early:
        does = "makes media smaller" if METHODS[method].media else "drops whole frames and tiles"
        raise PresetError(
            f"{method} can't cut at {at}: it {does} before the vision tower",
            f"use at: pixels; methods for tokens: {others}",
        )
    raise PresetError(
        f"{method} can't cut at pixels: it chooses visual tokens, which the vision tower makes",
        f"use at: input or later; methods before the tower: {others}",
    )


def check_keep(value: float | str, name: str = "keep") -> float:
    """Return a kept fraction in (0, 1].

    Args:
        name: what gave it, for the error.

    Raises:
        PresetError: not a number, or out of range.
    """
    try:
        keep = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        keep = float("nan")
    if not 0 < keep <= 1:
        raise PresetError(
            f"{name} {brief(value)} is not a fraction in (0, 1]",
            "keep 0.3 keeps 30 % of the visual tokens; it is never a drop rate",
        )
    return keep
