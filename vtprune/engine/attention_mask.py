"""The attention masks of sequences that a cut shortened: gathered from given ones, or made anew."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vtprune.device import send
from vtprune.engine.packing import Packed
from vtprune.errors import ModelError
from vtprune.models.seams import make_mask, masks_choice
from vtprune.models.structure import Structure

# -- masks of a layer ----------------------------------------------------------------------------


def causal_mask(
    structure: Structure,
    layer: int,
    hidden: torch.Tensor,
    valid: torch.Tensor | None,
    cache: object,
) -> object:
    """Return a causal mask for one layer, in the form that the model's attention takes.

    Args:
        hidden: (B, n, d) of this forward.
        valid: (B, past + n) bool of the layer's keys, None where all are valid.
        cache: sized by this layer's own length.
    """
    windowed = structure.windows[layer] is not None and not structure.is_chunked(layer)
    mask = None if valid is None else send(valid, hidden.device)
    always = masks_choice(structure.layers[layer])  # its index reads the mask
    return make_mask(windowed, structure.decoder_config, hidden, mask, cache, layer, always)


def mask_by_columns(
    structure: Structure,
    queries: torch.Tensor,
    keys: torch.Tensor,
    width: int,
    window: int | None,
    hidden: torch.Tensor,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return a mask by where tokens were in the original prompts, in the form of the attention.

    Args:
        queries: (B, n) original columns; -1 for padding.
        keys: (B, K) those of all keys that a layer has had, -1 for what it is not to see.
        width: keys that it holds: the last ones, or, where it is more than K, all and free slots.
        window, starts: as for `sees`.
        hidden: tells the device and the type of an added mask.

    Raises:
        ModelError: flash attention, which takes no mask a query, and more than one query.
    """
    keys = held_columns(keys, width)
    starts = None if starts is None else send(starts, hidden.device)
    seen = sees(
        send(queries, hidden.device), send(keys, hidden.device), window, starts
    )  # (B, n, W)
    if "flash" in structure.attention:
        if seen.shape[1] > 1:
            raise ModelError(
                f"{structure.attention} takes no mask a query, which this prompt needs in layers "
                "that see a window, or share keys that were dropped since",
                "load the model with attention sdpa or eager",
            )
        return seen[:, 0]
    if structure.attention == "sdpa":
        return seen[:, None]
    bias = hidden.new_zeros(seen.shape)
    return bias.masked_fill_(~seen, torch.finfo(bias.dtype).min)[:, None]


def held_columns(keys: torch.Tensor, width: int) -> torch.Tensor:
    """Return the columns, (B, width), of the keys that a layer holds, -1 for free slots.

    Args:
        keys: (B, K) of all that it has had, of which it may hold the last ones.
    """
    free = width - keys.shape[1]
    return torch.nn.functional.pad(keys, (0, free), value=-1) if free > 0 else keys[:, -width:]


def distances(queries: torch.Tensor, keys: torch.Tensor, width: int) -> torch.Tensor:
    """Return how far keys are before queries, (B, 1, n, width), in original columns.

    Args:
        queries: (B, n).
        keys: (B, K) as for `held_columns`.
    """
    return queries[:, None, :, None] - held_columns(keys, width)[:, None, None, :]


