"""The command line as a product: what is printed where, and how it exits."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from conftest import assert_refused
from PIL import Image
from reports import report_of
from test_console import REPORT

from vtprune import __version__, demo, saving
from vtprune.cli import COMMANDS, cli, output
from vtprune.cli.config import load_config
from vtprune.cli.flags import sampling_from
from vtprune.cli.options import Flags
from vtprune.cli.results import json_file
from vtprune.errors import MediaError, ModelError, VtpruneError
from vtprune.inference import answer_questions, prompt_media
from vtprune.inference.generate import Generation
from vtprune.inference.report import Report
from vtprune.media.times import parse_time
from vtprune.models import FAMILIES, loading
from vtprune.models.base import Sampling
from vtprune.models.names import aliases
from vtprune.preset import load_preset, preset_names
from vtprune.pruners import METHODS

ROOT = Path(__file__).parents[1]


@dataclass
class FakeRun:
    """Stands in for loading and asking: notes what it was given, and answers from a list."""

    answers: list[list[str]] = field(default_factory=lambda: [["A red ", "circle."]])
    warnings: tuple[str, ...] = ()
    error: Exception | None = None
    fail_at: int = -1
    options: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)

    def fake_open(self, name: str | None, **options: Any) -> FakeRun:
        self.options = {"name": name, **options}
        options["on_progress"]("loading", 0, 1)
        return self

    def load(self) -> str:
        self.options["on_progress"]("loading", 1, 1)
        return "loaded"

    def fake_gather(
        self, opened: FakeRun, paths: Sequence[Any], sampling: object, preset: object,
        limits: object, on_progress: object, thumbnails: bool,
    ) -> tuple[str, Any]:  # fmt: skip
        return opened.load(), paths

    def fake_ask(
        self, loaded: object, paths: Sequence[str], questions: Sequence[str], preset: object,
        **options: Any,
    ) -> Iterator[Report]:  # fmt: skip
        self.asked = {"paths": paths, "questions": questions, "preset": preset, **options}
        for number, question in enumerate(questions):
            options["on_question"](number, question)
            pieces = self.answers[number % len(self.answers)]
            for piece in pieces:
                options["on_text"](piece)
                if number == self.fail_at:
                    assert self.error is not None
                    raise self.error
            values = {key: value for key, value in REPORT.items() if key != "warnings"}
            answer = {"question": question, "answer": "".join(pieces)}
            yield report_of({**values, **answer, "warnings": self.warnings})


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    found = FakeRun()
    monkeypatch.setattr(loading, "open_model", found.fake_open)
    monkeypatch.setattr(prompt_media, "load_with_media", found.fake_gather)
    monkeypatch.setattr(answer_questions, "answer_questions", found.fake_ask)
    return found


@pytest.fixture
def clip(tmp_path: Path) -> str:
    path = tmp_path / "clip.mp4"
    Image.new("RGB", (8, 8)).save(path, format="png")  # opened, never decoded
    return str(path)


def invoke(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, args, input=stdin, prog_name="vtprune")


def lines(text: str) -> str:
    """Text without the blanks that pad a table."""
    return re.sub(r" +$", "", text, flags=re.MULTILINE)


def in_process(*args: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        input=stdin,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=120,
        check=False,
    )


# ask: what goes where


def test_answer_on_stdout_and_tables_on_stderr(fake: FakeRun, clip: str) -> None:
    result = invoke("ask", clip, "what happens?")
    assert result.exit_code == 0
    assert result.stdout == "A red circle.\n"
    assert lines(result.stderr).startswith("\nread      clip.mp4: video 1280 x 720, 42.03 s")
    assert "prefill                      33.5 of 106 TFLOP" in result.stderr
    assert "loading" not in result.stderr


def test_quiet_prints_the_answer_only(fake: FakeRun, clip: str) -> None:
    fake.warnings = ("careful",)
    result = invoke("ask", clip, "what happens?", "--quiet")
    assert (result.stdout, result.stderr) == ("A red circle.\n", "")


def test_warnings_are_shown(fake: FakeRun, clip: str) -> None:
    fake.warnings = ("careful",)
    assert invoke("ask", clip, "what happens?").stderr.endswith("\nwarning   careful\n")


def test_json_is_the_report_and_nothing_else(fake: FakeRun, clip: str) -> None:
    result = invoke("ask", clip, "what happens?", "--json")
    found = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    assert found["answer"] == "A red circle."
    assert set(found) == {*REPORT, "host"}


def test_files_are_hashed_only_for_a_report_that_is_written(
    fake: FakeRun, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[object] = []
    monkeypatch.setattr(
        "vtprune.inference.report.file_digests", lambda files: hashed.append(files) or {}
    )
    assert invoke("ask", clip, "what happens?").exit_code == 0
    assert hashed == []
    saved = tmp_path / "a.json"
    assert invoke("ask", clip, "what happens?", "--save", str(saved)).exit_code == 0
    assert len(hashed) == 1


def test_several_questions_share_the_media(fake: FakeRun, clip: str) -> None:
    fake.answers = [["one"], ["two\n"]]
    result = invoke("ask", clip, clip, "-q", "first?", "--question", "second?")
    assert result.stdout == "one\ntwo\n"
    assert "[1/2] first?" in result.stderr
    assert "[2/2] second?" in result.stderr
    assert [str(one.path) for one in fake.asked["paths"]] == [clip, clip]
    assert fake.asked["questions"] == ["first?", "second?"]


def test_several_reports_are_one_line_of_json_each(fake: FakeRun, clip: str) -> None:
    result = invoke("ask", clip, "-q", "first?", "-q", "second?", "--json")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [report["question"] for report in found] == ["first?", "second?"]


def test_answer_without_pieces_is_printed_whole(fake: FakeRun, clip: str) -> None:
    fake.answers = [[""]]
    assert invoke("ask", clip, "what?").stdout == "\n"


def test_question_from_standard_input(fake: FakeRun, clip: str) -> None:
    invoke("ask", clip, "-", stdin="what happens\nat the end?\n")
    assert fake.asked["questions"] == ["what happens\nat the end?"]


def test_control_characters_in_an_answer_are_dropped(fake: FakeRun, clip: str) -> None:
    fake.answers = [["\x1b[2J\x07red\n\tcircle"]]
    assert invoke("ask", clip, "what?").stdout == "[2Jred\n\tcircle\n"


# ask: what is passed on


def test_defaults_leave_the_choice_to_model_and_preset(fake: FakeRun, clip: str) -> None:
    invoke("ask", clip, "what?")
    assert fake.options.pop("on_progress")
    assert fake.options == {
        "name": None, "adapter": None, "device": "auto", "dtype": "auto", "attention": None,
        "quantize": None, "calibration": None, "cache": None, "cache_bytes": 10_000_000_000,
        "compile": False, "trust_remote_code": False,
    }  # fmt: skip
    assert fake.asked["preset"] == load_preset("balanced")
    assert fake.asked["sampling"] == Sampling()
    assert fake.asked["generation"] == Generation()
    assert fake.asked["limits"].max_pixels == 178_956_970
    assert fake.asked["compare"] is False


def test_every_option_arrives(
    fake: FakeRun, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(
        "{model_type: qwen2_5_vl, layers: 28, hidden_size: 3584, ecl: 2, horizon: 20}"
    )
    arguments = (
        "--model qwen2.5-vl-7b --device cpu --dtype float32 --attention eager --calibration c.yaml "
        "--adapter tuned --quantize 4bit "
        "--trust-remote-code --method entropy --at 3 --keep image=0.5,video=0.2 -o norm=row "
        "-o states=key --seed 7 --frames 4 --max-frames 9 --start 1.5 --end 3 --max-tiles 2 "
        "--max-pixels 99 --allow-partial --system short --max-new-tokens 5 --temperature 0.5 "
        "--top-p 0.9 --compare"
    )
    result = invoke("ask", clip, "what?", *arguments.split())
    assert result.exit_code == 0, result.stderr
    assert (fake.options["name"], fake.options["adapter"]) == ("qwen2.5-vl-7b", "tuned")
    assert fake.options["calibration"] == Path("c.yaml")
    assert (fake.options["device"], fake.options["dtype"]) == ("cpu", "float32")
    assert (fake.options["attention"], fake.options["trust_remote_code"]) == ("eager", True)
    preset = fake.asked["preset"]
    (stage,) = preset.stages_for("image")
    assert (stage.at, stage.method) == ("3", "entropy")
    assert dict(stage.options) == {"norm": "row", "states": "key"}
    assert (preset.keep_for("image"), preset.keep_for("video"), preset.seed) == (0.5, 0.2, 7)
    assert fake.asked["sampling"] == Sampling(4, None, 9, 1.5, 3.0, 2)
    assert fake.asked["generation"] == Generation(5, 0.5, 0.9, "short", 7)
    limits = fake.asked["limits"]
    assert (limits.max_pixels, limits.allow_partial, fake.asked["compare"]) == (99, True, True)


def test_embedded_names_the_model_of_the_package(fake: FakeRun, clip: str) -> None:
    invoke("ask", clip, "what?", "--model", "embedded")
    assert fake.options["name"] is None


NO_FLAGS = Flags(
    **dict.fromkeys(Flags.__dataclass_fields__)  # type: ignore[arg-type]
)


@pytest.mark.parametrize(
    ("video", "flags", "expected"),
    [
        ({"frames": 8}, {}, Sampling(frames=8)),
        ({"frames": 8}, {"frames": 4}, Sampling(frames=4)),
        ({"frames": 8}, {"fps": 2.0}, Sampling(fps=2.0)),
        ({"fps": 1.0, "max_frames": 16}, {}, Sampling(fps=1.0, max_frames=16)),
        ({"fps": 1.0, "max_frames": 16}, {"frames": 64}, Sampling(frames=64)),
        ({"fps": 1.0, "max_frames": 16}, {"fps": 3.0}, Sampling(fps=3.0, max_frames=16)),
        ({"fps": 1.0}, {"max_frames": 5}, Sampling(fps=1.0, max_frames=5)),
    ],
)
def test_sampling_flags_replace_the_presets(
    video: dict[str, object], flags: dict[str, Any], expected: Sampling
) -> None:
    stages = [{"at": 2, "method": "random"}]
    preset = load_preset({"keep": 0.5, "stages": stages, "video": video})
    given = Flags(**{**NO_FLAGS.__dict__, **flags})
    assert sampling_from(preset, given) == expected


def test_config_file_sets_defaults_under_flags(fake: FakeRun, clip: str, own_config: Path) -> None:
    own_config.write_text("model: qwen2.5-vl-7b\npreset: fast\nmax_new_tokens: 9\nsystem: brief\n")
    invoke("ask", clip, "what?", "--max-new-tokens", "3")
    assert fake.options["name"] == "qwen2.5-vl-7b"
    assert fake.asked["preset"].name == "fast"
    assert fake.asked["generation"] == Generation(3, system="brief")
    invoke("ask", clip, "what?", "--preset", "document", "--model", "embedded")
    assert (fake.asked["preset"].name, fake.options["name"]) == ("document", None)


# ask: errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "0"], r"Error: keep 0 is not a fraction in \(0, 1\]\nhint: "),
        (["--keep", "1.5"], r"Error: keep 1.5 is not a fraction in \(0, 1\]\n"),
        (["--keep", "abc"], r"Error: keep abc is not a fraction in \(0, 1\]\n"),
        (["--keep", "nan"], r"Error: keep nan is not a fraction in \(0, 1\]\n"),
        (["--keep", "sound=1"], r"Error: keep is given for 'sound', which is not image or video\n"),
        (["--method", "entropi"], r"Error: unknown method 'entropi'\nhint: did you mean entropy\?"),
        (["--preset", "balance"], r"Error: no preset 'balance'.*\nhint: did you mean balanced\?"),
        (["--at", "2"], r"Error: a place to cut \(at\) needs a method\n"),
        (["--method", "random", "--at", "x"], r"Error: at: x is not a place\nhint: "),
        (["-o", "norm"], r"Error: -o norm is not KEY=VALUE\nhint: .*--save FILE writes the result"),
        (["-o", "out.csv"], r"Error: -o out.csv is not KEY=VALUE\nhint: .*--save FILE writes "),
        (
            ["--method", "entropy", "-o", "norm=row", "-o", "norm = none"],
            r"Error: -o norm is given twice: row and none\nhint: ",
        ),
        (["--keep", "video=0.5,video=0.2"], r"Error: keep for video is given twice: .*\nhint: "),
        (
            ["--save", "report.csv"],
            r"Error: --save report.csv: its suffix names no format of this "
            r"command\nhint: name it report.json, report.jsonl\n",
        ),
        (["--save", "report"], r"Error: --save report: its suffix names no format"),
        (
            ["--method", "entropy", "-o", "norm=x"],
            r"Error: norm: x is not a value of method entropy\nhint: ",
        ),
        (
            ["--at", "pixels", "--method", "entropy"],
            r"Error: entropy can't cut at pixels: .*\nhint: ",
        ),
        (
            ["--method", "predictable", "-o", "tolerance=x"],
            r"Error: tolerance: x is not a value of method predictable\nhint: give a number ",
        ),
        (["--frames", "0"], r"Error: --frames 0 is out of range\nhint: .*1 or more"),
        (["--fps", "0"], r"Error: --fps 0.0 is out of range\n"),
        (["--fps", "inf"], r"Error: --fps inf is out of range\n"),
        (["--frames", "2", "--fps", "1"], r"Error: --frames and --fps exclude each other\n"),
        (["--max-tiles", "-1"], r"Error: --max-tiles -1 is out of range\n"),
        (["--max-pixels", "0"], r"Error: --max-pixels 0 is out of range\n"),
        (["--max-new-tokens", "0"], r"Error: --max-new-tokens 0 is out of range\n"),
        (["--seed", "-1"], r"Error: --seed -1 is out of range\nhint: a whole number, 0 or more\n"),
        (
            ["--tokens", "0"],
            r"Error: --tokens 0 is out of range\nhint: a whole number, 1 or more\n",
        ),
        (["--decode-every", "0"], r"Error: --decode-every 0 .*\nhint: a whole number, 1 or more\n"),
        (["--tokens", str(2**63)], r"Error: --tokens \d+ .*\nhint: 9223372036854775807 or less\n"),
        (["--temperature", "-1"], r"Error: --temperature -1.0 is out of range\n"),
        (["--temperature", "nan"], r"Error: --temperature nan is out of range\n"),
        (["--top-p", "0"], r"Error: --top-p 0.0 is out of range\n"),
        (["--top-p", "0.9"], r"Error: --top-p 0.9 changes nothing without --temperature: .*\n"),
        (["--quiet", "--json"], r"Error: --quiet and --json exclude each other\n"),
    ],
)
def test_bad_value_is_one_error_line(
    fake: FakeRun, clip: str, arguments: list[str], message: str
) -> None:
    result = invoke("ask", clip, "what?", *arguments)
    assert_refused(result, message)
    assert fake.options == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask"], "Missing argument 'MEDIA... QUESTION'"),
        (["ask", "clip.mp4"], "Missing argument 'QUESTION'"),
        (["ask", "-q", "what?"], "Missing argument 'MEDIA'"),
        (["ask", "clip.mp4", "what?", "--kep", "1"], "No such option:? '?--kep"),
        (["ask", "clip.mp4", "what?", "--frames", "many"], "'many' is not a valid integer"),
        (["ask", "clip.mp4", "what?", "--keep"], "requires an argument"),
        (["aks"], "No such command 'aks'"),
        (["presets", "check"], "Missing argument 'FILE...'"),
    ],
)
def test_what_the_parser_rejects_exits_2(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert re.search(message, result.stderr)


def test_misspelt_option_is_corrected(clip: str) -> None:
    assert "--keep" in invoke("ask", clip, "what?", "--kep", "1").stderr


def test_missing_file_is_told_before_a_model_is_loaded(fake: FakeRun) -> None:
    result = invoke("ask", "none.mp4", "what?")
    assert result.stderr == "Error: none.mp4: no such file or directory\nhint: check the path\n"
    assert (result.exit_code, fake.options) == (1, {})


def test_question_that_is_a_file_is_refused(fake: FakeRun, clip: str) -> None:
    result = invoke("ask", "what?", clip)
    assert re.match("Error: the question '.*clip.mp4' is a file\nhint: ", result.stderr)
    assert result.exit_code == 1


@pytest.mark.parametrize(("question", "stdin"), [("", ""), (" ", ""), ("-", " \n")])
def test_empty_question_is_refused(fake: FakeRun, clip: str, question: str, stdin: str) -> None:
    result = invoke("ask", clip, question, stdin=stdin)
    assert re.match("Error: the question.* is empty\nhint: ", result.stderr)
    assert result.exit_code == 1


def test_error_in_the_middle_of_an_answer_begins_a_line(fake: FakeRun, clip: str) -> None:
    fake.error, fake.fail_at = ModelError("out of memory", "try --keep 0.1"), 0
    result = CliRunner().invoke(cli, ["ask", clip, "what?"])
    assert result.stdout == "A red \n"
    assert result.stderr == "Error: out of memory\nhint: try --keep 0.1\n"
    assert result.exit_code == 1


def test_error_of_several_lines_is_printed_as_one(fake: FakeRun, clip: str) -> None:
    fake.error, fake.fail_at = VtpruneError("one\n  two"), 0
    assert invoke("ask", clip, "what?").stderr.endswith("Error: one two\n")


def test_unexpected_error_has_no_traceback_unless_asked_for(fake: FakeRun, clip: str) -> None:
    fake.error, fake.fail_at = KeyError("layer"), 0
    result = invoke("ask", clip, "what?")
    assert "Error: internal: KeyError: 'layer'\nhint: this is a bug" in result.stderr
    assert result.exit_code == 1
    asked = invoke("--traceback", "ask", clip, "what?")
    assert isinstance(asked.exception, KeyError)


def test_running_out_of_memory_is_an_error_line(fake: FakeRun, clip: str) -> None:
    fake.error, fake.fail_at = MemoryError(), 0
    assert "Error: out of memory\nhint: " in invoke("ask", clip, "what?").stderr


def test_interrupt_exits_130_without_traceback(fake: FakeRun, clip: str) -> None:
    fake.error, fake.fail_at = KeyboardInterrupt(), 0  # type: ignore[assignment]
    result = invoke("ask", clip, "what?")
    assert result.exit_code == 130
    assert result.stderr == "\n"


def test_closed_pipe_is_silent(fake: FakeRun, clip: str) -> None:
    fake.error, fake.fail_at = BrokenPipeError(32, "Broken pipe"), 0
    result = invoke("ask", clip, "what?")
    assert (result.exit_code, result.stderr) == (1, "")


# ask: --save


def test_save_writes_the_report(fake: FakeRun, clip: str, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    result = invoke("ask", clip, "what?", "--save", str(target))
    assert result.exit_code == 0
    assert json.loads(target.read_text())["answer"] == "A red circle."
    assert [path.name for path in tmp_path.glob("*report*")] == ["report.json"]


def test_save_writes_several_reports_as_lines(fake: FakeRun, clip: str, tmp_path: Path) -> None:
    target = tmp_path / "reports.jsonl"
    invoke("ask", clip, "-q", "a?", "-q", "b?", "--save", str(target))
    found = [json.loads(line)["question"] for line in target.read_text().splitlines()]
    assert found == ["a?", "b?"]


def test_save_of_several_reports_as_json_is_a_list_and_a_second_save_is_written_too(
    fake: FakeRun, clip: str, tmp_path: Path
) -> None:
    first, second = tmp_path / "reports.json", tmp_path / "reports.jsonl"
    saves = ("--save", str(first), "--save", str(second))
    assert invoke("ask", clip, "-q", "a?", "-q", "b?", *saves).exit_code == 0
    listed = json.loads(first.read_text())
    assert [one["question"] for one in listed] == ["a?", "b?"]
    assert [json.loads(line) for line in second.read_text().splitlines()] == listed


def test_save_has_what_was_answered_before_a_question_failed(
    fake: FakeRun, clip: str, tmp_path: Path
) -> None:
    target = tmp_path / "report.json"
    fake.error, fake.fail_at = ModelError("no"), 1
    assert invoke("ask", clip, "-q", "a?", "-q", "b?", "--save", str(target)).exit_code == 1
    assert [report["question"] for report in json.loads(target.read_text())] == ["a?"]


def test_save_leaves_the_old_file_when_the_first_question_fails(
    fake: FakeRun, clip: str, tmp_path: Path
) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")
    fake.error, fake.fail_at = ModelError("no"), 0
    assert invoke("ask", clip, "-q", "a?", "-q", "b?", "--save", str(target)).exit_code == 1
    assert target.read_text() == "old"


def test_save_that_fails_leaves_nothing(tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(VtpruneError, match="can't save there: No space left on device"):
        saving.save_file(tmp_path / "report.json", b"{}")
    assert list(tmp_path.iterdir()) == []


def test_save_does_not_write_over_the_media(fake: FakeRun, clip: str) -> None:
    kept = Path(clip).read_bytes()
    result = invoke("ask", clip, "what?", "--save", clip)
    assert "would be written over a file that the command reads\nhint: give --save" in result.stderr
    assert (result.exit_code, Path(clip).read_bytes()) == (1, kept)


def test_what_is_no_number_is_null_in_json() -> None:
    report = {"a": math.nan, "b": [{"c": math.inf, "d": 1.5}]}
    assert output.to_json(report) == '{"a": null, "b": [{"c": null, "d": 1.5}]}'
    assert json.loads(json_file(report))["a"] is None


def test_save_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    target, link = tmp_path / "report.json", tmp_path / "link.json"
    link.symlink_to(target)
    saving.save_file(link, b'{"answer": "red"}')
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"answer": "red"}


@pytest.mark.parametrize(
    ("target", "reason"),
    [("", "a directory"), ("none/report.json", "no folder"), ("/dev/null", "not a regular file")],
)
def test_save_target_is_checked_before_the_model_is_loaded(
    fake: FakeRun, clip: str, tmp_path: Path, target: str, reason: str
) -> None:
    result = invoke("ask", clip, "what?", "--save", str(tmp_path / target))
    assert re.match(f"Error: .*can't save there: .*{reason}", result.stderr)
    assert (result.exit_code, fake.options) == (1, {})


# The other commands


def test_presets_list_names_all() -> None:
    result = invoke("presets", "list")
    assert result.exit_code == 0
    table, _, _ = result.stdout.partition("\n\n")
    assert [line.split()[0] for line in table.splitlines()[1:]] == preset_names()
    found = json.loads(invoke("presets", "list", "--json").stdout)
    assert [preset["name"] for preset in found] == preset_names()


def test_presets_show_prints_the_file_itself() -> None:
    result = invoke("presets", "show", "balanced")
    assert result.stdout == (ROOT / "presets" / "balanced.yaml").read_text()


def test_presets_show_of_an_unknown_one_suggests() -> None:
    result = invoke("presets", "show", "blanced")
    assert result.exit_code == 1
    assert "did you mean balanced?" in result.stderr


def test_presets_check_says_ok(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(invoke("presets", "show", "fast").stdout)
    result = invoke("presets", "check", str(path), "balanced")
    assert (result.exit_code, result.stdout) == (0, f"{path}: ok\nbalanced: ok\n")


def test_presets_check_names_every_fault_of_every_file(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{name}.yaml" for name in "abc")
    first.write_text("keep: 2\nstages:\n  - {at: nowhere, method: entropy}\n")
    second.write_text("kep: 0.3\nstages:\n  - {at: 2, method: random}\n")
    third.write_text("keep: 0.3\nstages:\n  - {at: 2, method: random}\n")
    result = invoke("presets", "check", str(first), str(second), str(third))
    assert result.exit_code == 1
    assert result.stdout == f"{third}: ok\n"
    one, two, hint = result.stderr.splitlines()
    assert "line 1: keep: 2" in one
    assert "line 3: at: nowhere is not a place" in one
    assert "line 1: unknown key 'kep', did you mean keep?" in two
    assert hint.startswith("hint: ")


def test_models_lists_the_families_that_can_be_asked() -> None:
    found = json.loads(invoke("models", "--json").stdout)
    names = [model["name"] for model in found]
    assert "qwen2.5-vl-7b" in names
    assert {"llava-1.5-7b", "molmo2-8b"} <= set(names)
    assert found[names.index("qwen2.5-vl-7b")]["calibration"]["ecl"] == 1
    assert "qwen2.5-vl-7b" in invoke("models").stdout


def test_methods_lists_the_registry() -> None:
    found = json.loads(invoke("methods", "--json").stdout)
    assert [method["name"] for method in found] == list(METHODS)
    (entropy,) = (method for method in found if method["name"] == "entropy")
    assert entropy["options"][0]["choices"] == ["none", "row"]
    assert all(name in invoke("methods").stdout for name in METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_explained_with_its_paper_and_differences(name: str) -> None:
    result = invoke("methods", name)
    text = " ".join(result.stdout.split())
    for part in ("Idea: ", "Why it works: ", "Paper: ", "Official code: ", "Differences: "):
        assert text.count(part) == 1
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert json.loads(invoke("methods", name, "--json").stdout)["name"] == name


def test_a_model_or_method_that_is_not_there_is_refused_with_a_suggestion() -> None:
    assert json.loads(invoke("models", "QWEN2.5-VL-7B", "--json").stdout)["parameters"] == "7B"
    for words, meant in (("models qwen2.5vl-7b", "qwen2.5-vl-7b"), ("methods entropi", "entropy")):
        result = invoke(*words.split())
        assert result.exit_code == 1
        assert f"hint: did you mean {meant}? " in result.stderr


def test_demo_writes_and_says_what_to_try(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[object] = []

    def write(directory: Path, num: int, seed: int) -> list[dict[str, str]]:
        given.extend([directory, num, seed])
        return [{"file": "0.mp4", "question": "what moves?", "answer": "a circle", "kind": "what"}]

    monkeypatch.setattr(demo, "write", write, raising=False)
    result = invoke("demo", str(tmp_path), "--num", "3", "--seed", "5")
    assert given == [tmp_path, 3, 5]
    assert result.stdout == (
        f"{tmp_path / 'questions.jsonl'}: 1 question\n"
        f'try: vtprune ask {tmp_path / "0.mp4"} "what moves?"\n'
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--num", "0"], "--num 0 is out of range"), (["--seed", "-1"], "--seed -1 is out of range")],
)
def test_demo_refuses_numbers_out_of_range(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = invoke("demo", str(tmp_path / "new"), *arguments)
    assert (result.exit_code, message in result.stderr) == (1, True)
    assert not (tmp_path / "new").exists()


def test_demo_refuses_a_file_in_place_of_a_directory(clip: str) -> None:
    result = invoke("demo", clip, "--num", "1")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {clip}")


# Config file


def test_config_file_that_is_absent_or_empty_sets_nothing(own_config: Path) -> None:
    nothing = load_config()
    own_config.write_text("# nothing yet\n")
    assert load_config() == nothing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nmodle: b\n", "line 2: unknown key 'modle', did you mean model?"),
        ("max_new_tokens: many\n", "line 1: max_new_tokens: 'many' is not a whole number"),
        ("\ndevice: [1]\n", r"line 2: device: \[1\] is not text"),
        ("preset: ''\n", "line 1: preset: '' is not text"),
        ('preset: "a\\0b"\n', r"line 1: preset: 'a\\x00b' is not text"),
        ("- a\n", "line 1: a config file must be a mapping of keys"),
        ("a: b: c\n", "line 1: not valid YAML: mapping values are not allowed here"),
        ("x: 1\ny: 2\n", "line 1: unknown key 'x' .*; line 2: unknown key 'y'"),
    ],
)
def test_bad_config_file_is_named_with_its_line(
    fake: FakeRun, clip: str, own_config: Path, text: str, message: str
) -> None:
    own_config.write_text(text)
    result = invoke("ask", clip, "what?")
    assert result.exit_code == 1
    assert re.match(f"Error: {re.escape(str(own_config))}.*{message}", result.stderr)


# Help, version, completion


def every_command() -> Iterator[tuple[str, ...]]:
    for name in COMMANDS:
        yield (name,)
        command = cli.get_command(click.Context(cli), name)
        if isinstance(command, click.Group):
            yield from ((name, child) for child in command.commands)


@pytest.mark.parametrize("words", [(), *every_command()], ids=" ".join)
def test_every_help_shows_an_example(words: tuple[str, ...]) -> None:
    result = invoke(*words, "--help")
    assert result.exit_code == 0
    assert re.search(r"Examples?:\n +vtprune ", result.stdout)
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_summaries_in_the_groups_help_are_the_commands_own() -> None:
    for name, (_, summary) in COMMANDS.items():
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert command.get_short_help_str(100).rstrip(".") == summary.rstrip(".")


@pytest.mark.parametrize("words", [*every_command()], ids=" ".join)
def test_every_option_has_a_help_line(words: tuple[str, ...]) -> None:
    command: click.Command | None = cli
    for word in words:
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), word)
    assert command is not None
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


@pytest.mark.parametrize("arguments", [["-V"], ["--version"], ["ask", "-V"]])
def test_version(arguments: list[str]) -> None:
    assert invoke(*arguments).stdout == f"vtprune {__version__}\n"


def completions(words: list[str], incomplete: str) -> list[str]:
    shell = ShellComplete(cli, {}, "vtprune", "_VTPRUNE_COMPLETE")
    return [item.value for item in shell.get_completions(words, incomplete)]


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        ([], "mo", {"models"}),
        (["ask", "--model"], "qwen2.5-vl-7", {"qwen2.5-vl-7b"}),
        (["ask", "--preset"], "ba", {"balanced"}),
        (["ask", "--method"], "", set(METHODS)),
        (["ask", "--at"], "h", {"horizon"}),
        (["ask", "--method", "entropy", "-o"], "norm", {"norm=row", "norm=none"}),
        (["compare", "--methods", "entropy", "-o"], "", {"norm=row", "states=key"}),
        (["evaluate", "--methods"], "entropy,vt", {"entropy,vtw"}),
        (["presets", "show"], "f", {"fast"}),
    ],
)
def test_shell_completion(words: list[str], incomplete: str, expected: set[str]) -> None:
    assert expected <= set(completions(words, incomplete))


def test_completion_of_options_is_that_of_the_methods_that_are_named() -> None:
    offered = completions(["compare", "--methods", "entropy,dart", "--methods", "vtw", "-o"], "")
    assert {pair.partition("=")[0] for pair in offered} == {
        option.name for name in ("entropy", "dart") for option in METHODS[name].options
    }


def test_completion_of_models_offers_what_can_be_asked() -> None:
    offered = completions(["ask", "--model"], "")
    runnable = {alias.name for alias in aliases() if alias.model_type in FAMILIES}
    assert runnable <= set(offered)


LIGHT = [
    ["--help"], *([name, "--help"] for name in COMMANDS), ["presets", "list"],
    ["presets", "show", "fast"], ["presets", "check", "fast"], ["models"], ["methods"],
    ["ask", "none.mp4", "what?", "--keep", "0"],
]  # fmt: skip
HEAVY = ("torch", "transformers", "numpy", "PIL", "av", "decord")


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from vtprune.cli import cli\n"
        "try:\n"
        f"    cli({arguments!r}, prog_name='vtprune')\n"
        "finally:\n"
        f"    print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    result = in_process("-c", program)
    assert result.stdout.splitlines()[-1:] == ["[]"], result.stderr


def test_help_imports_no_rich_and_no_yaml() -> None:
    result = in_process("-X", "importtime", "-m", "vtprune", "ask", "--help")
    assert result.returncode == 0
    modules = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "click" in modules
    assert modules.isdisjoint({"rich", "yaml", "torch", "numpy"})


# The process itself

SLOW = """
import signal, sys, time
from vtprune.cli import main
from vtprune.models import loading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
def open_model(name, **options):
    print("ready", flush=True)
    time.sleep(30)
