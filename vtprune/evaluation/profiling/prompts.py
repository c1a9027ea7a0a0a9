"""The inputs of a profile: media of a size or from files, prepared, and their token layout."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vtprune.errors import MediaError, ModelError, brief
from vtprune.evaluation.profiling.shapes import WORD
from vtprune.inference.generate import Generation
from vtprune.inference.measuring import describe_input
from vtprune.inference.prepare import encode
from vtprune.inference.prompt_media import PromptMedia, read_media, resize_drawn
from vtprune.media import Limits, Source, open_sources
from vtprune.models.base import Inputs, Sampling
from vtprune.models.batch_layout import lay_out_batch
from vtprune.models.structure import find_structure
from vtprune.models.transformers_messages import quiet
from vtprune.tokens.layout import Layout

if TYPE_CHECKING:
    from vtprune.inference.report import InputInfo
    from vtprune.models.loading import Loaded, Progress
    from vtprune.preset import Preset

FPS = 2.0  # of a video without a file
LONGEST = 65536  # pixels along a side, and frames
SHORT = 0.5  # seconds of preparing, below which it is timed again
PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}


@dataclass(frozen=True)
class ProfiledMedia:
    """A picture or video of a given size, or media files.

    Args:
        kind: "image" or "video".
        width, height: in pixels.
        frames: of the video, all of which are sampled.
        paths: media files; where there are any, their own size counts.
    """

    kind: str = "image"
    width: int = 0
    height: int = 0
    frames: int = 1
    paths: tuple[str, ...] = ()

    def smaller(self, share: float) -> ProfiledMedia:
        """Return about that share of the pixels: fewer frames, or a smaller picture."""
        if self.kind == "video" and self.frames > 2:
            return replace(self, frames=max(2, int(self.frames * share) // 2 * 2))
        width, height = (max(1, int(side * share**0.5)) for side in (self.width, self.height))
        return replace(self, width=width, height=height)


def parse_size(text: str, kind: str) -> ProfiledMedia | None:
    """Return a picture "1344x1344", width first, or a video "64x448x448", frames first.

    Args:
        kind: "image" or "video".

    Returns:
        None where the text is no size.

    Raises:
        MediaError: a size that no picture or video has.
    """
    count = 3 if kind == "video" else 2
    if not re.fullmatch("[xX]".join([r"\d+"] * count), text.strip(), re.ASCII):
        return None
    parts = [part.lstrip("0") or "0" for part in text.strip().lower().split("x")]
    for part in parts:
        if len(part) > len(str(LONGEST)) or not 1 <= int(part) <= LONGEST:
            raise MediaError(
                f"{kind} {brief(text)} is out of range: a side, or the frames, are 1 to {LONGEST}",
                "for example --image 1344x1344, or --video 64x448x448",
            )
    frames, width, height = [1, *map(int, parts)][-3:]
    return ProfiledMedia(kind, width, height, frames)


def open_media(paths: Sequence[str], limits: Limits) -> ProfiledMedia:
    """Check media files before anything expensive is done."""
    sources = open_sources(list(paths), limits)
    kind = "video" if any(source.kind == "video" for source in sources) else "image"
    first = sources[0]
    return ProfiledMedia(kind, first.width, first.height, first.num_frames, tuple(paths))


def largest_picture(loaded: Loaded) -> ProfiledMedia:
    """Return the largest picture that the model's family does not make smaller."""
    height, width = loaded.family.largest(loaded.files)
    return ProfiledMedia("image", width, height)


def make_source(media: ProfiledMedia) -> Source:
    """Return a source without a file."""
    video = media.kind == "video"
    parts = [media.frames] * video + [media.width, media.height]
    return Source(
        path=Path("x".join(map(str, parts))),
        kind=media.kind,
        width=media.width,
        height=media.height,
        num_frames=media.frames,
        timestamps=tuple(number / FPS for number in range(media.frames)) if video else (),
        fps=FPS if video else 0.0,
        duration=media.frames / FPS if video else 0.0,
        decoder="none",
        warnings=(),
    )


