"""Pixels of a scene: every frame, at any size."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vtprune.demo.world import COLOURS, Number, Scene, Thing, numbers_at, things_at

Frame = NDArray[np.uint8]
Mask = NDArray[np.float32]
# 5 x 7 dots a digit, a row a line.
GLYPHS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)


def frame(scene: Scene, time: float, height: int = 0, width: int = 0) -> Frame:
    """Draw a scene at `time` in [0, 1], (H, W, 3), at its own size or another."""
    height, width = height or scene.height, width or scene.width
    rng = np.random.default_rng(scene.background)
    canvas = _background(rng, height, width)
    _distract(rng, canvas)
    shift = rng.integers(-14, 15, size=(16, 3))  # each thing's own shade of its colour
    dark, grain = rng.random() < 0.5, float(rng.uniform(0, 5))
    for thing in things_at(scene, time):
        # Where a thing is and its colour may change, its shape and radius don't.
        index = [(t.shape, t.radius) for t in scene.things].index((thing.shape, thing.radius))
        colour = np.clip(np.array(COLOURS[thing.colour]) + shift[index], 0, 255)
        _blend(canvas, *place_shape(thing, height, width), colour)
    for number in numbers_at(scene, time):
        plate, ink, top, left = place_number(number, height, width)
        _blend(canvas, plate, top, left, np.full(3, 25 if dark else 225))
        _blend(canvas, ink, top, left, np.full(3, 240 if dark else 15))
    noise = _noise()
    y, x = np.random.default_rng([scene.background, int(time * 1000)]).integers(0, 64, size=2)
    canvas += grain * noise[y : y + height, x : x + width]
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def _blend(
    canvas: NDArray[np.float32], mask: Mask, top: int, left: int, colour: NDArray[np.int64]
) -> None:
    """Lay a colour on (H, W, 3) through a mask."""
    height, width = canvas.shape[:2]
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + mask.shape[0], height), min(left + mask.shape[1], width)
    if y1 <= y0 or x1 <= x0:
        return
    alpha = mask[y0 - top : y1 - top, x0 - left : x1 - left, None]
    part = canvas[y0:y1, x0:x1]
    part += alpha * (colour.astype(np.float32) - part)


def place_shape(thing: Thing, height: int, width: int) -> tuple[Mask, int, int]:
    """Return the mask of a thing, and the top and left where it lies."""
    radius = max(round(thing.radius * min(height, width) * 2), 2) / 2
    mask = _shape_mask(thing.shape, radius)
    side = mask.shape[0]
    return mask, round(thing.y * height - side / 2), round(thing.x * width - side / 2)


@functools.lru_cache(maxsize=4096)
def _shape_mask(shape: str, radius: float) -> Mask:
    """Draw a shape of this radius in pixels as an antialiased mask, (side, side)."""
    side = int(2 * radius) + 2
    scale = 8
    image = Image.new("L", (side * scale, side * scale), 0)
    pen = ImageDraw.Draw(image)
    middle, r = side * scale / 2, radius * scale

    def ring(size: float, fill: int) -> None:
        pen.ellipse((middle - size, middle - size, middle + size, middle + size), fill=fill)

    def polygon(points: list[tuple[float, float]]) -> None:
        pen.polygon([(middle + x * r, middle + y * r) for x, y in points], fill=255)

    if shape == "circle":
        ring(r, 255)
    elif shape == "ring":
        ring(r, 255)
        ring(0.55 * r, 0)
    elif shape == "square":
        polygon([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])
    elif shape == "triangle":
        polygon([(0, -1), (0.95, 0.8), (-0.95, 0.8)])
    elif shape == "cross":
        polygon([(-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1)])
        polygon([(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)])
    else:  # star
        points = []
        for i in range(10):
            angle, reach = np.pi * i / 5, 1.0 if i % 2 == 0 else 0.42
            points.append((float(np.sin(angle) * reach), float(-np.cos(angle) * reach)))
        polygon(points)
    return np.asarray(image.reduce(scale), dtype=np.float32) / np.float32(255)


def place_number(number: Number, height: int, width: int) -> tuple[Mask, Mask, int, int]:
    """Return the masks of a number's plate and ink, and the top and left where they lie."""
    tall = max(round(number.height * min(height, width)), 4)
    plate, ink = _number_masks(number.digits, tall)
    top, left = number.y * height - plate.shape[0] / 2, number.x * width - plate.shape[1] / 2
    return plate, ink, round(top), round(left)


@functools.lru_cache(maxsize=8192)
def _number_masks(digits: str, tall: int) -> tuple[Mask, Mask]:
    """Draw the plate and the ink of a number whose digits are `tall` pixels high."""
    dots = np.zeros((9, 6 * len(digits) + 1), dtype=np.uint8)
    for i, digit in enumerate(digits):
        rows = GLYPHS[int(digit)].split()
        dots[1:8, 6 * i + 1 : 6 * i + 6] = [[255 * int(dot) for dot in row] for row in rows]
    size = round(dots.shape[1] * tall / 7), round(9 * tall / 7)
    large = Image.fromarray(dots).resize((dots.shape[1] * 8, 72), Image.Resampling.NEAREST)
    ink = np.asarray(large.resize(size, Image.Resampling.BOX), dtype=np.float32) / np.float32(255)
    return np.ones_like(ink), ink


def _background(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Draw a dull background: plain, gradient, stripes, checks or noise."""
    base = float(rng.uniform(45, 105)) + rng.uniform(-7, 7, size=3)
    second_shade = base + rng.uniform(-22, 22)
    style, period = int(rng.integers(5)), float(rng.uniform(6, 24))
    y = np.linspace(0, 112, height, endpoint=False, dtype=np.float32)[:, None]
    x = np.linspace(0, 112, width, endpoint=False, dtype=np.float32)[None, :]
    part: NDArray[np.floating]
    if style == 0:
        part = np.zeros((height, width), dtype=np.float32)
    elif style == 1:
        part = (x + y) / 224
    elif style == 2:
        part = np.broadcast_to((x // period) % 2, (height, width))
    elif style == 3:
        part = (x // period + y // period) % 2
    else:
        part = 0.35 * _noise()[:height, :width, 0]
    return (base + part[..., None] * (second_shade - base)).astype(np.float32)


def _distract(rng: np.random.Generator, canvas: NDArray[np.float32]) -> None:
    """Draw grey specks and thin lines, which no question asks about."""
    height, width = canvas.shape[:2]
    shorter = min(height, width)
    for _ in range(int(rng.integers(0, 7))):
        y, x, grey, kind = rng.random(), rng.random(), rng.uniform(20, 140), rng.integers(3)
        long, thin = max(round(0.25 * shorter * rng.random()), 2), max(round(0.012 * shorter), 1)
        tall, wide = ((2 * thin, 2 * thin), (thin, long), (long, thin))[int(kind)]
        top, left = int(y * height), int(x * width)
        canvas[top : top + tall, left : left + wide] = grey


@functools.lru_cache(maxsize=1)
def _noise() -> NDArray[np.float32]:
    """Return one fixed field of noise, from which each frame takes a window."""
    return np.random.default_rng(0).standard_normal((1100, 1100, 3), dtype=np.float32)
