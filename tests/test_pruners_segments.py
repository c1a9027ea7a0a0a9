"""Methods that cut a video into segments: FastVID and FlashVID by their definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_pruners_attention import scheduled
from test_pruners_video import clip, moving

from vtprune.errors import ModelError
from vtprune.pruners import create, fastvid, flashvid
from vtprune.pruners.base import Budget, Selection, VisualTokens, merge
from vtprune.pruners.contract import tokens_of
from vtprune.pruners.fastvid import FrameSegments, Patches, find_segments
from vtprune.pruners.flashvid import (
    choose_by_weight,
    chosen_of_frames,
    cut_weakest,
    parts_of,
    trees_of_segments,
)
from vtprune.pruners.similarity import unit_rows
from vtprune.tokens.layout import Layout


def choose(
    method: str,
    layout: Layout,
    states: list[list[float]],
    attention: list[float],
    count: int,
    **options: object,
) -> Selection:
    given = {
        "hidden": torch.tensor(states)[:, None], "tower_attention": torch.tensor(attention),
    }  # fmt: skip
    budget = Budget.share(count, layout.groups("all"))
    return create(method, options).select(VisualTokens(layout, given), budget)


def segments_of(layout: Layout, states: torch.Tensor, per: str = "all") -> FrameSegments:
    budget = Budget.share(1, layout.groups(per))
    attention = torch.ones(len(states))
    return find_segments(layout, states, attention, budget.group, budget.quota)[0]


# -- segments -------------------------------------------------------------------------------------


def turned(steps: list[float]) -> torch.Tensor:
    """Rows of which each is turned from the one before by so many degrees."""
    angle = torch.tensor([0.0, *steps]).cumsum(0) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_segments_end_where_frames_differ_and_are_at_least_eight() -> None:
    # cos 30 and 40 degrees are below 0.9; five more of the nine steps make eight segments.
    states = turned([1, 2, 30, 3, 4, 5, 40, 6, 7])
    assert segments_of(clip(10, 1, 1), states).segment.tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert segments_of(clip(10, 1, 1), turned([30] * 9)).segment.tolist() == list(range(10))
    assert segments_of(clip(3, 1, 1), turned([1, 1])).segment.tolist() == [0, 1, 2]


def test_frames_are_compared_by_their_means_and_videos_are_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fastvid, "SEGMENTS", 1)
    # Each frame's two places are a right angle apart, and change places.
    states = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0], [1, 0], [1, 0], [1, 0], [1, 0]])
    assert segments_of(clip(4, 1, 2), states).segment.tolist() == [0, 0, 1, 1]
    assert segments_of(clip(2, 1, 2, videos=2), states).segment.tolist() == [0, 0, 1, 1]
    assert segments_of(clip(2, 1, 2, videos=2), states[:1].repeat(8, 1)).segment[2] == 1
    assert segments_of(clip(4, 1, 2), states, "frame").segment.tolist() == [0, 1, 2, 3]


# -- fastvid --------------------------------------------------------------------------------------

EARLY = [[4.0, 0.0], [4.0, 1.0], [0.0, 4.0], [2.0, 2.0]]  # at 0, 14, 90 and 45 degrees
LATE = [[4.0, 0.5], [4.0, 2.0], [0.5, 4.0], [2.0, 2.0]]  # at 7, 27, 83 and 45 degrees


def test_fastvid_keeps_attended_tokens_and_merges_the_rest_into_anchors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One segment of five frames. Of 7 tokens two frames have 2, half of them anchors: one in the
    # first frame and one in the fifth; the last place is attended to everywhere. Of the others in
    # frame 0 the squared distances are 1, 25 and 32, of frame 4 2.25, 16.25 and 24.5: the second
    # place is densest.
    monkeypatch.setattr(fastvid, "SEGMENTS", 1)
    states = EARLY * 3 + LATE * 2
    attention = [0.1, 0.1, 0.1, 0.9] * 5
    chosen = choose("fastvid", clip(5, 1, 4), states, attention, 7, contextual=0.5)
    assert chosen.index.tolist() == [1, 3, 7, 11, 15, 17, 19]
    # To the nearer of 14 and 27 degrees.
    assert chosen.assign is not None
    assert chosen.assign.view(5, 4).tolist() == [
        [0, 0, 5, 1], [0, 0, 5, 2], [0, 0, 5, 3], [0, 5, 5, 4], [0, 5, 5, 6],
    ]  # fmt: skip
    # An anchor has 0.6 of itself, and all of its 8 and 7 have equal parts of 0.4, itself included.
    assert chosen.weight is not None
    shares = [0.65, 0.05, 0.6 + 0.4 / 7, 0.4 / 7, 1]
    assert chosen.weight[[1, 0, 17, 2, 3]].tolist() == pytest.approx(shares)


def test_fastvid_merges_nothing_into_another_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two segments of two frames, 2 tokens each: two anchors in the segment's last frame.
    monkeypatch.setattr(fastvid, "SEGMENTS", 1)
    states = EARLY * 2 + [[-x, -y] for x, y in EARLY] * 2
    attention = [0.1, 0.1, 0.1, 0.9] * 4
    chosen = choose("fastvid", clip(4, 1, 4), states, attention, 8, contextual=0.5)
    assert chosen.index.tolist() == [3, 4, 5, 7, 11, 12, 13, 15]
    assert chosen.assign is not None
    assert chosen.assign.tolist()[:8] == [1, 2, 2, 0, 1, 2, 2, 3]
    assert chosen.assign.tolist()[8:] == [5, 6, 6, 4, 5, 6, 6, 7]


def test_fastvid_has_anchors_in_the_last_frame_of_a_segment_and_every_fourth_before() -> None:
    assert fastvid.with_anchors([3]) == [3]
    assert fastvid.with_anchors([3, 4, 5, 6]) == [6]
    assert fastvid.with_anchors([3, 4, 5, 6, 7, 8]) == [4, 8]


def test_fastvid_rounds_the_anchors_of_each_frame_down() -> None:
    # Three frames of ten tokens, 4 of each: 0.4 of that is 1.6, in all 3 anchors and not 4.
    states = torch.ones(30, 2)
    video = replace(
        segments_of(clip(3, 1, 10), states),
        segment=torch.zeros(3, dtype=torch.long),
        quota=torch.tensor([12]),
    )
    anchors, attended = fastvid.FastVid().share(video)
    assert (anchors.tolist(), attended.tolist()) == ([0, 0, 3], [3, 3, 3])


def test_frames_share_a_budget_equally_whatever_their_segments() -> None:
    # 2 of each frame: of one for each segment and 4 by their tokens, the second would have 2.33.
    assert two_segments(6).shares().tolist() == [2, 2, 2]
    assert two_segments(10).shares().tolist() == [4, 3, 3]


def test_fastvid_without_anchors_keeps_the_attended_and_drops_the_rest() -> None:
    attention = [0.1, 0.3, 0.2, 0.9, 0.1, 0.2, 0.8, 0.3]
    chosen = choose("fastvid", clip(2, 1, 4), EARLY + LATE, attention, 4, contextual=0)
    assert chosen.index.tolist() == [1, 3, 6, 7]
    assert chosen.assign is not None
    assert chosen.assign.tolist() == [-1, 0, -1, 1, -1, -1, 2, 3]


# -- flashvid -------------------------------------------------------------------------------------

# Three frames of four places: what is east, north and west in the first is at other places in the
# second, where one thing is new (south-west); in the third one more is (west again). The last place
# is attended to.
MOVING = [
    [4, 0], [0, 4], [-4, 0], [1, 3],
    [0, 4.2], [4, 0.4], [-3, -3], [1, 3],
    [-4, 0.4], [0.4, 4], [4, 1], [1, 3],
]  # fmt: skip
ATTENDED = [0.0, 0.0, 0.0, 1.0] * 3


def test_flashvid_chains_what_moves_and_clusters_the_trees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of 6 tokens 2 are each frame's, of which 1 is chosen; 3 are of the trees: 0-5-10, 1-4-9, 2, 6
    # and 8, which begin in frames 0, 0, 0, 1 and 2, so that each frame keeps one.
    monkeypatch.setattr(fastvid, "SEGMENTS", 1)
    monkeypatch.setattr(flashvid, "CHOSEN", 0.5)
    chosen = choose("flashvid", clip(3, 1, 4), MOVING, ATTENDED, 6)
    assert chosen.index.tolist() == [0, 3, 6, 7, 8, 11]
    assert chosen.assign is not None
    assert chosen.assign.tolist() == [0, 0, 0, 1, 0, 0, 2, 3, 4, 0, 0, 5]
    # A third for each tree of the first frame, a third of that for each token of the long ones.
    assert chosen.weight is not None
    expected = [1 / 9, 1 / 9, 1 / 3, 1, 1 / 9, 1 / 9, 1, 1, 1, 1 / 9, 1 / 9, 1]
    assert chosen.weight.tolist() == pytest.approx(expected)


def test_flashvid_links_what_is_as_similar_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    # South-west is 45 degrees from west, and west in the third frame 51 degrees from that.
    monkeypatch.setattr(fastvid, "SEGMENTS", 1)
    monkeypatch.setattr(flashvid, "CHOSEN", 0.5)
    chosen = choose("flashvid", clip(3, 1, 4), MOVING, ATTENDED, 6, similar=0.6)
    assert chosen.index.tolist() == [0, 1, 2, 3, 7, 11]
    assert chosen.assign is not None
    assert chosen.assign.tolist() == [0, 1, 2, 3, 1, 0, 2, 4, 2, 1, 0, 5]
    merged = merge(torch.tensor(MOVING, dtype=torch.float32), chosen)
    torch.testing.assert_close(merged[0], torch.tensor([4.0, 1.4 / 3]))


def test_flashvid_links_what_is_exactly_as_similar_as_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The first token of the second frame is at a cosine of 1/2 to the first of the first, the next
    # ones are the same, the last ones are attended to. Without the link 0 and 1 would be one.
    states = [[1.0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 3, 0], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 3, 0]]
    monkeypatch.setattr(fastvid, "SEGMENTS", 1)
    monkeypatch.setattr(flashvid, "CHOSEN", 0.5)
    kept = choose("flashvid", clip(2, 1, 3), states, [0.0, 0.0, 1.0] * 2, 4, similar=0.5)
    assert kept.index.tolist() == [0, 1, 2, 5]


def test_flashvid_links_nothing_over_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    # With eight segments at least, each of the three frames is one: no tree has two tokens.
    monkeypatch.setattr(flashvid, "CHOSEN", 0.5)
    chosen = choose("flashvid", clip(3, 1, 4), MOVING, ATTENDED, 6)
    assert chosen.assign is not None
    frames = torch.arange(12) // 4
    used = chosen.assign >= 0
    assert torch.equal(frames[chosen.index[chosen.assign[used]]], frames[used])


def test_the_weakest_links_are_cut_where_trees_are_few() -> None:
    tokens = torch.arange(6).split(3)
    zeros = torch.zeros(2, dtype=torch.long)
    video = FrameSegments(torch.arange(6) // 3, zeros, zeros, torch.tensor([5]), tuple(tokens))
    parent = torch.tensor([-1, -1, -1, 0, 1, 1])
    similarity = torch.tensor([0, 0, 0, 0.9, 0.8, 0.85])
    cut_weakest(video, parent, similarity, torch.ones(6, dtype=torch.bool), [5])
    assert parent.tolist() == [-1, -1, -1, 0, -1, -1]


def two_segments(*quota: int) -> FrameSegments:
    """Two frames of four tokens in the first, and one in the second."""
    tokens = torch.arange(12).split(4)
    segment, group = torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.long)
    return FrameSegments(torch.arange(12) // 4, segment, group, torch.tensor(quota), tuple(tokens))


def test_what_flashvid_chooses_is_rounded_up_and_a_segment_keeps_trees_for_the_rest() -> None:
    # 2 of each frame: 1.4. 3 of each: 2.1. Of 10, 4 and twice 3: 2.8, and one tree in the first.
    for quota, chosen, trees in (
        (6, [2, 2, 2], [0, 0]), (9, [3, 3, 3], [0, 0]), (10, [3, 3, 3], [1, 0]),
    ):  # fmt: skip
        video = two_segments(quota)
        num_chosen = chosen_of_frames(video)
        assert num_chosen.tolist() == chosen
        assert trees_of_segments(video, num_chosen) == trees


def test_a_segment_clusters_its_own_trees() -> None:
    # The first keeps both of the trees of its first frame, the second 2 of its 4; of all trees
    # together 4 of 6 would be 1 and 3.
    root = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]).bool()
    parts = parts_of(two_segments(10), root, [2, 2])
    assert [(members.tolist(), count) for members, count in parts] == [
        ([0, 1], 2), ([8, 9, 10, 11], 2),
    ]  # fmt: skip


def test_a_relevance_below_zero_counts_as_zero() -> None:
    tokens, zero = torch.arange(3), torch.zeros(1, dtype=torch.long)
    video = FrameSegments(torch.zeros_like(tokens), zero, zero, torch.tensor([3]), (tokens,))
    states = torch.tensor([[2.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])  # their mean is (1, 0)
    patches = Patches(states, torch.ones(3), states.mean(dim=0, keepdim=True))
    assert flashvid.relevance(video, patches).tolist() == [2.0, 2.0, 0.0]


def test_distances_count_by_the_weight_of_the_token() -> None:
    # To the nearest neighbour: 0, 0, 0.29 and 0.29, the last of which has more weight. From it,
    # 0.29 each, times 1, 0.9 and 0.5; then 0 is a copy of what is chosen.
    rows = unit_rows(torch.tensor([[1.0, 0], [2, 0], [0, 1], [1, 1]]))
    weight = torch.tensor([1.0, 0.9, 0.5, 0.6])
    for count, kept in ((1, [3]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])):
        budget = Budget.share(count, torch.zeros(4, dtype=torch.long))
        assert choose_by_weight(rows, weight, budget).tolist() == kept


def test_both_cuts_of_flashvid_are_the_published_ones() -> None:
    # 1.25 x 0.1 of 6,272 at the input, 0.3 of them from layer 20 of 28 on.
    assert scheduled("flashvid", 0.1, 28, 6272) == [(0, 784), (20, 235)]


# -- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fastvid", "flashvid"])
def test_a_newline_stays_where_all_patches_do(method: str) -> None:
    layout = clip(3, 2, 3, newline=True)
    tokens = tokens_of(layout)
    for count in (1, 5, 18):
        budget = Budget.share(count, layout.groups("all"))
        selection = create(method, {}).select(tokens, budget)
        assert 18 not in selection.index.tolist()
        assert selection.assign is not None
        assert selection.assign[18] == -1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("state", ["tower_attention", "hidden"])
@pytest.mark.parametrize("method", ["fastvid", "flashvid"])
def test_what_is_not_finite_is_refused(method: str, state: str, bad: float) -> None:
    layout = clip(3, 2, 3)
    tokens = tokens_of(layout)
    tokens.states[state][..., 3] = bad
    with pytest.raises(ModelError, match=f"NaN or infinity, so {method} can't rank"):
        create(method, {}).select(tokens, Budget.share(7, layout.groups("all")))


@pytest.mark.parametrize("method", ["fastvid", "flashvid"])
def test_a_long_video_keeps_its_count_at_every_budget(method: str) -> None:
    layout = clip(12, 2, 3, videos=2)
    given = {"hidden": moving(layout)[:, None], "tower_attention": torch.rand(144)}
    for count in (1, 3, 20, 60, 100, 143):
        budget = Budget.share(count, layout.groups("all"))
        selection = create(method, {}).select(VisualTokens(layout, given), budget)
        assert len(selection.index) == count
        assert bool(merge(given["hidden"][:, 0], selection).isfinite().all())
