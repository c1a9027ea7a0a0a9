"""What was measured of each row, however it was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median


@dataclass
class Budget:
    """Seconds that measuring may take; the clock starts at once."""

    seconds: float
    started: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.started)


RUN, SHARED, SCALED = "run", "shared", "scaled"
"""How a row's seconds were measured: it ran; single layers of other rows are summed for it; some of
those are scaled from layers with another number of tokens."""


@dataclass(frozen=True)
class Pass:
    """Seconds of one row in one pass over all rows.

    Args:
        prefill: of the prompt.
        first_token: until then, preprocessing included.
        decode_per_token: of a token after the first.
    """

    prefill: float
    first_token: float
    decode_per_token: float

    def total(self, answer_tokens: int) -> float:
        """Without loading and reading media."""
        return self.first_token + max(answer_tokens - 1, 0) * self.decode_per_token


@dataclass(frozen=True)
class RowTimes:
    """Seconds of one row, medians.

    Args:
        preprocess, vision, select, prefill: as in a report.
        around: of the time to the first token, what is none of those.
        decode_per_token: of a token after the first.
        passes: every pass; the same number for all rows.
        visual: tokens that each layer really saw; None where that is as planned.
        how: RUN, SHARED or SCALED.
    """

    preprocess: float
    vision: float
    select: float
    prefill: float
    around: float
    decode_per_token: float
    passes: tuple[Pass, ...] = ()
    visual: tuple[int, ...] | None = None
    how: str = RUN

    @property
    def first_token(self) -> float:
        return self.preprocess + self.vision + self.prefill + self.around

    def total(self, answer_tokens: int) -> float:
        """Without loading and reading media."""
        return self.first_token + max(answer_tokens - 1, 0) * self.decode_per_token

    def speedups(self, plain: RowTimes, seconds: Callable[[Pass], float]) -> SpeedUps:
        """Beside an unpruned row, pass by pass.

        Args:
            seconds: of a pass, what is compared.
        """
        pairs = zip(plain.passes, self.passes, strict=True)
        return SpeedUps(tuple(seconds(one) / max(seconds(other), 1e-9) for one, other in pairs))


@dataclass(frozen=True)
class SpeedUps:
    """How many times as fast a row was in every pass."""

    passes: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.passes)

    @property
    def spread(self) -> list[float]:
        """The least and the greatest."""
        return [min(self.passes), max(self.passes)]


@dataclass(frozen=True)
class Measured:
    """All rows of a profile.

    Args:
        how: "whole": the whole model ran; "layers": single layers were timed and summed.
        rows: by the rows' keys.
        passes: how often all was timed.
        seconds: that measuring took.
        notes: what the reader should know before believing a figure.
        errors: why rows could not be run, by their keys.
        scaled: where a smaller input was measured, its size; empty where the real one was.
    """

    how: str
    rows: Mapping[tuple[object, ...], RowTimes]
    passes: int
    seconds: float
    notes: Sequence[str] = ()
    scaled: str = ""
    errors: Mapping[tuple[object, ...], str] = field(default_factory=dict)
