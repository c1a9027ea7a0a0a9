"""Sampled captions: their scores by hand, and what `evaluate --captions` says."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import assert_refused, save_noise

import vtprune
from vtprune import demo
from vtprune.cli import cli
from vtprune.evaluation.bootstrap import Difference
from vtprune.evaluation.captions.result import CaptionRow, caption_key, make_rows
from vtprune.evaluation.captions.scores import Cider, distinct, words
from vtprune.evaluation.records import Record
from vtprune.evaluation.variants import list_variants, repeat_variants
from vtprune.inference.questions_file import Asked

TWO = Cider([["a cat sits"], ["a dog runs"]])
"""Of two documents, so that "a" weighs nothing and every other word log 2."""


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *map(str, args)])


def test_words_are_lower_case_without_punctuation() -> None:
    assert words("A cat's (red) hat, then: 3.5 - it ENDS.") == [
        "a", "cat's", "red", "hat", "then", "3.5", "it", "ends"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("caption", "score"),
    [
        ("A cat sits.", 7.5),  # three of the four lengths are there, each with cosine 1
        ("a dog runs", 0.0),  # "a" is in all documents
        # cat against cat and sits: 1 / sqrt(2), of one length; two words fewer
        ("cat", 10 * math.exp(-4 / 72) / math.sqrt(2) / 4),
        # twice the weight, clipped to the reference's in the product and not in the norm
        ("cat cat", 10 * math.exp(-1 / 72) / (2 * math.sqrt(2)) / 4),
        ("", 0.0),
    ],
)
def test_cider_d_is_that_of_the_paper(caption: str, score: float) -> None:
    assert TWO.score(caption, ["a cat sits"]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("caption", "references", "score"),
    [
        ("a red red circle moves to the left", 0, 2.16273603),
        ("two squares fall down", 1, 3.39613187),
        ("a star turns", 2, 2.74685049),
    ],
)
def test_cider_is_that_of_the_coco_evaluation(caption: str, references: int, score: float) -> None:
    """Figures of `Cider().compute_score` of pycocoevalcap 1.2 on these texts."""
    documents = [
        ["a red circle moves left and stops", "the circle goes left"],
        ["two blue squares fall", "blue squares fall down fast"],
        ["a small star turns red"],
    ]
    assert Cider(documents).score(caption, documents[references]) == pytest.approx(score, abs=1e-8)


def test_cider_of_several_references_is_their_mean() -> None:
    cider = Cider([["a cat sits", "cats sit"], ["a dog runs"], ["two birds fly"]])
    apart = [cider.score("a cat sits", [text]) for text in ("a cat sits", "cats sit")]
    assert cider.score("a cat sits", ["a cat sits", "cats sit"]) == pytest.approx(sum(apart) / 2)


def test_an_ngram_that_no_document_has_weighs_most() -> None:
    cider = Cider([["a cat"], ["a dog"], ["a fox"]])
    assert cider.vector("a cat bird", 1) == pytest.approx(
        {("a",): 0.0, ("cat",): math.log(3), ("bird",): math.log(3)}
    )


def test_self_cider_is_nought_of_one_caption_again_and_one_of_captions_with_nothing_in_common() \
        -> None:  # fmt: skip
    first, second = "cats sit on mats", "dogs run over fields"
    assert TWO.self_cider([first, first, first]) == pytest.approx(0)
    assert TWO.self_cider([first, second]) == pytest.approx(1)
    # eigenvalues 2, 1 and 0
    share = math.sqrt(2) / (math.sqrt(2) + 1)
    assert TWO.self_cider([first, second, first]) == pytest.approx(-math.log(share) / math.log(3))
    assert TWO.self_cider(["", ""]) == 0


def test_distinct_n_is_a_share_of_the_words() -> None:
    assert distinct(["a cat", "a dog"], 1) == 3 / 4
    assert distinct(["a cat", "a dog"], 2) == 2 / 4
    assert distinct(["", ""], 1) == 0


def rows_of(asked: list[Asked], captions: dict[str, list[list[str]]]) -> list[CaptionRow]:
    """The rows of a variant's name -> for each question its two captions."""
    variants = repeat_variants(list_variants(["divprune"], [0.3]), 1)
    keys = {variant.method: variant for variant in variants}
    records = {
        (number, caption_key(keys[name], turn)): Record(number, "", text)
        for name, of_questions in captions.items()
        for number, texts in enumerate(of_questions)
        for turn, text in enumerate(texts)
    }
    rows, _ = make_rows(asked, variants, 2, records)
    return rows


