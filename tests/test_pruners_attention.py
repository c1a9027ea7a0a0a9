"""Methods that read attention: FastV, PyramidDrop, SparseVLM and VisionZip by their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from vtprune.errors import ModelError, PresetError
from vtprune.pruners import METHODS, create, find_profile, sparsevlm_plus
from vtprune.pruners.base import Budget, Selection, VisualTokens, merge
from vtprune.pruners.contract import HEADS, TEXT, WIDTH, flat, tokens_of
from vtprune.pruners.similarity import density_peaks
from vtprune.pruners.sparsevlm import choose_raters, count_clusters, fractions, shrink
from vtprune.tokens.layout import Layout
from vtprune.tokens.schedule import Cut, Place
from vtprune.tokens.solver import solve


def whole(count: int, layout: Layout) -> Budget:
    return Budget.share(count, layout.groups("all"))


def scheduled(name: str, keep: float, num_layers: int, num_tokens: int) -> list[tuple[int, int]]:
    """(layer, tokens left) of every cut of a method's own schedule."""
    profile = find_profile(name)
    places = [
        Place("schedule", layer, profile=profile, part=part)
        for part, layer in enumerate(profile.layers(num_layers, METHODS[name].lowest))
    ]
    cuts: tuple[Cut, ...] = solve(places, keep, num_layers, num_tokens).cuts
    return [(cut.layer, cut.count) for cut in cuts]


# -- fastv and pyramiddrop ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop"])
def test_those_that_the_last_token_attends_to_most_are_kept(name: str) -> None:
    attention = torch.tensor([0.1, 0.3, 0.05, 0.3, 0.2, 0.05])
    tokens = VisualTokens(flat(6), {"attention": attention})
    pruner = create(name, {})
    assert pruner.needs == ("attention",)
    kept = [pruner.select(tokens, whole(k, tokens.layout)).index.tolist() for k in range(1, 6)]
    assert kept == [[1], [1, 3], [1, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]  # ties: the earlier


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop"])
def test_every_group_keeps_its_own_most_attended_to(name: str) -> None:
    attention = torch.tensor([0.5, 0.2, 0.1, 0.01, 0.02, 0.03])
    tokens = VisualTokens(flat(6), {"attention": attention})
    budget = Budget(torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([1, 2]))
    assert create(name, {}).select(tokens, budget).index.tolist() == [0, 4, 5]


def test_others_are_merged_into_the_most_similar_kept_token() -> None:
    # 1 and 4 stay. 0 and 2 are most similar to 1, 3 to 4; 5 is as similar to both: the earlier.
    attention = torch.tensor([0.1, 0.3, 0.1, 0.1, 0.3, 0.1])
    states = torch.tensor([[2.0, 1], [3, 0], [1, -1], [0, 5], [0, 1], [1, 1]])
    tokens = VisualTokens(flat(6), {"attention": attention, "hidden": states[:, None]})
    pruner = create("fastv", {"rest": "merge"})
    assert pruner.needs == ("attention", "hidden")
    chosen = pruner.select(tokens, whole(2, tokens.layout))
    assert chosen.index.tolist() == [1, 4]
    assert chosen.assign is not None
    assert chosen.assign.tolist() == [0, 0, 0, 1, 1, 0]
    torch.testing.assert_close(
        merge(states, chosen), torch.tensor([[7.0, 1.0], [0.0, 6.0]]) / torch.tensor([[4.0], [2.0]])
    )


def test_both_parts_of_holitom_are_a_layer_average_of_23_28ths() -> None:
    # A tenth of 6,272 at the input and half of it from layer 18 of 28 on: 0.1 x 23 / 28 = 0.08214.
    assert scheduled("holitom", 0.0821, 28, 6272) == [(0, 627), (18, 313)]
    # Where the input keeps all, the rest of the budget is the second cut's: 18 + 10 t = 28 x 0.9.
    assert scheduled("holitom", 0.9, 28, 10000) == [(0, 10000), (18, 7200)]


def test_the_published_pyramid_is_a_layer_average_of_15_32ths() -> None:
    cuts = scheduled("pyramiddrop", 0.46875, 32, 576)  # (1 + 1/2 + 1/4 + 1/8) / 4
    assert cuts == [(8, 288), (16, 144), (24, 72)]


def test_a_pyramid_keeps_the_same_fraction_at_every_cut() -> None:
    # 1 + t + t^2 + t^3 = 4 x 0.4 at t = 0.38937; rounding down leaves room for one token more.
    assert scheduled("pyramiddrop", 0.4, 28, 10000) == [(7, 3894), (14, 1516), (21, 590)]


def test_a_pyramid_can_leave_no_less_than_the_first_quarter_of_the_layers() -> None:
    with pytest.raises(PresetError, match=r"lowest reachable keep is 0\.2514"):
        scheduled("pyramiddrop", 0.2, 32, 576)  # 8 layers of 576 and 24 of 1


# -- sparsevlm: the schedule ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "average"),
    [
        ((300, 200, 110), 202.75), ((303, 110, 36), 140.8), ((238, 48, 26), 110.25),
        ((66, 30, 17), 79.2),
        # With the clusters: 9 + 4 + 3, 9 + 7 + 3, 11 + 7 + 1 and 16 + 2 + 1 more.
        ((309, 204, 113), 206.5), ((312, 117, 39), 145.4), ((249, 55, 27), 114.1),
        ((82, 32, 18), 82.3),
    ],
)  # fmt: skip
def test_the_published_counts_come_out_at_their_layer_average(
    counts: tuple[int, ...], average: float
) -> None:
    a, b, c = counts  # after layers 2, 6 and 15 of 32
    tokens = (3 * 576 + 4 * a + 9 * b + 16 * c) / 32
    assert tokens == pytest.approx(average, abs=0.06)
    assert scheduled("sparsevlm", tokens / 576, 32, 576) == [(3, a), (7, b), (16, c)]


