"""Heads that training needs and throws away: on the tower's patches, on the decoder's middle."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaOnevisionForConditionalGeneration

from vtprune._dev.training.batches import Batch, TileBatch
from vtprune._dev.training.forward import normalise
from vtprune._dev.training.hints import IGNORED, NAME_CLASSES, TOKEN_CLASSES
from vtprune.demo.world import COLOURS, SHAPES

# The layers after which the hints are asked for, at visual tokens and at names.
TOKEN_LAYER, NAME_LAYER = 6, 9


class Hints(nn.Module):
    """Heads on the decoder's states in the middle: what `hints` says of names and visual tokens.

    Args:
        start: the position of the first visual token.
    """

    def __init__(self, width: int, start: int) -> None:
        super().__init__()
        self.start = start
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, size) for size in sizes)
            for sizes in (TOKEN_CLASSES, NAME_CLASSES)
        )
        self.states: list[Tensor] = []

    def watch(self, number: int, states: Tensor) -> None:
        """Keep what comes out of the two layers that are asked."""
        if number in (TOKEN_LAYER, NAME_LAYER):
            self.states.append(states)

    def loss(self, batch: Batch) -> tuple[Tensor, list[float]]:
        """The mean loss of the heads that a batch has labels for, and each head's share of right.

        What was watched is forgotten.
        """
        early, late = self.states
        self.states = []
        marks, names = torch.from_numpy(batch.marks), torch.from_numpy(batch.names).flatten(1, 2)
        asked = (early[:, self.start : self.start + marks.shape[1]], late[:, -names.shape[1] :])
        losses, right = [], []
        for norm, heads, states, labels in zip(
            self.norms, self.heads, asked, (marks, names), strict=True
        ):
            assert isinstance(heads, nn.ModuleList)
            for i, head in enumerate(heads):
                label = labels[..., i].to(states.device)
                wanted = label != IGNORED
                if not wanted.any():
                    right.append(-1.0)
                    continue
                logits = head(norm(states[wanted].float())).float()
                losses.append(F.cross_entropy(logits, label[wanted]))
                right.append(round(float((logits.argmax(-1) == label[wanted]).float().mean()), 3))
        return torch.stack(losses).mean(), right


class Dense(nn.Module):
    """Heads on the tower's patches: what `draw.labels` says of them, and each patch's own place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        sizes = (len(COLOURS) + 1, len(SHAPES) + 1, 11, 11, 3, 10, 64)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self, states: Tensor) -> list[Tensor]:
        states = self.norm(states)
        return [head(states) for head in self.heads]

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each head; the last one's 64 places as 8 rows and 8 columns."""
        rows: list[tuple[Tensor, Tensor]] = []
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            rows.append((head.weight, head.bias))
        weight, bias = rows.pop()
        weight, bias = weight.view(8, 8, -1), bias.view(8, 8)
        return [*rows, *((weight.mean(axis), bias.mean(axis)) for axis in (1, 0))]


def dense_loss(
    tower: nn.Module, heads: Dense, batch: TileBatch, device: torch.device
) -> tuple[Tensor, list[float]]:
    """The loss of a batch of tiles and, for each head, the share of its patches that are right.

    Without the last head, where a patch lies would be lost: no other label asks for it.
    """
    pixels = normalise(torch.from_numpy(batch.pixels).to(device))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        states = tower(pixels, output_hidden_states=True).hidden_states[-1]
        logits = heads(states.float())
    places = torch.arange(64).expand(len(pixels), 64)
    labels = [*torch.from_numpy(batch.labels), places]
    losses, right = [], []
    for i, (head, label) in enumerate(zip(logits, labels, strict=True)):
        label = label.to(device)
        shown = label > 0 if i < 6 else torch.ones_like(label, dtype=torch.bool)
        loss = F.cross_entropy(head.float().flatten(0, 1), label.flatten(), reduction="none")
        # Patches that show something weigh as much as all the ground together.
        weight = (0.3 + (6.0 if i in (2, 3) else 3.0) * shown.flatten()) if i < 6 else 0.3
        losses.append((loss * weight).mean())
        hits = (head.argmax(-1) == label) & shown
        right.append(round(float(hits.sum() / shown.sum().clamp(min=1)), 4))
    return torch.stack(losses).sum(), right


@torch.no_grad()
def start_projector(
    model: LlavaOnevisionForConditionalGeneration, heads: Dense, batch: TileBatch, seed: int
) -> None:
    """Let some of the projector's units begin as the pretraining's heads, all equally loud.

    The tower's states tell colours loudly, shapes and places faintly, and a decoder learns to look
    by what is loud long before it looks by what is faint. Each class gets a unit of the projector's
    hidden layer and a direction of its own in the decoder's width; the rest stays random.
    """
    pixels = normalise(torch.from_numpy(batch.pixels).to(model.device))
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    states = states.flatten(0, 1)
    centre = torch.eye(states.shape[-1], device=states.device) - 1 / states.shape[-1]
    spread = states.std(-1, unbiased=False).mean()
    rows, biases = [], []
    for weight, bias in heads.rows():
        weight, bias = weight - weight.mean(0), bias - bias.mean()
        # The head's LayerNorm, with every token's spread taken as the mean one.
        row = (weight * heads.norm.weight) @ centre / spread
        offset = weight @ heads.norm.bias + bias
        loudest = (states @ row.T + offset).max(dim=-1).values.mean()
        rows.append(3 / loudest * row)
        biases.append(3 / loudest * offset)
    projector = model.model.multi_modal_projector
    first, second = projector.linear_1, projector.linear_2
    num = sum(len(row) for row in rows)
    first.weight[:num], first.bias[:num] = torch.cat(rows), torch.cat(biases)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(len(second.weight), num, generator=generator))[0]
    second.weight[:, :num] = directions.to(states.device)
    # Visual tokens and words as loud as each other, not beyond what layers can change.
    width = len(second.weight)
    out: Tensor = second(F.gelu(first(states)))  # type: ignore[operator]
    second.weight *= 0.3 * width**0.5 / out.norm(dim=-1).mean()
    model.get_input_embeddings().weight.normal_(std=0.3, generator=generator)  # type: ignore[operator]
