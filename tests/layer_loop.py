"""The oracle of decoders whose layers keep a state: a loop over the layers, written by hand.

A row alone, without padding and without any cache: the prompt and the tokens forced after it go
through the layers at once. Layers before a cut run on all tokens, layers from it on over the tokens
that are left, with the original position ids; so their states are made of those alone. Being
causal, the loop gives the logits of every decoded step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import zoo
from transformers import PreTrainedModel

from vtprune.models.structure import find_structure

Drops = Sequence[tuple[int, Sequence[Sequence[int]]]]


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
        rows.append(_loop_of_one(model, row, gone)[-len(tokens) :])
    return torch.stack(rows)


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


def _loop_of_one(
    model: PreTrainedModel, row: dict[str, torch.Tensor], gone: list[tuple[int, list[int]]]
) -> torch.Tensor:
    """Logits (S, V) of one row; those of dropped columns mean nothing."""
    layers = find_structure(model).layers
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def see(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        model(**row, use_cache=False)
    for hook in hooks:
        hook.remove()
    args, kwargs = calls[0]
    hidden = args[0] if args else kwargs["hidden_states"]
    left = torch.arange(row["input_ids"].shape[1])
    with torch.no_grad():
        for number, (layer, (_, kwargs)) in enumerate(zip(layers, calls, strict=True)):
            for first, columns in gone:
                if first == number:
                    kept = ~torch.isin(left, torch.tensor(columns, dtype=torch.long))
                    hidden, left = hidden[:, kept], left[kept]
            given = {name: _of_columns(name, value, left) for name, value in kwargs.items()}
            given.pop("hidden_states", None)
            output = layer(hidden, **given)
            hidden = output[0] if isinstance(output, tuple) else output

    def give(module: object, args: object, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        whole = whole.clone()
        whole[:, left] = hidden
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    hook = layers[-1].register_forward_hook(give)
    with torch.no_grad():
        logits = model(**row, use_cache=False).logits[0]
    hook.remove()
    return logits


def _of_columns(name: str, value: Any, columns: torch.Tensor) -> Any:
    """What a layer was given for all columns, for some of them."""
    if isinstance(value, tuple):
        return tuple(_of_columns(name, part, columns) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    if name == "attention_mask" and value.dim() == 4:
        return value[:, :, columns][..., columns]
    if name == "position_embeddings":
        return value[..., columns, :]
    return value[..., columns]  # position ids, a mask of tokens
