"""`vtprune tune` as a product: what is printed and written where, and how it exits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from test_forced_answers import loaded_tiny
from test_tuning import Answerer

from vtprune import demo
from vtprune.cli import cli
from vtprune.evaluation import tune as tuning
from vtprune.evaluation.variants import UNPRUNED
from vtprune.models import loading
from vtprune.preset import load_preset

AT_ONE_KEEP = ("q.jsonl", "--floor", "0.8", "--keep", "0.3")


class Fake:
    """A model and its answers: the preset fast loses nothing, all others everything."""

    def __init__(self) -> None:
        self.holds = True
        self.answerer = Answerer(lambda number, asked, cell: self.holds and cell.name == "fast")
        self.loads: list[dict[str, object]] = []

    def load(self, **options: object) -> loading.Loaded:
        self.loads.append(options)
        return loaded_tiny("llava_onevision")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    found = Fake()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(loading, "load", found.load)
    monkeypatch.setattr(tuning, "answer_all", found.answerer.answer_all)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run: 30 pictures, a question about each."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for number in range(30):
        Image.new("RGB", (8, 8)).save(f"p-{number}.png")
        lines.append(json.dumps({"file": f"p-{number}.png", "question": f"what is {number}?"}))
    Path("q.jsonl").write_text("\n".join(lines))
    return tmp_path


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, ["tune", *args], prog_name="vtprune")


def test_what_is_found_is_on_stdout_and_in_a_preset_that_loads(fake: Fake, folder: Path) -> None:
    result = invoke("q.jsonl", "--floor", "0.8", "--keep", "0.5,0.3", "--save", "mine.yaml")
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert text.startswith("searched on 10 questions about 10 files: the same answer\n")
    assert re.search(r"\nkeep +0\.5 +0\.3 *\n", text)
    assert re.search(r"\nfast +100\.0% +100\.0% *\n", text)
    assert re.search(r"\nuniform at input +0\.0% +0\.0% *\n", text)
    assert "tested on 20 questions about 20 files held out, from the top until one fails" in text
    # 0.05^(1/20) = 0.861; the fake's first token takes the kept share of the time
    assert re.search(r"\nfast +0\.5 +50% +100\.0% +86\.1% +100\.0% +2\.00x +holds", text)
    assert re.search(r"\nfast +0\.3 +30% +100\.0% +86\.1% +100\.0% +3\.33x +chosen", text)
    found = " ".join(text.split())
    assert "found fast at keep 0.3 keeps at least 80 % of the unpruned model's answers" in found
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "written   mine.yaml" in result.stderr
    assert load_preset("mine.yaml").keep == 0.3


def test_json_is_one_object_with_the_preset_in_it(fake: Fake, folder: Path) -> None:
    result = invoke("q.jsonl", "--floor", "0.8", "--keep", "0.3", "--save", "mine.yaml", "--json")
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    told = json.loads(result.stdout)
    assert told["chosen"]["keep"] == told["preset"]["keep"] == 0.3
    assert told["file"] == "mine.yaml"
    assert told["held_out"] == {"questions": 20, "files": 20}
    assert load_preset(told["preset"]).stages == load_preset("mine.yaml").stages


def test_a_line_that_can_not_be_asked_is_named_and_left_out(fake: Fake, folder: Path) -> None:
    lines = Path("q.jsonl").read_text()
    wrong = json.dumps({"file": "none.png", "question": "what?"})
    Path("q.jsonl").write_text("\n".join([wrong, "{", lines]))
    result = invoke(*AT_ONE_KEEP, "--save", "all.json")
    assert result.exit_code == 0, result.output
    assert re.search(r"left out +2 of 32 questions", result.stdout)
    assert re.search(r"line1:\S*none\.png", "".join(result.stdout.split()))
    assert "line 2: not JSON" in result.stdout
    assert "question 2" not in result.stdout  # the line is named once
    saved = json.loads(Path("all.json").read_text())
    assert [fault["question"] for fault in saved["failed"]] == [0, 1]
    assert saved["search"]["questions"] + saved["held_out"]["questions"] == 30


def test_all_unknown_methods_and_presets_are_named_at_once(fake: Fake, folder: Path) -> None:
    names = ("--methods", "entropyy,fastw", "--presets", "balansed")
    result = invoke("q.jsonl", *names, "--save", "mine.yaml")
    assert result.exit_code == 1
    for name in ("entropyy", "fastw", "balansed"):
        assert repr(name) in result.stderr
    assert fake.loads == []


def test_nothing_that_holds_is_an_error_line_and_no_file(fake: Fake, folder: Path) -> None:
    fake.holds = False
    Path("mine.yaml").write_text("description: of yesterday\n")
    for option in ((), ("--json",)):
        result = invoke(
            "q.jsonl", "--floor", "0.8", "--keep", "0.3", "--save", "mine.yaml", *option
        )
        assert result.exit_code == 1
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1
        assert errors[0].startswith("Error: nothing keeps 80 % of the unpruned model's answers")
        assert "hint: try a higher --keep" in result.stderr
        assert "written" not in result.output
        assert Path("mine.yaml").read_text() == "description: of yesterday\n"
    told = json.loads(result.stdout)
    assert told["chosen"] is None
    assert told["file"] is None
    assert told["reason"].startswith("nothing keeps 80 %")


def test_media_are_asked_every_question(fake: Fake, folder: Path) -> None:
    files = [f"p-{number}.png" for number in range(30)]
    result = invoke(*files, "-q", "what?", "-q", "where?", "--floor", "0.8", "--keep", "0.3",
                    "--save", "mine.yaml", "--frames", "4", "--max-tiles", "2")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "40 questions about 20 files held out" in result.stdout
    preset = load_preset("mine.yaml")
    assert (preset.video.frames, preset.image.max_tiles) == (4, 2)


def test_the_seed_is_that_of_the_split_and_of_the_preset(fake: Fake, folder: Path) -> None:
    for seed in ("3", "4"):
        invoke(
            "q.jsonl", "--floor", "0.8", "--keep", "0.3", "--save", f"{seed}.yaml", "--seed", seed
        )
        assert load_preset(f"{seed}.yaml").seed == int(seed)


def test_a_killed_run_goes_on_with_its_answers(fake: Fake, folder: Path) -> None:
    args = (
        "q.jsonl",
        "--floor",
        "0.8",
        "--keep",
        "0.3",
        "--save",
        "m.yaml",
        "--answers",
        "a.jsonl",
    )
    invoke(*args)
    whole = len(fake.answerer.asked)
    lines = Path("a.jsonl").read_bytes().splitlines(keepends=True)
    Path("a.jsonl").write_bytes(b"".join(lines[:-3]) + lines[-3][:20])
    again = invoke(*args)
    assert again.exit_code == 0
    assert len(fake.answerer.asked) == whole + 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("q.jsonl",), "30 files can't show --floor 0.98"),
        (("q.jsonl", "--floor", "1"), "--floor 1 is out of range"),
        (("q.jsonl", "--floor", "0.8", "--keep", "0"), "keep 0 is not a fraction"),
        (("q.jsonl", "--floor", "0.8", "--keep", ""), "is not a fraction"),
        (("q.jsonl", "--floor", "0.8", "--presets", "fats"), "no preset 'fats'"),
        (("q.jsonl", "--floor", "0.8", "--methods", "entropi"), "unknown method 'entropi'"),
        (("q.jsonl", "--floor", "0.8", "--metric", "bleu"), "--metric bleu is unknown"),
        (("q.jsonl", "--floor", "0.8", "--limit", "0"), "--limit 0 is out of range"),
        (("q.jsonl", "--floor", "0.8", "-q", "what?"), "has its own files and questions"),
        (("q.jsonl", "--floor", "0.8", "--answers", "m.yaml"), "two files in one place"),
        (("q.jsonl", "--floor", "0.8", "--answers", "q.jsonl"), "would be written over"),
        (("q.jsonl", "--floor", "0.8", "--answers", "p-3.png"), "would be written over"),
        (("q.jsonl", "--floor", "0.8", "--answers", "no/a.jsonl"), "no folder"),
        (("none.jsonl", "--floor", "0.8"), "can't be read"),
        (("none.png", "-q", "what?", "--floor", "0.8"), "none.png"),
    ],
)
def test_what_can_not_be_is_said_before_a_model_is_loaded(
    fake: Fake, folder: Path, args: tuple[str, ...], message: str
) -> None:
    result = invoke(*args, "--save", "m.yaml")
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert fake.loads == []
    assert not Path("m.yaml").exists()


@pytest.mark.parametrize("option", ["--presets", "--calibration"])
def test_no_preset_is_written_over_what_it_was_made_from(
    fake: Fake, folder: Path, option: str
) -> None:
    text = "keep: 0.3\nstages: [{at: 2, method: random}]\n"
    if option == "--calibration":
        text = "model_type: x\nlayers: 2\nhidden_size: 8\necl: 1\nhorizon: 1\n"
    Path("mine.yaml").write_text(text)
    result = invoke("q.jsonl", "--floor", "0.8", option, "mine.yaml", "--save", "./mine.yaml")
    assert result.exit_code == 1, result.output
    assert "--save mine.yaml would be written over a file that the command reads" in result.stderr
    assert Path("mine.yaml").read_text() == text


def test_media_without_a_question_and_no_file_to_write_are_usage_errors(
    fake: Fake, folder: Path
) -> None:
    assert invoke("p-0.png", "--save", "m.yaml").exit_code == 2
    assert invoke("q.jsonl").exit_code == 2


def test_the_embedded_model_is_tuned_on_questions_of_its_world(tmp_path: Path) -> None:
    lines = demo.write(tmp_path, 40, 0, "dev")
    pictures = {line["file"]: line for line in lines if line["file"].endswith("png")}
    few = list(pictures.values())[:4]
    assert len(few) == 4
    text = "".join(json.dumps({key: line[key] for key in ("file", "question")}) + "\n"
                   for line in few)  # fmt: skip
    (tmp_path / "few.jsonl").write_text(text)
    target = tmp_path / "mine.yaml"
    result = invoke(str(tmp_path / "few.jsonl"), "--presets", "balanced", "--keep", "0.95",
                    "--floor", "0.1", "--save", str(target), "--json")  # fmt: skip
    told = json.loads(result.stdout)
    assert {one["name"] for one in told["trials"]} == {
        "balanced", "uniform at input", "downsample at pixels"
    }  # fmt: skip
    assert result.exit_code == (0 if told["chosen"] else 1)
    assert target.exists() == bool(told["chosen"])
    assert UNPRUNED not in {one["name"] for one in told["trials"]}
