"""Boxes of visual tokens: a light put at a token's box must change that token, in every family."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import shared_model
from torch import nn

from vtprune.inference.generate import Generation, generate
from vtprune.inference.kept_tokens import KeptTokens, keep_record
from vtprune.inference.places import TokenPlace, find_places
from vtprune.inference.prepare import PreparedQuestion, prepare_question
from vtprune.inference.prompt_media import PromptMedia
from vtprune.media import Source
from vtprune.models import find_family
from vtprune.models.base import Files, PreparedMedia, Sampling
from vtprune.models.loading import Loaded
from vtprune.preset import load_preset, override

GREY, LIGHT = 90, 250
Item = tuple[torch.Tensor, float]
"""Pixels, and frames a second; 0 for a picture."""
CASES = [
    (name, kind) for name in tiny.MODELS for kind in tiny.KINDS[name] if name != "llava-pixtral"
] + [("qwen3_5", "image"), ("glm46v", "video"), ("qwen2_5_omni_thinker", "video")]


def loaded_of(name: str, **image: object) -> Loaded:
    """A tiny model with the files of its checkpoint."""
    values, config = tiny.FILES[name], tiny.config(name)
    family = find_family(config.model_type)
    assert family is not None
    files = Files(
        config,
        tiny.tokenizer(name),
        {**values["preprocessor_config.json"], **image},
        values.get("video_preprocessor_config.json", {}),
    )
    return Loaded(name, shared_model(name), files, family)


def source_of(pixels: torch.Tensor, fps: float) -> Source:
    count, _, height, width = pixels.shape
    times = tuple(number / fps for number in range(count)) if fps else ()
    kind, name = ("video", "clip.mp4") if fps else ("image", "page.png")
    return Source(
        Path(name), kind, width, height, count, times, fps, count / fps if fps else 0.0, "none", ()
    )


def ask(
    loaded: Loaded, items: Sequence[Item], sampling: Sampling | None = None
) -> PreparedQuestion:
    """Pixels through a family's real preparation."""
    prepared = []
    for pixels, fps in items:
        source = source_of(pixels, fps)
        alike = sum(bool(other) == bool(fps) for _, other in items)
        plan = loaded.family.plan(loaded.files, source, sampling or Sampling(), alike)
        times = tuple(source.timestamps[number] for number in plan.index) if fps else ()
        rows = plan.transform(pixels[list(plan.index)])
        prepared.append(
            PreparedMedia(source, rows, plan.index, times, plan.regions, plan.transform)
        )
    sources = tuple(item.source for item in prepared)
    media = PromptMedia(tuple(prepared), ("none",) * len(items), (), 0.0, 0.0, sources)
    return prepare_question(loaded, media, "what?", Generation(1))


def kept_of(loaded: Loaded, question: PreparedQuestion, **pruned: Any) -> KeptTokens:
    preset = override(load_preset(None), **({"keep": 0.5, "method": "uniform"} | pruned))
    (run,) = generate(loaded, [question], preset, Generation(1))
    kept = keep_record(loaded, question, run.trace, 0)
    assert kept is not None
    return kept


@contextmanager
def tokens_apart(model: nn.Module, decoder: nn.Module) -> Any:
    """Inside, no layer of a vision tower does anything: a token shows its own pixels alone."""
    handles = []

    def skip(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    inside = {id(module) for module in decoder.modules()}
    for module in model.modules():
        if id(module) in inside or not isinstance(module, nn.ModuleList):
            continue
        for layer in module:
            if type(layer).__name__.endswith(("Layer", "Block")):
                handles.append(layer.register_forward_hook(skip, with_kwargs=True))
    assert handles
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _StopError(Exception):
    pass


def features(loaded: Loaded, question: PreparedQuestion) -> torch.Tensor:
    """The embeddings of the prompt as the language model gets them, (S, d)."""
    model, seen = loaded.model, []

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["inputs_embeds"][0])
        raise _StopError

    decoder = model.get_decoder()
    handle = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), tokens_apart(model, decoder), suppress(_StopError):
            model(**question.tensors)
    finally:
        handle.remove()
    return seen[0]


