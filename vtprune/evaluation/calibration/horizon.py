"""The information horizon: the layer from which on answers do not need the visual tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vtprune.evaluation.bootstrap import FEWEST_FILES, Change
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
    """

    change: Change
    layer: int | None
    needed: int | None
    exact: tuple[float, ...]

    def asked(self) -> str:
        """Return how many questions on how many files were asked."""
        change = self.change
        return f"{counted(change.questions, 'question')} on {counted(change.files, 'file')}"

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


def find_horizon(change: Change, exact: Sequence[float]) -> Horizon:
    """Find the information horizon from the changes by layer."""
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
    return Horizon(change, layer if is_found else None, needed, tuple(exact))


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
