"""Families: their grids against the models' own packing, their inputs against the official ones."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.image_processing_utils import select_best_resolution

from vtprune.errors import MediaError, ModelError
from vtprune.media import Source
from vtprune.models import anyres, find_family, preprocess, template_trial
from vtprune.models.base import Family, Files, PreparedMedia, Sampling, Turn
from vtprune.models.checkpoint import read_files
from vtprune.tokens.layout import NEWLINE

SIDE = tiny.TILE // tiny.PATCH
VIDEO_MODELS = [name for name in tiny.MODELS if "video" in tiny.KINDS[name]]
LANCZOS = ("idefics3", "smolvlm")
"""Families whose checkpoints resize pictures by Lanczos."""
WAVES = ((9.0, 14.0), (23.0, 11.0), (31.0, 40.0))
SIZES = (
    (1, 1),
    (5, 3),
    (1, 1000),
    (1000, 1),
    (7, 400),
    (56, 56),
    (57, 113),
    (90, 150),
    (112, 111),
    (168, 167),
    (200, 60),
    (333, 100),
    (640, 480),
    (2048, 1536),
    (3000, 2999),
)
CLIPS = ((30, 60, 90, 30.0), (31, 200, 300, 12.5), (300, 48, 64, 29.97), (3, 100, 50, 25.0))
CLIPS += ((9, 480, 640, 1.0), (64, 57, 33, 8.0))
"""Frames, height, width, frames a second."""


def family_of(name: str) -> Family:
    family = find_family(tiny.config(name).model_type)
    assert family is not None
    return family


def files_of(name: str, template: bool = True, **changes: Any) -> Files:
    """A tiny checkpoint's files, without the disk."""
    values = tiny.FILES[name]
    files = Files(
        config=tiny.config(name),
        tokenizer=tiny.tokenizer(name, template),
        image=values["preprocessor_config.json"],
        video=values.get("video_preprocessor_config.json", {}),
    )
    return dataclasses.replace(files, **changes)


def noise(height: int, width: int, frames: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 10_007 + width + frames)
    return torch.randint(0, 256, (frames, 3, height, width), generator=generator, dtype=torch.uint8)


def source_of(pixels: torch.Tensor, fps: float = 0.0) -> Source:
    """A picture, or with `fps` a video, that holds these pixels."""
    count, _, height, width = pixels.shape
    return Source(
        path=Path("clip.mp4" if fps else "picture.png"),
        kind="video" if fps else "image",
        width=width,
        height=height,
        num_frames=count,
        timestamps=tuple(i / fps for i in range(count)) if fps else (),
        fps=fps,
        duration=count / fps if fps else 0.0,
        decoder="none",
        warnings=(),
    )


Item = tuple[torch.Tensor, float]
"""Pixels, and frames a second; 0 for a picture."""


def prepare(
    family: Family,
    files: Files,
    items: Sequence[Item],
    sampling: Sampling | None = None,
    chunk: int = 3,
) -> list[PreparedMedia]:
    """What `vtprune ask` does between opening files and `encode`, in chunks of frames."""
    prepared = []
    for pixels, fps in items:
        source = source_of(pixels, fps)
        alike = sum(bool(other) == bool(fps) for _, other in items)
        plan = family.plan(files, source, sampling or Sampling(), alike)
        index = list(plan.index)
        parts = [
            plan.transform(pixels[index[at : at + chunk]]) for at in range(0, len(index), chunk)
        ]
        times = tuple(source.timestamps[i] for i in index) if fps else ()
        prepared.append(PreparedMedia(source, torch.cat(parts), plan.index, times))
    return prepared


def ask(question: str, media: Sequence[PreparedMedia], system: str = "") -> list[Turn]:
    first = [Turn("system", system)] if system else []
    return [*first, Turn("user", question, len(media))]


def items_of(kind: str) -> list[Item]:
    picture, clip = (noise(90, 150), 0.0), (noise(60, 90, 20), 10.0)
    return {
        "image": [picture],
        "several": [picture, (noise(200, 70), 0.0), (noise(40, 40), 0.0)],
        "video": [clip],
        "mixed": [picture, clip],
    }[kind]


# Grids


