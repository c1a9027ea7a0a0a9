"""Where tokens sit, and which of them share a budget."""

from __future__ import annotations

import pytest
import torch

from vtprune.tokens.layout import (
    NEWLINE,
    PATCH,
    Layout,
    box,
    empty_layout,
    join,
    lay_out,
    single,
)


def columns(first: int, count: int) -> torch.Tensor:
    return torch.arange(first, first + count)


def picture(num_tiles: int = 2) -> object:
    """A base picture of 2 x 2 and tiles of 1 x 3, then one newline in the last tile."""
    tiles = [box(1, 1, 3, tile=number + 1) for number in range(num_tiles)]
    return join([box(1, 2, 2), *tiles, single(NEWLINE, tile=num_tiles, row=0, col=3)])


def test_a_box_counts_frames_then_rows_then_columns() -> None:
    grid = box(2, 2, 3, tile=4)
    assert grid.frame.tolist() == [0] * 6 + [1] * 6
    assert grid.row.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert grid.col.tolist() == [0, 1, 2] * 4
    assert grid.tile.tolist() == [4] * 12
    assert grid.kind.tolist() == [PATCH] * 12


def test_a_joined_grid_is_as_long_as_its_parts_and_taking_keeps_the_order() -> None:
    grid = join([box(1, 2, 2), single(NEWLINE, frame=1, tile=2, row=3, col=4)])
    assert len(grid) == 5
    taken = grid.take(torch.tensor([4, 0]))
    fields = (taken.frame, taken.tile, taken.row, taken.col, taken.kind)
    assert [value.tolist() for value in fields] == [
        [1, 0],
        [2, 0],
        [3, 0],
        [4, 0],
        [NEWLINE, PATCH],
    ]


def test_all_tokens_are_one_group() -> None:
    layout = lay_out({"video": columns(3, 12)}, {"video": [box(3, 2, 2)]})
    assert layout.groups("all").tolist() == [0] * 12


def test_every_frame_is_a_group() -> None:
    layout = lay_out({"video": columns(3, 12)}, {"video": [box(3, 2, 2)]})
    for per in ("frame", "tile"):
        assert layout.groups(per).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_every_tile_is_a_group_with_the_base_picture_first() -> None:
    layout = lay_out({"image": columns(0, 11)}, {"image": [picture()]})
    assert layout.groups("tile").tolist() == [0] * 4 + [1] * 3 + [2] * 3 + [2]
    assert layout.groups("frame").tolist() == [0] * 11


def test_a_trailing_newline_belongs_to_the_last_frame() -> None:
    grid = join([box(3, 1, 2), single(NEWLINE, frame=2)])
    layout = lay_out({"video": columns(0, 7)}, {"video": [grid]})
    assert layout.groups("frame").tolist() == [0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("per", ["frame", "tile"])
def test_several_media_are_never_one_group(per: str) -> None:
    layout = lay_out(
        {"image": columns(0, 8), "video": columns(20, 4)},
        {"image": [box(1, 2, 2), box(1, 2, 2)], "video": [box(1, 2, 2)]},
    )
    assert layout.groups(per).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert layout.media.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_groups_are_numbered_anew_where_a_frame_is_gone() -> None:
    layout = lay_out({"video": columns(0, 6)}, {"video": [box(3, 1, 2)]})
    left = layout.take(torch.tensor([0, 1, 4, 5]))
    assert left.groups("frame").tolist() == [0, 0, 1, 1]


def test_media_are_numbered_in_prompt_order_over_both_modalities() -> None:
    layout = lay_out(
        {"image": torch.tensor([7, 8]), "video": torch.tensor([1, 2, 3, 4, 10, 11])},
        {"image": [box(1, 1, 2)], "video": [box(2, 1, 2), box(1, 1, 2)]},
    )
    assert layout.columns.tolist() == [1, 2, 3, 4, 7, 8, 10, 11]
    assert layout.media.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert layout.modality.tolist() == [1, 1, 1, 1, 0, 0, 1, 1]
    assert layout.of_modality("image").tolist() == [4, 5]
    assert layout.of_modality("video").tolist() == [0, 1, 2, 3, 6, 7]
    assert layout.of_modality("all").tolist() == list(range(8))


def test_columns_are_ascending_where_modalities_alternate() -> None:
    layout = lay_out(
        {"image": torch.tensor([0, 9]), "video": torch.tensor([4, 5])},
        {"image": [box(1, 1, 1), box(1, 1, 1)], "video": [box(2, 1, 1)]},
    )
    assert layout.columns.tolist() == [0, 4, 5, 9]
    assert layout.grid.frame.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    "grids", [{}, {"image": []}, {"image": [box(1, 1, 3)]}, {"image": [box(1, 2, 2), box(1, 1, 1)]}]
)
def test_grids_that_do_not_add_up_are_refused(grids: dict[str, list[object]]) -> None:
    with pytest.raises(ValueError, match=r"4 image placeholders, \d tokens in the grids"):
        lay_out({"image": columns(0, 4)}, grids)  # type: ignore[arg-type]


def test_a_prompt_without_pictures_has_an_empty_layout() -> None:
    layout = lay_out({"image": columns(0, 0)}, {})
    for empty in (layout, empty_layout()):
        assert len(empty) == 0
        assert len(empty.of_modality("image")) == 0
        for per in ("all", "frame", "tile"):
            assert empty.groups(per).tolist() == []
        assert empty.columns.dtype == empty.grid.frame.dtype == torch.int64


def test_a_picture_without_tokens_is_none_of_the_media() -> None:
    layout = lay_out({"image": columns(2, 2)}, {"image": [box(0, 1, 1), box(1, 1, 2)]})
    assert layout.columns.tolist() == [2, 3]
    assert layout.media.tolist() == [0, 0]


def test_indices_are_int64() -> None:
    layout = lay_out({"image": columns(0, 11)}, {"image": [picture()]})
    assert isinstance(layout, Layout)
    grid = layout.grid
    for tensor in (layout.columns, layout.modality, layout.media, grid.frame, grid.tile, grid.row,
                   grid.col, grid.kind, layout.groups("tile"), layout.groups("all"),
                   layout.of_modality("image")):  # fmt: skip
        assert tensor.dtype == torch.int64


def test_the_previous_token_is_at_the_same_place_of_the_nearest_earlier_frame() -> None:
    layout = lay_out({"video": columns(0, 12)}, {"video": [box(3, 1, 2)] * 2})
    assert layout.previous().tolist() == [-1, -1, 0, 1, 2, 3, -1, -1, 6, 7, 8, 9]
    left = layout.take(torch.tensor([0, 1, 3, 4, 5]))  # frame 1 has lost a place
    assert left.previous().tolist() == [-1, -1, 1, 0, 2]
    still = lay_out({"image": columns(0, 11)}, {"image": [picture()]})
    assert set(still.previous().tolist()) == {-1}
    assert len(empty_layout().previous()) == 0


def test_the_first_frame_is_the_first_that_is_left_of_each_video() -> None:
    layout = lay_out({"video": columns(0, 12)}, {"video": [box(3, 1, 2)] * 2})
    assert layout.in_first_frame().nonzero().squeeze(1).tolist() == [0, 1, 6, 7]
    left = layout.take(torch.tensor([2, 4, 5, 10]))
    assert left.in_first_frame().tolist() == [True, False, False, True]
    assert len(empty_layout().in_first_frame()) == 0
