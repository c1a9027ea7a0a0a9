"""The user's own config file: defaults for what a call does not say."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from vtprune.errors import VtpruneError, brief, brief_path, list_faults, quote
from vtprune.preset.yaml_file import read_yaml


@dataclass(frozen=True)
class Config:
    """What the config file sets; None where it says nothing.

    Args:
        model: hub id, short name or directory.
        preset: name or path.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        dtype: "auto", "float32", "bfloat16" or "float16".
        attention: attention kernel, by transformers' name.
        system: system prompt.
        max_new_tokens: the longest answer.
    """

    model: str | None = None
    preset: str | None = None
    device: str | None = None
    dtype: str | None = None
    attention: str | None = None
    system: str | None = None
    max_new_tokens: int | None = None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


KEYS: dict[str, tuple[Callable[[object], bool], str]] = {
    "model": (_is_text, "text"),
    "preset": (_is_text, "text"),
    "device": (_is_text, "text"),
    "dtype": (_is_text, "text"),
    "attention": (_is_text, "text"),
    "system": (_is_text, "text"),
    "max_new_tokens": (_is_count, "a whole number from 1 on"),
}
"""Key -> its check, and what it has to be."""


def config_path() -> Path:
    """Where the config file is looked for."""
    import platformdirs

    return Path(platformdirs.user_config_dir("vtprune", appauthor=False)) / "config.yaml"


def load_config(path: Path | None = None) -> Config:
    """The user's config file; all defaults where there is none, or an empty one.

    Raises:
        VtpruneError: not readable, not YAML, unknown keys or bad values; each with its line.
    """
    path = config_path() if path is None else path
    if not os.path.exists(path):
        return Config()
    data, lines = read_yaml(path)
    if data is None:
        return Config()
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
    return Config(**data)


def _fault(key: object, value: object) -> str:
    """What is wrong with one key; empty where nothing is."""
    if not isinstance(key, str) or key not in KEYS:
        close = get_close_matches(brief(key), KEYS, n=1)
        return f"unknown key {quote(key)}" + (f", did you mean {close[0]}?" if close else "")
    good, kind = KEYS[key]
    return "" if value is None or good(value) else f"{key}: {quote(value)} is not {kind}"
