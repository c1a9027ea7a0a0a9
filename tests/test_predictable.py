"""Frames and tiles that show nothing new, by hand; and which tokens are theirs."""

from __future__ import annotations

import math

import pytest
import torch

from vtprune.engine.pixel_selection import ReducedTower, restore_rows, unit_tokens
from vtprune.errors import ModelError
from vtprune.models import anyres, splitting
from vtprune.pruners.predictable import Predictable, enlarge, error, largest_block
from vtprune.tokens.layout import NEWLINE, Layout, box, join, lay_out, single
from vtprune.tokens.units import WHOLE, Units


def frames(levels: list[int], side: int = 32) -> torch.Tensor:
    """A plain frame of each grey."""
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, side, side)


def clip(levels: list[int], group: int = 1) -> Units:
    return Units("video", frames(levels), group)


def test_a_last_step_is_filled_up_with_its_last_frame() -> None:
    step = clip([1, 2, 3, 4, 5], group=3).unit(1)
    assert step[:, 0, 0, 0].tolist() == [4, 5, 5]


# -- frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tolerance", "kept"),
    [(0, [0, 2, 3, 4, 5]), (1, [0, 3, 5]), (2, [0, 4]), (3, [0, 5]), (7, [0]), (255, [0])],
)
def test_a_frame_is_compared_with_the_last_one_that_was_kept(
    tolerance: float, kept: list[int]
) -> None:
    """A slow fade: every frame is near the one before it, but not near the last kept one."""
    assert Predictable(tolerance).keep(clip([10, 10, 11, 12, 13, 14])) == kept


def test_at_tolerance_zero_one_level_of_one_pixel_is_enough_to_stay() -> None:
    pixels = frames([50, 50, 50])
    pixels[1, 2, 31, 31] += 1
    assert Predictable(0).keep(Units("video", pixels)) == [0, 1, 2]
    assert Predictable(0).keep(Units("video", pixels[::2])) == [0]


def test_a_small_thing_that_moves_counts_by_its_block_and_not_by_the_frame() -> None:
    """4 x 4 pixels of 160 levels are 10 on average in their block of 256, 2.5 in the frame."""
    pixels = frames([0, 0])
    pixels[1, 0, 4:8, 4:8] = 160
    moved = Units("video", pixels)
    assert error(moved, 1, [0]) == 10
    assert Predictable(9.9).keep(moved) == [0, 1]
    assert Predictable(10).keep(moved) == [0]


def test_blocks_at_the_edges_are_as_large_as_what_is_there() -> None:
    differences = torch.zeros(1, 3, 20, 40)
    differences[..., 16:, 32:] = -8.0
    assert largest_block(differences) == 8
    assert largest_block(torch.full((1, 3, 5, 7), 3.0)) == 3


def test_frames_that_are_encoded_together_are_compared_together() -> None:
    pairs = clip([1, 2, 1, 2, 2, 1, 5], group=2)
    assert (len(pairs), pairs.rows) == (4, 4)
    assert Predictable(0).keep(pairs) == [0, 2, 3]
    assert pairs.unit(3).flatten(1).unique(dim=1).tolist() == [[5], [5]]  # the last one repeated


# -- tiles ----------------------------------------------------------------------------------------


def picture(base: torch.Tensor, *tiles: torch.Tensor, shape: tuple[int, int]) -> Units:
    regions = splitting.regions(*shape)
    return Units("image", torch.cat([*tiles, base]), regions=regions)


def noise(side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=generator)


def test_a_tile_of_one_plain_colour_goes_also_where_the_base_picture_is_blurred() -> None:
    told = picture(noise(), noise(), frames([200]), shape=(1, 2))
    assert error(told, 1, []) == 0
    assert Predictable(0).keep(told) == [0, 2]


def test_a_tile_goes_where_the_enlarged_base_picture_shows_it() -> None:
    """A ramp down over both halves; the base picture has it squeezed to one square."""
    ramp = torch.arange(0, 64, 2, dtype=torch.uint8)[:, None].repeat(1, 32).expand(1, 3, 32, 32)
    told = picture(ramp, ramp, ramp, shape=(1, 2))
    assert [error(told, number, []) for number in (0, 1)] == [0, 0]
    blotted = ramp.clone()
    blotted[..., 8:12, 8:12] += 128
    told = picture(ramp, ramp, blotted, shape=(1, 2))
    assert error(told, 1, []) == 128 * 16 / 256
    assert Predictable(7.9).keep(told) == [1, 2]
    assert Predictable(8).keep(told) == [2]


