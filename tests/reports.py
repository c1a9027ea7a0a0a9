"""Typed reports from plain values, for tests that show, save or stand in for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtprune.inference.report import (
    CompareResult,
    CompareSeconds,
    Flops,
    InputInfo,
    KvCacheBytes,
    MemoryBytes,
    ModalitySettings,
    ModelInfo,
    Report,
    ResolvedPreset,
    Seconds,
    StageCount,
    TokenCounts,
    Versions,
)


def tokens_of(values: Mapping[str, Any]) -> TokenCounts:
    stages = [StageCount(**{"options": {}, **one}) for one in values["stages"]]
    return TokenCounts(**{**values, "stages": stages})


def compare_of(values: Mapping[str, Any]) -> CompareResult:
    return CompareResult(**{**values, "seconds": CompareSeconds(**values["seconds"])})


def report_of(values: Mapping[str, Any]) -> Report:
    """The report whose `to_dict` gives the values back; of presets what is not given is empty."""
    preset = {"description": "", "stages": (), "method": None, "changed": {}, **values["preset"]}
    for modality in ("image", "video"):
        if modality in preset:
            preset[modality] = ModalitySettings(**preset[modality])
    blocks = {
        "model": ModelInfo(**values["model"]),
        "input": InputInfo(**values["input"]),
        "preset": ResolvedPreset(**preset),
        "tokens": tokens_of(values["tokens"]),
        "flops": Flops(**values["flops"]),
        "kv_cache_bytes": KvCacheBytes(**values["kv_cache_bytes"]),
        "memory_bytes": MemoryBytes(**values["memory_bytes"]),
        "seconds": Seconds(**values["seconds"]),
        "version": Versions(**values["version"]),
    }
    if values.get("compare"):
        blocks["compare"] = compare_of(values["compare"])
    return Report(**{**values, **blocks})
