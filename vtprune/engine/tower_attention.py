"""What visual tokens receive of their vision tower's attention: where it is read, which get it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from vtprune.device import send
from vtprune.errors import ModelError
from vtprune.models.adapters import running_module
from vtprune.models.anyres import Plane
from vtprune.models.seams import unknown
from vtprune.models.structure import Structure
from vtprune.pruners.base import TOWER
from vtprune.tokens.layout import CLS, PATCH, Grid, Layout
from vtprune.tokens.schedule import SLACK

TOWERS = ("vision_tower", "visual", "vision_model")
LAYERS = ("layers", "layer", "blocks")
ATTENTION = ("self_attn", "attn", "attention")
CLS_WEIGHTS = ("class_embedding", "cls_token")
MIDDLE = 9 / 24  # of a tower's depth: HiPrune's ninth layer of CLIP's 24
EARLY = 6 / 24  # VScan's sixth
WAY_OUT = "use a method that does not read the vision tower, such as entropy or uniform"

Rows = Sequence[torch.Tensor] | torch.Tensor
"""What the patches of each row of a tower receive, (S,) float32; (0,) for a row that did not run.

A row is what attends to itself alone: a frame, a tile, a time step of a few frames.
"""


# -- where it is read ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tower:
    """What is read of a vision tower.

    Args:
        last: the module in which the layer attends whose output the projector is given.
        middle, early: the same of the layers that end `MIDDLE` and `EARLY` down the tower, at most
            the last.
        has_cls: its rows begin with a CLS token.
    """

    last: nn.Module
    middle: nn.Module
    early: nn.Module
    has_cls: bool

    def modules(self, names: Sequence[str]) -> dict[nn.Module, list[str]]:
        """Return which of the named readings each attention module gives."""
        modules: dict[nn.Module, list[str]] = {}
        for name in names:
            depth = name.removeprefix("tower_").removesuffix("_attention")
            module = {"middle": self.middle, "early": self.early}.get(depth, self.last)
            modules.setdefault(module, []).append(name)
        return modules

    def is_by_first(self, name: str) -> bool:
        """Return whether a reading is of the attention of the CLS token alone."""
        return self.has_cls and name in ("tower_attention", "tower_early_attention")


@dataclass(frozen=True, eq=False)
class TowerReading:
    """What the patches of each row of a tower received in one encoder call.

    Args:
        has_cls: each row begins with a CLS token.
        rows: (V, S) each, by the names of `TOWER` that were read.
    """

    has_cls: bool
    rows: list[torch.Tensor]
    names: tuple[str, ...] = TOWER[:1]

    def among(self, kept: torch.Tensor | None) -> TowerReading:
        """Return the same, (V, 0) in the places of rows that the tower did not get.

        Args:
            kept: (U,) bool: those that it got; None: all.
        """
        if kept is None or len(self.rows) != int(kept.sum()):
            return self
        rows = iter(self.rows)
        empty = self.rows[0].new_zeros(len(self.names), 0)
        return replace(self, rows=[next(rows) if ran else empty for ran in kept.tolist()])


def covers(reading: object, names: Sequence[str]) -> bool:
    """Return whether a reading of the tower has all these names."""
    return isinstance(reading, TowerReading) and set(names) <= set(reading.names)


def find_tower(structure: Structure, modality: str, given: Mapping[str, object]) -> Tower:
    """Return the tower that encodes `modality`.

    Args:
        given: the arguments of the encoder call, by name.

    Raises:
        ModelError: its attention can't be read.
    """
    names = (f"{modality}_tower", *TOWERS)
    towers = (getattr(structure.inner, name, None) for name in names)
    tower = next((running_module(part) for part in towers if isinstance(part, nn.Module)), None)
    if not structure.family.listed or tower is None:
        raise _unreadable(structure, "where its vision tower's patches end up is not known")
    layers = _find_layers(tower)
    number = _feature_layer(structure, given, len(layers)) if layers else -1
    if number < 0:
        raise _unreadable(structure, "its projector is not given what a layer of its tower says")
    last, middle, early = (
        _attention_of(structure, layers[layer])
        for layer in (
            number,
            _layer_at(structure, MIDDLE, len(layers), number),
            _layer_at(structure, EARLY, len(layers), number),
        )
    )
    weights = {name.rsplit(".", 1)[-1] for name, _ in tower.named_parameters()}
    return Tower(last, middle, early, bool(weights & set(CLS_WEIGHTS)))


def _attention_of(structure: Structure, layer: nn.Module) -> nn.Module:
    """Return the module in which a layer of a tower attends."""
    parts = (getattr(layer, name, None) for name in ATTENTION)
    module = next((running_module(part) for part in parts if isinstance(part, nn.Module)), None)
    kernel = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if module is None or not isinstance(kernel, str):
        raise _unreadable(structure, "a layer of its tower has no attention to read")
    return module


def _layer_at(structure: Structure, depth: float, count: int, last: int) -> int:
    """Return the layer of a tower that ends `depth` of its `count` layers down, at most the last.

    Where most layers attend in windows, it is the nearest that does not, of two the deeper.
    """
    layer = min(max(int(depth * count + SLACK) - 1, 0), last)
    unwindowed = getattr(structure.config.vision_config, "fullatt_block_indexes", None) or [layer]
    return int(min((n for n in unwindowed if n <= last), key=lambda n: (abs(n - layer), -n)))


def _unreadable(structure: Structure, reason: str) -> ModelError:
    return ModelError(
        f"{structure.model_type}: what the vision tower attends to can't be read: {reason}", WAY_OUT
    )


def _find_layers(tower: nn.Module) -> Sequence[nn.Module]:
    """Return the layers of a tower, whatever they lie in."""
    for name, module in tower.named_modules():
        if isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] in LAYERS:
            return list(module)
    return []


def _feature_layer(structure: Structure, given: Mapping[str, object], count: int) -> int:
    """Return the layer whose output the projector is given, the deepest of several; -1 for none.

    Transformers (5.17 to 5.24) counts hidden states from the embeddings on, but from the first
    layer on in an adapter's config. Where most layers attend in windows, it is the deepest up to
    there that does not.
    """
    config, asked = structure.config, given.get("vision_feature_layer")
    if asked is None:
        asked = getattr(config, "vision_feature_layer", None)
    first = 1
    if asked is None and "vision_feature_layer" in structure.seams.inner:
        raise unknown(f"{structure.model_type}: its config has no vision_feature_layer")
    if asked is None and hasattr(config, "adapter_config"):
        asked, first = config.adapter_config.vision_feature_layer, 0
    asked = -1 if asked is None else asked
    layers = cast("Sequence[int]", asked if isinstance(asked, Sequence) else [asked])
    deepest = max(layer + count if layer < 0 else layer - first for layer in layers)
    unwindowed = getattr(config.vision_config, "fullatt_block_indexes", None)
    if unwindowed:
        deepest = max((layer for layer in unwindowed if layer <= deepest), default=-1)
    return deepest if deepest < count else -1


# -- which tokens get it -------------------------------------------------------------------------


class MisfitError(Exception):
    """The rows of a tower are not those of the visual tokens."""


def read_scores(
    structure: Structure, vision: Mapping[str, Mapping[str, object]], layouts: Sequence[Layout]
) -> list[torch.Tensor]:
    """Return what every sample's visual tokens receive of their tower's attention.

    They are (N, V) float32 with a column for every name of `TOWER`, of NaN where it was not read:
    multiples of what the tokens would receive if their row's attention went to all alike, so that
    pictures of different sizes compare.

    Args:
        vision: for every modality that is shown, the arguments of its encoder call, and with them
            the TowerReading, under the name of the state.

    Raises:
        ModelError: it was not read, or does not fit the tokens.
    """
    shared = len(set(structure.placeholders().values())) == 1
    scores = [torch.zeros(len(layout), len(TOWER)) for layout in layouts]
    for modality, given in vision.items():
        reading = given.get(TOWER[0])
        if not isinstance(reading, TowerReading):
            raise _unreadable(structure, "the pictures were encoded before this block")
        kind = "all" if shared else modality  # one placeholder: one encoder call for all
        tokens = [layout.of_modality(kind) for layout in layouts]
        for column, name in enumerate(TOWER):
            if name not in reading.names:
                for sample, index in enumerate(tokens):
                    of_tokens = send(index, scores[sample].device)
                    scores[sample][:, column].index_fill_(0, of_tokens, torch.nan)
                continue
            number = reading.names.index(name)
            try:
                rows = [row[number] * row.shape[1] for row in reading.rows]
                rows_by_item, footprint = find_footprint(structure, given, rows, reading.has_cls)
                received = distribute(layouts, tokens, rows_by_item, footprint)
            except MisfitError:
                raise _unreadable(
                    structure, f"the rows of its tower are not those of the {modality} tokens"
                ) from None
            for sample, values in enumerate(received):
                scores[sample] = send(scores[sample], values.device)
                scores[sample][send(tokens[sample], values.device), column] = values
    return scores


@dataclass(frozen=True)
class FrameRows:
    """A tower for which each frame or tile is a row, whose patches are pooled to its tokens.

    Args:
        has_cls: each row begins with a CLS token.
    """

    has_cls: bool

    def num_rows(self, number: int, grid: Grid) -> int:
        """Return how many rows media item `number` takes."""
        return len(_frames(grid))

    def score(self, number: int, grid: Grid, rows: Rows) -> torch.Tensor:
        """Return (n,) float32 of the item's tokens, from its rows."""
        frames = zip(_frames(grid), rows, strict=True)
        return torch.cat([self.score_frame(grid.take(index), row) for index, row in frames])

    def score_frame(self, grid: Grid, row: torch.Tensor) -> torch.Tensor:
        """Return (n,) float32 of the tokens of one frame or tile.

        A CLS token gets the most that any of the row gets; what no patch stands behind, nothing.
        """
        scores = row.new_zeros(len(grid))
        if not len(row):
            return scores
        patch = (grid.kind == PATCH).nonzero().squeeze(1)
        top, left = grid.row[patch], grid.col[patch]
        top, left = top - top.min(), left - left.min()
        shape = int(top.max()) + 1, int(left.max()) + 1
        pooled = pool(unflatten(row[int(self.has_cls) :], shape), shape)
        scores[send(patch, scores.device)] = _look_up(pooled, top, left)
        return torch.where(send(grid.kind == CLS, scores.device), row.max(), scores)


