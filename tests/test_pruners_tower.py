"""Methods that read the vision tower, by their definitions."""

from __future__ import annotations

import pytest
import torch
from test_pruners_attention import scheduled

from vtprune.errors import ModelError
from vtprune.pruners import create, hiprune, lazy_greedy, scope, vispruner, vscan
from vtprune.pruners.base import Budget, VisualTokens, merge
from vtprune.pruners.contract import flat, tiles, tokens_of, video
from vtprune.pruners.similarity import cosines, most_alike, unit_rows


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
@pytest.mark.parametrize("method", ["vispruner", "scope"])
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


def test_the_important_part_of_a_decimal_share_is_exact() -> None:
    # 0.29 x 100 is a little below 29 in binary; were it 28, the next would go as a copy.
    states = torch.eye(101)
    states[28] = states[29]
    attention = torch.arange(101.0, 0, -1).tolist()
    kept = chosen("vispruner", attention, states.tolist(), 100, important=0.29)
    assert kept == [n for n in range(101) if n != 99]  # the last one of the first half


def test_what_a_round_leaves_of_the_first_half_is_ranked_by_likeness(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # At 0, 10, 60 and 120 degrees, 0 the most attended; one goes in a round. Of 0 and 2, 0 is more
    # alike to one of 1 and 3. Then 2 comes before 1 and 3: of 2 and 3 it is more alike to 1. By
    # attention 1 would be first, and go for being more alike to 2 than 3 is.
    monkeypatch.setattr(vispruner, "ROUND", 1)
    states = [[1.0, 0.0], [0.985, 0.174], [0.5, 0.866], [-0.5, 0.866]]
    attention = [0.4, 0.3, 0.2, 0.1]
    assert chosen("vispruner", attention, states, 3, important=0) == [1, 2, 3]
    assert chosen("vispruner", attention, states, 2, important=0) == [1, 3]


def test_of_equal_cosines_the_less_attended_token_goes() -> None:
    assert chosen("vispruner", [0.4, 0.3, 0.2, 0.1], [EAST] * 4, 3, important=0) == [0, 1, 3]


def plainly(rows: torch.Tensor, count: int) -> list[int]:
    """Return what rounds of eight leave of rows, the most attended first."""
    similar, left = cosines(rows, rows), list(range(len(rows)))
    while len(left) > count:
        even, odd = left[::2], left[1::2]
        best = similar[even][:, odd].amax(dim=1).tolist()
        order = sorted(range(len(even)), key=lambda n: (-best[n], -n))
        left = [even[n] for n in order[min(8, len(left) - count) :]] + odd
    return left


@pytest.mark.parametrize("num", [2, 3, 9, 40, 300])
def test_noted_neighbours_leave_what_comparing_all_leaves(num: int) -> None:
    generator = torch.Generator().manual_seed(num)
    rows = unit_rows(torch.randn(num, 24, generator=generator))
    for count in sorted({1, max(num // 3, 1), num - 1}):
        assert vispruner.thin_out(rows, count).tolist() == plainly(rows, count)


# -- scope ----------------------------------------------------------------------------------------


def test_what_is_covered_counts_no_more() -> None:
    # 0 and 1 cover both of them and 0.71 of 3: 2.71, times 0.4 and 0.9; 2 covers itself and 0.71
    # of 3: 1.71 x 0.5; 3 covers 3 x 0.71 + 1, times 0.2. After 1, 0 adds nothing, 2 adds itself,
    # 1 x 0.5, and 3 adds 0.71 of 2 and 0.29 of itself: 1 x 0.2.
    attention, states = [0.4, 0.9, 0.5, 0.2], [EAST, EAST, NORTH, NORTH_EAST]
    assert chosen("scope", attention, states, 1) == [1]
    assert chosen("scope", attention, states, 2) == [1, 2]
    assert chosen("scope", attention, states, 3) == [1, 2, 3]


def greedily(rows: torch.Tensor, attention: torch.Tensor, count: int) -> list[int]:
    """Return the choices of the definition, each made of the gains of all tokens."""
    similar = cosines(rows, rows).double()
    covered, order = torch.zeros(len(rows)).double(), list[int]()
    for _ in range(count):
        gains = attention * (similar - covered[:, None]).clamp_min(0).sum(dim=0)
        gains[order] = -1
        order.append(int(gains.argmax()))
        covered = torch.maximum(covered, similar[:, order[-1]])
    return order


@pytest.mark.parametrize("held", [0, 2**28])
@pytest.mark.parametrize(("num", "active"), [(2, 8), (9, 4), (40, 7), (120, 1024)])
def test_few_are_looked_at_again_with_the_choices_of_all(
    num: int, active: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_greedy, "ACTIVE", active)
    monkeypatch.setattr(scope, "ANYWAY", held)
    generator = torch.Generator().manual_seed(num)
    rows = unit_rows(torch.randn(num, 24, generator=generator) + 0.5)
    attention = torch.rand(num, generator=generator)
    count = max(num // 2, 1)
    assert scope.cover_greedily(rows, attention, count)[0].tolist() == greedily(
        rows, attention, count
    )


def test_segments_choose_by_themselves() -> None:
    tokens = tokens_of(flat(200))
    budget = Budget.share(40, torch.zeros(200, dtype=torch.long))
    whole, cut = (
        create("scope", {"segment": size}).select(tokens, budget) for size in ("none", 64)
    )
    assert len(cut.index) == 40
    assert cut.index.tolist() != whole.index.tolist()


# -- hiprune --------------------------------------------------------------------------------------


def test_anchors_and_their_neighbours_stay_and_registers_fill_the_budget() -> None:
    # Two frames of 3 x 4 and a newline. Of 10 tokens all may be of objects: 10 / 5 anchors, 5 in
    # the first frame and 23 in the corner of the second, with 1 4 6 9 and 19 22 beside them. Two
    # registers: 0 and 12, the most attended to of the rest at the end; 5 was before.
    layout = video(frames=2, rows=3, cols=4)
    middle, last = torch.zeros(25), torch.zeros(25)
    middle[[5, 23]], last[[5, 12, 0, 2]] = 1.0, torch.tensor([9.0, 8.0, 7.0, 6.0])
    states = {"tower_middle_attention": middle, "tower_mean_attention": last}
    tokens = VisualTokens(layout, states)
    budget = Budget.share(10, layout.groups("all"))
    kept = create("hiprune", {"objects": 1}).select(tokens, budget).index.tolist()
    assert kept == [0, 1, 4, 5, 6, 9, 12, 19, 22, 23]
    kept = create("hiprune", {"objects": 0}).select(tokens, Budget.share(4, layout.groups("all")))
    assert kept.index.tolist() == [0, 2, 5, 12]


def test_neighbours_are_of_the_same_tile_and_patches() -> None:
    layout = tiles(((2, 2), (2, 2)))
    for last in (3, 7):
        assert hiprune.with_neighbours(hiprune.neighbours(layout), torch.tensor([last])).nonzero()[
            :, 0
        ].tolist() == [last - 2, last - 1, last]
    layout = video(frames=1, rows=2, cols=2)  # the newline is noted at the last patch's place
    assert hiprune.with_neighbours(hiprune.neighbours(layout), torch.tensor([4])).nonzero()[
        :, 0
    ].tolist() == [4]
    assert hiprune.with_neighbours(hiprune.neighbours(layout), torch.tensor([3])).nonzero()[
        :, 0
    ].tolist() == [1, 2, 3]


def test_a_tenth_of_the_budget_is_of_objects() -> None:
    tokens = tokens_of(video(frames=1, rows=24, cols=24, newline=False))
    budget = Budget.share(192, torch.zeros(576, dtype=torch.long))  # 192 x 0.1 / 5: 4 anchors
    kept = set(create("hiprune", {}).select(tokens, budget).index.tolist())
    middle, last = (tokens.states[f"tower_{name}_attention"] for name in ("middle", "mean"))
    anchors = middle.argsort(descending=True)[:4]
    objects = set(
        hiprune.with_neighbours(hiprune.neighbours(tokens.layout), anchors).nonzero()[:, 0].tolist()
    )
    assert objects <= kept
    registers = [n for n in last.argsort(descending=True).tolist() if n not in objects]
    assert kept == objects | set(registers[: 192 - len(objects)])


def test_the_number_of_anchors_is_rounded_to_the_nearest() -> None:
    # Of 8 in a row 3 are kept: 0.9 x 3 / 5 = 0.54 anchors, that is 4, with 3 and 5 beside it.
    middle, last = torch.zeros(8), torch.arange(8.0)
    middle[4] = 1.0
    states = {"tower_middle_attention": middle, "tower_mean_attention": last}
    budget = Budget.share(3, torch.zeros(8, dtype=torch.long))
    tokens = VisualTokens(flat(8), states)
    assert create("hiprune", {"objects": 0.9}).select(tokens, budget).index.tolist() == [3, 4, 5]
    assert create("hiprune", {"objects": 0.8}).select(tokens, budget).index.tolist() == [5, 6, 7]


def test_an_anchor_goes_before_its_neighbours() -> None:
    # In a grid of 3 x 3 the anchor of 3 tokens has four beside it, all more attended to at the end.
    middle, last = torch.zeros(9), torch.arange(9.0)
    middle[4], last[4] = 1.0, -1.0
    states = {"tower_middle_attention": middle, "tower_mean_attention": last}
    tokens = VisualTokens(video(frames=1, rows=3, cols=3, newline=False), states)
    budget = Budget.share(3, torch.zeros(9, dtype=torch.long))
    assert create("hiprune", {"objects": 1}).select(tokens, budget).index.tolist() == [4, 5, 7]


# -- vscan ----------------------------------------------------------------------------------------


def test_windows_and_the_last_layer_choose_and_the_dropped_are_merged() -> None:
    # One row of 8 tokens: windows of 2. Of 4 places 2 are shared over 4 windows: the
    # second and the fourth keep one each, what is attended to most there early: 3 and 6.
    # Of the rest the last layer attends most to 3 (kept already), 0 and 5.
    early = [0.9, 0.8, 0.1, 0.2, 0.9, 0.9, 0.7, 0.3]
    last = [0.8, 0.0, 0.1, 0.9, 0.2, 0.5, 0.3, 0.4]
    states = [EAST, [3.0, 1.0], NORTH, [0.0, 4.0], WEST, WEST, [-1.0, -1.0], [-3.0, -2.0]]
    given = {
        "tower_early_attention": torch.tensor(early),
        "tower_attention": torch.tensor(last),
        "hidden": torch.tensor(states)[:, None],
    }
    budget = Budget.share(4, torch.zeros(8, dtype=torch.long))
    tokens = VisualTokens(flat(8), given)
    selection = create("vscan", {}).select(tokens, budget)
    assert selection.index.tolist() == [0, 3, 5, 6]
    # 1 is most alike to 0, 2 to 3, 4 to 5, and 7 to 6 (cosine 0.98, with 5 0.83).
    assert selection.assign is not None
    assert selection.assign.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    merged = merge(torch.tensor(states), selection)
    assert merged.tolist() == [[3.0, 0.5], [0.0, 3.0], [-1.0, 0.0], [-2.0, -1.5]]
    by_last = create("vscan", {"local": 0}).select(tokens, budget)
    assert by_last.index.tolist() == [0, 3, 5, 7]


def test_a_local_token_stays_however_little_the_last_layer_attends_to_it() -> None:
    # The second and the fourth window keep one each: 3, the least of all at the end, and 6.
    early = torch.tensor([0.9, 0.8, 0.1, 0.2, 0.9, 0.9, 0.7, 0.3])
    last = torch.tensor([1.0, 0.5, 0.5, 0.0, 0.5, 0.5, 0.3, 0.4])
    given = {
        "tower_early_attention": early,
        "tower_attention": last,
        "hidden": torch.eye(8)[:, None],
    }
    budget = Budget.share(2, torch.zeros(8, dtype=torch.long))
    selection = create("vscan", {"local": 1}).select(VisualTokens(flat(8), given), budget)
    assert selection.index.tolist() == [3, 6]


def test_every_window_of_every_frame_has_its_share() -> None:
    layout = video(frames=2, rows=8, cols=8)
    budget = vscan.share_over_windows(layout, Budget.share(64, layout.groups("all")), 0.5)
    assert len(budget.quota) == 2 * 16
    assert budget.quota.tolist() == [1] * 32  # 32 of 64 over 32 windows of 2 x 2 tokens
    assert torch.bincount(budget.group).tolist() == [4] * 31 + [5]  # the newline is of the last
    odd = vscan.share_over_windows(layout, Budget.share(5, layout.groups("all")), 0.5)
    assert int(odd.quota.sum()) == 2
    by_frame = vscan.share_over_windows(layout, Budget.share(40, layout.groups("frame")), 0.5)
    assert by_frame.quota.view(2, 16).sum(dim=1).tolist() == [10, 10]
    small = vscan.windows(tiles())
    assert int(small[1].max()) == 3
    base, wide = (small[0] == 0), (small[0] == 1)
    assert torch.unique(torch.stack(small[1:])[:, base], dim=1).shape[1] == 16
    assert torch.unique(torch.stack(small[1:])[:, wide], dim=1).shape[1] == 2 * 4


def test_what_is_dropped_is_merged_inside_its_group_or_not_at_all() -> None:
    rows = unit_rows(torch.tensor([EAST, EAST, NORTH, NORTH, WEST]))
    group = torch.tensor([0, 1, 0, 1, 2])
    target = most_alike(rows, torch.tensor([1, 2]), group)
    assert target.tolist() == [2, 1, 2, 1, -1]


def test_a_kept_token_is_merged_into_itself_beside_a_copy_of_it() -> None:
    rows, group = unit_rows(torch.tensor([EAST, EAST, NORTH])), torch.zeros(3, dtype=torch.long)
    assert most_alike(rows, torch.tensor([0, 1]), group).tolist() == [0, 1, 0]


def test_vscan_cuts_at_the_input_and_a_third_stays_from_half_of_the_depth_on() -> None:
    # 16 x 96 + 16 x 32 = 32 x 64; above 2/3 the first cut keeps all: (1 + t) / 2 = 0.8.
    assert scheduled("vscan", 64 / 576, 32, 576) == [(0, 96), (16, 32)]
    assert scheduled("vscan", 0.8, 28, 1000) == [(0, 1000), (14, 600)]
