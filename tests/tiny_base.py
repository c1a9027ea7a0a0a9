"""What the tiny models of all families share, and what each family's module says about its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

LAYERS, WIDTH, HEADS, KV_HEADS, VOCABULARY = 6, 64, 4, 2, 320
BYTES = 256
"""Ids below are single bytes; a family's special tokens follow, in its order."""
TILE, PATCH = 56, 14
TEXT: Mapping[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
}
VISION: Mapping[str, Any] = {"hidden_size": 32, "intermediate_size": 48}

Made = tuple[dict[str, torch.Tensor], list[list[int]]]
"""A prompt's vision inputs, and for each media item, pictures first, the ids that stand for it."""
Size = tuple[int, int]


@dataclass(frozen=True)
class Tiny:
    """The tiny model of one family.

    Args:
        kinds: what a prompt can hold, apart from "text": "image", "several", "video", "mixed".
        special: its special tokens, in the order of their ids.
        config: token text -> id, to the fields of its config, "model_type" among them; text and
            vision start from TEXT and VISION.
        media: (model, token -> id, sizes of pictures, frames of a video or 0, generator) to made-up
            vision inputs.
        template: its official chat template.
        files: file name -> contents, of the checkpoint's processor files.
        conversation: what its template makes of "Be brief." as the system, "First?" with two
            pictures, the answer "Red." and "And now?" with one.
        attention: path, in the multimodal model, of the attention module of the vision tower whose
            output the projector is given; "{modality}" stands for "image" or "video".
        has_cls: whether that tower has a CLS token.
        unbroken: the kinds of prompts whose visual tokens have no text in between, and are not
            seen both ways.
        one_size: whether all pictures have the same number of tokens.
        merge: (projector, its input) to what it merges before its weights, where it does that
            itself, and not in a module or method that runs before it.
        tiles_apart: whether tiles of a picture can go before the tower one by one.
        finish: (made inputs, token -> id) to further inputs, such as token types.
        pad, eos, bos: which special tokens these are; with `bos`, every prompt starts with it.
    """

    kinds: tuple[str, ...]
    special: tuple[str, ...]
    config: Callable[[Callable[[str], int]], dict[str, Any]]
    media: Callable[[Any, Callable[[str], int], Sequence[Size], int, torch.Generator], Made]
    template: str
    files: Mapping[str, Mapping[str, Any]]
    conversation: str
    attention: str
    pad: str
    eos: str
    bos: str | None = None
    unk: str | None = None
    has_cls: bool = False
    unbroken: tuple[str, ...] = ()
    one_size: bool = False
    tiles_apart: bool = False
    merge: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    finish: Callable[
        [dict[str, torch.Tensor], Callable[[str], int]], dict[str, torch.Tensor]
    ] | None = None  # fmt: skip
    named: Mapping[str, Any] = field(default_factory=dict)
    """Further attributes of the tokenizer, such as `image_token`."""


def noise(shape: Sequence[int], generator: torch.Generator, model: Any) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=generator).to(model.dtype)