def test_rows_have_means_and_paired_differences() -> None:
    asked = [
        Asked(Path(f"{answer}.mp4"), "what happens?", f"{answer} cats sit down", (), "")
        for answer in ("two", "three", "four")
    ]
    right = [[f"{each.answer}", f"{each.answer}"] for each in asked]
    wrong = [["dogs run over fields"] * 2 for _ in asked]
    unpruned, divprune, *_ = rows_of(asked, {"unpruned": right, "divprune": wrong})
    assert unpruned.figures["cider"].mean > 5
    assert divprune.figures["cider"].mean == 0
    gap = divprune.against_unpruned["cider"]
    assert gap.mean == pytest.approx(-unpruned.figures["cider"].mean)
    assert divprune.verdict.startswith("poorer (CIDEr -")
    assert unpruned.figures["words"].mean == 4
    assert unpruned.against_unpruned == {}


def test_without_references_the_unpruned_captions_weigh_ngrams() -> None:
    asked = [Asked(Path(f"{name}.png"), "what is it?") for name in "ab"]
    unpruned = [
        ["red cats sit down", "blue dogs run off"],
        ["two birds fly up", "four fish swim on"],
    ]
    pruned = [["red cats sit down"] * 2, ["two birds fly up"] * 2]
    first, second, *_ = rows_of(asked, {"unpruned": unpruned, "divprune": pruned})
    assert "cider" not in first.figures
    assert first.figures["self_cider"].mean == pytest.approx(1, abs=1e-3)
    assert second.figures["self_cider"].mean == pytest.approx(0)
    assert second.verdict.startswith("more alike (self-CIDEr -")


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(-0.4, -0.1, "poorer"), (-0.4, 0.1, "not poorer for certain"), (0.1, 0.4, "better")],
)
def test_a_verdict_goes_by_the_interval(low: float, high: float, words: str) -> None:
    gap = Difference((low + high) / 2, low, high, 0.5)
    row = CaptionRow("a", "asked", "a", None, "", 0.3, 0.3, 1, 9, {}, {"cider": gap})
    assert row.verdict == f"{words} (CIDEr {gap.mean:+.2f}, {low:+.2f} to {high:+.2f})"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What happens in each of two clips."""
    folder = tmp_path_factory.mktemp("captions")
    lines = [line for line in demo.write(folder, 60, 0) if line["kind"] == "what_happens"][:2]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "few.jsonl").write_text(text, encoding="utf-8")
    assert len(lines) == 2
    return folder


OPTIONS = ("--captions", 2, "--keep", 0.3, "--presets", "balanced", "--seeds", 1,
           "--max-new-tokens", 12)  # fmt: skip


@pytest.fixture(scope="module")
def whole(questions: Path) -> Result:
    return run(questions / "few.jsonl", *OPTIONS, "--answers", questions / "a.jsonl", "--save",
               questions / "c.csv", "--save", questions / "c.png", "--json")  # fmt: skip


def test_the_command_measures_event_sentences(whole: Result, questions: Path) -> None:
    assert whole.exit_code == 0, whole.output
    result = json.loads(whole.stdout)
    assert (result["captions"], result["temperature"], result["questions"]) == (2, 1.0, 2)
    unpruned, balanced = result["rows"][:2]
    assert unpruned["cider"] > 1
    assert 0 <= unpruned["self_cider"] <= 1
    assert unpruned["cider_against_unpruned"] is None
    gap = balanced["cider_against_unpruned"]
    assert gap["mean"] == pytest.approx(balanced["cider"] - unpruned["cider"])
    assert balanced["keep_mean"] == pytest.approx(0.3, abs=0.02)
    with (questions / "c.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(result["rows"])
    assert (questions / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_a_caption_is_the_answer_of_its_seed(whole: Result, questions: Path) -> None:
    lines = [json.loads(line) for line in (questions / "a.jsonl").open(encoding="utf-8")][1:]
    second = next(line for line in lines if line["cell"] == "unpruned caption 1")
    generation = vtprune.Generation(12, temperature=1.0, seed=1)
    report = vtprune.ask(None, second["file"], "what happens?", keep=1, generation=generation)
    assert second["answer"] == report.answer


def test_a_run_goes_on_from_its_answers(whole: Result, questions: Path) -> None:
    lines = (questions / "a.jsonl").read_text().splitlines()
    half = questions / "half.jsonl"
    half.write_text("\n".join(lines[: len(lines) * 3 // 4]) + "\n")
    again = run(questions / "few.jsonl", *OPTIONS, "--answers", half, "--json")
    assert json.loads(again.stdout)["rows"] == json.loads(whole.stdout)["rows"]
    other = run(questions / "few.jsonl", *OPTIONS, "--temperature", 0.5, "--answers", half)
    assert_refused(other, "Error: .* holds the answers of another evaluation")


def test_the_tables_fit_a_terminal(
    whole: Result, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(questions / "few.jsonl", *OPTIONS, "--answers", questions / "a.jsonl")
    assert shown.exit_code == 0, shown.output
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    assert "change from unpruned, paired by question" in shown.stdout
    assert "2 captions each, at temperature 1" in shown.stderr


def test_media_without_a_question_are_described(checkpoints, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    files = [save_noise(tmp_path / "a.png", 40, 40), save_noise(tmp_path / "b.png", 50, 40)]
    shown = run(*files, "--model", checkpoints("llava_onevision"), "--captions", 2, "--methods",
                "random", "--keep", 0.5, "--seeds", 1, "--max-new-tokens", 4, "--json",
                "--answers", tmp_path / "a.jsonl")  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["rows"][0]["cider"] is None
    line = (tmp_path / "a.jsonl").read_text().splitlines()[1]
    assert json.loads(line)["text"] == "Describe it in one sentence."


def test_what_does_not_fit_captions_is_refused(
    questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtprune.models.loading.load", lambda *_, **__: pytest.fail("loaded"))
    few = questions / "few.jsonl"
    for options, message in (
        (("--captions", 2, "--needle"), "--needle and --captions exclude each other"),
        (("--captions", 2, "--turns"), "--turns and --captions exclude each other"),
        (("--captions", 2, "--beside"), "--beside and --captions exclude each other"),
        (("--captions", 1), "--captions 1 is out of range"),
        (("--captions", 2, "--temperature", 0), "captions are sampled, and temperature 0"),
        (("--temperature", 0.5), "--temperature changes nothing without --captions"),
        (("--top-p", 0.5), "--top-p changes nothing without --captions"),
        (("--temperature", 1), "--temperature changes nothing without --captions"),
        (("--captions", 2, "--metric", "exact"), "--metric changes nothing with --captions"),
        (("--needle-count", 20), "--needle-count changes nothing without --needle"),
        (("--captions", 2, "--needle-sizes", 0.1), "--needle-sizes changes nothing without"),
    ):
        assert_refused(run(few, *options), f"Error: {message}")
    assert_refused(run("demo", "--captions", 2, "-q", "what?"), "Error: demo has its own questions")
    columns = "--columns", "file=image"
    for given in (["demo"], ["demo", "--needle"], ["a.png", "--needle"], ["a.png", "-q", "what?"]):
        assert_refused(run(*given, *columns), "Error: --columns changes nothing without a list")
