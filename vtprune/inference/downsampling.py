"""Smaller pictures and fewer frames for a budget of visual tokens: how each file is viewed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from vtprune.errors import ModelError, PresetError
from vtprune.models.base import Inputs, Preparable, PreparedMedia, ReadPlan, Sampling, Turn
from vtprune.models.preprocess import resize
from vtprune.pruners.downsample import Downsample
from vtprune.tokens.layout import MODALITIES
from vtprune.tokens.schedule import fixed_count, lowest_keep
from vtprune.tokens.units import FullSizeCounts

if TYPE_CHECKING:
    from vtprune.media import Source
    from vtprune.preset import Preset

BICUBIC = 3
SMALLEST = 28
"""Pixels of a picture's shorter side that it is not made smaller than."""


@dataclass(frozen=True)
class MediaView:
    """How one file is viewed.

    Args:
        source: the file.
        sampling: how much of it.
        size: (height, width) that a picture is resized to before the family's own resizing; None
            for its own.
    """

    source: Source
    sampling: Sampling
    size: tuple[int, int] | None = None

    @property
    def resized_source(self) -> Source:
        """Return the file with the size that its pictures are resized to."""
        if self.size is None:
            return self.source
        return replace(self.source, height=self.size[0], width=self.size[1])

    def plan(self, model: Preparable, num_alike: int) -> ReadPlan:
        """Return what to read of the file, and how to resize it.

        Args:
            num_alike: files of its kind in the prompt.
        """
        plan = self.plan_resized(model, num_alike)
        if self.size is None:
            return plan
        shrink = functools.partial(_shrink_first, size=self.size, transform=plan.transform)
        return replace(plan, transform=shrink)

    def plan_resized(self, model: Preparable, num_alike: int) -> ReadPlan:
        """Return the same for pictures that are of the size `size` already."""
        return model.family.plan(model.files, self.resized_source, self.sampling, num_alike)


@dataclass(frozen=True)
class SmallerMedia:
    """How the files of one prompt are viewed under a budget.

    Args:
        views: one a file.
        full_size: what the prompt would hold if they were viewed in full.
    """

    views: tuple[MediaView, ...]
    full_size: FullSizeCounts


def shrink_media(
    model: Preparable, sources: Sequence[Source], sampling: Sampling, preset: Preset
) -> SmallerMedia | None:
    """Return the largest views of the files within the preset's budgets for downsampling.

    All pictures of a budget are scaled alike, or have their tiles lowered alike, whichever leaves
    more tokens; all videos give the same share of their frames. Nothing is decoded: prompts with
    blank pictures are counted.

    Returns:
        None where the preset downsamples nothing.

    Raises:
        PresetError: a budget that no setting meets; the message says what can be reached.
        ModelError: pictures of which this family always makes the same number of tokens.
    """
    if not any(preset.downsampling_stage(modality) for modality in MODALITIES):
        return None
    views = [MediaView(source, sampling) for source in sources]
    full = left = count(model, views)
    kinds, visual = [source.kind for source in sources], sum(full.visual.values())
    for modality, keep in budgets_of(preset, kinds, visual).items():
        shrinkable = [i for i, source in enumerate(sources) if modality in ("all", source.kind)]
        views, left = _largest(model, views, left, shrinkable, modality, keep)
    return SmallerMedia(tuple(views), FullSizeCounts(full.visual, full.text - left.text))


def budgets_of(preset: Preset, kinds: Sequence[str], visual: int) -> dict[str, float]:
    """Return modality (or "all" together) -> the fraction of tokens that downsampling may leave.

    Args:
        visual: visual tokens of the prompt at full size, of all modalities.
    """
    budgets: dict[str, float] = {}
    for modality in MODALITIES:
        stage = preset.downsampling_stage(modality) if modality in kinds else None
        if stage is None:
            continue
        keep = stage.keep
        if keep is None:
            keep = preset.keep_before_tower(modality, visual)
        if keep is None:
            raise PresetError(
                f"{preset.label}: the stage at {stage.at} ({stage.method}) has no keep, and "
                "no keep was given",
                "give --keep 0.3, keep: 0.3 in the preset, or a keep to the stage",
            )
        budgets["all" if preset.shares_one_budget() else modality] = keep
    return budgets


@dataclass(frozen=True)
class Count:
    """Tokens of one prompt.

    Args:
        visual: modality -> visual tokens.
        text: the others, for a question of one word.
        parts: of each file the frames, or the tiles with the base picture.
    """

    visual: Mapping[str, int]
    text: int
    parts: tuple[int, ...]

    def total(self, modality: str) -> int:
        return sum(self.visual.values()) if modality == "all" else self.visual.get(modality, 0)


def count(model: Preparable, views: Sequence[MediaView]) -> Count:
    """Count the tokens of a prompt about files viewed in this way, without reading them."""
    kinds = [view.source.kind for view in views]
    blank = [
        _blank(view, view.plan_resized(model, kinds.count(view.source.kind))) for view in views
    ]
    turns = [Turn("user", "what?", len(views))]
    inputs = model.family.encode(model.files, blank, turns)
    visual = count_visual(model, inputs, kinds)
    text = inputs.tensors["input_ids"].numel() - sum(visual.values())
    tiles = iter(inputs.tiles)
    return Count(
        visual,
        text,
        tuple(len(item.index) if item.source.kind == "video" else next(tiles) for item in blank),
    )