def packed(model: Any, size: tuple[int, int], most: int) -> torch.Tensor:
    """(n, 4) tile, row and column in tokens of the padded whole, and 0, or -1 for a newline: what
    features that carry their own coordinates become in the model's own packing."""
    high, wide = select_best_resolution(size, model.config.image_grid_pinpoints)
    down, across = high // tiny.TILE, wide // tiny.TILE
    features = torch.zeros(1 + down * across, SIDE, SIDE, 4, dtype=torch.float64)
    inside = torch.arange(SIDE)
    for tile in range(1 + down * across):
        top, left = divmod(tile - 1, across) if tile else (0, 0)
        features[tile, ..., 0] = tile
        features[tile, ..., 1] = (top * SIDE + inside)[:, None]
        features[tile, ..., 2] = (left * SIDE + inside)[None]
    options: dict[str, Any] = {"image_newline": torch.full((4,), -1.0, dtype=torch.float64)}
    if model.config.model_type == "llava_onevision":
        options["vision_aspect_ratio"] = f"anyres_max_{most}"
    else:
        options["vision_feature_select_strategy"] = "default"
    sizes = torch.tensor([size])
    return model.model.pack_image_features([features.flatten(1, 2)], sizes, **options)[0][0]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: tiny.model(name) for name in tiny.MODELS}


TILING = [("llava_onevision", 1), ("llava_onevision", 4), ("llava_onevision", 9), ("llava_next", 0)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "most"), TILING)
def test_tiled_grid_is_the_models_own_packing(models, name, most, size):
    config = models[name].config
    vision = {"image_sizes": torch.tensor([size]), "vision_aspect_ratio": f"anyres_max_{most}"}
    (grid,) = family_of(name).grids(config, {"image": vision})["image"]
    truth = packed(models[name], size, most)
    assert len(grid) == len(truth)
    newline = truth[:, 3] == -1
    assert torch.equal(grid.kind == NEWLINE, newline)
    base = slice(0, SIDE * SIDE)
    assert not grid.tile[base].any()
    assert torch.equal(truth[base, 1:3].long(), torch.stack([grid.row, grid.col], 1)[base])
    rest = slice(SIDE * SIDE, None)
    patch = ~newline[rest]
    across = select_best_resolution(size, config.image_grid_pinpoints)[1] // tiny.TILE
    centre = (truth[rest][patch][:, 1:3] + 0.5) / SIDE
    number = 1 + centre[:, 0].floor() * across + centre[:, 1].floor()
    # A centre on the very border of two tiles belongs to either.
    inside = ((centre - centre.round()).abs() > 1e-4).all(1)
    assert torch.equal(grid.tile[rest][patch][inside], number[inside].long())
    assert len(set(grid.col[newline].tolist())) <= 1
    after = newline.nonzero().squeeze(1)
    after = after[grid.col[after] > 0]
    assert torch.equal(grid.tile[after], grid.tile[after - 1])
    assert torch.equal(grid.row[after], grid.row[after - 1])


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in tiny.MODELS for kind in tiny.KINDS[name]]
)
def test_grids_are_as_long_as_the_placeholders(models, name, kind):
    inputs = tiny.inputs(name, models[name], kind)
    family, config = family_of(name), models[name].config
    vision: dict[str, dict[str, object]] = {}
    for key, value in inputs.items():
        if key.startswith(("pixel_values", "image_", "video_", "batch")):
            modality = "video" if "video" in key else "image"
            vision.setdefault(modality, {})[key] = value
    grids = family.grids(config, vision)
    assert set(grids) == set(vision)
    tokens = family.placeholders(config)
    for ids in set(tokens.values()):
        count = sum((inputs["input_ids"] == token).sum().item() for token in ids)
        alike = [modality for modality in tokens if tokens[modality] == ids]
        assert count == sum(len(grid) for name in alike for grid in grids.get(name, []))


def test_a_video_of_llava_onevision_ends_in_one_newline_of_its_last_frame():
    vision = {"video": {"pixel_values_videos": torch.zeros(2, 3, 3, 56, 56)}}
    first, second = family_of("llava_onevision").grids(tiny.config("llava_onevision"), vision)[
        "video"
    ]
    assert len(first) == len(second) == 3 * 4 + 1
    assert first.frame.tolist() == [0] * 4 + [1] * 4 + [2] * 5
    assert first.kind.nonzero().tolist() == [[12]]
    assert (int(first.row[-1]), int(first.col[-1])) == (1, 2)


