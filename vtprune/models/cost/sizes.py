"""Sizes, as a model's config has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from vtprune.errors import ModelError


class CostError(ModelError):
    """A model whose FLOPs can't be counted; its answers can be given all the same."""


def uncounted(config: object, what: str) -> CostError:
    """Return the error for layers that are not counted."""
    return CostError(
        f"{kind_of(config)}: the FLOPs of {what} are not counted",
        hint="ask, compare and evaluate work without them",
    )


def kind_of(config: object) -> str:
    """A config's model type; "" where it has none."""
    return str(getattr(config, "model_type", ""))


def size_of(config: object, name: str, default: int | None = None) -> int:
    """A size of a config; one side of it where it is given as a pair of equal sides.

    Raises:
        CostError: it has no such size, and there is no default.
    """
    value = _value(config, name, default)
    return int(cast(int, value[0] if isinstance(value, list | tuple) else value))


def list_of(config: object, name: str) -> Sequence[int]:
    """What a config lists, such as layers.

    Raises:
        CostError: it has no such list.
    """
    return cast("Sequence[int]", _value(config, name, None))


def _value(config: object, name: str, default: object) -> object:
    value = getattr(config, name, None)
    value = default if value is None else value
    if value is None:
        raise CostError(
            f"the config of {kind_of(config) or type(config).__name__} has no {name}",
            hint="its FLOPs can't be counted without it",
        )
    return value
