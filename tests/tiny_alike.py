"""Tiny models of families that differ little from another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import tiny_qwen
import torch
from tiny_base import WIDTH, Made, Size, Tiny
from transformers import CONFIG_MAPPING

from vtprune.models import qwen3_5, qwen3_vl, qwen_omni

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


KEPT = tiny_qwen.SPECIAL[:3]
"""Special tokens that all of Qwen's models have."""


def _omni_files(processor: str, patch: int) -> dict[str, dict[str, Any]]:
    sound = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8}
    images, videos = "preprocessor_config.json", "video_preprocessor_config.json"
    files = {name: dict(values) for name, values in tiny_qwen.FILES.items()}
    files[images] |= sound
    if patch == 16:
        files[images] |= tiny_qwen.OF_THREE
        files[videos] |= tiny_qwen.OF_THREE
    files["processor_config.json"] = {"processor_class": processor}
    return files


def _omni_config(token: Token, kind: str, patch: int) -> dict[str, Any]:
    base, audio = ("qwen2_5_vl", SOUND) if patch == 14 else ("qwen3_vl", SOUND_OF_THREE)
    fields = tiny_qwen.MODELS[base].config(lambda text: token(text) if text in KEPT else 0)
    fields = {key: value for key, value in fields.items() if key.endswith("config")}
    if patch == 16:
        fields["text_config"] = fields["text_config"] | EXPERTS | {"num_experts": 6}
    marks = ("image", "video", "audio", "vision_start", "vision_end", "audio_start", "audio_end")
    ids = {mark: token(TOKENS_OF[kind][mark]) for mark in marks}
    for mark in ("image", "video", "audio"):
        number = "index" if kind == "qwen2_5_omni_thinker" else "id"
        fields[f"{mark}_token_{number}"] = ids.pop(mark)
    fields |= {f"{mark}_token_id": number for mark, number in ids.items()}
    fields["position_id_per_seconds"] = 13
    return {"model_type": kind, **fields, "audio_config": audio}


def _omni_media(
    model: Any, token: Token, sizes: Sequence[Size], frames: int, generator: torch.Generator
) -> Made:
    """Qwen2-VL's, between this family's own marks."""
    kind = model.config.model_type
    renamed = {f"<|{word}|>": TOKENS_OF[kind][mark] for mark, word in tiny_qwen.NAMES.items()}
    base = tiny_qwen.MODELS["qwen2_vl"]
    made, items = base.media(model, lambda text: token(renamed[text]), sizes, frames, generator)
    if frames:
        made["video_second_per_grid"] = torch.tensor([1.0])
    return made, items


SOUND = {
    "num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "d_model": 16, "max_source_positions": 64, "n_window": 4, "output_dim": WIDTH,
}  # fmt: skip
SOUND_OF_THREE = SOUND | {"n_window": 50, "n_window_infer": 100, "downsample_hidden_size": 8}
TOKENS_OF = {
    "qwen2_5_omni_thinker": {
        "image": "<|IMAGE|>", "video": "<|VIDEO|>", "audio": "<|AUDIO|>",
        "vision_start": "<|vision_bos|>", "vision_end": "<|vision_eos|>",
        "audio_start": "<|audio_bos|>", "audio_end": "<|audio_eos|>",
    },
    "qwen3_omni_moe_thinker": {
        "image": "<|image_pad|>", "video": "<|video_pad|>", "audio": "<|audio_pad|>",
        "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>",
        "audio_start": "<|audio_start|>", "audio_end": "<|audio_end|>",
    },
}  # fmt: skip


def _omni(kind: str, template: str, patch: int) -> Tiny:
    texts = TOKENS_OF[kind]
    base = tiny_qwen.MODELS["qwen2_5_vl" if patch == 14 else "qwen3_vl"]
    conversation = base.conversation
    for mark, word in tiny_qwen.NAMES.items():
        conversation = conversation.replace(f"<|{word}|>", texts[mark])
    name = "Qwen2_5OmniProcessor" if patch == 14 else "Qwen3OmniMoeProcessor"
    named = {f"{mark}_token": texts[mark] for mark in ("image", "video", "audio")}
    for mark in ("vision", "audio"):
        named |= {f"{mark}_{end}_token": texts[f"{mark}_{place}"]
                  for end, place in (("bos", "start"), ("eos", "end"))}  # fmt: skip
    return dataclasses.replace(
        base,
        special=(*KEPT, *texts.values()),
        config=partial(_omni_config, kind=kind, patch=patch),
        media=_omni_media,
        finish=None,
        template=template,
        files=_omni_files(name, patch),
        conversation=conversation,
        named=named,
    )


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
    "qwen2_5_omni_thinker": _omni("qwen2_5_omni_thinker", qwen_omni.OMNI_TEMPLATE, 14),
    "qwen3_omni_moe_thinker": _omni("qwen3_omni_moe_thinker", qwen3_vl.TEMPLATE, 16),
}
MODELS = {name: tiny for name, tiny in ALIKE.items() if name in CONFIG_MAPPING}
