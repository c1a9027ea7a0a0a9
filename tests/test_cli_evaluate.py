"""`vtprune evaluate`, as a user runs it, on the embedded model and a few of its questions."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import assert_refused, save_noise, small_disk

from vtprune import demo
from vtprune.cli import cli
from vtprune.errors import VtpruneError
from vtprune.evaluation import runner
from vtprune.evaluation.records import AnswersFile, Record, read_records


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five questions about two files."""
    folder = tmp_path_factory.mktemp("questions")
    lines = demo.write(folder, 8, 0)
    few = [lines[0], lines[1], lines[2], lines[4], lines[5]]
    text = "".join(json.dumps(line) + "\n" for line in few)
    (folder / "few.jsonl").write_text(text, encoding="utf-8")
    bare = [{"file": line["file"], "question": line["question"]} for line in few]
    text = "".join(json.dumps(line) + "\n" for line in bare)
    (folder / "bare.jsonl").write_text(text, encoding="utf-8")
    return folder


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *map(str, args)])


@pytest.fixture(scope="module")
def whole(questions: Path) -> Result:
    return run(questions / "few.jsonl", "--methods", "entropy", "--keep", "0.3", "--seeds", 2,
               "--beside", "--metric", "exact", "--answers", questions / "answers.jsonl",
               "--save", questions / "plot.png", "--save", questions / "rows.csv", "--save",
               questions / "all.json", "--json")  # fmt: skip


def test_the_rows_are_the_unpruned_model_what_was_asked_and_the_baselines(whole: Result) -> None:
    assert whole.exit_code == 0, whole.output
    rows = json.loads(whole.stdout)["rows"]
    names = [row["row"] for row in rows]
    assert names[0] == "unpruned"
    for name in ("entropy at ecl keep 0.3", "random at input keep 0.3", "uniform at input keep 0.3",
                 "random beside entropy at ecl keep 0.3"):  # fmt: skip
        assert name in names
    for row in rows:
        if row["role"] == "unpruned":
            assert row["agreement"] == row["relative"] == row["first_token_speedup"] == 1
            continue
        if "errors" in row:
            continue
        assert row["questions"] == 5
        assert row["keep"] == 0.3
        assert row["keep_mean"] == pytest.approx(0.3, abs=0.05)
        assert row["seeds"] == (2 if row["method"] == "random" else 1)
        low, high = row["interval"]
        assert low <= row["accuracy"] <= high
        assert row["divergence"] >= 0
        assert set(row["by_kind"]) == set(rows[0]["by_kind"])