# Inputs, without torchvision


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in tiny.MODELS for kind in tiny.KINDS[name]]
)
def test_a_checkpoint_on_disk_answers_about_media(checkpoints, name, kind):
    directory = checkpoints(name)
    config = AutoConfig.from_pretrained(directory)
    files = read_files(directory, config, AutoTokenizer.from_pretrained(directory))
    model = AutoModelForImageTextToText.from_pretrained(directory)
    family = family_of(name)
    media = prepare(family, files, items_of(kind))
    inputs = family.encode(files, media, ask("what is this?", media))
    answer = model.generate(**inputs.tensors, max_new_tokens=2, pad_token_id=tiny.BYTES)
    assert answer.shape[1] == inputs.tensors["input_ids"].shape[1] + 2
    assert all(values.device.type == "cpu" for values in inputs.tensors.values())


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("template", [True, False])
def test_without_a_chat_template_the_official_one_is_taken(name, template):
    family, files = family_of(name), files_of(name, template)
    media = prepare(family, files, items_of("several"))
    turns = [Turn("system", "Be brief."), Turn("user", "First?", 2), Turn("assistant", "Red.")]
    turns.append(Turn("user", "And now?", 1))
    prompt = family.encode(files, media, turns).prompt
    assert prompt == tiny.FAMILIES[name].conversation


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("text", ["<image>", "<video>", "<|image_pad|>", "<|video_pad|>", "</s>"])
def test_special_tokens_in_a_question_stay_text(name, text):
    family, files = family_of(name), files_of(name)
    media = prepare(family, files, items_of("image"))
    plain = family.encode(files, media, ask("what is  here?", media)).tensors["input_ids"]
    asked = family.encode(files, media, ask(f"what is {text} here?", media)).tensors["input_ids"]

    def special(ids: torch.Tensor) -> list[int]:
        return ids[ids >= tiny.BYTES].tolist()

    assert special(asked) == special(plain)
    assert asked.shape[1] > plain.shape[1]


def test_a_question_without_special_tokens_is_not_touched():
    family, files = family_of("llava_onevision"), files_of("llava_onevision")
    media = prepare(family, files, items_of("image"))
    question = "Is 1 < 2 > 0? image <img> <|x|> ↯"
    prompt = family.encode(files, media, ask(question, media)).prompt
    assert question in prompt


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_prompt_without_media_is_text_alone(name):
    made = family_of(name).encode(files_of(name), [], [Turn("user", "Hello?")]).tensors
    types = {"mm_token_type_ids", "token_type_ids"}
    assert set(made) - types == {"input_ids", "attention_mask"}
    assert not any(made[key].any() for key in types & set(made))


def test_a_start_token_in_the_template_is_not_doubled():
    family, files = family_of("llava_next"), files_of("llava_next")
    files = dataclasses.replace(
        files, processor={"chat_template": "{{ bos_token }}" + tiny.TEMPLATES["llava_next"]}
    )
    media = prepare(family, files, items_of("image"))
    ids = family.encode(files, media, ask("what?", media)).tensors["input_ids"]
    assert (ids == tiny.token("llava_next", "<s>")).sum() == 1


def test_a_template_that_forgets_the_media_is_refused():
    family, files = family_of("llava_onevision"), files_of("llava_onevision")
    files = dataclasses.replace(files, processor={"chat_template": "{{ messages[0]['role'] }}"})
    media = prepare(family, files, items_of("image"))
    with pytest.raises(ModelError, match="wrote 0 of 1 image placeholders"):
        family.encode(files, media, ask("what?", media))


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for %}", "does not take this conversation"),
        ("{{ messages.there.is }}", "no attribute 'there'"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ 'x' * 10**10 }}", "more than 1 GiB of memory"),
        ("{{ 'x' * 2000 }}", "more than 1,999 characters"),
        ("{{ 9**(9**9) }}", "runs for more than 2 seconds"),
    ],
)
def test_a_template_that_does_not_take_the_conversation_is_refused(template, fault, monkeypatch):
    monkeypatch.setattr(template_trial, "MOST_CHARACTERS", 1999)
    monkeypatch.setattr(template_trial, "LONGEST_SECONDS", 2.0 if "9**9" in template else 60.0)
    family, files = family_of("llava_onevision"), files_of("llava_onevision")
    files = dataclasses.replace(files, processor={"chat_template": template})
    media = prepare(family, files, items_of("image"))
    with pytest.raises(ModelError, match=rf"chat template .*{fault}"):
        family.encode(files, media, ask("what?", media))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="templates are tried by a fork")
