"""The attention of a vision tower: which of its modules to read, and what its tokens get of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from vtprune.engine.footprint import (
    Blocks,
    Footprint,
    Gathered,
    Maps,
    MisfitError,
    Panes,
    Tiles,
    distribute,
    gather_patches,
)
from vtprune.errors import ModelError
from vtprune.models.adapters import running_module
from vtprune.models.seams import unknown
from vtprune.models.structure import Structure
from vtprune.pruners.base import TOWER
from vtprune.tokens.layout import Layout

if TYPE_CHECKING:
    pass

NAMES = ("vision_tower", "visual", "vision_model")
LAYERS = ("layers", "layer", "blocks")
ATTENTION = ("self_attn", "attn", "attention")
CLS = ("class_embedding", "cls_token")
WAY_OUT = "use a method that does not read the vision tower, such as entropy or uniform"


@dataclass(frozen=True, eq=False)
class Tower:
    """What is read of a vision tower.

    Args:
        attention: the module in which the layer attends whose output the projector is given.
        has_cls: its rows begin with a CLS token.
    """

    attention: nn.Module
    has_cls: bool


@dataclass(frozen=True, eq=False)
class Reading:
    """What the tokens of each row of a tower received in one encoder call."""

    has_cls: bool
    rows: list[torch.Tensor]

    def among(self, kept: torch.Tensor | None) -> Reading:
        """The same, (0,) in the places of rows that the tower did not get.

        Args:
            kept: (U,) bool: those that it got; None: all.
        """
        if kept is None or len(self.rows) != int(kept.sum()):
            return self
        rows = iter(self.rows)
        empty = self.rows[0].new_zeros(0)
        return Reading(self.has_cls, [next(rows) if one else empty for one in kept.tolist()])


def find_tower(structure: Structure, modality: str, given: Mapping[str, object]) -> Tower:
    """The tower that encodes `modality`.

    Args:
        given: the arguments of the encoder call, by name.

    Raises:
        ModelError: its attention can't be read.
    """
    names = (f"{modality}_tower", *NAMES)
    towers = (getattr(structure.inner, name, None) for name in names)
    tower = next((running_module(one) for one in towers if isinstance(one, nn.Module)), None)
    if structure.family is None or tower is None:
        raise _unreadable(structure, "where its vision tower's patches end up is not known")
    layers = _find_layers(tower)
    number = _feature_layer(structure, given, len(layers)) if layers else -1
    if number < 0:
        raise _unreadable(structure, "its projector is not given what a layer of its tower says")
    found = (getattr(layers[number], name, None) for name in ATTENTION)
    module = next((running_module(one) for one in found if isinstance(one, nn.Module)), None)
    kernel = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if module is None or not isinstance(kernel, str):
        raise _unreadable(structure, "a layer of its tower has no attention to read")
    weights = {name.rsplit(".", 1)[-1] for name, _ in tower.named_parameters()}
    return Tower(module, bool(weights & set(CLS)))


def _unreadable(structure: Structure, reason: str) -> ModelError:
    return ModelError(
        f"{structure.model_type}: what the vision tower attends to can't be read: {reason}", WAY_OUT
    )


def _find_layers(tower: nn.Module) -> Sequence[nn.Module]:
    """The layers of a tower, whatever they lie in."""
    for name, module in tower.named_modules():
        if isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] in LAYERS:
            return list(module)
    return []


def _feature_layer(structure: Structure, given: Mapping[str, object], count: int) -> int:
    """The layer whose output the projector is given, the deepest of several; -1 for none.

    Hidden states are counted from the embeddings on, but from the first layer on in an adapter's
    config. Where most layers attend in windows, the deepest up to there that does not.
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
    wanted = cast("Sequence[int]", asked if isinstance(asked, Sequence) else [asked])
    deepest = max(one + count if one < 0 else one - first for one in wanted)
    whole = getattr(config.vision_config, "fullatt_block_indexes", None)
    if whole:
        deepest = max((one for one in whole if one <= deepest), default=-1)
    return deepest if deepest < count else -1


def read_scores(
    structure: Structure, vision: Mapping[str, Mapping[str, object]], layouts: Sequence[Layout]
) -> list[torch.Tensor]:
    """What the visual tokens of every sample receive of their tower's attention, (N,) float32.

    It is a multiple of what they would receive if their row's attention went to all alike, so that
    pictures of different sizes compare.

    Args:
        vision: for every modality that is shown, the arguments of its encoder call, and with them
            the Reading, under the name of the state.

    Raises:
        ModelError: it was not read, or does not fit the tokens.
    """
    shared = len(set(structure.placeholders().values())) == 1
    scores = [torch.zeros(len(layout)) for layout in layouts]
    for modality, given in vision.items():
        reading = given.get(TOWER[0])
        if not isinstance(reading, Reading):
            raise _unreadable(structure, "the pictures were encoded before this block")
        kind = "all" if shared else modality  # one placeholder: one encoder call for all
        own = [layout.of_modality(kind) for layout in layouts]
        try:
            rows = [one * len(one) for one in reading.rows]
            maps, footprint = find_footprint(structure, given, rows, reading.has_cls)
            found = distribute(layouts, own, maps, footprint)
        except MisfitError:
            raise _unreadable(
                structure, f"the rows of its tower are not those of the {modality} tokens"
            ) from None
        for sample, values in enumerate(found):
            scores[sample] = scores[sample].to(values.device)
            scores[sample][own[sample].to(values.device)] = values
    return scores


def find_footprint(
    structure: Structure, given: Mapping[str, object], rows: list[torch.Tensor], has_cls: bool
) -> tuple[Maps, Footprint]:
    """How the rows of a tower become tokens, and the rows; of tokens that say which patches they
    are made of, one row a token."""
    config, family = structure.config, structure.family
    pooling = next((value for name, value in given.items() if name.endswith("token_pooling")), None)
    if isinstance(pooling, torch.Tensor):
        return gather_patches(rows, pooling), Gathered()
    if any(name.endswith("grid_thw") for name in given):
        tower = config.vision_config
        merge, window = tower.spatial_merge_size, 0
        if getattr(tower, "fullatt_block_indexes", None):
            window = tower.window_size // merge // tower.patch_size
        return rows, Blocks(merge**2, window)
    planes = family.planes(config, given) if family else None
    return rows, Panes(has_cls) if planes is None else Tiles(has_cls, planes)
