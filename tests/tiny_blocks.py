"""Tiny models whose pictures and video frames are blocks of one placeholder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny_base import PATCH, TEXT, TILE, VISION, Made, Size, Tiny, noise

from vtprune.models import aya_vision, idefics3, internvl, smolvlm

Token = Callable[[str], int]
UNIT = (TILE // PATCH // 2) ** 2
"""Placeholders a tile."""
TOWER: dict[str, Any] = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 2}
EDGES = {"height": TILE, "width": TILE}


def _ids(text: str) -> list[int]:
    """The tiny tokenizers' ids of printable text: bytes in the order of a byte-level alphabet."""
    return [ord(letter) - 33 if letter != "\n" else BREAK for letter in text.replace(" ", "")]


BREAK = 200
"""Any token that is not a printable letter, for the ends of lines."""


def _shape(size: Size) -> tuple[int, int]:
    """Rows and columns of a picture's tiles."""
    return max(size[0] // TILE, 1), max(size[1] // TILE, 1)


def _internvl_config(token: Token) -> dict[str, Any]:
    tower = {"model_type": "internvl_vision", "image_size": [TILE] * 2, "patch_size": [PATCH] * 2}
    return {
        "model_type": "internvl",
        "text_config": {**TEXT, "model_type": "qwen2", "eos_token_id": token("<|im_end|>")},
        "vision_config": TOWER | tower,
        "image_token_id": token("<IMG_CONTEXT>"),
        "image_seq_length": UNIT,
    }


def _internvl_media(
    model: Any, token: Token, sizes: Sequence[Size], frames: int, generator: torch.Generator
) -> Made:
    start, end = token("<img>"), token("</img>")
    items: list[list[int]] = []
    total = frames
    for size in sizes:
        rows, cols = _shape(size)
        units = rows * cols + (rows * cols > 1)
        items.append([start, *[token("<IMG_CONTEXT>")] * (UNIT * units), end])
        total += units
    if frames:
        block = [start, *[token("<IMG_CONTEXT>")] * UNIT, end]
        video = []
        for number in range(1, frames + 1):
            video += [*_ids(f"Frame{number}:"), *block, BREAK]
        items.append(video)
    if not total:
        return {}, items
    return {"pixel_values": noise((total, 3, TILE, TILE), generator, model)}, items


def _aya_config(token: Token) -> dict[str, Any]:
    tower = {"model_type": "siglip_vision_model", "image_size": TILE, "patch_size": PATCH}
    text = {**TEXT, "model_type": "cohere2", "sliding_window": 512, "layer_norm_eps": 1e-5}
    text |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
    names = {"pad": "<PAD>", "bos": "<BOS_TOKEN>", "eos": "<|END_OF_TURN_TOKEN|>"}
    text |= {f"{name}_token_id": token(spelt) for name, spelt in names.items()}
    return {
        "model_type": "aya_vision",
        "text_config": text,
        "vision_config": TOWER | tower | {"vision_use_head": False},
        "image_token_index": token("<|IMG_PATCH|>"),
    }


def _aya_media(
    model: Any, token: Token, sizes: Sequence[Size], frames: int, generator: torch.Generator
) -> Made:
    pads = [token("<|IMG_PATCH|>")] * UNIT
    items: list[list[int]] = []
    total = 0
    for size in sizes:
        rows, cols = _shape(size)
        count = rows * cols if rows * cols > 1 else 0
        item = [token("<|START_OF_IMG|>")]
        for number in range(1, count + 1):
            item += [*_ids(f"TILE_{number}"), *pads]
        items.append([*item, token("TILE_GLOBAL"), *pads, token("<|END_OF_IMG|>")])
        total += count + 1
    pixels = {"pixel_values": noise((total, 3, TILE, TILE), generator, model)} if total else {}
    return pixels, items


def _aya_merge(projector: Any, features: torch.Tensor) -> torch.Tensor:
    return projector.pixel_shuffle(features).flatten(1, 2)


def _split_config(token: Token, kind: str) -> dict[str, Any]:
    return {
        "model_type": kind,
        "text_config": {
            **TEXT,
            "model_type": "llama",
            "pad_token_id": token("<|endoftext|>"),
            "bos_token_id": token("<|im_start|>"),
            "eos_token_id": token("<end_of_utterance>"),
        },
        "vision_config": TOWER | {"image_size": TILE, "patch_size": PATCH},
        "image_token_id": token("<image>"),
        "scale_factor": 2,
    }


def _smolvlm_config(token: Token) -> dict[str, Any]:
    return _split_config(token, "smolvlm")


def _idefics3_config(token: Token) -> dict[str, Any]:
    return _split_config(token, "idefics3")


def _split_media(
    model: Any, token: Token, sizes: Sequence[Size], frames: int, generator: torch.Generator
) -> Made:
    around, tokens = token("<fake_token_around_image>"), [token("<image>")] * UNIT
    whole = [around, token("<global-img>"), *tokens, around]
    items: list[list[int]] = []
    total = frames
    for size in sizes:
        rows, cols = _shape(size)
        item = []
        if rows * cols > 1:
            for row in range(rows):
                for col in range(cols):
                    item += [around, *_ids(f"<row_{row + 1}_col_{col + 1}>"), *tokens]
                item.append(BREAK)
            item.append(BREAK)
            total += rows * cols
        items.append(item + whole)
        total += 1
    if frames:
        video = []
        for number in range(frames):
            video += [BREAK, *_ids(f"Frame from 00:0{number % 10}:"), *whole]
        items.append(video)
    if not total:
        return {}, items
    pixels = noise((1, total, 3, TILE, TILE), generator, model)
    mask = torch.ones((1, total, TILE, TILE), dtype=torch.long)
    return {"pixel_values": pixels, "pixel_attention_mask": mask}, items


INTERNVL_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": EDGES,
        "max_patches": 6,
    },
    "video_preprocessor_config.json": {
        "video_processor_type": "InternVLVideoProcessor",
        "size": EDGES,
    },
    "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": UNIT},
}
AYA_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": True,
        "size": EDGES,
        "max_patches": 6,
    },
    "processor_config.json": {
        "processor_class": "AyaVisionProcessor",
        "img_size": TILE,
        "patch_size": PATCH,
        "downsample_factor": 2,
    },
}
# Bicubic, which all resizes agree on; the checkpoints' own is Lanczos.
SPLIT = {"size": {"longest_edge": 3 * TILE}, "max_image_size": {"longest_edge": TILE}}
SPLIT |= {"resample": 3}
IDEFICS3_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {"image_processor_type": "Idefics3ImageProcessor", **SPLIT},
    "processor_config.json": {"processor_class": "Idefics3Processor", "image_seq_len": UNIT},
}
SMOLVLM_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {"image_processor_type": "SmolVLMImageProcessor", **SPLIT},
    "video_preprocessor_config.json": {
        "video_processor_type": "SmolVLMVideoProcessor",
        **SPLIT,
        "fps": 1,
        "num_frames": 64,
    },
    "processor_config.json": {"processor_class": "SmolVLMProcessor", "image_seq_len": UNIT},
}
SAYS = (
    "System: Be brief.<end_of_utterance>\nUser:<image><image>First?<end_of_utterance>\n"
    "Assistant: Red.<end_of_utterance>\nUser:<image>And now?<end_of_utterance>\nAssistant:"
)

