"""`vtprune compare` as a product: what is printed and written where, and how it exits."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import assert_refused
from PIL import Image
from test_comparison import COMPARISON

from vtprune.cli import cli
from vtprune.evaluation import compare
from vtprune.evaluation.comparison import Comparison
from vtprune.evaluation.variants import VariantList
from vtprune.inference.generate import Generation
from vtprune.models import loading
from vtprune.models.base import Sampling


@dataclass
class FakeContest:
    """Stands in for loading and comparing: notes what it was given."""

    result: Comparison = COMPARISON
    load: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    listed: VariantList | None = None

    def fake_load(self, **options: Any) -> str:
        self.load = options
        return "loaded"

    def run_comparison(
        self,
        loaded: object,
        paths: Sequence[Any],
        question: str,
        listed: VariantList,
        **options: Any,
    ) -> Comparison:
        self.listed = listed
        self.asked = {"paths": [str(one.path) for one in paths], "question": question, **options}
        return self.result


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeContest:
    found = FakeContest()
    monkeypatch.setattr(loading, "load", found.fake_load)
    monkeypatch.setattr(compare, "run_comparison", found.run_comparison)
    monkeypatch.setenv("COLUMNS", "120")
    return found


@pytest.fixture
def clip(tmp_path: Path) -> str:
    path = tmp_path / "clip.mp4"
    Image.new("RGB", (8, 8)).save(path, format="png")  # opened, never decoded
    return str(path)


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, ["compare", *args], prog_name="vtprune")


def test_the_table_is_on_stdout_and_how_to_read_it_on_stderr(fake: FakeContest, clip: str) -> None:
    result = invoke(clip, "what?", "--methods", "entropy")
    assert result.exit_code == 0
    assert "entropy" in result.stdout
    assert "realised" in result.stdout.splitlines()[0]
    assert "warning" not in result.stdout
    assert re.search(r"^read +clip.mp4", result.stderr, re.MULTILINE)
    assert "warning   careful" in result.stderr


def test_quiet_prints_the_table_only(fake: FakeContest, clip: str) -> None:
    result = invoke(clip, "what?", "--quiet")
    assert result.stdout
    assert result.stderr == ""


def test_json_is_one_object_and_nothing_else(fake: FakeContest, clip: str) -> None:
    result = invoke(clip, "what?", "--json")
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    assert json.loads(result.stdout) == json.loads(json.dumps(COMPARISON.to_dict()))


def test_what_is_asked_for_arrives(fake: FakeContest, clip: str) -> None:
    arguments = (
        "--methods entropy,vtw --presets long-video --keep 0.5,0.2 --at 3 -o norm=none --seed 7 "
        "--repeats 9 --model qwen2.5-vl-7b --device cpu --max-tiles 2 --max-pixels 99 "
        "--system short --max-new-tokens 5"
    )
    result = invoke(clip, "what?", *arguments.split())
    assert result.exit_code == 0, result.stderr
    assert (fake.load["name"], fake.load["device"]) == ("qwen2.5-vl-7b", "cpu")
    assert fake.listed is not None
    asked = [(one.name, one.at, one.keep) for one in fake.listed.variants if one.role == "asked"]
    assert {(name, keep) for name, _, keep in asked} == {
        (name, keep) for name in ("entropy (norm=none)", "vtw", "long-video") for keep in (0.5, 0.2)
    }
    assert {at for name, at, _ in asked if name != "long-video"} == {"3"}
    assert fake.listed.variants[0].preset.seed == 7
    assert asked[2][1] == "schedule, pixels"
    assert fake.asked["sampling"] == Sampling(frames=64, max_tiles=2)
    assert fake.asked["generation"] == Generation(5, system="short")
    assert (fake.asked["repeats"], fake.asked["limits"].max_pixels) == (9, 99)
    assert (fake.asked["paths"], fake.asked["question"]) == ([clip], "what?")


def test_defaults_are_the_default_preset_at_three_keeps(
    fake: FakeContest, clip: str, own_config: Path
) -> None:
    invoke(clip, "what?")
    assert fake.listed is not None
    asked = [(one.name, one.keep) for one in fake.listed.variants if one.role == "asked"]
    assert asked == [("balanced", 0.5), ("balanced", 0.3), ("balanced", 0.1)]
    assert fake.asked["repeats"] == 5
    own_config.write_text("preset: fast\n")
    invoke(clip, "what?", "--no-measure")
    assert fake.listed.variants[0].name == "fast"
    assert fake.asked["repeats"] == 0


def test_the_csv_is_written_too(fake: FakeContest, clip: str, tmp_path: Path) -> None:
    target = tmp_path / "table.csv"
    result = invoke(clip, "what?", "--save", str(target))
    assert result.exit_code == 0
    assert "entropy" in result.stdout
    with target.open(newline="") as file:
        assert [line["method"] for line in csv.DictReader(file)] == [
            row.method or "" for row in COMPARISON.rows
        ]
    assert [path.name for path in tmp_path.glob("*table*")] == ["table.csv"]


def test_the_plot_is_a_png(fake: FakeContest, clip: str, tmp_path: Path) -> None:
    result = invoke(clip, "what?", "--save", str(tmp_path / "speed.png"))
    assert result.exit_code == 0
    with Image.open(tmp_path / "speed.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
    assert [path.name for path in tmp_path.glob("*speed*")] == ["speed.png"]


def test_every_save_is_written_in_the_format_of_its_suffix(
    fake: FakeContest, clip: str, tmp_path: Path
) -> None:
    names = ("a.json", "b.csv", "c.SVG", "d.png", "e.csv")
    targets = [tmp_path / name for name in names]
    result = invoke(clip, "what?", *(part for path in targets for part in ("--save", str(path))))
    assert result.exit_code == 0, result.stderr
    assert json.loads(targets[0].read_text()) == json.loads(json.dumps(COMPARISON.to_dict()))
    assert targets[1].read_text() == targets[4].read_text() == COMPARISON.to_csv()
    assert "<svg" in targets[2].read_text()
    assert targets[3].read_bytes().startswith(b"\x89PNG")


def test_a_csv_that_can_not_be_written_leaves_the_old_one(
    fake: FakeContest, clip: str, tmp_path: Path, full_disk: None
) -> None:
    target = tmp_path / "table.csv"
    target.write_text("old")
    result = invoke(clip, "what?", "--save", str(target))
    assert result.exit_code == 1
    assert "can't save there: No space left on device" in result.stderr
    assert "give --save a file" in result.stderr
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.glob("*table*")] == ["table.csv"]
    assert "entropy" in result.stdout  # what was measured is not lost with it


def test_what_is_asked_about_is_not_written_over(fake: FakeContest, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(picture)
    kept = picture.read_bytes()
    result = invoke(str(picture), "what?", "--save", str(tmp_path / "." / "a.png"))
    assert "a.png would be written over a file that the command reads\nhint: " in result.stderr
    assert (result.exit_code, fake.load, picture.read_bytes()) == (1, {}, kept)


def test_two_files_in_one_place_are_refused(fake: FakeContest, clip: str, tmp_path: Path) -> None:
    both = str(tmp_path / "both.png")
    result = invoke(clip, "what?", "--save", both, "--save", both)
    assert f"two files in one place: --save {both}, --save {both}" in result.stderr
    assert (result.exit_code, fake.load) == (1, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "entropi,vtv"], r"Error: unknown method 'entropi'; unknown method 'vtv'\n"
         r"hint: did you mean entropy\?"),
        (["--methods", "vtw,vtw"], r"Error: method vtw is named 2 times\nhint: "),
        (["--methods", "vtw,"], r"Error: unknown method ''\nhint: methods: "),
        (["--presets", "balance"], r"Error: no preset 'balance'.*\nhint: did you mean balanced\?"),
        (["--keep", "0.5,2"], r"Error: keep 2 is not a fraction in \(0, 1\]\nhint: "),
        (["--keep", "0.5,0.5"], r"Error: keep 0.5 is named 2 times\nhint: "),
        (["--keep", "image=0.5"], r"Error: keep image=0.5 is not a fraction in \(0, 1\]\n"),
        (["--methods", "vtw", "--at", "x"], r"Error: at: x is not a place\nhint: "),
        (["--at", "2"], r"Error: --at needs --methods\nhint: "),
        (["-o", "norm"], r"Error: -o norm is not KEY=VALUE\nhint: "),
        (["--methods", "vtw", "-o", "a=b"], r"Error: none of vtw has the option a\nhint: "),
        (["--repeats", "0"], r"Error: --repeats 0 is out of range\nhint: 1 or more"),
        (["--seed", "-1"], r"Error: --seed -1 is out of range\nhint: "),
        (["--max-new-tokens", "0"], r"Error: --max-new-tokens 0 is out of range\n"),
        (["--save", "a.png", "--no-measure"],
         r"Error: --save a.png and --no-measure exclude each other\nhint: a chart draws speed-ups"),
        (["--save", "a.txt"], r"Error: --save a.txt: its suffix names no format of this command\n"
         r"hint: name it a.json, a.csv, a.md, a.tex, a.png, a.svg, a.pdf"),
        (["--save", "none/a.csv"], r"Error: none/a.csv: can't save there: no folder .*\nhint: give "
         "--save a file"),
        (["--quiet", "--json"], r"Error: --quiet and --json exclude each other\n"),
    ],
)  # fmt: skip
def test_a_bad_value_is_one_error_line_before_anything_is_loaded(
    fake: FakeContest, clip: str, arguments: list[str], message: str
) -> None:
    result = invoke(clip, "what?", *arguments)
    assert_refused(result, message)
    assert fake.load == {}


def test_a_missing_question_is_a_usage_error(clip: str) -> None:
    result = invoke(clip)
    assert result.exit_code == 2
    assert "Missing argument 'QUESTION'" in result.stderr


def test_exit_is_1_only_where_nothing_that_was_asked_could_be_run(
    fake: FakeContest, clip: str
) -> None:
    rows = COMPARISON.rows
    failed = [replace(row, error="no text") if row.role == "asked" else row for row in rows]
    one = next(number for number, row in enumerate(failed) if row.error)
    fake.result = replace(COMPARISON, rows=tuple(failed))
    result = invoke(clip, "what?")
    assert result.exit_code == 1
    assert "no text" in result.stdout
    assert "Error: nothing of what was asked could be run\nhint: " in result.stderr
    fake.result = replace(COMPARISON, rows=(*rows[:1], failed[one], *rows[1:]))
    assert invoke(clip, "what?").exit_code == 0
