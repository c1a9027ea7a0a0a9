"""Which frames and tiles of a batch the vision tower gets, and whose tokens go with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vtprune.engine.inputs import PixelView
from vtprune.engine.plan import Group, Plan
from vtprune.errors import ModelError, PresetError
from vtprune.preset import Preset
from vtprune.tokens.layout import MODALITIES, Layout
from vtprune.tokens.units import Units


@dataclass(frozen=True, eq=False)
class Thinning:
    """What stays of a batch of prompts at `pixels`.

    Args:
        layouts: of every sample, before anything went.
        units: the media items of every sample.
        kept: the units of each that stay, ascending.
        gone: for every sample the columns of the tokens of those that go.
    """

    layouts: list[Layout]
    units: Sequence[Sequence[Units]]
    kept: list[list[list[int]]]
    gone: list[torch.Tensor]

    def rows(self, modality: str | None) -> torch.Tensor:
        """(U,) bool: which rows one call of an encoder is to get, of those of the whole batch.

        Args:
            modality: that the encoder takes; None for both.

        Raises:
            ModelError: there are none.
        """
        found = [
            one.rows_kept(kept)
            for row, left in zip(self.units, self.kept, strict=True)
            for one, kept in zip(row, left, strict=True)
            if modality in (None, one.modality)
        ]
        if not found:
            raise other_media()
        return torch.cat(found)

    def encoded(self) -> list[dict[str, list[int]]]:
        """For every sample, modality -> rows that the tower gets of each of its items."""
        found = []
        for row, left in zip(self.units, self.kept, strict=True):
            counts: dict[str, list[int]] = {name: [] for name in MODALITIES}
            for one, kept in zip(row, left, strict=True):
                counts[one.modality].append(int(one.rows_kept(kept).sum()))
            found.append(counts)
        return found

    def gone_of(self, layouts: list[Layout]) -> list[torch.Tensor]:
        """`gone` of the prompts that came, which must be those that were shown.

        Raises:
            ModelError: they are others, or repeated as for beams.
        """
        pairs = zip(layouts, self.layouts, strict=False)
        same = all(torch.equal(one.columns, other.columns) for one, other in pairs)
        if len(layouts) != len(self.layouts) or not same:
            raise other_media()
        return self.gone


def refuse_pixels(preset: Preset, pixels: PixelView | None) -> None:
    """Refuses a stage before the vision tower where there are no pixels to compare.

    Raises:
        PresetError: with the way out.
    """
    stages = [stage for name in MODALITIES if (stage := preset.downsampling_stage(name))]
    if stages and (pixels is None or not pixels.whole):
        raise PresetError(
            f"at: pixels: {stages[0].method} makes smaller pictures or takes fewer frames, and "
            "prepared inputs hold them as they are",
            "give the media: vtprune.answer(model, [(file, question)], ...) or vtprune ask; or "
            "cut at the input",
        )
    stage = preset.frame_and_tile_stage()
    if stage is not None and pixels is None:
        raise PresetError(
            f"at: pixels: {stage.method} compares the pixels of the media, and prepared inputs "
            "hold them normalised and cut up",
            "give the media: vtprune.answer(model, [(file, question)], ...) or vtprune ask; or "
            "cut at the input",
        )


def choose_units(plan: Plan, layouts: list[Layout], units: Sequence[Sequence[Units]]) -> Thinning:
    """The units that the preset's stages at `pixels` keep of a batch.

    Args:
        layouts: of every sample.
        units: the media items of every sample.

    Raises:
        ModelError: the media are not those of the prompts.
        PresetError: a budget that dropping whole units can't meet.
    """
    if len(layouts) != len(units):
        raise other_media()
    kept = [[list(range(len(one))) for one in row] for row in units]
    groups = [group for group in plan.groups_for(layouts) if group.at_pixels is not None]
    gone = []
    for sample, (layout, row) in enumerate(zip(layouts, units, strict=True)):
        tokens = unit_tokens(layout, row)
        for group in groups:
            mine = [item for item, one in enumerate(row) if group.modality in ("all", one.modality)]
            sizes = [[len(index) for index in tokens[item]] for item in mine]
            size = len(layout.of_modality(group.modality))
            left = _choose(plan, group, [row[item] for item in mine], sizes, size)
            for item, numbers in zip(mine, left, strict=True):
                kept[sample][item] = numbers
        index = [
            index
            for numbers, own in zip(kept[sample], tokens, strict=True)
            for number, index in enumerate(own)
            if number not in numbers
        ]
        none = torch.zeros(0, dtype=torch.long)
        gone.append(layout.columns[torch.cat([none, *index]).sort().values])
    return Thinning(layouts, units, kept, gone)


def _choose(
    plan: Plan, group: Group, media: list[Units], sizes: list[list[int]], size: int
) -> list[list[int]]:
    """The units that one stage keeps of one sample's items of its modality.

    Args:
        sizes: tokens of every unit of each.
        size: tokens of all.
    """
    assert group.at_pixels is not None
    method = group.at_pixels
    if any(one.in_one_piece for one in media):
        plan.trace.warn(
            "a picture is in tiles that this model can't do without one by one (they overlap, or "
            "their tokens are interpolated): all of them are encoded"
        )
    kept = [method.keep(one) for one in media]
    most = group.most_at_pixels(size)
    if most is None:
        return kept
    total = _count(kept, sizes)
    if total < most and group.stages[0].keep is None:
        plan.trace.warn(
            f"keep {group.keep:g} asks for more than the {total} of {size} tokens of the frames "
            "and tiles that are not predictable within the tolerance"
        )
    if total > most:
        kept = method.shrink(media, kept, sizes, most)
        total = _count(kept, sizes)
    if total > most:
        _say_unreachable(plan, group, total, size)
    return kept


def _say_unreachable(plan: Plan, group: Group, total: int, size: int) -> None:
    """An error for a free stage, else a warning."""
    stage = group.stages[0]
    keep = group.keep if stage.keep is None else stage.keep
    message = (
        f"keep {keep:g} can't be reached at pixels: the first frame of a video and the base "
        f"picture always stay, {total} of {size} tokens"
    )
    if stage.keep is None:
        raise PresetError(message, "raise keep, or cut at the input: --method uniform --at input")
    plan.trace.warn(message)


def _count(kept: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]) -> int:
    pairs = zip(kept, sizes, strict=True)
    return sum(own[number] for numbers, own in pairs for number in numbers)


def unit_tokens(layout: Layout, units: Sequence[Units]) -> list[list[torch.Tensor]]:
    """For every item and unit of one sample, the index of its tokens in the layout.

    Raises:
        ModelError: the items are not those of the layout.
    """
    media = {name: layout.media[layout.of_modality(name)].unique().tolist() for name in MODALITIES}
    items = {name: sum(one.modality == name for one in units) for name in MODALITIES}
    found = []
    for one in units:
        left, parts = media[one.modality], 1
        if one.in_one_piece and len(left) > items[one.modality]:
            parts = one.rows  # its crops are media of their own (Gemma 3)
        mine = torch.isin(layout.media, torch.tensor(left[:parts], dtype=torch.long))
        media[one.modality] = left[parts:]
        items[one.modality] -= 1
        if len(one) == 1:
            found.append([mine.nonzero().squeeze(1)])
            continue
        tokens = []
        for number in range(len(one)):
            frame, tile = one.place(number)
            here = mine & (layout.grid.frame == frame) & (layout.grid.tile == tile)
            tokens.append(here.nonzero().squeeze(1))
        if one.modality == "video" and not all(map(len, tokens)):  # a tile may be all padding
            raise other_media()
        found.append(tokens)
    if sum(len(index) for own in found for index in own) != len(layout):
        raise other_media()
    return found


def other_media() -> ModelError:
    """What is said where prompts and media are not each other's."""
    return ModelError(
        "the visual tokens of this forward are not those of the media that it was to show",
        "give the media of exactly these prompts, one batch in each block",
    )
