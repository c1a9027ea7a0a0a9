"""Qwen-Omni: sound stays as it is, and whole checkpoints are asked by the part that writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny
import torch
from click.testing import CliRunner
from conftest import save_clip, save_noise, shared_model
from safetensors.torch import load_file, save_file
from test_models import ask, family_of, files_of, noise, prepare
from tiny_alike import TOKENS_OF
from transformers import PreTrainedModel, Qwen2_5OmniPreTrainedModel

import vtprune
from vtprune.cli import cli
from vtprune.errors import ModelError
from vtprune.inference.generate import Generation
from vtprune.models.base import Sampling
from vtprune.models.loading import load
from vtprune.models.structure import find_structure

OMNI = [name for name in tiny.ALIKE if "omni" in name]
FRAMES, LONG = 40, 64
"""Frames of sound that a clip has, and that its row of features has room for."""


def with_sound(name: str, kind: str) -> dict[str, Any]:
    """A prompt of a picture, or a clip, and a sound; or of a clip with its own sound."""
    model = shared_model(name)
    marks = {mark: tiny.token(name, text) for mark, text in TOKENS_OF[name].items()}
    made: dict[str, Any] = tiny.inputs(name, model, "image" if kind == "image" else "video")
    ids = made["input_ids"][0].tolist()
    audio = [marks["audio"]] * count_sound(name)
    start, end = ids.index(marks["vision_start"]), ids.index(marks["vision_end"])
    if kind == "clip with its sound":  # steps of the clip, the sound of each behind them
        video = ids[start + 1 : end]
        half, heard = len(video) // 2, len(audio) // 2
        inside = [*video[:half], *audio[:heard], *video[half:], *audio[heard:]]
        block = [marks["audio_start"], *inside, marks["audio_end"]]
        ids[start + 1 : end] = block
        made["use_audio_in_video"] = True
    else:
        ids += [marks["audio_start"], *audio, marks["audio_end"], *b"and?"]
    generator = torch.Generator().manual_seed(3)
    made["input_ids"] = torch.tensor([ids])
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    made["input_features"] = torch.randn(1, 8, LONG, generator=generator)
    made["feature_attention_mask"] = (torch.arange(LONG) < FRAMES).long()[None]
    return made


def count_sound(name: str) -> int:
    """Placeholders of the sound, as the model's encoder counts them."""
    model: Any = find_structure(shared_model(name)).inner
    mask = (torch.arange(LONG) < FRAMES).long()[None]
    features = torch.zeros(1, 8, LONG)
    with torch.no_grad():
        return len(model.get_audio_features(features, mask, return_dict=True).last_hidden_state)


@pytest.mark.parametrize("at", ["input", 2])
@pytest.mark.parametrize("kind", ["image", "video", "clip with its sound"])
@pytest.mark.parametrize("name", OMNI)
def test_sound_is_never_cut_and_pruned_equals_masked(name: str, kind: str, at: str | int) -> None:
    model, inputs = shared_model(name), with_sound(name, kind)
    stages = [{"at": at, "method": "random", "keep": 0.3, "per": "frame"}]
    with vtprune.pruning(model, {"stages": stages}) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=8)
    assert trace.warnings == []
    ids = inputs["input_ids"][0]
    ((_, (columns,)),) = oracle.dropped(trace, inputs)
    visual = [tiny.token(name, TOKENS_OF[name][mark]) for mark in ("image", "video")]
    assert len(columns) > 0
    assert torch.isin(ids[columns], torch.tensor(visual)).all()
    oracle.assert_masked(model, inputs, trace, tokens, logits)
    whole = oracle.generate(model, inputs, steps=1)[1]
    assert (logits[:, :1] - whole).abs().max() > 0.01, "the check would not notice a cut"
    deaf = {**inputs, "input_features": inputs["input_features"] + 1}
    assert (oracle.generate(model, deaf, steps=1)[1] - whole).abs().max() > 1e-3


