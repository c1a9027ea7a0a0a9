"""Seconds of single layers at the token counts that were timed, and at those that were not."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

Key = tuple[str, int]
"""What kind of layer, and how many tokens it is given, or how many keys its cache has."""


@dataclass
class Samples:
    """Seconds of layers, pass by pass.

    Args:
        work: tokens -> what a layer has to do for them, in any unit; between and beyond the counts
            that were timed, a layer's speed is that of its neighbours.
    """

    work: Callable[[int], float]
    passes: list[dict[Key, list[float]]] = field(default_factory=list)
    scaled: set[Key] = field(default_factory=set)
    """What was asked for and not timed."""

    def start_pass(self) -> None:
        self.passes.append({})

    def add(self, kind: str, tokens: int, seconds: float) -> None:
        self.passes[-1].setdefault((kind, tokens), []).append(seconds)

    def timed(self, number: int | None = None) -> dict[Key, float]:
        """Medians of all passes, or of one."""
        passes = self.passes if number is None else self.passes[number : number + 1]
        found: dict[Key, list[float]] = {}
        for one in passes:
            for key, seconds in one.items():
                found.setdefault(key, []).extend(seconds)
        return {key: median(seconds) for key, seconds in found.items()}

    def at(self, kind: str, tokens: int, number: int | None = None) -> float:
        """Seconds of a layer; scaled by its work from the counts around where it was not timed.

        Args:
            number: of the pass; None for all of them.
        """
        found = {} if number is None else self.timed(number)
        if (kind, tokens) in found:
            return found[kind, tokens]
        found = self.timed()
        if (kind, tokens) in found:
            return found[kind, tokens]
        self.scaled.add((kind, tokens))
        known = {count: seconds for (one, count), seconds in found.items() if one == kind}
        return self.work(tokens) * self.pace(known or other_kinds(found), tokens)

    def pace(self, known: Mapping[int, float], tokens: int) -> float:
        """Seconds a unit of work at a count: between two that were timed, between theirs."""
        counts = sorted(known)
        paces = [known[count] / self.work(count) for count in counts]
        right = bisect_left(counts, tokens)
        if right in (0, len(counts)):
            return paces[min(right, len(counts) - 1)]
        share = (tokens - counts[right - 1]) / (counts[right] - counts[right - 1])
        return paces[right - 1] * (1 - share) + paces[right] * share


def other_kinds(found: Mapping[Key, float]) -> dict[int, float]:
    """Of layers of any kind, where those asked for were never timed."""
    return {tokens: seconds for (_, tokens), seconds in found.items()}


def sum_layers(
    samples: Samples, kinds: Sequence[str], counts: Sequence[int], number: int | None = None
) -> float:
    """Seconds of all layers of a model, at the tokens that each sees."""
    worth: dict[Key, float] = {}
    for key in zip(kinds, counts, strict=True):
        if key not in worth:
            worth[key] = samples.at(*key, number)
    return sum(worth[key] for key in zip(kinds, counts, strict=True))
