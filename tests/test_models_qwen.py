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
    Item,
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

from vtprune.models import frames
from vtprune.models.base import Prepared, Sampling

VIDEO_MODELS = ["qwen2_vl", "qwen3_vl", "glm4v"]
VIDEO_MODELS += [name for name in ("molmo2",) if name in tiny.MODELS]


def clips_of(frames: int, height: int, width: int, fps: float) -> list[Item]:
    return [(noise(height, width, frames), fps)]


@pytest.mark.parametrize("name", VIDEO_MODELS)
@pytest.mark.parametrize(("frames", "height", "width", "fps"), CLIPS)
def test_videos_are_the_official_processors(tmp_path, name, frames, height, width, fps):
    processor, files = official(tiny.build(name, tmp_path)), files_of(name)
    clip = (noise(height, width, frames), fps)
    assert_official(processor, name, files, [clip])
    if "mixed" in tiny.KINDS[name]:
        assert_official(processor, name, files, [(noise(90, 150), 0.0), clip])
    if name != "molmo2":  # one video a question
        assert_official(processor, name, files, [clip, (noise(width, height, frames), fps)])


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


def prepared(name: str, count: int, fps: float, shift: float = 0.0, **sampling: Any) -> Prepared:
    files = files_of(name)
    source = source_of(noise(60, 90, count), fps)
    times = tuple(time + shift for time in source.timestamps)
    source = dataclasses.replace(source, timestamps=times)
    plan = family_of(name).plan(files, source, Sampling(**sampling), 1)
    pixels = plan.transform(noise(60, 90, len(plan.index)))
    return Prepared(source, pixels, plan.index, tuple(times[i] for i in plan.index))


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
