"""Similarity of tokens: cosines, greedy selection, clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vtprune.device import send, total_memory
from vtprune.pruners.base import Budget

HELD = 2**30  # the most similarities held at once: 4 GiB
ANYWAY = 2**28  # so many are held on every device
BYTES = 5  # of a similarity, while it is made: itself, and whether it is of one direction
WHOLE = "none"  # of the option `segment`: all tokens are chosen from together
SHARE = 5  # more than that may take up one part in so many of a device's memory
FEW = 2**22  # so many are held on a CPU
BLOCK = 256  # tokens whose similarities to all are worked out at once, where they are not held
LIKELY = 32  # rows that may be farthest, compared with all at once
SMALL = 4096  # rows of which a GPU works out all in every step of a choice
CLOSE = 4  # blocks on either side, its own included, that a row is compared with before all others
SAME = 1 - 1e-6  # a cosine above it is that of one direction: float32 tells no more


def unit_rows(states: torch.Tensor) -> torch.Tensor:
    """(N, d) float32 states of unit length; a state that is zero stays zero.

    Args:
        states: (N, d), or (N, H, D) with d = H x D, of any floating dtype.
    """
    rows = states.flatten(1).float()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def cosines(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(..., n, m) cosines of unit rows (..., n, d) and (..., m, d); 1 for one direction.

    What rounding leaves of 1 would rank tokens that are equal.
    """
    products = left @ right.transpose(-1, -2)
    return products.masked_fill_(products > SAME, 1.0)


def may_hold(pairs: int, device: torch.device) -> bool:
    """Return whether so many similarities may be held at once.

    By what the device has, not by what is free: held or not, products round differently, and a
    choice must not depend on what else runs. A CPU holds few: see `is_lazy`.
    """
    if pairs <= at_once(device):
        return True
    if device.type == "cpu":
        return False
    return pairs <= HELD and pairs * BYTES * SHARE <= (total_memory(device) or 0)


def at_once(device: torch.device) -> int:
    """Return how many similarities are held on every device of a kind."""
    return FEW if device.type == "cpu" else ANYWAY


def is_small(num: int, device: torch.device) -> bool:
    """Return whether to work out all of a choice from `num` rows on a device, and read nothing.

    For a CPU, which reads at no cost, or more rows, less work with a reading in each step is less
    time.
    """
    return device.type != "cpu" and num <= SMALL


def is_lazy(rows: torch.Tensor) -> bool:
    """Return whether to choose from (G, n, d) rows by `choose_lazily`: on a CPU, which reads a
    choice at no cost, and so can do without the products that no choice needs."""
    groups, num, _ = rows.shape
    return groups == 1 and rows.device.type == "cpu" and not may_hold(num**2, rows.device)


