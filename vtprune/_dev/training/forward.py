"""From a batch to logits: the visual tokens of one architecture, then the questions' answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtprune._dev.training.architecture import Architecture, Layer
from vtprune._dev.training.batches import Batch
from vtprune._dev.training.hints import IGNORED
from vtprune._dev.training.packed import Seen, read_packed


def answer_states(
    architecture: Architecture,
    model: Any,
    batch: Batch,
    device: torch.device,
    layer: Layer,
    watch: Callable[[int, Tensor, Seen], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (n, vocabulary) and targets (n,) at every answer token of a batch, row by row."""
    visual = architecture.visual_tokens(model, batch, device).float()
    embed, tokenizer = model.get_input_embeddings(), architecture.tokenizer
    start, end = (
        embed(torch.tensor(tokenizer.encode(text).ids, dtype=torch.long, device=device))
        for text in (architecture.prefix, architecture.closing)
    )
    batches = len(visual)
    prefix = torch.cat((start.expand(batches, -1, -1), visual, end.expand(batches, -1, -1)), dim=1)
    tokens, targets, segments = (
        torch.from_numpy(array).to(device)
        for array in (batch.tokens, batch.targets, batch.segments)
    )
    before, after = architecture.positions(batch, prefix.shape[1])
    positions = before.to(device), after.to(device)
    decoder = model.model.language_model
    states = read_packed(decoder, prefix, embed(tokens), positions, segments, layer, watch)
    wanted = targets != IGNORED
    return model.lm_head(states[wanted]).float(), targets[wanted]
