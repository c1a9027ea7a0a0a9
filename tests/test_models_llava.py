"""LLaVA's relatives and the block families: grids against the models' own code, official inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch
from conftest import shared_model
from test_models import (
    CLIPS,
    SIZES,
    ask,
    family_of,
    files_of,
    noise,
    official,
    planned,
    prepare,
    source_of,
)

import vtprune
from vtprune.engine.inputs import PreparedInputs
from vtprune.errors import ModelError
from vtprune.models import splitting
from vtprune.models.base import Sampling
from vtprune.models.idefics3 import LANCZOS
from vtprune.models.smolvlm import in_words
from vtprune.tokens.layout import CLS

SIDE = tiny.TILE // tiny.PATCH
LAYER_TWO = {"stages": [{"at": 2, "method": "random", "keep": 0.5, "per": "frame"}]}


def coordinates(units: int, side: int, width: int) -> torch.Tensor:
    """(units, side * side, width): features whose first values are unit, row and column."""
    features = torch.zeros(units, side, side, width)
    features[..., 0] = torch.arange(units)[:, None, None]
    features[..., 1] = torch.arange(side)[None, :, None]
    features[..., 2] = torch.arange(side)[None, None, :]
    return features.flatten(1, 2)


# Grids


def test_internvl_merges_neighbours_row_by_row():
    model = shared_model("internvl").model
    given = coordinates(1, SIDE, 4).view(1, SIDE, SIDE, 4)
    merged = model.pixel_shuffle(given, 0.5).reshape(-1, 4, 4)  # (tokens, neighbours, values)
    place = merged.mean(1)[:, 1:3].floor() // 2
    grid = family_of("internvl").grids(
        model.config, {"image": {"pixel_values": torch.zeros(1, 3, tiny.TILE, tiny.TILE)}}
    )["image"][0]
    assert torch.equal(place.long(), torch.stack([grid.row, grid.col], 1))


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_idefics3_merges_neighbours_row_by_row(name):
    model = shared_model(name).model
    merged = model.connector.pixel_shuffle(coordinates(1, SIDE, 4), 2).reshape(-1, 4, 4)
    place = merged.mean(1)[:, 1:3].floor() // 2
    pixels = torch.ones(1, 1, 3, tiny.TILE, tiny.TILE)
    grid = family_of(name).grids(model.config, {"image": {"pixel_values": pixels}})["image"][0]
    assert torch.equal(place.long(), torch.stack([grid.row, grid.col], 1))


def test_llava_next_video_pools_frames_row_by_row():
    model = shared_model("llava_next_video").model
    pooled = model.vision_resampler(coordinates(3, SIDE, 3))
    vision = {"video": {"pixel_values_videos": torch.zeros(1, 3, 3, tiny.TILE, tiny.TILE)}}
    (grid,) = family_of("llava_next_video").grids(model.config, vision)["video"]
    place = pooled.flatten(0, 1)
    assert torch.equal(grid.frame, place[:, 0].long())
    assert torch.equal(grid.row, (place[:, 1] // 2).long())
    assert torch.equal(grid.col, (place[:, 2] // 2).long())


def test_every_frame_of_video_llava_begins_with_its_cls_token():
    vision = {"video": {"pixel_values_videos": torch.zeros(1, 2, 3, tiny.TILE, tiny.TILE)}}
    (grid,) = family_of("video_llava").grids(tiny.config("video_llava"), vision)["video"]
    assert (grid.kind == CLS).nonzero().squeeze(1).tolist() == [0, SIDE**2 + 1]
    assert grid.frame.tolist() == [0] * (SIDE**2 + 1) + [1] * (SIDE**2 + 1)


@pytest.mark.parametrize(("strategy", "extra"), [("default", 0), ("full", 1)])
def test_llava_keeps_the_first_token_where_its_config_says_so(strategy, extra):
    config = tiny.config("llava", vision_feature_select_strategy=strategy)
    vision = {"image": {"pixel_values": torch.zeros(2, 3, tiny.TILE, tiny.TILE)}}
    grids = family_of("llava").grids(config, vision)["image"]
    assert [len(grid) for grid in grids] == [SIDE**2 + extra] * 2


@pytest.mark.parametrize("name", ["internvl", "aya_vision", "smolvlm", "idefics3"])
def test_tiles_are_found_in_the_models_inputs_alone(name):
    family, files, model = family_of(name), files_of(name), shared_model(name)
    smooth = torch.arange(90 * 150).view(90, 150).float() / (90 * 150) * 255
    pictures = [(smooth.to(torch.uint8).expand(1, 3, 90, 150).contiguous(), 0.0)]
    pictures += [(noise(40, 40), 0.0), (smooth.T.to(torch.uint8).expand(1, 3, 150, 90), 0.0)]
    media = prepare(family, files, pictures, Sampling(max_tiles=6))
    inputs = family.encode(files, media, ask("what?", media))
    preset = {"stages": [{"at": 2, "method": "random", "keep": 0.5, "per": "tile"}]}
    layouts = []
    for known in ((), inputs.media):
        with torch.no_grad(), vtprune.pruning(model, preset, inputs=PreparedInputs(known)) as trace:
            model(**inputs.tensors)
        layouts.append(trace.layouts[0])
    told, known = layouts
    assert torch.equal(told.columns, known.columns)
    assert torch.equal(told.media, known.media)
    for field in ("frame", "tile", "row", "col", "kind"):
        assert torch.equal(getattr(told.grid, field), getattr(known.grid, field)), field
    assert known.grid.tile.max() >= 2


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_picture_keeps_its_layout_beside_a_prompt_without_one(name):
    model = shared_model(name)
    text, picture = tiny.inputs(name, model, "text"), tiny.inputs(name, model, "image")
    layouts = []
    for inputs in (picture, tiny.left_pad(name, [text, picture])):
        with torch.no_grad(), vtprune.pruning(model, LAYER_TWO) as trace:
            model(**inputs)
        layouts.append(trace.layouts)
    (alone,), (none, beside) = layouts
    assert not len(none)
    for field in ("frame", "tile", "row", "col", "kind"):
        assert torch.equal(getattr(alone.grid, field), getattr(beside.grid, field)), field


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_a_shared_placeholder_is_a_video_where_the_user_says_so(name):
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "video")
    with torch.no_grad(), vtprune.pruning(model, LAYER_TWO, modality="video") as trace:
        model(**inputs)
    assert trace.layouts[0].grid.frame.bincount().tolist() == [4] * 4
    assert trace.kept[0].grid.frame.bincount().tolist() == [2] * 4
    assert trace.layouts[0].modality.unique().tolist() == [1]


def test_a_picture_and_a_video_of_internvl_are_told_apart_by_what_encode_says():
    family, files, model = family_of("internvl"), files_of("internvl"), shared_model("internvl")
    items = [(noise(60, 90, 20), 10.0), (noise(90, 150), 0.0)]
    media = prepare(family, files, items)
    inputs = family.encode(files, media, ask("what?", media))
    with (
        torch.no_grad(),
        vtprune.pruning(model, LAYER_TWO, inputs=PreparedInputs(inputs.media)) as trace,
    ):
        model(**inputs.tensors)
    layout = trace.layouts[0]
    assert layout.modality.unique_consecutive().tolist() == [1, 0]
    assert layout.grid.frame[layout.modality == 1].max() == 7


def test_media_that_do_not_fit_the_prompt_are_refused():
    model = shared_model("internvl")
    inputs = tiny.inputs("internvl", model, "image")
    grid = splitting.split_grid(1, 1, 2)
    with (
        pytest.raises(ModelError, match="not those of the media"),
        vtprune.pruning(model, LAYER_TWO, inputs=PreparedInputs([("image", grid)] * 2)),
    ):
        model(**inputs)


# What is taken, and what is refused


def test_frames_without_a_wish_are_the_official_ones():
    eight = [i * 100 // 8 for i in range(8)]
    for name in ("llava_next_video", "video_llava"):
        assert planned(name, 100, 25.0, files_of(name)) == eight
        assert planned(name, 5, 25.0, files_of(name)) == list(range(5))
    assert planned("internvl", 100, 25.0, files_of("internvl")) == [6, 18, 31, 43, 56, 68, 81, 93]
    assert planned("smolvlm", 100, 25.0, files_of("smolvlm")) == [0, 33, 66, 99]
    long = planned("smolvlm", 10_000, 25.0, files_of("smolvlm"))
    assert (len(long), long[0], long[-1]) == (64, 25, 9975)


def test_max_tiles_is_obeyed():
    for name, size in (("internvl", (640, 480)), ("smolvlm", (640, 480)), ("idefics3", (50, 500))):
        family, files = family_of(name), files_of(name)
        for limit in (1, 2, 4, 9):
            media = prepare(family, files, [(noise(*size), 0.0)], Sampling(max_tiles=limit))
            (tiles,) = family.encode(files, media, ask("what?", media)).tiles
            assert tiles <= limit + 1


@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_a_video_is_refused_where_there_are_only_pictures(name):
    with pytest.raises(ModelError, match="takes pictures only"):
        prepare(family_of(name), files_of(name), [(noise(60, 90, 4), 2.0)])


def test_smolvlm_refuses_a_picture_beside_a_video():
    family, files = family_of("smolvlm"), files_of("smolvlm")
    media = prepare(family, files, [(noise(60, 90, 4), 2.0), (noise(60, 90), 0.0)])
    with pytest.raises(ModelError, match="1 videos and 1 pictures"):
        family.encode(files, media, ask("what?", media))


def test_a_pixtral_tower_is_refused():
    files = files_of("llava")
    files.config.vision_config.model_type = "pixtral"
    with pytest.raises(ModelError, match="Pixtral"):
        family_of("llava").plan(files, source_of(noise(50, 50)), Sampling(), 1)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "one"),
        (20, "twenty"),
        (64, "sixty-four"),
        (100, "one hundred"),
        (101, "one hundred and one"),
        (999, "nine hundred and ninety-nine"),
        (1000, "one thousand"),
        (1001, "one thousand and one"),
        (12_345, "twelve thousand, three hundred and forty-five"),
    ],
)
def test_numbers_are_written_as_in_the_training_prompts(number, words):
    assert in_words(number) == words


# Against the official processors


def official_video(processor: Any, files: Any, clip: tuple[torch.Tensor, float]) -> None:
    """SmolVLM's processor, which needs to be told a clip's duration as well."""
    from transformers.video_utils import VideoMetadata

    pixels, fps = clip
    family = family_of("smolvlm")
    media = prepare(family, files, [clip])
    inputs = family.encode(files, media, ask("what is this?", media))
    index = list(media[0].index)
    metadata = VideoMetadata(
        total_num_frames=len(pixels), fps=fps, frames_indices=index, duration=len(pixels) / fps
    )
    expected = processor(
        text=[inputs.prompt],
        videos=[[pixels[index]]],  # before 5.23, one list a prompt
        video_metadata=[[metadata]],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert set(inputs.tensors) == set(expected)
    for key, values in expected.items():
        assert torch.equal(inputs.tensors[key], torch.as_tensor(values)), key


@pytest.mark.parametrize(("frames", "height", "width", "fps"), CLIPS)
def test_videos_of_smolvlm_are_the_official_processors(tmp_path, frames, height, width, fps):
    processor, files = official(tiny.build("smolvlm", tmp_path)), files_of("smolvlm")
    official_video(processor, files, (noise(height, width, frames), fps))
    metadata = {"total_num_frames": frames, "fps": fps, "duration": frames / fps}
    picked = processor.video_processor.sample_frames(Metadata(metadata)).tolist()
    assert planned("smolvlm", frames, fps, files) == picked


class Metadata(dict):  # type: ignore[type-arg]
    """The official sampler reads some of it as attributes, some as items."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_lanczos_is_the_official_one_of_pillow(name: str) -> None:
    image = {**tiny.FILES[name]["preprocessor_config.json"], "resample": LANCZOS}
    files = dataclasses.replace(files_of(name), image=image)
    kind = str(image["image_processor_type"])
    import transformers

    processor = getattr(transformers, f"{kind}Pil", None)
    if processor is None:
        pytest.skip("this transformers has no processor by Pillow for this family")
    values = {key: image[key] for key in ("size", "max_image_size", "resample")}
    try:
        made = processor(**values)
    except ImportError as error:
        pytest.skip(f"the official processor needs more: {error}")
    family = family_of(name)
    for size in SIZES:
        pixels = noise(*size)
        media = prepare(family, files, [(pixels, 0.0)])
        tensors = family.encode(files, media, ask("what?", media)).tensors
        expected = made(
            [[pixels[0].numpy()]], return_tensors="pt", input_data_format="channels_first"
        )
        assert torch.equal(tensors["pixel_values"], expected["pixel_values"]), size
