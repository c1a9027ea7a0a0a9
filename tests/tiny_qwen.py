"""Tiny models of the Qwen families and their relatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tiny_base import PATCH, TEXT, VISION, WIDTH, Made, Size, Tiny, noise

from vtprune.models import qwen2_vl, qwen3_vl

Token = Callable[[str], int]
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
NAMES = {
    "image": "image_pad",
    "video": "video_pad",
    "vision_start": "vision_start",
    "vision_end": "vision_end",
}


TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2},
    "qwen2_5_vl": {"out_hidden_size": WIDTH, "fullatt_block_indexes": [1], "window_size": 56},
    "qwen3_vl": {
        "out_hidden_size": WIDTH,
        "depth": 3,
        "patch_size": 16,
        "deepstack_visual_indexes": [0, 1, 2],
        "num_position_embeddings": 64,
    },
}


def _config(token: Token, name: str) -> dict[str, Any]:
    vision = {**VISION, "depth": 2, "num_heads": 2, "patch_size": PATCH, **TOWERS[name]}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    text = {**TEXT, "rope_parameters": rope, "eos_token_id": token("<|im_end|>")}
    text |= {"head_dim": 16} if name == "qwen3_vl" else {"bos_token_id": None}
    ids = {f"{key}_token_id": token(f"<|{word}|>") for key, word in NAMES.items()}
    return {"model_type": name, "text_config": text, "vision_config": vision, **ids}


def _media(
    model: Any, token: Token, sizes: Sequence[Size], frames: int, generator: torch.Generator
) -> Made:
    name, patch = model.config.model_type, model.config.vision_config.patch_size
    made: dict[str, torch.Tensor] = {}
    items: list[list[int]] = []
    grids = {
        "image": [[1, height // 28 * 2, width // 28 * 2] for height, width in sizes],
        "video": [[frames // 2, 4, 6]] if frames else [],
    }
    for modality, thw in grids.items():
        if not thw:
            continue
        grid = torch.tensor(thw)
        key = "pixel_values" if modality == "image" else "pixel_values_videos"
        made[key] = noise((int(grid.prod(1).sum()), 3 * 2 * patch**2), generator, model)
        made[f"{modality}_grid_thw"] = grid
        start, end = token("<|vision_start|>"), token("<|vision_end|>")
        for time, rows, cols in thw:
            pads = [token(f"<|{modality}_pad|>")] * (rows * cols // 4)
            block = pads * time
            if name == "qwen3_vl" and modality == "video":  # a time before every step
                block = [*b"<1.0>", start, *pads, end] * time
            items.append([start, *block, end])
    if frames and name == "qwen2_5_vl":
        made["second_per_grid_ts"] = torch.tensor([1.0])
    return made, items


def _types(made: dict[str, torch.Tensor], token: Token) -> dict[str, torch.Tensor]:
    image = made["input_ids"] == token("<|image_pad|>")
    video = made["input_ids"] == token("<|video_pad|>")
    return {"mm_token_type_ids": image.long() + 2 * video.long()}


def _files(processor: str) -> dict[str, dict[str, Any]]:
    return {**FILES, "processor_config.json": {"processor_class": processor}}


FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 4 * 28 * 28,
        "max_pixels": 64 * 28 * 28,
    },
    "video_preprocessor_config.json": {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28},
    },
}
OF_THREE: dict[str, Any] = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
FILES_OF_THREE: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 64 * 32 * 32},
        **OF_THREE,
    },
    "video_preprocessor_config.json": {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 48 * 32 * 32},
        **OF_THREE,
    },
    "processor_config.json": {"processor_class": "Qwen3VLProcessor"},
}


def _qwen(name: str, template: str, files: dict[str, dict[str, Any]]) -> Tiny:
    return Tiny(
        kinds=("image", "several", "video", "mixed"),
        special=SPECIAL,
        config=partial(_config, name=name),
        media=_media,
        finish=_types,
        template=template,
        files=files,
        pad="<|endoftext|>",
        eos="<|im_end|>",
    )


MODELS: dict[str, Tiny] = {
    "qwen2_vl": _qwen("qwen2_vl", qwen2_vl.TEMPLATE, _files("Qwen2VLProcessor")),
    "qwen2_5_vl": _qwen("qwen2_5_vl", qwen2_vl.TEMPLATE, _files("Qwen2_5_VLProcessor")),
    "qwen3_vl": _qwen("qwen3_vl", qwen3_vl.TEMPLATE, FILES_OF_THREE),
}