@dataclass(frozen=True)
class TiledRows:
    """A tower that gets a base picture, and tiles that are laid together and cut to the picture.

    Args:
        has_cls: each row begins with a CLS token.
        planes: how each item's tiles lie; None for one that has none.
    """

    has_cls: bool
    planes: Sequence[Plane | None]

    def num_rows(self, number: int, grid: Grid) -> int:
        """Return how many rows media item `number` takes.

        Raises:
            MisfitError: there is no such item.
        """
        if number >= len(self.planes):
            raise MisfitError
        plane = self.planes[number]
        return 1 + (plane.rows * plane.cols if plane else 0)

    def score(self, number: int, grid: Grid, rows: Rows) -> torch.Tensor:
        """Return (n,) float32 of the item's tokens, from its rows."""
        plane, frames = self.planes[number], FrameRows(self.has_cls)
        if plane is None:
            return frames.score_frame(grid, rows[0])
        base = (grid.tile == 0).nonzero().squeeze(1)
        tiled = ((grid.tile > 0) & (grid.kind == PATCH)).nonzero().squeeze(1)
        scores = rows[0].new_zeros(len(grid))
        scores[send(base, scores.device)] = frames.score_frame(grid.take(base), rows[0])
        top, left = grid.row[tiled], grid.col[tiled]
        if not len(top):  # a picture so narrow that all of it is cut off
            return scores
        shape = int(top.max()) + 1, int(left.max()) + 1
        pooled = pool(self.lay(plane, rows[1:]), shape)
        scores[send(tiled, scores.device)] = _look_up(pooled, top, left)
        return scores

    def lay(self, plane: Plane, rows: Rows) -> torch.Tensor:
        """Return (R, C) patches of the tiled picture, its padding cut off."""
        tiles = torch.stack(_filled(rows))[:, int(self.has_cls) :]
        side = math.isqrt(tiles.shape[1])
        if side**2 != tiles.shape[1]:
            raise MisfitError
        patches = tiles.view(plane.rows, plane.cols, side, side).transpose(1, 2)
        patches = patches.reshape(plane.rows * side, plane.cols * side)
        height, width = patches.shape
        return patches[plane.above : height - plane.above, plane.before : width - plane.before]


