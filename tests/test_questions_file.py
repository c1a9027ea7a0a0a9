"""Files of questions: what is read, and everything that is wrong at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vtprune.errors import VtpruneError
from vtprune.inference.questions_file import MOST_FAULTS, Asked, read_questions

GOOD = {"file": "a.png", "question": " what? "}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "clips").mkdir()
    return tmp_path


def write(folder: Path, *lines: object) -> Path:
    path = folder / "questions.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_files_are_relative_to_the_list_and_what_is_not_said_is_empty(folder: Path) -> None:
    whole = {"file": "clips", "question": "which?", "answer": "b", "choices": ["a", "b"],
             "kind": "ocr", "id": 7}  # fmt: skip
    assert read_questions(write(folder, GOOD, "", whole)) == [
        Asked(folder / "a.png", "what?"),
        Asked(folder / "clips", "which?", "b", ("a", "b"), "ocr"),
    ]


def test_a_kind_is_one_line(folder: Path) -> None:
    (asked,) = read_questions(write(folder, {**GOOD, "kind": " what\n\n happens "}))
    assert asked.kind == "what happens"


@pytest.mark.parametrize(
    ("kind", "heavy"),
    [
        ("number_small", True), ("ocr", True), ("OCR", True), ("text", True), ("document", True),
        ("chart", True), ("table", True), ("colour", False), ("count", False), ("", False),
        ("context", False),
    ],
)  # fmt: skip
def test_kinds_about_written_text_are_text_heavy(kind: str, heavy: bool) -> None:
    assert Asked(Path("a"), "?", kind=kind).text_heavy == heavy


def test_all_faults_are_named_at_once_with_their_lines(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)  # a long path is cut in a list of faults
    path = write(
        folder,
        GOOD,
        '{"file": ',
        [1],
        {"question": "what?", "file": "b.png"},
        {"file": "a.png", "question": "  ", "answer": 3, "choices": "a", "kind": 1},
        {**GOOD, "anwser": "red"},
        {**GOOD, "answer": "c", "choices": ["a", "b"]},
        {"answer": "x"},
    )
    with pytest.raises(VtpruneError) as raised:
        read_questions(path.relative_to(folder.parent))
    assert raised.value.message.replace(folder.name, "F") == (
        "F/questions.jsonl: line 2: not JSON: Expecting value; "
        "line 3: a line must be a mapping of keys; "
        "line 4: file: 'b.png': no such file in F, did you mean a.png?; "
        "line 5: question: '  ' is not text; "
        "line 5: choices: 'a' is not a list of texts; "
        "line 5: kind: 1 is not text; "
        "line 6: unknown key 'anwser', did you mean answer?; "
        "line 7: answer: 'c' is not one of the choices; "
        "line 8: file is missing; "
        "line 8: question is missing"
    )
    assert raised.value.hint.startswith('a line is {"file"')


def test_many_faults_are_counted(folder: Path) -> None:
    with pytest.raises(VtpruneError, match=r"; and 5 more$"):
        read_questions(write(folder, *["x"] * (MOST_FAULTS + 5)))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "holds no question"),
        (b"\n \n", "holds no question"),
        (b"\xff\xfe", "can't be read: not UTF-8 text"),
        (b"[" * 100_000, ": line 1: not JSON"),
        (b'{"file": "a\\u0000.png", "question": "?"}', "no such file"),
        (b'{"file": "' + b"a" * 5000 + b'", "question": "?"}', "no such file"),
    ],
)
def test_a_bad_file_is_one_error(folder: Path, content: bytes, match: str) -> None:
    path = folder / "questions.jsonl"
    path.write_bytes(content)
    with pytest.raises(VtpruneError, match=match):
        read_questions(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(VtpruneError, match=r"none\.jsonl: can't be read: No such file"):
        read_questions(tmp_path / "none.jsonl")


def test_a_file_that_is_too_large_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtprune.inference.tables.LARGEST_FILE", 10)
    with pytest.raises(VtpruneError, match="larger than 10 bytes"):
        read_questions(write(folder, GOOD))


def test_half_characters_become_question_marks(folder: Path) -> None:
    line = '{"file": "a.png", "question": "what \\ud83d?", "answer": "\\udc00"}'
    found = read_questions(write(folder, line))[0]
    assert (found.question, found.answer) == ("what ??", "?")
