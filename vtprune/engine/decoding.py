"""Cuts of the KV cache while an answer is decoded: the visual tokens attended to least go.

Each layer leaves a share of the visual tokens that it holds. Layers that hold the same tokens leave
the same ones: those that received most attention from the answer's tokens since the last cut, read
in a few of these layers. What goes is gone for the rest of the conversation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from vtprune.device import Duration, mark, send
from vtprune.engine.attention_mask import attended
from vtprune.engine.hooks import Hooks
from vtprune.engine.kv_cache import AnswerReadings, PrunedCache, cache_length
from vtprune.engine.packing import pack
from vtprune.engine.readings import KernelCall, KernelTap, read_heads
from vtprune.engine.trace import DecodeCut
from vtprune.errors import ModelError
from vtprune.models.seams import can_drop_keys, drop_keys, layer_length, stored_keys
from vtprune.models.structure import Structure
from vtprune.preset.spec import DecodeSpec
from vtprune.tokens.schedule import SLACK, fixed_count

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

READ_EVERY = 8
"""Of so many layers that hold the same tokens, the attention of one is read, the last one first."""


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Layers whose caches hold keys of the same tokens.

    Args:
        columns: (B, n) of the keys that were noted last; keys since then are of text.
        stored: keys that they have in memory, the last ones.
    """

    layers: tuple[int, ...]
    columns: torch.Tensor
    stored: int

    @property
    def read(self) -> tuple[int, ...]:
        """The layers whose attention is read."""
        return self.layers[::-READ_EVERY]


def layer_groups(pruned: PrunedCache, cache: Cache, structure: Structure) -> list[LayerGroup]:
    """Return the layers of a cache that have keys of their own, by the tokens that they hold."""
    members: dict[tuple[int, int], list[int]] = {}
    for layer, memory in enumerate(structure.memories):
        if memory.keys and structure.key_layers[layer] == layer:
            stored = stored_keys(cache.layers[layer])
            members.setdefault((id(pruned.key_columns[layer]), stored), []).append(layer)
    return [
        LayerGroup(tuple(layers), pruned.key_columns[layers[0]], stored)
        for (_, stored), layers in members.items()
    ]


def refuse_cache(structure: Structure, cache: Cache) -> None:
    """Refuse a cache that can't be cut while decoding.

    Raises:
        ModelError: a layer of it holds more of a token than its key and value.
    """
    for layer, memory in enumerate(structure.memories):
        if not memory.keys or structure.key_layers[layer] != layer:
            continue
        cached = cache.layers[layer]
        if memory.index or not can_drop_keys(cached):
            why = (
                "quantised keys would be quantised anew, to other values"
                if "Quantized" in type(cached).__name__
                else "it holds more of a token than its key and value"
            )
            raise ModelError(
                f"decode: layer {layer} of the cache is a {type(cached).__name__}, which can't be "
                f"cut while decoding: {why}",
                "use a dynamic or static cache, or leave out decode",
            )


# -- reading ---------------------------------------------------------------------------------------


