"""Needles of the embedded model's world: its things and numbers, asked about in its own words."""

from __future__ import annotations

import json

import numpy as np
from transformers import PreTrainedTokenizerBase

from vtprune.demo.draw import place_number, place_shape
from vtprune.demo.world import COLOURS, SHAPES, Number, Thing
from vtprune.evaluation.needles.kinds import (
    Makers,
    NeedleDrawing,
    Spot,
    draw_digits,
    make_frame,
    make_patch,
    with_sticker,
)
from vtprune.models.names import embedded_weights
from vtprune.pictures.needles import Pixels, Sticker

NEAR = 60.0  # distance of two colours, of 255 in red, green and blue, that look alike
LARGE = 0.12  # of the shorter side: digits that the world calls large are higher


def has_world_words_alone(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether all whole words of a tokenizer are among the embedded model's."""
    saved = json.loads((embedded_weights() / "tokenizer.json").read_bytes())
    words = {token for token in tokenizer.get_vocab() if token.isalpha() and len(token) > 1}
    return bool(words) and words <= saved["model"]["vocab"].keys()


def world_patch(spot: Spot) -> NeedleDrawing:
    """Return a patch of noise; what is asked is how many objects there are.

    The world has no words for patches: no answer is known to be right.
    """
    when = " at the start" if spot.is_clip else ""
    drawing = make_patch(spot)
    return NeedleDrawing(drawing.size, drawing.draw, f"how many objects are there{when}?")


def world_digit(spot: Spot) -> NeedleDrawing:
    """Return a number of two digits on a plate; in a clip it flashes."""
    digits = draw_digits(spot.rng)
    # Two digits on their plate are 13 dots wide, of which a digit is 7 high.
    number = Number(digits, False, 0, 0, 0.0, 0.0, 7 / 13)
    plate, ink, _, _ = place_number(number, spot.side, spot.side)
    plate, ink = plate[: spot.side, : spot.side], ink[: spot.side, : spot.side]
    shade = np.full((*ink.shape, 3), 225.0) * (1 - ink[..., None]) + 15.0 * ink[..., None]
    large = plate.shape[0] * 7 / 9 >= LARGE * min(spot.picture.shape[:2])
    question = f"what is the {'large' if large else 'small'} number?"
    if spot.is_clip:
        question = "what number flashes?"
    return with_sticker(Sticker(shade.astype(np.uint8), plate), question, digits)


def world_object(spot: Spot) -> NeedleDrawing:
    """Return a thing of a colour that the picture has least of, and ask where it is."""
    colour = _rarest_colour(spot.rng, spot.picture)
    shape = SHAPES[int(spot.rng.integers(len(SHAPES)))]
    radius = max(spot.side - 2, 2) / 2 / spot.side
    thing = Thing(colour, shape, "large", 0, 0, 0.5, 0.5, radius)
    mask, _, _ = place_shape(thing, spot.side, spot.side)
    mask = mask[: spot.side, : spot.side]
    pixels = np.empty((*mask.shape, 3), np.uint8)
    pixels[:] = COLOURS[colour]
    return with_sticker(Sticker(pixels, mask), f"where is the {colour} {shape}?", spot.place)


def world_frame(spot: Spot) -> NeedleDrawing:
    """Return a frame of another clip, and ask what happens; no answer is known to be right."""
    drawing = make_frame(spot)
    return NeedleDrawing(drawing.size, drawing.draw, "what happens?")


def _rarest_colour(rng: np.random.Generator, picture: Pixels) -> str:
    """Return the colour that fewest pixels are near to; of several, one at random."""
    small = picture[::2, ::2].reshape(-1, 3).astype(np.float32)
    counts = {
        name: int((np.linalg.norm(small - np.array(colour), axis=1) < NEAR).sum())
        for name, colour in COLOURS.items()
    }
    fewest = [name for name, count in counts.items() if count == min(counts.values())]
    return fewest[int(rng.integers(len(fewest)))]


WORLD_MAKERS: Makers = {
    "patch": world_patch,
    "digit": world_digit,
    "object": world_object,
    "frame": world_frame,
}
