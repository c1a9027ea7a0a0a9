"""Families that share all but little with another one: the little, and a spot check of the rest."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import layer_loop
import oracle
import pytest
import tiny
import torch
from click.testing import CliRunner
from conftest import save_clip, save_noise, shared_model
from counted import AGREES, count, uneven, vision_flops
from test_models import ask, assert_official, family_of, files_of, noise, official, planned, prepare
from test_tower import (
    Watcher,
    check_against_the_model,
)
from test_tower import (
    test_what_goes_before_the_tower_leaves_what_the_others_receive as check_before_the_tower,
)
from test_towers import encode, plain
from transformers import PreTrainedModel

import vtprune
from vtprune.cli import cli
from vtprune.engine.trace import Trace
from vtprune.inference.generate import unfinished_thinking
from vtprune.models import FAMILIES, cost
from vtprune.models.base import Turn
from vtprune.models.structure import find_structure
from vtprune.pruners import METHODS, Method

CASES = [(name, kind) for name in tiny.ALIKE for kind in ("several", tiny.KINDS[name][-1])]
"""Pictures; and a video, beside a picture where the family takes both in one question."""
STATES = ("qwen3_5", "qwen3_5_moe")
"""Those with layers that keep a state, where masking means nothing."""
TOWERS = ("qwen3_5", "glm_ocr", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
"""Those with vision towers of classes of their own."""
GLM = [name for name in tiny.ALIKE if name.startswith("glm")]


@pytest.mark.parametrize("at", ["input", 2])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_pruned_is_exact_and_keep_one_is_bit_identical(name: str, kind: str, at: str | int) -> None:
    model = shared_model(name)
    rows = tiny.two(name, model, kind)
    inputs = tiny.left_pad(name, rows)
    stages = [{"at": at, "method": "random", "keep": 0.3, "per": "frame"}]
    letters = torch.arange(65, 81).view(2, 8)  # no placeholders
    with vtprune.pruning(model, {"stages": stages}) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=8, force=letters)
    assert trace.warnings == []
    if name in STATES:
        assert_loop(model, inputs, rows, trace, tokens, logits)
    else:
        oracle.assert_masked(model, inputs, trace, tokens, logits)
    unpruned = oracle.generate(model, inputs, steps=1)[1]
    assert (logits[:, :1] - unpruned).abs().max() > 0.01, "the check would not notice a cut"
    with vtprune.pruning(model, {"stages": [{**stages[0], "keep": 1.0}]}):
        assert torch.equal(oracle.generate(model, inputs, steps=1)[1], unpruned)


def assert_loop(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    rows: list[dict[str, torch.Tensor]],
    trace: Trace,
    tokens: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    """A pruned batch is the loop over the layers of each of its rows.

    States are summed up in chunks at prefill and by token in decoding, and mixtures of experts
    amplify rounding: the tolerance is a multiple of what that does to the unpruned model.
    """
    whole = oracle.generate(model, inputs, steps=tokens.shape[1], force=tokens)[1]
    for number, row in enumerate(rows):
        padding = inputs["input_ids"].shape[1] - row["input_ids"].shape[1]
        drops = [
            (first, [[column - padding for column in columns[number]]])
            for first, columns in oracle.dropped(trace, inputs)
        ]
        forced = tokens[number : number + 1]
        plain = layer_loop.loop(model, row, [], forced)
        noise = float((whole[number : number + 1] - plain).abs().max())
        expected = layer_loop.loop(model, row, drops, forced)
        tolerance = max(1e-4, 10 * noise)
        torch.testing.assert_close(logits[number : number + 1], expected, atol=tolerance, rtol=0)
        assert tolerance < 1e-2


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_grids_are_as_long_as_the_placeholders(name: str, kind: str) -> None:
    inputs, family = tiny.inputs(name, shared_model(name), kind), family_of(name)
    ids = {token for tokens in family.placeholders(tiny.config(name)).values() for token in tokens}
    vision = {
        modality: {f"{modality}_grid_thw": inputs[f"{modality}_grid_thw"]}
        for modality in ("image", "video")
        if f"{modality}_grid_thw" in inputs
    }
    grids = family.grids(tiny.config(name), vision)
    visual = torch.isin(inputs["input_ids"], torch.tensor(sorted(ids)))
    assert int(visual.sum()) == sum(len(grid) for items in grids.values() for grid in items)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_tower_and_projector_flops_are_what_torch_counts(name: str, kind: str) -> None:
    model = uneven(name)
    tensors = tiny.inputs(name, model, kind)
    seeing: Any = SimpleNamespace(model=find_structure(model).inner)  # 5.17: Qwen-Omni's outer one
    counted = count(lambda: encode(seeing, tensors))
    assert counted > 0
    assert vision_flops(model, tensors) == pytest.approx(counted, rel=AGREES)


@pytest.mark.parametrize("name", [name for name in TOWERS if name in tiny.ALIKE])
def test_towers_are_read_and_cut_like_the_models_own_code(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watcher, "given", [])
    entry = Method(path=f"{Watcher.__module__}:Watcher", at="input", summary="watches")
    monkeypatch.setitem(METHODS, "watcher", entry)
    kind = tiny.KINDS[name][-1]
    if hasattr(shared_model(name).model, "get_image_features"):  # 5.17: Qwen-Omni's outer one
        check_against_the_model(name, tiny.inputs(name, shared_model(name), kind), monkeypatch)
    check_before_the_tower(name, kind)


@pytest.mark.parametrize("name", tiny.ALIKE)
def test_a_vision_shape_needs_the_fields_of_a_config_alone(name: str) -> None:
    config = tiny.config(name)
    shape = cost.vision_shape(config, "image")
    assert shape is not None
    assert cost.vision_shape(plain(config.to_dict()), "image") == shape


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("name", tiny.ALIKE)
def test_without_a_chat_template_the_official_one_is_taken(name: str, template: bool) -> None:
    family, files = family_of(name), files_of(name, template)
    media = prepare(family, files, [(noise(90, 150), 0.0)] * 3)
    turns = [Turn("system", "Be brief."), Turn("user", "First?", 2), Turn("assistant", "Red.")]
    turns.append(Turn("user", "And now?", 1))
    assert family.encode(files, media, turns).prompt == tiny.FAMILIES[name].conversation


@pytest.mark.parametrize("name", tiny.ALIKE)
def test_a_checkpoint_is_asked_about_a_video_and_a_picture(
    name: str, tmp_path: Path, checkpoints: Any
) -> None:
    files = [save_clip(tmp_path / "clip", 4), save_noise(tmp_path / "noise.png", 90, 150)]
    for path in files:
        args = ["ask", str(path), "what?", "--model", str(checkpoints(name)), "--keep", "0.5"]
        result = CliRunner().invoke(cli, [*args, "--max-new-tokens", "2", "--json"])
        assert result.exit_code == 0, result.stderr
        report = json.loads(result.stdout)
        assert 0 < report["tokens"]["kept_after"] < report["tokens"]["visual"]
        assert report["flops"]["vision"] > 0
        assert 0 < report["flops"]["prefill"] < report["flops"]["prefill_full"]
        assert not any("not a listed family" in note for note in report["warnings"])


# Against the official processors


@pytest.mark.parametrize("name", tiny.ALIKE)
def test_pictures_and_videos_are_the_official_processors(tmp_path: Path, name: str) -> None:
    processor, files = official(tiny.build(name, tmp_path)), files_of(name)
    for size in ((90, 150), (57, 113), (300, 40), (20, 33), (640, 480)):
        assert_official(processor, name, files, [(noise(*size), 0.0)], "Be brief.")
    clips = [(noise(60, 90, 30), 30.0), (noise(200, 300, 31), 12.5), (noise(100, 50, 3), 25.0)]
    for clip in clips:
        assert_official(processor, name, files, [clip])
    assert_official(processor, name, files, clips[:2])


SECONDS = [(30, 30.0), (31, 12.5), (300, 29.97), (9, 1.0), (64, 8.0), (2000, 2.0)]
SECONDS += [(917, 23.976), (9001, 29.97), (899, 30.0), (901, 30.0), (5000, 1.0), (80_000, 25.0)]


@pytest.mark.parametrize("name", GLM)
@pytest.mark.parametrize(("frames", "fps"), SECONDS)
def test_frames_are_the_official_processors(
    tmp_path: Path, name: str, frames: int, fps: float
) -> None:
    processor = official(tiny.build(name, tmp_path)).video_processor
    metadata = SimpleNamespace(total_num_frames=frames, fps=fps, duration=frames / fps)
    expected = processor.sample_frames(metadata, fps=2.0).tolist()
    if expected[-2:-1] == expected[-1:]:  # fills the last pair, as patches do
        expected.pop()
    assert planned(name, frames, fps, files_of(name)) == expected


# What is their own


def test_glm_4_6_takes_fewer_frames_a_second_of_longer_clips() -> None:
    files = files_of("glm46v")
    assert planned("glm46v", 300, 30.0, files)[:4] == [0, 5, 10, 15]
    assert len(planned("glm46v", 300, 30.0, files)) == 60
    assert planned("glm46v", 6000, 60.0, files) == list(range(0, 6000, 30))
    assert planned("glm46v", 3000, 1.0, files)[:3] == [0, 4, 9]
    assert planned("glm46v", 3, 30.0, files) == [0]
    assert len(planned("glm46v", 300, 30.0, files, max_frames=3)) == 3


@pytest.mark.parametrize(
    ("name", "times"), [("glm46v", "0.0 seconds"), ("glm4v_moe", "0"), ("glmga", "0.0 seconds")]
)
@pytest.mark.parametrize("model", ["glm4v", "glm46v"])
def test_a_checkpoints_processors_say_how_times_are_written(
    name: str, model: str, times: str
) -> None:
    processor = tiny.FILES[name]["processor_config.json"]
    files, family = files_of(name, processor=processor), family_of(model)
    media = prepare(family, files, [(noise(60, 90, 4), 4.0)])
    ids = family.encode(files, media, ask("what?", media)).tensors["input_ids"][0]
    text = files.tokenizer.decode(ids[ids != tiny.token(name, "<|image|>")])
    assert f"<|end_of_image|>{times}<" in text


def test_an_answer_that_ends_inside_the_thinking_is_warned_of(
    tmp_path: Path, checkpoints: Any
) -> None:
    """Qwen3.5's prompts begin it; its end is text of the answer."""
    picture = save_noise(tmp_path / "noise.png", 90, 150)
    note = "the answer ends inside the model's thinking: it needs more new tokens"
    for name, warned in (("qwen3_5", True), ("glm4v_moe", False)):
        args = ["ask", str(picture), "what?", "--model", str(checkpoints(name))]
        result = CliRunner().invoke(cli, [*args, "--max-new-tokens", "2", "--json"])
        assert (note in json.loads(result.stdout)["warnings"]) == warned
    assert unfinished_thinking("<|assistant|>\n", "<think>It is") == (note,)
    for written in ("<think>It is</think>Red.", "Red."):
        assert unfinished_thinking("<|assistant|>\n", written) == ()
    assert unfinished_thinking("<think>\n", "It is</think>Red.") == ()
    assert unfinished_thinking("<think>\n\n</think>\n\n", "Red.") == ()


def test_every_family_is_tested() -> None:
    tested = {family.config(lambda text: 0)["model_type"] for family in tiny.FAMILIES.values()}
    missing = set(FAMILIES) - tested - {"qwen3_vl_moe"}  # which test_moe.py has
    assert not missing - {"molmo2"}
