"""How sure a figure is: the bootstrap over files, of which every interval and bound is made.

The questions about one file are not independent, so a draw takes whole files, each with all its
questions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
DRAWS = 2000
BOUND_DRAWS = 10_000  # of `measure_quality`, whose bound lies at the end of their distribution
AT_ONCE = 2**22  # weights in memory
MOST = 2**20  # times the files that there are; beyond, no one would ask so many
FEWEST_FILES = 10
"""Below, drawing files says little about other files. Nor could an exact test of signs tell the
best of some 20 schedules from the others: by chance all of 9 files agree once in 2 ** 9 times,
which is 0.04 after Holm's correction, all of 8 once in 2 ** 8."""
TINY = float(np.finfo(float).tiny)

Figures = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its 95 % interval."""

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
        """Return it as JSON has it."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "worse_p": self.worse}


@dataclass(frozen=True)
class Change:
    """How quality changes against the unpruned model, one entry a variant.

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
    """How much more quality one variant keeps than another, in parts of the unpruned quality.

    Args:
        mean: 0.02 is 2 % of it.
        low, high: its 95 % interval; None of fewer than FEWEST_FILES files, which have none.
    """

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Quality:
    """The share of the unpruned quality that is kept: the mean, and its lower 95 % bound."""

    mean: float
    lower: float

    def to_dict(self) -> dict[str, float]:
        """Return it as JSON has it."""
        return {"mean": self.mean, "lower": self.lower}


def sum_by_file(columns: Sequence[Sequence[float]] | Figures, files: Sequence[str]) -> Figures:
    """Return (G, k) sums over the questions about each of G files.

    Args:
        columns: k figures of each of n questions, (k, n).
        files: (n,) the file that each question is about.
    """
    _, group = np.unique(np.asarray(files), return_inverse=True)
    values = np.asarray(columns, dtype=float).T
    sums = np.zeros((int(group.max()) + 1, values.shape[1]))
    np.add.at(sums, group, values)
    return sums


def draw_files(sums: Figures, seed: int = 0) -> Figures:
    """Return (DRAWS, k) sums over files that are drawn with replacement, as many as there are.

    Args:
        sums: (G, k) of each file.
    """
    num_files = len(sums)
    chances = [1 / num_files] * num_files
    counts = np.random.default_rng(seed).multinomial(num_files, chances, size=DRAWS)
    drawn: Figures = counts @ sums
    return drawn


def shares_of_draws(found: Sequence[int], first: int) -> dict[int, float]:
    """Return how often draws gave each value; `first` comes first, then the most frequent."""
    counts = Counter(found)
    order = sorted(counts, key=lambda value: (value != first, -counts[value], value))
    return {value: counts[value] / len(found) for value in order}


# -- means and differences -------------------------------------------------------------------------


def estimate(values: Sequence[float], files: Sequence[str], seed: int = 0) -> Estimate:
    """Return the mean of (n,) values, one a question, and its interval.

    Args:
        files: (n,) the file that each question is about.
    """
    drawn = _draw_means(values, files, seed)
    return Estimate(_mean(values), *_interval(drawn))


def difference(
    values: Sequence[float], others: Sequence[float], files: Sequence[str], seed: int = 0
) -> Difference:
    """Return the mean of `values` less that of `others`, paired by question, and its interval."""
    gaps = (np.asarray(values, dtype=float) - np.asarray(others, dtype=float)).tolist()
    drawn = _draw_means(gaps, files, seed)
    worse = float((np.sum(drawn >= 0) + 1) / (len(drawn) + 1))
    return Difference(_mean(gaps), *_interval(drawn), worse)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _draw_means(values: Sequence[float], files: Sequence[str], seed: int) -> Figures:
    if not len(values):
        return np.full(1, np.nan)
    drawn = draw_files(sum_by_file([values, [1.0] * len(values)], files), seed)
    means: Figures = drawn[:, 0] / drawn[:, 1]
    return means


def _interval(drawn: Figures) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


# -- parts of the unpruned quality -----------------------------------------------------------------


def relative_change(
    before: Sequence[float], after: Figures, files: Sequence[str], seed: int = 0
) -> Change:
    """Return the change of mean quality, paired by question, and its lower bound.

    (sum after - sum before) / sum before, so that a question the unpruned model can't answer has
    little weight. The bound is a bootstrap over files, widened by sqrt(G / (G - 1)) for G files.

    Args:
        before: (n,) quality of the unpruned model.
        after: (n, k) quality of k variants.
        files: (n,) the file that each question is about.
    """
    sums = sum_by_file(np.column_stack([before, after]).T, files)
    mean = _changes(sums.sum(axis=0, keepdims=True))[0]
    half = mean - np.quantile(_changes(draw_files(sums, seed)), 1 - CONFIDENCE, axis=0)
    lower = np.full_like(mean, -1.0)  # nothing loses more than all
    if len(sums) > 1:  # one file has no interval
        lower = np.maximum(lower, mean - half * _widening(len(sums)))
    return Change(tuple(mean.tolist()), tuple(lower.tolist()), len(files), len(sums))


def drawn_changes(
    before: Sequence[float], after: Figures, files: Sequence[str], seed: int = 0
) -> Figures:
    """Return (DRAWS, k) changes as of `relative_change`, each over files drawn with replacement."""
    return _changes(draw_files(sum_by_file(np.column_stack([before, after]).T, files), seed))


def _changes(sums: Figures) -> Figures:
    """Return (n, k) relative changes of (n, 1 + k) sums: of the unpruned model, and of variants."""
    changes: Figures = sums[:, 1:] / np.maximum(sums[:, :1], TINY) - 1
    return changes


def relative_gap(
    before: Sequence[float], best: Figures, other: Figures, files: Sequence[str], seed: int = 0
) -> Gap:
    """Return the mean quality of one variant less that of another, paired by question.

    It is a part of the unpruned model's quality; its interval is made as in `relative_change`.

    Args:
        before: (n,) quality of the unpruned model.
        best, other: (n, 1) quality of the two.
    """
    sums = sum_by_file(np.column_stack([before, best - other]).T, files)
    total = sums.sum(axis=0)
    mean = float(total[1]) / max(float(total[0]), TINY)
    if len(sums) < FEWEST_FILES:
        return Gap(mean)
    drawn = draw_files(sums, seed)
    low, high = _interval(drawn[:, 1] / np.maximum(drawn[:, 0], TINY))
    wider = _widening(len(sums))
    return Gap(mean, mean - wider * (mean - low), mean + wider * (high - mean))


def _widening(num_files: int) -> float:
    return math.sqrt(num_files / (num_files - 1))


# -- a bound for few files -------------------------------------------------------------------------


def measure_quality(
    after: Sequence[float], before: Sequence[float], files: Sequence[str], seed: int = 0
) -> Quality:
    """Return the share of the unpruned quality that is kept, and a bound that few files bear.

    The bound weighs whole files anew: the weights are drawn from a Dirichlet distribution, all
    alike likely, with one more file of average size among them that loses everything, since that is
    what no sample can rule out. Where every file keeps all or nothing this is the exact
    (Clopper-Pearson) bound, so that n files without a loss show no more than 0.05^(1/n), about
    1 - 3/n. The construction for means of any bounded values is that of Learned-Miller and Thomas,
    arXiv 1905.06208.

    Args:
        after: (n,) quality of each answer, in [0, 1].
        before: (n,) that of the unpruned model's; all 1 where its answer is the yardstick.
        files: (n,) the file that each question is about.
        seed: of the draws.
    """
    sums = sum_by_file([after, before], files)
    return Quality(_share(sums), _lower_bound(sums, 1.0, seed))


def files_needed(
    after: Sequence[float],
    before: Sequence[float],
    files: Sequence[str],
    floor: float,
    seed: int = 0,
) -> int | None:
    """Return how many files such as these would put the lower bound at `floor`.

    Returns:
        None where the mean itself is not above it: no number would.
    """
    sums = sum_by_file([after, before], files)
    if _share(sums) <= floor:
        return None
    low = high = 1.0
    while _lower_bound(sums, high, seed) < floor:
        low, high = high, high * 2
        if high > MOST:
            return None
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _lower_bound(sums, middle, seed) >= floor else (middle, high)
    return math.ceil(len(sums) * high)


def fewest_files(floor: float) -> int:
    """Return the fewest files that can show `floor`: as many as it takes if none loses anything."""
    count = max(1, math.floor(math.log(1 - CONFIDENCE) / math.log(floor)))
    while highest_floor(count) < floor:
        count += 1
    return count


def highest_floor(num_files: float) -> float:
    """Return the highest floor that so many files can show, if none of them loses anything."""
    return float((1 - CONFIDENCE) ** (1 / num_files)) if num_files else 0.0


def _share(sums: Figures) -> float:
    kept, total = sums.sum(axis=0)
    return float(kept / total) if total else math.nan


def _lower_bound(sums: Figures, times: float, seed: int) -> float:
    """Return the lower bound if there were `times` as many files, alike.

    Args:
        sums: (G, 2) quality of each file, kept and unpruned.
    """
    num_files = len(sums)
    counting = sums[:, 1] > 0  # the others have nothing to lose
    if not counting.any():
        return 0.0
    if (sums[:, 0] == sums[:, 1]).all():  # what the draws come to, without chance
        return highest_floor(round(int(counting.sum()) * times, 9))
    rng = np.random.default_rng(seed)
    shares = []
    size = max(1, AT_ONCE // num_files)
    for start in range(0, BOUND_DRAWS, size):
        rows = min(size, BOUND_DRAWS - start)
        # Gamma weights, divided by their sum, are a Dirichlet's; a file that is there k times
        # has the sum of k of them.
        # Not a product of matrices: BLAS's threads wait for each other where cores are busy.
        weights = rng.standard_gamma(times, (rows, num_files))
        kept, total = (np.einsum("rf,f->r", weights, column) for column in sums.T)
        unseen = rng.standard_exponential(rows) * sums[counting, 1].mean()
        shares.append(kept / (total + unseen))
    return float(np.quantile(np.concatenate(shares), 1 - CONFIDENCE))
