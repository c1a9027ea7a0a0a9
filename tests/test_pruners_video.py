"""Methods for videos: what changed, what is unusual, what can be merged over time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny
import torch
from conftest import shared_model
from other_device import devices

import vtprune
from vtprune.device import with_float64
from vtprune.errors import ModelError, PresetError
from vtprune.pruners import METHODS, create
from vtprune.pruners.base import Budget, Selection, VisualTokens, merge
from vtprune.pruners.holitom import (
    NEIGHBOURS,
    HoliTom,
    cluster_heads,
    cut_into_stretches,
    parts_of,
)
from vtprune.pruners.similarity import density_peaks
from vtprune.pruners.vidcom2 import WIDTHS, frame_quotas, steady_rows
from vtprune.tokens.layout import NEWLINE, Layout, box, join, lay_out, single
from vtprune.tokens.quotas import weighted_quotas

VIDEO = ("evs", "dycoke", "vidcom2", "holitom")
"""Those that read hidden states alone."""


def clip(frames: int, rows: int, cols: int, newline: bool = False, videos: int = 1) -> Layout:
    grid = box(frames, rows, cols)
    if newline:
        grid = join([grid, single(NEWLINE, frame=frames - 1, row=rows - 1, col=cols)])
    return lay_out({"video": torch.arange(videos * len(grid))}, {"video": [grid] * videos})


def select(
    method: str, layout: Layout, rows: Sequence[Sequence[float]] | torch.Tensor, count: int,
    per: str = "all",
) -> Selection:  # fmt: skip
    states = torch.as_tensor(rows, dtype=torch.float32)[:, None]
    budget = Budget.share(count, layout.groups(per))
    return create(method, {}).select(VisualTokens(layout, {"hidden": states}), budget)


def moving(layout: Layout, width: int = 16, seed: int = 0) -> torch.Tensor:
    """States of which half of the places stay about as they are from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(layout), width, generator=generator)
    base = torch.randn(64, width, generator=generator)
    place = layout.grid.row * 8 + layout.grid.col
    still = place % 2 == 0
    return torch.where(still[:, None], base[place] + 0.05 * noise, noise)


# -- evs ------------------------------------------------------------------------------------------

# Frame by frame, two places: the first stays, then turns by a cosine of 0.6; the second turns by a
# right angle, then stays. Changes of tokens 2 to 5: 0, 1, 0.4, 0. Token 6 is a newline.
TURNING = [[1, 0], [0, 1], [1, 0], [1, 0], [0.6, 0.8], [1, 0], [9, 9]]


