"""Rows of different length as one left-padded batch: which columns stay, and their masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Packed:
    """B sequences packed to the right, padded on the left.

    Args:
        columns: for each row its (n_b,) int64 ascending columns of the batch it was cut from.
        index: (B, n) int64 column in every slot; 0 in a padding slot.
        valid: (B, n) bool, False in padding slots; None where there are none.
    """

    columns: tuple[torch.Tensor, ...]
    index: torch.Tensor
    valid: torch.Tensor | None

    @property
    def length(self) -> int:
        return int(self.index.shape[1])


def pack(columns: Sequence[torch.Tensor]) -> Packed:
    """Packs the rows' columns, each (n_b,) int64 ascending, to the longest row."""
    length = max(len(row) for row in columns)
    if all(len(row) == length for row in columns):
        return Packed(tuple(columns), torch.stack(list(columns)), None)
    index = torch.zeros(len(columns), length, dtype=torch.long)
    valid = torch.zeros(len(columns), length, dtype=torch.bool)
    for number, row in enumerate(columns):
        index[number, length - len(row) :] = row
        valid[number, length - len(row) :] = True
    return Packed(tuple(columns), index, valid)


def repack(before: Packed, after: Packed) -> Packed:
    """`after` with its columns counted in the slots of `before`, which holds them all."""
    columns, index = [], torch.zeros_like(after.index)
    for number, (old, new) in enumerate(zip(before.columns, after.columns, strict=True)):
        row = torch.searchsorted(old, new) + before.length - len(old)
        columns.append(row)
        index[number, after.length - len(row) :] = row
    return Packed(tuple(columns), index, after.valid)


def gather(states: torch.Tensor, index: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Takes the slots `index`, (B, n), along `dim`; the dimension before it is B, or 1."""
    index = index.to(states.device, non_blocking=True)
    shape = list(states.shape)
    shape[dim - 1] = index.shape[0]
    states = states.expand(shape)
    shape[dim] = index.shape[1]
    around = [1] * states.dim()
    around[dim - 1], around[dim] = index.shape
    return states.gather(dim, index.view(around).expand(shape))


def gather_marked(
    marked: torch.Tensor, rows: torch.Tensor, packed: Packed
) -> tuple[torch.Tensor, torch.Tensor]:
    """The marked columns that are left after a cut, and their rows.

    Args:
        marked: (B, S) bool.
        rows: (V, d), one for each marked column, sample by sample.
        packed: what is left of the S columns.
    """
    index = packed.index.to(marked.device)
    number = (marked.flatten().cumsum(0) - 1).view_as(marked)  # (B, S) row of a marked column
    left = marked.gather(1, index)
    if packed.valid is not None:
        left &= packed.valid.to(marked.device)
    return left, rows[number.gather(1, index)[left].to(rows.device)]


def gather_mask(mask: object, packed: Packed) -> object:
    """The rows and columns of a prepared attention mask that are left after a cut.

    Args:
        mask: (B or 1, 1 or H, S, W), bool (True attends) or added to the scores; W is S, or more
            for a static cache, whose further columns stay masked. (B, S) for flash attention,
            None where all is seen, or a mapping of such by layer type.
        packed: what is left of the S columns.
    """
    if isinstance(mask, Mapping):
        return {name: gather_mask(one, packed) for name, one in mask.items()}
    if not isinstance(mask, torch.Tensor) or mask.dim() == 2:
        return packed.valid
    index = packed.index.to(mask.device)
    batch, length = index.shape
    _, heads, source, width = mask.shape
    mask = mask.expand(batch, heads, source, width)
    mask = mask.gather(2, index[:, None, :, None].expand(batch, heads, length, width))
    kept = mask[..., :source].gather(
        3, index[:, None, None, :].expand(batch, heads, length, length)
    )
    masked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    if packed.valid is not None:
        valid = packed.valid.to(mask.device)
        kept = kept.masked_fill(~valid[:, None, None, :], masked)
    if width > source:
        rest = kept.new_full((batch, heads, length, width - length), masked)
        kept = torch.cat([kept, rest], dim=3)
    return kept


def valid_columns(mask: object, batch: int, length: int, past: int = 0) -> torch.Tensor:
    """(B, length) bool on the CPU: which of the last `length` columns hold a token.

    Args:
        mask: as the caller gave it to the model: None, (B, past + length), a prepared 4-D mask,
            or a mapping of such by layer type, where a token sees itself and padding nothing.
        past: columns before them, in the cache.
    """
    mask = _of_full_layers(mask)
    if not isinstance(mask, torch.Tensor):
        return torch.ones(batch, length, dtype=torch.bool)
    if mask.dim() == 4:
        own = mask[:, 0, :, past : past + length].diagonal(dim1=1, dim2=2)
        seen = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
    else:
        seen = mask[:, -length:].bool()
    return seen.cpu().expand(batch, length)


def past_columns(mask: object, past: int) -> torch.Tensor | None:
    """(B, past) bool on the CPU: which of the cached columns hold a token; None where all do.

    Args:
        mask: as for `valid_columns`; of a prepared one, what the last token sees.
    """
    mask = _of_full_layers(mask)
    if not isinstance(mask, torch.Tensor):
        return None
    if mask.dim() == 4:
        own = mask[:, 0, -1, :past]
        seen = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
    else:
        seen = mask[:, :past].bool()
    seen = seen.cpu()
    return None if bool(seen.all()) else seen.clone()


def _of_full_layers(mask: object) -> object:
    """The mask of the layers that see everything, of a mapping by layer type."""
    if not isinstance(mask, Mapping):
        return mask
    whole = [one for name, one in mask.items() if "full" in str(name)]
    return next((one for one in [*whole, *mask.values()] if one is not None), None)


def join_valid(
    past: torch.Tensor | None, past_length: int, new: torch.Tensor | None, shape: tuple[int, int]
) -> torch.Tensor | None:
    """Validity of the keys of a layer, (B, past_length + n); None where all are valid.

    Args:
        past: (B, m) of the first keys in the cache, None where all are valid; keys that came
            after them, as in decoding, are valid.
        new: (B, n) of this forward's tokens, None where all are valid.
        shape: (B, n).
    """
    if past is None and new is None:
        return None
    if past is None:
        past = torch.ones(shape[0], past_length, dtype=torch.bool)
    if new is None:
        new = torch.ones(shape, dtype=torch.bool)
    past = past[:, :past_length]
    since = torch.ones(shape[0], past_length - past.shape[1], dtype=torch.bool, device=past.device)
    return torch.cat([past, since, new.to(past.device)], dim=1)
