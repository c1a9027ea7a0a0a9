"""Heads that training needs and throws away: on the tower's patches, on the decoder's middle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtprune._dev.training.architecture import AttentionHint, HintProbe
from vtprune._dev.training.batches import Batch
from vtprune._dev.training.hints import IGNORED, THING
from vtprune._dev.training.packed import Seen, attention_to_prefix


class Hints(nn.Module):
    """Heads on the decoder's states in the middle: what `hints` says of names and visual tokens.

    Args:
        start: the position of the first visual token.
        attention_hints: the heads of attention that are told where to look.
    """

    def __init__(
        self,
        width: int,
        start: int,
        probes: Sequence[HintProbe],
        attention_hints: Sequence[AttentionHint],
    ) -> None:
        super().__init__()
        self.start, self.probes, self.attention_hints = start, probes, attention_hints
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in probes)
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, size) for size in probe.classes) for probe in probes
        )
        self.states: dict[int, Tensor] = {}
        self.seen: Seen | None = None

    def watch(self, number: int, states: Tensor, seen: Seen) -> None:
        """Keep what goes into the layers that are asked."""
        asked = {probe.layer + 1 for probe in self.probes} | {
            hint.layer for hint in self.attention_hints
        }
        if number in asked:
            self.states[number] = states
        self.seen = seen

    def loss(self, batch: Batch, layers: Sequence[nn.Module]) -> tuple[Tensor, list[float]]:
        """The loss of all hints, and each head's share of right.

        Each probe adds the mean loss of its heads that a batch has labels for. The hints to
        attention add their mean loss, and to the shares how much of it is where it should be. What
        was watched is forgotten.

        Args:
            layers: the decoder's.
        """
        marks, names = torch.from_numpy(batch.marks), torch.from_numpy(batch.names).flatten(1, 2)
        total, right = torch.zeros(()), list[float]()
        for probe, norm, heads in zip(self.probes, self.norms, self.heads, strict=True):
            assert isinstance(heads, nn.ModuleList)
            losses = []
            states = self.states[probe.layer + 1]
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
            if losses:
                total = total.to(states.device) + torch.stack(losses).mean()
        named = torch.from_numpy(batch.names[..., THING])
        for hint in self.attention_hints:
            loss, share = self._aim(hint, layers[hint.layer], marks, named)
            total = total + loss / len(self.attention_hints)
            right.append(round(share, 3))
        self.states, self.seen = {}, None
        return total, right

    def _aim(
        self, hint: AttentionHint, layer: nn.Module, marks: Tensor, names: Tensor
    ) -> tuple[Tensor, float]:
        """The loss of one hint to attention, and the share of it that is where it should be."""
        states = self.states[hint.layer]
        assert self.seen is not None
        names, things = names.to(states.device), marks[..., hint.column].to(states.device)
        aimed = things[:, None, None] == names[..., None]  # (B, R, L, N)
        asked = (names != IGNORED) & aimed.any(-1)
        if not asked.any():
            return states.new_zeros(()), -1.0
        logs = attention_to_prefix(states, layer, self.seen, hint.key_head, asked)
        logs = logs[..., self.start : self.start + things.shape[1]]
        of = logs.masked_fill(~aimed[asked][:, None], -torch.inf).logsumexp(-1)
        return -of.mean(), float(of.detach().exp().mean())


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
