"""The requests of a batch: from a list of them, or questions about many files."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.errors import MediaError, VtpruneError, brief_path, list_faults, path_hint, quote
from vtprune.evaluation.variants import fingerprint
from vtprune.inference.messages import read_messages
from vtprune.inference.questions_file import FaultyRow, check_length, read_some
from vtprune.media import Stored, file_name
from vtprune.media.addresses import ADDRESS
from vtprune.media.folder import natural_order
from vtprune.models.turns import Turn
from vtprune.preset import Preset, load_preset, override, parse_keep

if TYPE_CHECKING:
    from vtprune.preset.validation import Schema

HINT = 'a line is {"file": "clip.mp4", "question": "what moves?"}'
KEYS = ("id", "file", "files", "question", "messages", "keep", "preset")
LABELS = ("answer", "answers", "kind")
"""What a list of questions has beside; a batch has no use for it."""
PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Request:
    """One request of a batch.

    Args:
        files: pictures, videos and directories of numbered pictures, in the order of the prompt.
        turns: the conversation; its last turn is the question.
        preset: resolved.
        key: what tells it from all others, alike in every run over the same requests.
        name: the user's own id; None where none was given.
        fault: why it can't be asked: what is wrong with its line in the list; "" for nothing.
        hint: the way out of the fault.
    """

    files: tuple[str | Stored, ...]
    turns: tuple[Turn, ...]
    preset: Preset
    key: str = ""
    name: str | int | None = None
    fault: str = ""
    hint: str = ""

    @property
    def question(self) -> str:
        """The text of the last turn."""
        return self.turns[-1].text


def with_keys(requests: Sequence[Request]) -> list[Request]:
    """Return the requests with their keys: of what they ask, and which of several alike they are.

    So the keys stay when further requests are added, or others come before.
    """
    seen: Counter[str] = Counter()
    presets: dict[Preset, str] = {}
    keyed = []
    for request in requests:
        if request.preset not in presets:
            presets[request.preset] = fingerprint(request.preset)
        turns = [(turn.role, turn.text, turn.places) for turn in request.turns]
        text = repr((request.name, request.files, turns, presets[request.preset]))
        text += request.fault
        seen[text] += 1
        digest = hashlib.sha256(f"{seen[text]} {text}".encode("utf-8", "surrogatepass"))
        keyed.append(replace(request, key=digest.hexdigest()[:16]))
    return keyed


# -- questions about many files --------------------------------------------------------------------


def requests_about(
    files: Sequence[str], questions: Sequence[str], preset: Preset, system: str = ""
) -> list[Request]:
    """Return a request for every question about every file, file by file.

    Raises:
        VtpruneError: a question that is empty or too long.
    """
    first = (Turn("system", system),) if system else ()
    for question in questions:
        check_question(question)
    return with_keys(
        [
            Request((name,), (*first, Turn("user", question, 1)), preset)
            for name in files
            for question in questions
        ]
    )


def check_question(question: str) -> None:
    """Refuse a question that is empty or too long."""
    if not question.strip():
        raise VtpruneError("the question is empty", 'write one, such as "what is it?"')
    if fault := check_length(question):
        raise VtpruneError(fault, "make it shorter")


def find_files(inputs: Sequence[str]) -> tuple[list[str], int]:
    """Return the media files that inputs mean, and how many other files folders hold.

    A folder stands for the media files in it and in its folders, in natural order (2 before 10),
    without hidden ones; a pattern, such as "clips/*.mp4", for all that it matches.

    Raises:
        MediaError: no such file, a pattern that nothing matches, or a folder without media.
    """
    files: list[str] = []
    num_others = 0
    for name in map(file_name, inputs):
        if ADDRESS.match(name):
            files.append(name)
            continue
        if not os.path.exists(name) and PATTERN.search(name):
            matched = sorted(glob.glob(name, recursive=True), key=natural_order)
            if not matched:
                raise MediaError(f"{name}: no file matches", "check the pattern")
        elif os.path.lexists(name):
            matched = [name]
        else:
            raise MediaError(f"{name}: no such file or folder", path_hint(name))
        for match in matched:
            if not os.path.isdir(match):
                files.append(match)
                continue
            inside = list(walk(match))
            media = [file for file in inside if is_media(file)]
            if not media:
                raise MediaError(f"{match}: the folder has no pictures or videos", "check the path")
            files += media
            num_others += len(inside) - len(media)
    return list(dict.fromkeys(files)), num_others


def walk(folder: str) -> Iterator[str]:
    """Yield the files of a folder and of those in it, in natural order; links to folders are not
    followed."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            (name for name in folders if not name.startswith(".")), key=natural_order
        )
        for name in sorted(names, key=natural_order):
            if not name.startswith("."):
                yield os.path.join(parent, name)


def is_media(path: str) -> bool:
    """Return whether a reader takes a file, by its first bytes."""
    from vtprune.media.file_type import file_type_of

    try:
        return os.path.isfile(path) and file_type_of(Path(path)) is not None
    except VtpruneError:
        return False


# -- a list of requests ----------------------------------------------------------------------------


