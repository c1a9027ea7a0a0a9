"""How much of the unpruned quality is kept for sure, from few files that each have questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95  # of the one-sided bound
DRAWS = 10_000
AT_ONCE = 2**22  # weights in memory
MOST = 2**20  # times the files that there are; beyond, no one would ask so many

Figures = NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """How much of the unpruned quality is kept: the mean, and its lower 95 % bound."""

    mean: float
    lower: float

    def to_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "lower": self.lower}


def measure(
    after: Sequence[float], before: Sequence[float], files: Sequence[str], seed: int = 0
) -> Quality:
    """The share of the unpruned model's quality that is kept, over all questions together.

    The questions about one file are not independent, so the bound weighs whole files anew: drawn
    from a Dirichlet distribution, all weights alike likely, with one more file of average size
    among them that loses everything, since that is what no sample can rule out. Where every file
    keeps all or nothing this is the exact (Clopper-Pearson) bound, so that n files without a loss
    show no more than 0.05^(1/n), about 1 - 3/n. The construction for means of any bounded values is
    that of Learned-Miller and Thomas, arXiv 1905.06208.

    Args:
        after: (n,) quality of each answer, in [0, 1].
        before: (n,) that of the unpruned model's; all 1 where its answer is the yardstick.
        files: (n,) which file each question is about.
        seed: of the draws.
    """
    sums = _by_file(after, before, files)
    return Quality(_mean(sums), _lower(sums, 1.0, seed))


def files_needed(
    after: Sequence[float],
    before: Sequence[float],
    files: Sequence[str],
    floor: float,
    seed: int = 0,
) -> int | None:
    """How many files such as these would put the lower bound at `floor`.

    Returns:
        None where the mean itself is not above it: no number would.
    """
    sums = _by_file(after, before, files)
    if _mean(sums) <= floor:
        return None
    low = high = 1.0
    while _lower(sums, high, seed) < floor:
        low, high = high, high * 2
        if high > MOST:
            return None
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _lower(sums, middle, seed) >= floor else (middle, high)
    return math.ceil(len(sums) * high)


def fewest_files(floor: float) -> int:
    """The fewest files that can show `floor`: as many as it takes if none loses anything."""
    count = max(1, math.floor(math.log(1 - CONFIDENCE) / math.log(floor)))
    while highest_floor(count) < floor:
        count += 1
    return count


def highest_floor(num_files: float) -> float:
    """The highest floor that so many files can show, if none of them loses anything."""
    return float((1 - CONFIDENCE) ** (1 / num_files)) if num_files else 0.0


def _by_file(after: Sequence[float], before: Sequence[float], files: Sequence[str]) -> Figures:
    """(G, 2) sums over the questions about each of G files."""
    _, group = np.unique(np.asarray(files), return_inverse=True)
    sums = np.zeros((int(group.max()) + 1, 2))
    np.add.at(sums, group, np.array([after, before], dtype=float).T)
    return sums


def _mean(sums: Figures) -> float:
    kept, whole = sums.sum(axis=0)
    return float(kept / whole) if whole else math.nan


def _lower(sums: Figures, times: float, seed: int) -> float:
    """The lower bound if there were `times` as many files, alike."""
    num_files = len(sums)
    telling = sums[:, 1] > 0  # the others have nothing to lose
    if not telling.any():
        return 0.0
    if (sums[:, 0] == sums[:, 1]).all():  # what the draws come to, without chance
        return highest_floor(round(int(telling.sum()) * times, 9))
    rng = np.random.default_rng(seed)
    shares = []
    size = max(1, AT_ONCE // num_files)
    for start in range(0, DRAWS, size):
        rows = min(size, DRAWS - start)
        # Gamma weights, divided by their sum, are a Dirichlet's; a file that is there k times
        # has the sum of k of them.
        kept, whole = (rng.standard_gamma(times, (rows, num_files)) @ sums).T
        unseen = rng.standard_exponential(rows) * sums[telling, 1].mean()
        shares.append(kept / (whole + unseen))
    return float(np.quantile(np.concatenate(shares), 1 - CONFIDENCE))
