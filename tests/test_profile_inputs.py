"""What a profiled model is shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING

from vtprune.errors import MediaError, ModelError
from vtprune.evaluation.profiling.prompts import (
    ProfiledMedia,
    ProfiledPrompt,
    largest_picture,
    make_prompt,
    parse_size,
    text_runs,
)
from vtprune.evaluation.profiling.shapes import find_shape
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded
from vtprune.models.skeleton import build_skeleton
from vtprune.preset import load_preset, override


def loaded(name: str) -> Loaded:
    shape = find_shape(name)
    return Loaded(name, build_skeleton(shape.config), shape.files, shape.family)


def tiny_loaded(name: str, folder: Path) -> Loaded:
    return loaded(str(tiny.describe(name, folder)))


def case(name: str, size: str, text: int = 64) -> ProfiledPrompt:
    shown = parse_size(size, "video") or parse_size(size, "image")
    assert shown is not None
    return make_prompt(loaded(name), shown, Sampling(), text)


@pytest.mark.parametrize(
    ("size", "shown"),
    [("1344x672", ProfiledMedia("image", 1344, 672)), (" 5X7 ", ProfiledMedia("image", 5, 7))],
)
def test_a_picture_is_width_times_height(size: str, shown: ProfiledMedia) -> None:
    assert parse_size(size, "image") == shown
    assert parse_size(size, "video") is None


def test_a_video_is_frames_width_and_height() -> None:
    assert parse_size("64x448x336", "video") == ProfiledMedia("video", 448, 336, 64)
    assert parse_size("64x448x336", "image") is None


@pytest.mark.parametrize("size", ["0x7", "70000x7", "9" * 5000 + "x7", "0007x65537"])
def test_a_side_out_of_range_is_refused(size: str) -> None:
    with pytest.raises(MediaError, match=r"is out of range: a side, or the frames, are 1 to 65536"):
        parse_size(size, "image")


def test_zeros_in_front_of_a_length_count_nothing() -> None:
    assert parse_size("007x0640", "image") == ProfiledMedia("image", 7, 640)


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("llava-1.5-7b", "1000x600", 24 * 24),
        # The base picture, 2 x 2 tiles, and a newline at the end of each of their 48 rows.
        ("llava-next", "672x672", 24 * 24 + 48 * (48 + 1)),
        # 3 x 3 tiles of 27 x 27 and their newlines: no more than the 9 that are not interpolated.
        ("llava-onevision-0.5b", "1152x1152", 27 * 27 + 81 * (81 + 1)),
        # Frames pooled to 14 x 14, and one newline.
        ("llava-onevision-0.5b", "32x448x448", 32 * 14 * 14 + 1),
        ("llava-next-video-7b", "8x448x448", 8 * 12 * 12),
        ("video-llava-7b", "8x448x448", 8 * (16 * 16 + 1)),
        # 28 x 28 pixels a token; two frames are one.
        ("qwen2.5-vl-7b", "1344x1344", 48 * 48),
        ("qwen2-vl-2b", "16x448x448", 8 * 16 * 16),
        # 12 tiles of 3 rows and 4 columns, and the whole picture, 256 tokens each.
        ("internvl3-8b", "1792x1344", 13 * 256),
        ("smolvlm2-2.2b", "1536x1536", 17 * 81),
        ("gemma-3-4b", "800x600", 256),
    ],
)
def test_a_picture_has_the_tokens_that_its_family_gives_it(
    name: str, size: str, tokens: int
) -> None:
    made = case(name, size)
    assert len(made.layout) == tokens
    assert made.text == 64
    assert made.inputs.tensors["input_ids"].shape == (1, tokens + 64)


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("text", [48, 200])
def test_the_largest_picture_is_laid_out_among_that_many_text_tokens(
    name: str, text: int, tmp_path: Path
) -> None:
    model = tiny_loaded(name, tmp_path)
    made = make_prompt(model, largest_picture(model), Sampling(), text)
    ids = made.inputs.tensors["input_ids"]
    assert ids.shape[1] == len(made.layout) + made.text == len(made.layout) + text
    columns = made.layout.columns
    tokens = model.family.placeholders(model.files.config)["image"]
    assert bool(torch.isin(ids[0, columns], torch.tensor(tokens)).all())
    assert int(columns[-1]) < ids.shape[1] - 1  # text follows


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "glm4v", "smolvlm", "molmo2"])
def test_blocks_of_a_video_stay_apart_however_few_text_tokens_are_asked_for(
    name: str, tmp_path: Path
) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    model = tiny_loaded(name, tmp_path)
    made = make_prompt(model, ProfiledMedia("video", 60, 60, 8), Sampling(), 1)
    frames = int(made.layout.grid.frame.max()) + 1
    visual = torch.zeros(made.inputs.tensors["input_ids"].shape[1], dtype=torch.bool)
    visual[made.layout.columns] = True
    assert len(text_runs(visual)) >= frames
    assert "markers need as many" in made.warnings[-1]
    assert made.text == int((~visual).sum())


def test_a_video_is_refused_by_a_family_without() -> None:
    with pytest.raises(ModelError, match=r"LLaVA-1.5 takes image input, no video"):
        case("llava-1.5-7b", "8x448x448")


def test_fewer_tiles_are_another_input() -> None:
    model = loaded("internvl3-1b")
    shown = ProfiledMedia("image", 1792, 1344)
    most, few = (make_prompt(model, shown, Sampling(max_tiles=n), 64) for n in (12, 4))
    assert most.key != few.key
    assert len(few.layout) == 5 * 256
    assert most.key == make_prompt(model, shown, Sampling(max_tiles=99), 64).key


def test_a_smaller_input_has_that_share_of_the_pixels() -> None:
    assert ProfiledMedia("image", 400, 200).smaller(0.25) == ProfiledMedia("image", 200, 100)
    assert ProfiledMedia("video", 400, 200, 64).smaller(0.25) == ProfiledMedia(
        "video", 400, 200, 16
    )


def test_a_preset_that_makes_pictures_smaller_gets_a_smaller_picture() -> None:
    model = loaded("qwen2.5-vl-7b")
    preset = override(load_preset(None), 0.25, method="downsample")
    made = make_prompt(model, ProfiledMedia("image", 1344, 1344), Sampling(), 64, preset)
    assert made.inputs.full_size is not None
    assert made.inputs.full_size.total() == 48 * 48
    assert len(made.layout) == 24 * 24
    assert made.text == 64
    assert made.inputs.full_size.more_text == 0