def test_a_template_is_tried_once_for_each_form_of_conversation(monkeypatch):
    fork, forks = os.fork, []
    monkeypatch.setattr(os, "fork", lambda: forks.append(0) or fork())
    monkeypatch.setattr(template_trial, "LONGEST_SECONDS", 2.0)
    family, files = family_of("llava_onevision"), files_of("llava_onevision")
    later = "{{ messages|length > 1 and (messages|length + 7)**(9**9) }}"
    files = dataclasses.replace(files, processor={"chat_template": f"{later}<image>"})
    media = prepare(family, files, items_of("image"))
    for question in ("what?", "where?"):
        family.encode(files, media, ask(question, media))
    assert len(forks) == 1
    with pytest.raises(ModelError, match="runs for more than 2 seconds"):
        family.encode(files, media, [*ask("what?", media), Turn("assistant", "a")])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="templates are tried by a fork")
def test_threads_that_meet_a_template_at_once_try_it_once(monkeypatch):
    fork, forks, meet = os.fork, [], threading.Barrier(4)

    def slow_fork():
        forks.append(threading.get_ident())
        time.sleep(0.1)  # the others would be here before it ends
        return fork()

    def meet_template(_):
        meet.wait()
        template_trial.try_template("{{ 'met by four threads' }}", lambda: "")

    monkeypatch.setattr(os, "fork", slow_fork)
    monkeypatch.setattr(template_trial, "_tried", set())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(meet_template, range(4)))
    assert len(forks) == 1


def test_a_form_of_conversation_is_not_kept():
    case = frozenset(["one of very many that a client may send"])
    kept = weakref.ref(case)
    template_trial.try_template(case, lambda: "")
    del case
    assert kept() is None


def test_a_template_that_was_tried_waits_for_no_other_trial():
    template_trial.try_template("{{ 'tried' }}", lambda: "")
    with ThreadPoolExecutor(1) as pool, template_trial._trial:
        pool.submit(template_trial.try_template, "{{ 'tried' }}", lambda: "").result(10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="templates are tried by a fork")
def test_a_process_that_was_forked_during_a_trial_has_trials_of_its_own():
    with template_trial._trial, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
        if not child:
            signal.alarm(10)
            template_trial.try_template("{{ 'met by a fork' }}", lambda: "")
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_tokenizer_without_the_placeholder_is_refused():
    family = family_of("llava_onevision")
    files = files_of("llava_onevision", tokenizer=tiny.tokenizer("qwen2_5_vl"))
    files = dataclasses.replace(
        files, processor={"chat_template": tiny.TEMPLATES["llava_onevision"]}
    )
    media = prepare(family, files, items_of("video"))
    with pytest.raises(ModelError, match="0 of 81 placeholders of <video>"):
        family.encode(files, media, ask("what?", media))


def test_llava_next_refuses_a_video():
    with pytest.raises(ModelError, match="takes pictures only") as caught:
        prepare(family_of("llava_next"), files_of("llava_next"), items_of("video"))
    assert "Qwen2.5-VL" in caught.value.hint


def test_llava_onevision_refuses_videos_of_different_lengths():
    family, files = family_of("llava_onevision"), files_of("llava_onevision")
    media = prepare(family, files, [(noise(60, 90, 20), 10.0), (noise(60, 90, 12), 10.0)])
    with pytest.raises(ModelError, match="videos of 12 and 20 frames") as caught:
        family.encode(files, media, ask("what?", media))
    assert "12 frames" in caught.value.hint


def test_qwen_refuses_a_picture_two_hundred_times_as_long_as_wide():
    family, files = family_of("qwen2_5_vl"), files_of("qwen2_5_vl")
    with pytest.raises(ModelError, match="201 times"):
        family.plan(files, source_of(torch.empty(1, 3, 1, 201)), Sampling(), 1)


def test_an_interpolation_without_an_equal_is_refused():
    files = files_of("llava_next", image={"resample": 1})
    with pytest.raises(ModelError, match="resample LANCZOS"):
        family_of("llava_next").plan(files, source_of(noise(50, 50)), Sampling(), 1)


# Tiles