def lit(pixels: torch.Tensor, place: TokenPlace) -> torch.Tensor:
    """A light in the middle of a token's box, in its frames alone."""
    assert place.box is not None
    left, top, right, bottom = place.box
    across, down = (right - left) / 5, (bottom - top) / 5
    rows = slice(round(top + down), max(round(bottom - down), round(top + down) + 1))
    cols = slice(round(left + across), max(round(right - across), round(left + across) + 1))
    changed = pixels.clone()
    changed[list(place.frames) or [0], :, rows, cols] = LIGHT
    return changed


def plain(height: int, width: int, count: int = 1) -> torch.Tensor:
    return torch.full((count, 3, height, width), GREY, dtype=torch.uint8)


def items_of(kind: str) -> list[Item]:
    picture, clip = (plain(270, 450), 0.0), (plain(180, 270, 10), 5.0)
    return {
        "image": [picture],
        "several": [picture, (plain(400, 140), 0.0)],
        "video": [clip],
        "mixed": [picture, clip],
    }[kind]


def check_lights(loaded: Loaded, items: list[Item], sampling: Sampling | None = None) -> int:
    """Light some tokens one by one; that token changes most of all in its resolution."""
    question = ask(loaded, items, sampling)
    places = [one for one in find_places(kept_of(loaded, question)) if one.box is not None]
    dark = features(loaded, question)
    step = max(len(places) // 9, 1)
    for place in places[step // 2 :: step]:
        changed = list(items)
        pixels, fps = items[place.media]
        changed[place.media] = (lit(pixels, place), fps)
        distance = (features(loaded, ask(loaded, changed, sampling)) - dark).norm(dim=1)
        rivals = [
            other
            for other in places
            if other.media == place.media and (other.tile > 0) == (place.tile > 0)
        ]
        most = max(rivals, key=lambda other: float(distance[other.column]))
        assert most.frame == place.frame
        if most.column != place.column:  # a copy of the same place, such as a crop of the picture
            assert most.box is not None
            assert place.box is not None
            assert overlap(most.box, place.box) > 0.5, (place, most)
        others = [one for one in places if one.media != place.media]
        assert all(float(distance[one.column]) < 1e-4 for one in others)
    return len(places)


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Shared area, as a fraction of the smaller."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return max(width, 0) * max(height, 0) / min(areas)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_light_in_a_tokens_box_changes_that_token(name: str, kind: str) -> None:
    assert check_lights(loaded_of(name), items_of(kind)) > 3


@pytest.mark.parametrize(
    ("name", "values", "size"),
    [
        ("gemma3", {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 64}, (140, 450)),
        ("llava", {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}, (140, 400)),
        ("llava_onevision", {}, (1200, 800)),
        ("llava_next", {}, (500, 90)),
        ("internvl", {}, (90, 500)),
        ("idefics3", {}, (500, 200)),
        ("molmo2", {}, (200, 610)),
    ],
)
def test_crops_padding_and_long_pictures_are_followed(
    name: str, values: dict[str, object], size: tuple[int, int]
) -> None:
    assert check_lights(loaded_of(name, **values), [(plain(*size), 0.0)]) > 3


def test_fewer_tiles_are_followed() -> None:
    loaded = loaded_of("llava_next")
    check_lights(loaded, [(plain(300, 300), 0.0)], Sampling(max_tiles=2))


def test_boxes_of_a_frame_cover_it_and_do_not_overlap() -> None:
    loaded = loaded_of("qwen2_5_vl")
    places = find_places(kept_of(loaded, ask(loaded, items_of("video"))))
    for frame in {one.frame for one in places}:
        boxes = [one.box for one in places if one.frame == frame and one.box is not None]
        area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in boxes)
        assert area == pytest.approx(180 * 270, rel=0.02)
        assert min(box[0] for box in boxes) == pytest.approx(0, abs=1.5)
        assert max(box[2] for box in boxes) == pytest.approx(270, abs=1.5)


def boxes_of(name: str, height: int, width: int) -> dict[tuple[int, int, int], tuple[float, ...]]:
    """Tile, row and column of a picture's tokens -> their boxes."""
    loaded = loaded_of(name)
    places = find_places(kept_of(loaded, ask(loaded, [(plain(height, width), 0.0)])))
    return {(one.tile, one.row, one.col): one.box for one in places if one.box is not None}


def test_boxes_of_a_cropped_picture_are_those_of_arithmetic() -> None:
    """LLaVA: the shorter side is resized to the crop, whose middle is divided into patches."""
    boxes = boxes_of("llava", 240, 320)
    side = max(row for _, row, _ in boxes) + 1
    assert len(boxes) == side**2
    for (_, row, col), found in boxes.items():
        left, top = 40 + col * 240 / side, row * 240 / side
        assert found == pytest.approx((left, top, left + 240 / side, top + 240 / side), abs=1.5)


def test_boxes_of_windows_merged_two_by_two_are_those_of_arithmetic() -> None:
    """Qwen2.5-VL: sides are rounded to whole windows of two by two patches, one token each."""
    config = tiny.config("qwen2_5_vl").vision_config
    window = config.patch_size * config.spatial_merge_size
    height, width = 5 * window, 9 * window
    boxes = boxes_of("qwen2_5_vl", height, width)
    for (_, row, col), found in boxes.items():
        left, top = col * window, row * window
        assert found == pytest.approx((left, top, left + window, top + window), abs=1.5)
    assert len(boxes) == 45


def test_boxes_of_tiles_are_those_of_arithmetic() -> None:
    """LLaVA-NeXT: a picture of two tiles' size is divided into them, rows going through both."""
    tile = tiny.config("llava_next").vision_config.image_size
    side = tile // tiny.config("llava_next").vision_config.patch_size
    boxes = boxes_of("llava_next", tile, 2 * tile)
    patch = tile / side
    tiles = {key: found for key, found in boxes.items() if key[0] > 0}
    assert len(tiles) == 2 * side**2
    corners = sorted((round(found[1] / patch), round(found[0] / patch)) for found in tiles.values())
    assert corners == [(row, col) for row in range(side) for col in range(2 * side)]
    base = {key: found for key, found in boxes.items() if key[0] == 0}
    assert len(base) == side**2
    for (_, row, col), found in base.items():  # the whole picture, resized to a square
        expected = (2 * col * patch, row * patch, 2 * (col + 1) * patch, (row + 1) * patch)
        assert found == pytest.approx(expected, abs=1.5)


def test_frames_of_a_group_and_their_times_are_told() -> None:
    loaded = loaded_of("qwen2_5_vl")
    clip = [(plain(60, 90, 20), 10.0)]
    places = find_places(kept_of(loaded, ask(loaded, clip, Sampling(frames=5))))
    assert {one.frame: len(one.frames) for one in places} == {0: 2, 1: 2, 2: 1}
    assert all(
        second == pytest.approx(number / 10)
        for one in places
        for number, second in zip(one.frames, one.seconds, strict=True)
    )


def test_newlines_have_no_box() -> None:
    loaded = loaded_of("llava_next")
    places = find_places(kept_of(loaded, ask(loaded, items_of("image"))))
    kinds = {one.kind: {other.box is None for other in places if other.kind == one.kind}
             for one in places}  # fmt: skip
    assert kinds["newline"] == {True}
    assert kinds["patch"] == {False}


def test_what_a_token_was_merged_into_is_told() -> None:
    loaded = loaded_of("qwen2_5_vl")
    kept = kept_of(loaded, ask(loaded, items_of("image")), method="visionzip")
    stage = kept.stages[0]
    assert stage.merged_into
    assert set(stage.merged_into.values()) <= stage.kept
    assert not set(stage.merged_into) & stage.kept


def test_tokens_of_other_media_than_were_read_are_not_guessed_at() -> None:
    loaded = loaded_of("llava")
    question = ask(loaded, [(plain(80, 80), 0.0)])
    several = ask(loaded, [(plain(80, 80), 0.0)] * 3)
    preset = override(load_preset(None), keep=0.5, method="uniform")
    (run,) = generate(loaded, [several], preset, Generation(1))
    assert keep_record(loaded, several, run.trace, 0) is not None
    assert keep_record(loaded, question, run.trace, 0) is None


def test_what_was_kept_can_be_pickled_without_pixels() -> None:
    loaded = loaded_of("llava_next")
    kept = kept_of(loaded, ask(loaded, [(plain(900, 900), 0.0)]))
    data = pickle.dumps(kept)
    assert len(data) < 60_000
    assert find_places(pickle.loads(data)) == find_places(kept)
