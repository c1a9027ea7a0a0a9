"""The inputs that a profiled model gets, and where their tokens sit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch

from vtprune.errors import ModelError
from vtprune.evaluation.profiling.shapes import WORD
from vtprune.evaluation.profiling.shown import Shown, make_source
from vtprune.inference.gathering import Gathered, gather_drawn, gather_for
from vtprune.inference.prompts import encode
from vtprune.inference.run import Generation
from vtprune.media import Limits
from vtprune.models.base import Inputs, Sampling
from vtprune.models.batch_layout import lay_out_batch
from vtprune.models.structure import find_structure
from vtprune.models.upstream import quiet
from vtprune.tokens.layout import Layout

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded, Progress
    from vtprune.preset import Preset

SHORT = 0.5  # seconds
PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}


@dataclass(frozen=True, eq=False)
class Case:
    """One input of the profiled model.

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

    gathered: Gathered
    inputs: Inputs
    layout: Layout
    text: int
    media_seconds: float
    preprocess_seconds: float
    media: Shown
    sampling: Sampling
    preset: Preset | None
    larger: Case | None = None
    warnings: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for inputs that cost the same everywhere."""
        pixels = sorted(
            (name, tuple(value.shape))
            for name, value in self.inputs.tensors.items()
            if name.startswith("pixel")
        )
        return (len(self.layout), self.text, bool(self.inputs.whole), *pixels)


def largest_picture(loaded: Loaded) -> Shown:
    """Return the largest picture that the model's family does not make smaller."""
    height, width = loaded.family.largest(loaded.files)
    return Shown("image", width, height)


def make_case(
    loaded: Loaded,
    shown: Shown,
    sampling: Sampling,
    text_tokens: int,
    preset: Preset | None = None,
    limits: Limits | None = None,
    on_progress: Progress | None = None,
    larger: Case | None = None,
) -> Case:
    """Return the inputs that the model really gets, and where their tokens sit.

    Args:
        loaded: structure and preparation files; weights are not needed.
        sampling: how much of the media; a video without a file is looked at whole.
        text_tokens: all tokens that are not visual: question, template and markers.
        preset: that may make media smaller before they are prepared; None: nothing does.
        larger: the same media without that.

    Raises:
        MediaError, ModelError: what can't be read, or is no input of this family.
    """
    if shown.paths:
        gathered = gather_for(
            loaded, shown.paths, sampling, preset, limits or Limits(), on_progress
        )
    else:
        gathered = make_up(loaded, shown, sampling, preset)
    inputs, seconds = timed_encode(loaded, gathered)
    seconds += gathered.resize_seconds
    inputs, text = with_text(loaded, inputs, text_tokens)
    if inputs.whole:  # the text is as long, whatever markers it has
        inputs = replace(inputs, whole=replace(inputs.whole, more_text=0))
    notes = gathered.warnings
    if text > text_tokens:
        notes += (
            f"{text} tokens of text, not {text_tokens}: the input's own markers need as many",
        )
    layout = lay_out_case(loaded, inputs)
    if not len(layout):
        raise ModelError("this input has no visual tokens", "give a larger picture")
    return Case(gathered, inputs, layout, text, gathered.media_seconds, seconds, shown, sampling,
                preset, larger, notes)  # fmt: skip


def smaller_case(loaded: Loaded, case: Case, share: float) -> Case:
    """Return a case with about that share of the pixels."""
    frames = sum(len(item.index) for item in case.gathered.items if item.timestamps)
    media = replace(case.media, paths=(), frames=frames or 1).smaller(share)
    return make_case(loaded, media, case.sampling, case.text, case.preset)


def timed_encode(loaded: Loaded, gathered: Gathered) -> tuple[Inputs, float]:
    """Return the inputs, and the seconds that a second call takes, since the first is slower."""
    for _ in range(2):
        started = time.perf_counter()
        inputs = encode(loaded, gathered, WORD, Generation())
        seconds = time.perf_counter() - started
        if seconds > SHORT:
            break
    return inputs, seconds


def make_up(loaded: Loaded, shown: Shown, sampling: Sampling, preset: Preset | None) -> Gathered:
    """Return random pixels, resized in the family's way."""
    if shown.kind == "video":
        sampling = replace(sampling, frames=shown.frames, fps=None, max_frames=None)
    generator = torch.Generator().manual_seed(0)

    def draw(index: Sequence[int]) -> torch.Tensor:
        size = (len(index), 3, shown.height, shown.width)
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)

    return gather_drawn(loaded, make_source(shown), draw, sampling, preset)


def with_text(loaded: Loaded, inputs: Inputs, wanted: int) -> tuple[Inputs, int]:
    """Return inputs with `wanted` tokens that are not visual, or as few more as their markers need.

    Words are left out, or added at the end. Between two blocks of visual tokens one token stays,
    and one after the last.
    """
    ids = inputs.tensors["input_ids"]
    tokens = loaded.family.placeholders(loaded.files.config)
    visual = torch.isin(ids[0], torch.tensor([number for ids in tokens.values() for number in ids]))
    word = cast(int, loaded.files.tokenizer.convert_tokens_to_ids(WORD))
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
    more = max(0, -surplus)
    tensors = {}
    for name, value in inputs.tensors.items():
        if value.shape == ids.shape:
            value = value[:, columns]
            value = torch.cat([value, value[:, -1:].expand(-1, more)], dim=1)
        tensors[name] = value
    if more:
        tensors["input_ids"][:, -more:] = word
    return replace(inputs, tensors=tensors), wanted + max(0, surplus)


def text_runs(visual: torch.Tensor) -> list[torch.Tensor]:
    """Return the columns of every unbroken run of text, (n,) int64 each."""
    columns = (~visual).nonzero().squeeze(1)
    if not len(columns):
        return []
    breaks = (columns.diff() > 1).nonzero().squeeze(1) + 1
    return list(columns.tensor_split(breaks))


def lay_out_case(loaded: Loaded, inputs: Inputs) -> Layout:
    """Return the layout of a prompt's visual tokens, as pruning will find it."""
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


def describe_case(case: Case) -> dict[str, object]:
    """Return the report's `input`."""
    from vtprune.inference.figures import describe_input

    described = describe_input(case.gathered.read, case.gathered.decoders, case.inputs).to_dict()
    return {**described, "visual_tokens": len(case.layout), "text_tokens": case.text}
