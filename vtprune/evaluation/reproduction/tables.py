"""Published tables as data: their rows as presets, their figures, and where those are from.

Packaged ones are in `_data/tables`; a file of one's own has the same keys.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.errors import PresetError, VtpruneError, quote
from vtprune.preset import Preset, load_preset
from vtprune.preset.yaml_file import read_yaml
from vtprune.small_files import system_name

if TYPE_CHECKING:
    from vtprune.preset.validation import Schema


@dataclass(frozen=True)
class PublishedRow:
    """A row of a published table.

    Args:
        name: as published.
        preset: the same cuts, positions and norms here.
        retained: percent of the unpruned model's score; None: not known.
        flops: percent of prefill FLOPs that are saved; None: not known.
        left: layer -> visual tokens from there on; 0 is the language model's input.
        note: what else is to be known.
    """

    name: str
    preset: Preset
    retained: float | None = None
    flops: float | None = None
    left: Mapping[int, int] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class PublishedTable:
    """A published table.

    Args:
        name: of its file.
        title, paper, source: what it is, and whose figures they are.
        model: the model that was asked, as `load` takes it.
        benchmark: that the scores are of.
        rows: without the unpruned one.
        tokens: visual tokens before any cut; None: of several sizes.
        text_tokens: of a prompt, for the FLOPs.
        image, video: size of the input for counts and FLOPs, as of `vtprune profile`.
    """

    name: str
    title: str
    paper: str
    source: str
    model: str
    benchmark: str
    rows: tuple[PublishedRow, ...]
    tokens: int | None = None
    text_tokens: int = 64
    image: str | None = None
    video: str | None = None

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it, without its rows."""
        names = ("name", "title", "paper", "source", "model", "benchmark", "tokens")
        return {name: getattr(self, name) for name in names}


def table_names() -> list[str]:
    """Return the names of the packaged tables."""
    files = resources.files("vtprune").joinpath("_data/tables").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files)


def load_table(name: str | Path) -> PublishedTable:
    """Return a table by its packaged name, or of a file.

    Raises:
        VtpruneError: not found, not readable, or not valid; every fault is named.
    """
    from vtprune.preset.validation import find_faults, report

    text = str(name)
    packaged = Path(str(resources.files("vtprune").joinpath("_data/tables", f"{text}.yaml")))
    path = packaged if text in table_names() else Path(text)
    if not os.path.isfile(path):
        close = get_close_matches(text, table_names(), n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise VtpruneError(
            f"no table {quote(text)}: neither a packaged one nor a file",
            f"{meant}packaged: {', '.join(table_names())}",
        )
    data, lines = read_yaml(path)
    if faults := find_faults(_schema(), data):
        raise VtpruneError(report(path, faults, lines), "vtprune reproduce lists packaged tables")
    assert isinstance(data, dict)
    rows = tuple(_row(path, row) for row in data.pop("rows"))
    data["model"] = system_name(data["model"])
    return PublishedTable(name=path.stem, rows=rows, **data)


def _row(path: Path, data: Mapping[str, Any]) -> PublishedRow:
    """Return a row of a checked table.

    Raises:
        PresetError: its preset is not valid.
    """
    name = str(data["row"])
    try:
        preset = load_preset(data["preset"])
    except PresetError as error:
        raise PresetError(f"{path.name}, row {name}: {error.message}", error.hint) from error
    return PublishedRow(
        name,
        replace(preset, name=name),
        data.get("retained"),
        data.get("flops"),
        data.get("left") or {},
        data.get("note") or "",
    )


def _schema() -> type[Schema]:
    """Return what a table may hold."""
    from pydantic import ConfigDict, Field

    from vtprune.preset.validation import Schema

    class RowSchema(Schema):
        model_config = ConfigDict(title="a row")

        row: str = Field(pattern=r"\S")
        preset: dict[str, Any] = Field(description="a preset")
        retained: float | None = Field(None, ge=0, description="percent, 0 or more")
        flops: float | None = Field(None, ge=0, le=100, description="percent")
        left: dict[int, int] | None = Field(None, description="layer: tokens")
        note: str | None = None

    class TableSchema(Schema):
        model_config = ConfigDict(title="a table")

        title: str
        paper: str
        source: str
        model: str
        benchmark: str
        rows: list[RowSchema] = Field(min_length=1, description="a list of at least one row")
        tokens: int | None = Field(None, ge=1, description="a whole number from 1 on")
        text_tokens: int = Field(64, ge=1, description="a whole number from 1 on")
        image: str | None = None
        video: str | None = None

    return TableSchema