@pytest.mark.parametrize(
    ("kept", "counts"),
    [
        ((309, 204, 113), (300, 200, 110)), ((312, 117, 39), (303, 110, 36)),
        ((249, 55, 27), (238, 48, 26)), ((82, 32, 18), (66, 30, 17)),
    ],
)  # fmt: skip
def test_with_the_clusters_counted_the_rest_is_what_the_authors_keep(
    kept: tuple[int, ...], counts: tuple[int, ...]
) -> None:
    before = (576, *kept[:2])
    clusters = [count_clusters(*one) for one in zip(before, kept, strict=True)]
    assert tuple(a - b for a, b in zip(kept, clusters, strict=True)) == counts


def test_between_the_published_budgets_each_cut_is_in_proportion() -> None:
    assert [round(576 * one, 9) for one in fractions(82 / 576)] == [160.0, 40.0, 22.0]
    assert [round(576 * one, 9) for one in fractions(96 / 576)] == [238.0, 48.0, 26.0]
    assert [round(576 * one, 9) for one in fractions(32 / 576)] == [33.0, 15.0, 8.5]
    assert [round(576 * one, 9) for one in fractions(386 / 576)] == [442.5, 390.0, 344.5]
    # The first falls from 312 to 300 as the eighth power.
    assert [576 * one for one in fractions(162 / 576)] == pytest.approx([311.953125, 158.5, 74.5])
    assert fractions(0.0) == (0.0, 0.0, 0.0)
    assert fractions(1.0) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("num_layers", [6, 16, 28, 32, 40, 80])
def test_any_keep_is_met_in_any_depth(num_layers: int) -> None:
    for keep in (0.3, 0.5, 0.9, 0.99):
        cuts = scheduled("sparsevlm", keep, num_layers, 2880)
        layers, counts = zip(*cuts, strict=True)
        left = [2880, *counts]
        spans = [
            layers[0],
            *(b - a for a, b in zip(layers, [*layers[1:], num_layers], strict=True)),
        ]
        total = sum(count * span for count, span in zip(left, spans, strict=True))
        assert keep * num_layers * 2880 - num_layers < total <= keep * num_layers * 2880 + 1e-3
        assert list(counts) == sorted(counts, reverse=True)


# -- sparsevlm: raters ----------------------------------------------------------------------------


