"""From a batch to logits: pixels to tiles by the official recipe, to tokens, to answers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution

from vtprune._dev.training.batches import PREFIX, Batch
from vtprune._dev.training.checkpoint import PINPOINTS, make_tokenizer
from vtprune._dev.training.hints import IGNORED
from vtprune._dev.training.packed import read_packed
from vtprune.demo.world import TILE

Layer = Callable[..., Tensor]


def tiles(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) to tiles (B, n, 3, 112, 112), the base picture first, all uint8.

    This is the official recipe, for pictures of one size; padding is black.
    """
    height, width = pictures.shape[-2:]
    tall, wide = select_best_resolution((height, width), PINPOINTS)
    scale = min(tall / height, wide / width)
    size = (
        min(-(-int(height * scale * 1e6) // 10**6), tall),
        min(-(-int(width * scale * 1e6) // 10**6), wide),
    )
    whole = resize(pictures, *size)
    top, left = (tall - size[0]) // 2, (wide - size[1]) // 2
    whole = F.pad(whole, (left, wide - size[1] - left, top, tall - size[0] - top))
    cut = whole.unfold(2, TILE, TILE).unfold(3, TILE, TILE)  # (B, 3, rows, columns, 112, 112)
    cut = cut.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    return torch.cat((resize(pictures, TILE, TILE)[:, None], cut), dim=1)


def resize(pictures: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, antialiased, on uint8, as the processors do."""
    if pictures.shape[-2:] == (height, width):
        return pictures
    return F.interpolate(pictures, (height, width), mode="bicubic", antialias=True)


def normalise(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def visual_tokens(
    model: LlavaOnevisionForConditionalGeneration, batch: Batch, device: torch.device
) -> Tensor:
    """The visual tokens (B, N, D) of a batch, packed by the model's own functions."""
    pixels = torch.from_numpy(batch.pixels).to(device)
    if batch.layout.num_frames > 1:
        return model.model.get_video_features(normalise(pixels)).pooler_output
    sizes = torch.tensor([[batch.layout.height, batch.layout.width]] * len(pixels), device=device)
    if batch.layout.name == "one of several":
        # A picture among others in one prompt is not tiled: the model sees its base picture only.
        several = torch.tensor([len(pixels), 0])
        features = model.model.get_image_features(
            normalise(pixels[:, 0]), sizes, batch_num_images=several
        )
        return torch.stack(list(features.pooler_output))
    features = model.model.get_image_features(normalise(tiles(pixels[:, 0])), sizes)
    return torch.stack(list(features.pooler_output))


def answer_states(
    model: LlavaOnevisionForConditionalGeneration,
    batch: Batch,
    device: torch.device,
    layer: Layer,
    watch: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (n, vocabulary) and targets (n,) at every answer token of a batch, row by row."""
    visual = visual_tokens(model, batch, device)
    embed = model.get_input_embeddings()
    start = torch.tensor(make_tokenizer().encode(PREFIX).ids, device=device)
    prefix = torch.cat((embed(start).expand(len(visual), -1, -1), visual.float()), dim=1)
    tokens = torch.from_numpy(batch.tokens).to(device)
    targets = torch.from_numpy(batch.targets).to(device)
    states = read_packed(model.model.language_model, prefix, embed(tokens), layer, watch)
    wanted = targets != IGNORED
    return model.lm_head(states[wanted]).float(), targets[wanted]
