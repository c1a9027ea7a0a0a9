"""Is an answer right? Exact for most kinds of question, by events for "what happens?"."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtprune.inference.questions_file import Asked

ARTICLES = {"a", "an", "the"}


def score(kind: str, expected: str, given: str) -> float:
    """How right an answer is, in [0, 1]: 1 is right, and less than 1 is wrong.

    Case, articles, spaces and a final full stop don't count. `what_happens` is scored by events:
    twice the number of events in common, in the same order, over the number in both answers.
    """
    if kind != "what_happens":
        return float(_words(expected) == _words(given))
    one, other = events(expected), events(given)
    if not one and not other:
        return 1.0
    return 2 * _common(one, other) / (len(one) + len(other))


def is_right(kind: str, expected: str, given: str) -> bool:
    """Right is right whole: part of a clip's events counts as wrong, as in the model's card."""
    return score(kind, expected, given) == 1.0


def rate(asked: Asked, given: str) -> float:
    """1 where the answer to a question of this world is right, else 0: for an evaluation."""
    return float(is_right(asked.kind, asked.answer or "", given))


def events(answer: str) -> list[str]:
    """The events that an answer names, in order: two in "red circle moves left, then ..."."""
    parts = re.split(r",|\bthen\b|\band\b|\.|;", answer.lower())
    return [words for part in parts if (words := _words(part))]


def _words(text: str) -> str:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return " ".join(word for word in words if word not in ARTICLES)


def _common(one: list[str], other: list[str]) -> int:
    """The length of the longest common subsequence."""
    lengths = [0] * (len(other) + 1)
    for left in one:
        before = 0
        for j, right in enumerate(other):
            best = before + 1 if left == right else max(lengths[j], lengths[j + 1])
            before, lengths[j + 1] = lengths[j + 1], best
    return lengths[-1]
