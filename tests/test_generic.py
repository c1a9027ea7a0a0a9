"""Models without a family of their own: the checkpoint's own processor makes their inputs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import family_table
import pytest
import tiny
import tiny_processor
import zoo
from click.testing import CliRunner
from conftest import assert_refused, save_noise
from packaging.version import Version
from test_pictures_places import ask as ask_about
from test_pictures_places import plain
from test_structure import Changed
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import vtprune
from vtprune.cli import cli
from vtprune.engine.inputs import PreparedInputs
from vtprune.models import FAMILIES
from vtprune.models.base import Inputs
from vtprune.models.loading import load


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        every = metafunc.config.getoption("--zoo")
        rows = [row for row in family_table.read_table().values() if row.inputs == "processor"]
        here = [row for row in rows if row.model_type in zoo.MODEL_TYPES]
        swept = here if every else []
        metafunc.parametrize("row", swept, ids=[row.model_type for row in swept])


BY_DEFAULT = {"idefics2": (1, 64), "lighton_ocr": (3, 5), "aria": (1, 256)}
"""Model type -> rows and columns of a picture of 90 x 150; learned queries have none."""


LARGE = {"minicpmv4_6": [(6, 8)] * 5, "lighton_ocr": [(25, 36)]}
"""Model type -> rows and columns of each tile of a picture of 700 x 1000."""


def ask(directory: Path, *arguments: str) -> dict[str, Any]:
    """What `vtprune ask` reports of a picture."""
    picture = save_noise(directory / "picture.png", 90, 150)
    options = ["--model", str(directory), "--json", "--max-new-tokens", "3", *arguments]
    result = CliRunner().invoke(cli, ["ask", str(picture), "what is it?", *options])
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_a_class_is_asked_as_the_table_says(row: family_table.Row) -> None:
    """Behind --zoo. The class itself checks that as many features come as there are tokens."""
    has_torchvision = importlib.util.find_spec("torchvision") is not None
    if row.how == "asked" and (has_torchvision or row.torchvision != "yes"):
        assert family_table.try_ask(row.model_type, "0.4") == ""
    elif row.how == "keep 1":
        assert family_table.try_ask(row.model_type, "1") == ""
        assert family_table.try_ask(row.model_type, "0.4")
    elif row.how == "refused":
        assert family_table.try_ask(row.model_type, "0.4")


def test_the_table_has_the_classes_of_this_transformers() -> None:
    here, rows = Version(family_table.release()), family_table.read_table()
    old = {name: row.kind for name, row in rows.items() if Version(row.since) <= here}
    assert old == dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    own = {name for name, row in rows.items() if row.inputs == "own"}
    assert own == set(FAMILIES)


@pytest.mark.parametrize("model_type", BY_DEFAULT)
def test_a_picture_is_asked_about_from_the_command_line(model_type: str, tmp_path: Path) -> None:
    if model_type == "idefics2" and Version(family_table.release()) < Version("5.23"):
        pytest.skip("this transformers resizes its pictures by torchvision alone")
    directory = tiny_processor.build(model_type, tmp_path)
    rows, cols = BY_DEFAULT[model_type]
    report = ask(directory, "--keep", "0.4", "--method", "uniform", "--at", "input")
    tokens = report["tokens"]
    assert tokens["visual"] == rows * cols
    assert tokens["kept_after"] == int(0.4 * rows * cols + 1e-6)
    assert report["answer"]
    warned = any("rows and columns" in warning for warning in report["warnings"])
    assert warned == (rows == 1)
    assert ask(directory, "--keep", "1")["tokens"]["kept_after"] == rows * cols


def test_the_processor_is_of_the_class_that_the_checkpoint_names(tmp_path: Path) -> None:
    loaded = load(str(tiny_processor.build("idefics2", tmp_path)))
    assert loaded.files.assembled is not None
    assert type(loaded.files.assembled.whole).__name__ == "Idefics2Processor"
    assert not loaded.family.listed
    assert loaded.family.modalities == ("image",)


def test_a_model_that_can_not_be_pruned_answers_at_keep_1_with_the_reason(tmp_path: Path) -> None:
    directory = tiny_processor.build("git", tmp_path)
    report = ask(directory, "--keep", "1")
    assert any("git: its decoder has no list of layers" in note for note in report["warnings"])
    assert report["seconds"]["prefill"] > 0
    picture = str(directory / "picture.png")
    less = ["ask", picture, "what?", "--model", str(directory), "--keep", "0.9"]
    message = "Error: git: its decoder has no list of layers"
    assert_refused(CliRunner().invoke(cli, less), message)
    assert_refused(CliRunner().invoke(cli, ["check", "--model", str(directory)]), message)


def test_a_pruned_decoder_with_a_state_is_not_explained(tmp_path: Path) -> None:
    directory = tiny_processor.build("qwen3_5", tmp_path)
    picture = str(save_noise(tmp_path / "picture.png", 90, 150))
    cut = ["--keep", "0.4", "--method", "uniform", "--at", "input", "--max-new-tokens", "3"]
    result = CliRunner().invoke(cli, ["explain", picture, "?", "--model", str(directory), *cut])
    assert_refused(result, "Error: qwen3_5: layers that keep a state .* have no keys to mask")


def test_its_visual_tokens_are_counted_all_the_same() -> None:
    with Changed(num_attention_heads=None) as model:
        inputs = tiny.inputs("llava_onevision", model, "image")
        given = PreparedInputs.of(inputs, [Inputs(inputs, "")])
        with vtprune.pruning(model, keep=1, inputs=given) as trace:
            pass
    visual = int((inputs["input_ids"] == tiny.token("llava_onevision", "<image>")).sum())
    assert trace.unpruned
    assert len(trace.layouts[0]) == visual
    assert trace.text == [inputs["input_ids"].numel() - visual]
    assert trace.keep_mean() == 1
    assert trace.layouts[0].grid.row.max() > 1


def test_an_error_inside_a_class_that_is_not_listed_is_no_fault_of_ours(tmp_path: Path) -> None:
    directory = tiny_processor.build("lighton_ocr", tmp_path)
    values = json.loads((directory / "config.json").read_text())
    values["image_token_id"] += 1
    (directory / "config.json").write_text(json.dumps(values))
    picture = save_noise(tmp_path / "picture.png", 90, 150)
    result = CliRunner().invoke(cli, ["ask", str(picture), "what?", "--model", str(directory)])
    assert_refused(result, "Error: .* does not run on what its own processor made")


@pytest.mark.parametrize("model_type", LARGE)
def test_sizes_that_the_tower_is_given_tell_rows_and_columns(
    model_type: str, tmp_path: Path
) -> None:
    loaded = load(str(tiny_processor.build(model_type, tmp_path)))
    for count in (1, 2):
        question = ask_about(loaded, [(plain(700, 1000), 0.0)] * count)
        assert len(question.inputs.media) == count
        for _, grid in question.inputs.media:
            sides = []
            for number in grid.tile.unique().tolist():
                rows, cols = (part[grid.tile == number] for part in (grid.row, grid.col))
                sides.append((int(rows.max() - rows.min()) + 1, int(cols.max()) + 1))
            assert sides == LARGE[model_type]
