"""Models without a family of their own: the checkpoint's own processor makes their inputs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import family_table
import pytest
import tiny
import tiny_processor
import torch
import zoo
from click.testing import CliRunner
from conftest import answer_together, assert_refused, save_noise
from packaging.version import Version
from test_pictures_places import ask as ask_about
from test_pictures_places import plain
from test_structure import Changed
from transformers import CONFIG_MAPPING, BatchFeature
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.video_utils import VideoMetadata

import vtprune
from vtprune.cli import cli
from vtprune.engine.inputs import PreparedInputs
from vtprune.inference.generate import Generation, generate
from vtprune.models import FAMILIES
from vtprune.models.base import Inputs
from vtprune.models.generic import GenericFamily
from vtprune.models.loading import Loaded, load
from vtprune.models.placeholder_runs import grid_of_runs
from vtprune.preset import load_preset, override


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
    needed = [name for name in ("torchvision", "timm") if name in row.torchvision]
    needed += ["torchvision"] if row.torchvision.startswith("yes") else []
    if any(importlib.util.find_spec(name) is None for name in needed):
        pytest.skip(f"it needs {' and '.join(needed)}")
    if row.how == "asked":
        assert family_table.try_ask(row.model_type, "0.4") == ""
    elif row.how == "keep 1":
        assert family_table.try_ask(row.model_type, "1") == ""
        assert family_table.try_ask(row.model_type, "0.4")
    elif row.how == "refused":
        assert family_table.try_ask(row.model_type, "0.4")
    since = family_table.videos_since(row)
    if row.how not in family_table.RUNS or not since or row.media == "videos":
        return
    if importlib.util.find_spec("torchvision") and Version(since) <= Version(
        family_table.release()
    ):
        keep = family_table.RUNS[row.how]
        assert family_table.try_ask(row.model_type, keep, family_table.CLIP) == ""


def test_the_media_of_a_row_join_what_older_and_newer_transformers_answer() -> None:
    old = family_table.Row("kind", "Kind", "5.17", "asked", "processor", "no", "images, videos", "")
    here = replace(old, since="5.23", media="images")
    assert family_table.joined_media(here, old) == "images"
    newer = replace(old, since="5.24")
    joined = family_table.joined_media(newer, replace(old, media="images"))
    assert joined == "images, videos from 5.24"
    assert family_table.joined_media(here, replace(old, media=joined)) == joined
    assert family_table.joined_media(replace(old, since="5.23"), old) == "images, videos"


def test_two_pictures_of_a_batch_are_answered_as_each_alone(
    row: family_table.Row, tmp_path: Path
) -> None:
    """Behind --zoo."""
    if row.how != "asked" or row.torchvision.startswith("yes") or "timm" in row.torchvision:
        pytest.skip("it is not asked here")
    if row.model_type == "emu3":
        pytest.skip("it encodes a picture together with a batch's padding, pruned or not")
    loaded = load(str(tiny_processor.build(row.model_type, tmp_path)))
    sizes = {"what is it?": (90, 150), "what is to be seen in this picture, please?": (260, 120)}
    items = [
        (save_noise(tmp_path / f"{height}.png", height, width), question)
        for question, (height, width) in sizes.items()
    ]
    reports = answer_together(loaded, items, keep=0.4, generation=Generation(max_new_tokens=6))
    assert all(0 < report.tokens.kept_after < report.tokens.visual for report in reports)


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
    # PaliGemma's gives labels to train on unasked, which no forward of a pruned model takes.
    call, labels = type(loaded.files.assembled)._call, {"labels": torch.zeros(1, 9)}
    with patch.object(type(loaded.files.assembled), "_call", lambda *args: call(*args) | labels):
        tensors = ask_about(loaded, [(plain(64, 64), 0.0)]).tensors
    assert set(tensors) == {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"}


def test_a_checkpoint_without_its_preparation_file_is_refused_by_that_name(tmp_path: Path) -> None:
    directory = tiny_processor.build("idefics2", tmp_path)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (directory / name).unlink(missing_ok=True)
    picture = str(save_noise(tmp_path / "picture.png", 90, 150))
    result = CliRunner().invoke(cli, ["ask", picture, "what?", "--model", str(directory)])
    assert_refused(result, "Error: .*: it has no preprocessor_config.json, which says how")
    assert "huggingface.co" not in result.stderr


def test_a_model_that_can_not_be_pruned_answers_at_keep_1_with_the_reason(tmp_path: Path) -> None:
    directory = tiny_processor.build("git", tmp_path)
    report = ask(directory, "--keep", "1")
    assert any("git: its decoder has no list of layers" in note for note in report["warnings"])
    assert any("visual tokens, so these are not counted" in note for note in report["warnings"])
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
    assert trace.visual_by_layer == [[visual] * model.config.text_config.num_hidden_layers]
    assert trace.layouts[0].grid.row.max() > 1


def test_an_error_inside_a_class_that_is_not_listed_is_no_fault_of_ours(tmp_path: Path) -> None:
    directory = tiny_processor.build("lighton_ocr", tmp_path)
    values = json.loads((directory / "config.json").read_text())
    values["image_token_id"] += 1
    (directory / "config.json").write_text(json.dumps(values))
    picture = save_noise(tmp_path / "picture.png", 90, 150)
    result = CliRunner().invoke(cli, ["ask", str(picture), "what?", "--model", str(directory)])
    assert_refused(result, "Error: .* does not run on what its own files made")


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


class VideoPatches:
    """Makes patches of videos as Qwen3-VL's video processor does, without torchvision.

    Args:
        patch_size: their side in pixels.
    """

    merge_size, temporal_patch_size = 2, 2
    do_sample_frames, fps, num_frames = True, None, None
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, patch_size: int = 16) -> None:
        self.patch_size = patch_size

    def sample_frames(self, metadata: Any, **options: object) -> list[int]:
        return list(range(0, metadata.total_num_frames, 2))

    def __call__(self, videos: list[torch.Tensor], **options: Any) -> BatchFeature:
        side = 2 * self.patch_size
        shapes = [(len(v) // 2, v.shape[-2] // side * 2, v.shape[-1] // side * 2) for v in videos]
        sizes = torch.tensor(shapes)
        pixels = torch.randn(int(sizes.prod(1).sum()), 2 * 3 * self.patch_size**2)
        values = {"pixel_values_videos": pixels, "video_grid_thw": sizes}
        metadata = [VideoMetadata(**vars(one)) for one in options["video_metadata"]]
        return BatchFeature(values | {"video_metadata": metadata})


def with_videos(loaded: Loaded) -> Loaded:
    """A checkpoint whose videos need no torchvision."""
    assembled = loaded.files.assembled
    assert assembled is not None
    vision = loaded.files.config.vision_config
    assembled.whole.video_processor = VideoPatches(vision.patch_size)
    family = GenericFamily(loaded.family.name, ("image", "video"))
    return replace(
        loaded, family=family, files=replace(loaded.files, assembled=replace(assembled, missing={}))
    )


def test_pictures_and_videos_of_one_prompt_have_their_own_places(tmp_path: Path) -> None:
    """Frames that are merged in time, with the times that the family writes before them."""
    loaded = with_videos(load(str(tiny_processor.build("cosmos3_omni", tmp_path))))
    sizes = {"image": (1, 2, 4), "video": (4, 2, 3), "wide": (2, 2, 5)}
    pixels = {
        "image": (plain(64, 128), 0.0),
        "video": (plain(64, 96).repeat(16, 1, 1, 1), 4.0),
        "wide": (plain(64, 160).repeat(8, 1, 1, 1), 2.0),
    }
    for names in (["video"], ["image", "wide"], ["video", "image"], ["video", "wide", "image"]):
        question = ask_about(loaded, [pixels[name] for name in names])
        assert [kind for kind, _ in question.inputs.media] == [
            "image" if name == "image" else "video" for name in names
        ]
        for name, (_, grid) in zip(names, question.inputs.media, strict=True):
            sides = [int(part.max()) + 1 for part in (grid.frame, grid.row, grid.col)]
            assert tuple(sides) == sizes[name]
            assert len(grid) == sizes[name][0] * sizes[name][1] * sizes[name][2]
        if "video" in names:  # frames 0 and 2 of 4 a second
            assert "<0.2 seconds>" in loaded.files.tokenizer.decode(
                question.tensors["input_ids"][0]
            )
        preset = override(load_preset(None), keep=0.5, method="uniform")
        trace = generate(loaded, [question], preset, Generation(1))[0].trace
        visual = sum(len(grid) for _, grid in question.inputs.media)
        assert (len(trace.layouts[0]), len(trace.kept[0])) == (visual, visual // 2)
        assert not any("rows and columns" in note for note in trace.warnings)


@pytest.mark.parametrize(
    ("lengths", "frames", "counts"),
    [
        ([6, 6], 4, [6, 6]),  # two steps of four frames
        ([6, 4, 3], 3, [6, 4, 3]),  # a frame that has fewer tokens
        ([4, 4, 4, 4], 2, [8, 8]),  # frames in pieces
        ([12], 3, [4, 4, 4]),
    ],
)
def test_runs_of_a_video_are_its_steps(lengths: list[int], frames: int, counts: list[int]) -> None:
    row = torch.tensor([token for n in lengths for token in [*[5] * n, 7, 8]])
    grid = grid_of_runs(row, (row == 5).nonzero().squeeze(1), frames=frames)
    assert grid.frame.bincount().tolist() == counts


def test_tiles_of_several_pictures_are_told_apart(tmp_path: Path) -> None:
    loaded = load(str(tiny_processor.build("qianfan_ocr", tmp_path)))
    question = ask_about(loaded, [(plain(64, 128), 0.0), (plain(64, 64), 0.0)])
    grids = [grid for _, grid in question.inputs.media]
    assert [grid.tile.unique().tolist() for grid in grids] == [[1, 2, 3], [0]]
    assert [int(grid.col.max()) + 1 for grid in grids] == [16, 16]


def test_pictures_with_nothing_between_them_are_told_apart_by_their_pixels() -> None:
    """Four pictures of 4 x 4 tokens in one run are not one of 8 x 8."""
    config = CONFIG_MAPPING["vipllava"](image_token_index=5)
    ids = torch.tensor([[7, *[5] * 64, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.zeros(4, 3, 28, 28)}
    (grid,) = GenericFamily("vipllava").grids(config, {"image": inputs})["image"]
    assert grid.tile.bincount().tolist() == [0, 16, 16, 16, 16]
    assert [int(part.max()) + 1 for part in (grid.row, grid.col)] == [16, 4]
