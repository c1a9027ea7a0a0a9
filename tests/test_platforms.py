"""Other locales, homes, terminals and streams: the command line answers, or refuses in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import assert_refused, save_noise

import vtprune
from vtprune.cli import cli
from vtprune.cli.config import load_config
from vtprune.cli.options import Flags
from vtprune.cli.output import print_line
from vtprune.errors import ModelError
from vtprune.models.names import embedded_weights

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX locales and names")
ROOT = Path(__file__).parents[1]
NAME, QUESTION = "é円.png", "où? 円"
COMMANDS: dict[tuple[str, ...], int] = {
    ("--help",): 0,
    ("ask", "--help"): 0,
    ("presets", "list"): 0,
    ("presets", "list", "--json"): 0,
    ("presets", "list", "--save", "é.md"): 0,
    ("presets", "show", "balanced"): 0,
    ("presets", "check", "é.yaml"): 1,
    ("presets", "check", "none-é.yaml"): 1,
    ("models",): 0,
    ("methods", "entropy"): 0,
    ("methods", "é"): 1,
    ("é",): 2,
    ("ask", f"none-{NAME}", QUESTION): 1,
    ("ask", os.fsdecode(b"\xff\xfe.png"), QUESTION): 1,
    ("ask", NAME, " "): 1,
    ("batch", "é.jsonl", "--save", "none-é/a.jsonl"): 1,
    ("evaluate", "é.jsonl", "--save", "é.md", "--keep", "7"): 1,
}
"""Arguments -> the exit code; none of them needs a model."""
ENVIRONMENTS: dict[str, Mapping[str, str]] = {
    "locale C": {"LC_ALL": "C", "PYTHONUTF8": "0", "HOME": "/"},
    "POSIX, no home": {"LC_ALL": "POSIX", "PYTHONUTF8": "0"},
    "no such home": {"LC_ALL": "C.UTF-8", "HOME": "/nonexistent", "COLUMNS": "0", "LINES": "0"},
    "dumb terminal": {"LANG": "C.UTF-8", "HOME": "relative", "TERM": "dumb", "COLUMNS": "20"},
    "no size": {"PYTHONIOENCODING": "latin-1", "TERM": "", "COLUMNS": "²", "LINES": "²"},
}
SEVERAL = """
import json, os, sys
from vtprune.cli import main
codes = []
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = map(os.fsdecode, map(bytes.fromhex, arguments))
    try:
        main()
    except SystemExit as ended:
        codes.append(ended.code)
    sys.stderr.write("end of a command\\n")
