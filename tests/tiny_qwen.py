"""Tiny models of the Qwen families and their relatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny_base import PATCH, TEXT, VISION, WIDTH, Made, Size, Tiny, noise

from vtprune.models import qwen2_5_vl

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


def _config(token: Token) -> dict[str, Any]:
    vision = {**VISION, "depth": 2, "num_heads": 2, "out_hidden_size": WIDTH, "patch_size": PATCH}
    vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    text = {**TEXT, "rope_parameters": rope, "eos_token_id": token("<|im_end|>")}
    ids = {f"{key}_token_id": token(f"<|{word}|>") for key, word in NAMES.items()}
    return {
        "model_type": "qwen2_5_vl",
        "text_config": text | {"bos_token_id": None},
        "vision_config": vision,
        **ids,
    }


def _media(
    model: Any, token: Token, sizes: Sequence[Size], frames: int, generator: torch.Generator
) -> Made:
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
        made[key] = noise((int(grid.prod(1).sum()), 3 * 2 * PATCH**2), generator, model)
        made[f"{modality}_grid_thw"] = grid
        start, end = token("<|vision_start|>"), token("<|vision_end|>")
        for count in grid.prod(1).tolist():
            items.append([start, *[token(f"<|{modality}_pad|>")] * (count // 4), end])
    if frames:
        made["second_per_grid_ts"] = torch.tensor([1.0])
    return made, items


def _types(made: dict[str, torch.Tensor], token: Token) -> dict[str, torch.Tensor]:
    image = made["input_ids"] == token("<|image_pad|>")
    video = made["input_ids"] == token("<|video_pad|>")
    return {"mm_token_type_ids": image.long() + 2 * video.long()}


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
    "processor_config.json": {"processor_class": "Qwen2_5_VLProcessor"},
}

MODELS: dict[str, Tiny] = {
    "qwen2_5_vl": Tiny(
        kinds=("image", "several", "video", "mixed"),
        special=SPECIAL,
        config=_config,
        media=_media,
        finish=_types,
        template=qwen2_5_vl.TEMPLATE,
        files=FILES,
        pad="<|endoftext|>",
        eos="<|im_end|>",
    ),
}
