"""A question about gathered media, as the model's inputs on its device."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vtprune.errors import ModelError
from vtprune.inference.compare import Side
from vtprune.inference.gathering import Gathered
from vtprune.inference.generation import Generation
from vtprune.inference.questions_file import check_length
from vtprune.models.base import Inputs, PreparedMedia, Sampling, Turn
from vtprune.models.loading import Loaded
from vtprune.preset import Preset, set_sampling
from vtprune.tokens.layout import MODALITIES
from vtprune.tokens.units import Units


def encode(loaded: Loaded, gathered: Gathered, question: str, generation: Generation) -> Inputs:
    """The model's inputs for one question about the media."""
    if not question.strip():
        raise ModelError("the question is empty", 'write one: vtprune ask FILE "what is it?"')
    if fault := check_length(question) or check_length(generation.system, "system prompt"):
        raise ModelError(fault, "make it shorter")
    system = [Turn("system", generation.system)] if generation.system else []
    return encode_turns(loaded, gathered, [*system, Turn("user", question, len(gathered.items))])


def encode_turns(loaded: Loaded, gathered: Gathered, turns: Sequence[Turn]) -> Inputs:
    """The model's inputs for a conversation about the media."""
    inputs = loaded.family.encode(loaded.files, gathered.items, turns)
    units = units_of(loaded, gathered.items, inputs)
    return replace(inputs, units=units, whole=gathered.whole)


@dataclass(frozen=True)
class Prompt:
    """A question about media, ready for the model.

    Args:
        gathered: the media.
        inputs: on the model's device.
        preprocess: seconds of resizing, and of making the inputs.
    """

    gathered: Gathered
    inputs: Inputs
    preprocess: float

    @property
    def seconds(self) -> dict[str, float]:
        """What it took to get there, by part of the report."""
        return {"preprocess": self.preprocess, "media": self.gathered.media_seconds}

    def side(self, preset: Preset | None, again: bool = False) -> Side:
        """It, as one of two that are timed.

        Args:
            again: for a further question, whose media were read and resized for the first.
        """
        read = 0.0 if again else self.gathered.media_seconds
        resized = self.gathered.resize_seconds if again else 0.0
        return Side(self.inputs, preset, self.preprocess - resized, read)


def ready(loaded: Loaded, gathered: Gathered, question: str, generation: Generation) -> Prompt:
    """A question about media that were gathered."""
    started = time.perf_counter()
    inputs = encode(loaded, gathered, question, generation)
    inputs = replace(inputs, tensors=to_device(loaded, inputs.tensors))
    return Prompt(gathered, inputs, gathered.resize_seconds + time.perf_counter() - started)


def units_of(loaded: Loaded, items: Sequence[PreparedMedia], inputs: Inputs) -> tuple[Units, ...]:
    """What the vision tower encodes on its own; in the order of the prompt, where that is told."""
    tower = getattr(loaded.files.config, "vision_config", None)
    together = int(getattr(tower, "temporal_patch_size", 1))
    units = [
        Units("video", one.pixels, together)
        if one.source.kind == "video"
        else Units("image", one.pixels, regions=one.regions)
        for one in items
    ]
    left = {kind: [one for one in units if one.modality == kind] for kind in MODALITIES}
    ordered = [left[kind].pop(0) for kind, _ in inputs.media]
    return (*ordered, *left["image"], *left["video"])


def to_device(loaded: Loaded, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs on the model's device, pixels in its dtype."""
    model = loaded.model
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() and
                       name.startswith("pixel_values") else None)
        for name, value in tensors.items()
    }  # fmt: skip


def as_sampled(preset: Preset, sampling: Sampling) -> Preset:
    """A preset that says how much of the media was looked at under it."""
    return set_sampling(
        preset, sampling.frames, sampling.fps, sampling.max_frames, sampling.max_tiles
    )


def sampling_of(preset: Preset) -> Sampling:
    """How much of the media a preset wants to be looked at."""
    video = preset.video
    return Sampling(
        frames=video.frames,
        fps=video.fps,
        max_frames=video.max_frames,
        max_tiles=preset.image.max_tiles,
    )
