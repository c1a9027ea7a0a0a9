"""Values of a result by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Values = Mapping[str, object]


def dict_in(values: Values, key: str) -> Values:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def list_in(values: Values, key: str) -> Sequence[object]:
    found = values.get(key)
    return found if isinstance(found, (list, tuple)) else ()


def counted_in(values: Values, key: str) -> float | None:
    """A number that a model may lack, such as its FLOPs; None where it is not counted."""
    return None if values[key] is None else number_in(values, key)


def number_in(values: Values, key: str) -> float:
    """A number that must be there.

    Raises:
        KeyError, TypeError: it is missing, or not a number.
    """
    return float(values[key])  # type: ignore[arg-type]