class DecodeStep:
    """One decoded token on a cache that is cut while decoding: the attention that it gives.

    Args:
        pruned: of the cache, with readings.
        cache: before the step.
    """

    def __init__(self, pruned: PrunedCache, cache: Cache, structure: Structure) -> None:
        assert pruned.decoding is not None
        self.readings, self.structure = pruned.decoding, structure
        groups = layer_groups(pruned, cache, structure)
        self.noted = {layer: group.columns.shape[1] for group in groups for layer in group.read}
        self.lengths = {layer: layer_length(cache, layer) + 1 for layer in self.noted}

    def attach(self, hooks: Hooks) -> None:
        """Put on what reads attention during the step.

        Raises:
            ModelError: attention can't be read.
        """
        for layer in self.noted:
            module = self.structure.attention_module(layer)
            tap = KernelTap(module, functools.partial(self.take, layer))
            hooks.replace_during(module, tap.registry, "get_interface", tap.get_interface)

    def take(self, layer: int, call: KernelCall) -> None:
        """Add the attention that the keys known since the last cut received in one layer."""
        device = self.structure.device
        started = mark(device)
        with torch.no_grad():
            row = last_rows(call)  # (B, W)
            noted, width = self.noted[layer], row.shape[1]
            first = max(self.lengths[layer] - width, 0)  # a window: the last keys alone
            sums = self.readings.sums
            if layer not in sums:
                sums[layer] = row.new_zeros(len(row), noted)
            if first < noted:
                sums[layer][:, first:] += row[:, : noted - first]
        self.readings.reading += Duration.since(started, device)

    def end(self, output: object) -> None:
        """Count the token; a forward that raised (no output) decoded none.

        Raises:
            ModelError: the attention of a layer was not read.
        """
        if output is None:
            return
        if missed := [layer for layer in self.noted if layer not in self.readings.sums]:
            raise ModelError(
                f"decode: the attention of layer {missed[0]} can't be read: its layers are not "
                "called as modules (compiled?)",
                "leave the model uncompiled, or leave out decode",
            )
        self.readings.steps += 1
        self.readings.since += 1


def last_rows(call: KernelCall) -> torch.Tensor:
    """Return (B, W) float32 attention of every sample's last query, mean over heads."""
    width, mask = call.key.shape[2], call.mask
    seen = None
    if mask is not None:
        seen = attended(mask[:, :, -1, :width]).any(1) if mask.dim() == 4 else mask.bool()
    bias = None if call.bias is None else call.bias[:, :, -1, :width]
    return read_heads(call.query[:, :, -1], call.key, call.scale, seen, bias)


# -- cutting ---------------------------------------------------------------------------------------


def cut_cache(
    pruned: PrunedCache, cache: Cache, structure: Structure, spec: DecodeSpec, for_turns: float
) -> PrunedCache:
    """Cut a cache and tie to it what is left; return that.

    Args:
        for_turns: share of what each layer leaves that is chosen evenly over its visual tokens, by
            no attention.
    """
    readings = pruned.decoding
    assert readings is not None
    started, total = mark(structure.device), cache_length(cache)
    columns, valid = list(pruned.key_columns), list(pruned.valid)
    groups = layer_groups(pruned, cache, structure)
    received = read_sums(readings, groups)
    for group, sums in zip(groups, received, strict=True):
        cut_group(group, sums, pruned, cache, structure, spec, for_turns, total, (columns, valid))
    lengths = [layer_length(cache, source) for source in structure.key_layers]
    with_keys = [n for n, memory in enumerate(structure.memories) if memory.keys]
    base = structure.first_with_keys
    unlike = [n for n in with_keys
              if lengths[n] != lengths[base] or not _equal(valid[n], valid[base])]  # fmt: skip
    if pruned.first_cut is not None:
        unlike.append(pruned.first_cut)
    after = replace(
        pruned,
        columns=total,
        lengths=tuple(lengths),
        valid=valid,
        key_columns=columns,
        first_cut=min(unlike, default=None),
        offset=total - lengths[base],
    )
    # Their keys are noted anew, in slots of their own.
    readings.sums, readings.since = {}, 0
    after.tie_in_block(cache, structure)
    duration = readings.reading + Duration.since(started, structure.device)
    readings.reading = Duration()
    left = tuple(
        after.columns_in(n, len(readings.visual), total, length)
        if structure.memories[n].keys
        else columns[n]
        for n, length in enumerate(lengths)
    )
    visual = count_visual(readings, left)
    readings.cuts.append(DecodeCut(readings.steps, left, visual, duration))
    return after


def read_sums(readings: AnswerReadings, groups: Sequence[LayerGroup]) -> list[torch.Tensor | None]:
    """Return the attention that the keys of each group received, (B, n), on the CPU.

    Those of all groups are read from the device at once; None where nothing was noted.
    """
    totals: list[torch.Tensor | None] = []
    for group in groups:
        sums = [readings.sums[layer] for layer in group.read if layer in readings.sums]
        total = sums[0] if sums else None
        for other in sums[1:]:
            assert total is not None
            total = total + send(other, total.device)
        totals.append(total)
    noted = [total for total in totals if total is not None]
    if not noted:
        return totals
    flat = torch.cat([send(total.flatten(), noted[0].device) for total in noted]).cpu()
    parts = iter(flat.split([total.numel() for total in noted]))
    return [None if total is None else next(parts).view(total.shape) for total in totals]


