"""Sequences that end an answer, which a client names: what comes before the first of them."""

from __future__ import annotations

from collections.abc import Sequence


def before_stop(text: str, stops: Sequence[str]) -> str | None:
    """Return the text before the first stop sequence; None where there is none in it."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(places)] if places else None


def visible_part(text: str, stops: Sequence[str]) -> str:
    """Return as much of an unfinished answer as is a part of it however it goes on.

    Held back are the beginning of a stop sequence, and blanks, which an answer does not end with.
    """
    before = before_stop(text, stops)
    if before is not None:
        return before.rstrip()
    held = max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )
    return text[: len(text) - held].rstrip()
