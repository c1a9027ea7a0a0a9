"""From what answers are worth to the layer from which visual tokens are not needed any more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vtprune.evaluation.intervals import draw_files
from vtprune.inference.wording import counted

if TYPE_CHECKING:
    from vtprune.inference.answers import Score
    from vtprune.inference.questions_file import Asked

TOLERANCE = 0.01  # of the quality that a horizon may lose
CONFIDENCE = 0.95  # of the one-sided bound
FEWEST_FILES = 10
"""Below, drawing files again says little about other files. Nor could an exact test of signs tell
the best of some 20 schedules from the others: by chance all of 9 files agree once in 2 ** 9 times,
which is 0.04 after Holm's correction, all of 8 once in 2 ** 8."""

Figures = NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """How quality changes against the unpruned model, one entry a way to prune.

    Args:
        mean: relative change: 0.02 is 2 % better.
        lower: its lower 95 % bound, one-sided.
        questions: how many were asked.
        files: of how many files.
    """

    mean: tuple[float, ...]
    lower: tuple[float, ...]
    questions: int
    files: int


@dataclass(frozen=True)
class Gap:
    """How far one way to prune is behind another, in parts of the unpruned quality.

    Args:
        mean: 0.02 is 2 % of it.
        low, high: its 95 % interval; None of fewer than FEWEST_FILES files, which have none.
    """

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Horizon:
    """The information horizon of one group of questions.

    Args:
        change: when all visual tokens are dropped from layer 0, 1, ... L-1.
        layer: the first layer i such that from every layer j >= i on dropping them keeps the lower
            bound at -1 % or above; None: not found.
        needed: how many questions would tell, where these leave a layer open: the last one if no
            horizon was found, else the one before the horizon; None where they tell.
        exact: share of the questions whose answer (the right one, or the unpruned model's) is what
            greedy decoding gives, by layer.
    """

    change: Change
    layer: int | None
    needed: int | None
    exact: tuple[float, ...]

    def asked(self) -> str:
        """How many questions on how many files."""
        change = self.change
        return f"{counted(change.questions, 'question')} on {counted(change.files, 'file')}"

    def reason(self) -> str:
        """Why none was found, or what is left open; empty where there is nothing to say."""
        if self.layer is None and self.change.files < FEWEST_FILES:
            few = counted(self.change.files, "file")
            return f"{few} can't tell, {FEWEST_FILES} are the fewest{self._more()}"
        if self.layer is None and self.needed is None:
            lost = -self.change.mean[-1]
            return f"dropping them at the last layer alone loses {lost:.1%}"
        if self.layer is None:
            return f"{counted(self.change.questions, 'question')} can't tell{self._more()}"
        if self.needed is not None:
            return f"layer {self.layer - 1} is left open{self._more()}"
        return ""

    def _more(self) -> str:
        return f"; about {self.needed:,} questions would tell" if self.needed else ""


def quality(asked: Asked, told: Score) -> float:
    """What an answer's score is worth: the probability of a right answer.

    Without one, agreement: whether greedy decoding still gives the unpruned model's own answer.
    """
    return float(told.greedy) if asked.answer is None else told.probability


def relative_change(
    before: Sequence[float], after: Figures, files: Sequence[str], seed: int = 0
) -> Change:
    """The change of mean quality, paired by question, and its lower bound.

    (sum after - sum before) / sum before, so that a question the unpruned model can't answer has
    little weight. The bound is a bootstrap that draws files, since the questions about one file
    are not independent, widened by sqrt(G / (G - 1)) for G files.

    Args:
        before: (n,) quality of the unpruned model.
        after: (n, k) quality of k ways to prune.
        files: (n,) which file each question is about.
    """
    draws, sums = draw_files(np.column_stack([before, after]), files, seed)
    tiny = np.finfo(float).tiny
    whole = sums.sum(axis=0)
    mean = whole[1:] / max(float(whole[0]), tiny) - 1
    drawn = draws @ sums
    changes = drawn[:, 1:] / np.maximum(drawn[:, :1], tiny) - 1
    half = mean - np.quantile(changes, 1 - CONFIDENCE, axis=0)
    num_files = len(sums)
    lower = np.full_like(mean, -1.0)  # nothing loses more than all
    if num_files > 1:  # one file has no interval
        lower = np.maximum(lower, mean - half * math.sqrt(num_files / (num_files - 1)))
    return Change(tuple(mean.tolist()), tuple(lower.tolist()), len(files), num_files)


def relative_gap(
    before: Sequence[float],
    best: Figures,
    other: Figures,
    files: Sequence[str],
    seed: int = 0,
) -> Gap:
    """The mean quality of one way to prune less that of another, paired by question.

    It is a part of the unpruned model's quality, and its interval is drawn by file, as in
    `relative_change`.

    Args:
        before: (n,) quality of the unpruned model.
        best, other: (n, 1) quality of the two.
    """
    draws, sums = draw_files(np.column_stack([before, best - other]), files, seed)
    tiny = np.finfo(float).tiny
    whole = sums.sum(axis=0)
    mean = float(whole[1]) / max(float(whole[0]), tiny)
    num_files = len(sums)
    if num_files < FEWEST_FILES:
        return Gap(mean)
    drawn = draws @ sums
    gaps = drawn[:, 1] / np.maximum(drawn[:, 0], tiny)
    low, high = np.quantile(gaps, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    wider = math.sqrt(num_files / (num_files - 1))
    return Gap(mean, mean - wider * (mean - float(low)), mean + wider * (float(high) - mean))


def find_horizon(change: Change, exact: Sequence[float]) -> Horizon:
    """The information horizon from the changes by layer."""
    kept = [lower >= -TOLERANCE for lower in change.lower]
    layer = len(kept)
    while layer and kept[layer - 1]:
        layer -= 1
    found = layer < len(kept) and change.files >= FEWEST_FILES
    needed = None
    if not found:
        needed = questions_needed(change, len(kept) - 1)
    elif layer:
        needed = questions_needed(change, layer - 1)
    return Horizon(change, layer if found else None, needed, tuple(exact))


def questions_needed(change: Change, layer: int) -> int | None:
    """How many questions such as these would put a layer's lower bound at -1 %.

    The bound's distance falls with the square root of their number; where the change itself is at
    -1 % or below, no number would: None. A gain is counted as no change, which it comes from.
    """
    mean = min(change.mean[layer], 0.0)
    if mean <= -TOLERANCE:
        return None
    half = change.mean[layer] - change.lower[layer]
    factor = (half / (mean + TOLERANCE)) ** 2
    factor = max(factor, FEWEST_FILES / change.files)
    return math.ceil(round(change.questions * factor, 6))
