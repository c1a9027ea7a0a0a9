"""The user's config file: defaults for options that a call does not give."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vtprune.cli.options import CONFIG_KEYS, Flags, declaration
from vtprune.errors import VtpruneError
from vtprune.preset.yaml_file import read_yaml
from vtprune.small_files import system_name

if TYPE_CHECKING:
    from vtprune.preset.validation import Schema


def config_path() -> Path | None:
    """Return the path of the user's config file; None for a user without a home."""
    import platformdirs

    try:
        folder = Path(platformdirs.user_config_dir("vtprune", appauthor=False))
    except RuntimeError:  # no HOME, and a number that the system has no user for
        return None
    # Older platformdirs returns "~/.config" then, which would be a folder of the current one.
    return folder / "config.yaml" if folder.is_absolute() else None


def load_config(path: Path | None = None) -> Flags:
    """Return the options that the config file sets; none where there is no file, or an empty one.

    Raises:
        VtpruneError: not readable, not YAML, unknown keys or bad values; each with its line.
    """
    path = config_path() if path is None else path
    if path is None or not os.path.exists(path):
        return Flags()
    data, lines = read_yaml(path)
    if data is None:
        return Flags()
    from vtprune.preset.validation import find_faults, report

    if faults := find_faults(_schema(), data):
        raise VtpruneError(report(path, faults, lines), f"keys: {', '.join(CONFIG_KEYS)}")
    values = cast("dict[str, Any]", data)
    if values.get("model") is not None:  # which may be a directory
        values["model"] = system_name(values["model"])
    return Flags(**values)


def _schema() -> type[Schema]:
    """Return what a config file may hold, by the declarations of the options."""
    from pydantic import ConfigDict, Field, create_model

    from vtprune.preset.validation import Schema

    class ConfigSchema(Schema):
        model_config = ConfigDict(title="a config file")

    fields: dict[str, Any] = {}
    for key in CONFIG_KEYS:
        if bounds := declaration(key).bounds:
            least, most, rule = bounds
            most = min(most, 2**63 - 1)
            fields[key] = (int | None, Field(None, ge=least, le=most, description=rule))
        else:
            fields[key] = (str | None, Field(None, pattern=r"^[^\x00]+$", description="text"))
    return create_model("ConfigFile", __base__=ConfigSchema, **fields)
