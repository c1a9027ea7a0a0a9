"""The layout of the visual tokens of every row of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol

import torch

from vtprune.errors import ModelError
from vtprune.models.base import Family, VisionInputs
from vtprune.models.placeholder_runs import is_flat
from vtprune.tokens.layout import Grid, Layout, box, lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Described(Protocol):
    """What the layout of a prompt needs of a model."""

    @property
    def family(self) -> Family: ...

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def model_type(self) -> str: ...

    def placeholders(self) -> Mapping[str, tuple[int, ...]]: ...


NO_TOKEN = -1
"""In the place of the ids of padding."""


def lay_out_batch(
    structure: Described,
    ids: torch.Tensor,
    valid: torch.Tensor,
    vision: VisionInputs,
    modality: str | None,
    media: Sequence[tuple[str, Grid]] = (),
) -> tuple[list[Layout], list[str]]:
    """Return the layout of every row's visual tokens, and warnings.

    Args:
        ids: (B, S) on the CPU.
        valid: (B, S) bool, False on padding.
        vision: what the vision encoder was given.
        modality: "image" or "video", where both have the same placeholder.
        media: modality and grid of each media item in order, where that is known.

    Raises:
        ModelError: fewer placeholders than features, as in a chunked prefill.
    """
    family, tokens = structure.family, structure.placeholders()
    if len(set(tokens.values())) < len(tokens):  # both modalities use the same token
        kind = modality or ("video" if "video" in vision and "image" not in vision else "image")
        tokens = {kind: tokens[kind]}
        if vision:
            vision = {kind: next(iter(vision.values()))}
    elif modality and len(tokens) == 1:
        tokens = {modality: next(iter(tokens.values()))}
    if media:
        layouts, warnings = _lay_out_media(ids, valid, set().union(*tokens.values()), media)
        return layouts, warnings + _warn_of_rows(structure, [grid for _, grid in media])
    if not family.listed:  # it looks at the placeholders, whatever the encoders say
        vision = {name: vision.get(name, {}) for name in tokens}
    prompts = ids.where(valid, NO_TOKEN)
    vision = {
        name: _GivenInputs(structure.model_type, name, {**inputs, "input_ids": prompts})
        for name, inputs in vision.items()
    }
    columns = [
        {
            name: (torch.isin(row, torch.tensor(token_ids)) & keep).nonzero().squeeze(1)
            for name, token_ids in tokens.items()
        }
        for row, keep in zip(ids, valid, strict=True)
    ]
    grids = family.grids(structure.config, vision)
    shares: dict[str, list[list[Grid]]] = {}
    warnings = []
    for name in tokens:
        counts = [len(row[name]) for row in columns]
        shared = share_grids(grids.get(name, []), counts)
        if shared is None:
            warnings.append(
                f"the {name} tokens do not match the media that were encoded, so it is not known "
                "which frame or tile each belongs to"
            )
            shared = [_runs(row[name]) for row in columns]
        shares[name] = shared
    layouts = [
        lay_out(row, {name: shares[name][number] for name in tokens})
        for number, row in enumerate(columns)
    ]
    warnings += _warn_of_rows(structure, [grid for items in grids.values() for grid in items])
    return layouts, warnings


class _GivenInputs(dict[str, object]):
    """What came with the pixels of one modality, by name; a missing one is refused when asked for.

    Args:
        model_type: of the model that it came to.
        modality: of the pixels.
        inputs: None stands for what did not come.
    """

    def __init__(self, model_type: str, modality: str, inputs: Mapping[str, object]) -> None:
        super().__init__({name: value for name, value in inputs.items() if value is not None})
        self.model_type, self.modality = model_type, modality

    def __missing__(self, name: str) -> NoReturn:
        raise missing_input(self.model_type, self.modality, name)


def missing_input(model_type: str, modality: str, name: str) -> ModelError:
    """Return the error for pixels that came without another input that belongs to them."""
    return ModelError(
        f"{model_type}: the pixels of {modality}s were given without {name}",
        "pass all that the model's processor gives",
    )


def _warn_of_rows(structure: Described, grids: Sequence[Grid]) -> list[str]:
    """Return a warning where rows and columns are not known, of a model without its own family."""
    if structure.family.listed or not any(map(is_flat, grids)):
        return []
    return [
        f"{structure.model_type}: nothing in its inputs tells the rows and columns of the visual "
        "tokens; they are taken for one row, which methods that compare neighbours feel"
    ]


def _lay_out_media(
    ids: torch.Tensor, valid: torch.Tensor, tokens: set[int], media: Sequence[tuple[str, Grid]]
) -> tuple[list[Layout], list[str]]:
    """Return the layout of every row, whose placeholders belong to `media` in order."""
    visual = torch.isin(ids, torch.tensor(sorted(tokens))) & valid
    columns = [row.nonzero().squeeze(1) for row in visual]
    shares = share_grids([grid for _, grid in media], [len(row) for row in columns])
    if shares is None:
        raise ModelError(
            "the visual tokens of this prompt are not those of the media it was made for",
            "give the inputs as the family made them",
        )
    kinds = {id(grid): kind for kind, grid in media}
    layouts = []
    for row, grids in zip(columns, shares, strict=True):
        parts = row.split([len(grid) for grid in grids])
        items = [(kinds[id(grid)], part, grid) for part, grid in zip(parts, grids, strict=True)]
        names = dict.fromkeys(kind for kind, _, _ in items)
        where = {
            name: torch.cat([part for kind, part, _ in items if kind == name]) for name in names
        }
        layouts.append(
            lay_out(where, {n: [grid for kind, _, grid in items if kind == n] for n in names})
        )
    return layouts, []


def share_grids(grids: list[Grid], counts: list[int]) -> list[list[Grid]] | None:
    """Share the grids of a batch's media over its rows; None where they do not fit.

    Rows may be repeated, each as often (beams, several return sequences).

    Raises:
        ModelError: the rows hold only part of the grids' tokens.
    """
    total, have = sum(len(grid) for grid in grids), sum(counts)
    if not total:
        return None if have else [[] for _ in counts]
    if have < total:
        raise ModelError(
            f"only {have} of {total} visual tokens are in this forward",
            "prefill in one piece: leave prefill_chunk_size unset",
        )
    repeat = have // total
    if have % total or len(counts) % repeat:
        return None
    shared: list[list[Grid]] = []
    left = list(grids)
    for count in counts[::repeat]:
        row: list[Grid] = []
        while left and sum(len(grid) for grid in row) < count:
            row.append(left.pop(0))
        if sum(len(grid) for grid in row) != count:
            return None
        shared += [row] * repeat
    return shared if [sum(len(g) for g in row) for row in shared] == counts else None


def _runs(columns: torch.Tensor) -> list[Grid]:
    """Return one flat grid for every unbroken run of placeholders."""
    if not len(columns):
        return []
    breaks = (columns.diff() > 1).nonzero().squeeze(1) + 1
    lengths = torch.cat([breaks, torch.tensor([len(columns)])]).diff(prepend=torch.tensor([0]))
    return [box(1, 1, int(length)) for length in lengths]
