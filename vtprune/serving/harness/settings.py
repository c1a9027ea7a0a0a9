"""The arguments of a harness's model, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import PresetError, VtpruneError
from vtprune.models import EMBEDDED
from vtprune.preset import Preset, load_preset, override

if TYPE_CHECKING:
    from vtprune.models.base import Sampling
    from vtprune.models.loading import Loaded

LEAST = {"frames": 1, "max_frames": 1, "max_tiles": 0, "max_pixels": 1, "max_new_tokens": 1}
"""Whole numbers: argument and least value."""


@dataclass(frozen=True)
class Settings:
    """What `--model_args` says.

    Args:
        pretrained: a directory, short name or hub id; "embedded" for the demonstration model.
        adapter: a directory or hub id of an adapter for it.
        preset, keep, method, at, seed: as in `vtprune ask`; keep is a number, or
            "image=0.5,video=0.2".
        device, dtype, attention, quantize, calibration, compile, trust_remote_code: likewise.
        frames, fps, max_frames, max_tiles, max_pixels, allow_partial: likewise.
        system_prompt: for conversations that bring none.
        max_new_tokens: the longest answer, where the task does not say.
        options: of the method.

    Raises:
        VtpruneError: a value out of range, or one that does not exist.
    """

    pretrained: str = EMBEDDED
    adapter: str | None = None
    preset: str | None = None
    keep: float | str | None = None
    method: str | None = None
    at: str | int | None = None
    seed: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    attention: str | None = None
    quantize: str | None = None
    calibration: str | None = None
    compile: bool = False
    trust_remote_code: bool = False
    frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    max_tiles: int | None = None
    max_pixels: int | None = None
    allow_partial: bool = False
    system_prompt: str = ""
    max_new_tokens: int = 1024
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (is_integer and value >= least):
                raise VtpruneError(
                    f"{name}={value} is out of range", f"a whole number from {least} on"
                )
        if self.fps is not None and not (isinstance(self.fps, (int, float)) and self.fps > 0):
            raise VtpruneError(f"fps={self.fps} is out of range", "a number above 0")
        if self.frames is not None and self.fps is not None:
            raise VtpruneError("frames and fps exclude each other", "give one of them")
        self.resolve()

    @classmethod
    def read(cls, arguments: Mapping[str, object]) -> Settings:
        """Settings by name; what is none of them is an option of the method.

        Values are taken as harnesses read them off a command line: "None" and "" are nothing,
        quotation marks around a value are not part of it.
        """
        names = {entry.name for entry in fields(cls)} - {"options"}
        values = {key: _bare(value) for key, value in arguments.items()}
        known = {key: value for key, value in values.items() if key in names and value is not None}
        options = {
            key: str(value).lower() if isinstance(value, bool | None) else str(value)
            for key, value in values.items()
            if key not in names
        }
        return cls(**known, options=options)  # type: ignore[arg-type]

    def resolve(self) -> Preset:
        """The preset under these settings."""
        keep = self.keep if self.keep is None else str(self.keep)
        at = None if self.at is None else str(self.at)
        try:
            return override(
                load_preset(self.preset), keep, self.method, at, self.options, self.seed
            )
        except PresetError as error:
            if not any(key in error.message for key in self.options):
                raise
            names = ", ".join(entry.name for entry in fields(self) if entry.name != "options")
            raise PresetError(error.message, f"{error.hint}; other arguments: {names}") from error

    def sampling(self) -> Sampling:
        """How much of the media is looked at; what is not said here is the preset's."""
        from vtprune.inference.prepare import sampling_of

        settings = {
            name: getattr(self, name) for name in ("frames", "fps", "max_frames", "max_tiles")
        }
        sampling = sampling_of(self.resolve())
        if self.frames is not None or self.fps is not None:
            sampling = replace(sampling, frames=None, fps=None)
        return replace(
            sampling, **{key: value for key, value in settings.items() if value is not None}
        )

    def load(self, device: str | None = None) -> Loaded:
        """The model.

        Args:
            device: in place of the settings' own.
        """
        from vtprune.models.loading import load

        return load(
            self.pretrained,
            adapter=self.adapter,
            device=device or self.device,
            dtype=self.dtype,
            attention=self.attention,
            quantize=self.quantize,
            calibration=None if self.calibration is None else Path(self.calibration),
            compile=self.compile,
            trust_remote_code=self.trust_remote_code,
        )


def _bare(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = value.strip().strip("'\"")
    return None if text in ("", "None") else text
