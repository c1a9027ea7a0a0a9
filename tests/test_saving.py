"""Files are written whole, or refused before anything expensive is done; streams and kills."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import assert_refused, small_disk

import vtprune
from vtprune import demo
from vtprune._dev.kills import lines_of
from vtprune.cli import cli
from vtprune.disk_cache import DiskCache
from vtprune.errors import MediaError, VtpruneError
from vtprune.inference.questions_file import LONGEST_QUESTION
from vtprune.saving import check_target, open_unbuffered, save_file

CLIP = Path(__file__).parent / "media" / "rot_hflip.mp4"
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
        (lambda folder: folder / "a\0b", "not a file's name"),
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


def test_a_link_within_its_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    save_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


@POSIX
@pytest.mark.parametrize(
    "write", [check_target, lambda path: save_file(path, b"new"), open_unbuffered]
)
@pytest.mark.parametrize("there", [True, False])
def test_a_link_into_another_folder_is_refused(tmp_path: Path, there: bool, write) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "other").mkdir()
    (tmp_path / "mine").mkdir()
    target, link = tmp_path / "other" / "a.json", tmp_path / "mine" / "a.json"
    if there:
        target.write_text("kept")
    link.symlink_to("../other/a.json")
    with pytest.raises(VtpruneError, match=f"it is a link to {re.escape(str(target))}"):
        write(link)
    assert os.listdir(target.parent) == ["a.json"] * there
    assert not there or target.read_text() == "kept"
    assert link.is_symlink()


@POSIX
def test_a_loop_of_links_takes_no_lines(tmp_path: Path) -> None:
    with pytest.raises(VtpruneError, match=f"can't be written: {os.strerror(errno.ELOOP)}"):
        open_unbuffered(loop(tmp_path))


@POSIX
def test_a_folder_that_is_a_link_is_saved_in(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    save_file(tmp_path / "link" / "a", b"new")
    open_unbuffered(tmp_path / "link" / "a").close()
    assert (tmp_path / "folder" / "a").read_bytes() == b"new"


@POSIX
@pytest.mark.parametrize("args", [("methods", "--save", "a.md"), ("demo", ".", "--num", "1"),
                                  ("batch", CLIP, "-q", "what?", "--save", "a.jsonl")])  # fmt: skip
def test_no_command_writes_through_a_link_into_another_folder(
    tmp_path: Path, args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, folder = tmp_path / "a", tmp_path / "folder"
    target.write_text("kept")
    folder.mkdir()
    for name in ("a.md", "a.jsonl", "questions.jsonl"):
        (folder / name).symlink_to(target)
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(cli, list(map(str, args)))
    assert_refused(result, r"Error: \S+: can't save there: it is a link to ")
    assert target.read_text() == "kept"


# -- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    demo.write(folder, 9, 0)
    return folder


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


# -- a folder that can't be written, and a disk that gets full -----------------------------------


@pytest.fixture
def read_only_folder(tmp_path: Path) -> Path:
    """A folder in which nobody can make a file, root included."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    for path in (folder, Path("/sys")):
        try:
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError:
            return path
    pytest.skip("every folder can be written here")


PICTURE, LIST = "picture-001.png", "questions.jsonl"
READ_ONLY: tuple[tuple[str, ...], ...] = (
    ("ask", PICTURE, "what?", "--save", "{}/a.json"),
    ("ask", PICTURE, "what?", "--show", "{}/a.png"),
    ("ask", PICTURE, "what?", "--cache", "{}/cache"),
    ("show", PICTURE, "what?", "--save", "{}/a.html"),
    ("explain", PICTURE, "what?", "--save", "{}/a.png"),
    ("compare", PICTURE, "what?", "--save", "{}/a.csv"),
    ("evaluate", LIST, "--save", "{}/a.svg"),
    ("evaluate", LIST, "--answers", "{}/a.jsonl"),
    ("tune", LIST, "--save", "{}/a.yaml"),
    ("tune", LIST, "--save", "a.yaml", "--answers", "{}/a.jsonl"),
    ("calibrate", LIST, "--save", "{}/a.yaml"),
    ("calibrate", LIST, "--save", "a.yaml", "--propose", "0.3", "--propose-preset", "{}/p.yaml"),
    ("batch", PICTURE, "-q", "what?", "--save", "{}/a.jsonl"),
    ("batch", PICTURE, "-q", "what?", "--cache", "{}/cache"),
    ("serve", "--cache", "{}/cache", "--port", "0"),
    ("profile", PICTURE, "--save", "{}/a.json"),
    ("check", PICTURE, "--save", "{}/a.json"),
    ("reproduce", "entropyprune-llava-1.5", "--save", "{}/a.md"),
    ("presets", "list", "--save", "{}/a.md"),
    ("models", "--save", "{}/a.md"),
    ("methods", "--save", "{}/a.tex"),
    ("demo", "{}/samples"),
)


