"""Tiny random models of every family: as objects, as checkpoints on disk, and inputs for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tiny_alike
import tiny_blocks
import tiny_gemma
import tiny_llava
import tiny_qwen
import torch
from tiny_base import BYTES, LAYERS, PATCH, TILE, WIDTH, Tiny
from tiny_llava import PINPOINTS, TILES
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from vtprune.inference.prepare import number_over_batch

__all__ = ["BYTES", "LAYERS", "PATCH", "PINPOINTS", "TILE", "TILES", "WIDTH"]

FAMILIES: dict[str, Tiny] = {
    **tiny_llava.MODELS,
    **tiny_qwen.MODELS,
    **tiny_blocks.MODELS,
    **tiny_alike.MODELS,
    **tiny_gemma.MODELS,
}
MODELS = tuple(
    name for name in FAMILIES if name not in tiny_alike.MODELS and name not in tiny_gemma.MODELS
)
"""The tests of all families run on these; test_models_gemma.py has those of Gemma 4."""
ALIKE = tuple(tiny_alike.MODELS)
"""Those that share all but little with one of the others; test_alike.py has that little."""
KINDS = {name: one.kinds for name, one in FAMILIES.items()}
"""What a prompt of each model can hold, apart from "text"."""
SPECIAL = {name: one.special for name, one in FAMILIES.items()}
TEMPLATES = {name: one.template for name, one in FAMILIES.items()}
FILES = {name: one.files for name, one in FAMILIES.items()}


def token(name: str, text: str) -> int:
    """The id of a special token."""
    return BYTES + SPECIAL[name].index(text)


def config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The config of a tiny model; `overrides` are fields of its top level."""
    fields = FAMILIES[name].config(partial(token, name))
    kind = fields.pop("model_type")
    return CONFIG_MAPPING[kind](**({"tie_word_embeddings": False} | fields | overrides))


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
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    num_images = {"text": 0, "image": 1, "several": len(sizes), "video": 0, "mixed": 1}[kind]
    num_frames = frames if kind in ("video", "mixed") else 0
    ids_of = partial(token, name)
    pixels, items = family.media(model, ids_of, sizes[:num_images], num_frames, generator)
    ids = torch.randint(32, 127, (text,), generator=generator).tolist()
    for item in items:
        ids += item
        ids += torch.randint(32, 127, (text,), generator=generator).tolist()
    if family.bos is not None:
        ids.insert(0, ids_of(family.bos))
    input_ids = torch.tensor([ids])
    made = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)} | pixels
    return made if family.finish is None else made | family.finish(made, ids_of)


def two(name: str, model: PreTrainedModel, kind: str = "image") -> list[dict[str, torch.Tensor]]:
    """Two prompts of different length, with pictures of different size."""
    other = inputs(name, model, kind, seed=1, text=9, sizes=((200, 70), (90, 150)))
    return [inputs(name, model, kind), other]


def ragged(name: str, model: PreTrainedModel, kind: str = "image") -> dict[str, torch.Tensor]:
    """One left-padded batch of `two`."""
    return left_pad(name, two(name, model, kind))


def left_pad(name: str, batch: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One ragged left-padded batch of several `inputs`."""
    fill = {"input_ids": token(name, FAMILIES[name].pad), "attention_mask": 0}
    fill |= {"mm_token_type_ids": 0, "token_type_ids": 0}
    longest = max(one["input_ids"].shape[1] for one in batch)
    most = max((one["pixel_values"].shape[1] for one in batch if "pixel_values" in one), default=0)
    made: dict[str, torch.Tensor] = {}
    for key in dict.fromkeys(key for one in batch for key in one):
        parts = [one[key] for one in batch if key in one]
        if key.endswith("_token_pooling"):  # numbers of patches, counted over the batch
            pixels = "pixel_values" if key.startswith("image") else "pixel_values_videos"
            parts = number_over_batch(parts, [one[pixels] for one in batch if key in one])
        elif key in fill:
            parts = [
                torch.nn.functional.pad(part, (longest - part.shape[1], 0), value=fill[key])
                for part in parts
            ]
        elif key in ("pixel_values", "pixel_attention_mask") and parts[0].ndim > 3:
            # (pictures, tiles, ...), or (rows, pictures, ...): filled up with empty ones.
            ahead = (0, 0) * (parts[0].ndim - 2)
            if key != "pixel_values" or parts[0].ndim == 5:
                parts = [
                    torch.nn.functional.pad(part, (*ahead, 0, most - part.shape[1]))
                    for part in parts
                ]
        made[key] = torch.cat(parts)
    return made


def tokenizer(name: str, template: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 256 bytes and the family's special tokens."""
    family = FAMILIES[name]
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in family.special])
    named = {"pad_token": family.pad, "eos_token": family.eos, **family.named}
    if family.bos is not None:
        start = (family.bos, token(name, family.bos))
        pair = (f"{family.bos} $A", f"{family.bos} $A $B")
        made.post_processor = processors.TemplateProcessing(*pair, [start])
        named["bos_token"] = family.bos
    if family.unk is not None:
        named["unk_token"] = family.unk
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        padding_side="left",
        chat_template=family.template if template else None,
        **named,
    )


def describe(name: str, directory: Path) -> Path:
    """What a tiny checkpoint says of itself, in `directory`: no weights, no tokenizer."""
    config(name).save_pretrained(directory)
    write_files(name, directory)
    return directory


def write_files(name: str, directory: Path) -> None:
    for file, values in FILES[name].items():
        (directory / file).write_text(json.dumps(values, indent=2), encoding="utf-8")


def build(name: str, directory: Path, template: bool = True, **overrides: Any) -> Path:
    """A tiny checkpoint in the hub's format in `directory`, which is returned.

    Args:
        template: whether the tokenizer has a chat template.
        overrides: fields of the config's top level.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model(name, **overrides).save_pretrained(directory)
    tokenizer(name, template).save_pretrained(directory)
    write_files(name, directory)
    return directory
