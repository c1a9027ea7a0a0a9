"""The table of the embedded world's redundancy: which cells it has, and what it says of norms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vtprune._dev.training.redundancy import norm_cells, rank, report
from vtprune.evaluation.records import Record
from vtprune.evaluation.variants import Variant
from vtprune.inference.questions_file import Asked

CELLS = norm_cells(2, keeps=(0.5, 0.1), seeds=2)


def test_baselines_stand_at_the_input_and_once_at_the_cut() -> None:
    places = [(cell.name, cell.keep, bool(cell.matches)) for cell in CELLS]
    for keep in (0.5, 0.1):
        assert places.count(("random", keep, True)) == 2  # two seeds
        assert places.count(("random", keep, False)) == 2
        assert places.count(("uniform", keep, True)) == 1
        assert places.count(("uniform", keep, False)) == 1
        assert ("norm row", keep, False) in places
        assert ("norm none", keep, False) in places
    assert not any(name == "downsample" for name, _, _ in places)


def test_what_stands_beside_cuts_where_entropy_does() -> None:
    keys = {cell.key for cell in CELLS}
    assert all(cell.matches.key in keys for cell in CELLS if cell.matches)
    stages = [stage for cell in CELLS if cell.name == "norm none"
              for stage in cell.preset.stages or ()]  # fmt: skip
    assert {(stage.at, stage.method, dict(stage.options)["norm"]) for stage in stages} == {
        ("2", "entropy", "none")
    }


def test_the_table_says_which_keeps_cannot_be_had() -> None:
    asked = [Asked(Path(f"{n}.png"), "how many?", "2", kind=("count", "shape")[n % 2])
             for n in range(4)]  # fmt: skip
    records = {
        (number, cell.key): Record(
            number,
            cell.key,
            error="keep 0.1 is out of reach" if past(cell) else "",
            score=float(number != 3 or cell.key == "unpruned"),
            keep_mean=0.5,
        )
        for number in range(4)
        for cell in CELLS
    }
    lines = report(asked, CELLS, records, 2).splitlines()
    assert lines[0] == "| keep | tokens chosen by | all | `shape` | `count` |"
    assert lines[2] == "| 1 | nothing pruned | 100 | 100 | 100 |"
    assert lines[3] == "| 0.5 | `entropy`, `norm: row`, at layer 2 | 75 | 50 | 100 |"
    assert lines[4].startswith("| 0.5 | `entropy`, `norm: none`, at layer 2 |")
    assert sum(line.startswith("| 0.1 |") for line in lines) == 2
    assert lines[-1].startswith("Keep 0.1 can't be had by a cut at layer 2")


def past(cell: Variant) -> bool:
    """Whether a cell cuts past the input with a keep that two whole layers have spent."""
    return cell.keep == 0.1 and bool(cell.matches or "norm" in cell.name)


def test_rank_tells_spread_and_agreement() -> None:
    states = torch.randn(40, 8, 24, generator=torch.Generator().manual_seed(0))
    spread, agreement = rank(states)
    assert set(spread) == {"row", "none"}
    assert 0 < spread["row"] < spread["none"]  # rows of unit length differ in direction alone
    assert -1 <= agreement <= 1
    # A whole token made longer changes the score without a norm, and not the one with unit rows.
    longer = states.clone()
    longer[0] *= 3
    again, _ = rank(longer)
    assert again["row"] == pytest.approx(spread["row"], rel=1e-4)
    assert again["none"] > spread["none"]