def test_every_answer_is_in_the_file_and_the_plot_is_a_picture(
    whole: Result, questions: Path
) -> None:
    lines = [json.loads(line) for line in (questions / "answers.jsonl").open(encoding="utf-8")]
    head, *records = lines
    assert set(head) == {"vtprune"}
    keys = {(one["question"], one["cell"]) for one in records}
    assert len(keys) == len(records)
    assert {number for number, _ in keys} == set(range(5))
    for record in records:
        assert record["score"] in (0, 1) or record["error"]
    assert (questions / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_the_result_is_saved_in_the_format_of_each_suffix(whole: Result, questions: Path) -> None:
    told = json.loads(whole.stdout)
    assert json.loads((questions / "all.json").read_text()) == told
    with (questions / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == [row["row"] for row in told["rows"]]
    row, line = told["rows"][1], lines[1]
    assert (line["model"], line["device"], line["files"]) == ("embedded", "cpu", "2")
    assert float(line["accuracy"]) == row["accuracy"]
    assert [float(line[f"interval_{end}"]) for end in ("low", "high")] == row["interval"]


def test_a_row_says_which_options_its_method_ran_with(whole: Result, questions: Path) -> None:
    row = json.loads(whole.stdout)["rows"][1]
    (stage,) = row["resolved_preset"]["stages"]
    assert row["resolved_preset"]["name"] is None
    assert row["options"] == {}
    other = next(one for one in ("row", "none") if one != stage["norm"])
    found = run(questions / "few.jsonl", "--methods", "entropy", "--keep", "0.3", "--seeds", 1,
                "-o", f"norm={other}", "--json")  # fmt: skip
    row = json.loads(found.stdout)["rows"][1]
    assert row["row"] == f"entropy (norm={other}) at ecl keep 0.3"
    assert (row["method"], row["options"]) == ("entropy", {"norm": other})
    assert row["resolved_preset"]["stages"][0]["norm"] == other


def test_baselines_beside_a_row_keep_its_counts_question_by_question(
    whole: Result, questions: Path
) -> None:
    records = [json.loads(line) for line in (questions / "answers.jsonl").open(encoding="utf-8")]
    rows = [re.sub(r" #[0-9a-f]{8}", "", one["cell"]) for one in records[1:] if one]
    kept = {
        (one["question"], row): one["keep_mean"] for one, row in zip(records[1:], rows, strict=True)
    }
    for number in range(5):
        own = kept[number, "entropy at ecl keep 0.3"]
        beside = kept[number, "random beside entropy at ecl keep 0.3 seed 1"]
        assert beside == pytest.approx(own, abs=1e-9)


def test_a_second_run_asks_nothing_again_and_says_the_same(
    whole: Result, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "prepare_with_answers", lambda *_: pytest.fail("asked again"))
    again = run(questions / "few.jsonl", "--methods", "entropy", "--keep", "0.3", "--seeds", 2,
                "--beside", "--metric", "exact", "--answers", questions / "answers.jsonl",
                "--json")  # fmt: skip
    assert json.loads(again.stdout)["rows"] == json.loads(whole.stdout)["rows"]


def test_a_killed_run_goes_on_where_it_stopped(whole: Result, questions: Path) -> None:
    lines = (questions / "answers.jsonl").read_bytes().splitlines(keepends=True)
    torn = questions / "torn.jsonl"
    torn.write_bytes(b"".join(lines[:-3]) + lines[-3][:20])
    again = run(questions / "few.jsonl", "--methods", "entropy", "--keep", "0.3", "--seeds", 2,
                "--beside", "--metric", "exact", "--answers", torn, "--json")  # fmt: skip
    before = {row["row"]: row for row in json.loads(whole.stdout)["rows"]}
    for row in json.loads(again.stdout)["rows"]:
        for key in ("accuracy", "agreement", "questions", "keep_mean"):
            assert row[key] == before[row["row"]][key]
    assert len(torn.read_bytes().splitlines()) == len(lines)


def test_answers_of_other_questions_are_not_gone_on_with(whole: Result, questions: Path) -> None:
    kept = (questions / "answers.jsonl").read_bytes()
    other = run(questions / "bare.jsonl", "--keep", "0.3", "--answers", questions / "answers.jsonl")
    assert other.exit_code == 1
    assert "holds the answers of another evaluation" in other.stderr
    assert (questions / "answers.jsonl").read_bytes() == kept


def test_without_answers_agreement_is_measured(questions: Path) -> None:
    found = run(questions / "bare.jsonl", "--methods", "vtw", "--keep", "0.9", "--seeds", 1)
    assert found.exit_code == 0, found.output
    assert "accuracy" not in found.stdout
    assert "same" in found.stdout
    assert "5 questions about 2 files" in found.stderr
    assert "random rows of 1 seed say little: run 5 seeds or more" in " ".join(found.stderr.split())


def test_the_demo_set_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("demo", "--limit", 2, "--methods", "uniform", "--keep", "0.5", "--seeds", 1,
                "--json")  # fmt: skip
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["questions"] == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--metric", "bleu"), "--metric bleu is unknown"),
        (("--limit", "0"), "--limit 0 is out of range"),
        (("--seeds", "0"), "seeds 0 is out of range"),
        (("--methods", "entropi"), "unknown method 'entropi'"),
        (("--at", "2"), "--at needs --methods"),
        (("--keep", "1.5"), "keep 1.5 is not a fraction"),
        (("--metric", "choice"), "has no choices"),
        (("--answers", "no/such/folder/a.jsonl"), "no folder"),
        (("--save", "q.txt"), "--save q.txt: its suffix names no format"),
    ],
)
def test_what_can_not_be_asked_is_said_before_a_model_is_loaded(
    questions: Path, args: tuple[str, ...], message: str
) -> None:
    found = run(questions / "few.jsonl", *args)
    assert_refused(found, f"Error: .*{re.escape(message)}")


def test_what_is_no_list_is_refused_with_what_takes_it(tmp_path: Path) -> None:
    picture = save_noise(tmp_path / "a.png", 8, 8)
    assert_refused(run(picture), r"Error: .*a\.png: a picture or video, and no list of questions")
    assert "-q" in run(picture).stderr
    refused = run(tmp_path)
    assert_refused(refused, "Error: .*: a folder, and no list")
    assert f"{tmp_path}/*" in refused.stderr
    words = tmp_path / "notes.txt"
    words.write_text("hello")
    assert '{"file": "clip.mp4"' in run(words).stderr