def test_the_base_picture_always_stays_and_so_does_a_picture_in_one_piece() -> None:
    plain = picture(*[frames([7])] * 5, shape=(2, 2))
    assert error(plain, 4, []) == math.inf
    assert Predictable(255).keep(plain) == [4]
    assert plain.base == 4
    single_piece = Units("image", frames([7] * 5))
    assert (len(single_piece), single_piece.rows, single_piece.in_one_piece) == (1, 5, True)
    assert Predictable(255).keep(single_piece) == [0]
    assert single_piece.rows_kept([0]).tolist() == [True] * 5


def test_a_tile_is_where_its_grid_says() -> None:
    """The tiles of a split picture come before the base picture, those of LLaVA after it."""
    split = picture(*[frames([7])] * 5, shape=(2, 2))
    assert [split.place(number) for number in range(5)] == [(0, n) for n in (1, 2, 3, 4, 0)]
    told = anyres.regions((100, 100), [[64, 64]], 32)
    after = Units("image", frames([7] * 5), regions=told)
    assert [after.place(number) for number in range(5)] == [(0, n) for n in range(5)]


def test_regions_are_of_the_picture_inside_its_padding() -> None:
    """100 x 50 in 64 x 64: the picture is 32 wide, with 16 of padding on either side."""
    base, upper_left, _, lower_left, lower_right = anyres.regions((100, 50), [[64, 64]], 32)
    assert base == WHOLE
    assert upper_left == (0.0, -0.5, 0.5, 0.5)
    assert lower_left == (0.5, -0.5, 1.0, 0.5)
    assert lower_right == (0.5, 0.5, 1.0, 1.5)
    assert splitting.regions(1, 1) == splitting.regions(0, 0) == (WHOLE,)
    assert splitting.regions(1, 2) == ((0, 0, 1, 0.5), (0, 0.5, 1, 1), WHOLE)


def test_the_enlarged_part_is_black_past_the_pictures_edges() -> None:
    seen = enlarge(frames([90]), (0.0, -1.0, 1.0, 1.0), (8, 8))
    assert seen[..., :4].unique().tolist() == [0]
    assert seen[..., 4:].unique().tolist() == [90]


@pytest.mark.parametrize("size", [(90, 150), (300, 100), (64, 64), (37, 41)])
def test_an_enlarged_picture_is_predicted_by_its_base_picture(size: tuple[int, int]) -> None:
    """A smooth picture cut as LLaVA cuts it: every tile is near what its region shows."""
    recipe = anyres.Recipe({"height": 56, "width": 56}, None, 3, None, None, None)
    down = torch.linspace(0, 200, size[0])[:, None] + torch.linspace(0, 50, size[1])[None]
    smooth = down.to(torch.uint8).expand(1, 3, *size).contiguous()
    resolutions = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    cut = anyres.cut(smooth, size, resolutions, 56, recipe)
    told = Units("image", cut, regions=anyres.regions(size, resolutions, 56))
    assert len(told) == len(cut) > 2
    for number in range(1, len(told)):
        inside = enlarge(told.unit(0), told.regions[number], (56, 56)) > 0
        apart = (told.unit(number) - enlarge(told.unit(0), told.regions[number], (56, 56))).abs()
        assert apart[inside].quantile(0.98) <= 4


# -- budgets --------------------------------------------------------------------------------------


def test_what_is_most_predictable_goes_first_down_to_the_budget() -> None:
    """Steps of 9, 1, 5 and 3; once the frame after 9 is gone, the next one differs more."""
    told = clip([0, 9, 10, 15, 18])
    sizes = [[4] * 5]
    kept = [Predictable(0).keep(told)]
    left = [Predictable(0).shrink([told], kept, sizes, most)[0] for most in (20, 16, 12, 8, 4, 0)]
    assert left == [[0, 1, 2, 3, 4], [0, 1, 3, 4], [0, 1, 3], [0, 1], [0], [0]]


def test_a_budget_is_shared_by_what_is_predictable_in_all_media() -> None:
    still, moving = clip([5, 6, 7, 8]), clip([0, 50, 100, 150])
    kept = [[0, 1, 2, 3], [0, 1, 2, 3]]
    left = Predictable(0).shrink([still, moving], kept, [[3] * 4, [3] * 4], 15)
    assert left == [[0], [0, 1, 2, 3]]


def test_what_still_fits_comes_back() -> None:
    """The small tile goes first, then the large one, after which the small one fits again."""
    base = frames([0])
    told = picture(base, frames([3]) + 4 * (noise() > 127), noise(), shape=(1, 2))
    assert error(told, 0, []) < error(told, 1, [])
    for most in (12, 13):
        kept = Predictable(0).shrink([told], [[0, 1, 2]], [[2, 10, 10]], most)
        assert kept == [[0, 2]]


