"""What charts share."""

from __future__ import annotations

import pytest

from vtprune.pictures.chart import (
    GREY,
    draw_interval,
    line_colours,
    literal,
    mark_rows,
    new_figure,
    show_kept,
)


def drawn(kept: list[float]) -> tuple[list[tuple[float, str]], tuple[float, float]]:
    """(place, label) of every tick in sight on an axis of shares, and the axis's limits."""
    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.plot(kept, kept, marker="o")
    show_kept(axes)
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    ticks = [(tick.get_loc(), tick.label1.get_text()) for tick in axes.xaxis.get_major_ticks()]
    return [tick for tick in ticks if low <= tick[0] <= high], (low, high)


@pytest.mark.parametrize("kept", [[0.3], [0.295, 0.302], [0.0, 1.0]])
def test_no_two_ticks_of_a_share_are_called_the_same(kept: list[float]) -> None:
    ticks, (low, high) = drawn(kept)
    labels = [label for _, label in ticks]
    assert len(labels) > 2
    assert len(labels) == len(set(labels))
    assert low <= min(kept) <= max(kept) <= high


def test_text_in_a_chart_is_one_short_line_without_mathematics() -> None:
    assert literal("a $5 sign\nand a $6 one", 20) == r"a \$5 sign and a ..."


@pytest.mark.parametrize("kept", [[0.75, 0.925], [0.3], [0.02, 0.98], [0.53, 0.76]])
def test_ticks_of_a_share_stand_where_they_say(kept: list[float]) -> None:
    for place, label in drawn(kept)[0]:
        told = label.strip("%").replace("\N{MINUS SIGN}", "-")
        assert float(told) / 100 == pytest.approx(place, abs=1e-6)


def test_a_chart_has_at_most_eight_colours_and_the_first_lines_have_their_own() -> None:
    colours = line_colours([*(str(number) for number in range(20)), "0"])
    assert len(set(colours.values())) == 8
    assert len({colours[str(number)] for number in range(7)}) == 7
    assert colours["19"] == GREY


@pytest.mark.parametrize("ways", [2, 5, 9])
def test_rows_at_several_keeps_can_be_told_apart(ways: int) -> None:
    rows = [(str(way), keep) for keep in (0.5, 0.3, 0.1) for way in range(ways)]
    marks = mark_rows(rows)
    assert len(set(marks)) == len(rows)
    colours = {row[0]: mark[0] for row, mark in zip(rows, marks, strict=True)}
    assert all(colours[way] == colour for (way, _), (colour, _) in zip(rows, marks, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_interval_is_drawn_also_of_a_single_point(count: int) -> None:
    axes = new_figure(4, 3).subplots()
    x = [0.1 * n for n in range(count)]
    draw_interval(axes, x, [0.5] * count, [0.4] * count, [0.7] * count, GREY)
    assert len(axes.collections) == 1  # the band, or the bars
    low, high = axes.dataLim.intervaly
    assert (round(float(low), 6), round(float(high), 6)) == (0.4, 0.7)