@pytest.mark.parametrize(
    ("count", "kept"),
    [
        (2, [0, 1]),
        (3, [0, 1, 3]),
        (4, [0, 1, 3, 4]),
        (5, [0, 1, 2, 3, 4]),
        (6, [0, 1, 2, 3, 4, 5]),
        (7, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_evs_keeps_the_first_frame_then_what_changed_most(count: int, kept: list[int]) -> None:
    layout = clip(3, 1, 2, newline=True)
    assert select("evs", layout, TURNING, count).index.tolist() == kept


def test_evs_gives_a_first_frame_that_does_not_fit_its_equal_share() -> None:
    layout = clip(2, 3, 3)
    states = torch.eye(9).repeat(2, 1)
    states[10], states[13] = states[0], states[1]  # two places of the second frame change
    # Nine tokens do not fit into 4: 2 for each frame, a regular sub-grid of the first.
    kept = select("evs", layout, states, 4).index.tolist()
    assert kept[2:] == [10, 13]
    assert all(number < 9 for number in kept[:2])
    assert kept[:2] == select("uniform", clip(1, 3, 3), states[:9], 2).index.tolist()
    assert select("evs", layout, states, 9).index.tolist() == list(range(9))


def test_evs_in_every_frame_keeps_what_changed_most_there() -> None:
    layout = clip(3, 1, 2)
    assert select("evs", layout, TURNING[:6], 3, "frame").index.tolist()[1:] == [3, 4]


def test_evs_compares_within_each_video() -> None:
    layout = clip(2, 1, 2, videos=2)
    states = [[1, 0], [0, 1], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1], [1, 0]]
    assert select("evs", layout, states, 6).index.tolist() == [0, 1, 3, 4, 5, 7]


def test_evs_takes_a_place_that_was_not_there_before_for_new() -> None:
    layout = clip(3, 1, 2).take(torch.tensor([0, 2, 3, 4, 5]))  # as after an earlier cut
    states = [[1, 0], [0, 1], [1, 0], [0, 1], [0, 1]]
    # Changes: 1, new, 0 and 1; the frame before the last has the second place, the first has not.
    assert select("evs", layout, states, 2).index.tolist() == [0, 2]
    assert select("evs", layout, states, 3).index.tolist() == [0, 1, 2]


def test_evs_sees_no_change_between_rows_of_zeros() -> None:
    layout = clip(3, 1, 2)
    states = [[0, 0], [1, 0], [0, 0], [0, 1], [0, 0], [0, 1]]
    assert select("evs", layout, states, 3).index.tolist() == [0, 1, 3]


# -- dycoke ---------------------------------------------------------------------------------------

# Six frames of two places and a newline: two windows, of four frames and of two. Changes in the
# first: frame 1 from 0: 0, 1; frame 2 from 0: 0.4, 1 (and 0.4, 0 from frame 1); frame 3 from 2:
# 1, 0. In the second: frame 5 from 4: 0.2, 0.
WINDOWS = [
    [1, 0], [0, 1], [1, 0], [1, 0], [0.6, 0.8], [1, 0], [-0.8, 0.6], [1, 0],
    [0, 1], [0, 1], [0.6, 0.8], [0, 2], [9, 9],
]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "kept"),
    [
        (4, [0, 1, 8, 9]),  # the first frames of both windows
        (5, [0, 1, 6, 8, 9]),  # one of the middle one of the four frames that are compared
        (8, [0, 1, 3, 5, 6, 8, 9, 10]),  # one of each
        (10, [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]),  # two of the earlier ones
        (12, list(range(12))),
        (13, list(range(13))),
        (2, [1, 9]),  # less than the first frames: an equal, regular part of each
    ],
)
def test_dycoke_keeps_the_first_frame_of_four_and_what_changed_most(
    count: int, kept: list[int]
) -> None:
    assert select("dycoke", clip(6, 1, 2, newline=True), WINDOWS, count).index.tolist() == kept


def test_dycoke_at_the_papers_ratio_drops_seven_tenths_of_three_frames_of_four() -> None:
    layout = clip(8, 2, 5)
    index = select("dycoke", layout, moving(layout), 38).index  # 80 x (1/4 + 3/4 x 0.3) = 38
    assert torch.bincount(layout.grid.frame[index]).tolist() == [10, 3, 3, 3] * 2


def test_dycoke_in_every_frame_keeps_what_changed_most_there() -> None:
    index = select("dycoke", clip(6, 1, 2), WINDOWS[:12], 6, "frame").index.tolist()
    assert index[1:4] == [3, 5, 6]
    assert index[5] == 10


def test_dycoke_takes_a_place_that_its_window_has_lost_for_new() -> None:
    layout = clip(3, 1, 2).take(torch.tensor([0, 2, 3, 4, 5]))  # as after an earlier cut
    states = [[1, 0], [1, 0], [0, 1], [0.6, 0.8], [0, 1]]
    # The first frame has no second place: both tokens there are new, 1 and 3 change by 0 and 0.4.
    assert select("dycoke", layout, states, 3).index.tolist() == [0, 2, 4]
    assert select("dycoke", layout, states, 4).index.tolist() == [0, 1, 2, 4]


def test_dycoke_counts_the_frames_that_are_left_in_fours() -> None:
    # Without the second frame the windows begin at the first and at the sixth.
    layout = clip(6, 1, 2).take(torch.tensor([0, 1, *range(4, 12)]))
    states = [WINDOWS[number] for number in (0, 1, *range(4, 12))]
    assert select("dycoke", layout, states, 4).index.tolist() == [0, 1, 8, 9]


def test_dycoke_keeps_a_newline_of_a_first_frame_where_all_tokens_stay() -> None:
    layout = clip(5, 1, 2, newline=True)
    states = [*WINDOWS[:10], WINDOWS[-1]]
    assert select("dycoke", layout, states, 11).index.tolist() == list(range(11))
    assert 10 not in select("dycoke", layout, states, 10).index.tolist()


