"""What stages at `pixels` keep, and a vision tower that gets only those frames and tiles."""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vtprune.device import send
from vtprune.engine.hooks import Hooks
from vtprune.engine.plan import PruningPlan, StageGroup
from vtprune.errors import ModelError, PresetError
from vtprune.models.adapters import running_module
from vtprune.models.seams import unknown
from vtprune.preset import StageSpec
from vtprune.pruners import METHODS
from vtprune.pruners.base import PatchPruner, UnitPruner
from vtprune.tokens.layout import MODALITIES, PATCH, Layout
from vtprune.tokens.schedule import fixed_count
from vtprune.tokens.units import Units

Kwargs = dict[str, object]
TOWERS = ("vision_tower", "image_tower", "video_tower", "vision_model", "visual")
EMBEDDER = "embed_vision"
"""What a model without a tower embeds patches by (Gemma 4 Unified)."""
PROJECTORS = ("multi_modal_projector", "connector")
FULL = ("pooler_output", "deepstack_features")
"""What is read of the output of a tower that takes grids: one row a token."""
STATES = ("last_hidden_state",)
"""What is read of one that has none of these."""


@dataclass(frozen=True, eq=False)
class PixelSelection:
    """What stages at `pixels` keep of a batch of prompts.

    Args:
        layouts: of every sample, before anything was dropped.
        rows: for every sample the modality of each media item, and which of its rows the tower
            gets, (R,) bool.
        dropped: for every sample the columns of the tokens that go with the other rows.
    """

    layouts: list[Layout]
    rows: list[list[tuple[str, torch.Tensor]]]
    dropped: list[torch.Tensor]

    def rows_of(self, modality: str | None, sample: int | None = None) -> torch.Tensor:
        """Return which rows one call of an encoder gets, of those of the whole batch: (U,) bool.

        Args:
            modality: that the encoder takes; None for both.
            sample: whose rows alone; None: of the whole batch.

        Raises:
            ModelError: there are none.
        """
        samples = self.rows if sample is None else [self.rows[sample]]
        rows = [kept for items in samples for name, kept in items if modality in (None, name)]
        if not rows:
            raise other_media()
        return torch.cat(rows)

    def encoded(self) -> list[dict[str, list[int]]]:
        """Return for every sample, by modality, how many rows of each item the tower gets."""
        return [
            {name: [int(kept.sum()) for of, kept in items if of == name] for name in MODALITIES}
            for items in self.rows
        ]

    def dropped_from(self, layouts: list[Layout]) -> list[torch.Tensor]:
        """Return `dropped`, of prompts that have to be those that it was worked out for.

        Raises:
            ModelError: they are others, or repeated as for beams.
        """
        pairs = zip(layouts, self.layouts, strict=False)
        same = all(torch.equal(given.columns, known.columns) for given, known in pairs)
        if len(layouts) != len(self.layouts) or not same:
            raise other_media()
        return self.dropped


