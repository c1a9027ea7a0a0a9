"""How sure a figure is: bootstrap by file, and Holm's correction for many comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over questions, and the 95 % interval of it that drawing files anew gives."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A paired difference of two means; `worse` is the one-sided p-value of "not below 0"."""

    mean: float
    low: float
    high: float
    worse: float

    def to_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "worse_p": self.worse}


def estimate(values: Sequence[float], files: Sequence[str], seed: int = 0) -> Estimate:
    """The mean of (n,) values, one a question, and its interval.

    The questions about one file are not independent: files are drawn with replacement, each with
    all its questions.

    Args:
        files: (n,) which file each question is about.
    """
    drawn, mean = _draw(np.asarray(values, dtype=float), files, seed)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high))


def difference(
    values: Sequence[float], others: Sequence[float], files: Sequence[str], seed: int = 0
) -> Difference:
    """The mean of `values` less that of `others`, paired by question, and its interval."""
    gaps = np.asarray(values, dtype=float) - np.asarray(others, dtype=float)
    drawn, mean = _draw(gaps, files, seed)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    worse = float((np.sum(drawn >= 0) + 1) / (len(drawn) + 1))
    return Difference(mean, float(low), float(high), worse)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given (Holm, 1979)."""
    order = np.argsort(np.asarray(p_values), kind="stable")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _draw(
    values: NDArray[np.float64], files: Sequence[str], seed: int
) -> tuple[NDArray[np.float64], float]:
    """Means of DRAWS draws of files, and the mean itself."""
    if not len(values):
        return np.full(1, np.nan), float("nan")
    draws, sums = draw_files(np.stack([values, np.ones_like(values)], axis=1), files, seed)
    drawn = draws @ sums
    return drawn[:, 0] / drawn[:, 1], float(values.mean())


def draw_files(
    values: NDArray[np.float64], files: Sequence[str], seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """How often each of G files comes up in each draw, and what each adds up to.

    Args:
        values: (n, k), a row a question.

    Returns:
        (DRAWS, G), rows add up to G; and (G, k) sums over the questions of a file.
    """
    _, group = np.unique(np.asarray(files), return_inverse=True)
    num_files = int(group.max()) + 1
    sums = np.zeros((num_files, values.shape[1]))
    np.add.at(sums, group, values)
    draws = np.random.default_rng(seed).multinomial(
        num_files, [1 / num_files] * num_files, size=DRAWS
    )
    return draws, sums