@dataclass(frozen=True)
class StepRows:
    """A tower for which each time step is a row, in which a token's patches follow one another.

    Args:
        size: patches of one token.
        window: side in tokens of the windows that the tower goes through one by one; 0: it goes
            row by row.
    """

    size: int
    window: int = 0

    def num_rows(self, number: int, grid: Grid) -> int:
        """Return how many rows media item `number` takes."""
        return len(grid.frame.unique())

    def score(self, number: int, grid: Grid, rows: Rows) -> torch.Tensor:
        """Return (n,) float32 of the item's tokens, from its rows."""
        parts = []
        for frame, row in zip(grid.frame.unique().tolist(), rows, strict=True):
            index = (grid.frame == frame).nonzero().squeeze(1)
            scores = row.new_zeros(len(index))
            if len(row) not in (0, len(index) * self.size):
                raise MisfitError
            if len(row):
                order = self.order(grid.take(index))
                scores[send(order, scores.device)] = row.view(-1, self.size).mean(1)
            parts.append(scores)
        return torch.cat(parts)

    def order(self, grid: Grid) -> torch.Tensor:
        """Return (n,) the index of one step's tokens as the tower goes through them."""
        if not self.window:
            return torch.arange(len(grid))
        row, col = grid.row // self.window, grid.col // self.window
        return (row * (int(col.max()) + 1) + col).argsort(stable=True)