def select_pixels(
    plan: PruningPlan, layouts: list[Layout], media: Sequence[Sequence[Units]]
) -> PixelSelection:
    """Return what the preset's stages at `pixels` keep of a batch.

    Args:
        layouts: of every sample.
        media: the items of every sample.

    Raises:
        ModelError: the media are not those of the prompts.
        PresetError: a budget that dropping whole frames and tiles can't meet.
    """
    if len(layouts) != len(media):
        raise other_media()
    groups = [group for group in plan.groups_for(layouts) if group.at_pixels is not None]
    rows, dropped = [], []
    for layout, items in zip(layouts, media, strict=True):
        tokens = unit_tokens(layout, items)
        kept = [[torch.ones(len(index), dtype=torch.bool) for index in units] for units in tokens]
        encoded = [list(range(len(item))) for item in items]
        for group in groups:
            among = [n for n, item in enumerate(items) if group.modality in ("all", item.modality)]
            of_group = PromptUnits([items[n] for n in among], [tokens[n] for n in among], layout)
            total = len(layout.of_modality(group.modality))
            keep = plan.keep_at_pixels(group, len(layout))
            if METHODS[group.stages[0].spec.method].patches:
                masks = _choose_patches(plan, group, of_group, total, keep)
                for n, units in zip(among, masks, strict=True):
                    kept[n] = units
                    encoded[n] = [u for u, mask in enumerate(units) if mask.any() or not len(mask)]
                continue
            chosen = _choose_units(plan, group, of_group.items, of_group.sizes, total, keep)
            for n, numbers in zip(among, chosen, strict=True):
                encoded[n] = numbers
                for unit in {*range(len(items[n]))} - {*numbers}:
                    kept[n][unit][:] = False
        pairs = zip(items, encoded, strict=True)
        rows.append([(item.modality, item.rows_kept(units)) for item, units in pairs])
        left_out = [
            index[~mask]
            for of_item, masks in zip(tokens, kept, strict=True)
            for index, mask in zip(of_item, masks, strict=True)
        ]
        index = torch.cat([torch.zeros(0, dtype=torch.long), *left_out])
        dropped.append(layout.columns[index.sort().values])
    return PixelSelection(layouts, rows, dropped)


