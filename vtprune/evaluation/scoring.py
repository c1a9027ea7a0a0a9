"""How right an answer is, by what was asked for: a choice, number, yes or no, words or text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vtprune.errors import VtpruneError, brief, quote

if TYPE_CHECKING:
    from vtprune.inference.questions_file import Asked

METRICS = ("auto", "exact", "contains", "choice", "number", "anls", "vqa")
ARTICLES = {"a", "an", "the"}
COUNTING = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve",
)  # fmt: skip
NUMBERS = {word: str(number) for number, word in enumerate(COUNTING)}
ANLS_FLOOR = 0.5
"""Below this similarity an answer counts as a different text (arXiv 1905.13648)."""
VQA_ANSWERS = 10
"""Answers of so many people to one question are scored by VQA's rule."""
VQA_AGREEING = 3  # people who gave an answer that counts in full
LETTER = re.compile(r"^\W*(?:answer|option|choice)?\W*([a-z])(?:\W|$)", re.IGNORECASE)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def check_metric(metric: str, label: str = "metric") -> None:
    """Refuse a metric that does not exist.

    Args:
        label: what it is called where it was given.

    Raises:
        VtpruneError: with the metrics.
    """
    if metric not in METRICS:
        raise VtpruneError(
            f"{label} {brief(metric)} is unknown", f"choose from {', '.join(METRICS)}"
        )


def check_choices(metric: str, asked: Sequence[Asked], label: str = "metric") -> None:
    """Refuse to score by choices where a question has none: no answer to it would be right.

    Args:
        label: as of `check_metric`.

    Raises:
        VtpruneError: with the first such question.
    """
    bare = next((question for question in asked if not question.choices), None)
    if metric == "choice" and bare is not None:
        raise VtpruneError(
            f"{label} choice, but {quote(bare.question)} about {bare.file.name} has no choices",
            f"give every question its choices, or another {label}",
        )


def score(expected: str, answer: str, choices: Sequence[str] = (), metric: str = "auto") -> float:
    """Return how right an answer is, in [0, 1].

    Args:
        expected: the right answer; where there are choices, one of them, else nothing is right.
        answer: what the model answered.
        choices: the answers to choose from; the prompt may have named them A, B, C ...
        metric: one of METRICS. "auto": "choice" where there are choices, "number" where the right
            answer is one, else "contains". "vqa" of one answer is "exact".

    Raises:
        ValueError: not a metric.
    """
    if metric == "auto":
        metric = pick_metric(expected, choices)
    if metric == "choice":
        wanted = chosen(expected, choices)
        return float(bool(wanted) and chosen(answer, choices) == wanted)
    if metric not in SCORES:
        raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
    return SCORES[metric](expected, answer)


def score_answers(
    expected: Sequence[str], answer: str, choices: Sequence[str] = (), metric: str = "auto"
) -> float:
    """Return how right an answer is where several are right, in [0, 1].

    By VQA's rule where that is the metric, or where ten people answered; else by the best of them,
    which is also how ANLS is defined (arXiv 1905.13648).

    Args:
        expected: the right answers, as often as they were given.
        answer, choices, metric: as of `score`.
    """
    if metric == "vqa" or (metric == "auto" and len(expected) == VQA_ANSWERS and not choices):
        return vqa(expected, answer)
    return max(score(right, answer, choices, metric) for right in dict.fromkeys(expected))


def vqa(expected: Sequence[str], answer: str) -> float:
    """Return VQA accuracy: full where three people gave the answer (arXiv 1505.00468).

    It is the mean over all choices of all people but one; a single right answer counts in full.
    """
    if len(expected) < VQA_AGREEING:
        return max(exact(right, answer) for right in expected)
    same = [exact(right, answer) for right in expected]
    shares = [min((sum(same) - own) / VQA_AGREEING, 1.0) for own in same]
    return sum(shares) / len(shares)


def pick_metric(expected: str, choices: Sequence[str]) -> str:
    """Return the metric that suits a question."""
    if choices:
        return "choice"
    return "number" if NUMBER.fullmatch(_digits(expected)) else "contains"


def words(text: str) -> list[str]:
    """Return the words in lower case, without articles and punctuation, small numbers as digits."""
    parts = re.findall(r"[^\W_]+(?:[.,]\d+)?", text.lower())
    return [NUMBERS.get(word, word) for word in parts if word not in ARTICLES]


def exact(expected: str, answer: str) -> float:
    """Return whether the words are the same."""
    return float(words(expected) == words(answer))


def contains(expected: str, answer: str) -> float:
    """Return whether the expected words are in the answer, one after the other.

    Yes and no have to be its first word: "no, but yes" is no.
    """
    wanted, answered = words(expected), words(answer)
    if wanted in (["yes"], ["no"]):
        return float(answered[:1] == wanted)
    places = range(len(answered) - len(wanted) + 1)
    return float(bool(wanted) and any(answered[i : i + len(wanted)] == wanted for i in places))


def number(expected: str, answer: str) -> float:
    """Return whether the answer's first number is the expected one; "07" is not "7"."""
    match = NUMBER.search(" ".join(NUMBERS.get(w, w) for w in answer.lower().split()))
    return float(match is not None and _plain(match[0]) == _plain(_digits(expected)))


def anls(expected: str, answer: str) -> float:
    """Return the normalised Levenshtein similarity, 0 below one half (arXiv 1905.13648)."""
    right, text = (" ".join(part.lower().split()) for part in (expected, answer))
    longest = max(len(right), len(text))
    similar = 1 - _edits(right, text) / longest if longest else 1.0
    return similar if similar >= ANLS_FLOOR else 0.0


def chosen(answer: str, choices: Sequence[str]) -> str:
    """Return the choice that an answer names, by text or letter; "" for none or several.

    The whole text counts first, then a letter in front ("B", "(b) red"), then the one choice whose
    words are in the answer.
    """
    same = [choice for choice in choices if words(choice) == words(answer)]
    if same:
        return same[0]
    letter = LETTER.match(answer)
    if letter and not re.match(r"^\W*a\s+\w", answer, re.IGNORECASE):  # "a cat" is no letter
        place = ord(letter[1].lower()) - ord("a")
        if place < len(choices):
            return choices[place]
    named = [choice for choice in choices if contains(choice, answer)]
    return named[0] if len(named) == 1 else ""


def _digits(text: str) -> str:
    text = text.strip().strip(".").lower()
    return NUMBERS.get(text, text)


def _plain(text: str) -> str:
    """Return a number without thousands separators and zeros behind its point."""
    text = text.replace(",", "")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _edits(text: str, other: str) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(text, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


SCORES: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "contains": contains,
    "number": number,
    "anls": anls,
    "vqa": exact,
}