@dataclass(frozen=True)
class TokenRows:
    """Rows that were made of a tower's for each token: see `gather_patches`."""

    def num_rows(self, number: int, grid: Grid) -> int:
        """Return how many rows media item `number` takes."""
        return len(grid)

    def score(self, number: int, grid: Grid, rows: Rows) -> torch.Tensor:
        """Return (n,) float32 of the item's tokens, from its rows."""
        assert isinstance(rows, torch.Tensor)
        return rows


Footprint = FrameRows | TiledRows | StepRows | TokenRows
"""How a tower's rows become the tokens of a media item."""


def find_footprint(
    structure: Structure, given: Mapping[str, object], rows: list[torch.Tensor], has_cls: bool
) -> tuple[Rows, Footprint]:
    """Return a tower's rows, and how they become tokens.

    Args:
        given: the arguments of the encoder call, by name.
        rows: as the tower has them.
        has_cls: each begins with a CLS token.
    """
    config, family = structure.config, structure.family
    pooling = next((value for name, value in given.items() if name.endswith("token_pooling")), None)
    if isinstance(pooling, torch.Tensor):
        return gather_patches(rows, pooling), TokenRows()
    if any(name.endswith("grid_thw") for name in given):
        tower = config.vision_config
        merge, window = tower.spatial_merge_size, 0
        if getattr(tower, "fullatt_block_indexes", None):
            window = tower.window_size // merge // tower.patch_size
        return rows, StepRows(merge**2, window)
    planes = family.planes(config, given)
    return rows, FrameRows(has_cls) if planes is None else TiledRows(has_cls, planes)


