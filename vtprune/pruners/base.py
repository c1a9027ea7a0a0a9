"""The input and the output of a pruning method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch

from vtprune.device import send
from vtprune.errors import ModelError
from vtprune.tokens.layout import Layout
from vtprune.tokens.quotas import quotas, weighted_quotas
from vtprune.tokens.units import Units

PROJECTED = ("query", "key", "value")
"""States that attention makes of the hidden ones."""
STATES = (*PROJECTED, "hidden", "normed", "previous")
"""States of the visual tokens that a method can read; with "text_" before them, those of the text
tokens that follow the last visual token: the question, and what the chat template adds to it."""
ATTENTION = ("attention", "text_attention", "text_attention_by_head")
"""Attention of the layer before the cut, mean over heads: from the prompt's last token, and from
every text token that follows the last visual token; and of these head by head."""
ROTARY = ("rotary", "text_rotary")
"""What rotary positions alone say in the layer before the cut: rows of the visual tokens and of the
text tokens that follow them, whose products are the scores of queries and keys of ones."""
LAYER_BEFORE = (*ATTENTION, *ROTARY, "previous", "text_previous")
"""What only a layer before the cut gives: a method that reads it can't cut at the input."""
TOWER = (
    "tower_attention",
    "tower_mean_attention",
    "tower_middle_attention",
    "tower_early_attention",
)
"""Attention that each token's patches receive in the vision tower, as a multiple of what they would
receive if it went to all of their frame or tile alike: in its last layer from the CLS token, from
all patches in the mean where there is none; there from all in the mean; so in the layer that ends
9/24 down the tower; and as the first in the one that ends 6/24 down."""


def depends_on_question(needs: Iterable[str]) -> bool:
    """Return whether states of these names depend on the text after the visual tokens."""
    return any(name in ATTENTION or name.startswith("text_") for name in needs)


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The N visual tokens of one sample, just before a cut.

    Args:
        layout: where they sit, on the CPU.
        states: only those that the method needs: "query", "key", "value" -> (N, H, D) of the layer
            before the cut, without rotary positions, at the input those of layer 0; "hidden" ->
            (N, H, D) states that enter the layer of the cut, in as many parts as query heads;
            "normed" -> those after the language model's final norm, weights included; "previous" ->
            those that enter the layer before, not at the input; "text_query"
            and so on -> (M, H, D) likewise; "attention" -> (N,), "text_attention" -> (M, N) and
            "text_attention_by_head" -> (M, H, N) probabilities, "rotary" -> (N, R) and
            "text_rotary" -> (M, R), "tower_attention" and so on -> (N,), all float32.
        seed: of the preset and stage: the same in every row of a batch.
        stage: how many stages of the same schedule cut before this one.
    """

    layout: Layout
    states: Mapping[str, torch.Tensor] = field(default_factory=dict)
    seed: int = 0
    stage: int = 0

    def __len__(self) -> int:
        return len(self.layout)


@dataclass(frozen=True, eq=False)
class Budget:
    """The number of tokens to keep in each group.

    Args:
        group: (N,) int64 group of each token, from 0.
        quota: (G,) int64 tokens to keep in each group; none is larger than its group.
        total: their sum, where they are on a device that is not to be read; None: they are not.
    """

    group: torch.Tensor
    quota: torch.Tensor
    total: int | None = None

    @property
    def count(self) -> int:
        return int(self.quota.sum()) if self.total is None else self.total

    @classmethod
    def share(cls, count: int, group: torch.Tensor) -> Budget:
        """Share `count` tokens equally over the groups of `group`, (N,) int64."""
        sizes = torch.bincount(group).tolist()
        return cls(group, torch.tensor(quotas(count, sizes), dtype=torch.long))

    @classmethod
    def share_by(
        cls, count: int, group: torch.Tensor, weights: Sequence[float], least: int
    ) -> Budget:
        """Share `count` tokens over the groups of `group` by `weights`, at least `least` each."""
        sizes = torch.bincount(group).tolist()
        shares = weighted_quotas(count, sizes, weights, least)
        return cls(group, torch.tensor(shares, dtype=torch.long))


@dataclass(frozen=True, eq=False)
class Selection:
    """The kept tokens, and those that are merged into them.

    Args:
        index: (K,) int64, ascending, into the N tokens.
        assign: (N,) int64, for every token the place in `index` of the kept token that it is merged
            into, -1 for none; a kept token is merged into itself. None: nothing is merged.
        weight: (N,) float, the share of every token in the one it is merged into; the shares of one
            kept token add up to 1.
        scores: (N,) float that the method ranked the tokens by, higher is kept first; None for
            methods that choose tokens together, or at random. Pruning does not read them.
    """

    index: torch.Tensor
    assign: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    scores: torch.Tensor | None = None


class Pruner(Protocol):
    """A method that selects tokens: tensors and a budget in, a selection out. Fields: options."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the states that `select` reads from `tokens.states`."""
        ...

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        """Keep exactly the budget's quota of every group; fewer where its registry entry says
        that it may (`exact=False`)."""
        ...


