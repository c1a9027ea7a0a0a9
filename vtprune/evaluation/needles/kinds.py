"""The kinds of needle: what is drawn on a picture or frame, and the question about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from vtprune.pictures.needles import (
    Pixels,
    Sticker,
    noise_patch,
    round_piece,
    whole_picture,
    written_number,
)

PLACES = (
    "top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom",
    "bottom right",
)  # fmt: skip
MOMENTS = ("at the start", "in the middle", "at the end")
KINDS = ("patch", "digit", "object", "frame")
FROM_OTHERS = ("object", "frame")
"""Kinds that are taken from another of the files."""
OF_CLIPS = ("frame",)
"""Kinds that only a clip can have; they fill the frame, so that they have no size."""


@dataclass(frozen=True, eq=False)
class Spot:
    """Where a needle goes.

    Args:
        rng: of all that is random in it.
        picture: (H, W, 3) uint8, the picture, or the first frame that the needle is in.
        top, left, side: the square that it may fill, in pixels.
        place, moment: where that is, one of PLACES; and when, one of MOMENTS.
        is_clip: whether the medium is a clip.
        donor: gives a picture, or a frame, of another file.
    """

    rng: np.random.Generator
    picture: Pixels
    top: int
    left: int
    side: int
    place: str
    moment: str
    is_clip: bool
    donor: Callable[[], Pixels]

    @property
    def below(self) -> Pixels:
        """What the square covers."""
        return self.picture[self.top : self.top + self.side, self.left : self.left + self.side]

    @property
    def medium(self) -> str:
        """What the medium is called in a question."""
        return "video" if self.is_clip else "picture"


@dataclass(frozen=True)
class NeedleDrawing:
    """What is planted, and asked about it.

    Args:
        size: its height and width in pixels, at most those of its square; None: all of the frame.
        draw: makes its pixels.
        answer: None where no answer is known to be right.
        choices: the answers to choose from.
    """

    size: tuple[int, int] | None
    draw: Callable[[], Sticker]
    question: str
    answer: str | None = None
    choices: tuple[str, ...] = ()


Maker = Callable[[Spot], NeedleDrawing]
Makers = Mapping[str, Maker]
"""What makes a needle of each kind."""


def draw_digits(rng: np.random.Generator) -> str:
    """Return a number of two digits."""
    return str(int(rng.integers(10, 100)))


def with_sticker(
    sticker: Sticker, question: str, answer: str | None, choices: tuple[str, ...] = ()
) -> NeedleDrawing:
    """Return a needle whose pixels are those of a sticker."""
    return NeedleDrawing(sticker.size, lambda: sticker, question, answer, choices)


def make_patch(spot: Spot) -> NeedleDrawing:
    """Return a round patch of noise, of the mean colour of what it covers."""
    question = f"In this {spot.medium}, a small round patch was replaced by noise. Where is it?"
    return with_sticker(
        noise_patch(spot.rng, spot.below), _choose(question, PLACES), spot.place, PLACES
    )


def make_digit(spot: Spot) -> NeedleDrawing:
    """Return a number of two digits, in black on a white plate."""
    digits = draw_digits(spot.rng)
    question = (
        f"A number is written in black on a small white plate in this {spot.medium}. Which "
        "number is it? Answer with the number only."
    )
    return with_sticker(written_number(digits, spot.side), question, digits)


def make_object(spot: Spot) -> NeedleDrawing:
    """Return a round piece of another file."""
    question = f"A round piece of another picture was pasted into this {spot.medium}. Where is it?"
    piece = round_piece(spot.rng, spot.donor(), spot.side)
    return with_sticker(piece, _choose(question, PLACES), spot.place, PLACES)


def make_frame(spot: Spot) -> NeedleDrawing:
    """Return a frame of another file in the place of the clip's own."""
    question = "A part of this video is from another one. When is it shown?"
    (height, width), donor = spot.picture.shape[:2], spot.donor
    return NeedleDrawing(
        None,
        lambda: whole_picture(donor(), height, width),
        _choose(question, MOMENTS),
        spot.moment,
        MOMENTS,
    )


def _choose(question: str, choices: tuple[str, ...]) -> str:
    """Return a question with the answers to choose from."""
    return f"{question} Answer with one of: {', '.join(choices)}."


MAKERS: Makers = {
    "patch": make_patch, "digit": make_digit, "object": make_object, "frame": make_frame
}  # fmt: skip