def gather_patches(rows: Rows, pooling: torch.Tensor) -> torch.Tensor:
    """Return (n,) float32 of tokens that say which patches they are made of.

    Args:
        pooling: (n, p) patches of each, counted over all rows one after the other; -1 for none.
    """
    patches, pooling = torch.cat(_filled(rows)), pooling.cpu()
    if int(pooling.max()) >= len(patches):
        raise MisfitError
    pooling = send(pooling[(pooling >= 0).any(1)], patches.device)
    used = pooling >= 0
    total = (patches[pooling.clamp_min(0)] * used).sum(1)
    return total / used.sum(1)


def _filled(rows: Rows) -> list[torch.Tensor]:
    """Return the rows, zeros in place of those that did not run."""
    size = max((len(row) for row in rows), default=0)
    return [row if len(row) else row.new_zeros(size) for row in rows]


def distribute(
    layouts: Sequence[Layout], tokens: Sequence[torch.Tensor], rows: Rows, footprint: Footprint
) -> list[torch.Tensor]:
    """Return for every sample the scores of its tokens at `tokens`, (n,) float32 each.

    Samples may be repeated, each as often (beams, several return sequences).

    Raises:
        MisfitError: the rows are not those of the tokens.
    """
    items = [_items(layout.take(index)) for layout, index in zip(layouts, tokens, strict=True)]
    sizes = [[len(grid) for grid in grids] for grids in items]
    for repeat in range(1, len(layouts) + 1):
        if len(layouts) % repeat:
            continue
        if any(size != sizes[n - n % repeat] for n, size in enumerate(sizes)):
            continue
        scores = _score(items[::repeat], rows, footprint)
        if scores is not None:
            return [scores[n // repeat] for n in range(len(layouts))]
    raise MisfitError


def _score(
    samples: Sequence[Sequence[Grid]], rows: Rows, footprint: Footprint
) -> list[torch.Tensor] | None:
    """Return the scores of every sample's items; None where they do not take up all rows."""
    grids = [grid for items in samples for grid in items]
    try:
        counts = [footprint.num_rows(number, grid) for number, grid in enumerate(grids)]
    except MisfitError:
        return None
    if sum(counts) != len(rows):
        return None
    scores, first = [], 0
    for number, (grid, count) in enumerate(zip(grids, counts, strict=True)):
        scores.append(footprint.score(number, grid, rows[first : first + count]))
        first += count
    by_sample = iter(scores)
    return [
        torch.cat([next(by_sample) for _ in items]) if items else torch.zeros(0)
        for items in samples
    ]


def _items(layout: Layout) -> list[Grid]:
    """Return the grid of every media item, in order."""
    numbers = layout.media.unique().tolist()
    return [layout.grid.take((layout.media == n).nonzero().squeeze(1)) for n in numbers]


def _frames(grid: Grid) -> list[torch.Tensor]:
    """Return the index of the tokens of every frame or tile, in the order of the prompt."""
    key = torch.stack([grid.frame, grid.tile])
    sizes = torch.unique_consecutive(key, dim=1, return_counts=True)[1].tolist()
    return list(torch.arange(len(grid)).split(sizes))


def _look_up(values: torch.Tensor, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    return values[send(row, values.device), send(col, values.device)]


def unflatten(patches: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return (R, C) of patches (R x C,) of which squares are joined to a grid of `shape`.

    Raises:
        MisfitError: that can't be.
    """
    joined = math.isqrt(len(patches) // (shape[0] * shape[1]))
    if joined and shape[0] * shape[1] * joined**2 == len(patches):
        return patches.view(shape[0] * joined, shape[1] * joined)
    side = math.isqrt(len(patches))
    if side**2 != len(patches) or side < max(shape):
        raise MisfitError
    return patches.view(side, side)


def pool(patches: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return (R, C) patches as a grid of `shape`.

    It is the mean of squares of them, cut off at the right and below; else bilinear, as models
    interpolate what is no multiple.
    """
    rows, cols = patches.shape
    side = max(rows // shape[0], 1)
    if (rows // side, cols // side) == shape:
        return functional.avg_pool2d(patches[None], side)[0]
    return functional.interpolate(patches[None, None], shape, mode="bilinear")[0, 0]
