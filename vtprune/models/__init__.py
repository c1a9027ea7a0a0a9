"""Which model families there are; nothing is imported until one is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from vtprune.models.base import Family

FAMILIES: dict[str, str] = {
    "llava_onevision": "vtprune.models.llava_onevision:LlavaOnevision",
    "llava_next": "vtprune.models.llava_next:LlavaNext",
    "qwen2_vl": "vtprune.models.qwen2_vl:Qwen2VL",
    "qwen2_5_vl": "vtprune.models.qwen2_5_vl:Qwen25VL",
    "qwen3_vl": "vtprune.models.qwen3_vl:Qwen3VL",
}
"""`config.model_type` -> where its family lives."""


def find_family(model_type: str) -> Family | None:
    """The family for a `config.model_type`; None where there is none."""
    path = FAMILIES.get(model_type)
    if path is None:
        return None
    module, name = path.split(":")
    return cast("Family", getattr(importlib.import_module(module), name)())
