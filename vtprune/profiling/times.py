"""What was measured of each row, however it was measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class RowTimes:
    """Seconds of one row, medians.

    Args:
        preprocess, vision, select, prefill: as in a report.
        around: of the time to the first token, what is none of those.
        decode_per_token: of a token after the first.
        passes: prefill seconds of every pass.
        visual: tokens that each layer really saw; None where that is as planned.
    """

    preprocess: float
    vision: float
    select: float
    prefill: float
    around: float
    decode_per_token: float
    passes: tuple[float, ...] = ()
    visual: tuple[int, ...] | None = None

    @property
    def first_token(self) -> float:
        return self.preprocess + self.vision + self.prefill + self.around

    def total(self, answer_tokens: int) -> float:
        """Without loading and reading media."""
        return self.first_token + max(answer_tokens - 1, 0) * self.decode_per_token

    def speedups(self, plain: RowTimes) -> tuple[float, ...]:
        """Of the prefill, pass by pass, beside an unpruned row of the same passes."""
        pairs = zip(plain.passes, self.passes, strict=False)
        return tuple(before / max(after, 1e-9) for before, after in pairs)

    def speedup(self, plain: RowTimes) -> float:
        return median(self.speedups(plain))


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