def test_a_line_that_can_not_be_asked_is_named_and_the_others_are_asked(
    questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (questions / "empty.mp4").touch()
    lines = (questions / "few.jsonl").read_text(encoding="utf-8")
    wrong = [json.dumps({"file": name, "question": "what happens?"})
             for name in ("empty.mp4", "none.png")]  # fmt: skip
    broken = questions / "broken.jsonl"
    broken.write_text("\n".join([wrong[0], "{", wrong[1], lines]))
    args = ("--methods", "random", "--keep", "0.3", "--seeds", 1)
    shown = run(broken, *args, "--save", questions / "failed.json")
    assert shown.exit_code == 0, shown.output
    assert re.search(r"left out +3 of 8 questions", shown.stdout)
    assert f"line1:{questions / 'empty.mp4'}:" in "".join(shown.stdout.split())
    assert re.search(r"^ +line 2: not JSON", shown.stdout, re.MULTILINE)
    assert "line3:file:'none.png':nosuchfile" in "".join(shown.stdout.split())
    saved = json.loads((questions / "failed.json").read_text())
    assert [fault["question"] for fault in saved["failed"]] == [0, 1, 2]
    assert [fault["error"].split(":")[0] for fault in saved["failed"]] == [
        "line 1", "line 2", "line 3",
    ]  # fmt: skip
    asked = {one["question"] for row in saved["rows"] for one in row["passes"]}
    assert asked == {3, 4, 5, 6, 7}, "numbers are those of the list here too"
    assert {row["questions"] for row in saved["rows"]} == {5}
    broken.write_text(wrong[0])
    monkeypatch.setattr("vtprune.models.loading.load", lambda *_, **__: pytest.fail("loaded"))
    refused = run(broken)
    assert "empty.mp4: the file is empty" in refused.stderr
    assert refused.exit_code == 1


def test_a_questions_file_is_not_taken_for_answers(questions: Path) -> None:
    path = questions / "few.jsonl"
    kept = path.read_bytes()
    found = run(path, "--answers", path)
    assert "few.jsonl would be written over a file that the command reads" in found.stderr
    assert (found.exit_code, path.read_bytes()) == (1, kept)


@pytest.mark.parametrize(
    "text", ['{"file": "a.png"}', '{"vtprune": {"a": 2}}', "x" * 2**21, '{"vtprune": {"a": 1}} '],
    ids=["no newline", "another head", "a long line", "more on the line"],
)  # fmt: skip
def test_a_file_that_holds_something_else_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(VtpruneError, match=r"mine\.jsonl: holds the answers of another .* else"):
        AnswersFile(path, {"a": 1})
    assert path.read_text() == text


def test_half_a_head_of_a_killed_run_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    path.write_text('{"vtprune": {"a"')
    AnswersFile(path, {"a": 1}).close()
    assert path.read_text() == '{"vtprune": {"a": 1}}\n'


HEAD = '{"vtprune": {"a": 1}}'
LINES = ['{"question": 0, "cell": "x"}', '{"question": 1, "cell": "x"}']


def test_only_half_a_line_at_the_end_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    whole = "\n".join([HEAD, *LINES]) + "\n"
    for length in range(len(HEAD) + 1, len(whole) + 1):
        path.write_text(whole[:length])
        with AnswersFile(path, {"a": 1}, 4) as book:
            kept = whole[:length].rpartition("\n")[0].splitlines()[1:]
            if whole[:length].splitlines()[-1] in LINES:  # whole, but for the line's end
                kept = whole[:length].splitlines()[1:]
            assert sorted(book.records) == [(number, "x") for number in range(len(kept))]
            book.add([Record(3, "z")])
        text = path.read_text()
        assert text.splitlines()[: 1 + len(kept)] == [HEAD, *LINES[: len(kept)]]
        assert text.count("\n") == 2 + len(kept)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "line 3: blank"),
        ("nonsense", "line 3: not JSON: "),
        ("[1]", r"line 3: \[1\] is not a JSON object"),
        ("{}", "line 3: question is missing"),
        ('{"question": 1}', "line 3: cell is missing"),
        ('{"question": 4, "cell": "x"}', "line 3: question is 4, but there are 4"),
        ('{"question": 1000000000, "cell": "x"}', "line 3: question is 1000000000, but there"),
        ('{"question": -1, "cell": "x"}', "line 3: question: -1 is not a whole number, 0 or more"),
        ('{"question": true, "cell": "x"}', "line 3: question: True is not a whole number"),
        ('{"question": 1, "cell": ["x"]}', r"line 3: cell: \['x'\] is not text"),
        ('{"question": 1, "cell": "x", "answer": 3}', "line 3: answer: 3 is not text"),
        ('{"question": 1, "cell": "x", "score": 2}', "line 3: score: 2 is not null, or a number"),
        ('{"question": 1, "cell": "x", "same": "yes"}', "line 3: same: 'yes' is not true or"),
        ('{"question": 1, "cell": "x", "loss": null}', "line 3: loss: None is not a number"),
        ('{"question": 1, "cell": "x", "keep_mean": 1.5}', "line 3: keep_mean: 1.5 is not a"),
        ('{"question": 1, "cell": "x", "first": Infinity}', "line 3: first: inf is not sec"),
        ("[" * 100_000, "line 3: not JSON: "),
        ("x" * 2**21, "line 3: longer than 1,048,576 bytes"),
        ('{"question": 1, "ce{"question": 2, "cell": "x"}', "line 3: not JSON"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_record_is_named_and_nothing_is_lost(
    tmp_path: Path, line: str, reason: str
) -> None:
    path = tmp_path / "book.jsonl"
    for text in ([HEAD, LINES[0], line, LINES[1], ""], [HEAD, LINES[0], line, LINES[1]]):
        path.write_text("\n".join(text))
        kept = path.read_bytes()
        with pytest.raises(VtpruneError, match=rf"book\.jsonl: has lines .*: {reason}") as caught:
            AnswersFile(path, {"a": 1}, 4)
        assert path.read_bytes() == kept
        assert len(caught.value.message) < 500
        with pytest.raises(VtpruneError, match=reason):
            list(read_records(path, 4))


def test_many_lines_that_are_no_records_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    path.write_text(HEAD + "\n" + "nonsense\n" * 6_000)
    with pytest.raises(VtpruneError, match=r"line 6: .*; and 5,995 more") as caught:
        AnswersFile(path, {"a": 1})
    assert len(caught.value.message) < 500


def test_zeros_that_a_lost_power_left_at_the_end_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    path.write_bytes(f"{HEAD}\n{LINES[0]}\n".encode() + b"\0" * 900)
    with AnswersFile(path, {"a": 1}, 4) as book:
        assert sorted(book.records) == [(0, "x")]
    assert path.read_text() == f"{HEAD}\n{LINES[0]}\n"


OTHER = """
import sys, pathlib
from vtprune.evaluation.records import AnswersFile, Record, read_records
with AnswersFile(pathlib.Path(sys.argv[1]), {"a": 1}, 4) as book:
    book.add([Record(0, "x")])
    print(flush=True)
    sys.stdin.readline()
"""


def test_a_second_run_on_one_file_is_refused_and_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", OTHER, path], **pipes) as other:  # type: ignore[call-overload]
        other.stdout.readline()
        kept = path.read_bytes()
        who = f"process {other.pid}" if sys.platform == "linux" else "another process"
        for _ in range(2):  # a refusal does not let go of the other's lock
            with pytest.raises(VtpruneError, match=rf"book\.jsonl: {who} is writing its answers"):
                AnswersFile(path, {"a": 1}, 4)
        assert path.read_bytes() == kept
        other.kill()
        other.wait()
    with AnswersFile(path, {"a": 1}, 4) as book:
        assert sorted(book.records) == [(0, "x")]
        with pytest.raises(VtpruneError, match=rf"process {os.getpid()} is writing its answers"):
            AnswersFile(path, {"a": 1}, 4)


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_a_full_disk_is_told_and_leaves_whole_lines(tmp_path: Path) -> None:
    path, kept = tmp_path / "book.jsonl", r"\(\d+ answers kept in .*book\.jsonl\)"
    message = rf"^.*book\.jsonl: can't be written: File too large {kept}$"
    with AnswersFile(path, {"a": 1}) as book:

        def fill() -> None:
            for number in range(100):
                book.add([Record(number, "x")])

        with small_disk(1000), pytest.raises(VtpruneError, match=message):
            fill()
        count = len(book.records)
    with AnswersFile(path, {"a": 1}) as book:
        assert len(book.records) == count > 0


def test_an_interrupt_before_a_record_is_counted_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "answers.jsonl"

    def add() -> None:
        with AnswersFile(path, {}) as answers:
            monkeypatch.setattr("vtprune.saving.os.fsync", interrupt)
            answers.add([Record(0, "random")])

    with pytest.raises(KeyboardInterrupt) as raised:
        add()
    assert raised.value.__notes__ == [
        f"1 answer kept in {path}; the same command goes on from there"
    ]


def test_an_interrupted_run_knows_what_it_kept(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    stopped = KeyboardInterrupt()
    book = AnswersFile(path, {"a": 1}, 4)
    book.add([Record(0, "x")])
    book.__exit__(KeyboardInterrupt, stopped, None)
    assert stopped.__notes__ == [f"1 answer kept in {path}; the same command goes on from there"]