def test_raters_are_the_text_tokens_that_relate_to_the_picture_more_than_the_mean() -> None:
    # The products of the two visual tokens with the three text tokens are ln 6, ln 3, 0 each, whose
    # softmax is 6/10, 3/10, 1/10; the mean is 1/3.
    visual = torch.tensor([[1.0, 0.0], [1.0, 5.0]])
    text = torch.tensor([[math.log(6), 0.0], [math.log(3), 0.0], [0.0, 0.0]])
    assert choose_raters(visual, text).tolist() == [1.0, 0.0, 0.0]
    # The second sees 0, ln 9 and 0: 1/11, 9/11, 1/11. The means: 0.345, 0.559, 0.095.
    visual = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[math.log(6), 0.0], [math.log(3), math.log(9)], [0.0, 0.0]])
    assert choose_raters(visual, text).tolist() == [1.0, 1.0, 0.0]


def test_where_no_text_token_stands_out_all_rate() -> None:
    assert choose_raters(torch.zeros(4, 2), torch.ones(3, 2)).tolist() == [1.0, 1.0, 1.0]
    assert choose_raters(torch.randn(4, 2), torch.ones(1, 2)).tolist() == [1.0]


def rated(attention: list[list[float]], raters: int) -> VisualTokens:
    """Tokens that the first `raters` of the text tokens rate."""
    rows = torch.tensor(attention)
    num_text, num = rows.shape
    text = torch.zeros(num_text, 1, 2)
    text[:raters, 0, 0] = 3.0
    hidden = torch.zeros(num, 1, 2)
    hidden[:, 0, 0] = 1.0
    hidden[:, 0, 1] = torch.arange(num) * 1e-3
    return VisualTokens(flat(num), {"text_attention": rows, "text_hidden": text, "hidden": hidden})


def test_only_raters_score() -> None:
    attention = [[0.0, 0.5, 0.1, 0.0], [0.4, 0.0, 0.1, 0.0], [0.0, 0.0, 0.0, 0.9]]
    pruner = create("sparsevlm", {"recycle": "none"})
    tokens = rated(attention, 1)
    assert pruner.select(tokens, whole(2, tokens.layout)).index.tolist() == [1, 2]
    tokens = rated(attention, 2)
    assert pruner.select(tokens, whole(2, tokens.layout)).index.tolist() == [0, 1]


def test_text_tokens_may_come_in_any_order() -> None:
    tokens = tokens_of(flat(37))
    shuffled = torch.tensor([3, 0, 5, 4, 1, 2])
    assert len(shuffled) == TEXT
    states = {
        key: one[shuffled] if key.startswith("text_") else one for key, one in tokens.states.items()
    }
    first, second = (
        create("sparsevlm", {}).select(one, whole(12, tokens.layout))
        for one in (tokens, VisualTokens(tokens.layout, states))
    )
    assert torch.equal(first.index, second.index)
    assert first.assign is not None
    assert second.assign is not None
    assert torch.equal(first.assign, second.assign)


# -- sparsevlm: recycling -------------------------------------------------------------------------


def test_how_many_places_go_to_clusters() -> None:
    # The released code keeps 300 of 576 and makes clusters besides: of 276 dropped tokens it takes
    # 82 + 1, and makes 8 + 1 of them.
    assert count_clusters(576, 309) == 9
    # 309 to 200 and more: of 109, 32 + 1, in 3 + 1.
    assert count_clusters(309, 204) == 4
    assert count_clusters(12, 4) == 1
    assert count_clusters(10, 10) == 0
    assert count_clusters(10, 9) == 1
    assert count_clusters(10, 1) == 0  # nothing would be left
    assert count_clusters(576, 17) == 8  # 18 are asked for: no more than half
    assert count_clusters(100, 6) == 3  # of 98 dropped tokens 30, in 4


