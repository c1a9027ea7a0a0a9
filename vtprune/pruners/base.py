"""What a method is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from vtprune.layout import Layout
from vtprune.schedule import quotas

STATES = ("query", "key", "value", "hidden")


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The N visual tokens of one sample, just before a cut.

    Args:
        layout: where they sit, on the CPU.
        states: only those that the method needs: "query", "key", "value" -> (N, H, D) of the layer
            before the cut, without rotary positions, at the input those of layer 0; "hidden" ->
            (N, H, D) states that enter the layer of the cut, in as many parts as query heads.
        seed: of the preset and stage: the same in every row of a batch.
    """

    layout: Layout
    states: Mapping[str, torch.Tensor] = field(default_factory=dict)
    seed: int = 0

    def __len__(self) -> int:
        return len(self.layout)


@dataclass(frozen=True, eq=False)
class Budget:
    """How many tokens each group may keep.

    Args:
        group: (N,) int64 group of each token, from 0.
        quota: (G,) int64 tokens to keep in each group; none is larger than its group.
    """

    group: torch.Tensor
    quota: torch.Tensor

    @property
    def count(self) -> int:
        return int(self.quota.sum())

    @classmethod
    def share(cls, count: int, group: torch.Tensor) -> Budget:
        """`count` tokens shared equally over the groups of `group`, (N,) int64."""
        sizes = torch.bincount(group).tolist()
        return cls(group, torch.tensor(quotas(count, sizes), dtype=torch.long))


@dataclass(frozen=True, eq=False)
class Selection:
    """What a method keeps.

    Args:
        index: (K,) int64, ascending, into the N tokens.
    """

    index: torch.Tensor


class Pruner(Protocol):
    """One method: tensors and a budget in, a selection out. Its options are its fields."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of STATES that `select` reads from `tokens.states`."""
        ...

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        """Keeps exactly the budget's quota of every group."""
        ...


def keep_best(scores: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Index, (K,) ascending, of the best-scored tokens of each group; ties go to the earlier.

    Args:
        scores: (N,) on any device, finite.
    """
    device = scores.device
    group, quota = budget.group.to(device), budget.quota.to(device)
    order = scores.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]  # by group, best first
    sizes = torch.zeros_like(quota).scatter_add_(0, group, torch.ones_like(group))
    first = sizes.cumsum(0) - sizes
    rank = torch.arange(len(order), device=device) - first[group[order]]
    dropped = rank >= quota[group[order]]
    kept = dropped.argsort(stable=True)[: budget.count]
    return order[kept].sort().values