def merge(states: torch.Tensor, selection: Selection) -> torch.Tensor:
    """Return (K, d) states of the kept tokens, with others merged into them.

    The sums are made in float32.

    Args:
        states: (N, d) of all tokens.
    """
    kept = states[send(selection.index, states.device)]
    if selection.assign is None or selection.weight is None:
        return kept
    assign, weight = send(selection.assign, states.device), send(selection.weight, states.device)
    used = assign >= 0
    shares = states.float() * weight.float()[:, None]
    merged = torch.zeros_like(kept, dtype=torch.float32)
    merged.index_add_(0, assign.clamp_min(0), shares * used[:, None])
    return merged.to(states.dtype)


def checked(selection: Selection, values: torch.Tensor, method: str) -> Selection:
    """Return a selection with its index on the CPU; refuse NaN and infinity.

    Both are read from the device at once, so that the host waits for it no more than once.

    Raises:
        ModelError: there is some in `values`, which come from the model's states.
    """
    return replace(selection, index=read_checked(selection.index, values, method))


def read_checked(numbers: torch.Tensor, values: torch.Tensor, method: str) -> torch.Tensor:
    """Return (n,) numbers on the CPU; refuse NaN and infinity among other values.

    Raises:
        ModelError: as `checked`.
    """
    finite = send(values.isfinite().all(), numbers.device)
    read = torch.cat([numbers, finite.to(numbers.dtype)[None]]).cpu()
    if not read[-1]:
        raise ModelError(
            f"the model's states hold NaN or infinity, so {method} can't rank its tokens",
            "try --dtype float32 or bfloat16",
        )
    return read[:-1]


def merged_into(
    target: torch.Tensor, index: torch.Tensor, scores: torch.Tensor | None = None
) -> Selection:
    """Return a selection whose kept tokens are the means of those merged into them.

    Args:
        target: (N,) int64, the token that each is merged into, -1 for none; a kept one is its own.
        index: (K,) int64, ascending, the kept ones.
        scores: as of Selection.
    """
    used = target >= 0
    assign = torch.searchsorted(index, target.clamp_min(0))
    assign = torch.where(used, assign, -1)
    sizes = torch.zeros(len(index), device=target.device)
    sizes = sizes.index_add(0, assign.clamp_min(0), used.float())
    weight = torch.where(used, 1 / sizes[assign.clamp_min(0)], 0.0)
    return Selection(index, assign, weight, scores)


@runtime_checkable
class UnitPruner(Protocol):
    """A method that drops whole frames and tiles: pixels in, the numbers of the kept ones out."""

    def keep(self, units: Units) -> list[int]:
        """Return the kept units of one media item, ascending, its base among them."""
        ...

    def shrink(
        self,
        media: Sequence[Units],
        kept: Sequence[Sequence[int]],
        sizes: Sequence[Sequence[int]],
        most: int,
    ) -> list[list[int]]:
        """Return fewer of the units `kept` of each item, with at most `most` tokens.

        Where that can't be, the base of each is left.

        Args:
            media: the items of one prompt.
            sizes: tokens of every unit of each.
        """
        ...


@runtime_checkable
class PatchPruner(Protocol):
    """A method that drops patches before the vision tower: pixels in, a mask of the kept out."""

    def keep_patches(
        self,
        media: Sequence[Units],
        grids: Sequence[Sequence[tuple[int, int]]],
        sizes: Sequence[Sequence[int]],
        most: int | None,
    ) -> list[list[torch.Tensor]]:
        """Return for every unit of every item which of its patches stay, (R, C) bool.

        Args:
            media: the items of one prompt.
            grids: (R, C) of every unit of each; (1, 1) where its tokens go together.
            sizes: tokens of every unit of each.
            most: tokens that may stay, as far as that can be; None: as many as do.
        """
        ...


def best_first(scores: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return (N,) int64 tokens group by group, best-scored first; ties go to the earlier.

    Args:
        scores: (N,), finite.
        group: (N,) int64 group of each token, on the same device.
    """
    order = scores.argsort(descending=True, stable=True)
    return order[group[order].argsort(stable=True)]


def keep_best(scores: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Return the index, (K,) ascending, of each group's best-scored tokens; ties: the earlier.

    Args:
        scores: (N,) on any device, finite.
    """
    device = scores.device
    group, quota = (send(counts, device) for counts in (budget.group, budget.quota))
    order = best_first(scores, group)
    sizes = torch.zeros_like(quota).scatter_add_(0, group, torch.ones_like(group))
    first = sizes.cumsum(0) - sizes
    rank = torch.arange(len(order), device=device) - first[group[order]]
    kept = true_places(rank < quota[group[order]], budget.count)
    return order[kept].sort().values


def true_places(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Return (count,) int64 where a mask is True, ascending; nothing is read from the device.

    Args:
        mask: (n,) bool, True at `count` places.
    """
    return (~mask).byte().argsort(stable=True)[:count]


def select_best(scores: torch.Tensor, budget: Budget) -> Selection:
    """Return the selection of each group's best-scored tokens; ties: the earlier.

    Args:
        scores: (N,) on any device, finite.
    """
    return Selection(keep_best(scores, budget), scores=scores)
