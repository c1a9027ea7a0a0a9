"""Which model families there are; nothing is imported until one is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from vtprune.models.base import Family

EMBEDDED = "embedded"  # the name of the model that ships with the package
FAMILIES: dict[str, str] = {
    "llava_onevision": "vtprune.models.llava_onevision:LlavaOnevision",
    "llava_next": "vtprune.models.llava_next:LlavaNext",
    "llava": "vtprune.models.llava:Llava",
    "llava_next_video": "vtprune.models.llava_next_video:LlavaNextVideo",
    "video_llava": "vtprune.models.video_llava:VideoLlava",
    "internvl": "vtprune.models.internvl:InternVL",
    "aya_vision": "vtprune.models.aya_vision:AyaVision",
    "smolvlm": "vtprune.models.smolvlm:SmolVLM",
    "idefics3": "vtprune.models.idefics3:Idefics3",
    "qwen2_vl": "vtprune.models.qwen2_vl:Qwen2VL",
    "qwen2_5_vl": "vtprune.models.qwen2_5_vl:Qwen25VL",
    "qwen3_vl": "vtprune.models.qwen3_vl:Qwen3VL",
    "qwen3_vl_moe": "vtprune.models.qwen3_vl:Qwen3VL",
    "qwen3_5": "vtprune.models.qwen3_5:Qwen35",
    "qwen3_5_moe": "vtprune.models.qwen3_5:Qwen35",
    "qwen2_5_omni_thinker": "vtprune.models.qwen_omni:Qwen25Omni",
    "qwen3_omni_moe_thinker": "vtprune.models.qwen_omni:Qwen3Omni",
    "gemma3": "vtprune.models.gemma3:Gemma3",
    "gemma4": "vtprune.models.gemma4:Gemma4",
    "gemma4_unified": "vtprune.models.gemma4:Gemma4Unified",
    "glm4v": "vtprune.models.glm4v:Glm4v",
    "glm4v_moe": "vtprune.models.glm4v:Glm4v",
    "glm46v": "vtprune.models.glm4v:Glm46V",
    "glmga": "vtprune.models.glm4v:Glmga",
    "glm_ocr": "vtprune.models.glm4v:GlmOcr",
    "molmo2": "vtprune.models.molmo2:Molmo2",
}
"""`config.model_type` -> where its family lives."""
PARTS = {"qwen2_5_omni": "thinker_config", "qwen3_omni_moe": "thinker_config"}
"""Model type of a checkpoint of several models -> the config of the one that can be asked."""


def find_family(model_type: str) -> Family:
    """Return the family for a `config.model_type`: its own, else the one for all others."""
    path = FAMILIES.get(model_type)
    if path is None:
        from vtprune.models.generic import GenericFamily

        return GenericFamily(model_type)
    module, name = path.split(":")
    return cast("Family", getattr(importlib.import_module(module), name)())
