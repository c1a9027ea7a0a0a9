"""Qwen, GLM, Gemma and Molmo: their frames, times and prompts, and the official processors'."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from test_models import (
    CLIPS,
    ask,
    assert_official,
    family_of,
    files_of,
    noise,
    official,
    planned,
    prepare,
    source_of,
)

from vtprune.errors import ModelError
from vtprune.models import frames
from vtprune.models.base import PreparedMedia, Sampling
from vtprune.models.structure import find_structure

VIDEO_MODELS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"]
VIDEO_MODELS += [name for name in ("molmo2",) if name in tiny.MODELS]


@pytest.mark.parametrize("name", VIDEO_MODELS)
@pytest.mark.parametrize(
    ("frames", "fps"),
    [(clip[0], clip[3]) for clip in CLIPS] + [(2000, 2.0), (917, 23.976), (9001, 29.97)],
)
def test_frames_are_the_official_processors(tmp_path, name, frames, fps):
    processor = official(tiny.build(name, tmp_path)).video_processor
    metadata = SimpleNamespace(total_num_frames=frames, fps=fps, duration=frames / fps)
    options = {} if name == "molmo2" else {"fps": 2.0}
    expected = processor.sample_frames(metadata, **options).tolist()
    if name == "glm4v" and expected[-2:-1] == expected[-1:]:  # fills the last pair, as patches do
        expected.pop()
    assert planned(name, frames, fps, files_of(name)) == expected


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ({"min_pixels": 3136, "max_pixels": 12845056}, {}),
    "qwen3_vl": (
        {"size": {"longest_edge": 16777216, "shortest_edge": 65536}},
        {"size": {"longest_edge": 25165824, "shortest_edge": 4096}},
    ),
    "glm4v": (
        {"size": {"shortest_edge": 12544, "longest_edge": 9633792}},
        {"size": {"shortest_edge": 12544, "longest_edge": 47040000}},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_the_official_processors(tmp_path, name):
    directory = tiny.build(name, tmp_path)
    values = []
    for file, changes in zip(
        ("preprocessor_config.json", "video_preprocessor_config.json"), PUBLISHED[name], strict=True
    ):
        own = {key: value for key, value in tiny.FILES[name][file].items() if key != "size"}
        values.append({**own, "min_pixels": None, "max_pixels": None, **changes})
        written = {key: value for key, value in values[-1].items() if value is not None}
        (directory / file).write_text(json.dumps(written))
    processor = official(directory)
    files = files_of(name, image=values[0], video=values[1])
    for size in ((480, 640), (2160, 3840), (1920, 300), (100, 100)):
        assert_official(processor, name, files, [(noise(*size), 0.0)])
    assert_official(processor, name, files, [(noise(360, 640, 24), 6.0)])


# Times


def prepared(
    name: str, count: int, fps: float, shift: float = 0.0, **sampling: Any
) -> PreparedMedia:
    files = files_of(name)
    source = source_of(noise(60, 90, count), fps)
    times = tuple(time + shift for time in source.timestamps)
    source = dataclasses.replace(source, timestamps=times)
    plan = family_of(name).plan(files, source, Sampling(**sampling), 1)
    pixels = plan.transform(noise(60, 90, len(plan.index)))
    return PreparedMedia(source, pixels, plan.index, tuple(times[i] for i in plan.index))


def test_times_of_frames_are_counted_where_they_are_even():
    even = prepared("qwen3_vl", 20, 29.97)
    assert frames.seconds(even) == [number / 29.97 for number in even.index]
    late = prepared("qwen3_vl", 20, 29.97, shift=0.1)
    assert frames.seconds(late) == list(late.timestamps)


def test_qwen3_writes_the_mean_time_of_each_pair():
    family, files = family_of("qwen3_vl"), files_of("qwen3_vl")
    one = prepared("qwen3_vl", 25, 10.0, frames=3)
    assert one.index == (0, 12, 24)
    inputs = family.encode(files, [one], ask("what?", [one]))
    ids = inputs.tensors["input_ids"][0]
    pad = tiny.token("qwen3_vl", "<|video_pad|>")
    text = files.tokenizer.decode(ids[ids != pad])
    block = "<|vision_start|><|vision_end|>"
    between = f"<0.6 seconds>{block}<2.4 seconds>{block}"
    assert f"<|vision_start|>{between}<|vision_end|>what?" in text
    types = inputs.tensors["mm_token_type_ids"][0]
    assert torch.equal(types == 2, ids == pad)


def test_qwen3_takes_a_clip_of_one_frame():
    family, files = family_of("qwen3_vl"), files_of("qwen3_vl")
    media = prepare(family, files, [(noise(60, 90, 1), 10.0)])
    inputs = family.encode(files, media, ask("what?", media))
    assert inputs.tensors["video_grid_thw"][0, 0] == 1


def test_features_that_enter_layers_in_another_way_are_refused(monkeypatch):
    model = tiny.model("qwen3_vl")
    decoder = type(model.get_decoder())
    monkeypatch.setattr(decoder, "_deepstack_process", lambda self, states, features: states)
    with pytest.raises(ModelError, match="not as in Qwen3-VL"):
        find_structure(model)


def test_glm_takes_pictures_or_videos():
    family, files = family_of("glm4v"), files_of("glm4v")
    media = prepare(family, files, [(noise(60, 90), 0.0), (noise(60, 90, 8), 4.0)])
    with pytest.raises(ModelError, match="pictures and videos in one question"):
        family.encode(files, media, ask("what?", media))


def test_gemma_cuts_long_pictures_where_the_checkpoint_asks_for_it():
    family = family_of("gemma3")
    files = files_of("gemma3")
    long = [(noise(300, 1000), 0.0)]
    assert len(prepare(family, files, long)[0].pixels) == 1
    files = files_of("gemma3", image={**files.image, "do_pan_and_scan": True})
    media = prepare(family, files, long)
    inputs = family.encode(files, media, ask("what?", media))
    assert inputs.tiles == (4,)
    assert inputs.tensors["pixel_values"].shape[0] == 4
    assert len(prepare(family, files, [(noise(300, 310), 0.0)])[0].pixels) == 1
    assert len(prepare(family, files, long, Sampling(max_tiles=2))[0].pixels) == 3


@pytest.mark.parametrize("size", [(90, 150), (200, 70), (40, 40), (111, 300), (56, 700)])
def test_molmo_tokens_lie_where_their_patches_were(size):
    if "molmo2" not in tiny.MODELS:
        pytest.skip("this transformers has no Molmo2")
    family, files = family_of("molmo2"), files_of("molmo2")
    media = prepare(family, files, [(noise(*size), 0.0), (noise(70, 80), 0.0)])
    tensors = family.encode(files, media, ask("what?", media)).tensors
    grids = family.grids(files.config, {"image": tensors})["image"]
    side, at = tiny.TILE // tiny.PATCH, 0
    for grid, one in zip(grids, media, strict=True):
        used = tensors["image_token_pooling"][: sum(map(len, grids))]
        pooled = used[at : at + len(grid)]
        base = int(tensors["image_num_crops"][: grids.index(grid)].sum()) * side**2
        tiles = grid.tile.unique().tolist()
        assert tiles == list(range(len(one.pixels)))
        for token in range(len(grid)):
            owners = {(int(i) - base) // side**2 for i in pooled[token] if i >= 0}
            assert int(grid.tile[token]) == min(owners)
        at += len(grid)
