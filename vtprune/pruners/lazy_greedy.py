"""Greedy selection that works out only what a choice may depend on.

What a token would add never grows while others are chosen, so what it would have added before
bounds what it adds now. Of the tokens with the highest bounds the gains are worked out anew, a
block at a time, and the best are chosen for as long as none of the rest may add more. Tokens that
are like one chosen early are never looked at again. The choices are those of the plain way, but for
ties within rounding. Lazy evaluation of greedy choices is Minoux's (Accelerated greedy algorithms
for maximizing submodular set functions, 1978).

The host reads every choice: for devices that it does not have to wait for.
"""

from __future__ import annotations

from typing import Protocol

import torch

ACTIVE = 1024  # tokens whose gains are worked out at once


class Gains(Protocol):
    """What each token would add to those that are chosen."""

    def renew(self, tokens: torch.Tensor) -> torch.Tensor:
        """(A,) float32 gains of the tokens, (A,) int64, beside all that are chosen."""
        ...

    def compare(self, places: torch.Tensor) -> None:
        """Begin to choose from some of the tokens renewed last, at (C,) int64 places of them."""
        ...

    def choose(self, place: int) -> torch.Tensor:
        """(C,) gains of the tokens that are compared, once the one at `place` is chosen too."""
        ...


def choose_lazily(
    bound: torch.Tensor, count: int, gains: Gains, at_once: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens in the order of choice, (count,) int64, and what each added, (count,).

    Of equal gains the first token's wins.

    Args:
        bound: (n,) float32, no less than the gain of each token; it is changed.
        count: how many to choose, at most n.
        at_once: tokens whose gains are worked out at once, and then with each choice; None: ACTIVE.
    """
    at_once = ACTIVE if at_once is None else at_once
    order: list[int] = []
    added: list[float] = []
    while len(order) < count:
        ranked = bound.argsort(descending=True, stable=True)
        # The highest of those that are left; those that are chosen stand last.
        active = ranked[: min(at_once, len(bound) - len(order))].sort().values
        rest, rival = -torch.inf, len(bound)
        if len(active) == at_once < len(bound):
            rival = int(ranked[at_once])
            rest = float(bound[rival])
        bound[active] = gains.renew(active).nan_to_num_(nan=torch.finfo(bound.dtype).min)
        places = (bound[active] >= rest).nonzero().squeeze(1)
        if not len(places):
            continue
        gains.compare(places)
        tokens = active[places]
        current = bound[tokens]
        taken = torch.zeros_like(tokens, dtype=torch.bool)
        while len(order) < count:
            place, token, gain, is_taken = best_of(current, tokens, taken)
            if is_taken or gain < rest or (gain == rest and token > rival):
                break
            order.append(token)
            added.append(gain)
            taken[place] = True
            current = gains.choose(place).masked_fill(taken, -torch.inf)
        bound[tokens] = current
    return torch.tensor(order), torch.tensor(added)


def best_of(
    gains: torch.Tensor, tokens: torch.Tensor, taken: torch.Tensor
) -> tuple[int, int, float, bool]:
    """Return the place of the largest gain, and the token, the gain and whether it is taken there.

    Args:
        gains: (C,) float32.
        tokens: (C,) int64.
        taken: (C,) bool.
    """
    best = gains.argmax()
    if best.device.type == "cpu":
        place = int(best)
        return place, int(tokens[place]), float(gains[place]), bool(taken[place])
    # One copy for the four; a number of a token is less than 2 ** 24, and so the same in float32.
    there = [of.index_select(0, best[None]).float() for of in (tokens, gains, taken)]
    number, token, gain, is_taken = torch.cat([best[None].float(), *there]).tolist()
    return int(number), int(token), gain, bool(is_taken)
