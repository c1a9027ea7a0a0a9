"""Short names of published models, and what they stand for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from vtprune.preset.calibration import Calibration, find_calibration, packaged_models


@dataclass(frozen=True)
class Alias:
    """A short name for a published model.

    Args:
        name: the short name.
        hub_id: what it stands for.
        model_type: `config.model_type` of the checkpoint.
        parameters: its size as its authors give it, "7B".
        decoder: the language model's sizes by the names of `cost.plain_decoder`.
        calibration: where it can be cut, defaults included.
    """

    name: str
    hub_id: str
    model_type: str
    parameters: str
    decoder: Mapping[str, int]
    calibration: Calibration


def aliases() -> list[Alias]:
    """Return all short names, in the order of `_data/models.yaml`."""
    listed = []
    for name, entry in packaged_models()["aliases"].items():
        decoder = entry["decoder"]
        calibration, _ = find_calibration(entry["model_type"], decoder["layers"], decoder["hidden"])
        fields = {key: value for key, value in entry.items() if key != "differs"}
        listed.append(Alias(name, calibration=calibration, **fields))
    return listed


def hub_id_of(name: str) -> str:
    """Return the hub id that a short name stands for, in any case; anything else as it is."""
    entry = packaged_models()["aliases"].get(name.lower())
    return name if entry is None else str(entry["hub_id"])


def closest_alias(name: str) -> str | None:
    """Return the short name that a misspelt name or hub id is closest to; None: none is close."""
    names = packaged_models()["aliases"]
    spelt = {short: short for short in names}
    for short, entry in names.items():
        spelt.setdefault(entry["hub_id"].lower(), short)
        spelt.setdefault(entry["hub_id"].lower().split("/")[1], short)
    begun = [full for full in spelt if full.startswith(name.lower())] if len(name) > 5 else []
    close = begun or difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=0.7)
    return spelt[close[0]] if close else None