loading.open_model = open_model
sys.argv = ["vtprune", "ask", {clip!r}, "what?"]
main()
"""


def test_ctrl_c_ends_the_process_with_130(clip: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(clip=clip)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.strip()) == (130, "")


def test_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m vtprune methods --json | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert result.stderr == ""
    assert result.stdout.strip() in ("0", "1")


def test_text_that_stdout_cannot_encode_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    stages = "stages: [{at: 2, method: random}]"
    path.write_text(f"description: 红色 é\nkeep: 0.3\n{stages}\n", encoding="utf-8")
    result = in_process("-m", "vtprune", "presets", "show", str(path), PYTHONIOENCODING="latin-1")
    assert (result.returncode, result.stderr.split()[:2]) == (0, ["question", "blind:"])
    assert "description: ?? " in result.stdout


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5", 1.5), ("1:30", 90), ("90:00", 5400), ("1:02:03.5", 3723.5), ("0:05", 5)],
)
def test_times_are_seconds_or_minutes_or_hours(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds
    assert Sampling(start=text, end="2:00:00").start == seconds
    assert replace(Sampling(end=text), frames=2) == Sampling(2, end=seconds)


@pytest.mark.parametrize(
    "text", ["", "1:60", "1:60:00", "1:", ":30", "-5", "1:2:3:4", "nan", "\u0661"]
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(MediaError, match="is no time: seconds, mm:ss or h:mm:ss"):
        Sampling(start=text)
    result = invoke("ask", "a.png", "what?", "--start", text)
    assert result.exit_code == 2
    assert "is no time: seconds, mm:ss or h:mm:ss" in " ".join(result.stderr.split())
