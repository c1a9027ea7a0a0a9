"""The user's own config file: defaults for what a call does not say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from vtprune.cli.options import FIELDS, Flags, declaration
from vtprune.errors import VtpruneError, brief, brief_path, list_faults, quote
from vtprune.preset.yaml_file import read_yaml

KEYS = tuple(name for name in FIELDS if declaration(name).config)


def config_path() -> Path:
    """Where the config file is looked for."""
    import platformdirs

    return Path(platformdirs.user_config_dir("vtprune", appauthor=False)) / "config.yaml"


def load_config(path: Path | None = None) -> Flags:
    """Return the options that the config file sets; none where there is no file, or an empty one.

    Raises:
        VtpruneError: not readable, not YAML, unknown keys or bad values; each with its line.
    """
    path = config_path() if path is None else path
    if not os.path.exists(path):
        return Flags()
    data, lines = read_yaml(path)
    if data is None:
        return Flags()
    hint = f"keys: {', '.join(KEYS)}"
    if not isinstance(data, Mapping):
        raise VtpruneError(f"{brief_path(path)}: a config file is a mapping of keys", hint)
    faults = [
        f"line {lines.get((brief(key),), 1)}: {fault}"
        for key, value in data.items()
        if (fault := _fault(key, value))
    ]
    if faults:
        raise VtpruneError(f"{brief_path(path)}: {list_faults(faults)}", hint)
    return Flags(**data)


def _fault(key: object, value: object) -> str:
    """What is wrong with one key; empty where nothing is."""
    if not isinstance(key, str) or key not in KEYS:
        close = get_close_matches(brief(key), KEYS, n=1)
        return f"unknown key {quote(key)}" + (f", did you mean {close[0]}?" if close else "")
    if declaration(key).bounds:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        kind = "a whole number from 1 on"
    else:
        good, kind = isinstance(value, str) and bool(value), "text"
    return "" if value is None or good else f"{key}: {quote(value)} is not {kind}"
