"""Models without a family of their own: the checkpoint's own processor makes their inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_processor
from click.testing import CliRunner
from conftest import save_noise

from vtprune.cli import cli
from vtprune.models.loading import load

BY_DEFAULT = {"idefics2": (8, 8), "lighton_ocr": (3, 5), "aria": (16, 16)}
"""Model type -> rows and columns of the tokens of a picture of 90 x 150."""


def ask(directory: Path, *arguments: str) -> dict[str, Any]:
    """What `vtprune ask` reports of a picture."""
    picture = save_noise(directory / "picture.png", 90, 150)
    options = ["--model", str(directory), "--json", "--max-new-tokens", "3", *arguments]
    result = CliRunner().invoke(cli, ["ask", str(picture), "what is it?", *options])
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@pytest.mark.parametrize("model_type", BY_DEFAULT)
def test_a_picture_is_asked_about_from_the_command_line(model_type: str, tmp_path: Path) -> None:
    directory = tiny_processor.build(model_type, tmp_path)
    rows, cols = BY_DEFAULT[model_type]
    report = ask(directory, "--keep", "0.4", "--method", "uniform", "--at", "input")
    tokens = report["tokens"]
    assert tokens["visual"] == rows * cols
    assert tokens["kept_after"] == int(0.4 * rows * cols + 1e-6)
    assert report["answer"]
    assert not any("rows and columns" in warning for warning in report["warnings"])
    assert ask(directory, "--keep", "1")["tokens"]["kept_after"] == rows * cols


def test_the_processor_is_of_the_class_that_the_checkpoint_names(tmp_path: Path) -> None:
    loaded = load(str(tiny_processor.build("idefics2", tmp_path)))
    assert loaded.files.assembled is not None
    assert type(loaded.files.assembled.whole).__name__ == "Idefics2Processor"
    assert not loaded.family.listed
    assert loaded.family.modalities == ("image",)
