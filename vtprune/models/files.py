"""A checkpoint's own files about preparing inputs, from a directory or the hub's cache."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from transformers.utils.hub import cached_file

from vtprune.errors import ModelError
from vtprune.models.base import Files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

IMAGE, VIDEO = "preprocessor_config.json", "video_preprocessor_config.json"
PROCESSOR = "processor_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")


def read_files(
    checkpoint: str | Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Path | None = None,
) -> Files:
    """What `checkpoint`, a directory or a hub id, says about preparing inputs; absent files are {}.

    Of files that are in the directory of an adapter too, the adapter's count.

    The processor's chat template, a file of its own or a key of processor_config.json, is
    `processor["chat_template"]`.

    Raises:
        ModelError: a file is not JSON.
    """
    places = (checkpoint,) if adapter is None else (adapter, checkpoint)
    processor = dict(_read_json(places, PROCESSOR))
    templates = ((place, name) for place in places for name in TEMPLATES)
    for place, name in templates:
        text = _read(place, name)
        if text is not None:
            is_json = name.endswith(".json")
            found = _parse(place, name, text).get("chat_template") if is_json else text
            processor["chat_template"] = found
            break
    image = processor.get("image_processor") or _read_json(places, IMAGE)
    video = processor.get("video_processor") or _read_json(places, VIDEO)
    return Files(
        config=config,
        tokenizer=tokenizer,
        image=cast("Mapping[str, object]", image),
        video=cast("Mapping[str, object]", video),
        processor=processor,
    )


def find_file(checkpoint: str | Path, name: str) -> Path | None:
    """Find a file of a directory or hub id, in the hub's cache or on the hub; None: not there."""
    if os.path.isdir(checkpoint):
        path = Path(checkpoint) / name
        return path if os.path.isfile(path) else None
    found = cached_file(
        str(checkpoint),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _read(checkpoint: str | Path, name: str) -> str | None:
    path = find_file(checkpoint, name)
    return None if path is None else path.read_text(encoding="utf-8")


def _read_json(places: Sequence[str | Path], name: str) -> Mapping[str, object]:
    """The JSON file of the first place that has it."""
    for place in places:
        text = _read(place, name)
        if text is not None:
            return _parse(place, name, text)
    return {}


def _parse(checkpoint: str | Path, name: str, text: str) -> Mapping[str, object]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ModelError(
            f"{name} of {checkpoint} is not JSON: {error}", "download the checkpoint again"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{name} of {checkpoint} is not a JSON object", "download it again")
    return found
