"""Spread chooses what is far apart in states, time and place together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_pruners import choose

from vtprune.errors import ModelError
from vtprune.pruners import create, find_profile
from vtprune.pruners.base import Budget, VisualTokens
from vtprune.pruners.contract import flat, tiles, video
from vtprune.pruners.spread import turns
from vtprune.tokens.layout import PATCH, Layout, box, join, lay_out
from vtprune.tokens.schedule import Place
from vtprune.tokens.solver import solve


def chosen(layout: Layout, states: torch.Tensor, count: int, **options: float) -> list[int]:
    budget = Budget.share(count, torch.zeros(len(layout), dtype=torch.long))
    tokens = VisualTokens(layout, {"hidden": states})
    return create("spread", options).select(tokens, budget).index.tolist()


def made_up(layout: Layout, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 + torch.randn(len(layout), 1, 12, generator=generator)


def test_a_case_worked_out_by_hand() -> None:
    # One token in each of three frames, at 0, 90 and 10 degrees; times at 0, 90 and 180 degrees.
    # Cosines of states and of times: 0 + 0 for the first two, 0.985 - 1 for the outer ones, 0.174
    # + 0 for the last two. The first one's nearest neighbour is farthest, at 0: it is chosen, then
    # the last one, at -0.015, although it looks nearly the same.
    degrees = torch.tensor([0.0, 90.0, 10.0]).deg2rad()
    states = torch.stack([degrees.cos(), degrees.sin()], dim=1)[:, None]
    layout = video(3, 1, 1, newline=False)
    assert chosen(layout, states, 1, time=1, space=0) == [0]
    assert chosen(layout, states, 2, time=1, space=0) == [0, 2]
    # Without time, the one that looks different is chosen, then the one farther from it.
    assert chosen(layout, states, 1, time=0, space=0) == [1]
    assert chosen(layout, states, 2, time=0, space=0) == [0, 1]


@pytest.mark.parametrize(
    ("keep", "counts"),
    [
        # Of 1,000 tokens, 11 layers with k and 5 with a quarter of them: 12.25 k = 16 x 1,000 keep.
        (0.3, (391, 97)),
        (0.1, (130, 32)),
        # Above (11 + 5 / 4) / 16 all stay at first, and the last 5 layers get what remains.
        (0.9, (1000, 680)),
    ],
)
def test_deep_layers_get_a_quarter(keep: float, counts: tuple[int, int]) -> None:
    profile = find_profile("spread")
    layers = profile.layers(16)
    assert layers == [0, 11]
    places = [Place("schedule", layer, profile=profile, part=n) for n, layer in enumerate(layers)]
    found = solve(places, keep, 16, 1000)
    assert found.keep_mean() <= keep
    left = {cut.layer: cut.count for cut in found.cuts}
    assert left.get(0, 1000) == pytest.approx(counts[0], abs=1)
    assert left[11] == pytest.approx(counts[1], abs=1)


def likeness(layout: Layout, states: torch.Tensor, time: float, space: float) -> np.ndarray:
    """(N, N) in float64, from the layout's own numbers."""
    rows = states.flatten(1).double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    def apart(values: np.ndarray, last: np.ndarray) -> np.ndarray:
        share = values / np.maximum(last, 1)
        return np.cos(math.pi * (share[:, None] - share[None]))

    grid = layout.grid
    frame, row, col, tile = (
        value.numpy().astype(float) for value in (grid.frame, grid.row, grid.col, grid.tile)
    )
    base, patch = tile == 0, grid.kind.numpy() == PATCH

    def last(values: np.ndarray) -> np.ndarray:
        tiled = values[~base & patch].max() if (~base).any() else 0
        return np.where(base, values[base & patch].max(), tiled)

    last_row, last_col = last(row), last(col)
    row, col = np.minimum(row, last_row), np.minimum(col, last_col)
    return (
        rows @ rows.T
        + time * apart(frame, frame.max())
        + space / 2 * (apart(row, last_row) + apart(col, last_col))
    )


def farthest(alike: np.ndarray, count: int) -> list[int]:
    alike = alike.copy()
    np.fill_diagonal(alike, -np.inf)
    kept = [int(alike.max(axis=1).argmin())]
    while len(kept) < count:
        nearest = alike[:, kept].max(axis=1)
        nearest[kept] = np.inf
        kept.append(int(nearest.argmin()))
    return sorted(kept)