def most_alike(rows: torch.Tensor, index: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return (N,) int64 the kept token of its group that each is most alike to; -1 for none.

    Args:
        rows: (N, d) of unit length, or zero.
        index: (K,) int64, ascending, the kept ones, each most alike to itself.
        group: (N,) int64.
    """
    parts = []
    for first in range(0, len(rows), BLOCK):
        part = slice(first, first + BLOCK)
        same = group[part, None] == group[index]
        similar = cosines(rows[part], rows[index]).masked_fill_(~same, -torch.inf)
        parts.append(torch.where(same.any(dim=1), index[similar.argmax(dim=1)], -1))
    target = torch.cat(parts)
    target[index] = index
    return target


class Similarity:
    """Cosines inside G groups of n tokens each: all are held, where `may_hold`, else those of one
    token are worked out at a time, limited by memory.

    Args:
        rows: (G, n, d) from `unit_rows`.
        hold: whether many tokens will be chosen, so that it pays to work out more than one at once.
    """

    def __init__(self, rows: torch.Tensor, hold: bool) -> None:
        groups, num, _ = rows.shape
        self.rows = rows
        self.lines = torch.arange(groups, device=rows.device)
        held = hold and may_hold(groups * num**2, rows.device)
        self.held = cosines(rows, rows) if held else None

    def to(self, token: torch.Tensor) -> torch.Tensor:
        """(G, n) cosines with one token of each group, (G,) int64."""
        if self.held is not None:
            return self.held[self.lines, token]
        return cosines(self.rows[self.lines, token][:, None], self.rows)[:, 0]

    def nearest(self) -> torch.Tensor:
        """(G, n) cosine of every token with its nearest neighbour; -inf where it is alone."""
        groups, num, _ = self.rows.shape
        best = self.rows.new_full((groups, num), -torch.inf)
        for first in range(0, num, BLOCK):
            part = slice(first, first + BLOCK)
            block = (
                cosines(self.rows[:, part], self.rows)
                if self.held is None
                else self.held[:, part].clone()
            )
            block.diagonal(first, dim1=1, dim2=2).fill_(-torch.inf)
            # Both ways, so that two nearest neighbours tie whatever the rounding of either side.
            best[:, part] = torch.maximum(best[:, part], block.amax(dim=2))
            best = torch.maximum(best, block.amax(dim=1))
        return best


def most_alone(rows: torch.Tensor, excluded: torch.Tensor) -> torch.Tensor:
    """() int64, the row whose nearest neighbour is farthest; the first of it and those as far.

    A row is left out as soon as one of its neighbours is nearer than the nearest one of another
    row; those that may be farthest are compared with all first. Rows are compared with those near
    them in order before: in a video most neighbours are in the same frame or one close to it, so
    that few rows are left for the others, and time grows with their number, not its square.

    Args:
        rows: (n, d) from `unit_rows`.
        excluded: (n,) bool, of rows to choose only where there is no other.
    """
    (num,) = excluded.shape
    nearest = rows.new_full((num,), -torch.inf).masked_fill_(excluded, 1.0)
    parts = [slice(first, first + BLOCK) for first in range(0, num, BLOCK)]
    for apart in range(CLOSE):
        for one, other in zip(parts, parts[apart:], strict=False):
            block = cosines(rows[one], rows[other])
            if not apart:
                block.fill_diagonal_(-torch.inf)
            nearest[one] = torch.maximum(nearest[one], block.amax(dim=1))
            nearest[other] = torch.maximum(nearest[other], block.amax(dim=0))
    left = torch.arange(num, device=rows.device)
    farthest = torch.inf
    for part in (slice(0), *parts):  # at first those alone that may be farthest, with all
        if part.stop:
            block = cosines(rows[left], rows[part])
            block[left[:, None] == torch.arange(num)[part]] = -torch.inf
            nearest[left] = torch.maximum(nearest[left], block.amax(dim=1))
        best = left[nearest[left].topk(min(LIKELY, len(left)), largest=False).indices]
        lines = cosines(rows[best], rows)
        lines.scatter_(1, best[:, None], -torch.inf)
        nearest[best] = torch.maximum(nearest[best], lines.amax(dim=1))
        farthest = min(farthest, float(nearest[best].min()))
        left = left[~(nearest[left] > farthest + 1 - SAME)]  # what isn't finite is left
    return left[~(nearest[left] > nearest[left].min() + 1 - SAME)][0]


def by_size(
    group: torch.Tensor, chosen: torch.Tensor, most_pairs: int
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Yield groups of one size at once, but no more than can have all their cosines held.

    Args:
        group: (N,) int64 group of each token.
        chosen: (G,) bool, the groups to give.
        most_pairs: so many of one token and another; a group alone may have more.

    Yields:
        (g, n) int64 tokens of g groups, and the groups' numbers.
    """
    sizes = torch.bincount(group).tolist()
    tokens = group.argsort(stable=True).split(sizes)
    alike: dict[int, list[int]] = {}
    for number in chosen.nonzero().squeeze(1).tolist():
        alike.setdefault(sizes[number], []).append(number)
    for size, numbers in alike.items():
        most = max(1, most_pairs // size**2)
        for first in range(0, len(numbers), most):
            some = numbers[first : first + most]
            yield torch.stack([tokens[number] for number in some]), some


Choose = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""(rows (G, n, d) of G groups, the tokens' numbers (G, n), k) -> (G, k) int64 places in the group
in the order of choice; a smaller quota takes the first of them. And (G, k) what each choice added,
falling."""


def choose_in_groups(
    rows: torch.Tensor, budget: Budget, choose: Choose, segment: str | float = WHOLE
) -> torch.Tensor:
    """Return the index, (K,) ascending, of what a greedy selection keeps in each group.

    Reads nothing back from the device.

    Args:
        rows: (N, d) from `unit_rows`.
        segment: the most tokens of a group that are chosen from together, or "none" for all.
    """
    size = len(rows) if segment == WHOLE else int(segment)
    kept_whole = budget.quota == torch.bincount(budget.group)
    kept = [send(kept_whole[budget.group].nonzero().squeeze(1), rows.device)]
    for tokens, numbers in by_size(
        budget.group, (budget.quota > 0) & ~kept_whole, at_once(rows.device)
    ):
        quota = budget.quota[numbers]
        most = int(quota.max())
        members = send(tokens, rows.device)
        if members.shape[1] > size:
            order = choose_in_segments(rows, members, most, choose, size)
        else:
            order = members.gather(1, choose(rows[members], members, most)[0])
        first = (torch.arange(most) < quota[:, None]).flatten().nonzero().squeeze(1)
        kept.append(order.flatten()[send(first, rows.device)])
    return torch.cat(kept).sort().values


def choose_in_segments(
    rows: torch.Tensor, members: torch.Tensor, count: int, choose: Choose, size: int
) -> torch.Tensor:
    """(G, count) int64 numbers of the tokens of each group that are kept, the best first.

    A group is cut into segments of one length, in order; each chooses by itself, up to twice its
    share of the count; then the choices that added most are kept, of whichever segment.

    Args:
        members: (G, n) int64 numbers of the groups' tokens, n above `size`.
        size: the most tokens of a segment.
    """
    groups, num = members.shape
    segments = -(-num // size)
    length = -(-num // segments)
    padded = torch.nn.functional.pad(members, (0, segments * length - num), value=-1)
    padded = padded.view(groups * segments, length)
    there = padded >= 0
    padded = padded.clamp_min(0)
    share = min(length, 2 * -(-count // segments))
    parts = [
        choose(rows[padded[some]] * there[some, :, None], padded[some], share)
        for some in torch.arange(len(padded)).split(max(1, at_once(rows.device) // length**2))
    ]
    order, added = (torch.cat(each) for each in zip(*parts, strict=True))
    added = added.masked_fill(~there.gather(1, order), -torch.inf)
    best = added.view(groups, -1).argsort(dim=1, descending=True, stable=True)[:, :count]
    return padded.gather(1, order).view(groups, -1).gather(1, best)


def density_peaks(
    rows: torch.Tensor, count: int, neighbours: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` cluster centres, ascending, and (n,) the nearest one of every row.

    The centres are dense and far from anything denser (DPC-KNN): density is exp(-d), d the mean
    squared distance to the nearest `neighbours`, the row itself included. Of the densest rows the
    first counts as denser than the rest; other rows whose densities are equal, but for rounding,
    are no denser than each other. Of equal scores the earlier wins.

    Args:
        rows: (n, d) float32.
    """
    squares = rows.square().sum(dim=1)
    distance = squares[:, None] + squares[None] - 2 * rows @ rows.T
    distance = distance.clamp_min(0).fill_diagonal_(0)  # (n, n), squared
    num_nearest = min(neighbours, len(rows))
    spread = distance.topk(num_nearest, largest=False).values.mean(dim=1)  # -ln density
    denser = spread[None] < spread[:, None] * SAME  # (n, n), [i, j]: j is denser than i
    number = torch.arange(len(rows), device=rows.device)
    densest = spread * SAME <= spread.amin()
    first = torch.where(densest, number, len(rows)).amin()
    denser |= densest[:, None] & (number == first) & (number != first)[:, None]
    # The farthest pair's distance for the row that nothing is denser than.
    to_denser = torch.where(denser, distance, distance.amax()).amin(dim=1)
    # ln of density x distance: a density itself may be too small for its dtype.
    score = 0.5 * to_denser.log() - spread
    chosen = score.argsort(descending=True, stable=True)[:count].sort().values
    nearest = distance[:, chosen].argmin(dim=1)
    nearest[chosen] = torch.arange(count, device=rows.device)
    return chosen, nearest
