"""The picture of a comparison."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from PIL import Image
from test_comparison import COMPARISON, FAILED, row, with_vision

from vtprune.evaluation.comparison import Comparison
from vtprune.evaluation.comparison_chart import collect_series, draw_speed, title


def test_every_method_is_a_line_and_its_baselines_are_beside_it() -> None:
    lower = row("asked", "entropy", [("ecl", 2, 10)], keep=0.1)
    found = replace(COMPARISON, rows=(*COMPARISON.rows, lower, FAILED))
    series = {one.label: (one.owner, len(one.points["prefill"])) for one in collect_series(found)}
    assert series == {
        "entropy": ("entropy", 2), "random where entropy cuts": ("entropy", 1),
        "uniform at input": ("", 1),
    }  # fmt: skip


def test_points_are_measured_and_promised_speed_ups() -> None:
    points = collect_series(COMPARISON)[0].points
    assert points["prefill"] == [(0.3, 2.4, 3.0)]  # 1.8 / 0.6 GFLOP
    (kept, measured, promised) = points["first_token"][0]
    assert (kept, measured) == (0.3, 1.5)
    assert promised == pytest.approx((1.2 + 1.8) / (1.2 + 0.6))


def test_a_tower_that_is_spared_promises_more_to_the_first_token() -> None:
    spared = with_vision(COMPARISON.rows[1], 0.4e9)
    found = replace(COMPARISON, rows=(COMPARISON.rows[0], spared))
    points = collect_series(found)[0].points
    assert points["prefill"][0][2] == 3.0
    assert points["first_token"][0][2] == pytest.approx(3.0 / 1.0)


def test_a_tower_whose_flops_are_not_known_promises_nothing_to_the_first_token() -> None:
    rows = [with_vision(one, 0.0) for one in COMPARISON.rows[:2]]
    found = replace(COMPARISON, rows=tuple(rows))
    points = collect_series(found)[0].points
    assert points["prefill"][0][2] == 3.0
    assert math.isnan(points["first_token"][0][2])
    draw_speed(found)


ROWS = (COMPARISON.rows, COMPARISON.rows[:1], (COMPARISON.rows[0], FAILED))


@pytest.mark.parametrize("rows", ROWS, ids=["all", "unpruned", "failed"])
def test_the_picture_is_a_png_that_is_not_blank(rows: tuple[object, ...]) -> None:
    found: Comparison = replace(COMPARISON, rows=rows)  # type: ignore[arg-type]
    with Image.open(io.BytesIO(draw_speed(found))) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**24)) > 10


def test_a_question_is_no_mathematics_and_no_second_line() -> None:
    odd = replace(COMPARISON, question="what costs $1\n" + "and what else " * 40 + "$2?")
    text = title(odd)
    assert "\n" not in text
    assert text.endswith("...")
    assert r"\$1" in text
    draw_speed(odd)


@pytest.mark.parametrize(("kind", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_picture_can_be_a_drawing_for_a_paper(kind: str, start: bytes) -> None:
    assert draw_speed(COMPARISON, kind).startswith(start)


UNPRUNED_SECONDS = {"prefill": 2.0, "first_token": 3.0}


def test_every_pair_is_kept_and_gives_the_bars_of_a_point() -> None:
    asked = COMPARISON.rows[1]
    assert asked.compare is not None
    pairs = [
        {
            "unpruned": {"prefill": 2.0, "first_token": 3.0},
            "pruned": {"prefill": p, "first_token": 2},
        }
        for p in (1.0, 0.5)
    ]
    row = replace(asked, compare=replace(asked.compare, pairs=pairs))
    (series,) = collect_series(replace(COMPARISON, rows=(COMPARISON.rows[0], row)))
    assert series.spreads == {"prefill": [(2.0, 4.0)], "first_token": [(1.5, 1.5)]}
    assert row.compare.to_dict()["pairs"] == pairs