def test_a_cluster_s_centre_is_dense_and_far_from_what_is_denser() -> None:
    # Squared distances to the nearer of itself and its neighbour: 1/32 for all in the mean, so the
    # first counts as denser than the rest, and these as of one density: the farthest from it.
    rows = torch.tensor([[0.0], [0.25], [0.5], [10.0], [10.25]])
    centres, nearest = density_peaks(rows, 2, 2)
    assert centres.tolist() == [0, 4]
    assert nearest.tolist() == [0, 0, 0, 1, 1]
    # A lone token has no near neighbour: means 0.5, 0.5, 0.5, 8; it is 4 from the nearest denser
    # one, but e^-8 x 4 is less than e^-0.5 x 1. The first is denser than all, and 6 is the most.
    centres, nearest = density_peaks(torch.tensor([[0.0], [1.0], [2.0], [6.0]]), 2, 2)
    # The second and third are of one density, and the third is farther from the first.
    assert centres.tolist() == [0, 2]
    assert nearest.tolist() == [0, 0, 1, 1]


def test_a_centre_s_distance_counts_once_beside_its_density() -> None:
    # Squared distances to the nearer of two, in the mean: 1/200 of 0 and 0.1, 1/50 of -2 and -2.2,
    # 1.28 of 3.6 and 5.2. Distances to what is denser: of -2.2 it is 2.2, of 5.2 it is 5.1;
    # 2.2 e^-0.02 = 2.16 and 5.1 e^-1.28 = 1.42, where squares of them would be 4.7 and 7.2.
    rows = torch.tensor([[0.0], [0.1], [-2.0], [-2.2], [3.6], [5.2]])
    centres, nearest = density_peaks(rows, 2, 2)
    assert centres.tolist() == [0, 3]
    assert nearest.tolist() == [0, 0, 1, 1, 0, 0]


def test_the_best_of_the_dropped_tokens_become_one() -> None:
    # 12 tokens, 4 places: 3 go to the best, 1 to a cluster; of 9 dropped, 2 + 1 are recycled.
    scores = torch.arange(12, 0, -1.0)
    hidden = torch.zeros(12, 1, 1)
    hidden[:, 0, 0] = torch.arange(12) * 2.0
    states = {
        "text_attention": scores[None] / scores.sum(),
        "text_hidden": torch.ones(1, 1, 1),
        "hidden": hidden,
    }
    tokens = VisualTokens(flat(12), states)
    chosen = create("sparsevlm", {}).select(tokens, whole(4, tokens.layout))
    assert chosen.index.tolist() == [0, 1, 2, 3]
    assert chosen.assign is not None
    assert chosen.assign.tolist() == [0, 1, 2, 3, 3, 3] + [-1] * 6
    assert merge(hidden.flatten(1), chosen).flatten().tolist() == [0.0, 2.0, 4.0, 8.0]
    plain = create("sparsevlm", {"recycle": "none"}).select(tokens, whole(4, tokens.layout))
    assert plain.index.tolist() == [0, 1, 2, 3]
    assert plain.assign is None


def test_clusters_of_far_states_do_not_underflow() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(60, 8, generator=generator) * 1e4
    centres, nearest = density_peaks(states, 6, 6)
    assert centres.tolist() != list(range(6))
    assert nearest[centres].tolist() == list(range(6))


# -- sparsevlm: the rank --------------------------------------------------------------------------


def test_a_lower_rank_keeps_fewer() -> None:
    budget = whole(6, flat(10))
    # At full rank 3 of 10 tokens, 4 of 7 surplus ones go; at rank 1, 4/7 of 9: 5.14 of 10.
    assert shrink(budget, rank=3, num_raters=3).count == 6
    assert shrink(whole(8, flat(37)), rank=2, num_raters=2).count == 8  # 7.999... of 37
    assert shrink(budget, rank=1, num_raters=3).count == 4
    assert shrink(budget, rank=0, num_raters=3).count == 4
    assert shrink(whole(3, flat(10)), rank=0, num_raters=9).count == 1
    assert shrink(whole(3, flat(3)), rank=1, num_raters=5).count == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_the_rank_is_that_of_the_raters_attention(rows: int) -> None:
    generator = torch.Generator().manual_seed(3)
    basis = torch.rand(rows, 10, generator=generator)
    attention = torch.rand(3, rows, generator=generator) @ basis
    other = torch.rand(1, 10, generator=generator)  # not a rater's
    tokens = rated([*attention.tolist(), *other.tolist()], 3)
    pruner = create("sparsevlm", {"ratio": "rank"})
    kept = pruner.select(tokens, whole(6, tokens.layout)).index
    assert len(kept) == {1: 4, 3: 6}[rows]


