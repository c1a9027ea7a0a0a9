"""What a model family has to say about itself, and the types that say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from vtprune.tokens.layout import Grid
from vtprune.tokens.units import Region, Units, Whole

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from vtprune.media import Source
    from vtprune.models.anyres import Plane

PIXELS = {"pixel_values": "image", "pixel_values_images": "image", "pixel_values_videos": "video"}
"""A tensor of a model's inputs -> what it holds; where both share one, they are encoded alike."""


@dataclass(frozen=True)
class Sampling:
    """How much of the media the user wants to be looked at; None leaves it to the family.

    Args:
        frames: number of frames of a video, evenly from the first to the last.
        fps: frames a second instead.
        max_frames: the most frames, for `fps` and for the family's own sampling.
        start: seconds from which on a video is looked at.
        end: seconds up to which it is.
        max_tiles: the most tiles of a picture, the base picture not counted.
    """

    frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    start: float | None = None
    end: float | None = None
    max_tiles: int | None = None


@dataclass(frozen=True)
class Files:
    """What a checkpoint's own files say about preparing inputs.

    Args:
        config: the model's config.
        tokenizer: its tokenizer, chat template included where the checkpoint has one.
        image: contents of preprocessor_config.json (or of "image_processor" in
            processor_config.json), {} where absent.
        video: contents of video_preprocessor_config.json (or "video_processor"), {} where absent.
        processor: contents of processor_config.json, {} where absent.
    """

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    image: Mapping[str, object] = field(default_factory=dict)
    video: Mapping[str, object] = field(default_factory=dict)
    processor: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What to read of one source, and what to do with each chunk of frames after decoding.

    Args:
        index: the frame numbers to read, ascending; (0,) for a picture.
        transform: (n, 3, H, W) uint8 on the CPU -> (m, ...) tensor; called on each chunk, results
            are joined along the first dimension. Resizes by the family's official recipe.
        regions: of a picture in tiles, the part of it that each of the transform's rows shows;
            empty where tokens of its tiles depend on each other.
    """

    index: tuple[int, ...]
    transform: Callable[[torch.Tensor], torch.Tensor]
    regions: tuple[Region, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """One media item after decoding and resizing.

    Args:
        source: the file it came from.
        pixels: what the plan's transform made of it.
        index: the frame numbers really read.
        timestamps: their times in seconds; () for a picture.
        regions: the plan's.
    """

    source: Source
    pixels: torch.Tensor
    index: tuple[int, ...] = ()
    timestamps: tuple[float, ...] = ()
    regions: tuple[Region, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Args:
        role: "system", "user" or "assistant".
        text: what it says.
        media: how many of the prompt's media items, in order, it shows.
        places: how many characters of the text stand before each of them, ascending; () where it
            begins with them.
    """

    role: str
    text: str
    media: int = 0
    places: tuple[int, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """A model's inputs for one prompt.

    Args:
        tensors: keyword arguments for `model.generate` (batch of 1), on the CPU, float32 pixels.
        prompt: the text that was tokenized, placeholders not expanded.
        tiles: tiles of each picture, the base picture included; 1 for an untiled one.
        media: modality and grid of each media item in the order of the prompt, where the tensors
            don't say it, such as when pictures and videos share their placeholders.
        units: what the vision tower encodes on its own, of each media item; set by `run`.
        whole: what the prompt would hold if its media had not been made smaller; None where they
            were not; set by `run`.
    """

    tensors: dict[str, torch.Tensor]
    prompt: str
    tiles: tuple[int, ...] = ()
    media: tuple[tuple[str, Grid], ...] = ()
    units: tuple[Units, ...] = ()
    whole: Whole | None = None


VisionInputs = Mapping[str, Mapping[str, object]]
"""Modality -> the arguments by name that the model's get_image_features / get_video_features
was called with (pixel values, grids, sizes), as recorded, or as given to forward."""


class Family(Protocol):
    """One model family: transformers' inputs in, inputs and grids out. Holds no state.

    The first half serves the engine, on any user's own inputs; the second serves `vtprune ask`.
    """

    name: str
    model_types: tuple[str, ...]
    modalities: tuple[str, ...]

    def placeholders(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        """Modality -> token ids that stand for its features in `input_ids`.

        Two modalities with the same ids share them: which it is follows from the vision inputs.
        """
        ...

    def grids(self, config: PreTrainedConfig, vision: VisionInputs) -> dict[str, list[Grid]]:
        """Modality -> one grid a media item, in the order of the prompts of the whole batch.

        The engine adds the batch's `input_ids`, (B, S), to what each encoder was called with.
        Where images and videos share placeholders, `vision` has only the one they are taken for.
        """
        ...

    def largest(self, files: Files) -> tuple[int, int]:
        """(height, width) of the largest picture that is not made smaller, in the most tiles."""
        ...

    def plan(self, files: Files, source: Source, sampling: Sampling, num_media: int) -> Plan:
        """What to read of `source`, when the prompt holds `num_media` media items of its kind."""
        ...

    def encode(self, files: Files, media: Sequence[Prepared], turns: Sequence[Turn]) -> Inputs:
        """The model's inputs for a conversation about `media`."""
        ...


class Known(Protocol):
    """A model as far as preparing its inputs needs it: its weights may still be missing."""

    @property
    def family(self) -> Family: ...

    @property
    def files(self) -> Files: ...


@runtime_checkable
class Tiled(Protocol):
    """A family some of whose pictures are tiles that are laid together and cut to the picture."""

    def planes(
        self, config: PreTrainedConfig, given: Mapping[str, object]
    ) -> list[Plane | None] | None:
        """How the tiles of each picture lie, which follow its base picture in the tower.

        Args:
            given: the arguments of the encoder call, by name.

        Returns:
            None for a picture that is not tiled, and for a call that encodes videos.
        """
        ...
