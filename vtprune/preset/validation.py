"""Data from a file against a pydantic schema: every fault at once, in plain words.

pydantic takes a tenth of a second to import: import this module only where something is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from vtprune.errors import brief, brief_path, list_faults, quote

Place = tuple[str | int, ...]
"""Keys and list indices that lead to a value."""
Fault = tuple[Place, str]


class Schema(BaseModel):
    """What a file may hold. A field's description is the rule that a message names."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def find_faults(schema: type[Schema], data: object) -> list[Fault]:
    """Return every fault of `data`, with the keys that lead to it."""
    try:
        schema.model_validate(data)
    except ValidationError as error:
        return [
            (fault["loc"], _describe(schema, fault["loc"], fault["type"], fault["input"]))
            for fault in error.errors(include_url=False, include_context=False)
        ]
    return []


def report(source: object, faults: Iterable[Fault], lines: Mapping[Place, int]) -> str:
    """Return the message of one error that names every fault, with its line.

    Args:
        source: the file; what else it is where there are no lines.
    """
    texts = []
    for place, message in faults:
        line = lines.get(place) or lines.get(place[:-1])
        location = f"line {line}" if line else brief(".".join(map(str, place)))
        texts.append(f"{location}: {message}" if location else message)
    return f"{brief_path(source)}: {list_faults(texts)}"


def unknown_key(key: object, keys: Sequence[str]) -> str:
    """Return what is said of a key that is none of `keys`."""
    close = get_close_matches(key, keys, n=1) if isinstance(key, str) else []
    also = f", did you mean {close[0]}?" if close else f" (keys: {', '.join(keys)})"
    return f"unknown key {quote(key)}{also}"


def _describe(schema: type[Schema], place: Place, kind: str, value: object) -> str:
    """Return what is wrong with one value: its key, the value and the rule."""
    key = place[-1] if place else None
    if kind in ("extra_forbidden", "invalid_key"):
        keys = list(_schema_at(schema, place[:-1]).model_fields)
        return unknown_key(value if kind == "invalid_key" else key, keys)
    if kind == "missing":
        return f"{key} is missing"
    fields = _schema_at(schema, place[:-1]).model_fields
    if kind == "model_type" and key in fields and fields[key].description:
        return f"{key}: {quote(value)} is not {fields[key].description}"
    if kind == "model_type" or not isinstance(place[0] if place else None, str):
        title = _schema_at(schema, place).model_config.get("title")
        return f"{key if isinstance(key, str) else title} must be a mapping of keys"
    name, rule = _last_field(schema, place)
    if kind.startswith("string") and kind not in ("string_too_long", "string_too_short"):
        rule = "text"
    if kind == "less_than_equal" and isinstance(value, int) and value >= 2**63:
        return f"{name}: {quote(value)} is more than {2**63 - 1}"
    text = brief(value) if kind == "literal_error" else quote(value)
    return f"{name}: {text} is not {rule}"


def _last_field(schema: type[Schema], place: Place) -> tuple[str, str | None]:
    """Return the last key of a place that a schema has, and its rule.

    What follows are items of a list, keys of a mapping, or the type in a union that was tried.
    """
    for number in range(len(place), 0, -1):
        fields = _schema_at(schema, place[: number - 1]).model_fields
        if place[number - 1] in fields:
            name = str(place[number - 1])
            return name, fields[name].description
    raise AssertionError(f"{place} is no place of {schema.__name__}")


def _schema_at(schema: type[Schema], place: Place) -> type[Schema]:
    """Return the schema of the mapping at `place`; that around it where it is no mapping."""
    for part in place:
        annotation = schema.model_fields[part].annotation if part in schema.model_fields else None
        inner = [kind for kind in _kinds(annotation) if issubclass(kind, Schema)]
        schema = inner[0] if inner else schema
    return schema


def _kinds(annotation: object) -> list[type]:
    """Return the classes in an annotation such as `list[X] | None`."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _kinds(part)]
