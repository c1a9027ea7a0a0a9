"""Changes of the code that its tests should find: what is changed, and what tests make of it."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from vtprune._dev import CHECKOUT, mutants
from vtprune._dev.mutants import changed_source, list_changes, main, try_changes

SOURCE = '''
def first(values: list[int], least: int = 3) -> list[int]:
    """Docstring."""
    if least is None or not values:
        raise ValueError(f"{least + 1} is wrong")
    return [value for value in values[1:] if value < min(least, 7)]
'''
CHANGED = {
    "least is None or not values -> the other way",
    "least is None or not values -> And",
    "least is None or not values -> without part 0",
    "least is None or not values -> without part 1",
    "least is None -> IsNot",
    "not values -> without the sign",
    "value < min(least, 7) -> LtE",
    "value < min(least, 7) -> GtE",
    "min(least, 7) -> max",
    "min(least, 7) -> argument 0 None",
    "7 -> +1",
    "7 -> -1",
    "1: -> without lower",
    "1 -> +1",
    "1 -> -1",
}


def test_code_is_changed_and_words_are_not() -> None:
    changes = list_changes("a.py", SOURCE)
    words = {change.what for change in changes}
    assert words >= CHANGED
    rest = " ".join(words - CHANGED)
    assert rest.count(" -> ") == 3  # the `return`, and the comprehension's test twice
    assert {change.place.split()[1] for change in changes} == {"first"}
    assert "wrong" not in rest
    assert "int" not in rest


def test_every_change_makes_another_source_that_python_reads() -> None:
    file = "vtprune/tokens/quotas.py"
    source = (CHECKOUT / file).read_text("utf-8")
    changes = list_changes(file, source)
    made = [changed_source(source, change.number) for change in changes]
    assert len(made) > 100
    assert ast.unparse(ast.parse(source)) not in made
    for text in made:
        compile(text, file, "exec")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "count.py").write_text(
        "def count(n):\n    left = n\n    while left > 0:\n        left -= 1\n    return n + 0\n"
    )
    (folder / "test_count.py").write_text(
        "from count import count\n\ndef test_count():\n    assert count(2) == 2\n"
    )
    monkeypatch.setattr(mutants, "CHECKOUT", folder)
    return folder


def test_changes_are_found_hang_or_are_left(
    checkout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(mutants, "LEAST_SECONDS", 1.0)
    words = {"n + 0 -> Sub": "left", "0 -> +1": "found", "left -= 1 -> Add": "hung"}
    source, log = (checkout / "count.py").read_text(), tmp_path / "log.jsonl"
    # Of two changes of a 0, the second is in the sum.
    changes = {change.what: change for change in list_changes("count.py", source)}
    chosen = [changes[word] for word in words]
    trials = try_changes(chosen, ["test_count.py"], log)
    assert {trial.change.what: trial.outcome for trial in trials} == words
    assert (checkout / "count.py").read_text() == source  # a copy is changed
    before = log.read_text()
    assert try_changes(chosen, ["test_count.py"], log) == trials  # none of them again
    assert log.read_text() == before
    main(["count.py", "--tests", "test_count.py", "--count", "0", "--save", str(log)])
    said = capsys.readouterr().out
    assert "1 left, 1 found, 1 hung" in said
    assert "count.py:5 count: n + 0 -> Sub" in said
    assert len(json.loads(before.splitlines()[0])["change"]) == 4


def test_tests_that_fail_without_a_change_are_refused(checkout: Path, tmp_path: Path) -> None:
    (checkout / "test_count.py").write_text("def test_count():\n    assert False\n")
    with pytest.raises(SystemExit, match="without any change"):
        try_changes([], ["test_count.py"], tmp_path / "log.jsonl")
