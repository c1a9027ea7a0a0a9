"""Questions as people have them: JSON, CSV, Parquet, datasets; several answers, letters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import assert_refused, save_noise

from vtprune.cli import cli
from vtprune.errors import VtpruneError
from vtprune.evaluation.scoring import score_answers, vqa
from vtprune.inference.questions_file import Asked, read_questions
from vtprune.inference.tables import is_list
from vtprune.media import MediaGroup, Stored, open_each

ROW = {"file": "a.png", "question": "what?"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, height in (("a.png", 8), ("b.png", 9)):
        save_noise(tmp_path / name, height, 8)
    return tmp_path


def read(folder: Path, values: dict[str, Any], **columns: str) -> Asked:
    path = folder / "q.jsonl"
    path.write_text(json.dumps({**ROW, **values}))
    return read_questions(path, columns)[0]


@pytest.mark.parametrize("wrapped", [None, "data", "questions", "annotations"])
def test_a_json_list_is_read_like_lines(folder: Path, wrapped: str | None) -> None:
    rows: Any = [ROW, {**ROW, "question": "where?"}]
    path = folder / "q.json"
    path.write_text(json.dumps(rows if wrapped is None else {"info": 1, wrapped: rows}, indent=1))
    assert [asked.question for asked in read_questions(path)] == ["what?", "where?"]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert len(read_questions(path)) == 2
    path.write_text(json.dumps([ROW, {"question": "?"}]))
    with pytest.raises(VtpruneError, match="item 2: file is missing"):
        read_questions(path)
    path.write_text("[1, ")
    with pytest.raises(VtpruneError, match=r"q\.json: not JSON: Expecting value"):
        read_questions(path)


@pytest.mark.parametrize(
    ("given", "answer", "answers"),
    [
        ("red", "red", ()),
        (7, "7", ()),
        (2.5, "2.5", ()),
        (True, "yes", ()),
        ("", None, ()),
        ([], None, ()),
        (["red"], "red", ()),
        (["red", "blue", "blue"], "blue", ("red", "blue", "blue")),
        ([{"answer": "red", "answer_id": 1}, {"answer": "red"}], "red", ("red", "red")),
        ({"text": ["one", "1"]}, "one", ("one", "1")),
    ],
)
def test_answers_are_texts_numbers_or_several(
    folder: Path, given: Any, answer: str | None, answers: tuple[str, ...]
) -> None:
    for key in ("answer", "answers"):
        asked = read(folder, {key: given})
        assert (asked.answer, asked.answers) == (answer, answers)
    assert asked.right_answers == (answers or (() if answer is None else (answer,)))


@pytest.mark.parametrize(
    ("choices", "given", "answer"),
    [
        (["red", "blue"], "B", "blue"),
        (["red", "blue"], "(b)", "blue"),
        (["red", "blue"], 1, "blue"),
        (["1", "2"], 1, "1"),
        ([3, 4], 4, "4"),
        (["A", "B"], "B", "B"),
        ("red|blue", "b.", "blue"),
        ({"B": "blue", "A": "red"}, "B", "blue"),
        ({"text": ["red", "blue"], "label": ["A", "B"]}, "A", "red"),
    ],
)
def test_a_choice_is_named_by_text_letter_or_number(
    folder: Path, choices: Any, given: Any, answer: str
) -> None:
    for key in ("choices", "options"):
        assert read(folder, {key: choices, "answer": given}).answer == answer
    with pytest.raises(VtpruneError, match="is not one of the choices"):
        read(folder, {"choices": choices, "answer": "Z"})


def test_several_files_are_one_thing_that_is_asked_about(folder: Path) -> None:
    asked = read(folder, {"file": ["a.png", "b.png"]})
    assert asked.file == MediaGroup((folder / "a.png", folder / "b.png"))
    assert asked.file.name == "a.png + b.png"
    assert len(open_each([asked.file])) == 2
    path = folder / "q.jsonl"
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
    assert read_questions(path) == [Asked(folder / "a.png", "what?")]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"},
             {"role": "user", "content": "sure?"}]  # fmt: skip
    path.write_text(json.dumps({"messages": turns}))
    with pytest.raises(VtpruneError, match="3 messages, and a list of questions takes one"):
        read_questions(path)


def test_a_table_of_text_has_columns(folder: Path) -> None:
    path = folder / "q.csv"
    path.write_text('image,text,answers\na.png,"what, here?","[""red"", ""blue""]"\nb.png,who?,\n')
    columns = {"file": "image", "question": "text", "answer": "answers"}
    assert read_questions(path, columns) == [
        Asked(folder / "a.png", "what, here?", "red", answers=("red", "blue")),
        Asked(folder / "b.png", "who?"),
    ]
    tabs = folder / "q.tsv"
    tabs.write_text("file\tquestion\tchoices\tanswer\na.png\twhat?\tred|blue\tB\n")
    assert read_questions(tabs)[0].answer == "blue"
    with pytest.raises(VtpruneError, match=r"q\.csv, line 2: no column 'imge'") as raised:
        read_questions(path, {"file": "imge"})
    assert raised.value.hint == "did you mean image? columns: image, text, answers"
    path.write_text("file,question\na.png,what?,more\n")
    with pytest.raises(VtpruneError, match="line 2: more cells than the first line has columns"):
        read_questions(path)


def test_pictures_in_parquet_files_are_read_when_they_are_needed(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = [(folder / name).read_bytes() for name in ("a.png", "b.png", "a.png")]
    path = folder / "q.parquet"
    rows = {
        "image": [{"bytes": content, "path": None} for content in data],
        "plain": data,
        "several": [[{"bytes": content, "path": "x"}] * 2 for content in data],
        "question": ["what?", "who?", "where?"],
        "answers": [["red"] * 10, ["a"], None],
    }
    parquet.write_table(pyarrow.table(rows), path, row_group_size=2)
    for column, number in (("image", 1), ("plain", 1), ("several", 2)):
        asked = read_questions(path, {"file": column})
        assert [question.answer for question in asked] == ["red", "a", None]
        files = [question.file for question in asked]
        assert files[0] == files[2] != files[1]
        assert "q.parquet#" in str(files[0])
        first = files[1].items[0] if isinstance(files[1], MediaGroup) else files[1]
        assert isinstance(first, Stored)
        assert first.load() == data[1]
        assert len(open_each([files[1]])) == number
    (folder / "bad.parquet").write_bytes(b"no")
    with pytest.raises(VtpruneError, match="not a Parquet file"):
        read_questions(folder / "bad.parquet")


def test_a_dataset_on_disk_is_a_list(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    features = datasets.Features({
        "image": datasets.Image(), "question": datasets.Value("string"),
        "answer": datasets.ClassLabel(names=["cat", "dog"]),
    })  # fmt: skip
    pictures = [Image.open(folder / name) for name in ("a.png", "b.png")]
    rows = {"image": pictures, "question": ["what?", "who?"], "answer": [1, 0]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(str(folder / "set"))
    assert is_list(folder / "set")
    assert not is_list(folder)
    asked = read_questions(folder / "set")
    assert [question.answer for question in asked] == ["dog", "cat"]
    assert open_each([asked[0].file])[0].width == 8
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(folder / "splits"))
    with pytest.raises(VtpruneError, match="a dataset of 1 splits: train") as raised:
        read_questions(folder / "splits")
    assert raised.value.hint.endswith("splits/train")


def test_a_wrong_file_is_told_the_nearest_name(folder: Path) -> None:
    with pytest.raises(VtpruneError, match=r"file: 'aa.png': no such file .*did you mean a.png\?"):
        read(folder, {"file": "aa.png"})


def test_vqa_counts_people_who_agree() -> None:
    people = ["red"] * 3 + ["blue"] * 2 + ["dark red"] * 5
    assert vqa(people, "Red.") == pytest.approx(0.9)  # 3 x 2/3 + 7 x 1, of 10
    assert vqa(people, "blue") == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa(people, "the dark red") == 1.0
    assert vqa(people, "green") == 0.0
    assert vqa(["red"], "red") == vqa(["red", "blue"], "blue") == 1.0
    assert score_answers(people, "blue") == vqa(people, "blue"), "ten people: VQA's rule"
    assert score_answers(["red", "crimson"], "it is crimson") == 1.0
    assert score_answers(["12 May", "May 12"], "may 12", metric="anls") == 1.0
    assert score_answers(["red"], "a red", metric="vqa") == 1.0


def test_the_command_line_takes_tables_and_their_columns(folder: Path) -> None:
    path = folder / "q.csv"
    path.write_text("picture,question,answers\na.png,what is it?,red\n")
    given = ["evaluate", str(path), "--methods", "random", "--keep", "0.5", "--seeds", "1",
             "--max-new-tokens", "2", "--json"]  # fmt: skip
    asked = CliRunner().invoke(cli, [*given, "--columns", "file=picture,answer=answers"])
    assert asked.exit_code == 0, asked.output
    assert json.loads(asked.stdout)["labelled"]
    assert_refused(CliRunner().invoke(cli, [*given, "--columns", "x=y"]), "Error: --columns x=y is")
