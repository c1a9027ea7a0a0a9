"""Encode smaller pictures, or fewer frames.

Idea: before anything is encoded, a picture is resized and a video gives fewer frames, by the
family's own sampling, so that their visual tokens are within the budget.

Why it works: it is the obvious alternative to a pruning method, costs nothing, and saves time
in the vision tower as well; a method should beat it.

Paper: none; a baseline.
Official code: none.
Differences: none. The prompt is that of the smaller media, positions included. The largest setting
within the budget is taken; as settings come in steps, it may keep fewer tokens than asked, and the
report shows the true keep. A family that makes the same number of tokens of every picture gets
fewer tiles instead, where it has tiles, else it is refused.

Options: none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Downsample:
    def choose(self, count: Callable[[int], int], low: int, high: int, most: int) -> int | None:
        """Return the largest setting from `low` to `high` with at most `most` tokens, or None.

        Two guesses as if tokens grew evenly, then the middle, and again: counting takes time.

        Args:
            count: setting -> visual tokens; more of them at a higher setting.
        """
        few, many = count(low), count(high)
        if few > most:
            return None
        if many <= most:
            return high
        for step in itertools.count():
            if high - low <= 1:  # few <= most < many
                break
            middle = (low + high) // 2
            if step % 3 < 2:
                middle = low + (most - few) * (high - low) // (many - few)
            middle = min(max(middle, low + 1), high - 1)
            tokens = count(middle)
            if tokens <= most:
                low, few = middle, tokens
            else:
                high, many = middle, tokens
        return low
