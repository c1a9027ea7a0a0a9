"""Files are written whole, or refused before anything expensive is done; streams and signals."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from vtprune import demo
from vtprune.cli import cli
from vtprune.errors import VtpruneError
from vtprune.inference.questions_file import LONGEST_QUESTION
from vtprune.saving import check_target, save_file

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files and signals")


def loop(folder: Path) -> Path:
    os.symlink(folder / "b", folder / "a")
    os.symlink(folder / "a", folder / "b")
    return folder / "a"


def read_only(folder: Path) -> Path:
    path = folder / "read-only.json"
    path.write_text("kept")
    path.chmod(0o444)
    return path


@POSIX
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (loop, os.strerror(errno.ELOOP)),
        (read_only, "the file is read-only"),
        (lambda folder: folder / ("x" * 300), os.strerror(errno.ENAMETOOLONG)),
        (lambda folder: folder / ("x" * 300) / "a.json", os.strerror(errno.ENAMETOOLONG)),
        (lambda folder: folder, "it is a directory"),
        (lambda folder: folder / "none" / "a.json", "no folder "),
        (lambda folder: Path("/dev/null"), "not a regular file"),
        (lambda folder: folder / "a\0b", "embedded null byte"),
    ],
)  # fmt: skip
def test_a_place_that_can_not_be_written_is_refused(tmp_path: Path, place, reason: str) -> None:  # type: ignore[no-untyped-def]
    path = place(tmp_path)
    before = sorted(os.listdir(tmp_path))
    for attempt in (check_target, lambda path: save_file(path, b"new")):
        with pytest.raises(VtpruneError, match=f"can't save there: .*{reason}"):
            attempt(path)
    assert sorted(os.listdir(tmp_path)) == before
    if place is read_only:
        assert path.read_text() == "kept"


def test_a_name_as_long_as_names_can_be_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250 + ".json")
    save_file(path, b"one")
    save_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == [path.name]


@POSIX
def test_permissions_of_a_file_stay_and_new_ones_follow_the_umask(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_text("")
    old.chmod(0o640)
    before = os.umask(0o027)
    try:
        save_file(new, b"")
        save_file(old, b"")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (new, old)] == [0o640, 0o640]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    save_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


# -- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    demo.write(folder, 4, 0)
    return folder


CLIP = Path(__file__).parent / "media" / "rot_hflip.mp4"


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "vtprune", *map(str, args)]


@pytest.mark.parametrize(
    "args",
    [
        ("ask", str(CLIP), "why " * 100_000),
        ("ask", str(CLIP), "what?", "--system", "be brief " * 100_000),
        ("compare", str(CLIP), "a " * 100_000),
    ],
)
def test_a_question_of_100_000_words_is_refused_at_once(args: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, list(args))
    assert result.exit_code == 1
    assert f"characters, more than {LONGEST_QUESTION:,}" in result.stderr
    assert len(result.stderr) < 300


def test_a_question_longer_than_a_file_name_is_a_question() -> None:
    result = CliRunner().invoke(cli, ["ask", "no.png", "why " * 2_000])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no.png: no such file")


@POSIX
def test_a_loop_of_links_as_media_is_a_clear_error(tmp_path: Path) -> None:
    for path in (loop(tmp_path), tmp_path / ("x" * 300 + ".png")):
        result = CliRunner().invoke(cli, ["ask", str(path), "what?"])
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert "internal" not in result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device")
def test_a_full_standard_output_is_a_clear_error() -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run(command("methods"), stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 1
    assert "Error: can't write: No space left on device" in found.stderr
    assert "Traceback" not in found.stderr
    assert "internal" not in found.stderr


@POSIX
@pytest.mark.parametrize(
    ("closed", "args", "code", "stderr"),
    [
        ("<&-", ("presets", "list"), 0, ""),
        ("<&-", ("ask", str(CLIP), "-"), 1, "Error: the question from standard input is empty"),
        (">&-", ("presets", "list"), 1, "Error: standard output is closed"),
        ("2>&-", ("presets", "list"), 0, ""),
        ("2>&-", ("presets", "check", "none.yaml"), 1, ""),
        (">&- 2>&- <&-", ("methods",), 1, ""),
    ],
)
def test_closed_streams_are_clear_errors(
    closed: str, args: tuple[str, ...], code: int, stderr: str
) -> None:
    shell = f'"$0" "$@" {closed}'
    found = subprocess.run(["sh", "-c", shell, *command(*args)], capture_output=True, text=True)
    assert found.returncode == code
    assert found.stderr.startswith(stderr)
    assert "internal" not in found.stderr


@POSIX
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_says_what_is_kept(
    samples: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    answers = tmp_path / "answers.jsonl"
    args = command("evaluate", samples / "questions.jsonl", "--methods", "random", "--keep", "0.3",
                   "--answers", answers)  # fmt: skip
    with subprocess.Popen(args, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and run.poll() is None:
            if answers.exists() and answers.read_bytes().count(b"\n") > 1:
                break
            time.sleep(0.02)
        run.send_signal(number)
        _, stderr = run.communicate(timeout=120)
    assert run.returncode == code
    kept = len(answers.read_text().splitlines()) - 1
    assert f"{kept} answers kept in {answers}; the same command goes on" in stderr


@POSIX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_demo_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "samples"
    with subprocess.Popen(command("demo", folder, "--num", 2000), stderr=subprocess.PIPE) as run:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not folder.exists():
            time.sleep(0.02)
        time.sleep(0.3)
        assert run.poll() is None
        run.send_signal(number)
        run.communicate(timeout=120)
    assert os.listdir(folder) == []