@dataclass(frozen=True, eq=False)
class PromptUnits:
    """Some media items of one prompt, and where their tokens are.

    Args:
        tokens: of every unit of each, its index into the layout.
        layout: of the prompt.
    """

    items: list[Units]
    tokens: list[list[torch.Tensor]]
    layout: Layout

    @property
    def sizes(self) -> list[list[int]]:
        """Tokens of every unit of each item."""
        return [[len(index) for index in units] for units in self.tokens]

    def grids(self) -> list[list[tuple[int, int]]]:
        """Return (rows, columns) of the patches of every unit; (1, 1) where they go together.

        They are told apart where they fill the unit's pixels, row by row: not those of a picture
        whose tiles overlap or share tokens, nor those of tiles that were cut to its shape, which
        have fewer than its base picture.
        """
        grids = []
        for item, units in zip(self.items, self.tokens, strict=True):
            of_item = [self.grid(index) for index in units]
            base = of_item[item.base]
            apart = not item.in_one_piece
            grids.append([grid if apart and grid == base else (1, 1) for grid in of_item])
        return grids

    def grid(self, index: torch.Tensor) -> tuple[int, int]:
        """Return (rows, columns) of the patches of some tokens; (1, 1) where they are no block."""
        grid = self.layout.grid.take(index[self.layout.grid.kind[index] == PATCH])
        rows, columns = grid.row.unique(), grid.col.unique()
        places = torch.cartesian_prod(rows, columns)
        block = len(places) == len(grid) and torch.equal(
            places, torch.stack([grid.row, grid.col], dim=1)
        )
        return (len(rows), len(columns)) if block and len(grid) > 1 else (1, 1)

    def spread(self, patches: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Return for every unit which of its tokens stay, of which of its patches do.

        Newlines and the like stay where any patch of their unit does.
        """
        masks = []
        for units, of_item in zip(self.tokens, patches, strict=True):
            of_units = []
            for index, kept in zip(units, of_item, strict=True):
                mask = torch.full((len(index),), bool(kept.any()))
                if kept.numel() > 1:
                    mask[self.layout.grid.kind[index] == PATCH] = kept.flatten()
                of_units.append(mask)
            masks.append(of_units)
        return masks


def _choose_patches(
    plan: PruningPlan, group: StageGroup, units: PromptUnits, total: int, keep: float | None
) -> list[list[torch.Tensor]]:
    """Return for every unit of every item of one sample which of its tokens one stage keeps.

    Args:
        total: tokens of all.
        keep: the fraction of them that may be left; None: as many as the method keeps.
    """
    method = group.at_pixels
    assert isinstance(method, PatchPruner)
    grids, sizes = units.grids(), units.sizes

    def choose(at_most: int | None) -> tuple[list[list[torch.Tensor]], int]:
        masks = units.spread(method.keep_patches(units.items, grids, sizes, at_most))
        return masks, sum(int(mask.sum()) for of_item in masks for mask in of_item)

    kept, left = choose(None)
    if keep is None:
        return kept
    most = fixed_count(keep, total)
    _check_reached(plan, group, keep, left, most, total)
    if left > most:
        patches = sum(
            int((units.layout.grid.kind[index] == PATCH).sum()) if grid != (1, 1) else len(index)
            for of_item, of_grids in zip(units.tokens, grids, strict=True)
            for index, grid in zip(of_item, of_grids, strict=True)
        )
        kept, left = choose(max(most - (sum(map(sum, sizes)) - patches), 0))
    _check_most(plan, group, keep, left, most, total)
    return kept


def _check_reached(
    plan: PruningPlan, group: StageGroup, keep: float, left: int, most: int, total: int
) -> None:
    """Warn where a method at `pixels` alone leaves fewer tokens than the preset's keep allows."""
    stage = group.stages[0].spec
    if left < most and stage.keep is None:
        plan.trace.warn(
            f"{_budget(plan, stage, keep)} is not reached: only {left} of {total} tokens are in "
            f"frames and tiles that {stage.method} does not drop"
        )


def _budget(plan: PruningPlan, stage: StageSpec, keep: float) -> str:
    """Return the budget of a stage at `pixels` as it was given: a keep, or a number of tokens."""
    tokens = plan.preset.budget if stage.keep is None else None
    return f"keep {keep:g}" if tokens is None else f"a budget of {tokens} tokens"


def _check_most(
    plan: PruningPlan, group: StageGroup, keep: float, left: int, most: int, total: int
) -> None:
    """Warn where whole frames and tiles can't meet the keep of a stage at `pixels`.

    Raises:
        PresetError: nor that of the preset.
    """
    stage = group.stages[0].spec
    if left > most:
        message = (
            f"{_budget(plan, stage, keep)} can't be reached at pixels: the first frame of a video "
            f"and the base picture always stay, {left} of {total} tokens"
        )
        if stage.keep is None:
            raise PresetError(
                message, "give more, or cut at the input: --method uniform --at input"
            )
        plan.trace.warn(message)


def _choose_units(
    plan: PruningPlan,
    group: StageGroup,
    items: list[Units],
    sizes: list[list[int]],
    total: int,
    keep: float | None,
) -> list[list[int]]:
    """Return the units that one stage keeps of each of one sample's items of its modality.

    Args:
        sizes: tokens of every unit of each.
        total: tokens of all.
        keep: the fraction of them that may be left; None: as many as the method keeps.
    """
    method = group.at_pixels
    assert isinstance(method, UnitPruner)
    if any(item.in_one_piece for item in items):
        plan.trace.warn(
            "no tile of a picture can be dropped before the vision tower here (tiles overlap, or "
            "their tokens are interpolated): all tiles are encoded"
        )
    kept = [method.keep(item) for item in items]
    if keep is None:
        return kept
    most = fixed_count(keep, total)
    left = _count(kept, sizes)
    _check_reached(plan, group, keep, left, most, total)
    if left > most:
        kept = method.shrink(items, kept, sizes, most)
        left = _count(kept, sizes)
    _check_most(plan, group, keep, left, most, total)
    return kept


def _count(kept: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]) -> int:
    """Return how many tokens the kept units of all items have."""
    pairs = zip(kept, sizes, strict=True)
    return sum(of_item[unit] for units, of_item in pairs for unit in units)


