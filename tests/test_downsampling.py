"""Smaller pictures and fewer frames: the largest within a budget, and a report of the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import answer_together, save_clip, save_noise, shared_model
from PIL import Image

import vtprune
from vtprune.errors import ModelError, PresetError
from vtprune.evaluation.damaged import DamagedFiles
from vtprune.evaluation.evaluate import answer_all
from vtprune.evaluation.records import AnswersFile
from vtprune.evaluation.runner import AskSettings
from vtprune.evaluation.variants import list_variants, repeat_variants
from vtprune.inference import compare, downsampling
from vtprune.inference.answer_questions import answer_questions
from vtprune.inference.downsampling import MediaView, count, shrink_media
from vtprune.inference.generate import Generation
from vtprune.inference.questions_file import Asked
from vtprune.media import open_source
from vtprune.models import cost
from vtprune.models.base import Sampling
from vtprune.models.layer_cost import measure_decoder
from vtprune.models.loading import Loaded, load
from vtprune.preset import load_preset, override
from vtprune.pruners import BASELINES, METHODS
from vtprune.pruners.downsample import Downsample

SHORT = Generation(max_new_tokens=3)
FIXED = [name for name, family in tiny.FAMILIES.items() if family.one_size]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return save_noise(tmp_path / "picture.png", 300, 500)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return save_clip(tmp_path / "clip", 12)


def smaller(loaded: Loaded, paths: list[Path], keep: float, **sampling: int):  # type: ignore[no-untyped-def]
    preset = override(load_preset(None), keep, "downsample")
    return shrink_media(loaded, [open_source(path) for path in paths], Sampling(**sampling), preset)


def ask(loaded: Loaded, paths: list[Path], keep: float | None, **options):  # type: ignore[no-untyped-def]
    preset = options.pop("preset", None)
    method = None if preset else "downsample"
    resolved = override(load_preset(preset), keep, method)
    options.setdefault("generation", SHORT)
    question = options.pop("question", "what?")
    return next(iter(answer_questions(loaded, paths, [question], resolved, **options))).to_dict()


def plain(loaded: Loaded, paths: list[Path], **options):  # type: ignore[no-untyped-def]
    """The report of the unpruned model."""
    return ask(loaded, paths, 1.0, preset="balanced", **options)


# -- choosing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "setting"), [(5, None), (10, 1), (39, 3), (40, 4), (90, 9), (999, 9)]
)
def test_the_largest_setting_within_the_budget_is_found(most: int, setting: int | None) -> None:
    tried: list[int] = []

    def tokens(number: int) -> int:
        tried.append(number)
        return 10 * number

    assert Downsample().choose(tokens, 1, 9, most) == setting
    assert len(tried) <= 4  # even growth is guessed right at once


@pytest.mark.parametrize("most", [1, 500, 12_345, 999_999])
def test_few_settings_are_tried_however_tokens_grow(most: int) -> None:
    for power in (0.3, 1, 2, 5):
        tried: list[int] = []

        def tokens(number: int, power: float = power, tried: list[int] = tried) -> int:
            tried.append(number)
            return int(1_000_000 * (number / 1000) ** power)

        expected = max((n for n in range(1, 1001) if tokens(n) <= most), default=None)
        tried.clear()
        assert Downsample().choose(tokens, 1, 1000, most) == expected
        assert len(tried) <= 2 + 3 * 10


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_blank_pictures_count_as_the_real_ones(
    name: str, kind: str, checkpoints, picture: Path, clip: Path
) -> None:  # type: ignore[no-untyped-def]
    if kind not in tiny.KINDS[name]:
        pytest.skip("this family does not take them")
    loaded = load(str(checkpoints(name)))
    path = picture if kind == "image" else clip
    counted = count(loaded, [MediaView(open_source(path), Sampling())])
    tokens = plain(loaded, [path])["tokens"]
    assert counted.visual == {kind: tokens["visual"]}
    assert counted.text == tokens["text"]


@pytest.mark.parametrize("keep", [0.7, 0.45, 0.3])
@pytest.mark.parametrize("name", [name for name in tiny.MODELS if "video" in tiny.KINDS[name]])
def test_a_video_gives_as_many_frames_as_the_budget_allows(
    name: str, keep: float, checkpoints, clip: Path
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints(name)))
    whole = count(loaded, [MediaView(open_source(clip), Sampling())])
    (look,) = smaller(loaded, [clip], keep).views
    frames = look.sampling.max_frames
    assert frames is not None
    left = count(loaded, [look]).total("video")
    assert 0 < left <= keep * whole.total("video")
    more = [
        count(loaded, [MediaView(look.source, Sampling(max_frames=number))]).total("video")
        for number in range(frames + 1, whole.parts[0] + 1)
    ]
    assert more[-1] == whole.total("video")
    # In a family with a budget of pixels an odd number of frames can have fewer tokens.
    assert not any(left < tokens <= keep * whole.total("video") for tokens in more)


@pytest.mark.parametrize("name", [name for name in tiny.MODELS if name not in FIXED])
def test_a_picture_is_as_large_as_the_budget_allows(name: str, checkpoints, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints(name)))
    source = open_source(picture)
    whole = count(loaded, [MediaView(source, Sampling())]).total("image")
    (look,) = smaller(loaded, [picture], 0.7).views
    left = count(loaded, [look]).total("image")
    assert left <= 0.7 * whole
    if look.size is not None:
        assert look.size[0] / look.size[1] == pytest.approx(300 / 500, rel=0.02)
        larger = [
            MediaView(source, Sampling(), (round(300 * edge / 500), edge))
            for edge in range(look.size[1] + 1, 501, 3)
        ]
    else:
        assert look.sampling.max_tiles is not None
        tiles = range(look.sampling.max_tiles + 1, 20)
        larger = [MediaView(source, Sampling(max_tiles=number)) for number in tiles]
    found = [count(loaded, [one]).total("image") for one in larger]
    assert not any(left < tokens <= 0.7 * whole for tokens in found)


@pytest.mark.parametrize("name", FIXED)
def test_a_family_whose_pictures_are_all_alike_is_refused(
    name: str, checkpoints, picture: Path
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints(name)))
    with pytest.raises(ModelError, match=r"makes the same \d+ tokens of what is given") as caught:
        smaller(loaded, [picture], 0.5)
    assert "--method uniform" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "files"), [("llava_onevision", ["picture"]), ("qwen2_5_vl", ["clip"])]
)
def test_a_budget_that_no_setting_meets_is_refused_with_what_can_be_reached(
    name: str, files: list[str], checkpoints, request: pytest.FixtureRequest
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints(name)))
    paths = [request.getfixturevalue(file) for file in files]
    with pytest.raises(PresetError, match=r"keep 0\.05 can't be reached by downsample") as caught:
        smaller(loaded, paths, 0.05)
    lowest = float(caught.value.message.split()[-1])
    shrunk = smaller(loaded, paths, lowest)
    assert count(loaded, shrunk.views).total("all") <= lowest * shrunk.full_size.total()
    with pytest.raises(PresetError, match="the lowest reachable keep"):
        smaller(loaded, paths, lowest - 0.001)


def test_all_media_of_one_budget_are_lowered_alike(checkpoints, picture: Path, clip: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("qwen2_5_vl")))
    shrunk = smaller(loaded, [picture, clip, picture], 0.5)
    first, video, last = shrunk.views
    assert first.size == last.size
    assert first.size is not None
    assert video.sampling.max_frames == pytest.approx(12 * first.size[1] / 500, abs=1.1)
    left = count(loaded, shrunk.views).total("all")
    assert 0.35 < left / shrunk.full_size.total() <= 0.5


def test_the_users_own_sampling_is_the_whole(checkpoints, clip: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    for own in ({"frames": 8}, {"fps": 1, "max_frames": 8}, {"max_frames": 8}):
        shrunk = smaller(loaded, [clip], 0.5, **own)
        assert shrunk.full_size.total() == 8 * 4 + 1
        assert len(shrunk.views[0].plan(loaded, 1).index) == 3  # 4 frames are 17 of 33 tokens


def test_a_picture_is_resized_before_the_familys_own_resizing(checkpoints, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("qwen2_5_vl")))
    (look,) = smaller(loaded, [picture], 0.3).views
    assert look.size is not None
    with Image.open(picture) as opened:
        pixels = torch.from_numpy(np.array(opened)).permute(2, 0, 1)[None]
    small = downsampling.resize(pixels, look.size, 3)
    expected = loaded.family.plan(loaded.files, look.resized_source, look.sampling, 1).transform(
        small
    )
    assert torch.equal(look.plan(loaded, 1).transform(pixels), expected)


# -- the report -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file"), [("llava_onevision", "clip"), ("llava_onevision",
                         "picture"), ("qwen2_5_vl", "picture"), ("smolvlm", "clip"),
                         ("internvl", "picture")])  # fmt: skip
def test_the_report_tells_the_whole_and_what_was_left(
    name: str, file: str, checkpoints, request: pytest.FixtureRequest
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints(name)))
    path = request.getfixturevalue(file)
    whole, small = plain(loaded, [path]), ask(loaded, [path], 0.7)
    tokens = small["tokens"]
    assert tokens["visual"] == whole["tokens"]["visual"]
    (stage,) = tokens["stages"]
    assert (stage["at"], stage["layer"], stage["method"]) == ("pixels", 0, "downsample")
    assert (stage["before"], stage["after"]) == (tokens["visual"], tokens["kept_after"])
    assert tokens["keep_mean"] == stage["after"] / stage["before"] <= 0.7
    assert sum(tokens["by_frame"] or tokens["by_tile"]) == tokens["kept_after"]
    shape = measure_decoder(loaded.model)
    full = tokens["visual"] + whole["tokens"]["text"]
    assert small["flops"]["prefill_full"] == cost.prefill_flops(shape, [full] * shape.layers)
    left = tokens["kept_after"] + tokens["text"]
    assert small["flops"]["prefill"] == cost.prefill_flops(shape, [left] * shape.layers)
    assert small["kv_cache_bytes"]["full"] == whole["kv_cache_bytes"]["full"]
    for key in ("width", "height", "files", "duration"):
        assert small["input"][key] == whole["input"][key]
    if whole["flops"]["vision"]:
        assert small["flops"]["vision"] < whole["flops"]["vision"]
    assert [one["method"] for one in small["preset"]["stages"]] == ["downsample"]
    assert small["preset"]["stages"][0]["at"] == "pixels"


def test_the_answer_is_that_of_the_smaller_media_alone(checkpoints, clip: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    small = ask(loaded, [clip], 0.5)
    alone = plain(loaded, [clip], sampling=Sampling(max_frames=5))
    assert small["answer"] == alone["answer"]
    assert small["input"]["timestamps"] == alone["input"]["timestamps"]
    assert small["input"]["frames"] == 5
    assert small["tokens"]["text"] == alone["tokens"]["text"]


def test_keep_1_looks_at_everything(checkpoints, clip: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    report = ask(loaded, [clip], 1.0)
    assert report["input"]["frames"] == 12
    assert report["tokens"]["stages"] == []


def test_a_batch_is_answered_as_one_by_one(checkpoints, clip: Path, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("qwen2_5_vl")))
    preset = override(load_preset(None), 0.5, "downsample")
    items = [(clip, "what?"), (picture, "where is it, and what?"), ([clip, picture], "what?")]
    for report in answer_together(loaded, items, preset, generation=SHORT):
        assert report.tokens.keep_mean <= 0.5


def test_compare_is_with_the_input_in_full(
    checkpoints, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    seen: list[tuple[bool, int]] = []
    timed = compare.timed

    def noted(loaded, side, *rest):  # type: ignore[no-untyped-def]
        seen.append((side.preset is None, len(side.question.tensors["pixel_values_videos"][0])))
        return timed(loaded, side, *rest)

    monkeypatch.setattr(compare, "timed", noted)
    report = ask(loaded, [clip], 0.5, compare=True)
    assert set(seen) == {(True, 12), (False, 5)}
    beside = report["compare"]
    assert beside["answer"] == plain(loaded, [clip])["answer"]
    flops = report["flops"]
    assert beside["prefill_predicted"] == flops["prefill_full"] / flops["prefill"]
    assert beside["prefill_roofline"] > 1
    assert beside["seconds"].keys() == {"vision", "prefill", "decode", "first_token", "total"}


# -- with other stages ----------------------------------------------------------------------------


def test_later_stages_keep_fractions_of_the_whole(checkpoints, clip: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    stages = [
        {"at": "pixels", "method": "downsample", "keep": 0.6},
        {"at": 2, "method": "random"},
        {"at": 4, "method": "random", "keep": 0.1},
    ]
    tokens = ask(loaded, [clip], 0.3, preset={"stages": stages})["tokens"]
    # 12 frames of 4 and a newline are 49 tokens; 7 frames are 29 <= 29.4. Of 6 layers and a mean of
    # 0.3 there are 88.2 in all: 2 x 29, then 2 x 11, then 2 x 4.
    assert tokens["visual"] == 49
    assert [(one["layer"], one["before"], one["after"]) for one in tokens["stages"]] == [
        (0, 49, 29), (2, 29, 11), (4, 11, 4),
    ]  # fmt: skip
    assert tokens["keep_mean"] == pytest.approx(88 / 294)


def test_each_modality_can_have_its_own(checkpoints, clip: Path, picture: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("qwen2_5_vl")))
    preset = {
        "video": {"keep": 0.5, "stages": [{"at": "pixels", "method": "downsample"}]},
        "image": {"keep": 0.5, "stages": [{"at": "input", "method": "uniform"}]},
    }
    tokens = ask(loaded, [picture, clip], None, preset=preset)["tokens"]
    assert tokens["visual"] == 60 + 24
    stages = {one["modality"]: one for one in tokens["stages"]}
    assert (stages["image"]["method"], stages["video"]["method"]) == ("uniform", "downsample")
    assert (stages["image"]["before"], stages["image"]["after"]) == (60, 30)
    assert (stages["video"]["before"], stages["video"]["after"]) == (24, 12)
    assert tokens["by_modality"] == {"image": 30, "video": 12}
    assert tokens["keep_mean"] == 0.5


def test_a_stage_that_others_follow_needs_its_own_keep() -> None:
    stages = [{"at": "pixels", "method": "downsample"}, {"at": 2, "method": "random", "keep": 0.2}]
    with pytest.raises(PresetError, match=r"\(downsample, image\) has no keep, and others follow"):
        load_preset({"keep": 0.5, "stages": stages})


def test_without_any_keep_there_is_no_budget(checkpoints, clip: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    preset = {"stages": [{"at": "pixels", "method": "downsample"}]}
    with pytest.raises(PresetError, match="has no keep, and no keep was given"):
        ask(loaded, [clip], None, preset=preset)


# -- where it can't be ----------------------------------------------------------------------------


def test_prepared_inputs_are_refused_with_the_reason() -> None:
    model = shared_model("llava_onevision")
    with (
        pytest.raises(PresetError, match="prepared inputs hold them as they are") as caught,
        vtprune.pruning(model, method="downsample", keep=0.5),
    ):
        pass
    assert "vtprune.answer" in caught.value.hint


@pytest.mark.parametrize("at", ["input", "2", "horizon"])
def test_it_acts_before_the_vision_tower_alone(at: str) -> None:
    with pytest.raises(PresetError, match="it makes media smaller before the vision tower"):
        override(load_preset(None), 0.5, "downsample", at)


def test_the_baselines_are_registered() -> None:
    assert set(BASELINES) <= set(METHODS)
    assert not METHODS["downsample"].exact


# -- in an evaluation -----------------------------------------------------------------------------


def test_questions_are_evaluated_on_less_of_each_file(checkpoints, clip: Path) -> None:  # type: ignore[no-untyped-def]
    loaded = load(str(checkpoints("llava_onevision")))
    asked = [Asked(clip, "what?"), Asked(clip, "where is it?")]
    settings = AskSettings(generation=SHORT)
    cells = repeat_variants(list_variants(["downsample", "predictable"], [0.5, 0.05]), 1)
    book = AnswersFile(None, {})
    answer_all(loaded, asked, cells, book, settings, DamagedFiles())
    key = {cell.row: cell.key for cell in cells}
    for number, one in enumerate(asked):
        record = book.records[number, key["downsample at pixels keep 0.5"]]
        alone = ask(loaded, [clip], 0.5, question=one.question)
        assert record.answer == alone["answer"]
        assert record.keep_mean == alone["tokens"]["keep_mean"] == 21 / 49
        low = book.records[number, key["downsample at pixels keep 0.05"]]
        assert "can't be reached by downsample" in low.error
        assert not book.records[number, key["predictable at pixels keep 0.5"]].error
