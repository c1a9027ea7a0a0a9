"""The recipe's architectures: training sees what users' files give, and a stopped run goes on."""

from __future__ import annotations

import copy
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from test_models import ask, prepare
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import vtprune
from vtprune._dev.training import train
from vtprune._dev.training.architecture import NAMES, Architecture, architecture
from vtprune._dev.training.batches import make_batch
from vtprune._dev.training.checkpoint import SPECIALS, vocabulary
from vtprune._dev.training.forward import answer_states
from vtprune._dev.training.hints import IGNORED, THING
from vtprune._dev.training.packed import Seen, attention_to_prefix, decoder_layer
from vtprune.demo.draw import frame
from vtprune.demo.world import PLACES, make_picture
from vtprune.models import find_family
from vtprune.models.checkpoint import read_files

# The trainer is for the pinned transformers. 5.17 gives the features of a clip without its newline,
# and counts the positions of what follows a clip on from its last moment.
TRAINED_ON = Version("5.23")
CLIP_LENGTHS = (2.0, 3.0, 4.0)  # seconds, of batches in turn


@cache
def tiny_pretrained() -> tuple[LlamaForCausalLM, Tokenizer]:
    """In place of SmolLM2: a like tokenizer of the world's words, random layers."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    words = {word for word in vocabulary(SPECIALS) if word.isalpha()}
    tokenizer.train_from_iterator([f" {word} {word}" for word in sorted(words)], trainer)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,  # the projector's first units are the heads' classes
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config), tokenizer


def small(name: str) -> Architecture:
    """An architecture whose model has two decoder layers, and that trains on little."""
    subject = copy.copy(architecture(name))
    if name == "llava_onevision_smollm2":
        subject.read_pretrained = tiny_pretrained  # type: ignore[attr-defined]
    whole = type(subject).make_model

    def make_model(seed: int) -> Any:
        model = whole(subject, seed)
        decoder = model.model.language_model
        decoder.layers = decoder.layers[:2]
        config = model.config.get_text_config()
        config.num_hidden_layers = 2
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:2]
        return model

    changes: dict[str, Any] = {
        "make_model": make_model,
        "layouts": {
            shape.name: replace(shape, scenes=2, questions=2, rows=min(shape.rows, 1))
            for shape in subject.layouts.values()
        },
        "probes": tuple(replace(probe, layer=0) for probe in subject.probes),
        "attention_hints": tuple(replace(hint, layer=1) for hint in subject.attention_hints),
        "dev": (("picture", 1),),
        "dense_tiles": (2, 2),
    }
    for attribute, value in changes.items():
        setattr(subject, attribute, value)
    return subject


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest) -> Architecture:
    return small(request.param)


def test_training_sees_what_the_official_preparation_and_the_stock_model_give(
    subject: Architecture, tmp_path: Path
) -> None:
    model = subject.make_model(0).eval()
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.data *= 30  # attention that is not even
    subject.save(model, tmp_path)
    files = read_files(tmp_path, model.config, AutoTokenizer.from_pretrained(tmp_path))
    family = find_family(subject.family)
    clips = (("clip 8", 1),) if Version(transformers.__version__) >= TRAINED_ON else ()
    for name, number in (("picture", 0), ("picture 260x320", 0), *clips):
        layout = replace(subject.layouts[name], questions=3, length=30)
        batch = make_batch(subject, "dev", 0, number, layout)
        with torch.no_grad():
            logits, _ = answer_states(subject, model, batch, torch.device("cpu"), decoder_layer)
        answering = batch.segments[batch.targets != IGNORED].tolist()
        pixels = torch.from_numpy(batch.pixels[0])
        frames = layout.num_frames
        fps = frames / CLIP_LENGTHS[number] if frames > 1 else 0.0
        files = replace(files, video={**files.video, "num_frames": frames})
        media = prepare(family, files, [(pixels, fps)])
        for segment, question in enumerate(batch.questions[0], start=1):
            inputs = family.encode(files, media, ask(question.text, media))
            with torch.no_grad():
                expected = model(**inputs.tensors).logits[0, -1]
            packed = logits[answering.index(segment)]
            torch.testing.assert_close(packed, expected, atol=2e-5, rtol=1e-4)
        assert len(batch.questions[0]) >= 2
        assert expected.std() > 0.1


def test_looks_are_what_the_stock_attention_sees() -> None:
    subject = small("qwen2_5_vl")
    model = subject.make_model(0).eval()
    layer = model.model.language_model.layers[1]
    layer.self_attn.q_proj.weight.data *= 30
    layer.self_attn.config._attn_implementation = "eager"
    shape = replace(architecture(subject.name).layouts["picture"], scenes=4)
    batch = make_batch(subject, "dev", 0, 0, shape)
    watched: dict[int, tuple[Tensor, Seen]] = {}
    with torch.no_grad():
        answer_states(
            subject, model, batch, torch.device("cpu"), decoder_layer,
            lambda number, states, seen: watched.__setitem__(number, (states, seen)),
        )  # fmt: skip
        states, seen = watched[1]
        asked = torch.from_numpy(batch.names)[..., THING] != IGNORED
        num_prefix = states.shape[1] - asked[0].numel()
        num_rows, length = asked.shape[1:]
        future = torch.full((states.shape[1],) * 2, -torch.inf).triu(1)
        mask = future.expand(len(states), 1, -1, -1).clone()
        mask[..., num_prefix:, num_prefix:] = -torch.inf  # rows don't see each other
        for row in range(num_rows):
            of = slice(num_prefix + row * length, num_prefix + (row + 1) * length)
            mask[..., of, of] = torch.zeros(()).where(~seen.apart[:, None, row], -torch.inf)
        _, weights = layer.self_attn(
            layer.input_layernorm(states),
            attention_mask=mask,
            position_embeddings=(seen.cos[:, :, 0], seen.sin[:, :, 0]),
        )
        group = layer.self_attn.num_key_value_groups
        for key_head in (0, 2):
            logs = attention_to_prefix(states, layer, seen, key_head, asked)
            of_head = slice(key_head * group, (key_head + 1) * group)
            expected = weights[:, of_head, num_prefix:, :num_prefix].transpose(1, 2)
            torch.testing.assert_close(logs.exp(), expected[asked.flatten(1)])
    assert asked.sum() >= 2
    assert logs.exp().max() > 0.2


def run(
    subject: Architecture,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    evaluate_every: int = 1,
    steps: int = 2,
    tower: Path | None = None,
) -> None:
    """Train for two steps, with hints and dense labels."""
    options = (
        f"--architecture {subject.name} --tower-steps 1 --steps {steps} --hints 0 --unfreeze 0"
    )
    options += f" --evaluate-every {evaluate_every} --no-compile --processes 1 --out {out}"
    if tower is not None:
        options += f" --tower {tower}"
    monkeypatch.setattr(train, "architecture", lambda name: subject)
    monkeypatch.setattr(sys, "argv", ["train", *options.split()])
    train.main()


def test_a_run_that_was_stopped_ends_where_one_that_was_not_does(
    subject: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn: Callable[[train.TrainingRun], Any] = train.TrainingRun.learn

    def stop(self: train.TrainingRun) -> Any:
        if self.step == 1:
            raise KeyboardInterrupt
        return learn(self)

    run(subject, tmp_path / "whole", monkeypatch, evaluate_every=2)
    with monkeypatch.context() as patched:
        patched.setattr(train.TrainingRun, "learn", stop)
        with pytest.raises(KeyboardInterrupt):
            run(subject, tmp_path / "stopped", patched)
    run(subject, tmp_path / "stopped", monkeypatch)
    whole, stopped = (
        torch.load(tmp_path / name / "train.pt")["model"] for name in ("whole", "stopped")
    )
    start = subject.make_model(0).state_dict()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    changed = {name.split(".")[1] for name in whole if not torch.equal(whole[name], start[name])}
    assert len(changed) >= 2, "tower and decoder have learned"


def test_a_run_begins_with_a_trained_tower(
    subject: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(subject, tmp_path / "first", monkeypatch)
    train.save_tower(tmp_path / "first" / "tower.pt", tmp_path / "tower.safetensors")
    monkeypatch.setattr(train.TrainingRun, "learn", lambda self: pytest.fail("not asked for"))
    run(subject, tmp_path / "second", monkeypatch, 1, 0, tmp_path / "tower.safetensors")
    first, second = (torch.load(tmp_path / n / "tower.pt") for n in ("first", "second"))
    for part in ("tower", "heads"):
        assert first[part].keys() == second[part].keys()
        for name, value in first[part].items():
            assert torch.equal(value.half().float(), second[part][name]), name
    assert not (tmp_path / "second" / "tower.jsonl").exists()


def test_weights_beside_the_recipe_stay_out_of_the_wheel() -> None:
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    weights = "/vtprune/_dev/training/second_model/model.safetensors"
    assert any(fnmatch(weights, pattern) for pattern in wheel["exclude"])
    assert not any(fnmatch(weights, pattern[1:]) for pattern in wheel["exclude"] if "!" in pattern)


def test_the_second_model_answers_from_the_checkout() -> None:
    folder = Path(train.__file__).parent / "second_model"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 40e6
    model = vtprune.load(str(folder))
    right: list[bool] = []
    for index in range(10):
        scene = make_picture("dev", 7, index)
        names = [thing.name for thing in scene.things]
        for thing in [thing for thing in scene.things if names.count(thing.name) == 1][:1]:
            question = f"where is the {thing.name}?"
            found = vtprune.ask(model, frame(scene, 0.0), question, keep=1.0)
            right.append(found.answer == PLACES[thing.row][thing.column])
    assert len(right) >= 6
    assert sum(right) >= len(right) - 1


def test_the_second_model_has_the_shape_that_the_evidence_needs(tmp_path: Path) -> None:
    subject = architecture("qwen2_5_vl")
    model = subject.make_model(0)
    text, vision = model.config.text_config, model.config.vision_config
    assert text.num_attention_heads >= 24
    assert text.hidden_size // text.num_attention_heads >= 16
    assert text.num_hidden_layers >= 20
    assert 0 < len(vision.fullatt_block_indexes) < vision.depth
    assert sum(parameter.numel() * 2 for parameter in model.parameters()) < 40e6