def unit_tokens(layout: Layout, items: Sequence[Units]) -> list[list[torch.Tensor]]:
    """Return for every item and unit of one sample the index of its tokens in the layout.

    Raises:
        ModelError: the items are not those of the layout.
    """
    numbers = {
        name: layout.media[layout.of_modality(name)].unique().tolist() for name in MODALITIES
    }
    left = {name: sum(item.modality == name for item in items) for name in MODALITIES}
    tokens = []
    for item in items:
        media, parts = numbers[item.modality], 1
        if item.in_one_piece and len(media) > left[item.modality]:
            parts = item.rows  # its crops are media of their own (Gemma 3)
        of_item = torch.isin(layout.media, torch.tensor(media[:parts], dtype=torch.long))
        numbers[item.modality] = media[parts:]
        left[item.modality] -= 1
        if len(item) == 1:
            tokens.append([of_item.nonzero().squeeze(1)])
            continue
        of_units = []
        for unit in range(len(item)):
            frame, tile = item.place(unit)
            of_unit = of_item & (layout.grid.frame == frame) & (layout.grid.tile == tile)
            of_units.append(of_unit.nonzero().squeeze(1))
        if item.modality == "video" and not all(map(len, of_units)):  # a tile may be all padding
            raise other_media()
        tokens.append(of_units)
    if sum(len(index) for of_item in tokens for index in of_item) != len(layout):
        raise other_media()
    return tokens


def other_media() -> ModelError:
    """Return the error where prompts and media are not each other's."""
    return ModelError(
        "the visual tokens of this forward are not those of the media that it was to show",
        "give the media of exactly these prompts, one batch in each block",
    )


# -- the vision tower ----------------------------------------------------------------------------