MODELS: dict[str, Tiny] = {
    "internvl": Tiny(
        kinds=("image", "several", "video", "mixed"),
        attention="vision_tower.encoder.layer.1.attention",
        has_cls=True,
        unbroken=("image",),
        tiles_apart=True,
        special=(
            *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            *("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        ),
        config=_internvl_config,
        media=_internvl_media,
        template=internvl.TEMPLATE,
        files=INTERNVL_FILES,
        conversation="<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<IMG_CONTEXT>\n<IMG_CONTEXT>\nFirst?<|im_end|>\n"
        "<|im_start|>assistant\nRed.<|im_end|>\n"
        "<|im_start|>user\n<IMG_CONTEXT>\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
        pad="<|endoftext|>",
        eos="<|im_end|>",
        named={
            "extra_special_tokens": {
                "start_image_token": "<img>",
                "end_image_token": "</img>",
                "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>",
            }
        },
    ),
    "aya_vision": Tiny(
        kinds=("image", "several"),
        attention="vision_tower.encoder.layers.1.self_attn",
        tiles_apart=True,
        special=(
            *("<PAD>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<image>"),
            *("<|START_OF_IMG|>", "<|IMG_PATCH|>", "<|END_OF_IMG|>", "TILE_GLOBAL"),
        ),
        config=_aya_config,
        media=_aya_media,
        merge=_aya_merge,
        template=aya_vision.TEMPLATE,
        files=AYA_FILES,
        conversation="<BOS_TOKEN>"
        "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|><image><image>First?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Red.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|><image>And now?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        pad="<PAD>",
        eos="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
    ),
    "smolvlm": Tiny(
        kinds=("image", "several", "video"),
        attention="vision_model.encoder.layers.1.self_attn",
        tiles_apart=True,
        special=(
            *("<|endoftext|>", "<|im_start|>", "<end_of_utterance>"),
            *("<fake_token_around_image>", "<image>", "<global-img>"),
        ),
        config=_smolvlm_config,
        media=_split_media,
        template=smolvlm.TEMPLATE,
        files=SMOLVLM_FILES,
        conversation="<|im_start|>" + SAYS,
        pad="<|endoftext|>",
        eos="<end_of_utterance>",
    ),
    "idefics3": Tiny(
        kinds=("image", "several"),
        attention="vision_model.encoder.layers.1.self_attn",
        tiles_apart=True,
        special=(
            *("<|endoftext|>", "<|im_start|>", "<end_of_utterance>"),
            *("<fake_token_around_image>", "<image>", "<global-img>", "<|begin_of_text|>"),
        ),
        config=_idefics3_config,
        media=_split_media,
        template=idefics3.TEMPLATE,
        files=IDEFICS3_FILES,
        conversation="<|begin_of_text|>" + SAYS,
        pad="<|endoftext|>",
        eos="<end_of_utterance>",
    ),
}