@pytest.mark.parametrize("name", ["llava_onevision", "llava_next"])
@pytest.mark.parametrize("max_tiles", [2, 3, 9])
@pytest.mark.parametrize("size", [(90, 150), (1000, 1), (300, 299), (640, 480)])
def test_at_most_max_tiles_are_made_and_the_model_takes_them(models, name, max_tiles, size):
    family, files = family_of(name), files_of(name)
    media = prepare(family, files, [(noise(*size), 0.0)], Sampling(max_tiles=max_tiles))
    inputs = family.encode(files, media, ask("what?", media))
    (tiles,) = inputs.tiles
    assert 1 < tiles <= max_tiles + 1
    with torch.no_grad():
        models[name](**inputs.tensors)


def test_fewer_tiles_than_any_resolution_has_are_refused():
    with pytest.raises(ModelError, match="takes 2 or more"):
        anyres.limited_size((500, 500), tiny.PINPOINTS, tiny.TILE, 1)


def test_pictures_beside_others_are_not_tiled_by_llava_onevision():
    family, files = family_of("llava_onevision"), files_of("llava_onevision")
    media = prepare(family, files, items_of("several"))
    assert family.encode(files, media, ask("what?", media)).tiles == (1, 1, 1)
    media = prepare(family, files, items_of("mixed"))
    assert family.encode(files, media, ask("what?", media)).tiles[0] > 1


# Frames


def planned(name: str, total: int, rate: float, files: Files, **sampling: Any) -> list[int]:
    source = source_of(torch.empty(total, 3, 60, 90, dtype=torch.uint8), rate)
    return list(family_of(name).plan(files, source, Sampling(**sampling), 1).index)


def test_llava_onevision_takes_32_frames_from_first_to_last():
    files = files_of("llava_onevision")
    index = planned("llava_onevision", 100, 25.0, files)
    assert index == [int(i * 99 / 31) for i in range(32)]
    assert planned("llava_onevision", 10, 25.0, files) == list(range(10))
    assert planned("llava_onevision", 100, 25.0, files, max_frames=3) == [0, 49, 99]


def test_llava_onevision_takes_the_checkpoints_own_number_of_frames():
    files = files_of("llava_onevision", video={"num_frames": 8, "size": tiny.TILES})
    assert planned("llava_onevision", 100, 25.0, files) == [i * 100 // 8 for i in range(8)]


def test_qwen_takes_two_frames_a_second_in_pairs():
    files = files_of("qwen2_5_vl")
    assert planned("qwen2_5_vl", 90, 30.0, files) == [0, 15, 30, 45, 60, 75]
    assert planned("qwen2_5_vl", 100, 30.0, files, start=1.0, end=2.0) == [30, 37, 45, 53]
    assert len(planned("qwen2_5_vl", 30, 30.0, files)) == 4
    assert len(planned("qwen2_5_vl", 3, 30.0, files)) == 2
    assert planned("qwen2_5_vl", 1, 30.0, files) == [0]
    assert len(planned("qwen2_5_vl", 900, 1.0, files)) == 768
    assert len(planned("qwen2_5_vl", 900, 30.0, files, max_frames=7)) == 6


@pytest.mark.parametrize("name", VIDEO_MODELS)
def test_no_frames_at_all_are_refused(name):
    with pytest.raises(MediaError, match="max-frames 0 is out of range"):
        planned(name, 100, 25.0, files_of(name), max_frames=0)


@pytest.mark.parametrize("name", VIDEO_MODELS)
def test_frames_asked_for_are_even_and_include_both_ends(name):
    files = files_of(name)
    assert planned(name, 101, 10.0, files, frames=5) == [0, 25, 50, 75, 100]
    assert planned(name, 101, 10.0, files, fps=1.0, max_frames=3) == [0, 50, 100]
    assert planned(name, 101, 10.0, files, frames=3, start=2.0, end=4.0) == [20, 30, 40]


def test_qwens_seconds_a_grid_step_follow_the_frames_taken():
    family, files = family_of("qwen2_5_vl"), files_of("qwen2_5_vl")
    clip = [(noise(60, 90, 100), 10.0)]
    for sampling, seconds in (
        (Sampling(), 1.0),
        (Sampling(frames=4, start=2.0, end=8.0), 4.0),
        (Sampling(fps=1.0), 2.0),
    ):
        media = prepare(family, files, clip, sampling)
        inputs = family.encode(files, media, ask("what?", media))
        assert inputs.tensors["second_per_grid_ts"].tolist() == [seconds]


def test_a_long_video_of_qwen_shares_its_budget_of_pixels():
    family, files = family_of("qwen2_5_vl"), files_of("qwen2_5_vl", video={}, image={})
    for count in (16, 768):
        source = dataclasses.replace(
            source_of(torch.empty(1, 3, 1080, 1920), 2.0),
            num_frames=count,
            timestamps=tuple(i / 2 for i in range(count)),
        )
        plan = family.plan(files, source, Sampling(), 1)
        height, width = plan.transform(noise(1080, 1920)).shape[-2:]
        assert height * width <= 768 * 28 * 28
        assert len(plan.index) // 2 * height * width <= 0.9 * 128_000 * 28 * 28 * 1.3


# Files


def test_files_are_read_from_every_place_where_a_checkpoint_keeps_them(tmp_path):
    config, tokenizer = tiny.config("qwen2_5_vl"), tiny.tokenizer("qwen2_5_vl")
    assert read_files(tmp_path, config, tokenizer).image == {}
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 1}')
    (tmp_path / "chat_template.json").write_text('{"chat_template": "old"}')
    files = read_files(str(tmp_path), config, tokenizer)
    assert files.image == {"min_pixels": 1}
    assert files.video == {}
    assert files.processor == {"chat_template": "old"}
    nested = {"image_processor": {"min_pixels": 2}, "video_processor": {"fps": 3}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    (tmp_path / "chat_template.jinja").write_text("new")
    files = read_files(tmp_path, config, tokenizer)
    assert (files.image, files.video) == ({"min_pixels": 2}, {"fps": 3})
    assert files.processor["chat_template"] == "new"


def test_a_file_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"preprocessor_config\.json of .* is not JSON"):
        read_files(tmp_path, tiny.config("llava_next"), tiny.tokenizer("llava_next"))


