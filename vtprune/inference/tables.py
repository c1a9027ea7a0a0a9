"""Rows of lists that people have: JSON lines, JSON, CSV, Parquet, Hugging Face datasets on disk.

A picture or video that lies in a table as bytes stays there until it is needed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Protocol, cast

from vtprune.errors import VtpruneError, brief_path, json_fault, path_fault, path_hint, quote
from vtprune.media import Stored
from vtprune.small_files import read_small

LARGEST_FILE = 64 * 2**20  # bytes of text
TABLES = (".csv", ".tsv", ".parquet")
SUFFIXES = (".jsonl", ".json", *TABLES)
DATASET = ("dataset_info.json", "state.json")
"""The files by which a folder is a Hugging Face dataset."""
LISTS = ("data", "questions", "annotations")
"""Keys of a JSON object whose value is the list."""
_BATCH = 64
_LONGEST_CELL = 16 << 20  # characters of CSV


@dataclass(frozen=True)
class Row:
    """One row of a list.

    Args:
        place: where it lies, for messages: "line 3".
        value: what it holds; of most rows a mapping.
        fault: why it can't be read; "" where it can.
    """

    place: str
    value: object = None
    fault: str = ""


def is_list(name: str | Path) -> bool:
    """Return whether a name is that of a list: by its suffix, or a dataset's folder."""
    path = Path(name)
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        return path.is_dir() and (
            all((path / file).is_file() for file in DATASET)
            or (path / "dataset_dict.json").is_file()
        )
    except (OSError, ValueError):
        return False


def read_rows(path: Path, columns: Mapping[str, str], hint: str) -> Iterator[Row]:
    """Yield the rows of a list.

    Args:
        columns: key -> the column that holds it, where the list has other names.
        hint: shows a row.

    Raises:
        VtpruneError: the list can't be read, or lacks a column.
    """
    name = brief_path(path)
    if path.is_dir():
        if not is_list(path):
            raise VtpruneError(
                f"{name}: a folder, and no list", f"name the list in it, or {name}/* and a question"
            )
        rows = _dataset_rows(path, name)
    elif path.suffix.lower() == ".parquet":
        rows = _parquet_rows(path, name)
    else:
        text = _read_text(path, name, hint)
        if path.suffix.lower() in (".csv", ".tsv"):
            rows = _csv_rows(text, "\t" if path.suffix.lower() == ".tsv" else ",", name)
        elif path.suffix.lower() == ".json" and text.lstrip()[:1] in ("[", "{"):
            rows = _json_rows(text, name, hint)
        else:
            rows = _line_rows(text)
    return _renamed(rows, columns, name)


def _renamed(rows: Iterator[Row], columns: Mapping[str, str], name: str) -> Iterator[Row]:
    """Yield the rows with their columns under the keys that they hold."""
    first = True
    for row in rows:
        if not columns or not isinstance(row.value, Mapping):
            yield row
            continue
        missing = [column for column in columns.values() if column not in row.value]
        if first and missing:
            has = [str(key) for key in row.value]
            close = get_close_matches(missing[0], has, n=1)
            also = f"did you mean {close[0]}? " if close else ""
            raise VtpruneError(
                f"{name}, {row.place}: no column {quote(missing[0])}",
                f"{also}columns: {', '.join(has)[:300]}",
            )
        first = False
        kept = {
            key: value
            for key, value in row.value.items()
            if key not in columns and key not in columns.values()
        }
        given = {key: row.value[column] for key, column in columns.items() if column in row.value}
        yield Row(row.place, {**kept, **given}, row.fault)


# -- text ------------------------------------------------------------------------------------------


def _read_text(path: Path, name: str, hint: str) -> str:
    try:
        raw = read_small(path, LARGEST_FILE)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        last = raw.count(b"\n", 0, error.start) + 1
        raise VtpruneError(f"{name}, line {last}: can't be read: not UTF-8 text", hint) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        way_out = path_hint(path, f"check the path; {hint}")
        raise VtpruneError(f"{name}: can't be read: {path_fault(error)}", way_out) from error
    if len(raw) > LARGEST_FILE:
        raise VtpruneError(f"{name}: larger than {LARGEST_FILE} bytes", "split it")
    return text


def _line_rows(text: str) -> Iterator[Row]:
    """Yield the objects of JSON lines; blank lines are left out."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield Row(f"line {number}", _readable(json.loads(line)))
        except (ValueError, RecursionError) as error:
            yield Row(f"line {number}", fault=json_fault(error))


def _json_rows(text: str, name: str, hint: str) -> Iterator[Row]:
    """Yield the items of a JSON list, or of the list of an object; else those of JSON lines."""
    try:
        data = _readable(json.loads(text))
    except (ValueError, RecursionError) as error:
        if text.lstrip()[0] == "{":  # a line an object, under a name for one
            yield from _line_rows(text)
            return
        raise VtpruneError(f"{name}: {json_fault(error)}", hint) from error
    if isinstance(data, dict):
        inside = next((data[key] for key in LISTS if isinstance(data.get(key), list)), None)
        data = [data] if inside is None else inside
    for number, item in enumerate(cast("list[object]", data), 1):
        yield Row(f"item {number}", item)


def _csv_rows(text: str, delimiter: str, name: str) -> Iterator[Row]:
    """Yield the rows of a table with a line of column names; empty cells are left out."""
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            place = f"line {reader.line_num}"
            if None in cells:
                yield Row(place, fault="more cells than the first line has columns")
                continue
            filled = {str(key).strip(): cell for key, cell in cells.items() if cell}
            yield Row(place, _readable({key: _cell(cell) for key, cell in filled.items()}))
    except csv.Error as error:
        raise VtpruneError(
            f"{name}, line {reader.line_num}: not CSV: {error}",
            "put cells with commas or line ends into quotation marks",
        ) from error


def _cell(text: str) -> object:
    """Return a cell's text, or the list or object that it is in JSON."""
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


