"""Tiny models of families that differ little from another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import tiny_qwen
from tiny_base import WIDTH, Tiny
from transformers import CONFIG_MAPPING

from vtprune.models import qwen3_5

Token = Callable[[str], int]
Sections = Mapping[str, Mapping[str, Any]]
"""Part of a config -> fields."""
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
GATED_DELTA: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 0.5,
    },
}  # fmt: skip
SHARED: dict[str, Any] = {"num_experts": 6, "shared_expert_intermediate_size": 40}
ROUTED: dict[str, Any] = {"n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 1}


def _alike(model: str, kind: str, sections: Sections, without: Sections, **changes: Any) -> Tiny:
    """The tiny model of a family whose config is that of another but for some fields.

    Args:
        model: the other family.
        sections: fields in "text_config" and "vision_config".
        without: fields that are left out there.
    """
    base = tiny_qwen.MODELS[model]

    def config(token: Token) -> dict[str, Any]:
        fields = base.config(token) | {"model_type": kind}
        for part in ("text_config", "vision_config"):
            kept = {
                key: value
                for key, value in fields[part].items()
                if key not in without.get(part, ())
            }
            fields[part] = kept | dict(sections.get(part, {}))
        return fields

    return dataclasses.replace(base, config=config, **changes)


def _glm_files(line: str, processor: str) -> dict[str, dict[str, Any]]:
    images, videos = "preprocessor_config.json", "video_preprocessor_config.json"
    files = {name: dict(values) for name, values in tiny_qwen.GLM_FILES.items()}
    files[images]["image_processor_type"] = f"{line}ImageProcessor"
    files[videos]["video_processor_type"] = f"{line}VideoProcessor"
    files["processor_config.json"] = {"processor_class": processor}
    return files


DEEPSTACK: Sections = {"vision_config": {"deepstack_visual_indexes": None}}
THINKS = {
    "template": qwen3_5.TEMPLATE,
    "conversation": tiny_qwen.CONVERSATION + "<think>\n",
}
ALIKE: dict[str, Tiny] = {
    "qwen3_5": _alike("qwen3_vl", "qwen3_5", {"text_config": GATED_DELTA}, DEEPSTACK, **THINKS),
    "qwen3_5_moe": _alike(
        "qwen3_vl",
        "qwen3_5_moe",
        {"text_config": GATED_DELTA | EXPERTS | SHARED},
        {**DEEPSTACK, "text_config": {"intermediate_size": None}},
        **THINKS,
    ),
    "glm4v_moe": _alike("glm4v", "glm4v_moe", {"text_config": EXPERTS | ROUTED}, {}),
    "glm46v": _alike("glm4v", "glm46v", {}, {}, files=_glm_files("Glm46V", "Glm46VProcessor")),
    "glmga": _alike("glm4v", "glmga", {}, {}, files=_glm_files("Glmga", "Glm46VProcessor")),
    "glm_ocr": _alike(
        "glm4v",
        "glm_ocr",
        {"text_config": {"head_dim": WIDTH // 4}},
        {},
        files=_glm_files("Glm46V", "Glm46VProcessor"),
    ),
}
MODELS = {name: tiny for name, tiny in ALIKE.items() if name in CONFIG_MAPPING}