def test_files_of_a_hub_id_come_from_the_cache_when_offline(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    (snapshot / "preprocessor_config.json").write_text('{"resample": 2}')
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    files = read_files("some/model", tiny.config("llava_next"), tiny.tokenizer("llava_next"))
    assert files.image == {"resample": 2}


# Against the official processors


def official(directory: Path) -> Any:
    """The official processor; of families that resize by Lanczos the one that uses Pillow.

    From torchvision 0.27 on, transformers takes torchvision's Lanczos for these where nothing is
    said, whose values are others.
    """
    pytest.importorskip("torchvision", reason="the official processors need torchvision")
    from transformers import AutoImageProcessor, AutoProcessor

    name = json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"]
    if name == "smolvlm":
        pytest.importorskip("num2words", reason="the official processor needs num2words")
    processor = AutoProcessor.from_pretrained(directory)
    if name in LANCZOS:
        processor.image_processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    return processor


def assert_official(
    processor: Any, name: str, files: Files, items: Sequence[Item], system: str = ""
) -> None:
    """Every tensor of `encode` is that of the official processor, bit for bit."""
    from transformers.video_utils import VideoMetadata

    family = family_of(name)
    media = prepare(family, files, items)
    turns = ask("what is this? 1 < 2", media, system)
    inputs = family.encode(files, media, turns)
    kinds = [{"type": one.source.kind} for one in media]
    messages = [
        {
            "role": turn.role,
            "content": [*kinds[: turn.media], {"type": "text", "text": turn.text}],
        }
        for turn in turns
    ]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if name == "molmo2":  # its processor puts a start before what the template wrote
        prompt = f"{processor.tokenizer.eos_token}{prompt}"
    assert inputs.prompt == prompt
    options: dict[str, Any] = {}
    pictures = [pixels[0] for pixels, fps in items if not fps]
    if pictures:
        options["images"] = [pictures]
    if len(pictures) < len(items):
        clips = [(pixels, fps, one) for (pixels, fps), one in zip(items, media, strict=True) if fps]
        taken = [list(one.index) for _, _, one in clips]
        if name.startswith("glm"):  # their own sampling repeats a last frame without a partner
            taken = [index + index[-1:] * (len(index) % 2) for index in taken]
        options["videos"] = [clip[0][index] for clip, index in zip(clips, taken, strict=True)]
        options["video_metadata"] = [
            VideoMetadata(total_num_frames=len(pixels), fps=fps, frames_indices=index)
            for (pixels, fps, _), index in zip(clips, taken, strict=True)
        ]
        options["do_sample_frames"] = False
        if name.startswith("qwen"):
            options["cap_pixels_per_frame"] = True
    start = processor.tokenizer.bos_token
    if start is not None and prompt.startswith(start):  # as apply_chat_template itself does it
        options["add_special_tokens"] = False
    expected = processor(text=[prompt], return_tensors="pt", **options)
    assert set(inputs.tensors) == set(expected)
    for key, values in expected.items():
        values = torch.as_tensor(values)
        assert inputs.tensors[key].dtype == values.dtype, key
        assert torch.equal(inputs.tensors[key], values), key


@pytest.mark.parametrize("name", tiny.MODELS)
def test_pictures_are_the_official_processors(tmp_path, name):
    processor, files = official(tiny.build(name, tmp_path)), files_of(name)
    for number, size in enumerate(SIZES):
        if name.startswith(("qwen", "glm")) and max(size) > 200 * min(size):
            continue
        items = [(noise(*size), 0.0)]
        assert_official(processor, name, files, items, "Be brief." if number % 2 else "")
        if size[0] > 4:
            items.append((noise(*SIZES[number - 1]), 0.0))
            if max(SIZES[number - 1]) <= 200 * min(SIZES[number - 1]):
                assert_official(processor, name, files, items)


# SmolVLM's processor has to be told a clip's duration, and has a test of its own.
@pytest.mark.parametrize("name", [name for name in VIDEO_MODELS if name != "smolvlm"])
@pytest.mark.parametrize(("frames", "height", "width", "fps"), CLIPS)
def test_videos_are_the_official_processors(tmp_path, name, frames, height, width, fps):
    processor, files = official(tiny.build(name, tmp_path)), files_of(name)
    clip = (noise(height, width, frames), fps)
    assert_official(processor, name, files, [clip])
    if name not in ("glm4v", "molmo2"):  # pictures or videos
        assert_official(processor, name, files, [(noise(90, 150), 0.0), clip])
    if name != "molmo2":  # one video a question
        assert_official(processor, name, files, [clip, (noise(width, height, frames), fps)])


@pytest.mark.parametrize("name", LANCZOS)
def test_the_lanczos_of_torchvision_is_close_to_ours(name):
    """Within two grey levels, but in few values: on a picture without noise."""
    torchvision = pytest.importorskip("torchvision", reason="it is compared with torchvision")
    if Version(torchvision.__version__) < Version("0.27"):
        pytest.skip("this torchvision has no Lanczos")

    rows, cols = torch.meshgrid(torch.arange(300.0), torch.arange(400.0), indexing="ij")
    waves = [127.5 + 127 * torch.sin(rows / a) * torch.cos(cols / b) for a, b in WAVES]
    pixels = torch.stack(waves).round().to(torch.uint8)[None]
    image = {**tiny.FILES[name]["preprocessor_config.json"], "resample": 1}
    files, family = files_of(name, image=image), family_of(name)
    media = prepare(family, files, [(pixels, 0.0)])
    ours = family.encode(files, media, ask("what?", media)).tensors["pixel_values"]
    kind = getattr(transformers, str(image["image_processor_type"]))
    assert issubclass(kind, transformers.image_processing_backends.TorchvisionBackend)
    made = kind(**{key: image[key] for key in ("size", "max_image_size", "resample")})
    theirs = made([[pixels[0]]], return_tensors="pt")["pixel_values"]
    apart = ((ours - theirs).abs() * 127.5).round()  # grey levels
    assert 0 < apart.max() <= 2
    assert (apart > 0).float().mean() < 0.02


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llava_onevision", {"resample": 2}),
    ("llava_onevision", {"resample": 0}),
    ("llava_onevision", {"do_normalize": False}),
    ("llava_onevision", {"do_rescale": False}),
    ("llava_onevision", {"crop_size": None, "do_center_crop": None, "rescale_factor": 1 / 127.5}),
    ("llava_next", {"size": {"shortest_edge": 70}}),
    ("llava_next", {"size": {"shortest_edge": 40}}),
    ("llava_next", {"size": 56, "crop_size": 56}),
    ("llava_next", {"size": {"height": 60, "width": 60}}),
    ("llava_next", {"size": {"height": 56, "width": 56}, "do_center_crop": False}),
    ("qwen2_5_vl", {"do_normalize": False, "image_mean": [0.1, 0.2, 0.3]}),
    ("qwen2_5_vl", {"min_pixels": None, "max_pixels": None}),
    ("qwen2_5_vl", {"size": {"shortest_edge": 784, "longest_edge": 7840}, "min_pixels": 3136}),
    ("qwen2_5_vl", {"do_resize": False}),
]


