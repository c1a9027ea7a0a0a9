"""A model's inputs by name: those with a value for every token, and pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from vtprune.device import send

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded

TEXT_INPUTS = (
    "input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids",
)  # fmt: skip
"""The inputs with a value for every token of the prompt."""

Tensors = Mapping[str, torch.Tensor]


def pixels_in(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the inputs that the vision tower is given."""
    return {name: value for name, value in tensors.items() if name.startswith("pixel")}


def to_device(loaded: Loaded, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return inputs on the model's device, pixels in its dtype."""
    model = loaded.model
    moved = {}
    for name, value in tensors.items():
        pixels = value.is_floating_point() and name.startswith("pixel_values")
        moved[name] = send(value.to(model.dtype) if pixels else value, model.device)
    return moved