sys.stderr.write(json.dumps(codes))
"""
"""Runs several commands, each as the program runs its one, in one process."""
NAMED_IN_LISTS = """
import json, sys
from vtprune.inference.questions_file import read_questions
from vtprune.preset import load_preset
from vtprune.serving.requests import is_missing, read_requests
questions = read_questions(sys.argv[1])
requests = read_requests(sys.argv[1], load_preset(None))
assert all(question.file.is_file() for question in questions)
assert not any(map(is_missing, (request.files[0] for request in requests)))
print([request.preset.keep for request in requests], [request.fault for request in requests])
"""


def run(
    command: Sequence[str], environment: Mapping[str, str], folder: Path
) -> subprocess.CompletedProcess[bytes]:
    """Run a command in an environment that has nothing but what Python needs."""
    needed = {"PATH": os.defpath, "PYTHONPATH": str(ROOT)}
    if "LD_LIBRARY_PATH" in os.environ:  # of a Python whose library lies elsewhere
        needed["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return subprocess.run(
        command, env={**needed, **environment}, cwd=folder, capture_output=True, timeout=120
    )


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_command_answers_or_refuses_in_words(environment: str, tmp_path: Path) -> None:
    (tmp_path / "é.yaml").write_text("description: é\nkeep: 7\n", "utf-8")
    (tmp_path / "é.jsonl").write_text(json.dumps({"file": NAME, "question": QUESTION}), "utf-8")
    save_noise(tmp_path / NAME, 8, 8)
    given = [[os.fsencode(part).hex() for part in arguments] for arguments in COMMANDS]
    before = sorted(os.listdir(tmp_path))
    ended = run(
        [sys.executable, "-c", SEVERAL, json.dumps(given)], ENVIRONMENTS[environment], tmp_path
    )
    *parts, codes = ended.stderr.decode("utf-8", "replace").split("end of a command\n")
    assert dict(zip(COMMANDS, json.loads(codes), strict=True)) == COMMANDS
    for (arguments, code), said in zip(COMMANDS.items(), parts, strict=True):
        assert "Traceback" not in said, arguments
        assert "internal" not in said, arguments
        if code == 1:
            assert said.startswith("Error: "), arguments
            assert said.count("\n") <= 2 or arguments[0] == "presets", arguments
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "é.md"])
    table = (tmp_path / "é.md").read_text("utf-8")
    assert "| balanced" in table
    assert all(name.encode() in ended.stdout for name in ("balanced", "entropy", "Examples:"))


def test_a_line_of_json_is_whole_in_a_locale_without_its_characters(tmp_path: Path) -> None:
    """The answer itself, with everything against it at once."""
    names = {NAME, os.fsdecode(b"\xff\xfe.png")}
    for name in names:
        save_noise(tmp_path / name, 32, 32)
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "TERM": "dumb", "COLUMNS": "20"}
    command = [sys.executable, "-m", "vtprune", "batch", *names, "-q", QUESTION,
               "--max-new-tokens", "1"]  # fmt: skip
    ended = run(command, environment, tmp_path)
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in ended.stdout.decode("ascii").splitlines()]
    files = {os.fsencode(line["files"][0]) for line in lines}
    assert files == set(map(os.fsencode, names)) == set(map(os.fsencode, os.listdir(tmp_path)))
    assert [(line["question"], line["error"]) for line in lines] == [(QUESTION, None)] * 2


def test_a_list_names_files_in_a_locale_without_their_characters(tmp_path: Path) -> None:
    save_noise(tmp_path / NAME, 8, 8)
    (tmp_path / "é.yaml").write_text("keep: 0.25\nstages: [{at: input, method: uniform}]\n")
    preset = str(tmp_path / "é.yaml")
    named = [NAME, str(tmp_path / NAME), (tmp_path / NAME).as_uri()]
    lines = [{"file": name, "question": QUESTION, "preset": preset} for name in named]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "é.jsonl").write_text(text, "utf-8")
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = run(
        [sys.executable, "-c", NAMED_IN_LISTS, str(tmp_path / "é.jsonl")], environment, tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.decode() == f"{[0.25] * 3} {[''] * 3}\n"


def test_a_config_file_and_a_table_name_a_model_in_a_locale_without_its_characters(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "é円"
    folder.mkdir()
    (tmp_path / "vtprune").mkdir()
    (tmp_path / "vtprune" / "config.yaml").write_text(f"model: {folder}\n", "utf-8")
    rows = [{"row": "e", "preset": {"stages": [{"at": 2, "method": "vtw"}]}}]
    texts = dict.fromkeys(("title", "paper", "source", "benchmark"), "a")
    table = {**texts, "model": str(folder), "rows": rows}
    (tmp_path / "t.yaml").write_text(json.dumps(table, ensure_ascii=False), "utf-8")
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                   "XDG_CONFIG_HOME": str(tmp_path)}  # fmt: skip
    save_noise(tmp_path / "a.png", 8, 8)
    for arguments in (["ask", "a.png", "what?"], ["reproduce", "t.yaml"]):
        ended = run([sys.executable, "-m", "vtprune", *arguments], environment, tmp_path)
        said = ended.stderr.decode()
        assert ended.returncode == 1, said
        assert "no config.json in this directory" in said, arguments  # so it was found


def test_a_model_whose_folder_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.symlink_to(embedded_weights())
    with pytest.raises(ModelError, match="the name of its folder is not text in this locale"):
        vtprune.load(str(folder))


def test_a_directory_that_was_removed_is_refused_before_torch_aborts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "removed"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert_refused(CliRunner().invoke(cli, ["models"]), "Error: the current directory was removed")
    assert CliRunner().invoke(cli, ["--help"]).exit_code == 0


def test_a_user_whom_the_system_does_not_know_has_no_config_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a container that runs under a number of its own."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CONFIG_HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert load_config() == Flags()
    result = CliRunner().invoke(cli, ["ask", "none.png", "what?"])
    assert_refused(result, r"Error: none\.png: no such file")


def test_a_home_that_stays_a_tilde_is_no_folder_of_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older platformdirs returns it for such a user."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "~/.config/vtprune"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("keep: 7\n")
    monkeypatch.setattr(
        "platformdirs.user_config_dir", lambda *args, **options: "~/.config/vtprune"
    )
    assert load_config() == Flags()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_stream_does_not_hold_is_an_escape(encoding: str, tmp_path: Path) -> None:
    text = json.dumps({"a": "é 円 \U0001f600"}, ensure_ascii=False)
    with (tmp_path / "a").open("w", encoding=encoding, errors="replace") as file:
        print_line(text, file)
    written = (tmp_path / "a").read_text(encoding)
    assert json.loads(written) == json.loads(text)
    assert ("円" in written) == (encoding == "utf-8")
