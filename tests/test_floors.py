"""The lowest versions that pyproject.toml declares are those that CI installs and tests."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import save_clip, save_noise
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

from vtprune.media import Limits, open_source

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = {
    one.name: one
    for one in map(Requirement, PROJECT["dependencies"])
    if one.marker is None or one.marker.evaluate()
}


def floors() -> dict[str, str]:
    if not (ROOT / ".ci" / "floors.py").is_file():
        pytest.skip("the continuous integration is not in this copy")
    done = subprocess.run(
        [sys.executable, ".ci/floors.py"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return dict(line.split("==") for line in done.stdout.splitlines())  # type: ignore[misc]


def test_every_dependency_is_installed_once_at_its_lowest_version() -> None:
    found = floors()
    assert {"pytest", "pytest-timeout", "pytest-xdist", *DECLARED} <= found.keys()
    for name, requirement in DECLARED.items():
        if name == "torch":  # the pinned one: older ones bring CUDA
            assert requirement.specifier.contains(found[name])
            continue
        (lowest,) = (one.version for one in requirement.specifier if one.operator == ">=")
        assert found[name] == lowest


@pytest.mark.parametrize("name", DECLARED)
def test_what_is_installed_is_in_the_declared_range(name: str) -> None:
    assert DECLARED[name].specifier.contains(Version(version(name)), prereleases=True)


def test_continuous_integration_runs_test_files_that_exist() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    names = re.findall(r"tests/\w+\.py", script)
    assert names
    assert [name for name in names if not (ROOT / name).is_file()] == []


def test_media_are_read_by_a_pillow_that_has_no_avif(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 11.0 and 11.1 do not."""
    Image.init()
    monkeypatch.setattr(Image, "OPEN", {n: one for n, one in Image.OPEN.items() if n != "AVIF"})
    monkeypatch.setattr(Image, "init", lambda: 1)
    assert open_source(save_noise(tmp_path / "a.png", 8, 9), Limits()).kind == "image"
    assert open_source(save_clip(tmp_path / "clip", 3), Limits()).num_frames == 3
    (tmp_path / "a.gif").write_bytes(_gif(tmp_path))
    assert open_source(tmp_path / "a.gif", Limits()).num_frames == 2


def _gif(folder: Path) -> bytes:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "made.gif", save_all=True, append_images=frames[1:], duration=100)
    return (folder / "made.gif").read_bytes()
