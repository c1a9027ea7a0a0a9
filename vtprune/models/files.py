"""A checkpoint's own files about preparing inputs, from a directory or the hub's cache."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
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
    checkpoint: str | Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Files:
    """What `checkpoint`, a directory or a hub id, says about preparing inputs; absent files are {}.

    The processor's chat template, a file of its own or a key of processor_config.json, is
    `processor["chat_template"]`.

    Raises:
        ModelError: a file is not JSON.
    """
    processor = dict(_read_json(checkpoint, PROCESSOR))
    for name in TEMPLATES:
        text = _read(checkpoint, name)
        if text is not None:
            is_json = name.endswith(".json")
            found = _parse(checkpoint, name, text).get("chat_template") if is_json else text
            processor["chat_template"] = found
            break
    image = processor.get("image_processor") or _read_json(checkpoint, IMAGE)
    video = processor.get("video_processor") or _read_json(checkpoint, VIDEO)
    return Files(
        config=config,
        tokenizer=tokenizer,
        image=cast("Mapping[str, object]", image),
        video=cast("Mapping[str, object]", video),
        processor=processor,
    )


def _read(checkpoint: str | Path, name: str) -> str | None:
    if os.path.isdir(checkpoint):
        path = Path(checkpoint) / name
        return path.read_text(encoding="utf-8") if path.is_file() else None
    found = cached_file(
        str(checkpoint),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found).read_text(encoding="utf-8")


def _read_json(checkpoint: str | Path, name: str) -> Mapping[str, object]:
    text = _read(checkpoint, name)
    return {} if text is None else _parse(checkpoint, name, text)


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