def read_requests(
    path: str | Path,
    preset: Preset,
    system: str = "",
    columns: Mapping[str, str] | None = None,
) -> list[Request]:
    """Read the requests of a list: JSON lines, JSON, CSV, TSV, Parquet or a dataset on disk.

    Args:
        path: rows with `file` or `files` (relative to this file, or the bytes in the table) and
            `question`, or `messages`; and where wanted `id`, `keep` (a fraction, or one for each
            modality) and `preset`. The labels of a list of questions are left alone. A row that
            is wrong is a request with a fault.
        preset: of requests that name no other.
        system: prompt of requests that are no messages.
        columns: key -> the column that holds it, where the list has other names.

    Raises:
        VtpruneError: the file can't be read, all lines are wrong (the first of them are named), or
            every request has a file that is not there.
    """
    presets = Presets(preset)

    def read_row(data: object, folder: Path, _place: str) -> Request | list[str]:
        try:
            return _read_row(data, folder, presets, system)
        except VtpruneError as error:
            return [error.message]

    rows = read_some(path, read_row, "request", HINT, columns)
    requests = [row for row in rows if isinstance(row, Request)]
    missing = [next(filter(is_missing, request.files), None) for request in requests]
    if all(missing):  # a wrong folder; of some, their lines say it
        hint = path_hint(str(missing[0]), HINT)
        raise VtpruneError(f"{brief_path(path)}: {quote(str(missing[0]))}: no such file", hint)
    return with_keys(
        [_faulty_request(row, preset) if isinstance(row, FaultyRow) else row for row in rows]
    )


def _faulty_request(row: FaultyRow, preset: Preset) -> Request:
    """Return the request of a row that is wrong, with as much of it as can be read."""
    values = row.value if isinstance(row.value, dict) else {}
    name, question = values.get("id"), values.get("question")
    return Request(
        tuple(file for file in [values.get("file")] if isinstance(file, str)),
        (Turn("user", question if isinstance(question, str) else ""),),
        preset,
        name=name if isinstance(name, (str, int)) else None,
        fault=row.error.message,
        hint=row.hint,
    )


def is_missing(file: str | Stored) -> bool:
    """Return whether there is no such file, which can't be said of an address or a table's."""
    return isinstance(file, str) and not (ADDRESS.match(file) or os.path.exists(file))


class Presets:
    """The presets that requests name, each read once.

    Args:
        preset: of requests that name none.
    """

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        self.known: dict[str, Preset] = {}

    def resolve(self, name: str | None, keep: object) -> Preset:
        """Return the preset of a request.

        Raises:
            PresetError: it can't be read, or the keep does not fit it.
        """
        key = json.dumps([name, keep], sort_keys=True)
        if key not in self.known:
            preset = self.preset if name is None else load_preset(name)
            self.known[key] = override(preset, keep=keep)  # type: ignore[arg-type]
        return self.known[key]


def _media_names(value: object) -> object:
    """Return the names of media that lie in a table; anything else as it is."""
    if isinstance(value, list):
        return [_media_names(item) for item in value]
    return value.name if isinstance(value, Stored) else value


def _read_row(data: object, folder: Path, presets: Presets, system: str) -> Request:
    """Return the request of one row.

    Raises:
        VtpruneError: what is wrong with it.
    """
    from vtprune.preset.validation import find_faults, unknown_key

    if isinstance(data, dict) and isinstance(data.get("keep"), str):  # a cell of a table
        data = {**data, "keep": parse_keep(data["keep"])}
    checked = data
    if isinstance(data, dict):  # a picture that lies in the table is no text
        checked = {
            **data,
            **{key: _media_names(data[key]) for key in ("file", "files") if key in data},
        }
    faults = [message for _, message in find_faults(_schema(), checked)]
    if isinstance(data, dict):
        faults += [unknown_key(key, KEYS) for key in data if key not in (*KEYS, *LABELS)]
        medium = {"file", "files"} & data.keys()
        if "messages" in data and (medium or "question" in data):
            faults.append("messages and file, files or question exclude each other")
        elif "messages" not in data and (len(medium) != 1 or "question" not in data):
            faults.append("needs file or files, and question; or messages")
    if faults:
        raise VtpruneError(list_faults(faults))
    assert isinstance(data, dict)
    files: list[str | Stored]

    def resolve(kind: str, reference: str) -> str:
        return reference if ADDRESS.match(reference) else str(folder / file_name(reference))

    if "messages" in data:
        named, turns = read_messages(data["messages"], resolve)
        if not named:
            raise VtpruneError("messages: no picture and no video")
        files = [*named]
    else:
        names = [data["file"]] if "file" in data else data["files"]
        files = [name if isinstance(name, Stored) else resolve("", name) for name in names]
        check_question(data["question"])
        turns = [Turn("system", system)] if system else []
        turns.append(Turn("user", data["question"], len(files)))
    preset = presets.resolve(data.get("preset"), data.get("keep"))
    return Request(tuple(files), tuple(turns), preset, name=data.get("id"))


@functools.cache
def _schema() -> type[Schema]:
    """Return what a line may hold."""
    from pydantic import ConfigDict, Field

    from vtprune.preset.validation import Schema

    class RequestSchema(Schema):
        model_config = ConfigDict(title="a line", extra="ignore")

        id: str | int | None = Field(None, description="a text or a whole number")
        file: str = Field("-", pattern=r"\S")
        files: list[str] = Field(["-"], min_length=1, max_length=64, description="1 to 64 texts")
        question: str = Field("-", pattern=r"\S")
        messages: list[object] | None = Field(None, description="a list of messages")
        keep: float | dict[str, float] | None = Field(
            None, description="a fraction, or one for each modality"
        )
        preset: str | None = Field(None, description="the name of a preset, or a path")

    return RequestSchema
