"""Methods that read the vision tower: VisPruner by its definition."""

from __future__ import annotations

import pytest
import torch

from vtprune.errors import ModelError
from vtprune.pruners import create, vispruner
from vtprune.pruners.base import Budget, VisualTokens
from vtprune.pruners.contract import flat, tokens_of
from vtprune.pruners.similarity import cosines, unit_rows


def chosen(
    method: str, attention: list[float], states: list[list[float]], count: int, **options: object
) -> list[int]:
    """Return what a method keeps of tokens that are all in one group."""
    given = {"tower_attention": torch.tensor(attention), "hidden": torch.tensor(states)[:, None]}
    budget = Budget.share(count, torch.zeros(len(states), dtype=torch.long))
    pruner = create(method, options)
    return pruner.select(VisualTokens(flat(len(states)), given), budget).index.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("state", ["tower_attention", "hidden"])
@pytest.mark.parametrize("method", ["vispruner"])
def test_what_is_not_finite_is_refused(method: str, state: str, bad: float) -> None:
    tokens = tokens_of(flat(30))
    tokens.states[state][..., 3] = bad
    budget = Budget.share(4, torch.zeros(30, dtype=torch.long))
    with pytest.raises(ModelError, match=f"states hold NaN or infinity, so {method} can't rank"):
        create(method, {}).select(tokens, budget)


# -- vispruner ------------------------------------------------------------------------------------

EAST, NORTH, WEST, NORTH_EAST = [3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 1.0]


def test_half_is_kept_by_attention_and_copies_of_the_rest_go() -> None:
    # By attention: 5 4 | 0 1 2 3. Of the rest, 0 and 2 are compared with 1 and 3: 0 lies half-way
    # to 1, cosine 0.71, and 2 is a copy of 3.
    attention = [0.4, 0.3, 0.2, 0.1, 0.5, 0.6]
    states = [NORTH_EAST, NORTH, WEST, WEST, EAST, EAST]
    assert chosen("vispruner", attention, states, 5) == [0, 1, 3, 4, 5]
    assert chosen("vispruner", attention, states, 4) == [1, 3, 4, 5]
    assert chosen("vispruner", attention, states, 4, important=1) == [0, 1, 4, 5]


@pytest.mark.parametrize(("count", "important", "kept"), [(1, 1, 1), (3, 0.5, 1), (2, 0, 0)])
def test_the_important_part_is_rounded_down(count: int, important: float, kept: int) -> None:
    attention = torch.arange(10.0).tolist()
    best = set(range(10 - kept, 10))
    states = [[1.0, 0.0]] * 10
    assert best <= set(chosen("vispruner", attention, states, count, important=important))


def plainly(rows: torch.Tensor, count: int) -> list[int]:
    """Return what rounds of eight leave of rows, the most attended first."""
    similar, left = cosines(rows, rows), list(range(len(rows)))
    while len(left) > count:
        even, odd = left[::2], left[1::2]
        best = similar[even][:, odd].amax(dim=1).tolist()
        order = sorted(range(len(even)), key=lambda n: (-best[n], -n))
        gone = {even[n] for n in order[: min(8, len(left) - count)]}
        left = [row for row in left if row not in gone]
    return left


@pytest.mark.parametrize("num", [2, 3, 9, 40, 300])
def test_noted_neighbours_leave_what_comparing_all_leaves(num: int) -> None:
    generator = torch.Generator().manual_seed(num)
    rows = unit_rows(torch.randn(num, 24, generator=generator))
    for count in sorted({1, max(num // 3, 1), num - 1}):
        assert vispruner.thin_out(rows, count).tolist() == plainly(rows, count)
