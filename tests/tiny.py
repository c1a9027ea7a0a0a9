"""Tiny random models of every family: as objects, as checkpoints on disk, and inputs for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from vtprune.models import llava_next, llava_onevision, qwen2_5_vl

MODELS = ("llava_onevision", "llava_next", "llava_next_mistral", "qwen2_5_vl")
KINDS = {
    "llava_onevision": ("image", "several", "video", "mixed"),
    "llava_next": ("image", "several"),
    "llava_next_mistral": ("image", "several"),
    "qwen2_5_vl": ("image", "several", "video", "mixed"),
}
"""What a prompt of each model can hold, apart from "text"."""

LAYERS, WIDTH, HEADS, KV_HEADS, VOCABULARY = 6, 64, 4, 2, 320
BYTES = 256
"""Ids below are single bytes; a family's special tokens follow, in the order of SPECIAL."""
SPECIAL = {
    "llava_onevision": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
    "llava_next": ("<unk>", "<s>", "</s>", "<pad>", "<image>"),
    "llava_next_mistral": ("<unk>", "<s>", "</s>", "<pad>", "<image>"),
    "qwen2_5_vl": (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
}
TILE, PATCH = 56, 14
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168], [168, 168], [112, 168]]


def token(name: str, text: str) -> int:
    """The id of a special token."""
    return BYTES + SPECIAL[name].index(text)


def config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The config of a tiny model; `overrides` are fields of its top level."""
    text: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
    }
    vision: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}
    if name == "qwen2_5_vl":
        vision |= {"depth": 2, "num_heads": 2, "out_hidden_size": WIDTH, "patch_size": PATCH}
        vision |= {"fullatt_block_indexes": [1], "window_size": 56}
        text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
        text |= {"eos_token_id": token(name, "<|im_end|>"), "bos_token_id": None}
        fields: dict[str, Any] = {
            f"{key}_token_id": token(name, f"<|{word}|>")
            for key, word in {
                "image": "image_pad",
                "video": "video_pad",
                "vision_start": "vision_start",
                "vision_end": "vision_end",
            }.items()
        }
        family = name
    else:
        vision |= {"num_hidden_layers": 2, "num_attention_heads": 2}
        vision |= {"image_size": TILE, "patch_size": PATCH}
        fields = {"image_token_index": token(name, "<image>"), "image_grid_pinpoints": PINPOINTS}
        if name == "llava_onevision":
            family = name
            vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}
            text |= {"model_type": "qwen2", "eos_token_id": token(name, "<|im_end|>")}
            fields |= {"video_token_index": token(name, "<video>")}
            fields |= {"vision_aspect_ratio": "anyres_max_4"}
        else:
            family = "llava_next"
            vision |= {"model_type": "clip_vision_model"}
            text |= {"model_type": "mistral" if name.endswith("mistral") else "llama"}
            text |= {"bos_token_id": token(name, "<s>"), "eos_token_id": token(name, "</s>")}
            text |= {"pad_token_id": token(name, "<pad>"), "sliding_window": None}
    fields |= {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}
    return CONFIG_MAPPING[family](**(fields | overrides))


def model(
    name: str,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny model in eval mode, the same weights for the same seed in every transformers version.

    Its generation never ends early: there is no end-of-sequence token.
    """
    made = AutoModelForImageTextToText.from_config(
        config(name, **overrides), attn_implementation=attention
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, weight in sorted(made.named_parameters()):
            if weight.ndim > 1:
                scale = 0.075 if path == "lm_head.weight" else 0.15
            elif path.endswith(("bias", "newline", "class_embedding")):
                scale = 0.1
            else:
                continue
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    made.generation_config = GenerationConfig(pad_token_id=BYTES, do_sample=False)
    return made.to(dtype).eval()


def inputs(
    name: str,
    model: PreTrainedModel,
    kind: str,
    seed: int = 0,
    sizes: Sequence[tuple[int, int]] = ((90, 150), (200, 70)),
    frames: int = 4,
    text: int = 6,
) -> dict[str, torch.Tensor]:
    """Made-up inputs for `model.generate`, no processor involved; a batch of 1.

    Args:
        kind: "text", "image", "several" (pictures), "video", or "mixed" (a picture, then a video).
        sizes: (height, width) of the pictures; "image" and "mixed" take the first.
        frames: frames of the video; even.
        text: text tokens before, between and after the media.
    """
    generator = torch.Generator().manual_seed(seed)
    num_images = {"text": 0, "image": 1, "several": len(sizes), "video": 0, "mixed": 1}[kind]
    num_videos = int(kind in ("video", "mixed"))
    make = _qwen if name == "qwen2_5_vl" else _llava
    pixels, counts = make(name, model, list(sizes[:num_images]), num_videos * frames, generator)
    ids = torch.randint(32, 127, (text,), generator=generator).tolist()
    for modality, count in counts:
        if name == "qwen2_5_vl":
            ids.append(token(name, "<|vision_start|>"))
            ids += [token(name, f"<|{modality}_pad|>")] * count
            ids.append(token(name, "<|vision_end|>"))
        else:
            ids += [token(name, f"<{modality}>")] * count
        ids += torch.randint(32, 127, (text,), generator=generator).tolist()
    if name.startswith("llava_next"):
        ids.insert(0, token(name, "<s>"))
    input_ids = torch.tensor([ids])
    made = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)} | pixels
    if name == "qwen2_5_vl":
        image = input_ids == token(name, "<|image_pad|>")
        video = input_ids == token(name, "<|video_pad|>")
        made["mm_token_type_ids"] = image.long() + 2 * video.long()
    return made


