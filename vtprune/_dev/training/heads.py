"""Heads that training needs and throws away: on the tower's patches, on the decoder's middle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtprune._dev.training.architecture import HintProbe
from vtprune._dev.training.batches import Batch
from vtprune._dev.training.hints import IGNORED


class Hints(nn.Module):
    """Heads on the decoder's states in the middle: what `hints` says of names and visual tokens.

    Args:
        start: the position of the first visual token.
    """

    def __init__(self, width: int, start: int, probes: Sequence[HintProbe]) -> None:
        super().__init__()
        self.start, self.probes = start, probes
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in probes)
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, size) for size in probe.classes) for probe in probes
        )
        self.states: dict[int, Tensor] = {}

    def watch(self, number: int, states: Tensor) -> None:
        """Keep what comes out of the layers that are asked."""
        if any(probe.layer == number for probe in self.probes):
            self.states[number] = states

    def loss(self, batch: Batch) -> tuple[Tensor, list[float]]:
        """The mean loss of the heads that a batch has labels for, and each head's share of right.

        What was watched is forgotten.
        """
        marks, names = torch.from_numpy(batch.marks), torch.from_numpy(batch.names).flatten(1, 2)
        losses, right = [], []
        for probe, norm, heads in zip(self.probes, self.norms, self.heads, strict=True):
            assert isinstance(heads, nn.ModuleList)
            states = self.states[probe.layer]
            if probe.at == "tokens":
                labels, states = marks, states[:, self.start : self.start + marks.shape[1]]
            else:
                labels, states = names, states[:, -names.shape[1] :]
            for i, head in enumerate(heads):
                label = labels[..., probe.first + i].to(states.device)
                wanted = label != IGNORED
                if not wanted.any():
                    right.append(-1.0)
                    continue
                logits = head(norm(states[wanted].float())).float()
                losses.append(F.cross_entropy(logits, label[wanted]))
                right.append(round(float((logits.argmax(-1) == label[wanted]).float().mean()), 3))
        self.states = {}
        return torch.stack(losses).mean(), right


class Dense(nn.Module):
    """Heads on what a tower makes: what `labels` says of each patch, and what an architecture adds.

    Args:
        sizes: the classes of each head.
        copies: how many patches a state speaks for.
    """

    def __init__(self, width: int, sizes: Sequence[int], copies: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.copies = copies
        self.heads = nn.ModuleList(nn.Linear(width, size * copies) for size in sizes)

    def forward(self, states: Tensor) -> list[Tensor]:
        """Logits (states, copies, classes) of each head."""
        states = self.norm(states).flatten(0, -2)
        return [head(states).unflatten(-1, (self.copies, -1)) for head in self.heads]


def weigh_labels(
    logits: Sequence[Tensor], labels: Sequence[Tensor], gains: Sequence[float | None]
) -> tuple[Tensor, list[float]]:
    """The loss of dense labels and, for each head, the share of its patches that are right.

    Patches that show something weigh as much as all the ground together: `gains` says by how much
    more. A head without a gain has labels that are never "nothing".
    """
    losses, right = [], []
    for head, label, gain in zip(logits, labels, gains, strict=True):
        label = label.to(head.device).flatten()
        shown = label > 0 if gain is not None else torch.ones_like(label, dtype=torch.bool)
        flat = head.float().flatten(0, -2)
        loss = F.cross_entropy(flat, label, reduction="none")
        losses.append((loss * (0.3 + (gain or 0.0) * shown)).mean())
        hits = (flat.argmax(-1) == label) & shown
        right.append(round(float(hits.sum() / shown.sum().clamp(min=1)), 4))
    return torch.stack(losses).sum(), right