def test_nothing_goes_that_a_budget_does_not_ask_for() -> None:
    told = clip([0, 9, 10, 15, 18])
    assert Predictable(0).shrink([told], [[0, 2, 4]], [[4] * 5], 12) == [[0, 2, 4]]


# -- tokens ---------------------------------------------------------------------------------------


def two_videos() -> Layout:
    first = join([box(2, 1, 2), single(NEWLINE, frame=1, col=2)])
    return lay_out({"video": torch.arange(20, 33)}, {"video": [first, box(4, 1, 2)]})


def test_tokens_of_a_frame_are_those_that_the_layout_counts_to_it() -> None:
    tokens = unit_tokens(two_videos(), [clip([1, 2]), clip([1, 2, 3, 4])])
    assert [[index.tolist() for index in own] for own in tokens] == [
        [[0, 1], [2, 3, 4]],  # with the newline that ends the video
        [[5, 6], [7, 8], [9, 10], [11, 12]],
    ]


@pytest.mark.parametrize(
    "units", [[], [clip([1, 2])], [clip([1, 2]), clip([1, 2, 3])], [clip([1, 2, 3, 4])] * 2]
)
def test_other_media_than_the_layouts_are_refused(units: list[Units]) -> None:
    with pytest.raises(ModelError, match="not those of the media"):
        unit_tokens(two_videos(), units)


def test_crops_that_are_pictures_of_their_own_belong_to_their_picture() -> None:
    """Gemma 3: two pictures, the second with two crops; none of it can go."""
    layout = lay_out({"image": torch.arange(16)}, {"image": [box(1, 2, 2)] * 4})
    units = [Units("image", frames([1])), Units("image", frames([1, 2, 3]))]
    tokens = unit_tokens(layout, units)
    assert [[index.tolist() for index in own] for own in tokens] == [
        [[0, 1, 2, 3]],
        [list(range(4, 16))],
    ]


# -- the tower ------------------------------------------------------------------------------------


def test_rows_are_taken_and_put_back_where_they_were() -> None:
    reduced = ReducedTower(torch.tensor([True, False, True, False]))
    values = torch.arange(8.0).view(4, 2)
    short = reduced.take(values)
    assert isinstance(short, torch.Tensor)
    assert short.tolist() == [[0, 1], [4, 5]]
    whole = restore_rows({"a": short, "b": (short, None), "c": torch.zeros(3)}, reduced.rows)
    assert isinstance(whole, dict)
    assert whole["a"].tolist() == [[0, 1], [0, 0], [4, 5], [0, 0]]
    assert whole["b"][0].shape == (4, 2)
    assert whole["b"][1] is None
    assert len(whole["c"]) == 3


def test_steps_of_grids_go_one_by_one() -> None:
    """Three clips of 2, 1 and 2 steps; of the second nothing is left."""
    tower = torch.nn.Module()
    tower.spatial_merge_size = 2
    tower.forward = lambda hidden_states, grid_thw: None  # type: ignore[method-assign]
    reduced = ReducedTower(torch.tensor([True, False, False, True, True]))
    grid = torch.tensor([[2, 2, 2], [1, 2, 4], [2, 4, 2]])
    patches = torch.arange(8 + 8 + 16.0)[:, None]
    _, given = reduced.before_tower(tower, (patches, grid), {})
    assert given["grid_thw"].tolist() == [[1, 2, 2], [2, 4, 2]]  # type: ignore[attr-defined]
    assert given["hidden_states"].flatten().tolist() == [*range(4), *range(16, 32)]  # type: ignore[attr-defined]
    assert reduced.tokens is not None
    assert reduced.tokens.tolist() == [True, False, False, False, True, True, True, True]


def test_precomputed_arguments_of_the_tower_are_refused() -> None:
    tower = torch.nn.Module()
    tower.spatial_merge_size = 2
    tower.forward = lambda hidden_states, grid_thw, **kwargs: None  # type: ignore[method-assign]
    reduced = ReducedTower(torch.tensor([True, False]))
    given = {"cu_seqlens": torch.tensor([0, 4, 8])}
    with pytest.raises(ModelError, match="given cu_seqlens, which counts all frames"):
        reduced.before_tower(tower, (torch.zeros(8, 1), torch.tensor([[2, 2, 2]])), given)


def test_a_tower_that_does_not_run_as_a_module_is_refused() -> None:
    with pytest.raises(ModelError, match="not called as a module"):
        ReducedTower(torch.tensor([True, False])).check_ran()