Made = tuple[dict[str, torch.Tensor], list[tuple[str, int]]]


def _llava(
    name: str,
    model: Any,
    sizes: list[tuple[int, int]],
    frames: int,
    generator: torch.Generator,
) -> Made:
    made: dict[str, torch.Tensor] = {}
    counts: list[tuple[str, int]] = []
    several = name == "llava_onevision" and len(sizes) > 1
    if sizes:
        # More tiles than any pinpoint has: the model cuts off what it does not need.
        tiles = 1 if several else 10
        made["pixel_values"] = _noise((len(sizes), tiles, 3, TILE, TILE), generator, model)
        made["image_sizes"] = torch.tensor(sizes)
        if name == "llava_onevision":
            made["batch_num_images"] = torch.tensor([len(sizes)])
        with torch.no_grad():
            features = model.model.get_image_features(**made, return_dict=True).pooler_output
        counts += [("image", len(feature)) for feature in features]
    if frames:
        videos = _noise((1, frames, 3, TILE, TILE), generator, model)
        made["pixel_values_videos"] = videos
        side = -(-(TILE // PATCH) // 2)
        counts.append(("video", frames * side**2 + 1))
    return made, counts


def _qwen(
    name: str,
    model: Any,
    sizes: list[tuple[int, int]],
    frames: int,
    generator: torch.Generator,
) -> Made:
    made: dict[str, torch.Tensor] = {}
    counts: list[tuple[str, int]] = []
    grids = {
        "image": [[1, height // 28 * 2, width // 28 * 2] for height, width in sizes],
        "video": [[frames // 2, 4, 6]] if frames else [],
    }
    for modality, thw in grids.items():
        if not thw:
            continue
        grid = torch.tensor(thw)
        key = "pixel_values" if modality == "image" else "pixel_values_videos"
        made[key] = _noise((int(grid.prod(1).sum()), 3 * 2 * PATCH**2), generator, model)
        made[f"{modality}_grid_thw"] = grid
        counts += [(modality, int(count) // 4) for count in grid.prod(1)]
    if frames:
        made["second_per_grid_ts"] = torch.tensor([1.0])
    return made, counts


def _noise(shape: tuple[int, ...], generator: torch.Generator, model: Any) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(model.dtype)


def left_pad(name: str, batch: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One ragged left-padded batch of several `inputs`."""
    pad = token(name, SPECIAL[name][0] if "<pad>" not in SPECIAL[name] else "<pad>")
    fill = {"input_ids": pad, "attention_mask": 0, "mm_token_type_ids": 0}
    longest = max(one["input_ids"].shape[1] for one in batch)
    most = max((one["pixel_values"].shape[1] for one in batch if "pixel_values" in one), default=0)
    made: dict[str, torch.Tensor] = {}
    for key in dict.fromkeys(key for one in batch for key in one):
        parts = [one[key] for one in batch if key in one]
        if key in fill:
            parts = [
                torch.nn.functional.pad(part, (longest - part.shape[1], 0), value=fill[key])
                for part in parts
            ]
        elif key == "pixel_values" and parts[0].ndim == 5:
            parts = [
                torch.nn.functional.pad(part, (0, 0) * 3 + (0, most - part.shape[1]))
                for part in parts
            ]
        made[key] = torch.cat(parts)
    return made


TEMPLATES = {
    "llava_onevision": llava_onevision.TEMPLATE,
    "llava_next": llava_next.VICUNA,
    "llava_next_mistral": llava_next.MISTRAL,
    "qwen2_5_vl": qwen2_5_vl.TEMPLATE,
}
HALF = [0.5, 0.5, 0.5]
TILES = {"height": TILE, "width": TILE}
FILES: dict[str, dict[str, dict[str, Any]]] = {
    "llava_onevision": {
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
    },
    "llava_next": {
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
    },
    "qwen2_5_vl": {
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
    },
}
FILES["llava_next_mistral"] = FILES["llava_next"]


def tokenizer(name: str, template: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 256 bytes and the family's special tokens."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL[name]])
    named = {"pad_token": SPECIAL[name][0], "eos_token": SPECIAL[name][2]}
    if "<s>" in SPECIAL[name]:
        start = ("<s>", token(name, "<s>"))
        made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [start])
        named |= {"pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        padding_side="left",
        chat_template=TEMPLATES[name] if template else None,
        **named,
    )


def build(name: str, directory: Path, template: bool = True, **overrides: Any) -> Path:
    """A tiny checkpoint in the hub's format in `directory`, which is returned.

    Args:
        template: whether the tokenizer has a chat template.
        overrides: fields of the config's top level.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model(name, **overrides).save_pretrained(directory)
    tokenizer(name, template).save_pretrained(directory)
    for file, values in FILES[name].items():
        (directory / file).write_text(json.dumps(values, indent=2), encoding="utf-8")
    return directory
