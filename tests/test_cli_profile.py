"""`vtprune profile` as a product: what is printed and written where, and how it exits."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import assert_refused
from PIL import Image
from test_profile import example

from vtprune.cli import cli
from vtprune.evaluation.profiling import profile as module
from vtprune.evaluation.profiling.prompts import ProfiledMedia
from vtprune.evaluation.profiling.result import Profile
from vtprune.models import EMBEDDED
from vtprune.models.base import Sampling


@dataclass
class FakeProfile:
    """Stands in for profiling: notes what it was given."""

    asked: dict[str, Any] = field(default_factory=dict)

    def profile(self, name: str | None, shown: ProfiledMedia | None, **options: Any) -> Profile:
        self.asked = {"name": name, "shown": shown, **options}
        return example()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeProfile:
    found = FakeProfile()
    monkeypatch.setattr(module, "profile", found.profile)
    monkeypatch.setenv("COLUMNS", "80")
    return found


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["profile", *arguments])


def test_tables_go_to_stdout_and_warnings_to_stderr(fake: FakeProfile) -> None:
    result = invoke("--model", "llava-next")
    assert result.exit_code == 0
    assert "keep 0.3 2:958 24:146" in result.stdout
    assert "verdict" in result.stdout
    assert "a note" not in result.stdout
    assert result.stderr.split() == ["warning", "a", "note"]
    assert fake.asked["name"] == "llava-next"
    assert fake.asked["shown"] is None


def test_quiet_leaves_the_warnings_out(fake: FakeProfile) -> None:
    assert invoke("--quiet").stderr == ""


def test_json_is_one_object_with_the_fixed_names(fake: FakeProfile) -> None:
    result = invoke("--json")
    found = json.loads(result.stdout)
    assert {"model", "machine", "rows", "verdict"} <= set(found)
    assert {"keep", "preset", "tokens", "flops", "kv_cache_bytes", "seconds", "compare"} <= set(
        found["rows"][0]
    )
    assert result.stderr == ""


def test_options_reach_the_profile(fake: FakeProfile) -> None:
    arguments = "--model llava-next --device cpu --dtype bfloat16 --attention eager --keep 0.5,0.2 "
    arguments += "--methods entropy --at 3 -o norm=row --presets fast,balanced --seconds 9 "
    arguments += "--repeats 2 --text-tokens 99 --answer-tokens 7 --frames 4 --max-tiles 3"
    assert invoke(*arguments.split(), "--image", "640x480").exit_code == 0
    asked, options = fake.asked, fake.asked["options"]
    assert asked["shown"] == ProfiledMedia("image", 640, 480)
    assert (asked["keeps"], asked["presets"]) == ([0.5, 0.2], ("fast", "balanced"))
    assert (asked["methods"], asked["at"], asked["method_options"]) == (
        ("entropy",), "3", {"norm": "row"},
    )  # fmt: skip
    assert (options.device, options.dtype, options.attention) == ("cpu", "bfloat16", "eager")
    assert (options.seconds, options.repeats, options.timed) == (9, 2, True)
    assert (options.text_tokens, options.answer_tokens) == (99, 7)
    assert options.sampling == Sampling(frames=4, max_tiles=3)


def test_no_measure_times_nothing(fake: FakeProfile) -> None:
    invoke("--no-measure")
    assert fake.asked["options"].timed is False


def test_the_embedded_model_is_the_default(fake: FakeProfile) -> None:
    invoke()
    assert fake.asked["name"] is None
    invoke("--model", "embedded")
    assert fake.asked["name"] == EMBEDDED


@pytest.mark.parametrize("arguments", [["{}"], ["--image", "{}"]])
def test_a_media_file_is_an_input_too(
    arguments: list[str], fake: FakeProfile, tmp_path: Path
) -> None:
    path = tmp_path / "page.png"
    Image.new("RGB", (30, 20)).save(path)
    assert invoke(*(one.format(path) for one in arguments)).exit_code == 0
    assert fake.asked["shown"] == ProfiledMedia("image", 30, 20, 1, (str(path),))


def test_damaged_and_large_media_are_read_where_that_is_asked_for(
    fake: FakeProfile, tmp_path: Path
) -> None:
    path = tmp_path / "page.png"
    Image.new("RGB", (30, 20)).save(path)
    assert invoke(str(path), "--allow-partial", "--max-pixels", "600").exit_code == 0
    limits = fake.asked["options"].limits
    assert (limits.allow_partial, limits.max_pixels) == (True, 600)
    too_large = invoke(str(path), "--max-pixels", "599")
    assert "max_pixels" in too_large.stderr
    assert too_large.exit_code == 1


def test_a_video_is_given_by_its_size(fake: FakeProfile) -> None:
    invoke("--video", "8x64x48")
    assert fake.asked["shown"] == ProfiledMedia("video", 64, 48, 8)


def test_the_plot_is_written(fake: FakeProfile, tmp_path: Path) -> None:
    path = tmp_path / "speed.png"
    assert invoke("--save", str(path)).exit_code == 0
    assert Image.open(path).format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--seconds", "0"], "--seconds 0.0 is out of range", "above 0"),
        (["--seconds", "inf"], "--seconds inf is out of range", "above 0"),
        (["--repeats", "0"], "--repeats 0 is out of range", "1 or more"),
        (["--text-tokens", "0"], "--text-tokens 0 is out of range", "1 or more"),
        (["--answer-tokens", "-1"], "--answer-tokens -1 is out of range", "1 or more"),
        (["--frames", "0"], "--frames 0 is out of range", "1 or more"),
        (["--keep", "0.3,2"], "keep 2 is not a fraction", "drop rate"),
        (["--keep", ""], "keep is not a fraction", "drop rate"),
        (["-o", "norm"], "-o norm is not KEY=VALUE", "norm=none"),
        (["--image", "2x2", "--video", "2x2x2"], "more than one input", "one of MEDIA"),
        (["--image", "0x2"], "image 0x2 is out of range", "1344x1344"),
        (["--image", "10"], "--image 10 is no size, and there is no such file", "1344x1344"),
        (["--video", "4x4"], "--video 4x4 is no size, and there is no such file", "64x448x448"),
        (["--image", "none.png"], "none.png", "check the path"),
        (["--save", "no/such/folder/a.png"], "can't save there", "give --save"),
        (["--save", "a.gif"], "--save a.gif: its suffix names no format", "name it a.json"),
    ],
)
def test_what_can_not_be_is_one_error_line(
    arguments: list[str], message: str, hint: str, fake: FakeProfile
) -> None:
    result = invoke(*arguments)
    assert_refused(result, rf"Error: .*{re.escape(message)}.*\n.*{re.escape(hint)}")
    assert not fake.asked


def test_a_model_that_is_not_there_is_one_error_line() -> None:
    result = invoke("--model", "no-such-model", "--no-measure")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no model 'no-such-model'")


def test_the_embedded_model_is_counted_from_the_command_line() -> None:
    result = invoke("--no-measure", "--keep", "0.5", "--presets", "fast", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["model"]["name"] == "embedded"
    assert [row["preset"] or row["keep"] for row in found["rows"]] == [1.0, 0.5, "fast"]