@pytest.mark.parametrize("layout", [video(), video(1), tiles()], ids=["video", "frame", "tiles"])
@pytest.mark.parametrize(("time", "space"), [(0.6, 0.1), (2, 0.5), (0, 0)])
@pytest.mark.parametrize("count", [1, 4, 13])
def test_it_is_its_definition(layout: Layout, time: float, space: float, count: int) -> None:
    for seed in range(3):
        states = made_up(layout, seed)
        wanted = farthest(likeness(layout, states, time, space), count)
        assert chosen(layout, states, count, time=time, space=space) == wanted


def test_without_time_and_space_it_is_divprune() -> None:
    layout = video(5, 4, 4)
    states = {"hidden": made_up(layout)}
    tokens = VisualTokens(layout, states)
    budget = Budget.share(17, layout.groups("frame"))
    kept = create("spread", {"time": 0, "space": 0}).select(tokens, budget).index
    assert torch.equal(kept, create("divprune", {}).select(tokens, budget).index)


def test_every_frame_of_a_still_clip_is_kept_something_of() -> None:
    layout = video(8, 4, 4, newline=False)
    one = made_up(video(1, 4, 4, newline=False))
    still = one.repeat(8, 1, 1) + 1e-3 * made_up(layout, seed=1)
    frames = layout.grid.frame[chosen(layout, still, 24)]
    assert torch.bincount(frames, minlength=8).min() >= 1


def test_several_pictures_are_apart_as_frames_are() -> None:
    item = box(1, 3, 3)
    layout = lay_out({"image": torch.arange(27)}, {"image": [item] * 3})
    time, row, column = turns(layout)
    wanted = torch.tensor([0, math.pi / 2, math.pi]).repeat_interleave(9)
    assert torch.allclose(time, wanted)
    assert row.max() == column.max() == pytest.approx(math.pi)
    # A picture after a clip of two frames is its third moment.
    mixed = lay_out({"video": torch.arange(18), "image": torch.arange(18, 27)},
                    {"video": [box(2, 3, 3)], "image": [item]})  # fmt: skip
    assert torch.allclose(turns(mixed)[0], wanted)


def test_a_base_picture_covers_the_same_place_as_its_tiles() -> None:
    grid = join([box(1, 2, 2), box(1, 4, 4, tile=1)])
    layout = lay_out({"image": torch.arange(len(grid))}, {"image": [grid]})
    _, row, column = turns(layout)
    assert row[:4].tolist() == pytest.approx([0, 0, math.pi, math.pi])
    assert row[4:].max() == column[4:].max() == pytest.approx(math.pi)


def test_a_frame_that_an_earlier_cut_took_leaves_a_gap() -> None:
    layout = video(5, 2, 2, newline=False)
    whole = turns(layout)[0]
    left = layout.take(torch.arange(len(layout))[layout.grid.frame != 2])
    assert torch.allclose(turns(left)[0], whole[layout.grid.frame != 2])


def test_newlines_stand_with_the_last_column() -> None:
    layout = video(2, 3, 5)
    column = turns(layout)[2]
    patches = layout.grid.kind == PATCH
    assert column[patches].max() == pytest.approx(math.pi)
    assert column[~patches].tolist() == pytest.approx([math.pi])


def test_every_picture_has_a_width_of_its_own() -> None:
    layout = lay_out({"image": torch.arange(20)}, {"image": [box(1, 2, 2), box(1, 4, 4)]})
    _, row, column = turns(layout)
    for own in (slice(0, 4), slice(4, 20)):
        assert row[own].max() == column[own].max() == pytest.approx(math.pi)


def test_states_that_are_no_numbers_are_refused() -> None:
    layout = flat(6)
    states = made_up(layout)
    states[3] = torch.nan
    with pytest.raises(ModelError, match="spread"):
        chosen(layout, states, 3)


def test_a_zero_state_counts_as_a_copy() -> None:
    layout = flat(6)
    states = made_up(layout)
    states[2] = 0
    assert 2 not in chosen(layout, states, 5)


def test_it_meets_shares_by_frame() -> None:
    layout = video(4, 3, 5, newline=False)
    kept = choose("spread", layout, 10, per="frame").index
    assert torch.bincount(layout.grid.frame[kept]).tolist() == [3, 3, 2, 2]