@pytest.mark.parametrize(("name", "change"), VARIANTS)
def test_the_checkpoints_own_values_count_as_officially(tmp_path, name, change):
    directory = tiny.build(name, tmp_path)
    path = directory / "preprocessor_config.json"
    values = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps(values))
    processor, files = official(directory), files_of(name, image=values)
    sizes = [(56, 84), (112, 168)] if "do_resize" in change else [(90, 150), (300, 40), (20, 33)]
    for size in sizes:
        assert_official(processor, name, files, [(noise(*size), 0.0)])


REAL: dict[str, dict[str, Any]] = {
    "llava_onevision": {"num_image_tokens": 729, "vision_aspect_ratio": "anyres_max_9"},
    "llava_next": {"patch_size": 14},
    "qwen2_5_vl": {},
}


@pytest.mark.parametrize("name", REAL)
def test_published_sizes_are_the_official_processors(tmp_path, name):
    directory = tiny.build(name, tmp_path)
    kind = tiny.FILES[name]["preprocessor_config.json"]["image_processor_type"]
    image: dict[str, Any] = {"image_processor_type": kind}
    if name == "llava_next":
        image |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    if name == "qwen2_5_vl":
        image |= {"min_pixels": 3136, "max_pixels": 12845056}
    written = tiny.FILES[name]["processor_config.json"] | REAL[name]
    (directory / "processor_config.json").write_text(json.dumps(written))
    (directory / "preprocessor_config.json").write_text(json.dumps(image))
    video = dict(tiny.FILES[name].get("video_preprocessor_config.json", {}))
    if video:
        del video["size"]
        (directory / "video_preprocessor_config.json").write_text(json.dumps(video))
    processor = official(directory)
    ids = {
        f"{modality}_token_{'id' if name == 'qwen2_5_vl' else 'index'}": token
        for modality, (token,) in family_of(name).placeholders(tiny.config(name)).items()
    }
    files = files_of(name, config=CONFIG_MAPPING[name](**ids), image=image, video=video)
    for size in ((480, 640), (2160, 3840), (1920, 300), (100, 100)):
        assert_official(processor, name, files, [(noise(*size), 0.0)])
    if name in VIDEO_MODELS:
        assert_official(processor, name, files, [(noise(360, 640, 24), 6.0)])


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT", "NEON"])
@pytest.mark.parametrize("resample", [0, 2, 3])
def test_resizing_is_torchvisions_on_every_cpu(monkeypatch, capability, resample):
    torchvision = pytest.importorskip("torchvision", reason="it is compared with torchvision")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    mode = torchvision.transforms.InterpolationMode(preprocess.MODES[resample])
    for height, width in ((480, 640), (33, 77), (1000, 1), (56, 100), (1, 50)):
        pixels = noise(height, width, 2)
        expected = torchvision.transforms.v2.functional.resize(pixels, [56, 84], mode)
        assert torch.equal(preprocess.resize(pixels, (56, 84), resample), expected)


def test_resizing_is_chunk_by_chunk_the_same():
    pixels = noise(123, 231, 7)
    whole = preprocess.resize(pixels, (56, 56), 3)
    assert torch.equal(
        whole, torch.cat([preprocess.resize(p, (56, 56), 3) for p in pixels.split(2)])
    )


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_resizing_is_the_same_whatever_torchs_default_dtype(name, kind):
    """Which is the model's for a while, when it is loaded: media are resized meanwhile."""
    if kind not in tiny.KINDS[name]:
        pytest.skip("this family takes no video")
    family, files, items = family_of(name), files_of(name), items_of(kind)
    expected = [one.pixels for one in prepare(family, files, items)]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [one.pixels for one in prepare(family, files, items)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("resample", [2, 3])
def test_resizing_a_plain_picture_keeps_its_colour(resample):
    plain = torch.full((1, 3, 40, 70), 200, dtype=torch.uint8)
    assert torch.equal(
        preprocess.resize(plain, (56, 56), resample), plain[..., :1, :1].expand(1, 3, 56, 56)
    )
