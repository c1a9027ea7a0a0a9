"""The information horizon: the layer from which on answers do not need the visual tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vtprune.evaluation.bootstrap import CONFIDENCE, FEWEST_FILES, Change, Figures
from vtprune.inference.wording import counted

if TYPE_CHECKING:
    from vtprune.inference.forced_answers import Score
    from vtprune.inference.questions_file import Asked

TOLERANCE = 0.01  # of the quality that a horizon may lose


@dataclass(frozen=True)
class Horizon:
    """The information horizon of one group of questions.

    Args:
        change: when all visual tokens are dropped from layer 0, 1, ... L-1.
        layer: the first layer i such that from every layer j >= i on dropping them keeps the lower
            bound at -1 % or above; None: not found.
        needed: how many questions would tell, where these leave a layer open: the last one if no
            horizon was found, else the one before the horizon; None where they suffice.
        exact: share of the questions whose answer (the right one, or the unpruned model's) is what
            greedy decoding gives, by layer.
        interval: first and last layer of 95 % of the draws of files, in each of which it is the
            first layer from which on the mean change itself is at -1 % or above; the number of
            layers where there is none. None of fewer than FEWEST_FILES files. The layer, which goes
            by the lower bounds, lies at its end.
    """

    change: Change
    layer: int | None
    needed: int | None
    exact: tuple[float, ...]
    interval: tuple[int, int] | None = None

    def asked(self) -> str:
        """Return how many questions on how many files were asked."""
        change = self.change
        return f"{counted(change.questions, 'question')} on {counted(change.files, 'file')}"

    def certainty(self) -> str:
        """Return the interval in words; "" without one."""
        if self.interval is None:
            return ""
        low, high = self.interval
        layers = len(self.change.mean)
        first, last = (f"layer {at}" if at < layers else "none" for at in (low, high))
        return f"{first} in 95 % of draws" if low == high else f"{first} to {last} in 95 % of draws"

    def reason(self) -> str:
        """Return why none was found, or what is left open; "" where there is nothing to say."""
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


def quality(asked: Asked, score: Score) -> float:
    """Return the quality of an answer: the probability of a right answer.

    Without one, agreement: whether greedy decoding still gives the unpruned model's own answer.
    """
    return float(score.greedy) if asked.answer is None else score.probability


def find_horizon(change: Change, exact: Sequence[float], drawn: Figures | None = None) -> Horizon:
    """Find the information horizon from the changes by layer.

    Args:
        drawn: (n, L) changes of draws of files, which say how sure it is; None: not drawn.
    """
    kept = [lower >= -TOLERANCE for lower in change.lower]
    layer = len(kept)
    while layer and kept[layer - 1]:
        layer -= 1
    is_found = layer < len(kept) and change.files >= FEWEST_FILES
    needed = None
    if not is_found:
        needed = questions_needed(change, len(kept) - 1)
    elif layer:
        needed = questions_needed(change, layer - 1)
    interval = None
    if drawn is not None and change.files >= FEWEST_FILES:
        interval = horizon_interval(drawn)
    return Horizon(change, layer if is_found else None, needed, tuple(exact), interval)


def horizon_interval(drawn: Figures) -> tuple[int, int]:
    """Return the first and the last horizon of 95 % of draws, of (n, L) changes by layer."""
    lost = drawn < -TOLERANCE
    # One past the last layer that loses too much.
    horizons = np.where(lost.any(1), lost.shape[1] - lost[:, ::-1].argmax(1), 0)
    ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = np.quantile(horizons, ends, method="nearest")
    return int(low), int(high)


def questions_needed(change: Change, layer: int) -> int | None:
    """Return how many questions such as these would put a layer's lower bound at -1 %.

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
