"""Tiny models of LLaVA and what descends from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny_base import PATCH, TEXT, TILE, VISION, Made, Size, Tiny, noise

from vtprune.models import llava, llava_onevision

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168], [168, 168], [112, 168]]
HALF = [0.5, 0.5, 0.5]
TILES = {"height": TILE, "width": TILE}
SIDE = TILE // PATCH
Token = Callable[[str], int]


def _tower(kind: str) -> dict[str, Any]:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return {**VISION, **sizes, "image_size": TILE, "patch_size": PATCH, "model_type": kind}


def _llama(token: Token, kind: str = "llama") -> dict[str, Any]:
    named = {f"{name}_token_id": token(text) for name, text in START.items()}
    return {**TEXT, **named, "model_type": kind, "sliding_window": None}


START = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
LLAMA: dict[str, Any] = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
LLAMA_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")


def _onevision_config(token: Token) -> dict[str, Any]:
    text = {**TEXT, "model_type": "qwen2", "eos_token_id": token("<|im_end|>")}
    return {
        "model_type": "llava_onevision",
        "text_config": text,
        "vision_config": _tower("siglip_vision_model") | {"vision_use_head": False},
        "image_token_index": token("<image>"),
        "video_token_index": token("<video>"),
        "image_grid_pinpoints": PINPOINTS,
        "vision_aspect_ratio": "anyres_max_4",
    }


def _next_config(token: Token, kind: str = "llama") -> dict[str, Any]:
    return {
        "model_type": "llava_next",
        "text_config": _llama(token, kind),
        "vision_config": _tower("clip_vision_model"),
        "image_token_index": token("<image>"),
        "image_grid_pinpoints": PINPOINTS,
    }


def _next_video_config(token: Token) -> dict[str, Any]:
    own = {"model_type": "llava_next_video", "video_token_index": token("<video>")}
    return _next_config(token) | own


def _plain_config(token: Token) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "text_config": _llama(token),
        "vision_config": _tower("clip_vision_model"),
        "image_token_index": token("<image>"),
        "image_seq_length": SIDE**2,
    }


def _video_llava_config(token: Token) -> dict[str, Any]:
    own = {"model_type": "video_llava", "video_token_index": token("<video>")}
    return _plain_config(token) | own | {"video_seq_length": 4 * (SIDE**2 + 1)}


def _mistral_config(token: Token) -> dict[str, Any]:
    return _next_config(token, "mistral")


def _tiled(
    model: Any, token: Token, sizes: Sequence[Size], frames: int, generator: torch.Generator
) -> Made:
    """Pictures in tiles, and where the family has them a video."""
    made: dict[str, torch.Tensor] = {}
    items: list[list[int]] = []
    onevision = model.config.model_type == "llava_onevision"
    if sizes:
        # More tiles than any pinpoint has: the model cuts off what it does not need.
        tiles = 1 if onevision and len(sizes) > 1 else 10
        made["pixel_values"] = noise((len(sizes), tiles, 3, TILE, TILE), generator, model)
        made["image_sizes"] = torch.tensor(sizes)
        if onevision:
            made["batch_num_images"] = torch.tensor([len(sizes)])
        with torch.no_grad():
            features = model.model.get_image_features(**made, return_dict=True).pooler_output
        items += [[token("<image>")] * len(feature) for feature in features]
    if frames:
        made["pixel_values_videos"] = noise((1, frames, 3, TILE, TILE), generator, model)
        count = frames * (SIDE // 2) ** 2
        items.append([token("<video>")] * (count + 1 if onevision else count))
    return made, items


def _square(
    model: Any, token: Token, sizes: Sequence[Size], frames: int, generator: torch.Generator
) -> Made:
    """Square pictures, and for Video-LLaVA a video with a CLS token a frame."""
    made: dict[str, torch.Tensor] = {}
    items: list[list[int]] = []
    if sizes:
        key = "pixel_values_images" if model.config.model_type == "video_llava" else "pixel_values"
        made[key] = noise((len(sizes), 3, TILE, TILE), generator, model)
        items += [[token("<image>")] * SIDE**2 for _ in sizes]
    if frames:
        made["pixel_values_videos"] = noise((1, frames, 3, TILE, TILE), generator, model)
        items.append([token("<video>")] * (frames * (SIDE**2 + 1)))
    return made, items


ONEVISION_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": TILES,
        "image_grid_pinpoints": PINPOINTS,
        "image_mean": HALF,
        "image_std": HALF,
    },
    "video_preprocessor_config.json": {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "size": TILES,
        "image_mean": HALF,
        "image_std": HALF,
    },
    "processor_config.json": {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": (TILE // PATCH) ** 2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_4",
    },
}
NEXT_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": TILE},
        "crop_size": TILES,
        "image_grid_pinpoints": PINPOINTS,
    },
    "processor_config.json": {
        "processor_class": "LlavaNextProcessor",
        "patch_size": PATCH,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    },
}
CROPPED = {"size": {"shortest_edge": TILE}, "crop_size": TILES}
NEXT_VIDEO_FILES: dict[str, dict[str, Any]] = {
    **NEXT_FILES,
    "video_preprocessor_config.json": {
        "video_processor_type": "LlavaNextVideoVideoProcessor",
        **CROPPED,
    },
    "processor_config.json": NEXT_FILES["processor_config.json"]
    | {"processor_class": "LlavaNextVideoProcessor"},
}
PLAIN_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor", **CROPPED},
    "processor_config.json": NEXT_FILES["processor_config.json"]
    | {"processor_class": "LlavaProcessor"},
}
VIDEO_LLAVA_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {"image_processor_type": "VideoLlavaImageProcessor", **CROPPED},
    "video_preprocessor_config.json": {
        "video_processor_type": "VideoLlavaVideoProcessor",
        **CROPPED,
    },
    "processor_config.json": NEXT_FILES["processor_config.json"]
    | {"processor_class": "VideoLlavaProcessor"},
}
VICUNA: dict[str, Any] = {
    **LLAMA,
    "template": llava.VICUNA,
    "conversation": "Be brief. USER: <image>\n<image>\nFirst? ASSISTANT: Red. "
    "USER: <image>\nAnd now? ASSISTANT:",
}

MODELS: dict[str, Tiny] = {
    "llava_onevision": Tiny(
        kinds=("image", "several", "video", "mixed"),
        attention="vision_tower.encoder.layers.1.self_attn",
        unbroken=("image", "video"),
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
        config=_onevision_config,
        media=_tiled,
        template=llava_onevision.TEMPLATE,
        files=ONEVISION_FILES,
        conversation="<|im_start|>system \nBe brief.<|im_end|>"
        "<|im_start|>user <image><image>\nFirst?<|im_end|><|im_start|>assistant \nRed.<|im_end|>"
        "<|im_start|>user <image>\nAnd now?<|im_end|><|im_start|>assistant\n",
        pad="<|endoftext|>",
        eos="<|im_end|>",
    ),
    "llava_next": Tiny(
        kinds=("image", "several"),
        attention="vision_tower.encoder.layers.0.self_attn",
        has_cls=True,
        unbroken=("image",),
        tiles_apart=True,
        special=LLAMA_SPECIAL,
        config=_next_config,
        media=_tiled,
        files=NEXT_FILES,
        **VICUNA,
    ),
    "llava_next_mistral": Tiny(
        kinds=("image", "several"),
        attention="vision_tower.encoder.layers.0.self_attn",
        has_cls=True,
        unbroken=("image",),
        tiles_apart=True,
        special=LLAMA_SPECIAL,
        config=_mistral_config,
        media=_tiled,
        template=llava.MISTRAL,
        files=NEXT_FILES,
        conversation="<<SYS>>\nBe brief.\n<</SYS>>\n\n"
        "[INST] <image>\n<image>\nFirst? [/INST] Red.</s> [INST] <image>\nAnd now? [/INST]",
        **LLAMA,
    ),
    "llava": Tiny(
        kinds=("image", "several"),
        attention="vision_tower.encoder.layers.0.self_attn",  # of 2; feature layer -2
        has_cls=True,
        unbroken=("image",),
        one_size=True,
        special=LLAMA_SPECIAL,
        config=_plain_config,
        media=_square,
        files=PLAIN_FILES,
        **VICUNA,
    ),
    "llava_next_video": Tiny(
        kinds=("image", "several", "video", "mixed"),
        attention="vision_tower.encoder.layers.0.self_attn",
        has_cls=True,
        unbroken=("image", "video"),
        tiles_apart=True,
        special=(*LLAMA_SPECIAL, "<video>"),
        config=_next_video_config,
        media=_tiled,
        files=NEXT_VIDEO_FILES,
        **VICUNA,
    ),
    "video_llava": Tiny(
        kinds=("image", "several", "video", "mixed"),
        attention="{modality}_tower.encoder.layers.0.self_attn",
        has_cls=True,
        unbroken=("image", "video"),
        one_size=True,
        special=(*LLAMA_SPECIAL, "<video>"),
        config=_video_llava_config,
        media=_square,
        files=VIDEO_LLAVA_FILES,
        **VICUNA,
    ),
}