def test_every_group_loses_the_same_fraction_and_keeps_one() -> None:
    budget = Budget(torch.arange(4).repeat_interleave(10), torch.tensor([8, 4, 1, 0]))
    # 40 tokens, 13 places: 27 of 32 surplus ones go; at rank 2, 27/32 of 38: 7 stay.
    assert shrink(budget, rank=2, num_raters=8).quota.tolist() == [4, 2, 1, 0]


# -- sparsevlm-plus -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "average"),
    [((300, 200, 118), 206.75), ((238, 108, 60), 144.1), ((246, 54, 28), 113.9),
     ((66, 34, 20), 81.8)],
)  # fmt: skip
def test_the_counts_of_version_2_come_out_at_their_layer_average(
    counts: tuple[int, ...], average: float
) -> None:
    a, b, c = counts
    tokens = (3 * 576 + 4 * a + 9 * b + 16 * c) / 32
    assert tokens == pytest.approx(average, abs=0.06)
    assert scheduled("sparsevlm-plus", tokens / 576, 32, 576) == [(3, a), (7, b), (16, c)]


def test_attention_is_divided_and_read_in_the_heads_in_which_raters_then_pay_most() -> None:
    # Over what positions give, the first text token pays 4, 4.33, 0.17 and 2 in the four heads, the
    # second 0, 2.07, 0.5 and 1.03. Undivided both pay 0.4, 1.5, 0.2 and 0.8.
    attention = torch.tensor(
        [
            [[0.4, 0.0, 0.0], [0.3, 0.4, 0.2], [0.0, 0.1, 0.0], [0.1, 0.2, 0.2]],
            [[0.0, 0.0, 0.0], [0.2, 0.2, 0.2], [0.1, 0.0, 0.0], [0.1, 0.1, 0.1]],
        ]
    )
    by_position = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.3, 0.5]])
    # Of 4 heads the best 2: the first and the second, or the second and the fourth.
    for raters, expected in (
        ([1.0, 0.0], [3.5, 1 / 3, 1 / 3]), ([0.0, 1.0], [0.75, 0.5, 0.3]),
        ([1.0, 1.0], [2.0, 1 / 3, (1 / 3 + 0.2) / 2]),
    ):  # fmt: skip
        scores = sparsevlm_plus.score(attention, torch.tensor(raters), by_position)
        torch.testing.assert_close(scores, torch.tensor(expected))


def scores_by_position(rotary: list[float], attention: list[float]) -> list[float]:
    """Return what tokens score for one text token, one head and rotary rows of one place."""
    rows = torch.tensor(rotary)[:, None]
    states = {
        "text_attention_by_head": torch.tensor(attention)[None, None],
        "text_hidden": torch.ones(1, 1, 2),
        "hidden": torch.ones(len(rows), 1, 2),
        "rotary": rows,
        "text_rotary": torch.ones(1, 1),
    }
    tokens = VisualTokens(flat(len(rows)), states)
    kept = create("sparsevlm-plus", {}).select(tokens, whole(1, tokens.layout))
    assert kept.scores is not None
    return kept.scores.tolist()


def test_what_positions_alone_favour_is_not_kept_for_it() -> None:
    # Attention as positions give it, but for the first token; a softmax of them would say more.
    scores = scores_by_position([1.0, 2.0, 4.0], [0.15, 0.2, 0.4])
    assert scores == pytest.approx([0.15, 0.1, 0.1])


def test_far_apart_attention_is_divided_by_a_part_of_what_it_is_at_one_place() -> None:
    # A product of -2 counts as 1/32 of 2 x 2; one of 0.01 is more than 1/32 of its square.
    scores = scores_by_position([-2.0, 0.01, 1.0], [0.1, 0.1, 0.1])
    assert scores == pytest.approx([0.8, 10.0, 0.1])


# -- visionzip ------------------------------------------------------------------------------------