# -- vidcom2 --------------------------------------------------------------------------------------


def usual(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """Rows with as many channels that vary more, which are not looked at."""
    own = torch.tensor(rows)
    return torch.cat([own, 50 * torch.randn(own.shape, generator=torch.manual_seed(0))], dim=1)


def test_vidcom2_gives_the_unusual_frame_more_and_keeps_the_outlier() -> None:
    # The second frame has the one token that is unlike all others, so it is further from the
    # video's mean: the softmax at 0.01 gives it all, and the weights are 4 (1 + 0 - 1/2) = 2 and
    # 4 (1 + 1 - 1/2) = 6. Of 4 tokens it has 3: the outlier, and the earliest of equal ones.
    states = usual([[1, 0], [1, 0], [1, 0], [1, 0], [1, 0], [1, 0], [1, 0], [0, 1]])
    layout = clip(2, 2, 2)
    assert select("vidcom2", layout, states, 4).index.tolist() == [0, 4, 5, 7]
    assert select("vidcom2", layout, states, 4, "frame").index.tolist() == [0, 1, 4, 7]


@pytest.mark.parametrize("spread", [0.0, 1e-6, 0.1, 5.0])
@pytest.mark.parametrize("sizes", [[7], [4] * 6, [196] * 32, [1, 9, 3, 5, 2, 9]])
def test_frames_share_on_the_device_as_quotas_by_weight_do(sizes: list[int], spread: float) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    for count in sorted({1, 2, len(sizes), sum(sizes) // 3, sum(sizes) // 2, sum(sizes)}):
        unusual = spread * torch.rand(len(sizes), generator=generator, dtype=torch.float64)
        weights = torch.tensor(sizes) * (1 + (unusual / 0.01).softmax(0) - 1 / len(sizes))
        shares = weights.tolist()
        least = int(count * min(shares) < sum(shares))
        expected = weighted_quotas(count, sizes, shares, least)
        assert frame_quotas(count, sizes, weights).tolist() == expected


def test_vidcom2_shares_on_the_cpu_where_a_device_has_no_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = {name: with_float64(torch.device(name)).type for name in ("mps", "cuda", "cpu")}
    assert places == {"mps": "cpu", "cuda": "cuda", "cpu": "cpu"}
    layout = clip(3, 2, 4)
    states = moving(layout)
    here = select("vidcom2", layout, states, 9)
    monkeypatch.setattr("vtprune.pruners.vidcom2.with_float64", lambda device: torch.device("cpu"))
    with devices():
        there = select("vidcom2", layout, states.to("cuda:0"), 9)
    assert there.index.tolist() == here.index.tolist()


def test_vidcom2_takes_an_equal_share_off_every_frame_before_the_unusual_gets_its_own() -> None:
    # 16 (1 + 0 - 1/2) and 16 (1 + 1 - 1/2): a quarter and three quarters.
    states = usual([[1, 0]] * 31 + [[0, 1]])
    frames = select("vidcom2", clip(2, 4, 4), states, 16).index // 16
    assert torch.bincount(frames).tolist() == [4, 12]


def test_vidcom2_scores_by_the_published_kernels() -> None:
    states = moving(clip(3, 2, 4))
    rows = steady_rows(states)
    frames = rows.view(3, 8, -1)
    expected = sum(
        torch.exp(-(frames - mean).square().sum(-1) / (2 * 2.0**power))
        for power in range(-3, 2)
        for mean in (rows.mean(0), frames.mean(1, keepdim=True))
    )
    assert tuple(2.0**power for power in range(-3, 2)) == WIDTHS
    best = expected.argsort(dim=1)[:, :2].sort().values + torch.tensor([[0], [8], [16]])
    chosen = select("vidcom2", clip(3, 2, 4), states, 6, "frame").index
    assert chosen.tolist() == best.flatten().tolist()


def test_vidcom2_looks_at_the_channels_that_vary_least() -> None:
    states = torch.randn(20, 6) * torch.tensor([5.0, 0.1, 3.0, 0.2, 0.3, 4.0])
    expected = torch.nn.functional.normalize(states[:, [1, 3, 4]], dim=1)
    torch.testing.assert_close(steady_rows(states), expected)


def test_vidcom2_compares_each_frame_with_its_own_video() -> None:
    # Both videos are the same but for their direction: each frame is as usual as its twin.
    one = [[1, 0], [1, 0], [1, 0], [0, 1]]
    other = [[-1, 0], [-1, 0], [-1, 0], [0, -1]]
    chosen = select("vidcom2", clip(2, 1, 2, videos=2), usual([*one, *other]), 4).index
    # Weights of the frames: 2 (1 + 0 - 1/2) and 2 (1 + 1 - 1/2), so 1 and 3 of 8: 2 fit at most.
    assert chosen.tolist() == [2, 3, 6, 7] or chosen.tolist() == [0, 3, 4, 7]
    frames = clip(2, 1, 2, videos=2).groups("frame")[chosen]
    shares = torch.bincount(frames, minlength=4).tolist()
    assert shares[:2] == shares[2:]


# -- holitom --------------------------------------------------------------------------------------

# Four frames, two places: the first never changes, the second is another one from frame 2 on.
SCENES = [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1]]


def test_stretches_save_the_most_tokens() -> None:
    # One stretch saves the first place 3 times; two of two frames save both places once each.
    still = torch.tensor([[False, False], [True, True], [True, False], [True, True]])
    assert cut_into_stretches(still) == [(0, 1), (2, 3)]
    still[:, 1] = False
    assert cut_into_stretches(still) == [(0, 3)]
    assert cut_into_stretches(torch.zeros(3, 2, dtype=torch.bool)) == [(0, 0), (1, 1), (2, 2)]


def test_stretches_are_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(3)

    def saved(still: torch.Tensor, first: int, last: int) -> int:
        return int(still[first + 1 : last + 1].all(0).sum()) * (last - first)

    def best(still: torch.Tensor, frames: int) -> int:
        return max(
            (best(still, first) + saved(still, first, frames - 1) for first in range(frames)),
            default=0,
        )

    for _ in range(20):
        still = torch.rand(7, 5, generator=generator) < 0.7
        found = cut_into_stretches(still)
        assert [first for first, _ in found] == [0, *(last + 1 for _, last in found[:-1])]
        assert found[-1][1] == 6
        assert sum(saved(still, first, last) for first, last in found) == best(still, 7)


def test_holitom_merges_what_stays_the_same_into_its_first_token() -> None:
    chosen = select("holitom", clip(4, 1, 2), SCENES, 4)
    assert chosen.index.tolist() == [0, 1, 4, 5]
    assert chosen.assign is not None
    assert chosen.assign.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert chosen.weight is not None
    assert chosen.weight.tolist() == [0.5] * 8


def test_holitom_takes_frames_with_places_of_their_own() -> None:
    # What segments of a long video leave: places that not every frame has, and a newline.
    whole = clip(4, 1, 2)
    layout = whole.take(torch.tensor([0, 1, 2, 5, 6]))
    layout.grid.kind[-1] = NEWLINE
    states = torch.eye(5)[:, :3] + torch.arange(5)[:, None] * torch.tensor([1.0, -2.0, 0.5])
    chosen = select("holitom", layout, states.tolist(), 3)
    assert len(chosen.index) == 3


def test_holitom_with_room_to_spare_keeps_what_changed_most_on_its_own() -> None:
    states = torch.tensor(SCENES, dtype=torch.float32)
    states[6] = torch.tensor([0.9, 0.0, 0.1])  # a small change
    chosen = select("holitom", clip(4, 1, 2), states, 5)
    assert chosen.index.tolist() == [0, 1, 4, 5, 6]
    assert chosen.assign is not None
    assert chosen.assign.tolist() == [0, 1, 0, 1, 2, 3, 4, 3]
    assert chosen.weight is not None
    assert chosen.weight.tolist() == [0.5, 0.5, 0.5, 0.5, 1.0, 0.5, 1.0, 0.5]


def test_holitom_with_room_to_spare_keeps_patches_before_a_newline() -> None:
    states = torch.tensor([*SCENES, [9, 9, 9]], dtype=torch.float32)
    states[6] = torch.tensor([0.9, 0.0, 0.1])
    assert select("holitom", clip(4, 1, 2, newline=True), states, 5).index.tolist() == [
        0,
        1,
        4,
        5,
        6,
    ]


def test_holitom_clusters_runs_and_what_has_none_apart_by_one_ratio() -> None:
    # Two places repeat and two do not: half of the runs, and of the others in each frame.
    layout, head = clip(2, 1, 4), torch.tensor([0, 1, 2, 3, 0, 1, 6, 7])
    parts = parts_of(layout, head, Budget.share(3, layout.groups("all")))
    assert [(members.tolist(), count) for members, count in parts] == [
        ([2, 3], 1), ([0, 1], 1), ([6, 7], 1),
    ]  # fmt: skip


def test_holitom_counts_no_more_neighbours_than_it_keeps_tokens() -> None:
    # By the nearest two the pair is densest, then the first is farthest from it; of all seven the
    # fifth has the least to the others.
    states, tokens = torch.tensor([[0.0], [1], [2], [3], [4], [10], [10.1]]), torch.arange(7)
    kept, into = cluster_heads([(tokens, 2)], states, tokens)
    assert kept.tolist() == [0, 5]
    assert into.tolist() == [0, 0, 0, 0, 0, 5, 5]


def test_holitom_clusters_what_is_left_and_a_centre_keeps_most_of_itself() -> None:
    # Both runs of each scene are alike to the clustering: the earlier is the centre. Of it, its own
    # run of two has 0.6 and the other run 0.4.
    chosen = select("holitom", clip(4, 1, 2), SCENES, 2)
    assert chosen.index.tolist() == [0, 4]
    assert chosen.assign is not None
    assert chosen.assign.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert chosen.weight is not None
    assert chosen.weight.tolist() == pytest.approx([0.3, 0.2, 0.3, 0.2, 0.3, 0.2, 0.3, 0.2])
    merged = merge(torch.tensor(SCENES, dtype=torch.float32), chosen)
    torch.testing.assert_close(merged, torch.tensor([[0.6, 0.4, 0.0], [0.6, 0.0, 0.4]]))


def test_holitom_merges_what_is_more_similar_than_asked() -> None:
    states = torch.tensor([[1, 0], [0.8, 0.6], [1, 0]])  # one place: changes of 0.2
    layout = clip(3, 1, 1)
    tokens = VisualTokens(layout, {"hidden": states[:, None]})
    budget = Budget.share(1, layout.groups("all"))
    loose, strict = (
        create("holitom", {"similar": similar}).select(tokens, budget).assign
        for similar in ("0.79", "0.81")
    )
    assert loose is not None
    assert strict is not None
    assert loose.tolist() == [0, 0, 0]
    assert sorted(strict.tolist()) == [-1, -1, 0]  # a frame is a part of its own: nothing joins it


# Of every place the first frame's state and the second's; means (2, 1/4), (-3, -3/4), (-1/2, 15/4),
# (2, 1/4), (-11/4, 2).
DRIFTING = [
    [1.5, 0.5], [-3, -0.5], [-0.5, 3.5], [2, 0], [-3, 1.5],
    [2.5, 0], [-3, -1], [-0.5, 4], [2, 0.5], [-2.5, 2.5],
]  # fmt: skip


def test_holitom_clusters_the_means_of_runs() -> None:
    # All places repeat, three of the five runs are kept. Squared distances of the means over D = 2,
    # to the nearest three (itself included): 0 + 0 + 9.25, 0 + 3.8125 + 13, 0 + 4.0625 + 9.25 and
    # 0 + 3.8125 + 4.0625. The last is densest; the first and fourth, of one density, follow, and
    # 12.8125 is how far they are from it.
    for swapped in (DRIFTING, DRIFTING[5:] + DRIFTING[:5]):
        selected = select("holitom", clip(2, 1, 5), swapped, 3)
        assert selected.index.tolist() == [0, 3, 4]
        assert selected.assign is not None
        assert selected.assign.tolist() == [0, 2, 2, 1, 2] * 2
        assert selected.weight is not None
        # The last run has 0.6, the two that join it 0.2 each, of which each frame has half.
        expected = [0.5, 0.1, 0.1, 0.5, 0.3] * 2
        assert selected.weight.tolist() == pytest.approx(expected)


def test_holitom_asks_for_less_similar_runs_where_a_tenth_stays() -> None:
    # One place whose states turn by a cosine of 0.7, and nine that change.
    states = torch.eye(20)
    states[10] = 0.7 * states[0] + (1 - 0.49) ** 0.5 * states[19]
    for options, count, merged in (
        ({}, 2, True), ({}, 3, False),
        ({"similar": "0.8"}, 2, False), ({"similar": "0.6"}, 3, True),
    ):  # fmt: skip
        layout = clip(2, 1, 10)
        tokens = VisualTokens(layout, {"hidden": states[:, None]})
        budget = Budget.share(count, layout.groups("all"))
        with_run = create("holitom", options)
        assert isinstance(with_run, HoliTom)
        assert (with_run.least_similar(budget) < 0.7) == merged
        assign = with_run.select(tokens, budget).assign
        assert assign is not None
        assert (int(assign[10]) == int(assign[0])) == merged


def test_cluster_centres_are_one_of_each_cluster() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.arange(40) % 4
    rows = 3 * torch.eye(8)[truth] + 0.1 * torch.randn(40, 8, generator=generator)
    chosen, nearest = density_peaks(rows, 4, NEIGHBOURS)
    assert sorted(truth[chosen].tolist()) == [0, 1, 2, 3]
    assert torch.equal(truth[chosen[nearest]], truth)


def test_holitom_keeps_an_equal_ratio_of_every_frame_that_repeats_nothing() -> None:
    layout = clip(4, 2, 5)
    states = torch.eye(40)
    index = select("holitom", layout, states, 20).index
    assert torch.bincount(layout.grid.frame[index]).tolist() == [5] * 4


def test_holitom_in_every_frame_merges_across_frames_all_the_same() -> None:
    chosen = select("holitom", clip(4, 1, 2), SCENES, 4, "frame")
    # One of each frame. Frames 1 and 3 only hold what repeats, so one token of each stays alone.
    assert chosen.index.tolist() == [0, 2, 4, 6]
    assert chosen.assign is not None
    assert chosen.assign.tolist() == [0, 0, 1, 0, 2, 2, 3, 2]


def test_holitom_does_not_merge_over_a_frame_that_has_lost_the_place() -> None:
    layout = clip(3, 1, 2).take(torch.tensor([0, 1, 3, 4, 5]))
    states = [[1, 0], [0, 1], [0, 1], [1, 0], [0, 1]]
    chosen = select("holitom", layout, states, 3)
    assert chosen.assign is not None
    assert chosen.assign.tolist() == [0, 1, 1, 2, 1]


# -- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-3, 7.0])
@pytest.mark.parametrize("name", ["evs", "dycoke", "vidcom2"])
def test_a_longer_state_says_the_same(name: str, factor: float) -> None:
    layout = clip(5, 4, 6, newline=True)
    states = moving(layout)
    for count in (7, 40, 90):
        first, second = (select(name, layout, one, count) for one in (states, factor * states))
        assert torch.equal(first.index, second.index)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["evs", "dycoke", "holitom"])
def test_states_with_nan_are_refused(name: str, bad: float) -> None:
    layout = clip(5, 4, 6)
    states = moving(layout)
    states[30, 2] = bad
    with pytest.raises(ModelError, match=f"NaN or infinity, so {name} can't rank"):
        select(name, layout, states, 40)


@pytest.mark.parametrize("name", VIDEO)
def test_a_video_method_is_refused_for_pictures(name: str) -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "image")
    assert METHODS[name].modalities == ("video",)
    with (
        pytest.raises(PresetError, match=f"{name} takes video input only, .*image tokens"),
        vtprune.pruning(model, method=name, keep=0.4),
    ):
        model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("name", VIDEO)
@pytest.mark.parametrize("zeros", [slice(3, 12), slice(None)])
def test_rows_of_zeros_make_no_nan(name: str, zeros: slice) -> None:
    layout = clip(4, 2, 3, newline=True)
    states = moving(layout)
    states[zeros] = 0
    for per in ("all", "frame"):
        chosen = select(name, layout, states, 11, per)
        assert len(chosen.index) == 11
        if chosen.weight is not None:
            assert bool(merge(states, chosen).isfinite().all())
