"""Files that open but can't be decoded: left out and named, by everything that asks a list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import save_clip, save_noise

import vtprune
from vtprune.errors import DamagedError
from vtprune.evaluation.tune import split
from vtprune.inference.questions_file import Asked

SHORT = vtprune.Generation(max_new_tokens=2)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three pictures."""
    return [save_noise(tmp_path / f"{number}.png", 80, 90) for number in range(3)]


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:4000])


def assert_named(warnings: Sequence[str], file: Path, ending: str) -> None:
    (warning,) = [warning for warning in warnings if file.name in warning]
    assert "the picture is damaged" in warning
    assert warning.endswith(ending)


def test_captions_are_of_the_other_files(loaded: vtprune.Loaded, files: list[Path]) -> None:
    questions = [(file, "describe", [f"a {file.stem}", "a cat"]) for file in files]
    sampling = vtprune.Generation(max_new_tokens=2, temperature=1.0)

    def captions() -> vtprune.CaptionTest:
        return vtprune.evaluate_captions(
            loaded, questions, ["uniform"], [0.5], number=2, seeds=1, generation=sampling
        )

    before = captions()
    damage(files[0])
    after = captions()
    assert (before.questions, after.questions) == (3, 2)
    assert len(after.media) == 2
    assert {row.questions for row in after.rows if not row.errors} == {2}
    assert_named(after.warnings, files[0], "1 question left out")
    for file in files[1:]:
        damage(file)
    with pytest.raises(DamagedError, match=r"0\.png"):
        captions()


def test_a_calibration_is_of_the_other_files(loaded: vtprune.Loaded, files: list[Path]) -> None:
    questions = [(file, word, "red") for file in files for word in ("what?", "where?")]
    damage(files[1])
    found = vtprune.calibrate(loaded, questions, generation=SHORT)
    assert (found.inputs, found.questions) == (2, 4)
    assert_named(found.warnings, files[1], "2 questions left out")
    with pytest.raises(DamagedError, match=r"1\.png"):
        vtprune.calibrate(loaded, [(files[1], "what?", "red")], generation=SHORT)


def test_windows_are_measured_on_the_next_file(loaded: vtprune.Loaded, files: list[Path]) -> None:
    """Of three files two are chosen, the first and the second."""
    damage(files[0])
    questions = [(file, "what?", "red") for file in files]
    found = vtprune.calibrate(loaded, questions, windows=2, generation=SHORT)
    assert found.information is not None
    assert found.information.inputs == 2


@pytest.mark.parametrize("held_out", [False, True])
def test_a_tuning_is_of_the_other_files(
    loaded: vtprune.Loaded, tmp_path: Path, held_out: bool
) -> None:
    files = [save_noise(tmp_path / f"{number}.png", 80, 90) for number in range(6)]
    parts = split([Asked(file, "what?") for file in files])
    damaged = Path(str(parts[held_out][0].file))
    damage(damaged)
    questions = [(file, "what?") for file in files]
    found = vtprune.tune(loaded, questions, 0.2, ["random"], [0.9], generation=SHORT)
    assert (found.search.files, found.held_out.files) == ((2, 3) if held_out else (1, 4))
    assert str(damaged) not in found.media
    assert_named(found.warnings, damaged, "1 question left out")
    for each in parts[True]:  # with one file for the search
        damage(Path(str(each.file)))
    with pytest.raises(DamagedError, match=Path(str(parts[True][0].file)).name):
        vtprune.tune(loaded, questions, 0.2, ["random"], [0.9], generation=SHORT)


def test_needles_are_in_the_other_files(loaded: vtprune.Loaded, files: list[Path]) -> None:
    damage(files[2])
    plan = vtprune.NeedlePlan(kinds=("object",), sizes=(0.5,), count=3)
    found = vtprune.evaluate_needles(
        loaded, files, ["uniform"], [0.5], plan=plan, seeds=1, generation=SHORT
    )
    assert (found.needles, len(found.media)) == (3, 2)
    assert any("2.png: the picture is damaged" in warning for warning in found.warnings)


def test_needles_are_taken_from_no_frame_that_is_damaged(
    loaded: vtprune.Loaded, tmp_path: Path, files: list[Path]
) -> None:
    clip = save_clip(tmp_path / "clip", 9)
    (clip / "004.png").write_bytes((clip / "004.png").read_bytes()[:60])
    plan = vtprune.NeedlePlan(kinds=("object",), sizes=(0.5,), count=4)
    result = vtprune.evaluate_needles(
        loaded, [clip, *files], ["uniform"], [0.5], plan=plan, seeds=1, generation=SHORT,
        sampling=vtprune.Sampling(end="2"),
    )  # fmt: skip
    assert (result.needles, len(result.media)) == (4, 3)
    assert any("004.png" in warning for warning in result.warnings), result.warnings