def zipped(
    contextual: str, count: int, scores: list[float], states: list[list[float]]
) -> Selection:
    tokens = VisualTokens(
        flat(len(scores)),
        {"tower_attention": torch.tensor(scores), "hidden": torch.tensor(states)[:, None]},
    )
    pruner = create("visionzip", {"contextual": contextual})
    return pruner.select(tokens, whole(count, tokens.layout))


def test_dominant_tokens_stay_and_the_others_go_to_the_contextual_one_they_resemble() -> None:
    scores = [0.5, 0.1, 0.4, 0.0, 0.0, 0.1, 0.0, 0.1]
    states = [[9, 9], [1, 0], [9, 9], [2, 1], [0, 3], [0, 1], [1, 2], [3, 0]]
    states = [[float(value) for value in one] for one in states]
    # Dominant: 0 and 2. Of the six others, in steps of 6 // 2 from the first: 1 and 5. By their
    # direction 3 and 7 go to 1, 4 and 6 to 5.
    chosen = zipped("32/64", 4, scores, states)
    assert chosen.index.tolist() == [0, 1, 2, 5]
    assert chosen.assign is not None
    assert chosen.assign.tolist() == [0, 1, 2, 1, 3, 3, 3, 1]
    merged = merge(torch.tensor(states), chosen)
    expected = torch.tensor([[9.0, 9.0], [2.0, 1 / 3], [9.0, 9.0], [1 / 3, 2.0]])
    torch.testing.assert_close(merged, expected)


def test_the_published_split_is_54_and_10_of_64() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(576, generator=generator)
    states = torch.randn(576, 4, generator=generator)
    chosen = zipped("10/64", 64, scores.tolist(), states.tolist())
    assert chosen.assign is not None
    sizes = torch.bincount(chosen.assign, minlength=64)
    assert int((sizes == 1).sum()) == 54
    assert int(sizes.sum()) == 576  # nothing is lost
    best = set(scores.argsort(descending=True)[:54].tolist())
    assert best <= set(chosen.index.tolist())
    others = [n for n in range(576) if n not in best]
    aims = sorted(set(chosen.index.tolist()) - best)
    assert aims == others[:: 522 // 10][:10]


def test_without_contextual_tokens_the_dominant_fill_the_budget() -> None:
    chosen = zipped("none", 2, [0.1, 0.4, 0.2, 0.3], [[1.0, 0.0]] * 4)
    assert chosen.index.tolist() == [1, 3]
    assert chosen.assign is None


def test_a_budget_too_small_for_a_contextual_token_keeps_dominant_ones() -> None:
    chosen = zipped("10/64", 6, [0.1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], [[1.0, 0.0]] * 8)
    assert chosen.index.tolist() == [1, 2, 3, 4, 5, 6]
    assert chosen.weight is not None
    assert chosen.weight.tolist() == [0.0, 1, 1, 1, 1, 1, 1, 0]


def test_contextual_tokens_do_not_depend_on_the_length_of_states() -> None:
    tokens = tokens_of(flat(37))
    scaled = dict(tokens.states)
    scaled["hidden"] = scaled["hidden"] * torch.rand(37, 1, 1).add(0.1)
    assert scaled["hidden"].shape == (37, HEADS, WIDTH)
    first, second = (
        create("visionzip", {}).select(
            VisualTokens(tokens.layout, states), whole(14, tokens.layout)
        )
        for states in (tokens.states, scaled)
    )
    assert first.assign is not None
    assert second.assign is not None
    assert torch.equal(first.assign, second.assign)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "state"),
    [("fastv", "attention"), ("pyramiddrop", "attention"), ("sparsevlm", "text_attention"),
     ("sparsevlm-plus", "text_attention_by_head"), ("sparsevlm-plus", "rotary"),
     ("visionzip", "tower_attention")],
)  # fmt: skip
def test_attention_with_nan_is_refused(name: str, state: str, bad: float) -> None:
    tokens = tokens_of(flat(30))
    tokens.states[state][..., 3] = bad
    with pytest.raises(ModelError, match=f"states hold NaN or infinity, so {name} can't rank") as e:
        create(name, {}).select(tokens, whole(4, tokens.layout))
    assert "--dtype" in e.value.hint
