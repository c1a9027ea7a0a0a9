"""Tiny models of Gemma 4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny_base import TEXT, VISION, Made, Size, Tiny, noise
from transformers import CONFIG_MAPPING

from vtprune.models import gemma4

Token = Callable[[str], int]
PATCH, POOL = 4, 3
SIDE = PATCH * POOL
BUDGET = 24
"""Tokens that made-up pictures are filled up to."""
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SPECIAL = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"),
    *("<|image>", "<|image|>", "<image|>", "<|video|>", "<|audio>", "<|audio|>", "<audio|>"),
)
NAMES = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "audio_token_id": "<|audio|>",
    "boi_token_id": "<|image>",
    "eoi_token_id": "<image|>",
    "boa_token_id": "<|audio>",
    "eoa_token_index": "<audio|>",
}


def _config(token: Token, kind: str = "gemma4") -> dict[str, Any]:
    """Windows, keys and values of earlier layers, heads of two widths, inputs to each layer, and
    pictures seen both ways: what the published sizes have some of each."""
    text = {**TEXT, "head_dim": 16, "global_head_dim": 32, "sliding_window": 1024}
    text |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
    text |= {"num_kv_shared_layers": 2, "use_bidirectional_attention": "vision"}
    text |= {f"{name}_token_id": token(f"<{name}>") for name in ("pad", "eos", "bos")}
    if kind == "gemma4":
        text |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": TEXT["vocab_size"]}
        vision = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
        vision |= {"num_key_value_heads": 2, "position_embedding_size": 128}
    else:
        vision = {"mm_embed_dim": 32, "mm_posemb_size": 128, "output_proj_dims": 32}
    vision |= {"patch_size": PATCH, "pooling_kernel_size": POOL}
    return {
        "model_type": kind,
        "text_config": text,
        "vision_config": vision,
        "audio_config": None,
        **{field: token(text) for field, text in NAMES.items()},
    }


def _unified_config(token: Token) -> dict[str, Any]:
    return _config(token, "gemma4_unified")


def _media(
    model: Any, token: Token, sizes: Sequence[Size], frames: int, generator: torch.Generator
) -> Made:
    """Pictures and frames in a few large tokens, filled up to one budget."""
    unified = model.config.model_type == "gemma4_unified"
    made: dict[str, torch.Tensor] = {}
    items: list[list[int]] = []
    for modality, shapes in (("image", sizes), ("video", [(45, 60)] * frames)):
        parts = []
        for size in shapes:
            height, width = (edge // 30 * SIDE for edge in size)
            pixels = noise((1, 3, height, width), generator, model)
            side, most = (SIDE, BUDGET) if unified else (PATCH, BUDGET * POOL**2)
            parts.append(gemma4.cut(pixels, side, most))
        if not parts:
            continue
        patches, places = (torch.cat(part) for part in zip(*parts, strict=True))
        names = gemma4.KEYS[modality]
        counts = (places[..., 0] >= 0).sum(1) // (1 if unified else POOL**2)
        pads = [[token(f"<|{modality}|>")] * int(count) for count in counts]
        blocks = [[token("<|image>"), *block, token("<image|>")] for block in pads]
        if modality == "image":
            items += blocks
        else:
            times = [[ord(letter) - 33 for letter in f"00:0{number}"] for number in range(frames)]
            pairs = zip(times, blocks, strict=True)
            items.append([token_id for pair in pairs for part in pair for token_id in part])
            if gemma4.joins_videos(model.config):
                made["num_frames_per_video"] = torch.tensor([frames])
            else:
                patches, places = patches[None], places[None]
        made |= dict(zip(names, (patches, places), strict=True))
    return made, items


def _types(made: dict[str, torch.Tensor], token: Token) -> dict[str, torch.Tensor]:
    ids = made["input_ids"]
    types = torch.zeros_like(ids)
    types[ids == token("<|image|>")] = 1
    types[ids == token("<|video|>")] = 2
    return {"mm_token_type_ids": types}


def _files(kind: str) -> dict[str, dict[str, Any]]:
    sizes = {"patch_size": PATCH, "pooling_kernel_size": POOL, "max_soft_tokens": 70}
    return {
        "preprocessor_config.json": {"image_processor_type": f"{kind}ImageProcessor", **sizes},
        "video_preprocessor_config.json": {
            "video_processor_type": f"{kind}VideoProcessor",
            "num_frames": 8,
            **sizes,
        },
        "processor_config.json": {
            "processor_class": f"{kind}Processor",
            "feature_extractor": {"feature_extractor_type": f"{kind}AudioFeatureExtractor"},
        },
    }


SAYS = (
    "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\n\n\n<|image|>\n\n\n\n<|image|>\n\nFirst?"
    "<turn|>\n<|turn>model\nRed.<turn|>\n<|turn>user\n\n\n<|image|>\n\nAnd now?<turn|>\n"
    "<|turn>model\n"
)
COMMON: dict[str, Any] = {
    "kinds": ("image", "several", "video", "mixed"),
    "special": SPECIAL,
    "media": _media,
    "finish": _types,
    "pad": "<pad>",
    "eos": "<eos>",
    "bos": "<bos>",
    "unk": "<unk>",
    "named": {
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "image_token": "<|image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    },
}
MODELS: dict[str, Tiny] = {}
if "gemma4" in CONFIG_MAPPING:
    MODELS["gemma4"] = Tiny(
        **COMMON,
        config=_config,
        attention="vision_tower.encoder.layers.1.self_attn",
        template=gemma4.TEMPLATE,
        files=_files("Gemma4"),
        conversation=SAYS,
    )
if "gemma4_unified" in CONFIG_MAPPING:
    MODELS["gemma4_unified"] = Tiny(
        **COMMON,
        config=_unified_config,
        attention="",
        template=gemma4.TEMPLATE + gemma4.NO_THOUGHT,
        files=_files("Gemma4Unified"),
        conversation=SAYS + "<|channel>thought\n<channel|>",
    )
