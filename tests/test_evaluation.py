"""Scores and intervals are what their definitions say, and a file is encoded once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import save_clip, save_noise

from vtprune.errors import DamagedError, MediaError, VtpruneError
from vtprune.evaluation.bootstrap import difference, estimate
from vtprune.evaluation.damaged import DamagedFiles
from vtprune.evaluation.evaluate import answer_all, evaluate, settings_head
from vtprune.evaluation.records import AnswersFile
from vtprune.evaluation.runner import AskSettings
from vtprune.evaluation.scoring import chosen, pick_metric, score
from vtprune.evaluation.variants import fingerprint, list_variants, repeat_variants
from vtprune.inference.generate import Generation
from vtprune.inference.questions_file import Asked
from vtprune.models.base import Sampling
from vtprune.models.loading import load
from vtprune.preset import load_preset, override
from vtprune.preset.calibration import Calibration


@pytest.mark.parametrize(
    ("expected", "given", "value"),
    [
        ("red", "The cups are red.", 1),
        ("red", "They are reddish", 0),
        ("dark red", "a dark, red car", 1),
        ("yes", "Yes, it does.", 1),
        ("yes", "No. Yes would be wrong", 0),
        ("no", "there is no dog", 0),
        ("3", "There are three cups", 1),
        ("three", "3", 1),
        ("3", "13", 0),
        ("1,200", "1200 people", 1),
        ("07", "7", 0),
        ("2.50", "it costs 2.5 euro", 1),
        ("red", "", 0),
    ],
)
def test_an_answer_is_scored_by_what_is_asked_for(expected: str, given: str, value: float) -> None:
    assert score(expected, given) == value


def test_the_metric_follows_the_answer() -> None:
    assert pick_metric("42", ()) == "number"
    assert pick_metric("forty cats", ()) == "contains"
    assert pick_metric("7", ("7", "8")) == "choice"


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        ("B", "dog"),
        ("(b) dog", "dog"),
        ("b.", "dog"),
        ("Answer: C", "a bird"),
        ("dog", "dog"),
        ("a dog", "dog"),
        ("It is the cat", "cat"),
        ("the cat and the dog", ""),
        ("A bird", "a bird"),
        ("Z", ""),
        ("", ""),
    ],
)
def test_a_choice_is_named_by_letter_or_by_text(given: str, choice: str) -> None:
    assert chosen(given, ("cat", "dog", "a bird")) == choice


def test_a_choice_is_right_by_its_letter_and_wrong_for_none() -> None:
    assert score("dog", "B", ("cat", "dog")) == 1
    assert score("dog", "A", ("cat", "dog")) == 0
    assert score("dog", "perhaps", ("cat", "dog")) == 0


def test_exact_and_anls() -> None:
    assert score("a red cup", "Red cup.", metric="exact") == 1
    assert score("red cup", "the red cup there", metric="exact") == 0
    # "kitten" to "sitting" takes 3 edits of 7: 1 - 3/7
    assert score("kitten", "sitting", metric="anls") == pytest.approx(4 / 7)
    assert score("abcd", "wxyz", metric="anls") == 0
    assert score("abcdefgh", "abc", metric="anls") == 0  # 3/8 is below one half
    with pytest.raises(ValueError, match="metric 'bleu' is not one of"):
        score("a", "b", metric="bleu")


def test_an_interval_by_file_is_wider_than_one_by_question() -> None:
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(20) < 0.5, 10).astype(float)  # ten alike questions a file
    files = [str(i // 10) for i in range(200)]
    by_file = estimate(right.tolist(), files)
    by_question = estimate(right.tolist(), [str(i) for i in range(200)])
    assert by_file.low <= by_file.mean == right.mean() <= by_file.high
    # sqrt(p (1 - p) / 20) against sqrt(p (1 - p) / 200): the first is sqrt(10) times as wide.
    ratio = (by_file.high - by_file.low) / (by_question.high - by_question.low)
    assert ratio == pytest.approx(10**0.5, rel=0.15)


def test_an_interval_covers_what_it_should() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(200):
        values = (rng.random(80) < 0.7).astype(float).tolist()
        found = estimate(values, [str(i) for i in range(80)], seed=trial)
        inside += found.low <= 0.7 <= found.high
    assert 180 <= inside <= 199


def test_a_paired_difference_leaves_out_what_both_share() -> None:
    rng = np.random.default_rng(2)
    base = (rng.random(400) < 0.5).astype(float)
    worse = base.copy()
    worse[:20] = 0
    files = [str(i // 4) for i in range(400)]
    found = difference(worse.tolist(), base.tolist(), files)
    assert found.mean == pytest.approx(-base[:20].sum() / 400)
    assert found.low < found.mean < found.high < 0.01
    assert found.worse < 0.05
    assert difference(base.tolist(), base.tolist(), files).worse == 1.0


def test_nothing_is_right_where_the_answer_is_none_of_the_choices() -> None:
    assert score("red", "whatever", (), "choice") == 0
    assert score("red", "whatever", ("blue", "green"), "choice") == 0
    assert score("red", "red", ("red", "green"), "choice") == 1


def test_the_first_token_counts_the_tower_in_every_row(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    picture = save_noise(tmp_path / "a.png", 90, 150)
    asked = [Asked(picture, "what?"), Asked(picture, "where is it?")]
    cells = repeat_variants(list_variants(["entropy", "predictable"], [0.7]), 1)
    book = AnswersFile(None, {})
    answer_all(loaded, asked, cells, book, AskSettings(generation=Generation(max_new_tokens=3)),
                   DamagedFiles())  # fmt: skip
    whole = [one for one in book.records.values() if not one.error]
    assert len(whole) >= 8
    assert all(one.first > one.prefill > 0 for one in whole)
    seen = {one.first - one.prefill for one in whole if one.cell == "unpruned"}
    assert len(seen) == 1  # encoded once, and both questions waited for it


def test_answers_scored_by_another_metric_are_not_gone_on_with(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    asked = (Asked(save_noise(tmp_path / "a.png", 60, 60), "what?", "red"),)
    cells = tuple(repeat_variants(list_variants(["entropy"], [0.7]), 1))
    settings = AskSettings(generation=Generation(max_new_tokens=3))
    evaluate(loaded, asked, cells, settings, tmp_path / "answers.jsonl")
    for other in (
        (loaded, replace(settings, metric="exact")),
        (replace(loaded, calibration=Calibration(1, 2, None, {}, "file")), settings),
    ):
        with pytest.raises(VtpruneError, match="another evaluation"):
            evaluate(other[0], asked, cells, other[1], tmp_path / "answers.jsonl")


def test_answers_know_the_places_that_they_were_cut_at(
    checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    asked = [Asked(Path("a.png"), "what?")]
    before = settings_head(loaded, asked, AskSettings())
    moved = replace(loaded.find_calibration()[0], horizon=1)
    assert settings_head(replace(loaded, calibration=moved), asked, AskSettings()) != before
    own = load_preset("balanced")
    key = fingerprint(own)
    assert fingerprint(replace(own, description="said otherwise")) == key
    assert fingerprint(override(own, keep=0.25)) != key
    monkeypatch.setattr("vtprune.pruners.spread.DEEP", 0.5)
    assert fingerprint(own) != key


def test_a_file_is_encoded_once_for_all_its_questions_and_cells(
    checkpoints, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    pictures = [save_noise(tmp_path / "a.png", 90, 150), save_noise(tmp_path / "b.png", 60, 60)]
    asked = [Asked(one, question) for one in pictures for question in ("what?", "where is it?")]
    cells = repeat_variants(list_variants(["entropy", "vtw"], [0.7, 0.6]), 2, matched=True)
    cells = [cell for cell in cells if cell.method != "downsample"]  # smaller pictures
    calls: list[int] = []
    tower = loaded.model.model.vision_tower
    handle = tower.register_forward_hook(lambda *_: calls.append(1))
    book = AnswersFile(None, {})
    answer_all(loaded, asked, cells, book, AskSettings(generation=Generation(max_new_tokens=3)),
                   DamagedFiles())  # fmt: skip
    handle.remove()
    assert len(calls) == len(pictures)
    assert len(book.records) == len(asked) * len(cells)
    told = {record.error for record in book.records.values()}
    assert told == {"", "no matching cut: the compared method cuts only at the input"}


def test_answers_to_some_questions_only_mean_agreement_for_all(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    picture = save_noise(tmp_path / "a.png", 60, 60)
    cells = tuple(repeat_variants(list_variants(["uniform"], [0.5]), 5))
    settings = AskSettings(generation=Generation(max_new_tokens=3))
    said = {}
    for answers in ((None, None), ("red", None), ("red", "blue")):
        asked = tuple(Asked(picture, f"what {i}?", one) for i, one in enumerate(answers))
        found = evaluate(loaded, asked, cells, settings)
        said[answers] = (found.labelled, [one for one in found.warnings if "right answer" in one])
        assert not any("seeds say little" in one for one in found.warnings)
    assert said[None, None] == (False, [])
    assert said["red", "blue"] == (True, [])
    labelled, notes = said["red", None]
    assert not labelled
    assert len(notes) == 1
    assert notes[0].startswith("1 of 2 questions have a right answer: agreement")


def test_a_file_that_cannot_be_decoded_is_left_out_and_named(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    whole = save_noise(tmp_path / "whole.png", 60, 60)
    cut = tmp_path / "cut.png"
    cut.write_bytes(save_noise(tmp_path / "long.png", 90, 90).read_bytes()[:4000])
    asked = [Asked(cut, "what?"), Asked(whole, "what?"), Asked(cut, "where?")]
    cells = tuple(repeat_variants(list_variants(["entropy"], [0.7]), 1))
    settings = AskSettings(generation=Generation(max_new_tokens=3))
    book = tmp_path / "answers.jsonl"
    found = evaluate(loaded, asked, cells, settings, book)
    assert (found.questions, found.files) == (1, 1)
    assert {row.questions for row in found.rows} == {1}
    told = [warning for warning in found.warnings if "cut.png" in warning]
    assert len(told) == 1
    assert told[0].endswith("2 questions left out")
    # Mended, it is asked; the other file is not asked again.
    cut.write_bytes((tmp_path / "long.png").read_bytes())
    before = book.read_text()
    found = evaluate(loaded, asked, cells, settings, book)
    assert (found.questions, found.files) == (3, 2)
    assert book.read_text().startswith(before)
    assert book.read_text().count("\n") == before.count("\n") + 2 * len(cells)
    # Broken again, its answers from then are in no row.
    cut.write_bytes((tmp_path / "long.png").read_bytes()[:4000])
    more = tuple(repeat_variants(list_variants(["entropy", "vtw"], [0.7]), 1))
    found = evaluate(loaded, asked, more, settings, book)
    assert (found.questions, {row.questions for row in found.rows}) == (1, {1})


def test_flags_that_do_not_fit_a_file_leave_nothing_out(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    asked = [Asked(save_clip(tmp_path / f"clip {num}", num), "what?") for num in (3, 9)]
    cells = tuple(repeat_variants(list_variants(["entropy"], [0.7]), 1))
    with pytest.raises(MediaError, match="no frame from 5 s on"):
        evaluate(loaded, asked, cells, AskSettings(sampling=Sampling(start=5.0)))


def test_when_no_file_can_be_decoded_that_is_an_error(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    cut = tmp_path / "cut.png"
    cut.write_bytes(save_noise(tmp_path / "long.png", 90, 90).read_bytes()[:4000])
    cells = tuple(repeat_variants(list_variants(["entropy"], [0.7]), 1))
    with pytest.raises(DamagedError, match=r"cut\.png"):
        evaluate(loaded, [Asked(cut, "what?")], cells)
