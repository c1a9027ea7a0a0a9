"""Calls of vision encoders taken apart into those of each prompt, and their features joined."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vtprune.engine.inputs import PixelView

Kwargs = dict[str, object]
PER_LAYER = ("deepstack_features",)
"""Fields of an encoder's output with an entry for each of several layers, not for each picture."""
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class RowCall:
    """The encoder call of one prompt.

    Args:
        row: the number of the prompt in its batch.
    """

    row: int
    args: tuple[object, ...]
    kwargs: Kwargs


def split_call(args: tuple[object, ...], kwargs: Kwargs, pixels: PixelView) -> list[RowCall] | None:
    """Return an encoder call of a batch as one for each prompt that has what it encodes.

    Returns:
        None for a call with other tensors than the inputs of the batch.
    """
    values = [*args, *kwargs.values()]
    if len(pixels.rows) == 1:
        return [RowCall(0, args, kwargs)]
    names: dict[int, str] = {}
    for key, value in [*((None, value) for value in args), *kwargs.items()]:
        if isinstance(value, torch.Tensor):
            name = _input_name(key, value, pixels.tensors)
            if name is None:
                return None
            names[id(value)] = name
        elif not isinstance(value, PLAIN):
            return None
    calls = []
    for number, row in enumerate(pixels.rows):
        has = {name in row for name in names.values()}
        if has == {False}:
            continue
        if has != {True}:
            return None
        own = {
            id(value): row[names[id(value)]].to(value.device, value.dtype)
            for value in values
            if isinstance(value, torch.Tensor)
        }
        calls.append(
            RowCall(
                number,
                tuple(own.get(id(value), value) for value in args),
                {key: own.get(id(value), value) for key, value in kwargs.items()},
            )
        )
    return calls


def _input_name(
    key: str | None, value: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> str | None:
    """Return which of the inputs of a batch an argument is."""
    if key is not None and key in tensors and tensors[key].shape == value.shape:
        return key
    same = [
        name
        for name, tensor in tensors.items()
        if tensor.shape == value.shape and tensor.data_ptr() == value.data_ptr()
    ]
    return same[0] if same else None


def join(parts: Sequence[object], per_layer: bool = False) -> object:
    """Return the features of several prompts as those of their batch.

    Args:
        per_layer: lists have an entry for each layer, not for each picture.

    Raises:
        ValueError: these can't be joined.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Mapping):
        fields = {
            name: join([_get(part, name) for part in parts], name in PER_LAYER) for name in first
        }
        joined = copy.copy(first)
        for name, value in fields.items():
            joined[name] = value  # type: ignore[index]
        return joined
    if isinstance(first, torch.Tensor):
        return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
    if isinstance(first, (list, tuple)):
        lists = [list(part) for part in parts if isinstance(part, (list, tuple))]
        if per_layer or any(isinstance(entry, (list, tuple)) for entry in first):
            entries = [join(entry) for entry in zip(*lists, strict=True)]
        else:
            entries = [entry for part in lists for entry in part]
        return entries if isinstance(first, list) else tuple(entries)
    if any(part != first for part in parts):
        raise ValueError("the parts differ")
    return first


def _get(part: object, name: object) -> object:
    if not isinstance(part, Mapping) or name not in part:
        raise ValueError("the parts differ")
    return part[name]
