"""Features of vision encoders in a cache on disk: by what the encoder is called with, and whose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

import torch

from vtprune.device import send
from vtprune.disk_cache import digest
from vtprune.engine.encoded_rows import PLAIN
from vtprune.engine.tower_attention import TowerReading
from vtprune.models.encoder_cache import EncoderCache
from vtprune.pruners.base import TOWER

UNREAD = ("hidden_states", "attentions")
"""Fields of an encoder's output that no forward reads."""
STATES, FEATURES = "last_hidden_state", "pooler_output"
"""The tower's states, which are not read where there are features."""
OUTPUT, TOWER_ROW = "output", "tower row "


def features_key(
    cache: EncoderCache, modality: str, given: Mapping[str, object], rows: torch.Tensor | None
) -> str | None:
    """Return the key of an encoder call's features; None: it takes what has no digest.

    Args:
        given: the arguments by name that features follow from.
        rows: (U,) bool: the frames or tiles that the tower gets; None: all.
    """
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    values = {name: value for name, value in given.items() if name not in tensors}
    for value in values.values():
        entries = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(entry, PLAIN) for entry in entries):
            return None
    kept = None if rows is None or bool(rows.all()) else rows.tolist()
    return json.dumps([modality, cache.model, digest(tensors), sorted(values.items()), kept])


def load_features(
    cache: EncoderCache, key: str, device: torch.device
) -> tuple[object, TowerReading | None] | None:
    """Return the features of an encoder call, and what its tower attended to where that is known.

    Returns:
        None: they are not there.
    """
    entry = cache.disk.load(key)
    if entry is None:
        return None
    tensors, notes = entry
    try:
        form, has_cls, read = notes
        names = tuple(name for name in TOWER if name in cast("list[str]", read))
        features = put_together(tensors, form, device)
        if has_cls is None:
            return features, None
        num_rows = sum(name.startswith(TOWER_ROW) for name in tensors)
        rows = [send(tensors[f"{TOWER_ROW}{row}"], device) for row in range(num_rows)]
    except (KeyError, TypeError, ValueError):
        return None  # written by something else
    return features, TowerReading(bool(has_cls), rows, names)


def store_features(
    cache: EncoderCache, key: str, features: object, reading: TowerReading | None
) -> object:
    """Put the features of an encoder call into a cache.

    Returns:
        them, as `load_features` gives them; None: they hold something else than tensors.
    """
    apart = take_apart(features)
    if apart is None:
        return None
    tensors, form = apart
    rows = {} if reading is None else {f"{TOWER_ROW}{n}": row for n, row in enumerate(reading.rows)}
    has_cls = None if reading is None else reading.has_cls
    names = [] if reading is None else list(reading.names)
    cache.disk.store(key, tensors | rows, [form, has_cls, names])
    return put_together(tensors, form, None)


# -- as tensors by name ----------------------------------------------------------------------------


def take_apart(features: object) -> tuple[dict[str, torch.Tensor], object] | None:
    """Return an encoder's output as tensors by name, and the form that they have in it.

    Returns:
        None for an output that holds something else too.
    """
    tensors: dict[str, torch.Tensor] = {}

    def form(value: object, name: str) -> object:
        if isinstance(value, torch.Tensor):
            tensors[name] = value
            return name
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [form(entry, f"{name}.{n}") for n, entry in enumerate(value)]}
        if isinstance(value, int) or value is None:
            return value
        raise TypeError(type(value).__name__)

    try:
        if not isinstance(features, Mapping):
            return tensors, form(features, OUTPUT)
        read = {
            name: form(value, str(name))
            for name, value in features.items()
            if name not in UNREAD and (name != STATES or features.get(FEATURES) is None)
        }
        return tensors, {OUTPUT: read}
    except TypeError:
        return None


def put_together(
    tensors: Mapping[str, torch.Tensor], form: object, device: torch.device | None
) -> object:
    """Return the output that `take_apart` was given, without what no forward reads of it.

    Args:
        device: of its tensors; None: where they are.

    Raises:
        ValueError, KeyError: the form is none.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    if isinstance(form, dict) and OUTPUT in form:
        output = BaseModelOutputWithPooling()
        for name, inner in form[OUTPUT].items():
            output[name] = put_together(tensors, inner, device)
        return output
    if isinstance(form, str):
        return tensors[form] if device is None else send(tensors[form], device)
    if isinstance(form, dict):
        ((kind, entries),) = form.items()
        values = [put_together(tensors, entry, device) for entry in entries]
        return values if kind == "list" else tuple(values)
    return form
