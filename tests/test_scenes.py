"""Frames chosen by what they show, by hand: near-duplicates go, and every scene keeps a frame."""

from __future__ import annotations

import pytest
import torch

from vtprune.pruners.scenes import Scenes, fill_up, thumbnails_of
from vtprune.tokens.units import Units


def clip(levels: list[int], group: int = 1) -> Units:
    """A plain frame of each grey."""
    grey = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None]
    return Units("video", grey.expand(-1, 3, 32, 48), group)


def shrink(levels: list[int], num_frames: int, **options: float) -> list[int]:
    """Shrink one clip of 4 tokens a frame, of which nothing but repetitions went before."""
    method, units = Scenes(**options), clip(levels)
    (left,) = method.shrink([units], [method.keep(units)], [[4] * len(levels)], 4 * num_frames)
    return left


@pytest.mark.parametrize(
    ("tolerance", "kept"), [(0, [0, 2, 3, 4, 5]), (1, [0, 3, 5]), (2, [0, 4]), (255, [0])]
)
def test_a_frame_is_compared_with_the_last_one_that_was_kept(
    tolerance: float, kept: list[int]
) -> None:
    """A slow fade: every frame is near the one before it, but not near the last kept one."""
    assert Scenes(tolerance).keep(clip([10, 10, 11, 12, 13, 14])) == kept


def test_one_cell_that_changes_is_enough_to_stay() -> None:
    """A cell of 2 x 3 pixels, one of them 18 levels brighter in one colour: 3 levels."""
    pixels = torch.zeros(2, 3, 32, 48, dtype=torch.uint8)
    pixels[1, 2, 31, 47] = 18
    moved = Units("video", pixels)
    assert thumbnails_of(moved).shape == (2, 1, 3, 16, 16)
    assert float(thumbnails_of(moved).max()) == 3
    assert Scenes(2.9).keep(moved) == [0, 1]
    assert Scenes(3).keep(moved) == [0]


def test_a_frame_is_kept_where_the_scene_changes_whatever_the_tolerance() -> None:
    levels = [10, 12, 100, 102, 10, 12]
    assert Scenes(255).keep(clip(levels)) == [0, 2, 4]
    assert Scenes(255, scene=88).keep(clip(levels)) == [0, 4]  # changes of 88 and 92
    assert Scenes(255, scene=200).keep(clip(levels)) == [0]


def test_a_change_within_a_pair_of_frames_is_one_too() -> None:
    pairs = clip([10, 10, 10, 90, 90, 90, 90, 90, 90], group=2)
    assert len(pairs) == 5
    assert Scenes(255).keep(pairs) == [0, 1, 2]


def test_the_smallest_changes_go_first_down_to_the_budget() -> None:
    """Steps of 9, 1, 5 and 3; with the frame after 9 gone, the next one differs by 10."""
    levels = [0, 9, 10, 15, 18]
    left = [shrink(levels, number, tolerance=0) for number in (5, 4, 3, 2, 1, 0)]
    assert left == [[0, 1, 2, 3, 4], [0, 1, 3, 4], [0, 1, 3], [0, 2], [0], [0]]


def test_scenes_stay_before_all_else_and_the_weakest_goes_first() -> None:
    """Two scenes begin, by 90 and by 40 levels; within the first something moves by 25."""
    levels = [0, 25, 0, 25, 115, 115, 75, 75]
    left = [shrink(levels, number) for number in (6, 4, 3, 2, 1)]
    assert left == [[0, 1, 2, 3, 4, 6], [0, 2, 4, 6], [0, 4, 6], [0, 4], [0]]


def test_frames_of_equal_change_fill_a_budget_evenly() -> None:
    """Steps of 1, so a threshold of 1 leaves every second of nine frames: seven are allowed."""
    assert shrink(list(range(9)), 5, tolerance=0) == [0, 2, 4, 6, 8]
    assert shrink(list(range(9)), 7, tolerance=0) == [0, 1, 2, 4, 5, 6, 8]


def test_time_counts_where_a_budget_is_met() -> None:
    """All that moves is in the first half; 80 levels for ten frames are 8 a frame."""
    levels = [0, 10, 20, 30, 40, 41, 42, 43, 44, 45]
    assert shrink(levels, 4, tolerance=0) == [0, 1, 2, 4]
    assert shrink(levels, 4, tolerance=0, time=80) == [0, 2, 4, 7]


def test_a_budget_is_shared_by_what_changes_in_all_videos() -> None:
    still, moving = clip([5, 6, 7, 8]), clip([0, 20, 40, 60])
    kept = [[0, 1, 2, 3], [0, 1, 2, 3]]
    sizes = [[3] * 4, [3] * 4]
    assert Scenes(0).shrink([still, moving], kept, sizes, 15) == [[0], [0, 1, 2, 3]]


def test_what_fills_up_fits() -> None:
    filled = fill_up([[0], [0]], [[0, 1, 2], [0, 1]], [[2, 3, 3], [5, 5]], 13)
    assert filled == [[0, 1, 2], [0]]
    assert fill_up([[0]], [[0, 1]], [[2, 3]], 1) == [[0]]
