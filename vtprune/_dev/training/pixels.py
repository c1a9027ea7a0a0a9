"""Pixels as the official preparations treat them, of whole batches."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resize(pictures: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, antialiased, on uint8, as the processors do."""
    if pictures.shape[-2:] == (height, width):
        return pictures
    return F.interpolate(pictures, (height, width), mode="bicubic", antialias=True)


def normalise(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1