@dataclass(frozen=True, eq=False)
class ProfiledPrompt:
    """One prepared input of the model.

    Args:
        gathered: the media, resized.
        inputs: the model's own, on the CPU.
        layout: where the visual tokens sit.
        text: tokens that are not visual.
        media_seconds: reading files took; 0 without.
        preprocess_seconds: resizing and laying out took.
        media, sampling, preset: what it was made of.
        larger: the same media before the preset made them smaller; None where it did not.
        warnings: what the user should know about it.
    """

    gathered: PromptMedia
    inputs: Inputs
    layout: Layout
    text: int
    media_seconds: float
    preprocess_seconds: float
    media: ProfiledMedia
    sampling: Sampling
    preset: Preset | None
    larger: ProfiledPrompt | None = None
    warnings: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """A key that is equal for inputs that cost the same everywhere."""
        pixels = sorted(
            (name, tuple(value.shape))
            for name, value in self.inputs.tensors.items()
            if name.startswith("pixel")
        )
        return (len(self.layout), self.text, bool(self.inputs.full_size), *pixels)

    @property
    def frames(self) -> int:
        """Frames that were sampled of videos."""
        return sum(len(item.index) for item in self.gathered.items if item.timestamps)

    def describe(self) -> InputInfo:
        """Return the report's `input`."""
        return describe_input(self.gathered.read, self.gathered.decoders, self.inputs)


class ProfiledPrompts:
    """The inputs of a profile: one for every way in which its presets sample the media.

    Args:
        media: that all are made of.
        sampling: how much of it, before what a preset or the family says.
        text_tokens: all tokens that are not visual.
        limits: of what is read.
        distinct: the first is that of the rows without a preset.
    """

    def __init__(
        self,
        loaded: Loaded,
        media: ProfiledMedia,
        sampling: Sampling,
        text_tokens: int,
        limits: Limits,
        on_progress: Progress | None = None,
    ) -> None:
        self.loaded, self.media, self.sampling = loaded, media, sampling
        self.text_tokens, self.limits, self.on_progress = text_tokens, limits, on_progress
        self.distinct: list[ProfiledPrompt] = []
        self.known: dict[object, ProfiledPrompt] = {}
        self.find(Sampling())

    def find(
        self,
        sampling: Sampling,
        preset: Preset | None = None,
        larger: ProfiledPrompt | None = None,
    ) -> ProfiledPrompt:
        """Return the input for a sampling; one for all that cost the same.

        Args:
            sampling: of a preset, which the profile's own goes before.
            preset: that makes it smaller; None: nothing does.
            larger: as it was before that.
        """
        if self.sampling.frames is not None:
            frames = self.sampling.frames
            sampling = replace(sampling, frames=frames, fps=None, max_frames=None)
        if self.sampling.max_tiles is not None:
            sampling = replace(sampling, max_tiles=self.sampling.max_tiles)
        key = (sampling, preset)
        if key not in self.known:
            prompt = make_prompt(self.loaded, self.media, sampling, self.text_tokens, preset,
                              self.limits, self.on_progress, larger)  # fmt: skip
            same = next((one for one in self.distinct if one.key == prompt.key), None)
            if same is None:
                self.distinct.append(prompt)
            self.known[key] = same or prompt
        return self.known[key]

    @property
    def warnings(self) -> list[str]:
        return [warning for one in self.distinct for warning in one.warnings]


def make_prompt(
    loaded: Loaded,
    media: ProfiledMedia,
    sampling: Sampling,
    text_tokens: int,
    preset: Preset | None = None,
    limits: Limits | None = None,
    on_progress: Progress | None = None,
    larger: ProfiledPrompt | None = None,
) -> ProfiledPrompt:
    """Return the input that the model really gets, and where its tokens sit.

    Args:
        loaded: structure and preparation files; weights are not needed.
        sampling: how much of the media; of a video without a file all frames are sampled.
        text_tokens: all tokens that are not visual: question, template and markers.
        preset: that may make media smaller before they are prepared; None: nothing does.
        larger: the same media without that.

    Raises:
        MediaError, ModelError: what can't be read, or is no input of this family.
    """
    if media.paths:
        gathered = read_media(
            loaded, media.paths, sampling, preset, limits or Limits(), on_progress
        )
    else:
        gathered = draw_media(loaded, media, sampling, preset)
    inputs, seconds = timed_encode(loaded, gathered)
    inputs, text = with_text(loaded, inputs, text_tokens)
    if inputs.full_size:  # the text is as long, whatever markers it has
        inputs = replace(inputs, full_size=replace(inputs.full_size, more_text=0))
    warnings = gathered.warnings
    if text > text_tokens:
        warnings += (
            f"the prompt has {text} tokens of text, not {text_tokens}: its visual tokens' own "
            "markers need as many",
        )
    layout = lay_out(loaded, inputs)
    if not len(layout):
        raise ModelError("this input has no visual tokens", "give a larger picture")
    return ProfiledPrompt(
        gathered,
        inputs,
        layout,
        text,
        gathered.media_seconds,
        gathered.resize_seconds + seconds,
        media,
        sampling,
        preset,
        larger,
        warnings,
    )