@POSIX
@pytest.mark.parametrize("args", READ_ONLY, ids=lambda args: f"{args[0]} {args[-2]}")
def test_a_read_only_folder_is_refused_before_the_work(
    samples: Path, read_only_folder: Path, args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(samples)
    before = sorted(os.listdir(samples))
    given = [part.replace("{}", str(read_only_folder)) for part in args]
    assert_refused(CliRunner().invoke(cli, given), r"Error: .*(denied|permitted|(?i:read-only))")
    assert sorted(os.listdir(samples)) == before


def within(size: int, folder: Path, *args: object) -> Result:
    """Run a command in a folder, on a disk that is full where a file has so many bytes."""
    with pytest.MonkeyPatch.context() as patch, small_disk(size):
        patch.chdir(folder)
        return CliRunner().invoke(cli, list(map(str, args)))


SAVING = {
    "ask": ("ask", PICTURE, "what?", "--save", "kept.json"),
    "show": ("show", PICTURE, "what?", "--save", "kept.html"),
    "show --save .png": ("show", PICTURE, "what?", "--save", "kept.png"),
    "explain": ("explain", PICTURE, "what?", "--passes", "8", "--save", "kept.json"),
    "evaluate": ("evaluate", LIST, "--methods", "uniform", "--keep", "0.3", "--limit", "1",
                 "--seeds", "1", "--save", "kept.csv"),
    "tune": ("tune", LIST, "--methods", "uniform", "--keep", "0.5", "--floor", "0.1",
             "--save", "kept.yaml"),
    "calibrate": ("calibrate", LIST, "--max-new-tokens", "1", "--save", "kept.yaml"),
    "methods": ("methods", "--save", "kept.tex"),
}  # fmt: skip


@POSIX
@pytest.mark.parametrize("command", SAVING)
def test_a_disk_that_gets_full_leaves_the_old_file_and_shows_the_result(
    samples: Path, tmp_path: Path, command: str
) -> None:
    name = SAVING[command][-1]
    (tmp_path / name).write_text("old")
    args = [str(samples / part) if part in (PICTURE, LIST) else part for part in SAVING[command]]
    ended = within(64, tmp_path, *args)
    assert ended.exit_code == 1
    words = f"Error: {name}: can't save there: File too large\nhint: free some space"
    assert words in ended.stderr
    assert ended.stdout or command == "methods"
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "old"


LINES = {
    "batch": (
        1700,
        ("key",),
        ("batch", PICTURE, "clip-000.mp4", "-q", "what?", "-q", "where?", "--batch-size", "1",
         "--max-new-tokens", "1", "--save", "kept.jsonl"),
    ),
    "evaluate": (
        3300,
        ("question", "cell"),
        ("evaluate", LIST, "--methods", "uniform", "--keep", "0.3", "--limit", "2", "--seeds", "1",
         "--answers", "kept.jsonl", "--quiet"),
    ),
}  # fmt: skip
"""Command -> bytes that not all of its lines fit in, what tells its lines apart, and arguments."""


@POSIX
@pytest.mark.parametrize("command", LINES)
def test_a_disk_that_gets_full_leaves_whole_lines_and_the_next_run_goes_on(
    samples: Path, tmp_path: Path, command: str
) -> None:
    size, keys, arguments = LINES[command]
    args = [str(samples / part) if (samples / part).exists() else part for part in arguments]
    path = tmp_path / "kept.jsonl"
    ended = within(size, tmp_path, *args)
    assert ended.exit_code == 1
    said = re.search(r"File too large \((\d+) answers? kept in kept.jsonl\)\nhint: ", ended.stderr)
    assert said, ended.stderr
    kept = path.read_text()
    assert kept.endswith("\n")
    assert len(lines_of("kept.jsonl", keys)(tmp_path)) == int(said[1]) > 0
    assert os.listdir(tmp_path) == ["kept.jsonl"]
    assert within(1 << 30, tmp_path, *args).exit_code == 0
    assert path.read_text().startswith(kept)
    assert len(lines_of("kept.jsonl", keys)(tmp_path)) > int(said[1])


@POSIX
def test_a_cache_on_a_full_disk_and_in_a_read_only_folder_adds_nothing(
    tmp_path: Path, read_only_folder: Path
) -> None:
    tensors = {"a": torch.zeros(1000)}
    cache = DiskCache(tmp_path / "cache")
    with small_disk(1000):
        cache.store("a", tensors, [])
    assert cache.describe() == "cache: 0 found, 0 added; not written: file too large"
    assert os.listdir(tmp_path / "cache") == []
    cache.store("a", tensors, [])
    assert cache.load("a") is not None
    cache = DiskCache(read_only_folder)
    cache.store("a", tensors, [])
    assert (cache.load("a"), cache.added, cache.failed) == (None, 0, 1)


@POSIX
def test_media_in_memory_on_a_full_disk_are_an_error_of_their_item(
    samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (samples / PICTURE).read_bytes()
    with small_disk(100), pytest.raises(MediaError, match="bytes: can't be kept on disk: File too"):
        vtprune.media.open_source(data)
    monkeypatch.setattr(tempfile, "tempdir", "/none")
    with pytest.raises(MediaError, match="bytes: can't be kept on disk: No such file"):
        vtprune.media.open_source(data)
