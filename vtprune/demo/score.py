"""Score answers: exact for most kinds of question, by events for "what happens?"."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtprune.inference.questions_file import Asked

ARTICLES = {"a", "an", "the"}


def score(kind: str, expected: str, answer: str) -> float:
    """Return how right an answer is, in [0, 1]; less than 1 is wrong.

    Case, articles, spaces and a final full stop don't count. `what_happens` is scored by events:
    twice the number of events in common, in the same order, over the number in both answers.
    """
    if kind != "what_happens":
        return float(_words(expected) == _words(answer))
    expected_events, given_events = events(expected), events(answer)
    total = len(expected_events) + len(given_events)
    return 2 * _common_length(expected_events, given_events) / total if total else 1.0


def is_right(kind: str, expected: str, answer: str) -> bool:
    """Whether an answer is right; a part of a clip's events is wrong, as in the model's card."""
    return score(kind, expected, answer) == 1.0


def rate(question: Asked, answer: str) -> float:
    """Return 1 where the answer to a question of this world is right, else 0."""
    return float(is_right(question.kind, question.answer or "", answer))


def events(answer: str) -> list[str]:
    """Return the events that an answer names, in order."""
    parts = re.split(r",|\bthen\b|\band\b|\.|;", answer.lower())
    return [words for part in parts if (words := _words(part))]


def _words(text: str) -> str:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return " ".join(word for word in words if word not in ARTICLES)


def _common_length(first: list[str], second: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)
    for left in first:
        before = 0
        for j, right in enumerate(second):
            best = before + 1 if left == right else max(lengths[j], lengths[j + 1])
            before, lengths[j + 1] = lengths[j + 1], best
    return lengths[-1]