@dataclass
class ReducedTower:
    """One call of an encoder whose tower and projector get fewer rows than it was called with.

    The rest of the encoder and of the model sees outputs of full length, with zeros for the other
    rows; the tokens made of those are dropped at the input.

    Args:
        rows: (U,) bool: those that the tower gets.
        tokens: (N,) bool: those of their tokens; set by a tower that takes grids.
        patches: (P,) bool: likewise those of their patches, which a projector behind the tower may
            merge to tokens (LFM3-VL).
        ran: whether a tower was called.
    """

    rows: torch.Tensor
    tokens: torch.Tensor | None = None
    patches: tuple[torch.Tensor, ...] = ()
    ran: bool = False

    def attach(self, inner: nn.Module, hooks: Hooks) -> None:
        """Put hooks around the towers and projectors of a multimodal model."""
        towers = TOWERS if any(hasattr(inner, name) for name in TOWERS) else (EMBEDDER,)
        for name in (*towers, *PROJECTORS):
            module = getattr(inner, name, None)
            if not isinstance(module, nn.Module):
                continue
            module = running_module(module)
            if name in towers:
                hooks.before(module, self.before_tower)
                hooks.after(module, self.after_tower)
            elif len(inspect.signature(module.forward).parameters) == 1:
                # Molmo2's takes numbers of patches too, which count all of them.
                hooks.before(module, self.before_projector)
                hooks.after(module, self.after_projector)

    def check_ran(self) -> None:
        """Refuse a model whose tower the hooks did not reach."""
        if not self.ran:
            raise ModelError(
                "the vision tower is not called as a module, so nothing goes before it (compiled?)",
                "load the model uncompiled, or cut at the input",
            )

    def before_tower(
        self, tower: nn.Module, args: tuple[object, ...], kwargs: Kwargs
    ) -> tuple[tuple[object, ...], Kwargs]:
        """Return a tower's arguments by name, with the rows that it gets.

        Raises:
            ModelError: they are not those of the media.
        """
        self.ran = True
        given = {**inspect.signature(tower.forward).bind_partial(*args).arguments, **kwargs}
        if "grid_thw" in given:
            return (), self.take_steps(tower, given)
        if isinstance(places := given.get("pixel_position_ids"), torch.Tensor):
            # Gemma 4's gives the tokens of all rows one after another, without padding.
            patches = (places.cpu() >= 0).all(-1).sum(1)
            merge = int(tower.config.pooling_kernel_size)  # type: ignore[union-attr, arg-type]
            if len(patches) != len(self.rows):
                raise other_media()
            self.tokens = self.rows.repeat_interleave(patches // merge**2)
        first = next((value for value in given.values() if isinstance(value, torch.Tensor)), None)
        if first is None or len(first) != len(self.rows):
            raise other_media()
        return (), {name: self.take(value) for name, value in given.items()}

    def take_steps(self, tower: nn.Module, given: Kwargs) -> Kwargs:
        """Return the arguments of a tower whose patches follow one another, of all items.

        With them comes a grid (steps, rows, columns) an item. In transformers' Qwen and GLM towers
        (5.17 to 5.24) every step attends to itself alone, so a step is a row here.
        """
        grid = given["grid_thw"]
        assert isinstance(grid, torch.Tensor)
        shapes, rows = grid.cpu(), self.rows
        steps = shapes[:, 0]
        sizes = (shapes[:, 1] * shapes[:, 2]).repeat_interleave(steps)  # patches of each row
        if len(sizes) != len(rows):
            raise other_media()
        merge = int(getattr(tower, "spatial_merge_size", 1))  # 1: their projector merges them
        self.tokens = rows.repeat_interleave(sizes // merge**2)
        patches = rows.repeat_interleave(sizes)
        self.patches = (patches,)
        changed: Kwargs = {}
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and name != "grid_thw":
                if len(value) != len(patches):
                    raise ModelError(
                        f"the vision tower is given {name}, which counts all frames",
                        "leave it to the model, or cut at the input",
                    )
                value = take_rows(value, patches)
            changed[name] = value
        left = torch.stack([of_item.sum() for of_item in rows.split(steps.tolist())])
        short = torch.cat([left[:, None], shapes[:, 1:]], dim=1)[left > 0]
        return {**changed, "grid_thw": send(short.to(grid.dtype), grid.device)}

    def after_tower(self, tower: nn.Module, args: object, output: object) -> object:
        """Return a tower's output at its full length.

        Of a tower that takes grids only what is read of it: the rest may be in another order.
        """
        if self.tokens is None:
            return restore_rows(output, self.rows)
        given = [name for name in FULL if getattr(output, name, None) is not None]
        given = given or [name for name in STATES if getattr(output, name, None) is not None]
        if not given:
            raise unknown(f"the output of the vision tower has no {' or '.join(FULL)}")
        for name in given:
            setattr(output, name, restore_rows(getattr(output, name), self.tokens, *self.patches))
        return output

    def before_projector(
        self, projector: nn.Module, args: tuple[object, ...], kwargs: Kwargs
    ) -> tuple[tuple[object, ...], Kwargs]:
        """Return a projector's argument, with the rows that the tower gets."""
        changed = {name: self.take(value) for name, value in kwargs.items()}
        return tuple(self.take(value) for value in args), changed

    def after_projector(self, projector: nn.Module, args: object, output: object) -> object:
        """Return a projector's output at its full length."""
        return restore_rows(output, self.rows)

    def take(self, value: object) -> object:
        """Return the rows that the tower gets, of a tensor that has them all."""
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == len(self.rows):
            return take_rows(value, self.rows)
        return value


def take_rows(value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the rows of `value` that are True in `rows`."""
    return value.index_select(0, send(rows.nonzero().squeeze(1), value.device))


def restore_rows(value: object, *rows: torch.Tensor) -> object:
    """Return tensors that have the rows that are True with all of them: zeros for the others.

    Args:
        rows: of all that there may be; the first that fit a tensor count.
    """
    if isinstance(value, MutableMapping):
        for name in list(value):
            value[name] = restore_rows(value[name], *rows)
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(restore_rows(part, *rows) for part in value)
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value
    fitting = next((kept for kept in rows if len(value) == int(kept.sum())), None)
    if fitting is None:
        return value
    full = value.new_zeros(len(fitting), *value.shape[1:])
    return full.index_copy(0, send(fitting.nonzero().squeeze(1), value.device), value)