def sees(
    queries: torch.Tensor,
    keys: torch.Tensor,
    window: int | None,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return which queries see which keys, (B, n, K) bool, by their original columns.

    Args:
        queries: (B, n); -1 for padding.
        keys: (B, K), -1 for what is not to be seen.
        window: the columns that a query sees up to itself, dropped ones too; None: all.
        starts: (B,) where the first of the chunks begins that so many columns are, each of which
            sees itself alone; None: the window slides.
    """
    query, key = queries[:, :, None], keys[:, None, :]
    seen = (key >= 0) & (key <= query)
    if window is None:
        return seen
    if starts is None:
        return seen & (query - key < window)
    start = starts[:, None, None]
    return seen & ((query - start) // window == (key - start) // window)


def gather_mask(
    mask: torch.Tensor,
    rows: Packed,
    source: int,
    held: int,
    keys: Packed | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the rows and columns of a prepared attention mask that are left after a cut.

    Args:
        mask: (B or 1, 1 or H, S, W), bool (True attends) or added to the scores; W is S, or more
            for a static cache. It may have fewer rows: the last ones, of which none was dropped.
        rows: what is left of the S tokens, as queries.
        source: S.
        held: keys that the layer sees after the cut: those left, or more for a static cache, whose
            further columns are masked. Of one with a window they can be fewer than W.
        keys: what is left of them as keys, (B, m); None: the same.
        valid: (B, m) bool, which of those are seen; None: all.
    """
    if keys is None:
        keys, valid = rows, rows.valid
    index = send(keys.index, mask.device)
    (batch, length), (_, heads, count, width) = index.shape, mask.shape
    mask = mask.expand(batch, heads, count, width)
    if count == source:
        count = rows.length
        row = send(rows.index, mask.device)[:, None, :, None]
        mask = mask.gather(2, row.expand(batch, heads, count, width))
    kept = mask[..., :source].gather(3, index[:, None, None, :].expand(batch, heads, count, length))
    masked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    if valid is not None:
        kept = kept.masked_fill(~send(valid, mask.device)[:, None, None, :], masked)
    if held > length:
        rest = kept.new_full((batch, heads, count, held - length), masked)
        kept = torch.cat([kept, rest], dim=3)
    return kept


# -- which keys hold a token ---------------------------------------------------------------------


def attended(mask: torch.Tensor) -> torch.Tensor:
    """Return where a prepared mask, bool or added to the scores, lets a query attend."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def read_prompts(
    ids: torch.Tensor, mask: object, past: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts and which of their columns hold a token, both (B, S), on the CPU.

    Both are read from the device at once.

    Args:
        ids: (B, S) int64.
        mask, past: as of `valid_columns`.
    """
    batch, length = ids.shape
    valid = valid_columns(mask, batch, length, past)
    if valid.device != ids.device:
        return ids.cpu(), valid.cpu()
    read = torch.stack([ids, valid.to(ids.dtype)]).cpu()
    return read[0], read[1].bool()


def valid_columns(mask: object, batch: int, length: int, past: int = 0) -> torch.Tensor:
    """Return which of the last `length` columns hold a token: (B, length) bool.

    Args:
        mask: as the caller gave it to the model: None, (B, past + length), a prepared 4-D mask,
            or a mapping of such by layer type, where a token sees itself and padding nothing.
        past: columns before them, in the cache.
    """
    mask = _of_full_layers(mask)
    if not isinstance(mask, torch.Tensor):
        return torch.ones(batch, length, dtype=torch.bool)
    if mask.dim() == 4:
        valid = attended(mask[:, 0, :, past : past + length].diagonal(dim1=1, dim2=2))
    else:
        valid = mask[:, -length:].bool()
    return valid.expand(batch, length)


def valid_past_columns(mask: object, past: int, length: int) -> torch.Tensor | None:
    """Return which of the cached columns hold a token: (B, past) bool on the CPU; None: all do.

    Args:
        mask: as for `valid_columns`; of a prepared one, what the last token sees. One of the new
            columns alone tells nothing of those in the cache.
        length: of the new columns.
    """
    mask = _of_full_layers(mask)
    if not isinstance(mask, torch.Tensor) or mask.shape[-1] == length:
        return None
    valid = attended(mask[:, 0, -1, :past]) if mask.dim() == 4 else mask[:, :past].bool()
    valid = valid.cpu()
    return None if bool(valid.all()) else valid.clone()


def _of_full_layers(mask: object) -> object:
    """Return the mask of the layers that see everything, of a mapping by layer type."""
    if not isinstance(mask, Mapping):
        return mask
    full = [of_type for name, of_type in mask.items() if "full" in str(name)]
    return next((of_type for of_type in [*full, *mask.values()] if of_type is not None), None)


def join_valid(
    past: torch.Tensor | None, past_length: int, new: torch.Tensor | None, shape: tuple[int, int]
) -> torch.Tensor | None:
    """Return which keys of a layer are valid, (B, past_length + n); None where all are.

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
    return torch.cat([past, since, send(new, past.device)], dim=1)
