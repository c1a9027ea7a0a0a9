"""`vtprune calibrate` as a product: what is printed and written where, and how it exits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import assert_refused
from PIL import Image
from test_calibrate import measured

from vtprune.cli import cli
from vtprune.evaluation.bootstrap import Change, Gap
from vtprune.evaluation.calibration import calibrate
from vtprune.evaluation.calibration.result import CalibrationResult, TokenInformation
from vtprune.evaluation.calibration.schedules import CandidateSchedule, TriedSchedule
from vtprune.inference.questions_file import Asked
from vtprune.models import loading
from vtprune.preset import load_preset
from vtprune.preset.calibration import read_calibration


class Fake:
    """Stands in for loading and measuring, and notes what it was given."""

    def __init__(self) -> None:
        self.load: dict[str, Any] = {}
        self.given: tuple[Any, ...] = ()
        self.found = measured()

    def fake_load(self, name: str | None, **options: Any) -> str:
        self.load = {"name": name, **options}
        return "loaded"

    def fake_calibrate(self, *given: Any) -> CalibrationResult:
        self.given = given
        return self.found


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setenv("COLUMNS", "80")
    found = Fake()
    monkeypatch.setattr(loading, "load", found.fake_load)
    monkeypatch.setattr(calibrate, "calibrate", found.fake_calibrate)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run: a picture and a question about it."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    line = {"file": "a.png", "question": "what?", "answer": "red", "kind": "colour"}
    Path("q.jsonl").write_text(json.dumps(line))
    Path("dir.png").mkdir()
    return tmp_path


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, ["calibrate", *args], prog_name="vtprune")


TRIED = (
    TriedSchedule(CandidateSchedule("random at input", ({"at": "input", "method": "random"},)), 0.3,
          Change((-0.02,), (-0.05,), 100, 50), Gap(0.0, 0.0, 0.0), False, 0.9),
    TriedSchedule(CandidateSchedule("entropy at ecl", ({"at": "ecl", "method": "entropy"},)), 0.299,
          Change((-0.2,), (-0.3,), 100, 50), Gap(0.18, 0.09, 0.27), True, 0.8),
    TriedSchedule(CandidateSchedule("stuck", ({"at": 9, "method": "random"},)),
                  unreachable="keep 0.3 is too low"),
)  # fmt: skip


def test_the_table_is_on_stdout_and_the_files_are_told_on_stderr(fake: Fake, folder: Path) -> None:
    result = invoke("q.jsonl", "--save", "c.yaml")
    assert result.exit_code == 0
    table = result.stdout.splitlines()
    assert table[0].split() == [
        "layer", "entropy", "fall", "general", "lower", "exact", "text-heavy", "lower", "exact"
    ]  # fmt: skip
    assert table[2].split() == [
        "1", "0.500", "+0.400", "+0.0%", "-2.0%", "90%", "+0.0%", "-40.0%", "90%"
    ]  # fmt: skip
    text = " ".join(result.stdout.split())
    assert "ecl layer 1: entropy falls by 0.400; 100% of 50 inputs agree" in text
    assert "general: layer 2 (100 questions on 50 files): the lower bound is -0.5%" in text
    assert max(len(line) for line in table) <= 80
    assert result.stderr.startswith("table     fall: of the entropy from the layer before; ")
    assert result.stderr.split()[-2:] == ["written", "c.yaml"]
    read = read_calibration("c.yaml", 4, model_type="llava", hidden=64)
    assert read == fake.found.calibration()
    assert sorted(path.name for path in folder.glob("*c.*")) == ["c.yaml"]


def test_every_save_is_written_in_the_format_of_its_suffix(fake: Fake, folder: Path) -> None:
    names = ("c.yaml", "c.png", "c.svg", "c.json")
    result = invoke("q.jsonl", *(part for name in names for part in ("--save", name)))
    assert result.stderr.endswith("written   c.yaml, c.png, c.svg, c.json\n")
    assert Image.open("c.png").format == "PNG"
    assert "<svg" in Path("c.svg").read_text()
    assert json.loads(Path("c.json").read_text())["calibration"]["horizon"] == 2


def test_a_contribution_is_alone_on_stdout(fake: Fake, folder: Path) -> None:
    result = invoke("q.jsonl", "--contribute")
    assert result.exit_code == 0
    (entry,) = yaml.safe_load(result.stdout)
    assert entry["sources"]["horizon"].startswith("contributed (m, 50 files")
    assert "ecl       layer 1: entropy falls" in result.stderr
    assert invoke("q.jsonl", "--contribute", "--quiet").stderr == ""
    assert_refused(invoke("q.jsonl", "--contribute", "--json"), "Error: --contribute and --json")


def test_quiet_leaves_the_tables_and_the_files(fake: Fake, folder: Path) -> None:
    fake.found = measured(warnings=("careful",))
    result = invoke("q.jsonl", "--save", "c.yaml", "--quiet")
    assert result.exit_code == 0
    assert "ecl" in result.stdout
    assert result.stderr == ""
    assert Path("c.yaml").exists()
    assert_refused(invoke("q.jsonl", "--save", "c.yaml", "--quiet", "--json"), "Error: --quiet and")


def test_json_is_one_object_and_nothing_else(fake: Fake, folder: Path) -> None:
    fake.found = measured(tried=TRIED, keep=0.3, warnings=("careful",))
    result = invoke("q.jsonl", "--save", "c.yaml", "--json", "--propose", "0.3")
    found = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    assert found["calibration"]["horizon"] == 2
    assert found["collapse"]["curve"][0] == pytest.approx(0.9)
    assert found["horizons"]["general"]["change"]["lower"] == [-0.5, -0.02, -0.005, 0.0]
    assert found["tried"][0]["schedule"]["name"] == "random at input"
    assert found["warnings"] == ["careful"]


def test_proposals_are_a_table_and_the_best_is_written_as_a_preset(
    fake: Fake, folder: Path
) -> None:
    fake.found = measured(tried=TRIED, keep=0.3)
    result = invoke("q.jsonl", "--save", "c.yaml", "--propose", "0.3", "--propose-preset", "p.yaml")
    assert re.search(r"0\.300 +-2\.0% +-5\.0% +90% +best +random at input", result.stdout)
    row = r"0\.299 +-20\.0% +-30\.0% +80% +18\.0% +9\.0% to 27\.0% +entropy at ecl"
    assert re.search(row, result.stdout)
    assert re.search(r"stuck: keep 0\.3 is too low", result.stdout)
    assert "best of 2 schedules at keep 0.3: random at input, -2.0%" in result.stdout
    assert "written   c.yaml, p.yaml" in result.stderr
    preset = load_preset("p.yaml")
    assert (preset.keep, preset.stages_for("image")[0].method) == (0.3, "random")
    assert Path("c.yaml").read_text().startswith("# best of 2 schedules at keep 0.3: random")
    assert read_calibration("c.yaml", 4).ecl == 1


def test_of_few_files_the_table_says_so_in_place_of_bounds(fake: Fake, folder: Path) -> None:
    few = [
        replace(one, change=replace(one.change, files=6), behind=Gap(one.behind.mean), apart=False)
        for one in TRIED[:2]
        if one.change and one.behind
    ]
    fake.found = measured(tried=tuple(few), keep=0.3)
    text = invoke("q.jsonl", "--save", "c.yaml", "--propose", "0.3").stdout
    assert re.search(r"0\.299 +-20\.0% +80% +18\.0% +too few files +entropy at ecl", text)
    assert "alike" not in text
    assert "6 files can't tell schedules apart: 10 are the fewest" in " ".join(text.split())


def test_no_schedule_that_meets_the_budget_is_said_and_nothing_is_written(
    fake: Fake, folder: Path
) -> None:
    fake.found = measured(tried=TRIED[2:], keep=0.3)
    result = invoke("q.jsonl", "--save", "c.yaml", "--propose", "0.3", "--propose-preset", "p.yaml")
    assert "no schedule meets this budget" in result.stdout
    assert not Path("p.yaml").exists()


def test_windows_have_a_table_of_their_own(fake: Fake, folder: Path) -> None:
    fake.found = measured(
        information=TokenInformation((0.1, 0.0, 0.0, 0.0), (0.5, 0.1, 0.0, 0.0), 3)
    )
    result = invoke("q.jsonl", "--save", "c.yaml", "--windows", "3")
    assert fake.given[3].windows == 3
    assert re.search(r"\n +0 +\+0\.1000 +0\.5000", result.stdout)


def test_media_are_inputs_of_their_own_with_every_question(fake: Fake, folder: Path) -> None:
    Image.new("RGB", (8, 8)).save("b.png")
    invoke("a.png", "b.png", "-q", "what?", "-q", "where?", "--save", "c.yaml", "--frames", "4",
           "--system", "brief", "--max-new-tokens", "7", "--device", "cpu")  # fmt: skip
    loaded, asked, source, settings, _ = fake.given
    assert (loaded, source) == ("loaded", "2 files of one's own")
    assert asked == [
        Asked(Path(file), question) for file in ("a.png", "b.png") for question in
        ("what?", "where?")
    ]  # fmt: skip
    assert (settings.asking.sampling.frames, settings.asking.generation.system) == (4, "brief")
    assert settings.asking.generation.max_new_tokens == 7
    assert (fake.load["name"], fake.load["device"]) == (None, "cpu")


def test_a_list_of_questions_brings_its_files(fake: Fake, folder: Path) -> None:
    invoke("q.jsonl", "--save", "c.yaml", "--propose", "0.3", "--methods", "random, uniform")
    assert fake.given[1] == [Asked(Path("a.png"), "what?", "red", (), "colour")]
    assert fake.given[2] == "q.jsonl"
    assert (fake.given[3].keep, fake.given[3].methods) == (0.3, ("random", "uniform"))


def test_a_line_that_can_not_be_asked_is_named_and_left_out(fake: Fake, folder: Path) -> None:
    Path("q.jsonl").write_text("{\n" + Path("q.jsonl").read_text())
    result = invoke("q.jsonl", "--save", "all.json")
    assert result.exit_code == 0, result.output
    assert len(fake.given[1]) == 1
    assert re.search(r"left out +1 of \d+ questions", result.stdout)
    assert "line 1: not JSON" in result.stdout
    assert "question 1" not in result.stdout  # the line is named once
    assert [fault["question"] for fault in json.loads(Path("all.json").read_text())["failed"]] == [
        0
    ]


def test_options_of_the_methods_that_schedules_select_by_arrive(fake: Fake, folder: Path) -> None:
    arguments = ("--propose", "0.3", "--methods", "entropy", "--methods", "random")
    result = invoke("q.jsonl", "--save", "c.yaml", *arguments, "-o", "norm=none")
    assert result.exit_code == 0, result.stderr
    assert fake.given[3].methods == ("entropy", "random")
    assert fake.given[3].options == {"norm": "none"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["q.jsonl", "a.png"], "q.jsonl has its own files and questions"),
        (["q.jsonl", "-q", "what?"], "q.jsonl has its own files and questions"),
        (["none.jsonl"], "none.jsonl: can't be read: No such file"),
        (["none.png", "-q", "what?"], "none.png: no such file"),
        (["a.png", "-q", " "], "the question is empty"),
        (["q.jsonl", "--frames", "0"], "--frames 0 is out of range"),
        (["q.jsonl", "--windows", "-1"], "--windows -1 is out of range"),
        (["q.jsonl", "--seed", "-1"], "--seed -1 is out of range"),
        (["q.jsonl", "--max-new-tokens", "0"], "--max-new-tokens 0 is out of range"),
        (["q.jsonl", "--max-tiles", "-1"], "--max-tiles -1 is out of range"),
        (["q.jsonl", "--max-pixels", "0"], "--max-pixels 0 is out of range"),
        (["q.jsonl", "--propose", "1.5"], "keep 1.5 is not a fraction in (0, 1]"),
        (["q.jsonl", "--methods", "random"], "--methods without --propose"),
        (["q.jsonl", "--propose-preset", "p"], "--propose-preset without --propose"),
        (["q.jsonl", "--propose", "0.3", "--methods", "rndom"], "unknown method 'rndom'"),
        (["q.jsonl", "--propose", "0.3", "--propose-preset", "c.yaml"], "two files in one place"),
        (["q.jsonl", "--save", "c.gif"], "--save c.gif: its suffix names no format"),
        (["q.jsonl", "--save", "no/c.png"], "can't save there: no folder"),
        (["q.jsonl", "--save", "dir.png"], "can't save there: it is a directory"),
        (["q.jsonl", "-o", "c.yaml"], "-o c.yaml is not KEY=VALUE"),
        (["q.jsonl", "-o", "norm=none"], "-o without --propose"),
        (["q.jsonl", "--propose", "0.3", "-o", "nrm=none"], "has the option nrm"),
        (
            ["q.jsonl", "--propose", "0.3", "-o", "norm=x"],
            "norm: x is not a value of method entropy",
        ),
    ],
)
def test_what_can_not_be_is_told_before_a_model_is_loaded(
    fake: Fake, folder: Path, arguments: list[str], message: str
) -> None:
    result = invoke(*arguments, "--save", "c.yaml")
    assert_refused(result, f"Error: .*{re.escape(message)}")
    assert fake.load == {}
    assert not Path("c.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png", "--save", "c.yaml"], "Missing option '-q', or give a QUESTIONS.jsonl"),
        (["q.jsonl"], "Missing option '--save'"),
        (["--save", "c.yaml"], "Missing argument"),
        (["q.jsonl", "--save", "c.yaml", "--propose", "much"], "not a valid float"),
    ],
)
def test_what_the_parser_rejects_exits_with_2(
    fake: Fake, folder: Path, arguments: list[str], message: str
) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_file_that_can_not_be_written_is_said(fake: Fake, folder: Path, full_disk: None) -> None:
    result = invoke("q.jsonl", "--save", "c.yaml")
    assert "c.yaml: can't save there: No space left on device\nhint: free some" in result.stderr
    assert result.exit_code == 1
    assert list(folder.glob("*c.*")) == []


def test_a_picture_that_is_asked_about_is_not_drawn_over(fake: Fake, folder: Path) -> None:
    kept = Path("a.png").read_bytes()
    for arguments in (["q.jsonl"], ["a.png", "-q", "what?"]):
        result = invoke(*arguments, "--save", "a.yaml", "--save", "a.png")
        assert "--save a.png would be written over a file that the command reads" in result.stderr
        assert (result.exit_code, fake.load, Path("a.png").read_bytes()) == (1, {}, kept)


def test_what_was_measured_is_shown_where_a_file_can_not_be_written(
    fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.suffix == ".png":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    result = invoke("q.jsonl", "--save", "c.yaml", "--save", "c.png")
    assert "horizon" in result.stdout
    assert "written   c.yaml\n" in result.stderr
    assert "c.png: can't save there: No space left on device\nhint: free some" in result.stderr
    assert (result.exit_code, Path("c.yaml").exists(), Path("c.png").exists()) == (1, True, False)


def test_the_embedded_model_is_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"a.png": (112, 112), "b.png": (100, 90)}
    lines = []
    for name, size in sizes.items():
        Image.new("RGB", size, (200, 30, 30)).save(name)
        lines.append({"file": name, "question": "how many objects are there?", "answer": "0"})
    lines.append({"file": "a.png", "question": "what is the large number?", "kind": "number_large"})
    Path("q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = invoke(
        "q.jsonl", "--save", "c.yaml", "--propose", "0.5", "--methods", "random", "--json"
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["questions"], found["labelled"], found["inputs"]) == (3, 2, 2)
    assert found["model"]["name"] == "embedded"
    own = found["horizons"]["text-heavy"]  # the model's own answer, greedy by definition
    assert own["change"]["questions"] == 1
    layers = found["model"]["layers"]
    known = read_calibration("c.yaml", layers, model_type="llava_onevision",
                             hidden=found["model"]["hidden_size"])  # fmt: skip
    assert known.horizon == layers  # two files can't tell
    asked = [
        "ask",
        "a.png",
        "what?",
        "--calibration",
        "c.yaml",
        "--keep",
        "0.9",
        "--json",
        "--preset",
        "entropy-horizon",
    ]
    used = json.loads(CliRunner().invoke(cli, asked).stdout)
    assert not any("by default" in one for one in used["warnings"])
    assert used["tokens"]["stages"][0]["layer"] == known.ecl
