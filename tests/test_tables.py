"""No table of any command loses a value, on 80 columns, in a pipe and on narrow terminals."""

from __future__ import annotations

import ast
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reports import report_of
from rich.console import Console
from rich.table import Table
from rich.text import Text
from test_calibrate import measured
from test_cli_calibrate import TRIED
from test_comparison import COMPARISON, FAILED, PRESET
from test_comparison import row as compared
from test_console import COMPARE, REPORT
from test_console_evaluation import BESIDE, DOWNSAMPLE, ENTROPY, NOT_RUN, UNPRUNED, evaluation_of
from test_profile import example
from test_profile import row as profiled

from vtprune.cli import console
from vtprune.cli.console import comparison, evaluation, profile, tables, tuning
from vtprune.cli.console.calibration import show_calibration, show_notes
from vtprune.evaluation.bootstrap import Difference, Estimate
from vtprune.evaluation.calibration.result import TokenInformation
from vtprune.evaluation.comparison import Comparison
from vtprune.evaluation.evaluate import Evaluation
from vtprune.evaluation.profiling.result import MediaAmount, Profile
from vtprune.evaluation.rows import EvaluationRow, FollowUps
from vtprune.evaluation.search import Outcome
from vtprune.evaluation.tuning_result import PartSize, Trial, Tuning
from vtprune.evaluation.variants import Variant
from vtprune.models import FAMILIES
from vtprune.models.base import Sampling
from vtprune.models.names import aliases
from vtprune.preset import Preset, load_preset, preset_names
from vtprune.pruners import METHODS

ROOT = Path(__file__).parents[1]
LONG = "pyramiddrop (ratio=budget, recycle=clusters)"


