"""Files that are none, never end, change meanwhile, or have names that could steer a terminal."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import assert_refused, save_clip, save_noise

import vtprune
from vtprune._dev.fuzz.media import make_samples
from vtprune.cli import cli
from vtprune.cli.console import printable
from vtprune.errors import MediaError, ModelError, PresetError, VtpruneError
from vtprune.inference.questions_file import read_questions
from vtprune.media import open_source, read
from vtprune.preset.calibration import read_calibration
from vtprune.saving import json_line
from vtprune.small_files import read_small

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes, devices, sparse files")
HUGE = 10 << 30
STEERING = "a\x1b[31m\x9b2J\u202egnp\u2066.png"
"""A name with what colours, clears and reorders a terminal's text."""


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "it")
    return folder / "it"


def socket_of(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "it"))
    return folder / "it"


def loop(folder: Path) -> Path:
    (folder / "it").symlink_to(folder / "it")
    return folder / "it"


def sparse(folder: Path) -> Path:
    with (folder / "it").open("wb") as file:
        file.truncate(HUGE)
    return folder / "it"


SPECIAL = (pipe, socket_of, loop, sparse, lambda folder: Path("/dev/zero"))


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


@pytest.mark.parametrize("make", SPECIAL)
def test_every_reader_refuses_what_is_no_file_of_its_kind(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    path = make(tmp_path)
    with within(10):
        with pytest.raises(MediaError):
            open_source(path)
        with pytest.raises(PresetError):
            vtprune.load_preset(path)
        with pytest.raises(PresetError, match=r"can't be read|larger than 65536"):
            read_calibration(path)
        with pytest.raises(ModelError):
            vtprune.load(str(path))
        if make is not socket_of and path.name == "it":  # a list is known by its suffix
            listed = path.rename(path.with_suffix(".jsonl")) if make is not loop else path
            with pytest.raises(VtpruneError, match=r"can't be read|larger than"):
                read_questions(listed)


@pytest.mark.parametrize("make", [pipe, sparse])
@pytest.mark.parametrize("command", [["evaluate"], ["batch"], ["calibrate", "--save", "c.yaml"]])
def test_a_list_without_an_end_is_refused_at_once(
    tmp_path: Path, make, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    make(tmp_path).rename(tmp_path / "list.jsonl")
    with within(15):
        result = CliRunner().invoke(cli, [command[0], "list.jsonl", *command[1:]])
    assert_refused(result, r"Error: list\.jsonl: (can't be read: a device, pipe|larger than)")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_file_of_a_checkpoint_that_is_far_too_large_is_not_read(
    tmp_path: Path, checkpoints, name: str
) -> None:  # type: ignore[no-untyped-def]
    directory = shutil.copytree(checkpoints("llava"), tmp_path / "model")
    os.truncate(directory / name, HUGE)
    with within(10), pytest.raises(ModelError, match=rf"{name} has 10,737,418,240 bytes"):
        vtprune.load(str(directory))


@pytest.mark.parametrize("make", [pipe, socket_of, Path.mkdir])
@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_what_is_no_file_of_a_checkpoint_is_named(
    tmp_path: Path, checkpoints, name: str, make
) -> None:  # type: ignore[no-untyped-def]
    directory = shutil.copytree(checkpoints("llava"), tmp_path / "model")
    (directory / name).unlink(missing_ok=True)
    if make is Path.mkdir:
        (directory / name).mkdir()
    else:
        make(tmp_path).rename(directory / name)
    with within(10), pytest.raises(ModelError, match=rf"{name} is no regular file"):
        vtprune.load(str(directory))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "webp", "avif", "tif"])
def test_a_picture_with_gigabytes_behind_it_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(make_samples_once()[f"a.{suffix}"])
    expected = read(open_source(path)).pictures
    os.truncate(path, HUGE)
    with within(10):
        assert torch.equal(read(open_source(path)).pictures, expected)


_SAMPLES: dict[str, bytes] = {}


def make_samples_once() -> dict[str, bytes]:
    if not _SAMPLES:
        _SAMPLES.update(make_samples())
    return _SAMPLES


def test_a_folder_of_thousands_of_pictures_is_a_video(tmp_path: Path) -> None:
    save_noise(tmp_path / "0.png", 8, 8)
    for number in range(1, 10_000):
        os.link(tmp_path / "0.png", tmp_path / f"{number}.png")
    with within(60):
        source = open_source(tmp_path)
        assert source.num_frames == 10_000
        assert read(source, [0, 5000, 9999]).index == (0, 5000, 9999)


