"""Aya Vision: InternVL's tiles, each behind its name, through LLaVA's tower."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vtprune.models import cost, splitting
from vtprune.models.base import Files, Grids, Media
from vtprune.models.internvl import InternVL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOKENS = {"image": "<image>"}
START, PATCH, END = "<|START_OF_IMG|>", "<|IMG_PATCH|>", "<|END_OF_IMG|>"
SPECIAL_TOKENS = {PATCH: "image_token_id", START: None, END: None, "TILE_GLOBAL": None}

# The turns of the language model, for a checkpoint without a template of its own.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{{ {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>'}.get(message['role'], "
    "'<|CHATBOT_TOKEN|>') }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)


class AyaVision(InternVL):
    """Tiles row by row, then the whole picture, each a block behind its name; no video."""

    name = "Aya Vision"
    model_types = ("aya_vision",)
    original_kinds = frozenset()
    modalities = ("image",)
    tokens = TOKENS
    special_tokens = SPECIAL_TOKENS
    template = TEMPLATE

    def tile_side(self, config: PreTrainedConfig, edge: int) -> int:
        return int(edge // config.vision_config.patch_size // config.downsample_factor)

    def picture_lengths(self, prompt: torch.Tensor, columns: torch.Tensor) -> list[int]:
        """A run of placeholders is a tile; the token that closes a picture ends its last one.

        Between two tiles of a picture there is the name of the second alone.
        """
        runs = splitting.runs(columns)
        ends = [int(columns[count - 1]) + 1 for count in itertools.accumulate(runs)]
        if not ends or ends[-1] >= len(prompt):
            return runs
        lengths: list[int] = []
        continues = False
        for run, end in zip(runs, ends, strict=True):
            lengths = [*lengths[:-1], lengths[-1] + run] if continues else [*lengths, run]
            continues = bool(prompt[end] != prompt[ends[-1]])
        return lengths

    def vision_shape(self, config: object, modality: str) -> cost.VisionShape | None:
        """Blocks of patches side by side, then a gated MLP of two matrices."""
        shape = cost.clip_or_siglip(config)
        if shape is None:
            return None
        out, merge = cost.text_width(config), cost.size_of(config, "downsample_factor", 2)
        inner = cost.size_of(config, "alignment_intermediate_size", out)
        projector = ((merge**2 * shape.hidden, inner), (inner // 2, out))
        return replace(shape, projector=projector, merge=merge)

    def placeholder_texts(self, files: Files, media: Media, grids: Grids) -> dict[str, list[str]]:
        """Each tile's tokens behind its number, the whole picture's behind TILE_GLOBAL."""
        texts = []
        for picture, grid in zip(media, grids.get("image", ()), strict=True):
            block = PATCH * (len(grid) // len(picture.pixels))
            tiles = [f"TILE_{number}{block}" for number in range(1, len(picture.pixels))]
            texts.append(f"{START}{''.join(tiles)}TILE_GLOBAL{block}{END}")
        return {"image": texts}
