"""Tiny models of the Qwen families and their relatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tiny_base import PATCH, TEXT, TILE, VISION, WIDTH, Made, Size, Tiny, noise
from transformers import CONFIG_MAPPING

from vtprune.models import gemma3, glm4v, molmo2, qwen2_vl, qwen3_vl

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
            if (
                name.startswith(("qwen3_vl", "qwen3_5")) and modality == "video"
            ):  # a time before every step
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


PAD = "<|vision_start|><|image_pad|><|vision_end|>"
CONVERSATION = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    + PAD * 2
    + "First?<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n<|im_start|>user\n"
    + PAD
    + "And now?<|im_end|>\n<|im_start|>assistant\n"
)


def _qwen(
    name: str,
    template: str,
    files: dict[str, dict[str, Any]],
    unbroken: tuple[str, ...],
    layer: int,
) -> Tiny:
    return Tiny(
        kinds=("image", "several", "video", "mixed"),
        attention=f"visual.blocks.{layer}.attn",
        unbroken=unbroken,
        special=SPECIAL,
        config=partial(_config, name=name),
        media=_media,
        finish=_types,
        template=template,
        files=files,
        conversation=CONVERSATION,
        pad="<|endoftext|>",
        eos="<|im_end|>",
    )


GEMMA_SIDE = 2
"""Tokens along a side of a picture."""
GEMMA_SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)


def _gemma_config(token: Token) -> dict[str, Any]:
    vision = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": TILE}
    vision |= {"model_type": "siglip_vision_model", "patch_size": PATCH, "vision_use_head": False}
    text = {**TEXT, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 1024}
    text |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
    text |= {f"{name}_token_id": token(f"<{name}>") for name in ("pad", "eos", "bos")}
    return {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": vision,
        "mm_tokens_per_image": GEMMA_SIDE**2,
        "boi_token_index": token("<start_of_image>"),
        "eoi_token_index": token("<end_of_image>"),
        "image_token_index": token("<image_soft_token>"),
    }


def _gemma_media(
    model: Any, token: Token, sizes: Sequence[Size], frames: int, generator: torch.Generator
) -> Made:
    pads = [token("<image_soft_token>")] * GEMMA_SIDE**2
    one = [*b"\n\n", token("<start_of_image>"), *pads, token("<end_of_image>"), *b"\n\n"]
    if not sizes:
        return {}, []
    pixels = noise((len(sizes), 3, TILE, TILE), generator, model)
    return {"pixel_values": pixels}, [one] * len(sizes)


def _gemma_types(made: dict[str, torch.Tensor], token: Token) -> dict[str, torch.Tensor]:
    return {"token_type_ids": (made["input_ids"] == token("<image_soft_token>")).long()}


GEMMA_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": TILE, "width": TILE},
        "do_pan_and_scan": None,
    },
    "processor_config.json": {
        "processor_class": "Gemma3Processor",
        "image_seq_length": GEMMA_SIDE**2,
    },
}

GLM_SPECIAL = (
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|begin_of_image|>",
    "<|image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|video|>",
    "<|end_of_video|>",
)


def _glm_config(token: Token) -> dict[str, Any]:
    vision = {**VISION, "depth": 2, "num_heads": 2, "patch_size": PATCH, "image_size": TILE}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    text = {**TEXT, "rope_parameters": rope, "eos_token_id": token("<|endoftext|>")}
    ids = {f"{kind}_token_id": token(f"<|{kind}|>") for kind in ("image", "video")}
    for kind in ("image", "video"):
        ids[f"{kind}_start_token_id"] = token(f"<|begin_of_{kind}|>")
        ids[f"{kind}_end_token_id"] = token(f"<|end_of_{kind}|>")
    vision["out_hidden_size"] = WIDTH
    return {"model_type": "glm4v", "text_config": text, "vision_config": vision, **ids}


def _glm_media(
    model: Any, token: Token, sizes: Sequence[Size], frames: int, generator: torch.Generator
) -> Made:
    made: dict[str, torch.Tensor] = {}
    grids = [[1, height // 28 * 2, width // 28 * 2] for height, width in sizes]
    modality, key = "image", "pixel_values"
    if frames:
        grids, modality, key = [[frames // 2, 4, 6]], "video", "pixel_values_videos"
    items: list[list[int]] = []
    for time, rows, cols in grids:
        pads = [token("<|image|>")] * (rows * cols // 4)
        one = [token("<|begin_of_image|>"), *pads, token("<|end_of_image|>")]
        if frames:
            one = [token("<|begin_of_video|>"), *[*one, *b"1"] * time, token("<|end_of_video|>")]
        items.append(one)
    if grids:
        grid = torch.tensor(grids)
        made[key] = noise((int(grid.prod(1).sum()), 3 * 2 * PATCH**2), generator, model)
        made[f"{modality}_grid_thw"] = grid
    return made, items


def _glm_types(made: dict[str, torch.Tensor], token: Token) -> dict[str, torch.Tensor]:
    visual = (made["input_ids"] == token("<|image|>")).long()
    return {"mm_token_type_ids": visual * (2 if "video_grid_thw" in made else 1)}


GLM_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "Glm4vImageProcessor",
        "size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 128 * 28 * 28},
    },
    "video_preprocessor_config.json": {
        "video_processor_type": "Glm4vVideoProcessor",
        "size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28},
    },
    "processor_config.json": {"processor_class": "Glm4vProcessor"},
}
MOLMO_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|image|>",
    "<|video|>",
    *molmo2.MARKERS,
)
MOLMO_SIDE = TILE // PATCH


def _molmo_config(token: Token) -> dict[str, Any]:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    vision = {**VISION, **heads, "num_hidden_layers": 2, "patch_size": PATCH}
    adapter = {**VISION, **heads, "vision_feature_layer": [1, 0], "text_hidden_size": WIDTH}
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    names = {
        "image_start_token_id": "<im_start>",
        "low_res_image_start_token_id": "<low_res_im_start>",
        "image_end_token_id": "<im_end>",
        "image_patch_id": "<im_patch>",
        "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }
    return {
        "model_type": "molmo2",
        "text_config": {**TEXT, "head_dim": 16, "rope_parameters": rope},
        "vision_config": {**vision, "image_size": [TILE, TILE]},
        "adapter_config": adapter,
        **{key: token(text) for key, text in names.items()},
    }


def _molmo_media(
    model: Any, token: Token, sizes: Sequence[Size], frames: int, generator: torch.Generator
) -> Made:
    """Pictures of a base picture and two tiles of 3 columns each; frames of 2 x 2 tokens.

    A token pools 2 x 2 patches of a picture; of a frame 3 x 3, filled up with -1 at its edges.
    """
    one = MOLMO_SIDE**2
    square = torch.arange(one).view(MOLMO_SIDE, MOLMO_SIDE)
    low = square.view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    patch, col = token("<im_patch>"), token("<im_col>")
    if frames:
        shift = torch.arange(frames)[:, None, None] * one
        filled = torch.nn.functional.pad(square, (1, 1, 1, 1), value=-1)
        low = filled.view(2, 3, 2, 3).transpose(1, 2).reshape(4, 9)
        block = [*b"1.0 ", token("<frame_start>"), *[patch] * 4, token("<frame_end>")]
        return {
            "pixel_values_videos": noise((frames, one, 3 * PATCH**2), generator, model),
            "video_token_pooling": torch.where(low < 0, low, low + shift).flatten(0, 1),
            "video_grids": torch.tensor([[frames, 2, 2]]),
        }, [block * frames]
    if not sizes:
        return {}, []
    whole = torch.cat([square[:, :3] + one, square[:, 1:] + 2 * one], dim=1)
    tiles = whole.view(2, 2, 3, 2).transpose(1, 2).reshape(6, 4)
    pooling = torch.cat([low, tiles])
    base = [token("<low_res_im_start>"), *[patch, patch, col] * 2, token("<im_end>")]
    high = [token("<im_start>"), *[patch, patch, patch, col] * 2, token("<im_end>")]
    count = len(sizes)
    return {
        "pixel_values": noise((3 * count, one, 3 * PATCH**2), generator, model),
        "image_token_pooling": torch.cat([pooling + 3 * one * at for at in range(count)]),
        "image_grids": torch.tensor([[2, 2, 2, 3]] * count),
        "image_num_crops": torch.tensor([3] * count),
    }, [base + high] * count


def _molmo_types(made: dict[str, torch.Tensor], token: Token) -> dict[str, torch.Tensor]:
    ids = torch.tensor([token(text) for text in molmo2.MARKERS])
    return {"mm_token_type_ids": torch.isin(made["input_ids"], ids).long()}


MOLMO_FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "Molmo2ImageProcessor",
        "size": {"height": TILE, "width": TILE},
        "overlap_margins": [1, 1],
    },
    "video_preprocessor_config.json": {
        "video_processor_type": "Molmo2VideoProcessor",
        "do_rescale": True,  # unlike all others, its class does not say so
        "do_normalize": True,
        "size": {"height": TILE, "width": TILE},
    },
    "processor_config.json": {"processor_class": "Molmo2Processor"},
}
GLM_PAD = "<|begin_of_image|><|image|><|end_of_image|>"


MODELS: dict[str, Tiny] = {
    "qwen2_vl": _qwen(
        "qwen2_vl", qwen2_vl.TEMPLATE, _files("Qwen2VLProcessor"), ("image", "video"), 1
    ),
    "qwen2_5_vl": _qwen(  # layer 1 is the one that sees everything
        "qwen2_5_vl", qwen2_vl.TEMPLATE, _files("Qwen2_5_VLProcessor"), ("image", "video"), 1
    ),
    "qwen3_vl": _qwen("qwen3_vl", qwen3_vl.TEMPLATE, FILES_OF_THREE, ("image",), 2),
    "gemma3": Tiny(
        kinds=("image", "several"),
        attention="vision_tower.encoder.layers.1.self_attn",
        one_size=True,
        special=GEMMA_SPECIAL,
        config=_gemma_config,
        media=_gemma_media,
        finish=_gemma_types,
        template=gemma3.TEMPLATE,
        files=GEMMA_FILES,
        conversation="<bos><start_of_turn>user\nBe brief.\n\n<start_of_image><start_of_image>First?"
        "<end_of_turn>\n<start_of_turn>model\nRed.<end_of_turn>\n<start_of_turn>user\n"
        "<start_of_image>And now?<end_of_turn>\n<start_of_turn>model\n",
        pad="<pad>",
        eos="<eos>",
        bos="<bos>",
        unk="<unk>",
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    ),
    "glm4v": Tiny(
        kinds=("image", "several", "video"),
        attention="visual.blocks.1.attn",
        unbroken=("image",),
        special=GLM_SPECIAL,
        config=_glm_config,
        media=_glm_media,
        finish=_glm_types,
        template=glm4v.TEMPLATE,
        files=GLM_FILES,
        conversation="[gMASK]<sop><|system|>\nBe brief.<|user|>\n"
        + GLM_PAD * 2
        + "First?<|assistant|>\nRed.<|user|>\n"
        + GLM_PAD
        + "And now?<|assistant|>\n",
        pad="<|endoftext|>",
        eos="<|endoftext|>",
    ),
}

if "molmo2" in CONFIG_MAPPING:  # transformers from 5.23 on
    MODELS["molmo2"] = Tiny(
        kinds=("image", "several", "video"),
        attention="vision_tower.layers.1.self_attn",  # the deeper of [1, 0]
        special=MOLMO_SPECIAL,
        config=_molmo_config,
        media=_molmo_media,
        finish=_molmo_types,
        template=molmo2.TEMPLATE,
        files=MOLMO_FILES,
        conversation="<|im_end|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        "<|image|><|image|>First?<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n"
        "<|im_start|>user\n<|image|>And now?<|im_end|>\n<|im_start|>assistant\n",
        pad="<|endoftext|>",
        eos="<|im_end|>",
    )
