"""A number of tokens shared over groups, such as frames or tiles, in whole numbers.

For example, `quotas(7, [4, 1, 4])` is [3, 1, 3]: the small group is full, the others share what
is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def weighted_quotas(
    count: int, sizes: Sequence[int], weights: Sequence[float], least: int = 1
) -> list[int]:
    """Share `count` over groups of `sizes` tokens in proportion to `weights`.

    What a group can't use goes to the others by the same weights; largest remainder, ties to the
    earlier. The shares add up to `count`.

    Args:
        weights: not negative, finite; all zero: equal shares.
        least: every group gets so many (0 or 1) where `count` allows; else evenly spaced groups.
    """
    assert 0 <= count <= sum(sizes)
    if least and count < len(sizes):
        return quotas(count, sizes)
    shares = [min(least, size) for size in sizes]
    open_groups = [i for i, size in enumerate(sizes) if shares[i] < size]
    while (unshared := count - sum(shares)) > 0:
        # The shares that would be exact, over groups that have room; full groups leave the round.
        total = sum(weights[i] for i in open_groups)
        exact = {
            i: unshared * (weights[i] / total if total > 0 else 1 / len(open_groups))
            for i in open_groups
        }
        full = [i for i in open_groups if exact[i] >= sizes[i] - shares[i]]
        if full:
            for i in full:
                shares[i] = sizes[i]
            open_groups = [i for i in open_groups if i not in full]
            continue
        for i in open_groups:
            shares[i] += math.floor(exact[i])
        remainder = count - sum(shares)
        by_remainder = sorted(open_groups, key=lambda i: (-(exact[i] - math.floor(exact[i])), i))
        for i in by_remainder[:remainder]:
            shares[i] += 1
    return shares


def quotas(count: int, sizes: Sequence[int]) -> list[int]:
    """Share `count` equally over groups of `sizes` tokens, remainders to the earlier groups.

    What a group can't use is handed on; every group gets at least one where `count` allows, else
    evenly spaced groups get one each. The shares add up to `count`.
    """
    assert 0 <= count <= sum(sizes)
    if 0 < count < len(sizes):
        chosen = {(2 * i + 1) * len(sizes) // (2 * count) for i in range(count)}
        return [int(i in chosen) for i in range(len(sizes))]
    shares = [0] * len(sizes)
    while count:
        open_groups = [i for i, size in enumerate(sizes) if shares[i] < size]
        equal = count // len(open_groups)
        if not equal:  # all that are open have the same so far
            open_groups, equal = open_groups[:count], 1
        for i in open_groups:
            added = min(equal, sizes[i] - shares[i])
            shares[i] += added
            count -= added
    return shares
