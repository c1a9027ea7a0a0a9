"""What JSON says of where its figures come from."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from reports import report_of
from test_comparison import COMPARISON
from test_console import REPORT
from test_console_evaluation import UNPRUNED, evaluation_of
from test_profile import example

from vtprune.evaluation.records import AnswersFile, Record, read_records
from vtprune.inference.provenance import file_digests
from vtprune.inference.questions_file import Asked


def test_every_json_has_the_machine() -> None:
    for result in (report_of(REPORT), COMPARISON, example(), evaluation_of(UNPRUNED)):
        host = json.loads(json.dumps(result.to_dict()["host"]))
        assert host["cores"] == os.cpu_count()
        assert host["cpu"]
        assert host["os"]
        assert host["python"].startswith("3.")
        assert isinstance(host["gpus"], list)


def test_media_have_the_digest_of_their_bytes(tmp_path: Path) -> None:
    page, clip = tmp_path / "a.pdf", tmp_path / "b.mp4"
    page.write_bytes(b"a page")
    clip.write_bytes(b"a clip")
    files = [f"{page}#page=2", str(clip), "picture 1", str(tmp_path), "bad\0name"]
    digests = list(file_digests(files).values())
    assert digests == [hashlib.sha256(b"a page").hexdigest(), hashlib.sha256(b"a clip").hexdigest(),
                       None, None, None]  # fmt: skip
    clip.write_bytes(b"another clip")
    assert file_digests([clip]) == {str(clip): hashlib.sha256(b"another clip").hexdigest()}
    report = report_of({**REPORT, "input": {**REPORT["input"], "files": [str(clip)]}})
    assert report.to_dict()["input"]["sha256"] == [hashlib.sha256(b"another clip").hexdigest()]  # type: ignore[index]
    evaluation = evaluation_of(UNPRUNED, media=[str(clip)])
    assert evaluation.to_dict()["media"] == file_digests([clip])


def test_every_pass_of_a_profile_is_in_its_json_and_no_csv_cell(tmp_path: Path) -> None:
    assert "passes" in example().rows[0].to_dict()
    assert ",passes," not in example().to_csv().splitlines()[0].replace("passes", "", 1)


def test_a_line_of_answers_says_what_it_is_of(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    asked = [Asked(Path("clip.mp4"), "what colour?", "red")]
    with AnswersFile(path, {"a": 1}, 1, asked) as answers:
        answers.add([Record(0, "entropy", "blue", 0.0)])
    line = json.loads(path.read_text().splitlines()[1])
    assert (line["file"], line["text"], line["right_answer"], line["answer"]) == (
        "clip.mp4", "what colour?", "red", "blue",
    )  # fmt: skip
    assert list(read_records(path)) == [Record(0, "entropy", "blue", 0.0)]
    with AnswersFile(path, {"a": 1}, 1, asked) as answers:
        assert answers.has(0, "entropy")
