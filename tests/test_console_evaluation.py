"""The tables of an evaluation."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from test_cli_check import MODEL, VERSIONS

from vtprune.cli.console.evaluation import show_evaluation
from vtprune.evaluation.bootstrap import Difference, Estimate
from vtprune.evaluation.evaluate import Evaluation
from vtprune.evaluation.rows import EvaluationRow


def row(name: str, **values: Any) -> EvaluationRow:
    """A row of 24 questions at keep 0.3."""
    usual: dict[str, Any] = {
        "role": "asked", "preset": None, "method": name.split()[0], "at": "ecl", "keep": 0.3,
        "keep_mean": 0.3, "questions": 24, "seeds": 1, "accuracy": Estimate(0.5, 0.4, 1.0),
        "relative": 0.75, "agreement": Estimate(0.875, 0.75, 1.0),
        "by_kind": {"colour": 0.5, "number_large": 1.0},
        "against_unpruned": Difference(-0.1, -0.25, 0.05, 0.1), "against_random": None,
        "divergence": 0.125, "perplexity": 1.25, "prefill_speedup": 2.0,
        "first_token_speedup": 1.5,
    }  # fmt: skip
    return EvaluationRow(name, **{**usual, **values})


def evaluation_of(*rows: EvaluationRow, labelled: bool = True, **values: Any) -> Evaluation:
    """An evaluation of 24 questions."""
    usual: dict[str, Any] = {"questions": 24, "files": 24, **values}
    return Evaluation(MODEL, rows, labelled=labelled, version=VERSIONS, **usual)


UNPRUNED = row("unpruned", role="unpruned", keep=1.0, keep_mean=1.0, method=None, perplexity=1.0625,
               prefill_speedup=1.0, first_token_speedup=1.0)  # fmt: skip
ENTROPY = row("entropy at ecl keep 0.3")
BESIDE = row("uniform beside entropy at ecl keep 0.3", role="baseline")
DOWNSAMPLE = row("downsample at pixels keep 0.3", role="baseline", at="pixels")
NOT_RUN: dict[str, Any] = {
    "questions": 0, "keep_mean": math.nan, "accuracy": None, "by_kind": {},
}  # fmt: skip


def shown(*rows: EvaluationRow, width: int = 80, labelled: bool = True) -> str:
    file = io.StringIO()
    evaluation = evaluation_of(UNPRUNED, *rows, labelled=labelled)
    show_evaluation(evaluation, Console(file=file, width=width, highlight=False))
    return "\n".join(line.rstrip() for line in file.getvalue().split("\n"))


def test_table_at_80_columns() -> None:
    assert (
        shown(ENTROPY, BESIDE, DOWNSAMPLE)
        == """\
                                               of un-   same               first
                     kept  n accuracy     95 % pruned answer    KL prefill token
unpruned             100% 24    50.0% 40%-100%                       1.00x 1.00x

keep 0.3
entropy at ecl        30% 24    50.0% 40%-100%  75.0%  87.5% 0.125   2.00x 1.50x
  uniform, same cuts  30% 24    50.0% 40%-100%  75.0%  87.5% 0.125   2.00x 1.50x
downsample at pixels  30% 24    50.0% 40%-100%  75.0%  87.5% 0.125   2.00x 1.50x

                                number
by kind                  colour  large
unpruned                    50%   100%
entropy at ecl 0.3          50%   100%
  uniform, same cuts 0.3    50%   100%
downsample at pixels 0.3    50%   100%
"""
    )


def test_without_answers_agreement_has_the_interval() -> None:
    text = shown(ENTROPY, DOWNSAMPLE, labelled=False)
    assert (
        text
        == """\
                               same                                   first
                     kept  n answer     95 %    KL perplexity prefill token
unpruned             100% 24                             1.06   1.00x 1.00x

keep 0.3
entropy at ecl        30% 24  87.5% 75%-100% 0.125       1.25   2.00x 1.50x
downsample at pixels  30% 24  87.5% 75%-100% 0.125       1.25   2.00x 1.50x
"""
    )


def test_every_share_by_kind_says_of_how_many_questions() -> None:
    full = replace(UNPRUNED, kind_questions={"colour": 8, "number_large": 16})
    fewer = replace(ENTROPY, kind_questions={"colour": 6, "number_large": 16})
    file = io.StringIO()
    show_evaluation(evaluation_of(full, fewer), Console(file=file, width=80))
    kinds = file.getvalue().split("by kind")[1]
    assert "n=8" in file.getvalue()
    assert "n=16" in file.getvalue()
    assert kinds.split().count("50%*") == 1  # 6 of the 8


def test_a_perplexity_without_bounds_leaves_the_columns_as_they_are() -> None:
    text = shown(replace(ENTROPY, perplexity=2.6e21), labelled=False)
    assert "      3e+21    2.00x  1.50x" in text


def test_a_wide_terminal_has_room_for_the_difference() -> None:
    text = shown(ENTROPY, width=110)
    assert "-10.0 (-25.0 to +5.0)" in text
    assert "random" not in text
    gap = Difference(0.02, -0.01, 0.05, 0.5)
    text = shown(replace(ENTROPY, against_random=gap), width=120)
    assert "-10.0 (-25.0 to +5.0) +2.0 (-1.0 to +5.0)" in " ".join(text.split())
    assert max(map(len, text.split("\n"))) <= 120
    assert "-10.0" not in shown(ENTROPY)


def test_what_was_not_run_stands_below_the_table_each_reason_once() -> None:
    none = {**NOT_RUN, "errors": ("too few tokens",)}
    text = shown(ENTROPY, replace(BESIDE, **none), replace(DOWNSAMPLE, **none))
    table, below = text.split("not run")
    assert "same cuts" not in table
    assert "downsample" not in table
    assert " ".join(below.split()) == (
        "too few tokens uniform beside entropy at ecl, keep 0.3; downsample at pixels, keep 0.3"
    )


def test_a_row_that_some_questions_are_missing_from_says_how_many() -> None:
    row = replace(DOWNSAMPLE, questions=16, errors=("a video has one frame",))
    text = shown(row, width=90)
    assert "16*" in text
    assert text.count("downsample at pixels") == 3  # both tables, and below them
    assert "not run   a video has one frame\n" in text
    assert "downsample at pixels, keep 0.3 (8 of 24 questions)\n" in text


def test_of_many_reasons_the_first_are_told() -> None:
    reasons = tuple(f"reason {number}" for number in range(9))
    text = shown(replace(DOWNSAMPLE, **NOT_RUN, errors=reasons))
    assert "reason 4" in text
    assert "reason 5" not in text
    assert "and 4 more reasons" in text


@pytest.mark.parametrize("width", [40, 60, 80, 110, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    long = row("pyramiddrop at schedule keep 0.3", at="schedule")
    text = shown(ENTROPY, BESIDE, DOWNSAMPLE, long, width=width)
    assert max(map(len, text.splitlines())) <= width


def test_kinds_that_have_no_room_stand_in_a_table_below() -> None:
    kinds = {f"kind_{letter * 6}": 0.5 for letter in "abcdefghijkl"}
    text = shown(replace(ENTROPY, by_kind=kinds))
    tables = text.split("by kind")[1:]
    assert len(tables) == 2
    assert all(len(line) <= 80 for line in text.split("\n"))
    for letter in "abcdefghijkl":
        assert sum(letter * 6 in table for table in tables) == 1
    assert all("entropy at ecl 0.3" in table for table in tables)