class Cells:
    """Every cell and heading of the tables that are printed, as it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.words: Counter[str] = Counter()
        self.texts: list[str] = []
        self.listening = True
        add_row, add_column, part = Table.add_row, Table.add_column, tables._part
        fitted = tables.fitted

        def row(table: Table, *cells: Any, **options: Any) -> None:
            self.note(*cells)
            add_row(table, *cells, **options)

        def column(table: Table, header: Any = "", *rest: Any, **options: Any) -> None:
            self.note(header)
            add_column(table, header, *rest, **options)

        def silently(make: Callable[..., Table]) -> Callable[..., Table]:
            def made(*args: Any) -> Table:
                self.listening = False  # what is laid out anew was noted before
                try:
                    return make(*args)
                finally:
                    self.listening = True

            return made

        monkeypatch.setattr(Table, "add_row", row)
        monkeypatch.setattr(Table, "add_column", column)
        monkeypatch.setattr(tables, "_part", silently(part))
        monkeypatch.setattr(console.report, "fitted", silently(fitted))

    def note(self, *cells: object) -> None:
        for cell in cells if self.listening else ():
            text = cell.plain if isinstance(cell, Text) else cell
            if isinstance(text, str):
                self.texts.append(text)
                self.words.update(text.split())


def with_follow_ups(row: EvaluationRow) -> EvaluationRow:
    change = Difference(-0.061, -0.124, 0.013, 0.04)
    follow_ups = FollowUps(
        questions=24, quality=Estimate(0.8125, 0.75, 0.9), agreement=0.75, unpruned=0.9375,
        fresh=0.875, against_unpruned=change, against_fresh=change, change=change,
    )  # fmt: skip
    return replace(row, reads_question=True, second=follow_ups)


def rows_of_an_evaluation() -> list[EvaluationRow]:
    kinds = {f"kind_{letter * 6}": 0.5 for letter in "abcdefghijkl"}
    named = replace(ENTROPY, method="pyramiddrop", options={"ratio": "budget"}, at="schedule")
    wide = replace(named, perplexity=123456.0, divergence=12.345,
                   accuracy=Estimate(1.0, 0.4, 1.0), relative=1.2345, prefill_speedup=123.45,
                   first_token_speedup=98.765, by_kind=kinds)  # fmt: skip
    rows = [UNPRUNED, wide, BESIDE, DOWNSAMPLE,
            replace(DOWNSAMPLE, **NOT_RUN, errors=("too few tokens",))]  # fmt: skip
    return [with_follow_ups(row) if row.questions else row for row in rows]


def evaluated(labelled: bool) -> Evaluation:
    return evaluation_of(*rows_of_an_evaluation(), labelled=labelled, files=1234,
                         warnings=("careful: 1,234 of 5,678",))  # fmt: skip


def profiled_rows(timed: bool) -> Profile:
    stages = [(0, 123456), (11, 65432), (22, 1234), (27, 123)]
    return example(
        timed,
        profiled(0.2, "entropy-horizon", stages, 6.12e12, timed,
                 input=MediaAmount(frames=64, tiles=0, visual_tokens=12544)),
        profiled(0.1, None, stages, 4.56e12, timed, method=LONG, options={"a": "b"},
                 measured="scaled" if timed else None, stages_of=None),
    )  # fmt: skip


def tuned() -> Tuning:
    names = ("balanced", "a preset of my own with a long name", LONG)
    trials = []
    for name in names:
        for keep in (0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01):
            variant = Variant("asked", "", Preset(name), keep)
            outcome = Outcome(variant, [1.0, 0.9 + keep / 10], [1.0, 1.0], ["a", "b"], 0.975,
                              keep_mean=0.3, first_token_speedup=12.34)  # fmt: skip
            trials.append(Trial(variant, outcome, outcome, "below the floor"))
    part = PartSize(1234, 567)
    return Tuning(
        tuple(trials), (replace(trials[0], verdict="chosen"), *trials[1:4]), 0.9, "accuracy",
        COMPARISON.model, "ecl 2, horizon 12", Sampling(), part, part, 0, "2025-01-01",
        file="mine.yaml",
    )  # fmt: skip


def compared_rows() -> Comparison:
    many = [("0", 0, 123456), ("ecl", 2, 65432), ("horizon", 21, 1234)]
    rows = (*COMPARISON.rows, FAILED, PRESET, compared("asked", LONG, many))
    return replace(COMPARISON, rows=rows)


REPORTS = {
    "ask": {**REPORT, "compare": COMPARE, "warnings": ["1,234 of 5,678"]},
    "ask, small": {**REPORT, "seconds": dict.fromkeys(REPORT["seconds"], 123.456)},
}
SHOWN: dict[str, Callable[[Console], None]] = {
    **{
        name: lambda to, one=one: console.render(report_of(one), to)
        for name, one in REPORTS.items()
    },  # type: ignore[misc]
    "compare": lambda to: comparison.show_comparison(compared_rows(), to),
    "compare, notes": lambda to: comparison.show_notes(compared_rows(), to),
    "evaluate": lambda to: evaluation.show_evaluation(evaluated(True), to),
    "evaluate, no answers": lambda to: evaluation.show_evaluation(evaluated(False), to),
    "evaluate, notes": lambda to: evaluation.show_notes(evaluated(True), to),
    "profile": lambda to: profile.show_profile(profiled_rows(True), to),
    "profile, not timed": lambda to: profile.show_profile(profiled_rows(False), to),
    "profile, warnings": lambda to: profile.show_warnings(example(), to),
    "tune": lambda to: tuning.show_tuning(tuned(), to),
    "tune, notes": lambda to: tuning.show_notes(tuned(), to),
    "methods": lambda to: console.show_methods(METHODS, to),
    "presets": lambda to: console.show_presets([load_preset(one) for one in preset_names()], to),
    **{
        f"method {name}": lambda to, name=name: console.show_method(name, METHODS[name], "", to)  # type: ignore[misc]
        for name in METHODS
    },
    "model": lambda to: console.show_model(aliases()[0], to),
    "models": lambda to: console.show_models(
        [alias for alias in aliases() if alias.model_type in FAMILIES], to
    ),
}


def is_number(word: str) -> bool:
    return bool(re.search(r"\d", word))


def check(cells: Cells, text: str, width: int) -> None:
    """Nothing of the cells is lost, and no line is too long."""
    assert cells.words
    assert max(map(len, text.splitlines())) <= width
    found = Counter(text.split())
    short = {word: times for word, times in cells.words.items() if len(word) < width // 2}
    lost = {word for word, times in short.items() if found[word] < times}
    assert not lost
    # A longer word goes on in the next line, whole.
    flat = re.sub(r"\s+", "", text)
    for cell in cells.texts:
        for word in cell.split():
            assert word in found or word in flat or not is_number(word), word


@pytest.mark.parametrize("width", [80, 60, 40])
@pytest.mark.parametrize("name", SHOWN)
def test_no_cell_is_lost(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = Cells(monkeypatch)
    file = io.StringIO()
    SHOWN[name](Console(file=file, width=width, highlight=False, markup=False))
    check(cells, file.getvalue(), width)


@pytest.mark.parametrize("width", [80, 60, 40])
@pytest.mark.parametrize("tried", [TRIED, ()])
def test_no_cell_of_a_calibration_is_lost(
    tried: Any, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))  # of a pipe
    cells = Cells(monkeypatch)
    information = TokenInformation((0.1234, 0.0, 0.0, 0.0), (0.5678, 0.1, 0.0, 0.0), 3)
    found = measured(tried=tried, keep=0.3, information=information, warnings=("1,234 of 5,678",))
    printed = Console(width=width, highlight=False)
    show_calibration(found, printed)
    show_notes(found, [Path("c.yaml"), Path("curves.png")], printed)
    told = capsys.readouterr()
    check(cells, told.out + told.err, width)


def test_a_table_is_as_it_was_where_there_is_room() -> None:
    file = io.StringIO()
    table = tables.plain_table()
    table.add_column("a name")
    table.add_column("<1>", justify="right")
    table.add_row("one", "12")
    tables.print_fitted(table, Console(file=file, width=80))
    assert [line.rstrip() for line in file.getvalue().splitlines()] == [
        "a name  <1>",
        "one      12",
    ]


def makers() -> Iterator[tuple[str, set[str]]]:
    """Every module that lays out a table, with the names that it uses."""
    for path in sorted((ROOT / "vtprune").rglob("*.py")):
        names = {node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(node, ast.Name)}  # fmt: skip
        if "plain_table" in names and path.name != "tables.py":
            yield path.name, names


def test_every_plain_table_is_printed_so_that_it_fits() -> None:
    found = dict(makers())
    assert found.keys() >= {"comparison.py", "evaluation.py", "profile.py", "tuning.py"}
    for name, names in found.items():
        assert "print_fitted" in names, name