def cut_group(
    group: LayerGroup,
    received: torch.Tensor | None,
    pruned: PrunedCache,
    cache: Cache,
    structure: Structure,
    spec: DecodeSpec,
    for_turns: float,
    total: int,
    noted: tuple[list[torch.Tensor], list[torch.Tensor | None]],
) -> None:
    """Cut the layers of a group, and those that see their keys.

    Args:
        received: (B, n) attention that its keys received, on the CPU; None: none was noted.
        total: columns that the cache stands for.
        noted: for every layer the columns of its keys, and which of them are valid; changed.
    """
    readings, layer = pruned.decoding, group.layers[0]
    assert readings is not None
    batch, known = group.columns.shape
    length = layer_length(cache, layer)
    first = length - group.stored  # keys before it have left the window
    held = pruned.columns_in(layer, batch, total, length)[:, first:]
    visual = torch.stack(
        [torch.isin(row, columns) for row, columns in zip(held, readings.visual, strict=True)]
    )
    scores = torch.zeros(batch, held.shape[1])
    if received is not None and first < known:
        scores[:, : known - first] = received[:, first:]
    kept = choose(scores, visual, spec.keep, for_turns)
    if torch.equal(kept, visual):
        return
    stays = (held >= 0) & (kept | ~visual)
    packed = pack([row.nonzero().squeeze(1) for row in stays])
    after_cut: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for other, source in enumerate(structure.key_layers):
        if source not in group.layers or not structure.memories[other].keys:
            continue
        if other == source:
            drop_keys(cache.layers[other], packed.index)
        key = id(pruned.key_columns[other])
        if key not in after_cut:
            seen = pruned.columns_in(other, batch, total, length)[:, first:]
            left = seen.gather(1, packed.index)
            if packed.valid is not None:
                left = left.masked_fill(~packed.valid, -1)
            all_valid = bool((left >= 0).all())
            after_cut[key] = left, None if all_valid else left >= 0
        noted[0][other], noted[1][other] = after_cut[key]


def choose(
    scores: torch.Tensor, candidates: torch.Tensor, keep: float, for_turns: float = 0.0
) -> torch.Tensor:
    """Return which candidates stay, (B, n) bool: of every row the share `keep`, at least 1.

    Args:
        scores: (B, n), higher stays first; of equal ones the earlier.
        candidates: (B, n) bool.
        for_turns: share of those that is evenly spaced over the candidates; the rest by score.
    """
    number = candidates.sum(1, keepdim=True)
    counts = [[fixed_count(keep, total)] for (total,) in number.tolist()]
    count = torch.tensor(counts)  # (B, 1)
    spaced = torch.tensor([[math.floor(for_turns * most + SLACK)] for (most,) in counts])
    place = candidates.long().cumsum(1) - 1
    divisor = number.clamp_min(1)
    even = ((place + 1) * spaced).div(divisor, rounding_mode="floor") > (place * spaced).div(
        divisor, rounding_mode="floor"
    )
    ranked = scores.masked_fill(even, torch.inf).masked_fill(~candidates, -torch.inf)
    rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return candidates & (rank < count)


def count_visual(readings: AnswerReadings, columns: Sequence[torch.Tensor]) -> list[list[int]]:
    """Return for every sample its visual tokens among the keys of each layer."""
    counts: dict[int, list[int]] = {}
    for layer in columns:
        if id(layer) not in counts:
            rows = zip(layer, readings.visual, strict=True)
            counts[id(layer)] = [int(torch.isin(row, visual).sum()) for row, visual in rows]
    samples = range(len(readings.visual))
    return [[counts[id(layer)][sample] for layer in columns] for sample in samples]


def _equal(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first is second or torch.equal(first, second)
