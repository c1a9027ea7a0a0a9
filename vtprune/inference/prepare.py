"""From media and a question to the model's inputs, alone or several as one left-padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from vtprune.device import clock
from vtprune.engine.inputs import FeatureCache, PreparedInputs
from vtprune.errors import ModelError
from vtprune.inference.long_video import stream_inputs
from vtprune.inference.model_inputs import TEXT_INPUTS, Tensors, pixels_in, to_device
from vtprune.inference.prompt_media import PromptMedia
from vtprune.inference.questions_file import check_length
from vtprune.models.base import Inputs, PreparedMedia, Sampling, Turn
from vtprune.preset import Preset, set_sampling
from vtprune.tokens.layout import MODALITIES
from vtprune.tokens.units import Units

if TYPE_CHECKING:
    from vtprune.inference.generate import Generation
    from vtprune.models.loading import Loaded

FRAMES = "pixel_values_videos"
POOLED = {"image_token_pooling": "pixel_values", "video_token_pooling": FRAMES}
"""Numbers of patches, counted over the whole batch -> the (tiles or frames, patches, d) they are of
(Molmo2)."""


@dataclass(frozen=True, eq=False)
class PreparedQuestion:
    """A question about media, ready for the model.

    Args:
        question: its text.
        media: the files, read and resized.
        inputs: the model's, a batch of one.
        seconds: by part of the report: "media" (opening and decoding) and "preprocess" (resizing,
            and making the inputs); what an earlier question has paid for is in none.
    """

    question: str
    media: PromptMedia
    inputs: Inputs
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The model's inputs by name."""
        return self.inputs.tensors

    def for_engine(self, features: FeatureCache | None = None) -> PreparedInputs:
        """Return what `pruning` is told of the prompt.

        Args:
            features: as of PreparedInputs.
        """
        return PreparedInputs.of(self.tensors, [self.inputs], features)


def prepare_question(
    loaded: Loaded,
    media: PromptMedia,
    question: str,
    generation: Generation,
    after: PreparedQuestion | None = None,
    on_device: bool = True,
) -> PreparedQuestion:
    """Make the model's inputs for a question.

    Args:
        generation: its system prompt is asked too.
        after: an earlier question about the same media, whose pixels are on the device already.
        on_device: move the inputs to the model's device; else they stay where they are made, until
            the batch that they become a part of.

    Raises:
        ModelError: the question is empty or too long, or the model can't take the media.
    """
    return prepare_turns(loaded, media, turns_of(question, media, generation), after, on_device)


def prepare_turns(
    loaded: Loaded,
    media: PromptMedia,
    turns: Sequence[Turn],
    after: PreparedQuestion | None = None,
    on_device: bool = True,
) -> PreparedQuestion:
    """Make the model's inputs for a conversation, as `prepare_question` does."""
    started = clock()
    inputs = encode_turns(loaded, media, turns)
    streamed: Mapping[str, float] = {}
    if media.stream is not None:
        known = None if after is None else after.inputs.streamed
        inputs, after = stream_inputs(loaded, media, turns, inputs, known), None
        assert inputs.streamed is not None
        streamed = inputs.streamed.seconds
        started += sum(streamed.values())
    if on_device:
        pixels = {} if after is None else pixels_in(after.tensors)
        inputs = replace(inputs, tensors=to_device(loaded, {**inputs.tensors, **pixels}))
    preprocess = clock() - started
    seconds = {"media": 0.0, "preprocess": preprocess}
    if after is None:
        seconds = {
            "media": media.media_seconds,
            "preprocess": preprocess + media.resize_seconds,
        }
    if media.stream is not None:
        seconds = {name: seconds[name] + streamed.get(name, 0.0) for name in seconds}
    return PreparedQuestion(turns[-1].text, media, inputs, seconds)


def turns_of(question: str, media: PromptMedia, generation: Generation) -> list[Turn]:
    """Return a question about all media as a conversation."""
    if not question.strip():
        raise ModelError("the question is empty", 'write one, such as "what is it?"')
    if fault := check_length(question) or check_length(generation.system, "system prompt"):
        raise ModelError(fault, "make it shorter")
    system = [Turn("system", generation.system)] if generation.system else []
    return [*system, Turn("user", question, len(media.items))]


def encode(loaded: Loaded, media: PromptMedia, question: str, generation: Generation) -> Inputs:
    """Return the model's inputs for one question about the media."""
    return encode_turns(loaded, media, turns_of(question, media, generation))


