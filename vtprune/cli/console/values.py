"""Values of a report by name, whatever of it is missing."""

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
    return None if key in values and values[key] is None else number_in(values, key)


def number_in(values: Values, key: str) -> float:
    found = values.get(key)
    return float(found) if isinstance(found, (int, float)) else 0.0
