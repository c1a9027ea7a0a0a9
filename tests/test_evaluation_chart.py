"""The picture of an evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_console_evaluation import BESIDE, ENTROPY, UNPRUNED

from vtprune.evaluation import evaluation_chart
from vtprune.evaluation.evaluation_chart import plot_rows


def drawn(rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The lines of the legend."""
    figures = []
    monkeypatch.setattr(evaluation_chart, "to_bytes", lambda figure, kind: figures.append(figure))
    plot_rows(rows, "a model", 24, 24)
    axes = figures[0].axes[0]
    return [axes, *axes.get_legend_handles_labels()]


def test_lines_say_of_how_many_questions_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = replace(ENTROPY, keep_mean=0.5, keep=0.5, questions=20)
    axes, _, labels = drawn([UNPRUNED, BESIDE, ENTROPY, fewer], monkeypatch)
    assert labels == ["entropy at ecl (n = 20 to 24*)", "uniform beside entropy at ecl (n = 24)"]
    assert "*: fewer questions were asked" in axes.get_xlabel()


def test_what_was_asked_is_in_front_and_has_error_bars_at_one_keep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    axes, lines, _ = drawn([UNPRUNED, BESIDE, ENTROPY], monkeypatch)
    assert lines[0].get_zorder() > lines[1].get_zorder()
    assert lines[0].get_color() != lines[1].get_color()
    assert len(axes.collections) == 1  # the bars