def _readable(value: object) -> object:
    """Return JSON data with "?" for halves of characters, which no tokenizer takes."""
    if isinstance(value, dict):
        return {_readable(key): _readable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_readable(item) for item in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


# -- tables with media in them ---------------------------------------------------------------------


class Table(Protocol):
    """A table whose cells can be read again."""

    def rows(self) -> Iterator[dict[str, object]]:
        """Yield all rows in order."""
        ...

    def cell(self, row: int, column: str) -> object:
        """Return one cell."""
        ...


def _table_rows(table: Table, name: str) -> Iterator[Row]:
    """Yield the rows of a table, with what gives the bytes in the place of bytes."""
    for number, values in enumerate(table.rows()):
        value = {
            column: _without_bytes(cell, name, partial(table.cell, number, column))
            for column, cell in values.items()
            if cell is not None
        }
        yield Row(f"row {number + 1}", value)


class _Cell(Protocol):
    def __call__(self) -> object: ...


def _without_bytes(cell: object, name: str, read: _Cell) -> object:
    """Return a cell whose bytes are read when they are needed."""
    if isinstance(cell, list):
        return [
            _without_bytes(item, name, partial(_item, read, place))
            for place, item in enumerate(cell)
        ]
    data = _bytes_in(cell)
    if data is None:
        path = cell.get("path") if isinstance(cell, dict) and "bytes" in cell else None
        return path or cell
    digest = hashlib.blake2b(data, digest_size=8).hexdigest()
    return Stored(f"{name}#{digest}", lambda: cast("bytes", _bytes_in(read())))


def _item(read: _Cell, place: int) -> object:
    return cast("list[object]", read())[place]


def _bytes_in(cell: object) -> bytes | None:
    """Return the bytes of a cell, alone or as datasets keep a picture: {"bytes", "path"}."""
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    return cell if isinstance(cell, bytes) else None


def _parquet_rows(path: Path, name: str) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise _missing(name, "pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
    except OSError as error:
        reason = error.strerror or "not a Parquet file"
        raise VtpruneError(f"{name}: can't be read: {reason}", path_hint(path)) from error
    except Exception as error:
        raise VtpruneError(f"{name}: not a Parquet file", f"check it ({error})") from error
    yield from _table_rows(_Parquet(file), name)


class _Parquet:
    """A Parquet file; a column of the row group that was read last is kept for the next cell."""

    def __init__(self, file: object) -> None:
        self.file = file
        self.last: tuple[int, str] | None = None
        self.values: list[object] = []
        counts = [self._metadata(group) for group in range(file.num_row_groups)]  # type: ignore[attr-defined]
        self.firsts = [sum(counts[:group]) for group in range(len(counts) + 1)]

    def _metadata(self, group: int) -> int:
        return int(self.file.metadata.row_group(group).num_rows)  # type: ignore[attr-defined]

    def rows(self) -> Iterator[dict[str, object]]:
        for batch in self.file.iter_batches(batch_size=_BATCH):  # type: ignore[attr-defined]
            yield from batch.to_pylist()

    def cell(self, row: int, column: str) -> object:
        group = next(g for g, first in enumerate(self.firsts[1:]) if row < first)
        if self.last != (group, column):
            table = self.file.read_row_group(group, [column])  # type: ignore[attr-defined]
            self.last, self.values = (group, column), table.column(column).to_pylist()
        return self.values[row - self.firsts[group]]


def _dataset_rows(path: Path, name: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise _missing(name, "datasets") from error
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise VtpruneError(
            f"{name}: a dataset of {len(splits)} splits: {', '.join(splits)}",
            f"choose one: {path / splits[-1] if splits else path}",
        )
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise VtpruneError(
            f"{name}: can't be read as a dataset: {error}", "write it with save_to_disk"
        ) from error
    yield from _table_rows(_Dataset(loaded), name)


class _Dataset:
    """A Hugging Face dataset, whose pictures stay as they are stored."""

    def __init__(self, dataset: object) -> None:
        features = dataset.features  # type: ignore[attr-defined]
        self.labels = {
            column: feature.names
            for column, feature in features.items()
            if isinstance(getattr(feature, "names", None), list)
        }
        self.dataset = dataset.with_format("arrow")  # type: ignore[attr-defined]

    def rows(self) -> Iterator[dict[str, object]]:
        for start in range(0, len(self.dataset), _BATCH):
            end = min(start + _BATCH, len(self.dataset))
            for values in self.dataset[start:end].to_pylist():
                yield {column: self._named(column, value) for column, value in values.items()}

    def _named(self, column: str, value: object) -> object:
        """Return the name of a class for its number."""
        names = self.labels.get(column)
        return names[value] if names and isinstance(value, int) and value >= 0 else value

    def cell(self, row: int, column: str) -> object:
        return self.dataset[row : row + 1].column(column).to_pylist()[0]


def _missing(name: str, package: str) -> VtpruneError:
    return VtpruneError(
        f"{name}: reading it needs the package {package}, which is not installed",
        'pip install "vtprune[data]"',
    )