def encode_turns(loaded: Loaded, media: PromptMedia, turns: Sequence[Turn]) -> Inputs:
    """Return the model's inputs for a conversation about the media.

    Halves of surrogate pairs, which no tokenizer takes, are read as "?".
    """
    turns = [replace(turn, text=turn.text.encode("utf-8", "replace").decode()) for turn in turns]
    inputs = loaded.family.encode(loaded.files, media.items, turns)
    units = encoded_units(loaded, media.items, inputs)
    return replace(inputs, units=units, full_size=media.full_size)


def encoded_units(
    loaded: Loaded, items: Sequence[PreparedMedia], inputs: Inputs
) -> tuple[Units, ...]:
    """Return what the vision tower encodes apart, in the order of the prompt if it is known."""
    together = loaded.family.frames_a_step(loaded.files.config)
    units = [
        Units("video", item.pixels, together)
        if item.source.kind == "video"
        else Units("image", item.pixels, regions=item.regions)
        for item in items
    ]
    left = {kind: [unit for unit in units if unit.modality == kind] for kind in MODALITIES}
    ordered = [left[kind].pop(0) for kind, _ in inputs.media]
    return (*ordered, *left["image"], *left["video"])


# -- how much of the media -------------------------------------------------------------------------


def sampling_of(preset: Preset) -> Sampling:
    """Return how much of the media a preset takes."""
    video = preset.video
    return Sampling(
        frames=video.frames,
        fps=video.fps,
        max_frames=video.max_frames,
        max_tiles=preset.image.max_tiles,
    )


def with_sampling(preset: Preset, sampling: Sampling) -> Preset:
    """Return a preset that says how much of the media was taken under it."""
    return set_sampling(
        preset, sampling.frames, sampling.fps, sampling.max_frames, sampling.max_tiles
    )


# -- batches ---------------------------------------------------------------------------------------


def group_alike(prompts: Sequence[Tensors], size: int) -> list[list[int]]:
    """Return the numbers of prompts that can be one batch, at most `size` in each, in order.

    Videos that a family stacks as (1, frames, 3, h, w) need the same number of frames: a padding
    frame would be encoded. All others are apart from pictures, whose placeholders they may share.
    """
    alike: dict[object, list[int]] = {}
    for number, prompt in enumerate(prompts):
        video = prompt.get(FRAMES)
        shape: object = () if video is None or video.dim() < 5 else tuple(video.shape[1:])
        if "position_ids" in prompt:  # a streamed video, whose features are of one prompt
            shape = number
        alike.setdefault((video is None, shape), []).append(number)
    return [
        numbers[start : start + size]
        for numbers in alike.values()
        for start in range(0, len(numbers), size)
    ]


def batch_on_device(loaded: Loaded, prompts: Sequence[Inputs]) -> dict[str, torch.Tensor]:
    """Return prompts as one batch on the model's device."""
    pad_id = loaded.files.tokenizer.pad_token_id  # of masked columns: any token will do
    tensors = [prompt.tensors for prompt in prompts]
    return to_device(loaded, collate(tensors, pad_id if isinstance(pad_id, int) else 0))


def collate(prompts: Sequence[Tensors], pad_id: int) -> dict[str, torch.Tensor]:
    """Return one batch of prompts of batch 1.

    Token rows are padded on the left to the longest; pixel tensors are joined along their first
    dimension, smaller ones filled up with zeros (tiles that the models cut off by the sizes that
    they are given).
    """
    if len(prompts) == 1:
        return dict(prompts[0])
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt):
        having = [prompt for prompt in prompts if name in prompt]
        parts = [prompt[name] for prompt in having]
        if name in TEXT_INPUTS:
            fill = pad_id if name == "input_ids" else 0
            rows = [pad(part, (longest - part.shape[1], 0), value=fill) for part in parts]
            batch[name] = torch.cat(rows)
        elif name in POOLED:
            pixels = [prompt[POOLED[name]] for prompt in having]
            batch[name] = torch.cat(number_over_batch(parts, pixels))
        else:
            batch[name] = torch.cat(fill_up(parts))
    return batch


def number_over_batch(
    parts: Sequence[torch.Tensor], pixels: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return numbers of patches in each part as numbers among those of all parts; -1 is none.

    Args:
        pixels: (tiles or frames, patches, d) of each part.
    """
    numbered, before = [], 0
    for part, tiles in zip(parts, pixels, strict=True):
        numbered.append(torch.where(part >= 0, part + before, part))
        before += tiles.shape[0] * tiles.shape[1]
    return numbered


def fill_up(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors with zeros behind, so that they agree in all dimensions but the first."""
    sizes = [max(part.shape[dim] for part in parts) for dim in range(1, parts[0].dim())]
    filled = []
    for part in parts:
        missing = [size - have for size, have in zip(sizes, part.shape[1:], strict=True)]
        ends = [end for gap in reversed(missing) for end in (0, gap)]
        filled.append(pad(part, ends) if any(missing) else part)
    return filled