def test_links_that_lead_back_end_nothing(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip", 3)
    (clip / "up").symlink_to("..")
    (clip / "again.png").symlink_to("again.png")
    assert open_source(clip).num_frames == 3
    result = CliRunner().invoke(cli, ["batch", str(tmp_path), "-q", "?", "--max-new-tokens", "1"])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [Path(line["files"][0]).name for line in lines] == ["000.png", "001.png", "002.png"]


@pytest.mark.parametrize("change", ["cut", "replaced", "gone", "other kind"])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.moving.gif", "a.mp4", "a.pages.tif"])
def test_a_file_that_changes_after_it_was_opened_is_an_error_or_read(
    tmp_path: Path, name: str, change: str
) -> None:
    samples = make_samples_once()
    path = tmp_path / name
    path.write_bytes(samples[name])
    (source, *_) = vtprune.media.open_sources([path])
    if change == "cut":
        os.truncate(path, len(samples[name]) // 2)
    elif change == "gone":
        path.unlink()
    else:
        other = samples["a.bmp" if change == "replaced" else "a.mkv"]
        path.write_bytes(other if name != "a.mkv" else samples["a.png"])
    with suppress(MediaError):
        frames = read(source)
        assert len(frames.pictures) == len(frames.index)


# -- names -----------------------------------------------------------------------------------------


def ask(path: str, *flags: str) -> Result:
    return CliRunner().invoke(cli, ["ask", path, "what?", "--max-new-tokens", "1", *flags])


def steers(text: str) -> bool:
    return any(not c.isprintable() and c not in "\n\t" for c in text)


@pytest.fixture
def oddly_named(tmp_path: Path) -> Path:
    return save_noise(tmp_path / STEERING, 32, 32)


@pytest.mark.parametrize(
    "command",
    [
        ["ask", "{}", "what?", "--max-new-tokens", "1"],
        ["show", "{}", "what?", "--max-new-tokens", "1"],
        ["batch", "{}", "-q", "what?", "--max-new-tokens", "1"],
        ["ask", "{}-not-there", "what?"],
        ["ask", "a.png", "what?", "--preset", "{}"],
        ["ask", "a.png", "what?", "--calibration", "{}"],
        ["ask", "a.png", "what?", "--model", "{}"],
        ["ask", "a.png", "what?", "--save", "{}/x.json"],
        ["evaluate", "{}"],
        ["presets", "check", "{}"],
        ["methods", "{}"],
        ["profile", "{}", "--methods", "{}"],
        ["ask", "a.png", "\x1b[31mwhat?\u202e", "-q", "{}", "--max-new-tokens", "1"],
    ],
)
def test_no_name_steers_the_terminal(
    oddly_named: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(oddly_named.parent)
    save_noise(Path("a.png"), 32, 32)
    result = CliRunner().invoke(cli, [part.replace("{}", STEERING) for part in command])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert not steers(result.stdout)
    assert not steers(result.stderr)


def test_a_preset_that_is_shown_steers_no_terminal(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        'description: "\\e[31m"  # \u202e\nstages:\n  - {at: 2, method: random, keep: 0.5}\n'
    )
    result = CliRunner().invoke(cli, ["presets", "show", str(path)])
    assert result.exit_code == 0
    assert not steers(result.stdout + result.stderr)


def test_what_is_no_utf8_in_a_name_is_an_escape_in_lines(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xfe.png")
    save_noise(tmp_path / "a.png", 32, 32).rename(tmp_path / name)
    lines = tmp_path / "answers.jsonl"
    command = ["batch", str(tmp_path / name), "-q", "what?", "--max-new-tokens", "1"]
    assert CliRunner().invoke(cli, [*command, "--save", str(lines)]).exit_code == 0
    (line,) = lines.read_text("utf-8").splitlines()
    assert json.loads(line)["files"] == [str(tmp_path / name)]


def test_a_line_of_json_holds_any_script_and_steers_nothing() -> None:
    text = "\x1b[2J\x9b\u202e\u2028\udcff 円 \u3000é"
    line = json_line({"text": text})
    assert not steers(line.replace("\u3000", " "))
    assert "円 \u3000é" in line
    assert json.loads(line)["text"] == text


def test_text_is_shown_in_any_script_without_what_reorders_it() -> None:
    assert printable("عر\u200d\u202eعر\u2066\u200f円\u3000\x9b31m\n") == "عر\u200dعر円\u300031m\n"


def test_a_small_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert (read_small(path, 5), read_small(path, 3)) == (b"12345", b"1234")
    with pytest.raises(OSError, match="a device, pipe or socket"):
        read_small(pipe(tmp_path), 5)
