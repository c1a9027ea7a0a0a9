"""Gemma 4's preparation against transformers' own, without torchvision."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import tiny
import tiny_gemma
import torch
import transformers
from click.testing import CliRunner
from conftest import save_clip, save_noise, shared_model
from test_models import (
    SIZES,
    ask,
    assert_official,
    family_of,
    files_of,
    items_of,
    noise,
    official,
    prepare,
)
from test_pictures_places import check_lights, loaded_of
from test_pictures_places import items_of as lights
from test_pixels import PRESET, prepared, prompts, shown

import vtprune
from vtprune.cli import cli
from vtprune.errors import ModelError
from vtprune.models import gemma4
from vtprune.models.base import Sampling, Turn

NAMES = tuple(tiny_gemma.MODELS)
TAKEN = [size for size in SIZES if size[0] * size[1] < 3000 * 2999]


def pixels_of(name: str, size: tuple[int, int], **image: Any) -> dict[str, torch.Tensor]:
    family, files = family_of(name), files_of(name)
    files = replace(files, image={**files.image, **image})
    media = prepare(family, files, [(noise(*size), 0.0)])
    return family.encode(files, media, ask("what?", media)).tensors


@pytest.mark.parametrize("budget", [70, 280])
@pytest.mark.parametrize("size", TAKEN)
def test_pictures_are_the_official_processors_by_pillow(size: tuple[int, int], budget: int) -> None:
    """Places are the same; values too, up to the two ways to resize (and to scale)."""
    kind = getattr(transformers, "Gemma4ImageProcessorPil", None)
    if kind is None:
        pytest.skip("this transformers has no processor by Pillow for this family")
    made = pixels_of("gemma4", size, patch_size=16, max_soft_tokens=budget)
    processor = kind(max_soft_tokens=budget)
    try:
        expected = processor([noise(*size)[0].numpy()], return_tensors="pt")
    except ImportError as error:
        pytest.skip(f"the official processor needs more: {error}")
    assert torch.equal(made["image_position_ids"], expected["image_position_ids"])
    count = int((made["input_ids"] == tiny.token("gemma4", "<|image|>")).sum())
    assert count == int(expected["num_soft_tokens_per_image"][0])
    values, theirs = made["pixel_values"], expected["pixel_values"]
    assert values.dtype == theirs.dtype
    apart = ((values - theirs).abs() * 255).round()
    if max(size) < 640:  # enlarged: the kernels differ in their rounding alone
        assert apart.max() <= 2
    assert (apart > 0).float().mean() < 0.02


def test_a_picture_that_fits_the_budget_is_not_changed() -> None:
    """Then nothing is resized, and values are the official ones but for the last bit."""
    kind = getattr(transformers, "Gemma4ImageProcessorPil", None)
    if kind is None:
        pytest.skip("this transformers has no processor by Pillow for this family")
    made = pixels_of("gemma4", (7 * 48, 10 * 48), patch_size=16)
    expected = kind(max_soft_tokens=70)([noise(7 * 48, 480)[0].numpy()], return_tensors="pt")
    torch.testing.assert_close(made["pixel_values"], expected["pixel_values"], rtol=2e-7, atol=0)


def test_a_unified_models_blocks_are_the_other_ones_patches_together() -> None:
    if "gemma4_unified" not in NAMES:
        pytest.skip("this transformers has no such class")
    plain, unified = (pixels_of(name, (90, 150)) for name in ("gemma4", "gemma4_unified"))
    rows, cols = 6, 10
    blocks = plain["pixel_values"][0, : rows * cols * 9].view(rows, 3, cols, 3, 4, 4, 3)
    joined = blocks.permute(0, 2, 1, 4, 3, 5, 6).reshape(rows * cols, -1)
    assert torch.equal(unified["pixel_values"][0, : rows * cols], joined)
    assert (unified["image_position_ids"][0, rows * cols :] == -1).all()


@pytest.mark.parametrize("name", NAMES)
def test_placeholders_are_the_official_processors(name: str) -> None:
    """The texts that its own processor writes for these counts and times."""
    title = "Gemma4" if name == "gemma4" else "Gemma4Unified"
    try:
        processor = getattr(transformers, f"{title}Processor")
    except ImportError as error:
        pytest.skip(f"the official processor needs more: {error}")
    family, files = family_of(name), files_of(name)
    media = prepare(family, files, items_of("mixed"))
    inputs = family.encode(files, media, ask("what?", media))
    grids = family.media_grids(files, media, family.vision_inputs(files, media))
    written = family.placeholder_texts(files, media, grids)
    tokens = SimpleNamespace(
        boi_token="<|image>", eoi_token="<image|>", image_token="<|image|>", video_token="<|video|>"
    )
    video = media[1]
    times = [number / video.source.fps for number in video.index]
    count = len(grids["video"][0]) // len(video.pixels)
    given = {
        "num_soft_tokens_per_image": [len(grids["image"][0])],
        "num_soft_tokens_per_video": [count],
        "video_metadata": [SimpleNamespace(fps=video.source.fps, timestamps=times)],
    }
    assert written["image"] == [processor.replace_image_token(tokens, given, 0)]
    assert written["video"] == [processor.replace_video_token(tokens, given, 0)]
    assert video.index == tuple(number * 20 // 8 for number in range(8))
    assert set(inputs.tensors["mm_token_type_ids"].unique().tolist()) == {0, 1, 2}


def test_times_are_minutes_and_whole_seconds() -> None:
    family, files = family_of("gemma4"), files_of("gemma4")
    media = prepare(family, files, [(noise(20, 20, 66), 0.5)], Sampling(frames=2))
    ids = family.encode(files, media, ask("what?", media)).tensors["input_ids"][0]
    assert media[0].index == (0, 65)
    assert "02:10 <|image>" in files.tokenizer.decode(ids)


def test_a_budget_that_the_models_do_not_know_is_refused() -> None:
    with pytest.raises(ModelError, match="max_soft_tokens 71; Gemma 4 takes one of 70, 140"):
        pixels_of("gemma4", (50, 50), max_soft_tokens=71)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (37, 9000), (4000, 3000)])
def test_sizes_stay_within_the_budget(size: tuple[int, int]) -> None:
    for budget in gemma4.BUDGETS:
        values = {"patch_size": 16, "pooling_kernel_size": 3, "max_soft_tokens": budget}
        height, width = gemma4.size_within(*size, values)
        assert height % 48 == width % 48 == 0
        assert 0 < height * width <= budget * 48**2


@pytest.mark.parametrize("at", ["input", 2])
@pytest.mark.parametrize("kind", ["several", "video", "mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_pruned_equals_masked(name: str, kind: str, at: str | int) -> None:
    model = shared_model(name)
    inputs = tiny.ragged(name, model, kind)
    stages = [{"at": at, "method": "random", "keep": 0.3, "per": "frame"}]
    letters = torch.arange(65, 81).view(2, 8)  # no placeholders
    with vtprune.pruning(model, {"stages": stages}) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=8, force=letters)
    expected = oracle.masked(model, inputs, oracle.dropped(trace, inputs), tokens)
    torch.testing.assert_close(logits, expected, atol=4e-5, rtol=0)
    unpruned = oracle.generate(model, inputs, steps=1)[1]
    assert (logits[:, :1] - unpruned).abs().max() > 0.01, "the check would not notice a cut"
    with vtprune.pruning(model, {"stages": [{**stages[0], "keep": 1.0}]}):
        assert torch.equal(oracle.generate(model, inputs, steps=1)[1], unpruned)


@pytest.mark.parametrize("at", [1, 4])
def test_a_stage_that_keeps_all_changes_no_bit(at: int) -> None:
    """Layer 4 takes its keys from an earlier one, and gets the last token alone."""
    model = shared_model(NAMES[0])
    inputs = tiny.inputs(NAMES[0], model, "several")
    tokens, unpruned = oracle.generate(model, inputs, steps=4)
    stages = [{"at": at, "method": "random", "keep": 1.0}]
    with vtprune.pruning(model, {"stages": stages}) as trace:
        assert torch.equal(oracle.generate(model, inputs, 4, tokens)[1], unpruned)
    assert [(record.layer, record.after) for record in trace.stages] == [
        (at, trace.stages[0].before)
    ]


@pytest.mark.parametrize("kind", ["video", "mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_what_goes_before_the_tower_equals_the_same_tokens_dropped_at_the_input(
    name: str, kind: str
) -> None:
    model = shared_model(name)
    inputs = prompts(name, model, kind, "ragged")
    media = shown(model, inputs, None)
    with vtprune.pruning(model, PRESET, inputs=prepared(media)) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=4)
    (stage,) = trace.stages
    assert stage.at == "pixels"
    assert any(before > after > 0 for before, after in zip(stage.before, stage.after, strict=True))
    expected = oracle.masked(model, inputs, oracle.dropped(trace, inputs), tokens)
    torch.testing.assert_close(logits, expected, atol=4e-5, rtol=0)


def test_a_light_in_a_tokens_box_changes_that_token() -> None:
    assert check_lights(loaded_of("gemma4"), lights("mixed")) > 3


@torch.no_grad()
def test_fewer_logits_are_the_last_of_all_also_where_they_begin_with_a_dropped_token() -> None:
    """Decoders (from 5.20 on) go on with so many tokens alone where layers take over keys."""
    model = shared_model("gemma4", "eager")
    inputs = tiny.inputs("gemma4", model, "image")
    last = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[-1])
    fewer = inputs["input_ids"].shape[1] - last
    stages = [{"at": 2, "method": "random", "keep": 0.5}]
    with vtprune.pruning(model, {"stages": stages}, seed=1) as trace:
        logits = model(**inputs).logits
        short = model(**inputs, logits_to_keep=fewer).logits
    assert last not in trace.stages[0].kept[0]
    torch.testing.assert_close(short, logits[:, -fewer:])


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_without_a_chat_template_the_official_one_is_taken(name: str, template: bool) -> None:
    family, files = family_of(name), files_of(name, template)
    media = prepare(family, files, [(noise(90, 150), 0.0)] * 3)
    turns = [Turn("system", "Be brief."), Turn("user", "First?", 2), Turn("assistant", "Red.")]
    turns.append(Turn("user", "And now?", 1))
    assert family.encode(files, media, turns).prompt == tiny.FAMILIES[name].conversation


@pytest.mark.parametrize("name", NAMES)
def test_pictures_and_videos_are_the_official_processors(tmp_path: Path, name: str) -> None:
    processor, files = official(tiny.build(name, tmp_path)), files_of(name)
    for size in TAKEN:
        items = [(noise(*size), 0.0), (noise(57, 113), 0.0)]
        assert_official(processor, name, files, items)
        assert_official(processor, name, files, [items[0], (noise(48, 64, 30), 12.5)], "Brief.")


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_asked_about_a_video_and_a_picture(
    name: str, tmp_path: Path, checkpoints: Any
) -> None:
    for path in [save_clip(tmp_path / "clip", 4), save_noise(tmp_path / "noise.png", 90, 150)]:
        args = ["ask", str(path), "what?", "--model", str(checkpoints(name)), "--keep", "0.5"]
        result = CliRunner().invoke(cli, [*args, "--max-new-tokens", "2", "--json"])
        assert result.exit_code == 0, result.stderr
        report = json.loads(result.stdout)
        assert 0 < report["tokens"]["kept_after"] < report["tokens"]["visual"]
        assert not any("not a listed family" in note for note in report["warnings"])
