"""The loop over the layers, with which hybrid decoders are compared, for made-up batches."""

from __future__ import annotations

import torch
import zoo
from transformers import PreTrainedModel

from vtprune.evaluation.checking.oracle import Drops, looped
from vtprune.models.structure import find_structure


def loop(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], drops: Drops, force: torch.Tensor
) -> torch.Tensor:
    """Logits (B, steps, V) of every row by itself.

    Args:
        drops: (first layer, for every row the columns that it and later layers do not get).
        force: (B, steps) tokens.
    """
    structure, rows = find_structure(model), []
    for number, tokens in enumerate(force):
        row, padding = _row(batch, number, tokens, structure.placeholder_ids())
        gone = [(first, [c - padding for c in columns[number]]) for first, columns in drops]
        rows.append(looped(model, row, gone, len(tokens)))
    return torch.cat(rows)


def _row(
    batch: dict[str, torch.Tensor], number: int, tokens: torch.Tensor, placeholders: set[int]
) -> tuple[dict[str, torch.Tensor], int]:
    """One row with all but its last forced token behind it, and how much padding it lost."""
    valid = batch["attention_mask"][number].bool()
    visual = torch.isin(batch["input_ids"], torch.tensor(sorted(placeholders)))
    pictures = visual.sum(1) // zoo.VISUAL
    row = {}
    for name, values in batch.items():
        if values.shape == batch["input_ids"].shape:
            values = values[number, valid][None]
            fill = {"input_ids": tokens[:-1], "attention_mask": torch.ones_like(tokens[:-1])}
            more = fill.get(name, torch.zeros_like(tokens[:-1]))
            row[name] = torch.cat([values, more[None]], 1)
        elif len(batch["input_ids"]) == 1:
            row[name] = values
        else:  # of pictures
            before, until = pictures[:number].sum(), pictures[: number + 1].sum()
            row[name] = values[before:until]
    return row, int((~valid).sum())
