"""Pooling makes the smallest windows that fit, and puts means in their middle."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from conftest import shared_model

import vtprune
from vtprune.pruners import create
from vtprune.pruners.base import Budget, Selection, VisualTokens, merge
from vtprune.pruners.contract import flat, tiles, video
from vtprune.tokens.layout import CLS, NEWLINE, Layout, box, join, lay_out, single


def picture(rows: int, cols: int) -> Layout:
    return lay_out({"image": torch.arange(rows * cols)}, {"image": [box(1, rows, cols)]})


def with_newlines(rows: int, cols: int) -> Layout:
    """A picture with a newline after every row."""
    parts = []
    for row in range(rows):
        line = box(1, 1, cols)
        parts += [line.__class__(line.frame, line.tile, line.row + row, line.col, line.kind)]
        parts += [single(NEWLINE, row=row, col=cols)]
    return lay_out({"image": torch.arange(rows * (cols + 1))}, {"image": [join(parts)]})


def pooled(layout: Layout, count: int, per: str = "all") -> Selection:
    budget = Budget.share(count, layout.groups(per))
    return create("pool", {}).select(VisualTokens(layout), budget)


def windows(chosen: Selection) -> dict[int, list[int]]:
    """Kept token -> the tokens whose mean it becomes."""
    assert chosen.assign is not None
    return {
        token: (chosen.assign == place).nonzero().squeeze(1).tolist()
        for place, token in enumerate(chosen.index.tolist())
    }


@pytest.mark.parametrize("count", [4, 5])
def test_two_by_two_windows_take_their_first_token_s_place(count: int) -> None:
    # 0 1 2 3 / 4 5 6 7 / ...: all four tokens of a window are as near to its centre.
    chosen = pooled(picture(4, 4), count)
    assert windows(chosen) == {
        0: [0, 1, 4, 5], 2: [2, 3, 6, 7], 8: [8, 9, 12, 13], 10: [10, 11, 14, 15],
    }  # fmt: skip
    assert chosen.weight is not None
    assert chosen.weight.tolist() == [0.25] * 16


def test_windows_of_an_odd_side_take_their_middle_s_place() -> None:
    assert pooled(picture(6, 6), 4).index.tolist() == [7, 10, 25, 28]
    assert pooled(picture(5, 5), 1).index.tolist() == [12]
    assert pooled(flat(5), 1).index.tolist() == [2]


@pytest.mark.parametrize(
    ("rows", "cols", "count", "kept"),
    [
        (4, 4, 15, 12), (4, 4, 11, 9), (4, 4, 8, 6), (4, 4, 3, 2), (24, 24, 288, 272),
        (24, 24, 172, 169), (24, 24, 144, 144), (24, 24, 98, 90), (16, 30, 144, 144),
        (1, 37, 20, 20), (3, 1, 2, 2),
    ],
)  # fmt: skip
def test_the_windows_are_the_smallest_that_fit(rows: int, cols: int, count: int, kept: int) -> None:
    # 4 x 4: 4 x 3, 3 x 3, 3 x 2, 2 x 1; 24 x 24: 17 x 16, 13 x 13, 12 x 12, 10 x 9.
    chosen = pooled(picture(rows, cols), count)
    assert len(chosen.index) == kept
    sizes = [len(window) for window in windows(chosen).values()]
    assert sum(sizes) == rows * cols


@pytest.mark.parametrize("count", [1, 5, 29, 98, 166, 300, 500])
def test_windows_differ_by_one_row_and_one_column_at_most(count: int) -> None:
    layout = picture(24, 24)
    held = windows(pooled(layout, count)).values()
    for at in (layout.grid.row, layout.grid.col):
        lengths = {len(set(at[window].tolist())) for window in held}
        assert max(lengths) - min(lengths) <= 1
    assert len(held) > 0.75 * count


def test_the_mean_of_a_slope_is_the_slope_at_the_centre() -> None:
    layout = picture(9, 9)
    slope = (2.0 * layout.grid.row + 3.0 * layout.grid.col)[:, None]
    chosen = pooled(layout, 9)
    torch.testing.assert_close(merge(slope, chosen), slope[chosen.index])


def test_newlines_of_a_row_of_windows_become_one_newline() -> None:
    layout = with_newlines(4, 4)  # 20 tokens, newlines at 4, 9, 14, 19
    assert windows(pooled(layout, 6)) == {
        0: [0, 1, 5, 6], 2: [2, 3, 7, 8], 4: [4, 9],
        10: [10, 11, 15, 16], 12: [12, 13, 17, 18], 14: [14, 19],
    }  # fmt: skip
    kind = layout.grid.kind
    for token, window in windows(pooled(layout, 11)).items():
        assert set(kind[window].tolist()) == {int(kind[token])}


def test_newlines_go_where_the_quota_is_one_window_a_picture() -> None:
    layout = with_newlines(4, 4)
    assert len(pooled(layout, 2).index) == 2  # all patches, all newlines
    chosen = pooled(layout, 1)
    assert chosen.assign is not None
    assert chosen.assign.tolist() == [0, 0, 0, 0, -1] * 4
    assert layout.grid.kind[chosen.index].tolist() == [0]


def test_tokens_that_are_no_patches_and_alone_are_pooled_too() -> None:
    grid = join([single(NEWLINE, row=row, col=4) for row in range(6)] + [single(CLS)])
    layout = lay_out({"image": torch.arange(7)}, {"image": [grid]})
    assert sum(len(window) for window in windows(pooled(layout, 2)).values()) == 7


def test_all_pictures_of_a_group_have_windows_of_one_size() -> None:
    layout = tiles(((4, 4), (8, 8)))
    held = windows(pooled(layout, 20))  # 2 x 2 each: 4 + 16
    assert {len(window) for window in held.values()} == {4}
    assert len(held) == 20


def test_frames_with_too_small_a_quota_are_averaged_over_time() -> None:
    layout = video(frames=4, rows=2, cols=2, newline=False)
    assert windows(pooled(layout, 2)) == {0: list(range(8)), 8: list(range(8, 16))}
    assert len(pooled(layout, 3).index) == 3
    assert pooled(layout, 1).weight.tolist() == [1 / 16] * 16  # type: ignore[union-attr]


def test_each_frame_has_its_own_windows() -> None:
    layout = video(frames=3, rows=4, cols=4, newline=False)
    group = layout.groups("frame")
    budget = Budget(group, torch.tensor([16, 0, 5]))
    chosen = create("pool", {}).select(VisualTokens(layout), budget)
    held = windows(chosen)
    assert [token for token in held if token < 16] == list(range(16))
    assert [token - 32 for token in held if token >= 16] == [0, 2, 8, 10]
    assert chosen.assign is not None
    assert chosen.assign[16:32].tolist() == [-1] * 16


def test_what_is_left_of_a_picture_can_be_pooled() -> None:
    kept = torch.randperm(576, generator=torch.Generator().manual_seed(4))[:200].sort().values
    layout = picture(24, 24).take(kept)
    for count in (1, 30, 150, 199):
        chosen = pooled(layout, count)
        assert 0.6 * count < len(chosen.index) <= count
        assert sum(len(window) for window in windows(chosen).values()) == 200


def test_the_true_average_is_reported() -> None:
    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")  # 4 x 4 patches
    with vtprune.pruning(model, method="pool", keep=0.5) as trace:
        oracle.generate(model, inputs, steps=1)
    assert trace.stages[0].after == [6]
    assert trace.keep_mean() == 6 / 16
