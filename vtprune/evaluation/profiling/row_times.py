"""Seconds of the rows of a profile, pass by pass, however they were measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

RUN, SHARED, SCALED = "run", "shared", "scaled"
"""How a row's seconds were measured: it ran; layers of other rows are summed for it; some of those
are scaled from layers with another number of tokens."""


@dataclass
class TimeBudget:
    """Seconds that measuring may take; the clock starts at once."""

    seconds: float
    started: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.started


class PassTimes(NamedTuple):
    """Seconds of one row in one pass over all rows.

    Args:
        preprocess, vision, select, prefill: as in a report.
        around: of the time to the first token, what is none of those.
        decode_per_token: of a token after the first.
    """

    preprocess: float
    vision: float
    select: float
    prefill: float
    around: float
    decode_per_token: float

    @property
    def first_token(self) -> float:
        return self.preprocess + self.vision + self.prefill + self.around

    def decode(self, answer_tokens: int) -> float:
        """Return the seconds of the tokens after the first."""
        return max(answer_tokens - 1, 0) * self.decode_per_token

    def total(self, answer_tokens: int) -> float:
        """Return the seconds to the end of the answer, without loading and reading media."""
        return self.first_token + self.decode(answer_tokens)


@dataclass(frozen=True)
class RowTimes:
    """Seconds of one row.

    Args:
        passes: every pass; the same number for all rows.
        visual: visual tokens that each layer really saw.
        how: RUN, SHARED or SCALED.
    """

    passes: tuple[PassTimes, ...]
    visual: tuple[int, ...]
    how: str = RUN

    @property
    def typical(self) -> PassTimes:
        """The median of each part."""
        return PassTimes(*map(median, zip(*self.passes, strict=True)))

    def speedups(
        self, unpruned: RowTimes, seconds: Callable[[PassTimes], float]
    ) -> tuple[float, ...]:
        """Return how many times as fast as an unpruned row this one was, pass by pass.

        Args:
            seconds: of a pass, what is compared.
        """
        pairs = zip(unpruned.passes, self.passes, strict=True)
        return tuple(seconds(one) / max(seconds(other), 1e-9) for one, other in pairs)


@dataclass(frozen=True)
class Measurement:
    """Seconds of all rows of a profile.

    Args:
        how: "whole": the whole model ran; "layers": single layers were timed and summed.
        rows: by the rows' keys.
        passes: how often all was timed.
        seconds: that measuring took.
        warnings: what the reader should know before believing a figure.
        scaled: where a smaller input was measured, its size; empty where the real one was.
        errors: why rows could not be run, by their keys.
    """

    how: str
    rows: Mapping[tuple[object, ...], RowTimes]
    passes: int
    seconds: float
    warnings: Sequence[str] = ()
    scaled: str = ""
    errors: Mapping[tuple[object, ...], str] = field(default_factory=dict)
