"""The position ids of tokens in a shortened sequence, and the position embeddings made of them.

Kept tokens keep their position ids, unless a stage says `positions: renumber`. Transformers (5.17
to 5.24) derives position ids from the cache's length only where a caller gives none; generation
counts them on from the prompt, so most forwards bring the original ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from vtprune.device import send
from vtprune.engine.hooks import Hooks
from vtprune.engine.late_checks import LateChecks
from vtprune.engine.packing import Packed
from vtprune.errors import ModelError
from vtprune.models.seams import PLACING, ROPE_DELTAS, unknown
from vtprune.models.structure import Structure

_PLACING = threading.RLock()
"""Held while a model places tokens: blocks that are open at once wait for each other."""


def given_position_ids(
    given: Mapping[str, object], past: int, embeds: torch.Tensor
) -> torch.Tensor:
    """Return a decoder's position ids, or those that it would count itself: (..., B or 1, S).

    Args:
        past: columns of the original prompts before these tokens.
        embeds: (B, S, d) of the tokens.
    """
    positions = given.get("position_ids")
    if isinstance(positions, torch.Tensor):
        return positions
    return torch.arange(past, past + embeds.shape[1], device=embeds.device)[None]


def first_and_end(positions: torch.Tensor, columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return every sample's first position id, and the one after its last: (B, 2) int64.

    Args:
        positions: (B or 1, S).
        columns: for every sample those that hold a token.
    """
    rows, positions = [], positions.cpu()
    for sample, row in enumerate(columns):
        ids = positions[min(sample, len(positions) - 1)]
        rows.append([int(ids[row[0]]), int(ids[row[-1]]) + 1])
    return torch.tensor(rows)


def renumber(first_end: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Return position ids without gaps, (B, n), and by how much the one after the last falls, (B,).

    Args:
        first_end: as `first_and_end` gives it, of the original prompts.
        packed: what is left of them.
    """
    lengths = torch.tensor([len(row) for row in packed.columns])
    slots = torch.arange(packed.length)[None] - (packed.length - lengths)[:, None]
    first, end = first_end[:, 0], first_end[:, 1]
    return first[:, None] + slots.clamp_min(0), end - (first + lengths)


def renumbered_embeddings(
    structure: Structure,
    layer: int,
    hidden: torch.Tensor,
    given: Mapping[str, object],
    positions: torch.Tensor,
    late: LateChecks,
) -> object:
    """Return a layer's position embeddings for new position ids.

    Args:
        given: the layer's arguments, made for the sequence before the cut.
        positions: (B, n) the new ids.
        late: of the block; the way that they are made is checked there.

    Raises:
        ModelError: its position embeddings are made in a way that is not known.
    """
    ids, rows = given.get("position_ids"), hidden.shape[-2]
    positions = positions[:, -rows:]  # decoders may go on with the last tokens alone
    if isinstance(ids, torch.Tensor):  # check that the way that is known gives what it was given
        expected = given["position_embeddings"]
        part = expected[0] if isinstance(expected, tuple) else expected
        ids = ids[..., -part.shape[-2] :] if isinstance(part, torch.Tensor) else ids
        known = structure.rotary(layer, hidden, ids) if ids.dim() == 2 else None

        def check(same: torch.Tensor) -> None:
            if not same:
                raise ModelError(
                    f"positions: renumber: layer {layer} of {structure.model_type} takes position "
                    "embeddings that vtprune can't make",
                    "leave positions: keep",
                )

        late.begin(_are_same(known, expected), check)
    return structure.rotary(layer, hidden, positions)


def _are_same(first: object, second: object) -> torch.Tensor:
    """Return whether two position embeddings, tensors or tuples of them, are the same: () bool."""
    if isinstance(first, tuple) and isinstance(second, tuple) and len(first) == len(second):
        return torch.stack([_are_same(*pair) for pair in zip(first, second, strict=True)]).all()
    if (
        isinstance(first, torch.Tensor)
        and isinstance(second, torch.Tensor)
        and first.shape[-2:] == second.shape[-2:]
    ):
        return (first.expand_as(second) == second).all()
    return torch.tensor(False)


def refuse_inside_prompt(positions: torch.Tensor, last: torch.Tensor, late: LateChecks) -> None:
    """Refuse new tokens that are placed inside the prompt, as by the length of a shorter cache.

    Args:
        positions: (..., B or 1, n) of the new tokens.
        last: (..., B or 1) of the last token of each prompt.
        late: of the block.
    """
    first = send(positions[..., 0], last.device)
    inside = first <= last
    inside = inside.reshape(-1, inside.shape[-1]).all(0).any()  # on every axis (mrope)

    def check(numbers: torch.Tensor) -> None:
        if numbers[0]:
            raise unknown(
                f"a new token after a pruned prompt is at position {int(numbers[1])}, inside the "
                "prompt"
            )

    late.begin(torch.stack([inside.long(), first.min().long()]), check)


class RopeDeltas(threading.local):
    """By how much the positions and columns of a thread's last prompt differ (mrope).

    Transformers (5.17 to 5.24) keeps it on the model, where further turns and hand-written decoding
    find it: the prompt of another thread would have replaced it. So every thread gets its own back.
    All threads' calls are watched, also where the block is about one thread's.

    Args:
        inner: the multimodal model.
    """

    def __init__(self, inner: nn.Module) -> None:
        self.inner = inner

    def attach(self, model: nn.Module, hooks: Hooks) -> None:
        """Watch the methods that read or write it.

        Args:
            model: `inner`, or what it is a part of.
            hooks: of all threads.
        """
        if not hasattr(self.inner, ROPE_DELTAS):
            return
        for module in model.modules():
            if module is self.inner or module._modules.get("model") is self.inner:
                for name in PLACING:
                    if hasattr(module, name):
                        hooks.replace(module, name, self.place)

    def place(self, original: Callable[..., object], *args: object, **kwargs: object) -> object:
        """Place tokens by the last prompt of the running thread."""
        with _PLACING:
            if hasattr(self, "deltas"):
                setattr(self.inner, ROPE_DELTAS, self.deltas)
            try:
                return original(*args, **kwargs)
            finally:
                self.deltas: object = getattr(self.inner, ROPE_DELTAS)
