"""Text in pictures: in whatever script, with the fonts that there are, in lines that fit."""

from __future__ import annotations

import textwrap
import unicodedata
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ImageFont

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

    Font = FreeTypeFont | ImageFont.ImageFont

TEXT, HEAD = 13, 15
LINE = 20
"""Pixels from a line of text to the next."""
FALLBACKS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJK-Regular.otf",
    "NotoSansCJKsc-Regular.otf", "SourceHanSans-Regular.ttc", "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf", "wqy-microhei.ttc", "wqy-zenhei.ttc", "ipag.ttf", "NanumGothic.ttf",
    "msyh.ttc", "YuGothR.ttc", "msgothic.ttc", "malgun.ttf", "PingFang.ttc",
    "Hiragino Sans GB.ttc", "Arial Unicode.ttf", "NotoEmoji-Regular.ttf", "Symbola.ttf",
    "seguiemj.ttf", "seguisym.ttf", "NotoSansArabic-Regular.ttf", "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf", "NotoSansHebrew-Regular.ttf",
)  # fmt: skip
"""Fonts of systems for what the drawings' own lacks, by file name."""

JOINERS = "\u200c\u200d"
"""Formatting characters that scripts are written with."""


@lru_cache
def font(size: int) -> Font:
    """Return the font of all drawings, so many pixels high."""
    return ImageFont.load_default(size)


@lru_cache
def fallback(name: str, size: int) -> Font | None:
    """Return a font of the system; None where it has none of the name."""
    packaged = find_spec("matplotlib")  # brings one along, for many scripts
    places = [name]
    if packaged is not None and packaged.origin:
        places.append(str(Path(packaged.origin).parent / "mpl-data" / "fonts" / "ttf" / name))
    for place in places:
        try:
            return ImageFont.truetype(place, size)
        except OSError:
            continue
    return None


@lru_cache(2**14)
def has_glyph(font: Font, character: str) -> bool:
    """Return whether a font draws a character, and not the box of those that it lacks."""
    drawn, missing = font.getmask(character), font.getmask("\uffff")
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)  # type: ignore[call-overload]


@lru_cache(2**14)
def font_of(character: str, size: int) -> Font | None:
    """Return the first font that has a character; None where none does."""
    if unicodedata.category(character) in ("Cc", "Cs", "Cn", "Co"):
        return None  # nothing to see, half a character, or none
    candidates = (font(size), *(fallback(name, size) for name in FALLBACKS))
    return next((one for one in candidates if one and has_glyph(one, character)), None)


def legible(text: str, size: int) -> str:
    """Return a text on one line; characters that no font has are escaped."""
    characters = []
    for character in " ".join(text.split()):
        kind = unicodedata.category(character)
        if kind == "Cf" and character not in JOINERS:
            continue  # it would turn the order of others
        if font_of(character, size) is not None:
            characters.append(character)
        elif kind not in ("Cf", "Mn"):
            characters.append(character.encode("unicode_escape").decode())
    return "".join(characters)


def runs_of(text: str, size: int) -> list[tuple[str, Font]]:
    """Return a legible text in runs of one font."""
    runs: list[tuple[str, Font]] = []
    for character in legible(text, size):
        here = font_of(character, size)
        assert here is not None
        if runs and runs[-1][1] is here:
            runs[-1] = runs[-1][0] + character, here
        else:
            runs.append((character, here))
    return runs


def text_width(text: str, size: int) -> int:
    """Return how many pixels wide a text is drawn."""
    return int(sum(font.getlength(run) for run, font in runs_of(text, size))) + 1


def draw_text(
    pen: ImageDraw, at: tuple[int, int], text: str, colour: tuple[int, int, int], size: int
) -> None:
    """Draw a line of text.

    Args:
        at: its left top corner.
    """
    left: float = at[0]
    baseline = at[1] + font(size).getbbox("H")[3]
    for run, font_here in runs_of(text, size):
        if font_here is font(size):
            pen.text((left, at[1]), run, colour, font_here)
        else:
            pen.text((left, baseline), run, colour, font_here, anchor="ls")
        left += font_here.getlength(run)


def fit_lines(text: str, size: int, width: int, most: int = 3) -> list[str]:
    """Return a text in lines of a width, the last cut short where there are too many.

    Args:
        width: pixels.
        most: lines.
    """
    plain = legible(text, size)
    characters = max(width // 7, 8)
    while True:
        lines = textwrap.wrap(plain, characters, max_lines=most, placeholder=" ...") or [""]
        if characters <= 8 or all(text_width(line, size) <= width for line in lines):
            return lines
        characters = characters * 9 // 10
