"""evaluate, tune and calibrate as Python code calls them: any media, bad items in their place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import save_noise
from PIL import Image

import vtprune
from vtprune.errors import MediaError, VtpruneError
from vtprune.models.names import embedded_weights

SHORT = vtprune.Generation(max_new_tokens=2)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return save_noise(tmp_path / "good.png", 40, 60)


def test_questions_about_any_media_are_evaluated(loaded: vtprune.Loaded, picture: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), np.uint8)
    questions = [
        (picture, "what?", "red"),
        (Image.open(picture).copy(), "what?", ["red", "blue"]),
        ("none.png", "what?", "red"),
        (clip, "what?", "red"),
        7,
        {"file": picture.read_bytes(), "question": "what?", "answer": "B", "choices": ["a", "b"]},
    ]
    result = vtprune.evaluate(loaded, questions, ["random"], [0.5], seeds=1, generation=SHORT)  # type: ignore[arg-type]
    assert (result.questions, result.files, result.labelled) == (4, 4, True)
    assert set(result.failed) == {2, 4}
    assert all(isinstance(error, VtpruneError) for error in result.failed.values())
    values = result.to_dict()
    assert [fault["question"] for fault in values["failed"]] == [2, 4]  # type: ignore[index,attr-defined]
    for row in values["rows"]:  # type: ignore[attr-defined]
        assert len(row["passes"]) == row["questions"] * row["seeds"] > 0
        assert all(one["prefill"] > 0 for one in row["passes"])
    assert [one["question"] for one in values["rows"][0]["passes"]] == [0, 1, 3, 5]  # type: ignore[index]
    assert next(row.name for row in result.rows) == "unpruned"
    few = [questions[0], 7, ("none.png", "what?"), 8]  # of which the first and the third are asked
    result = vtprune.evaluate(loaded, few, ["random"], [0.5], seeds=1, limit=2, generation=SHORT)  # type: ignore[arg-type]
    assert (result.questions, set(result.failed)) == (1, {2}), "numbers are those of the list"
    with pytest.raises(MediaError, match=r"none\.png"):
        vtprune.evaluate(loaded, [("none.png", "what?")], ["random"])
    with pytest.raises(VtpruneError, match="metric best is unknown"):
        vtprune.evaluate(loaded, questions, ["random"], metric="best")  # type: ignore[arg-type]
    with pytest.raises(VtpruneError, match=r"metric choice, but 'what' about .* has no choices"):
        vtprune.evaluate(loaded, [(picture, "what", "red")], ["random"], metric="choice")


def test_a_calibration_and_a_tuning_are_data(loaded: vtprune.Loaded, tmp_path: Path) -> None:
    pictures = [save_noise(tmp_path / f"{number}.png", 40, 50 + number) for number in range(4)]
    questions = [(path.read_bytes(), "what?") for path in pictures]
    missing = ("none.png", "what?")
    several = (pictures[:2], "what?", "red")  # its right answer is read after both pictures
    calibrated = vtprune.calibrate(loaded, [missing, questions[2], several], generation=SHORT)
    assert list(calibrated.failed) == [0]
    assert calibrated.inputs == 2
    assert calibrated.calibration().ecl >= 1
    listed = [*questions, missing]
    tuned = vtprune.tune(loaded, listed, 0.2, ["random"], [0.5], generation=SHORT)
    assert list(tuned.failed) == [4]
    assert {trial.variant.keep for trial in tuned.trials} == {0.5}
    with pytest.raises(MediaError, match=r"none\.png"):
        vtprune.tune(loaded, [missing], 0.2, ["random"], [0.5])


def test_rows_at_layers_that_nobody_measured_are_warned_of(
    loaded: vtprune.Loaded, picture: Path
) -> None:
    plan = vtprune.NeedlePlan(kinds=("patch",), sizes=(0.5,), count=1)
    sampling = vtprune.Generation(max_new_tokens=2, temperature=1.0)
    asked = [(picture, "what?", "red")]
    horizon, uniform = (
        {"methods": [name], "keeps": [0.8], "seeds": 1} for name in ("vtw", "uniform")
    )

    def warned(found: vtprune.Evaluation | vtprune.NeedleTest | vtprune.CaptionTest) -> list[str]:
        return [one.split(",")[0] for one in found.warnings if "by default" in one]

    default = ["horizon 4 by default"]
    assert warned(vtprune.evaluate(loaded, asked, generation=SHORT, **horizon)) == default
    assert warned(vtprune.evaluate(loaded, asked, generation=SHORT, **uniform)) == []
    needles = vtprune.evaluate_needles(loaded, picture, plan=plan, generation=SHORT, **horizon)
    assert warned(needles) == default
    captions = vtprune.evaluate_captions(loaded, asked, number=2, generation=sampling, **horizon)
    assert warned(captions) == default


def test_needles_captions_and_published_tables_are_data(
    loaded: vtprune.Loaded, picture: Path, tmp_path: Path
) -> None:
    plan = vtprune.NeedlePlan(kinds=("patch",), sizes=(0.5,), count=2)
    media = [picture, Image.open(picture).copy(), tmp_path / "none.png"]
    needles = vtprune.evaluate_needles(
        loaded, media, ["uniform"], [0.5], plan=plan, seeds=1, generation=SHORT
    )
    assert (needles.needles, len(needles.media)) == (2, 2)
    assert any("none.png" in warning for warning in needles.warnings)
    rows = {row.method: row for row in needles.rows if not row.errors}  # too small to downsample
    assert needles.rows[0].figures[None, 0.5].found == 1
    assert 0 < rows["uniform"].figures[None, 0.5].tokens.mean < 1
    references = ["red or blue", "a cat"]
    questions = [(medium, "describe", references) for medium in (*media[:2], "none.png")]
    captions = vtprune.evaluate_captions(
        loaded, questions, ["uniform"], [0.5], number=2, seeds=1,
        generation=vtprune.Generation(max_new_tokens=2, temperature=1.0),
    )  # fmt: skip
    assert (captions.captions, captions.questions, list(captions.failed)) == (2, 2, [2])
    figures = [row.figures["self_cider"].mean for row in captions.rows if not row.errors]
    assert len(figures) >= 2
    assert all(0 <= figure <= 1 for figure in figures)
    with pytest.raises(VtpruneError, match="temperature 0"):
        vtprune.evaluate_captions(loaded, questions, ["uniform"], generation=SHORT)
    table = vtprune.reproduce("entropyprune-llava-1.5")
    gaps = [row.flops - row.published.flops for row in table.rows
            if row.flops is not None and row.published.flops is not None]  # fmt: skip
    assert len(gaps) == 1
    assert abs(gaps[0]) < 0.1
    by_path, by_name = (
        vtprune.reproduce("embedded", model=model) for model in (embedded_weights(), None)
    )
    assert [row.left for row in by_path.rows] == [row.left for row in by_name.rows]