def smaller_prompt(loaded: Loaded, prompt: ProfiledPrompt, share: float) -> ProfiledPrompt:
    """Return an input with about that share of the pixels."""
    media = replace(prompt.media, paths=(), frames=prompt.frames or 1).smaller(share)
    return make_prompt(loaded, media, prompt.sampling, prompt.text, prompt.preset)


def timed_encode(loaded: Loaded, gathered: PromptMedia) -> tuple[Inputs, float]:
    """Return the inputs, and the seconds of a second call where that is short."""
    for _ in range(2):
        started = time.perf_counter()
        inputs = encode(loaded, gathered, WORD, Generation())
        seconds = time.perf_counter() - started
        if seconds > SHORT:
            break
    return inputs, seconds


def draw_media(
    loaded: Loaded, media: ProfiledMedia, sampling: Sampling, preset: Preset | None
) -> PromptMedia:
    """Return random pixels, resized in the family's way."""
    if media.kind == "video":
        sampling = replace(sampling, frames=media.frames, fps=None, max_frames=None)
    generator = torch.Generator().manual_seed(0)

    def draw(index: Sequence[int]) -> torch.Tensor:
        size = (len(index), 3, media.height, media.width)
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)

    return resize_drawn(loaded, make_source(media), draw, sampling, preset)


def with_text(loaded: Loaded, inputs: Inputs, wanted: int) -> tuple[Inputs, int]:
    """Return inputs with `wanted` tokens that are not visual, or as few more as markers need.

    Words are left out, or added at the end. Between two blocks of visual tokens one token stays,
    and one after the last.
    """
    ids = inputs.tensors["input_ids"]
    tokens = loaded.family.placeholders(loaded.files.config)
    visual = torch.isin(ids[0], torch.tensor([number for ids in tokens.values() for number in ids]))
    tokenizer = loaded.files.tokenizer
    word = tokenizer(WORD, add_special_tokens=False)["input_ids"][-1]  # it may be several
    keep = visual.clone()
    surplus = int((~visual).sum()) - wanted
    for run in text_runs(visual):
        words = run[ids[0, run] == word]
        least = 0 if run[0] == 0 or len(words) < len(run) else 1
        drop = words[: max(0, min(surplus, len(words) - least))]
        surplus -= len(drop)
        keep[run] = True
        keep[drop] = False
    columns = keep.nonzero().squeeze(1)
    missing = max(0, -surplus)
    tensors = {}
    for name, value in inputs.tensors.items():
        if value.shape == ids.shape:
            value = value[:, columns]
            value = torch.cat([value, value[:, -1:].expand(-1, missing)], dim=1)
        tensors[name] = value
    if missing:
        tensors["input_ids"][:, -missing:] = word
    return replace(inputs, tensors=tensors), wanted + max(0, surplus)


def text_runs(visual: torch.Tensor) -> list[torch.Tensor]:
    """Return the columns of every unbroken run of text, (n,) int64 each."""
    columns = (~visual).nonzero().squeeze(1)
    if not len(columns):
        return []
    breaks = (columns.diff() > 1).nonzero().squeeze(1) + 1
    return list(columns.tensor_split(breaks))


def lay_out(loaded: Loaded, inputs: Inputs) -> Layout:
    """Return where the visual tokens of a prompt sit, as pruning will find them."""
    ids = inputs.tensors["input_ids"]
    vision = {
        kind: dict(inputs.tensors)
        for kind, names in PIXELS.items()
        if any(name in inputs.tensors for name in names)
    }
    with quiet():
        structure = find_structure(loaded.model)
    valid = torch.ones_like(ids, dtype=torch.bool)
    layouts, _ = lay_out_batch(structure, ids, valid, vision, None, inputs.media)
    return layouts[0]