@pytest.mark.parametrize("name", OMNI)
def test_a_video_without_the_seconds_of_its_steps_is_refused_by_that_name(name: str) -> None:
    model, inputs = shared_model(name), tiny.inputs(name, shared_model(name), "video")
    del inputs["video_second_per_grid"]
    cut = {"stages": [{"at": 2, "method": "random", "keep": 0.3}]}
    message = "the pixels of videos were given without video_second_per_grid"
    with vtprune.pruning(model, cut), pytest.raises(ModelError, match=message) as caught:
        oracle.generate(model, inputs, steps=1)
    assert "pass all that the model's processor gives" in caught.value.hint


@pytest.mark.parametrize("name", OMNI)
def test_seconds_of_a_step_are_official_for_the_official_frames_and_else_real(name: str) -> None:
    family, files = family_of(name), files_of(name)
    official = {"qwen2_5_omni_thinker": 1.0, "qwen3_omni_moe_thinker": 2.0}[name]
    clip = [(noise(60, 90, 100), 10.0)]
    for sampling, seconds in ((Sampling(), official), (Sampling(frames=4, start=2, end=8), 4.0)):
        media = prepare(family, files, clip, sampling)
        tensors = family.encode(files, media, ask("what?", media)).tensors
        assert tensors["video_second_per_grid"].tolist() == [seconds]
        assert "mm_token_type_ids" not in tensors


@pytest.mark.parametrize("name", OMNI)
def test_a_question_about_a_clip_says_that_its_sound_is_left_out(
    name: str, tmp_path: Path, checkpoints: Any
) -> None:
    note = "clip: its sound, if any, is left out; Qwen"
    for path in (save_clip(tmp_path / "clip", 4), save_noise(tmp_path / "noise.png", 90, 150)):
        args = ["ask", str(path), "what?", "--model", str(checkpoints(name))]
        result = CliRunner().invoke(cli, [*args, "--max-new-tokens", "1", "--json"])
        assert result.exit_code == 0, result.stderr
        warned = any(text.startswith(note) for text in json.loads(result.stdout)["warnings"])
        assert warned == (path.name == "clip")


# -- checkpoints of several models in one ---------------------------------------------------------

OTHERS = {"qwen2_5_omni": "token2wav", "qwen3_omni_moe": "code2wav"}


def whole(kind: str, directory: Path) -> Path:
    """A checkpoint as published: the thinker's weights under its name, beside those of others."""
    tiny.build(f"{kind}_thinker", directory)
    weights = {
        f"thinker.{key}": value for key, value in load_file(directory / "model.safetensors").items()
    }
    weights |= {f"{part}.norm.weight": torch.ones(4) for part in ("talker", OTHERS[kind])}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    part = json.loads(path.read_text(encoding="utf-8"))
    dtype = part.pop("dtype")
    fields = {"model_type": kind, "thinker_config": part, "dtype": dtype}
    fields |= {"architectures": ["Qwen2_5OmniModel"]}
    path.write_text(json.dumps(fields), encoding="utf-8")
    return directory


@pytest.mark.parametrize("kind", OTHERS)
def test_of_a_whole_checkpoint_the_thinker_is_asked(kind: str, tmp_path: Path) -> None:
    if f"{kind}_thinker" not in tiny.ALIKE:
        pytest.skip("this transformers has no such class")
    loaded = load(str(whole(kind, tmp_path / "whole")))
    expected = tiny.model(f"{kind}_thinker").state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert all("have no place" in note for note in loaded.warnings)  # of the others, in 5.17
    assert loaded.model.dtype == torch.float32
    assert loaded.model.generation_config.eos_token_id == loaded.files.tokenizer.eos_token_id
    picture = save_noise(tmp_path / "noise.png", 90, 150)
    generation = Generation(max_new_tokens=2)
    (report,) = vtprune.answer(loaded, [(picture, "what?")], keep=0.5, generation=generation)
    assert 0 < report.tokens.kept_after < report.tokens.visual


def test_a_whole_model_says_that_its_thinker_can_be_pruned() -> None:
    class Whole(Qwen2_5OmniPreTrainedModel):
        def __init__(self, thinker: PreTrainedModel) -> None:
            super().__init__(thinker.config)
            self.thinker = thinker

    model = Whole(shared_model("qwen2_5_omni_thinker"))
    with pytest.raises(ModelError, match="of which the thinker reads") as caught:
        find_structure(model)
    assert "vtprune.pruning(model.thinker" in caught.value.hint