def count_visual(model: Preparable, inputs: Inputs, kinds: Sequence[str]) -> dict[str, int]:
    """Return modality -> visual tokens of a prompt with files of these kinds."""
    present = [name for name in MODALITIES if name in kinds]
    if inputs.media:  # placeholders that both share
        grids = [(kind, len(grid)) for kind, grid in inputs.media]
        return {name: sum(size for kind, size in grids if kind == name) for name in present}
    ids = model.family.placeholders(model.files.config)
    row = inputs.tensors["input_ids"]
    return {name: int(torch.isin(row, torch.tensor(ids[name])).sum()) for name in present}


@dataclass(frozen=True)
class _Search:
    """The settings of some of a prompt's files, from a lowest one to `top`, at which they are full.

    Args:
        views: of all files, those of `shrinkable` in full.
        full: the tokens of them.
        shrinkable: the files that are to be viewed less.
        modality: of the tokens that are counted: "image", "video" or "all".
        knob: of pictures, "tiles" or "size"; videos have their frames.
    """

    model: Preparable
    views: Sequence[MediaView]
    full: Count
    shrinkable: Sequence[int]
    modality: str
    knob: str

    @property
    def top(self) -> int:
        return max(self.steps(i) for i in self.shrinkable)

    def steps(self, number: int) -> int:
        """Return the number of settings that one file has."""
        source = self.views[number].source
        if source.kind == "video":
            return self.full.parts[number]
        if self.knob == "tiles":
            return self.full.parts[number] - 1
        return max(source.height, source.width)

    def at(self, setting: int) -> list[MediaView]:
        """Return how all files are viewed at a setting."""
        views = list(self.views)
        for number in self.shrinkable if setting < self.top else ():
            steps = self.steps(number) * setting // self.top
            views[number] = self.lowered(views[number], steps)
        return views

    def lowered(self, view: MediaView, steps: int) -> MediaView:
        source = view.source
        if source.kind == "video":
            return replace(view, sampling=replace(view.sampling, max_frames=max(1, steps)))
        if self.knob == "tiles":
            return replace(view, sampling=replace(view.sampling, max_tiles=steps))
        short, long = sorted((source.height, source.width))
        scale = max(steps / long, min(SMALLEST / short, 1.0))
        return replace(view, size=(max(1, round(source.height * scale)),
                                   max(1, round(source.width * scale))))  # fmt: skip

    def count(self, setting: int) -> Count:
        return count(self.model, self.at(setting)) if setting < self.top else self.full

    def lowest(self) -> int:
        """Return the lowest setting that the family takes."""
        if self.knob != "tiles":
            return 1
        for setting in range(self.top):
            try:
                self.count(setting)
            except ModelError:
                continue
            return setting
        return self.top


def _largest(
    model: Preparable,
    views: Sequence[MediaView],
    full: Count,
    shrinkable: Sequence[int],
    modality: str,
    keep: float,
) -> tuple[list[MediaView], Count]:
    """Return the views with the most tokens within the budget; those at `shrinkable` are smaller.

    Args:
        full: the tokens of `views`.
        modality, keep: what of it the budget is, and the fraction that may be left.
    """
    total = full.total(modality)
    most, least = fixed_count(keep, total), total
    candidates: list[tuple[list[MediaView], Count]] = []
    pictures = any(views[i].source.kind == "image" for i in shrinkable)
    for knob in ("tiles", "size") if pictures else ("frames",):
        search = _Search(model, views, full, shrinkable, modality, knob)
        counted = functools.cache(search.count)

        def tokens(setting: int, counted: Callable[[int], Count] = counted) -> int:
            return counted(setting).total(modality)

        lowest = search.lowest()
        least = min(least, tokens(lowest))
        setting = Downsample().choose(tokens, lowest, search.top, most)
        if setting is not None:
            candidates.append((search.at(setting), counted(setting)))
    if candidates:
        return max(candidates, key=lambda candidate: candidate[1].total(modality))
    if pictures and least == total:
        raise ModelError(
            f"downsample: {model.family.name} makes the same {total} tokens of what is given, "
            "however small it is",
            "use another method: --method uniform",
        )
    raise PresetError(
        f"keep {keep:g} can't be reached by downsample: of {total} tokens, {least} are left at the "
        f"least; the lowest reachable keep is {lowest_keep(least, total)}",
        "raise keep, or use another method: --method uniform",
    )


def _blank(view: MediaView, plan: ReadPlan) -> PreparedMedia:
    """Return one file as if its pictures were all black; frames share their memory."""
    height, width = view.resized_source.height, view.resized_source.width
    pixels = plan.transform(torch.zeros(1, 3, height, width, dtype=torch.uint8))
    num_frames = len(plan.index)
    if num_frames > 1:
        pixels = pixels.expand(num_frames, *pixels.shape[1:])
    times = tuple(view.source.timestamps[i] for i in plan.index) if view.source.timestamps else ()
    return PreparedMedia(view.resized_source, pixels, plan.index, times)


def _shrink_first(
    pixels: torch.Tensor,
    size: tuple[int, int],
    transform: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    return transform(resize(pixels, size, BICUBIC))
