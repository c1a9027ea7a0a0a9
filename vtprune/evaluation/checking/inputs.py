"""The prompts that are checked: about the user's files, or about a picture and a clip made here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from vtprune.errors import ModelError
from vtprune.evaluation.profiling.prompts import ProfiledMedia, make_source
from vtprune.inference.generate import Generation
from vtprune.inference.prepare import batch_on_device, encode
from vtprune.inference.prompt_media import PromptMedia, read_in_full, resize_drawn
from vtprune.media import Limits, Source
from vtprune.models.base import Inputs, Sampling

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded, Progress

QUESTION = "What is shown?"
LONGER = "What is shown here, and where in it? Answer in one sentence."
LARGEST = 224  # pixels that the picture is high, and half as many as it is wide
FRAMES, SIDE = 8, 224  # of the clip
STILL = 4  # frames of the clip that are equal, one after the other
BLOCK = 16  # pixels along a side of one colour
TEXTURED = 3 / 8  # of a picture's width; the rest is grey, so that a tile of it is plain
GREY = 128


@dataclass(frozen=True, eq=False)
class CheckedBatch:
    """One call of the model.

    Args:
        input: "picture", "clip" or "files".
        prompts: "one", or "ragged" for two of different length, padded on the left.
        rows: the inputs of each prompt.
        tensors: of all of them, on the model's device.
    """

    input: str
    prompts: str
    rows: tuple[Inputs, ...]
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class CheckedInput:
    """The media of the prompts about one input.

    Args:
        name: "picture", "clip" or "files".
        first: the media of the single prompt, and of the first in the ragged batch.
        second: the media of the other prompt in the ragged batch.
    """

    name: str
    first: PromptMedia
    second: PromptMedia

    @property
    def kinds(self) -> set[str]:
        """The modalities of its media."""
        return {item.source.kind for item in self.first.items}


def gather_files(
    loaded: Loaded,
    sources: Sequence[Source],
    sampling: Sampling,
    limits: Limits,
    on_progress: Progress | None = None,
) -> list[CheckedInput]:
    """Return the user's files, all in one prompt."""
    files = read_in_full(loaded, sources, sampling, limits, on_progress)
    return [CheckedInput("files", files, files)]


def draw_media(loaded: Loaded, sampling: Sampling, modalities: Sequence[str]) -> list[CheckedInput]:
    """Return a picture and a clip, as far as the model takes them.

    Args:
        modalities: that are to be checked.

    Raises:
        ModelError: the model takes none of them.
    """
    kinds = [kind for kind in modalities if kind in loaded.family.modalities]
    if not kinds:
        raise ModelError(
            f"{loaded.family.name} takes {' and '.join(loaded.family.modalities)} input, and this "
            f"method cuts {' and '.join(modalities)} tokens",
            "choose another --method (vtprune methods)",
        )
    inputs = []
    for kind in kinds:
        if kind == "video":
            clip = draw_clip(loaded, sampling)
            inputs.append(CheckedInput("clip", clip, clip))
        else:
            wide, small = (draw_picture(loaded, sampling, square) for square in (False, True))
            inputs.append(CheckedInput("picture", wide, small))
    return inputs


def draw_picture(loaded: Loaded, sampling: Sampling, square: bool) -> PromptMedia:
    """Return a picture of coloured blocks on grey, twice as wide as high, or as wide.

    It is no larger than a third of what the model takes in full: a prompt of few tiles.
    """
    largest = loaded.family.largest(loaded.files)
    height = min(LARGEST, *(max(1, side // 3) for side in largest))
    width = height if square else 2 * height
    pixels = torch.full((1, 3, height, width), GREY, dtype=torch.uint8)
    end = int(width * TEXTURED)
    pixels[..., :end] = blocks(height, end, seed=int(square))
    source = make_source(ProfiledMedia("image", width, height))
    return resize_drawn(loaded, source, lambda index: pixels, sampling)


def draw_clip(loaded: Loaded, sampling: Sampling) -> PromptMedia:
    """Return a clip of coloured blocks that changes every few frames."""
    frames = sampling.frames or FRAMES
    if sampling == replace(Sampling(), max_tiles=sampling.max_tiles):  # nothing is said of frames
        sampling = replace(sampling, frames=frames)

    def draw(index: Sequence[int]) -> torch.Tensor:
        return torch.stack([blocks(SIDE, SIDE, seed=number // STILL) for number in index])

    return resize_drawn(
        loaded, make_source(ProfiledMedia("video", SIDE, SIDE, frames)), draw, sampling
    )


def blocks(height: int, width: int, seed: int) -> torch.Tensor:
    """Return (3, height, width) uint8 of blocks of random colours."""
    rows, cols = -(-height // BLOCK), -(-width // BLOCK)
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (3, rows, cols), dtype=torch.uint8, generator=generator)
    large = colours.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    return large[:, :height, :width]


def make_batches(loaded: Loaded, checked_input: CheckedInput) -> list[CheckedBatch]:
    """Return one prompt about the checked_input, and a ragged batch of two."""
    short = encode(loaded, checked_input.first, QUESTION, Generation())
    long = encode(loaded, checked_input.second, LONGER, Generation())
    return [
        CheckedBatch(
            checked_input.name,
            name,
            rows,
            batch_on_device(loaded, rows),
        )
        for name, rows in (("one", (short,)), ("ragged", (short, long)))
    ]
