"""The result on the embedded model: who asks which questions, and what becomes of the answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vtprune._dev.lines import read_lines
from vtprune._dev.training.asking import AskingJob, Part, answer, questions, split_parts
from vtprune._dev.training.results import all_cells, holm, in_headline, of_medium, table
from vtprune.evaluation.records import AnswersFile, Record
from vtprune.evaluation.rows import make_rows
from vtprune.inference.questions_file import Asked

ASKED = [Asked(Path(f"{n // 3}.png"), f"question {n}", "yes", kind="k") for n in range(30)]
CELLS = all_cells(("divprune", "fastv"), ("fast",), (0.5, 0.3), seeds=2)


def parts(few: int) -> tuple[Part, ...]:
    headline = [cell for cell in CELLS if in_headline(cell, ())]
    return split_parts(ASKED, CELLS, headline, few)


def job(folder: Path, few: int, processes: int) -> AskingJob:
    return AskingJob(folder, tuple(ASKED), parts(few), processes=processes)


def test_the_first_part_ends_with_a_file() -> None:
    first, rest = parts(few=10)
    assert first.numbers == tuple(range(12))
    assert rest.numbers == tuple(range(12, 30))
    assert [part.name for part in parts(few=30)] == ["first"]


def test_the_headline_has_presets_baselines_and_rivals() -> None:
    names = {cell.name for cell in CELLS if in_headline(cell, ("fastv",))}
    assert names == {"unpruned", "fast", "random", "uniform", "downsample", "fastv"}


def test_no_cell_is_asked_twice() -> None:
    keys = [cell.key for cell in CELLS]
    assert len(keys) == len(set(keys))
    assert {cell.row for cell in CELLS if cell.matches} == {
        f"{name} beside fast at input, horizon keep {keep}"
        for name in ("random", "uniform")
        for keep in (0.5, 0.3)
    }


def test_tables_can_be_of_one_medium() -> None:
    asked = [
        Asked(Path(name), "?", "yes") for name in ("a.png", "b.mp4", "b.mp4", "c.png", "d.mp4")
    ]
    records = {(n, "unpruned"): Record(n, "unpruned") for n in (0, 1, 2, 3, 7)}
    clips, own = of_medium(asked[:4], records, "clips")
    assert [one.file.name for one in clips] == ["b.mp4", "b.mp4"]
    assert {key[0]: one.question for key, one in own.items()} == {0: 1, 1: 2}
    pictures, own = of_medium(asked[:4], records, "pictures")
    assert [one.file.name for one in pictures] == ["a.png", "c.png"]
    assert {key[0]: one.question for key, one in own.items()} == {0: 0, 1: 3}
    both, own = of_medium(asked[:4], records, "both")
    assert (both, set(own)) == (asked[:4], {(n, "unpruned") for n in range(4)})


def test_processes_share_whole_files_and_leave_none_out(tmp_path: Path) -> None:
    whole = job(tmp_path, few=30, processes=3)
    shares = [whole.share(whole.parts[0], rank) for rank in range(3)]
    assert sorted(sum(shares, ())) == list(range(30))
    files = [{ASKED[number].file for number in own} for own in shares]
    assert not files[0] & files[1]
    assert not files[1] & files[2]


def test_what_processes_answered_becomes_one_table(tmp_path: Path) -> None:
    whole = job(tmp_path, few=12, processes=2)
    for part in whole.parts:
        for rank in range(2):
            own = whole.share(part, rank)
            book = AnswersFile(whole.path(part, rank), {})
            for place, number in enumerate(own):
                book.add([
                    Record(place, cell.key, score=float(number % 3 == 0 or cell.keep == 1),
                           keep_mean=cell.keep or 0)
                    for cell in part.cells
                ])  # fmt: skip
            book.close()
    records = whole.collect()
    assert len(records) == sum(len(part.numbers) * len(part.cells) for part in whole.parts)
    assert all(one.score == (number % 3 == 0) for (number, key), one in records.items()
               if key != "unpruned")  # fmt: skip
    rows = make_rows(ASKED[:12], CELLS, {k: v for k, v in records.items() if k[0] < 12})
    lines = list(table(rows, (0.5, 0.3)))
    assert lines[2].startswith("| unpruned, 12 questions | 100.0 (100.0-100.0)")
    assert "| `divprune` at input | 33.3 (33.3-33.3) | 33.3 (33.3-33.3) |" in lines


def test_methods_cut_at_the_layers_of_the_calibration(tmp_path: Path) -> None:
    asked = questions(tmp_path, "dev", 1, 0)[:1]
    cells = tuple(cell for cell in all_cells(("fastv",), (), (0.5,), 1) if cell.method != "random")
    part = Part("first", (0,), cells)
    file = tmp_path / "layers.yaml"
    for ecl in (3, 5):
        figures = {"model_type": "llava_onevision", "layers": 16, "hidden_size": 192}
        file.write_text(json.dumps({**figures, "ecl": ecl, "horizon": 9}), encoding="utf-8")
        out = tmp_path / str(ecl)
        out.mkdir()
        asking = AskingJob(out, asked, (part,), processes=1, calibration=file)
        answer(0, asking)
        about, *_ = read_lines(asking.path(part, 0))
        assert about["vtprune"]["calibration"] == [ecl, 9]


def test_holm_is_the_textbook_case() -> None:
    # 4 x 0.01, 3 x 0.02, 2 x 0.03 -> 0.06 stays, 1 x 0.04 -> raised to 0.06
    assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.9, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
