"""Counts and layers of every stage: the only rounding of the project."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace

import pytest

from vtprune.errors import PresetError
from vtprune.tokens.quotas import quotas
from vtprune.tokens.schedule import (
    Cut,
    CutProfile,
    Place,
    Schedule,
    count_by_layer,
    fixed_count,
    layer_average,
    merge_places,
    resolve_layer,
)
from vtprune.tokens.solver import solve


def at_layer(layer: int, keep: float | None = None) -> Place:
    return Place(str(layer), layer, keep)


def ecl(layer: int, keep: float | None = None) -> Place:
    return Place("ecl", layer, keep)


def horizon(layer: int, keep: float | None = None) -> Place:
    return Place("horizon", layer, keep)


def cuts(schedule: Schedule) -> list[tuple[int, int]]:
    """(layer, count) of every cut."""
    return [(cut.layer, cut.count) for cut in schedule.cuts]


# -- budgets in tokens ---------------------------------------------------------------------------


def test_a_free_stage_leaves_the_tokens_that_are_asked_for() -> None:
    schedule = solve([at_layer(2)], None, 10, 100, most_after=30)
    assert cuts(schedule) == [(2, 30)]
    assert schedule.keep_mean() == pytest.approx((2 * 100 + 8 * 30) / 1000)


def test_fewer_tokens_than_asked_for_are_all_left() -> None:
    assert cuts(solve([at_layer(2)], None, 10, 30, most_after=30)) == []


def test_a_later_stage_keeps_its_share_of_all() -> None:
    places = [at_layer(0), at_layer(5, 0.1)]
    assert cuts(solve(places, None, 10, 100, most_after=30)) == [(0, 30), (5, 10)]
    with pytest.raises(PresetError, match="5 tokens after the cut at 0 are fewer than the 10"):
        solve(places, None, 10, 100, most_after=5)


def test_the_first_cut_of_a_schedule_leaves_the_tokens_that_are_asked_for() -> None:
    profile = CutProfile((0.0, 0.5), lambda t: (min(1.0, 4 * t), t))
    places = [Place("schedule", layer, profile=profile, part=part)
              for part, layer in enumerate([0, 5])]  # fmt: skip
    assert cuts(solve(places, None, 10, 100, most_after=40)) == [(0, 40), (5, 10)]


def test_what_the_tower_left_is_what_may_be_left() -> None:
    assert cuts(solve([at_layer(0)], None, 10, 100, num_input=20, most_after=30)) == [(0, 20)]


def test_no_number_of_tokens_is_left_by_a_stage_that_drops_all() -> None:
    with pytest.raises(PresetError, match="the method drops all of them"):
        solve([Place("ecl", 2, drops_all=True)], None, 10, 100, most_after=30)


# -- models that can't be cut everywhere ---------------------------------------------------------


def test_all_tokens_are_dropped_where_the_model_can_be_cut() -> None:
    place = Place("input", 0, drops_all=True, layers=(0, 1, 3, 4))
    assert cuts(solve([place], 0.3, 10, 100)) == [(3, 0)]
    schedule = solve([place], 0.25, 10, 100)
    assert cuts(schedule) == [(1, 0)]
    assert "before which this model can't drop any: they go before layer 1" in schedule.warnings[0]
    after = replace(place, at="6", layer=6, layers=(0, 8))
    with pytest.raises(PresetError, match=r"keep 0.3 is spent before the stage that drops all"):
        solve([at_layer(2, 0.5), after], 0.3, 10, 100)


def test_the_lowest_keep_is_that_of_a_layer_where_the_model_can_be_cut() -> None:
    place = replace(ecl(4), layers=(3, 4, 8))
    with pytest.raises(PresetError, match=r"the lowest reachable keep is 0.307"):
        solve([place], 0.2, 10, 100)
    assert cuts(solve([place], 0.307, 10, 100)) == [(3, 1)]


# -- published figures ----------------------------------------------------------------------------


@pytest.mark.parametrize(("average", "kept"), [(192, 166), (128, 98), (64, 29)])
def test_llava_keeps_what_the_released_code_keeps(average: int, kept: int) -> None:
    schedule = solve([at_layer(2)], average / 576, num_layers=32, num_tokens=576)
    assert cuts(schedule) == [(2, kept)]
    assert schedule.warnings == ()


def test_llava_next_keeps_149_at_a_layer_average_of_320() -> None:
    assert cuts(solve([at_layer(2)], 320 / 2880, 32, 2880)) == [(2, 149)]


def test_llava_next_at_160_moves_a_named_cut_to_layer_1_and_keeps_72() -> None:
    schedule = solve([ecl(2)], 160 / 2880, 32, 2880)
    assert cuts(schedule) == [(1, 72)]
    assert len(schedule.warnings) == 1
    assert re.search(r"cut at ecl moved from layer 2 to 1: keep 0\.0555", schedule.warnings[0])


def test_llava_next_at_160_with_an_explicit_layer_names_the_lowest_reachable_keep() -> None:
    # 2 x 2880 + 30 x 1 of 32 x 2880 token-layers
    with pytest.raises(PresetError, match=r"lowest reachable keep is 0\.0629") as caught:
        solve([at_layer(2)], 160 / 2880, 32, 2880)
    assert "cut earlier" in caught.value.hint
    assert cuts(solve([at_layer(2)], 0.0629, 32, 2880))[0][0] == 2


@pytest.mark.parametrize(
    ("first", "second", "average"),
    [
        ((2, 252), (20, 38), 192.0),
        ((1, 60), (20, 27), 63.75),
        ((0, 284), (20, 38), 191.75),
        ((0, 96), (20, 10), 63.75),
        ((2, 260), (21, 0), 190.4),
        ((1, 60), (26, 0), 64.9),
        ((0, 284), (20, 0), 177.5),
        ((0, 98), (21, 0), 64.3),
    ],
)
def test_published_two_stage_schedules_have_their_layer_average(
    first: tuple[int, int], second: tuple[int, int], average: float
) -> None:
    schedule = Schedule(32, 576, (Cut(0, *first), Cut(1, *second)))
    assert schedule.keep_mean() * 576 == pytest.approx(average, abs=0.06)


@pytest.mark.parametrize(
    ("first", "second", "average"),
    [((2, 252), (20, 38), 192.0), ((1, 60), (20, 27), 63.75), ((0, 284), (20, 38), 191.75)],
)
def test_a_free_stage_finds_the_published_count(
    first: tuple[int, int], second: tuple[int, int], average: float
) -> None:
    places = [at_layer(first[0]), at_layer(second[0], second[1] / 576)]
    assert cuts(solve(places, average / 576, 32, 576)) == [first, second]


@pytest.mark.parametrize(
    ("first", "layer", "average"),
    [((2, 260), 21, 190.4), ((1, 60), 26, 64.9), ((0, 284), 20, 177.5), ((0, 98), 21, 64.4)],
)
def test_a_free_stage_that_drops_all_finds_the_published_layer(
    first: tuple[int, int], layer: int, average: float
) -> None:
    places = [at_layer(first[0], first[1] / 576), Place("horizon", 16, None, drops_all=True)]
    assert cuts(solve(places, average / 576, 32, 576)) == [first, (layer, 0)]


@pytest.mark.parametrize(("dropped", "average"), [(0.7778, 0.25), (0.9074, 0.125)])
def test_qwen_drop_rates_are_layer_averages(dropped: float, average: float) -> None:
    assert (1 + 27 * (1 - dropped)) / 28 == pytest.approx(average, abs=1e-4)
    count = solve([at_layer(1)], average, 28, 10_000).cuts[0].count
    assert count == pytest.approx((1 - dropped) * 10_000, abs=2)


# -- counts of stages with a keep -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "num_tokens", "count"),
    [
        (0.3, 10, 3),  # 0.3 x 10 is 2.9999999999999996 in floating point
        (0.29, 100, 29),
        (0.07, 100, 7),
        (0.999, 10, 9),
        (0.05, 17, 1),
        (0.05, 1, 1),
        (1.0, 17, 17),
        (1 / 3, 576, 192),
        (0.0, 576, 0),
        (0.5, 0, 0),
    ],
)
def test_a_keep_leaves_the_floor_but_at_least_one(keep: float, num_tokens: int, count: int) -> None:
    assert fixed_count(keep, num_tokens) == count


def test_a_keep_of_zero_leaves_nothing() -> None:
    assert cuts(solve([at_layer(3, 0.0)], None, 6, 100)) == [(3, 0)]


def test_a_stage_keep_is_of_the_original_tokens() -> None:
    places = [at_layer(1, 0.5), at_layer(3, 0.25)]
    assert cuts(solve(places, None, 6, 100)) == [(1, 50), (3, 25)]


@pytest.mark.parametrize("keep", [1, 1.0])
def test_keep_one_is_no_cut_whatever_the_stages(keep: float) -> None:
    schedule = solve([at_layer(1, 0.5), at_layer(3, 0.25)], keep, 6, 100)
    assert schedule.cuts == ()
    assert schedule.keep_mean() == 1.0


def test_no_tokens_is_no_cut() -> None:
    schedule = solve([ecl(2)], 0.3, 32, 0)
    assert (schedule.cuts, schedule.warnings, schedule.keep_mean()) == ((), (), 1.0)


def test_a_layer_sees_fewer_tokens_from_its_cut_on() -> None:
    assert Schedule(5, 10, (Cut(0, 0, 7), Cut(1, 3, 2))).tokens_by_layer() == [7, 7, 7, 2, 2]


def test_tokens_are_counted_by_layer_over_the_cuts_of_several_modalities() -> None:
    # 20 tokens of pictures and 10 of a video: 5 of the video go at layer 1, of the pictures 10 at
    # layer 1 and 4 more at layer 3; a cut past the last layer is none.
    drops = [(1, 10), (3, 4), (1, 5), (6, 9)]
    counts = count_by_layer(30, 6, drops)
    assert counts == [30, 15, 15, 11, 11, 11]
    assert layer_average(counts, 30) == 93 / 180
    assert layer_average(counts, 60) == 93 / 360  # of media that were made smaller before
    assert layer_average([0, 0], 0) == 1.0


# -- places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "num_layers", "layer"),
    [
        ("input", 32, 0),
        ("0", 32, 0),
        ("31", 32, 31),
        ("ecl", 32, 2),
        ("horizon", 32, 20),
        ("horizon", 6, 6),  # past the last layer: never
        ("60%", 32, 19),
        ("0%", 32, 0),
        ("70%", 10, 7),  # 0.7 x 10 is 7.000000000000001, 0.29 x 100 is 28.999999999999996
        ("29%", 100, 29),
        ("99%", 6, 5),
        ("99.9999999%", 80, 79),
        ("12.5%", 80, 10),
    ],
)
def test_places_resolve_to_layers(at: str, num_layers: int, layer: int) -> None:
    assert resolve_layer(at, num_layers, ecl=2, horizon=20) == layer


def test_the_collapse_layer_is_never_past_the_last() -> None:
    assert [resolve_layer("ecl", layers, 5, 9) for layers in (3, 5, 6, 7)] == [2, 4, 5, 5]
    assert resolve_layer("pixels", 6, 5, 9) == 0


@pytest.mark.parametrize(("layer", "depth"), [(40, "40%"), (99, "99%"), (300, "33%")])
def test_a_layer_past_the_last_is_refused_with_a_depth_that_fits(layer: int, depth: str) -> None:
    with pytest.raises(PresetError, match=f"at: {layer}: this model has 32") as raised:
        resolve_layer(str(layer), 32, 2, 24)
    assert raised.value.hint == f'a depth such as "{depth}", ecl or horizon fits any model'


def test_cuts_of_a_schedule_of_its_own_are_at_least_one_layer_apart() -> None:
    profile = CutProfile((0.1, 0.1, 0.3), lambda t: (t, t, t))
    assert profile.layers(10) == [1, 2, 3]
    assert profile.layers(10, lowest=3) == [3, 4, 5]
    assert profile.layers(30) == [3, 4, 9]
    assert profile.layers(3) == [0, 1, 2]
    with pytest.raises(PresetError, match="2 decoder layers are too few for 3 cuts") as raised:
        profile.layers(2)
    assert raised.value.hint == "name a place: --at ecl, or a layer number"


def test_a_layer_past_the_last_is_refused_with_the_range() -> None:
    with pytest.raises(PresetError, match=r"at: 32: this model has 32 decoder layers, 0 to 31"):
        resolve_layer("32", 32, 2, 20)


@pytest.mark.parametrize(
    "places",
    [
        [at_layer(3, 0.5), at_layer(2, 0.3)],
        [at_layer(3, 0.5), at_layer(3, 0.3)],
        [ecl(2, 0.5), at_layer(2, 0.3)],
        [horizon(20, 0.5), ecl(2, 0.3)],
        [Place("input", 0, 0.5), at_layer(0, 0.3)],
    ],
)
def test_layers_must_increase(places: list[Place]) -> None:
    with pytest.raises(PresetError, match="stages must cut at increasing layers"):
        solve(places, None, 32, 100)


def test_a_keep_that_grows_is_refused() -> None:
    with pytest.raises(PresetError, match=r"keep 0\.5 at 4 comes after keep 0\.3 at 2"):
        solve([at_layer(2, 0.3), at_layer(4, 0.5)], None, 32, 100)


def test_a_keep_that_grows_over_a_free_stage_is_refused() -> None:
    with pytest.raises(PresetError, match=r"keep 0\.5 at 9 comes after keep 0\.3 at 2"):
        solve([at_layer(2, 0.3), at_layer(4), at_layer(9, 0.5)], 0.3, 32, 100)


def test_a_keep_that_grows_is_refused_where_named_places_meet_too() -> None:
    with pytest.raises(PresetError, match=r"keep 0\.3 at horizon comes after keep 0\.1 at ecl"):
        solve([ecl(2, 0.1), horizon(2, 0.3)], None, 32, 100)


def test_two_named_places_that_meet_keep_the_smaller_count() -> None:
    schedule = solve([ecl(2, 0.3), horizon(2, 0.05)], None, 32, 100)
    assert schedule.cuts == (Cut(1, 2, 5),)
    assert re.search(r"ecl and horizon are both layer 2.*stage at horizon", schedule.warnings[0])


def test_a_named_and_an_explicit_place_that_meet_are_refused() -> None:
    with pytest.raises(PresetError, match="increasing"):
        merge_places([at_layer(2, 0.5), ecl(2, 0.1)], 6)


@pytest.mark.parametrize(
    ("layer", "keep", "expected"),
    [
        (2, 0.3, (1, 2, 5)),  # the free stage would leave 25 of 100
        (16, 0.53, (1, 16, 5)),  # ... 6
        (16, 0.52, (0, 16, 4)),  # ... 4: fewer than the horizon's 5
        (16, 0.3, (0, 9, 2)),  # none: the budget is spent before layer 16
    ],
)
def test_a_free_stage_that_meets_the_horizon_stays_within_the_budget(
    layer: int, keep: float, expected: tuple[int, int, int]
) -> None:
    schedule = solve([ecl(layer), horizon(layer, 0.05)], keep, 32, 100)
    assert schedule.cuts == (Cut(*expected),)
    assert schedule.keep_mean() <= keep
    assert "both layer" in schedule.warnings[0]


@pytest.mark.parametrize(("keep", "count"), [(0.8, 50), (0.6, 46)])
def test_a_free_horizon_that_meets_a_fixed_stage_never_keeps_more_than_it(
    keep: float, count: int
) -> None:
    schedule = solve([ecl(8, 0.5), horizon(8)], keep, 32, 100)
    assert [cut.count for cut in schedule.cuts] == [count]


# -- the free stage -------------------------------------------------------------------------------


def test_a_named_cut_moves_to_the_deepest_layer_where_it_fits() -> None:
    schedule = solve([ecl(10)], 0.2, 32, 576)
    layer, count = cuts(schedule)[0]
    assert layer == 6  # 7 whole layers are already more than 6.4
    assert count == 8  # (6.4 - 6) x 576 / 26 = 8.86
    assert re.search("moved from layer 10 to 6", schedule.warnings[0])


def test_a_named_cut_does_not_move_where_the_budget_is_exactly_reached() -> None:
    # 2 whole layers and one token in the other 30
    schedule = solve([ecl(2)], (2 * 576 + 30) / (32 * 576), 32, 576)
    assert (cuts(schedule), schedule.warnings) == ([(2, 1)], ())


def test_a_named_cut_never_moves_onto_an_earlier_stage() -> None:
    with pytest.raises(PresetError, match="lowest reachable keep"):
        solve([at_layer(8, 0.9), ecl(10)], 0.2, 32, 576)


def test_a_free_stage_leaves_no_fewer_than_the_next_one() -> None:
    # 160 + 30 x 20 of 2560
    with pytest.raises(PresetError, match=r"lowest reachable keep is 0\.2969"):
        solve([at_layer(2), at_layer(20, 0.25)], 0.2, 32, 80)


def test_a_named_free_stage_with_a_next_one_moves_until_it_keeps_at_least_as_many() -> None:
    schedule = solve([ecl(8), horizon(20, 0.1)], 0.3, 32, 100)
    layer, count = cuts(schedule)[0]
    assert layer == 7
    assert count == (960 - 700 - 120) // 13
    assert cuts(schedule)[1] == (20, 10)


def test_later_named_stages_rise_together() -> None:
    places = [at_layer(2), Place("ecl", 8, 0.2), Place("horizon", 20, 0.1)]
    schedule = solve(places, 0.9, 32, 100)
    first, second, third = cuts(schedule)
    assert first == (2, 100)
    assert second[1] == third[1] == 86  # (2880 - 800) / 24
    assert re.search("stages at ecl, horizon ask for: they keep more", schedule.warnings[0])


def test_a_rising_stage_never_passes_an_explicit_one_before_it() -> None:
    places = [ecl(2), at_layer(8, 0.5), horizon(20, 0.1)]
    schedule = solve(places, 0.5, 32, 100)
    assert cuts(schedule) == [(2, 100), (8, 50), (20, 16)]  # 1600 - 800 - 600 = 200 = 12 x 16.7
    assert "horizon" in schedule.warnings[0]
    assert "ecl" not in schedule.warnings[0]


def test_nothing_is_said_to_rise_where_the_rest_is_too_small() -> None:
    # The free stage can't use one token more, and 20 layers can't have one each.
    schedule = solve([at_layer(1), horizon(2, 0.5)], (2 * 4 + 4 * 2 + 1) / 24, 6, 4)
    assert (cuts(schedule), schedule.warnings) == ([(1, 4), (2, 2)], ())


def test_a_budget_above_explicit_later_stages_names_the_highest_reachable_keep() -> None:
    # (8 x 100 + 24 x 20) / 3200
    with pytest.raises(PresetError, match=r"highest reachable keep is 0\.4$"):
        solve([at_layer(2), at_layer(8, 0.2)], 0.5, 32, 100)


def test_a_free_stage_after_a_fixed_one_never_keeps_more_than_it() -> None:
    with pytest.raises(PresetError, match=r"highest reachable keep is 0\.5625"):
        solve([at_layer(4, 0.5), at_layer(8)], 0.7, 32, 100)


@pytest.mark.parametrize(
    ("keep", "layer"), [(0.3, 9), (0.5, 16), (0.99, 31), (0.01, 0), (1 / 32, 1)]
)
def test_a_free_stage_that_drops_all_is_placed_by_the_budget(keep: float, layer: int) -> None:
    schedule = solve([Place("horizon", 20, None, drops_all=True)], keep, 32, 576)
    assert cuts(schedule) == [(layer, 0)]


def test_a_free_stage_that_drops_all_counts_what_is_cut_before_it() -> None:
    places = [at_layer(2, 0.5), Place("horizon", 20, None, drops_all=True)]
    assert cuts(solve(places, 0.25, 32, 100)) == [(2, 50), (14, 0)]  # 8 = 2 + 12 x 0.5
    with pytest.raises(PresetError, match="spent before the stage that drops all"):
        solve(places, 0.05, 32, 100)


def test_nothing_can_come_after_a_stage_that_drops_all() -> None:
    places = [Place("ecl", 2, None, drops_all=True), horizon(20, 0.05)]
    with pytest.raises(PresetError, match=r"keep 0\.05 at horizon comes after keep 0 at ecl"):
        solve(places, 0.3, 32, 100)


def test_a_named_stage_that_drops_all_never_rises() -> None:
    places = [ecl(2), Place("horizon", 20, 0.0, drops_all=True)]
    assert cuts(solve(places, 0.6, 32, 100)) == [(2, 95), (20, 0)]
    with pytest.raises(PresetError, match=r"highest reachable keep is 0\.625"):
        solve(places, 0.9, 32, 100)


# -- properties -----------------------------------------------------------------------------------


def random_case(generator: random.Random) -> tuple[list[Place], float, int, int]:
    num_layers = generator.choice([2, 3, 6, 16, 28, 32, 80])
    num_tokens = generator.choice([1, 2, 5, 17, 64, 576, 2928, 30000])
    num_stages = generator.randint(1, min(4, num_layers))
    layers = sorted(generator.sample(range(num_layers), num_stages))
    keeps = sorted((generator.choice([0.9, 0.5, 0.31, 0.1, 0.03]) for _ in layers), reverse=True)
    free = generator.randrange(num_stages)
    places = []
    for i, (layer, keep) in enumerate(zip(layers, keeps, strict=True)):
        name = generator.choice(["ecl", "horizon", str(layer)])
        places.append(Place(name, layer, None if i == free else keep))
    return places, generator.choice([0.02, 0.1, 0.3, 0.5, 0.75, 0.97]), num_layers, num_tokens


def solved_cases(number: int = 3000):  # type: ignore[no-untyped-def]
    generator = random.Random(0)
    for _ in range(number):
        case = random_case(generator)
        try:
            yield case, solve(*case)
        except PresetError:
            continue


def test_most_random_schedules_are_solved() -> None:
    assert sum(1 for _ in solved_cases()) > 1000


def test_counts_never_rise_and_every_cut_leaves_at_least_one_token() -> None:
    for case, schedule in solved_cases():
        counts = [case[3], *(cut.count for cut in schedule.cuts)]
        assert all(a >= b >= 1 for a, b in itertools.pairwise(counts)), case


def test_cuts_are_at_increasing_layers_of_the_model() -> None:
    for case, schedule in solved_cases():
        layers = [-1, *(cut.layer for cut in schedule.cuts), case[2]]
        assert all(a < b for a, b in itertools.pairwise(layers)), case


def test_the_layer_average_is_never_above_keep() -> None:
    for case, schedule in solved_cases():
        seen = sum(schedule.tokens_by_layer())
        assert seen <= case[1] * case[2] * case[3] + 1e-4, case


def test_the_layer_average_is_below_keep_by_less_than_one_token_in_the_stretch_that_is_free() -> (
    None
):
    for (places, keep, num_layers, num_tokens), schedule in solved_cases():
        left = keep * num_layers * num_tokens - sum(schedule.tokens_by_layer())
        # One token more: in the free stage's stretch, or in all later ones that rise together.
        free = next(i for i, place in enumerate(places) if place.keep is None)
        assert left < num_layers - schedule.cuts[free].layer, (places, keep, schedule)


def test_explicit_layers_and_their_keeps_never_change() -> None:
    for (places, _, _, num_tokens), schedule in solved_cases():
        for place, cut in zip(places, schedule.cuts, strict=True):
            if place.named:
                continue
            assert cut.layer == place.layer
            if place.keep is not None:
                assert cut.count == fixed_count(place.keep, num_tokens)


def test_whatever_changed_is_said() -> None:
    for (places, _, _, num_tokens), schedule in solved_cases():
        changed = any(
            cut.layer != place.layer
            or (place.keep is not None and cut.count != fixed_count(place.keep, num_tokens))
            for place, cut in zip(places, schedule.cuts, strict=True)
        )
        assert changed == bool(schedule.warnings), (places, schedule)


@pytest.mark.parametrize("which", ["lowest", "highest"])
def test_the_reachable_keep_that_an_error_names_can_be_reached(which: str) -> None:
    generator, tried = random.Random(1), 0
    while tried < 150:
        places, keep, num_layers, num_tokens = random_case(generator)
        try:
            solve(places, keep, num_layers, num_tokens)
        except PresetError as error:
            found = re.search(rf"{which} reachable keep is ([\d.e-]+)$", error.message)
            if found:
                tried += 1
                named = float(found.group(1))
                try:
                    reached = solve(places, named, num_layers, num_tokens)
                except PresetError as other:  # one count alone is possible, between two figures
                    assert which == "highest"
                    assert f"lowest reachable keep is {named + 1e-4:.4g}" in str(other)  # noqa: PT017
                else:
                    assert reached.keep_mean() <= named + 1e-6


def test_more_keep_never_gives_fewer_tokens() -> None:
    for places in ([ecl(2), horizon(24, 0.05)], [at_layer(0), horizon(24, 0.03)]):
        keeps = [percent / 100 for percent in range(5, 100)]
        seen = [sum(solve(places, keep, 32, 576).tokens_by_layer()) for keep in keeps]
        assert seen == sorted(seen)


# -- quotas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "sizes", "shares"),
    [
        (9, [5, 5, 5], [3, 3, 3]),
        (8, [5, 5, 5], [3, 3, 2]),  # ties to the earlier
        (7, [5, 5, 5], [3, 2, 2]),
        (9, [10, 1, 10, 10], [3, 1, 3, 2]),  # what is not used is shared, not given to the first
        (8, [5, 1, 5], [4, 1, 3]),
        (11, [2, 2, 9], [2, 2, 7]),
        (3, [1, 1, 1], [1, 1, 1]),
        (0, [4, 4], [0, 0]),
        (8, [4, 4], [4, 4]),
        (0, [], []),
        (1, [4] * 5, [0, 0, 1, 0, 0]),
        (2, [4] * 8, [0, 0, 1, 0, 0, 0, 1, 0]),
        (4, [4] * 5, [1, 1, 0, 1, 1]),
    ],
)
def test_quotas(count: int, sizes: list[int], shares: list[int]) -> None:
    assert quotas(count, sizes) == shares


def test_quotas_are_as_equal_as_the_sizes_allow() -> None:
    generator = random.Random(2)
    for _ in range(2000):
        sizes = [generator.randint(1, 9) for _ in range(generator.randint(1, 9))]
        count = generator.randint(0, sum(sizes))
        shares = quotas(count, sizes)
        assert sum(shares) == count
        assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
        if count >= len(sizes):
            assert min(shares) >= 1
            room = [share for share, size in zip(shares, sizes, strict=True) if share < size]
            assert not room or max(shares) - min(room) <= 1, (count, sizes, shares)
            assert room == sorted(room, reverse=True)  # the remainder goes to the earlier


@pytest.mark.parametrize("count", range(1, 12))
def test_fewer_tokens_than_groups_are_spread_evenly(count: int) -> None:
    shares = quotas(count, [3] * 12)
    assert sum(shares) == count
    chosen = [i for i, share in enumerate(shares) if share]
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert abs(chosen[0] - (11 - chosen[-1])) <= 1


def test_a_horizon_past_the_last_layer_cuts_nothing_and_says_so() -> None:
    assert resolve_layer("horizon", 8, 1, 8) == 8
    solved = solve([Place("ecl", 1), Place("horizon", 8, 0.1)], 0.5, 8, 100)
    assert [cut.layer for cut in solved.cuts] == [1]
    assert "past its last layer: the stage there does not cut" in solved.warnings[0]


@pytest.mark.parametrize(
    ("drops_all", "expected"),
    # 2.4 of 8 layers: two whole ones and 40 of 100 tokens' worth in six; or two whole ones
    [(False, [(2, 6)]), (True, [(2, 0)])],
)
def test_a_free_stage_past_the_last_layer_still_meets_the_budget(
    drops_all: bool, expected: list[tuple[int, int]]
) -> None:
    solved = solve([Place("horizon", 8, None, drops_all)], 0.3, 8, 100)
    assert cuts(solved) == expected


# -- after a stage at pixels ----------------------------------------------------------------------


def test_fractions_are_of_the_undropped_tokens_also_after_pixels() -> None:
    """1000 tokens, 400 left: 0.2 over 10 layers is 2000, of which layers 0 and 1 see 800."""
    schedule = solve([at_layer(2)], 0.2, 10, 1000, num_input=400)
    assert cuts(schedule) == [(2, 150)]
    whole = schedule.after_pixels(400)
    assert [(cut.stage, cut.layer, cut.count) for cut in whole.cuts] == [(0, 0, 400), (1, 2, 150)]
    assert whole.tokens_by_layer() == [400] * 2 + [150] * 8
    assert whole.keep_mean() == 0.2


def test_a_stage_with_its_own_keep_leaves_that_of_all_tokens_or_what_there_is() -> None:
    places = [at_layer(2, 0.5), at_layer(4, 0.1)]
    assert cuts(solve(places, None, 10, 1000, num_input=700)) == [(2, 500), (4, 100)]
    assert cuts(solve(places, None, 10, 1000, num_input=300)) == [(2, 300), (4, 100)]
    assert cuts(solve(places, None, 10, 1000, num_input=60)) == [(2, 60), (4, 60)]


def test_a_cut_that_keep_could_not_reach_may_be_reached_after_pixels() -> None:
    with pytest.raises(PresetError, match="lowest reachable keep"):
        solve([at_layer(5)], 0.3, 10, 1000)
    assert cuts(solve([at_layer(5)], 0.3, 10, 1000, num_input=400)) == [(5, 200)]


def test_a_free_stage_keeps_all_that_is_left_where_keep_asks_for_more() -> None:
    schedule = solve([at_layer(2)], 0.5, 10, 1000, num_input=300)
    assert cuts(schedule) == [(2, 300)]
    (warning,) = schedule.warnings
    assert "keep 0.5 asks for more than the 300 of 1000 tokens" in warning
    assert schedule.after_pixels(300).keep_mean() == 0.3


def test_later_named_stages_rise_before_that() -> None:
    """0.25 is 2500 over 10 layers; 300 in the first 6 are 1800, and 175 in each of the last 4."""
    places = [ecl(2), horizon(6, 0.05)]
    schedule = solve(places, 0.25, 10, 1000, num_input=300)
    assert cuts(schedule) == [(2, 300), (6, 175)]
    assert "they keep more" in schedule.warnings[0]
    assert cuts(solve(places, 0.5, 10, 1000, num_input=300)) == [(2, 300), (6, 300)]


def test_a_free_stage_that_drops_all_does_not_cut_where_all_may_stay() -> None:
    places = [Place("horizon", 7, None, drops_all=True)]
    assert cuts(solve(places, 0.2, 10, 1000, num_input=400)) == [(5, 0)]
    schedule = solve(places, 0.5, 10, 1000, num_input=400)
    assert cuts(schedule) == []
    assert "asks for more than the 400" in schedule.warnings[0]


def test_a_schedule_of_its_own_goes_on_from_what_is_left() -> None:
    profile = CutProfile((0.2, 0.6), lambda t: (t, t * t))
    places = [Place("schedule", layer, profile=profile, part=n) for n, layer in enumerate((2, 6))]
    schedule = solve(places, 0.2, 10, 1000, num_input=400)
    (_, first), (_, second) = cuts(schedule)
    assert 400 > first > second
    assert 2 * 400 + 4 * first + 4 * second <= 2000 < 2 * 400 + 4 * (first + 2) + 4 * (second + 2)
    schedule = solve(places, 0.5, 10, 1000, num_input=400)
    assert cuts(schedule) == [(2, 400), (6, 400)]
    assert "asks for more than the 400" in schedule.warnings[0]


@pytest.mark.parametrize(
    ("depth", "lowest", "told"),
    [(0, 0.3334, "raise keep"), (0.1, 0.4, "raise keep"), (0.2, 0.4667, "raise keep, or name")],
)
def test_a_schedule_that_begins_at_the_input_has_no_earlier_place(
    depth: float, lowest: float, told: str
) -> None:
    profile = CutProfile((depth, 0.7), lambda t: (t, t))
    places = [Place("schedule", layer, profile=profile, part=part)
              for part, layer in enumerate(profile.layers(10))]  # fmt: skip
    with pytest.raises(PresetError) as caught:
        solve(places, 0.01, 10, 3)
    assert caught.value.message.endswith(f"the lowest reachable keep is {lowest}")
    assert caught.value.hint.partition(" a place")[0] == told


def test_pixels_alone_are_one_cut() -> None:
    schedule = solve([], 0.5, 10, 1000, num_input=437).after_pixels(437)
    assert cuts(schedule) == [(0, 437)]
    assert schedule.keep_mean() == 0.437
    assert solve([], 0.5, 10, 0, num_input=0).after_pixels(0).cuts == ()
