"""Small changes to pictures: patches of noise, written numbers, pieces of other pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vtprune.pictures.lettering import draw_text, text_width

Pixels = NDArray[np.uint8]
"""(H, W, 3), red, green and blue."""
CROPS = 8  # pieces of another picture, of which the one with the most contrast is taken
SCALE = 4  # how much larger masks are drawn than they are used, for smooth edges
NOISE = 45.0  # standard deviation of a patch's noise, of 255


@dataclass(frozen=True, eq=False)
class Sticker:
    """What is laid on a picture.

    Args:
        pixels: (h, w, 3) uint8.
        alpha: (h, w) float32 in [0, 1]: how much of it covers.
    """

    pixels: Pixels
    alpha: NDArray[np.float32]

    @property
    def size(self) -> tuple[int, int]:
        """Its height and width in pixels."""
        height, width = self.alpha.shape
        return height, width


def lay(picture: Pixels, sticker: Sticker, top: int, left: int) -> Pixels:
    """Return a picture with a sticker, all of which lies inside it."""
    height, width = sticker.size
    changed = picture.copy()
    below = changed[top : top + height, left : left + width].astype(np.float32)
    covered = below + sticker.alpha[..., None] * (sticker.pixels - below)
    changed[top : top + height, left : left + width] = np.clip(covered + 0.5, 0, 255)
    return changed


def noise_patch(rng: np.random.Generator, below: Pixels) -> Sticker:
    """Return a round patch of noise whose mean colour is that of what it covers."""
    mean = below.reshape(-1, 3).mean(0)
    noise = mean + NOISE * rng.standard_normal((*below.shape[:2], 1))
    return Sticker(np.clip(noise, 0, 255).astype(np.uint8), _round_mask(*below.shape[:2]))


def written_number(digits: str, side: int) -> Sticker:
    """Return digits in black on a white plate, at most `side` pixels wide."""
    size = 64
    width = text_width(digits, size)
    plate = Image.new("RGB", (width + size // 2, size + size // 4), (255, 255, 255))
    draw_text(ImageDraw.Draw(plate), (size // 4, 0), digits, (0, 0, 0), size)
    height = max(round(side * plate.height / plate.width), 1)
    pixels = np.asarray(plate.resize((side, height), Image.Resampling.BOX))
    return Sticker(pixels, np.ones((height, side), np.float32))


def round_piece(rng: np.random.Generator, picture: Pixels, side: int) -> Sticker:
    """Return a round piece of a picture, half as wide as that, scaled to `side` pixels.

    Of a few random pieces it is the one with the most contrast, which is rarely plain background.
    """
    height, width = picture.shape[:2]
    edge = max(min(height, width) // 2, 1)
    pieces = []
    for _ in range(CROPS):
        top = int(rng.integers(height - edge + 1))
        left = int(rng.integers(width - edge + 1))
        pieces.append(picture[top : top + edge, left : left + edge])
    best = max(pieces, key=lambda piece: float(piece.std(axis=(0, 1)).sum()))
    return Sticker(resized(best, side, side), _round_mask(side, side))


def whole_picture(picture: Pixels, height: int, width: int) -> Sticker:
    """Return a picture, resized, that covers another one whole."""
    return Sticker(resized(picture, height, width), np.ones((height, width), np.float32))


def resized(picture: Pixels, height: int, width: int) -> Pixels:
    """Return a picture at another size."""
    image = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _round_mask(height: int, width: int) -> NDArray[np.float32]:
    """Return a mask of the ellipse that touches all four edges."""
    image = Image.new("L", (width * SCALE, height * SCALE), 0)
    ImageDraw.Draw(image).ellipse((0, 0, width * SCALE - 1, height * SCALE - 1), fill=255)
    return np.asarray(image.reduce(SCALE), dtype=np.float32) / np.float32(255)
