"""The FLOPs of any vision encoder, counted on shapes, equal what torch counts in a real run.

`--zoo` tries every class that the table says is asked with its own processor; without the option,
one for each way in which shapes follow from values.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import family_table
import pytest
import tiny_processor
import torch
import zoo
from conftest import save_noise
from counted import AGREES
from test_generic import with_videos
from test_pictures_places import ask
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import vtprune
from vtprune.errors import ModelError
from vtprune.inference.generate import Generation
from vtprune.inference.measuring import count_vision
from vtprune.inference.prepare import encode
from vtprune.inference.prompt_media import read_media
from vtprune.media import Limits
from vtprune.models.base import Inputs
from vtprune.models.cost import CostError
from vtprune.models.encoder_cost import EncoderCounter
from vtprune.models.loading import Loaded, load
from vtprune.models.skeleton import build_skeleton
from vtprune.models.structure import find_decoder

FEW = ("paligemma", "lfm3_vl", "video_llama_3")
"""Pictures of one size, of tiles, and of patches by their grid."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        rows = family_table.read_table().values()
        asked = [row.model_type for row in rows if (row.how, row.inputs) == ("asked", "processor")]
        metafunc.parametrize("kind", asked if metafunc.config.getoption("--zoo") else FEW)


@functools.cache
def prepare(kind: str) -> tuple[Loaded, Inputs]:
    """A tiny checkpoint of a class, and a prompt with a picture for it."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(str(tiny_processor.build(kind, Path(folder))))
        picture = str(save_noise(Path(folder) / "picture.png", 90, 150))
        media = read_media(loaded, [picture], vtprune.Sampling(), None, Limits(), None)
        return loaded, encode(loaded, media, "what is it?", Generation())


class DecoderReachedError(Exception):
    """All media are encoded."""


def count_real(model: PreTrainedModel, inputs: Inputs) -> int:
    """FLOPs of a model up to its decoder, with its weights, as torch counts them."""

    def stop(*_: object) -> None:
        raise DecoderReachedError

    handle = find_decoder(model).register_forward_pre_hook(stop)
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            model(**{name: fit(model, value) for name, value in inputs.tensors.items()})
    except DecoderReachedError:
        return counter.get_total_flops()
    finally:
        handle.remove()
    raise AssertionError("the decoder was not reached")


def fit(model: PreTrainedModel, value: torch.Tensor) -> torch.Tensor:
    return value.to(model.dtype) if value.is_floating_point() else value


def with_eager_attention(loaded: Loaded) -> PreTrainedModel:
    """The same model again: some towers choose their attention when they are built."""
    model = type(loaded.model)._from_config(loaded.model.config, attn_implementation="eager")
    for part in model.modules():
        if hasattr(part, "fused_attn"):  # of timm
            part.fused_attn = False
        if hasattr(part, "config") and part is not model:
            part.config._attn_implementation = "eager"
    return model.eval().requires_grad_(False)


def test_the_flops_of_any_encoder_are_what_torch_counts(kind: str) -> None:
    if kind not in zoo.MODEL_TYPES or zoo.is_broken(kind):
        pytest.skip("this transformers has no such class, or a broken one")
    try:
        loaded, inputs = prepare(kind)
    except (ModelError, ImportError) as error:
        if kind in FEW:
            raise
        pytest.skip(f"not prepared here: {error}")
    counted = count_vision(loaded, inputs)
    assert not isinstance(counted, CostError), counted
    assert counted.total > 0
    assert counted.total == pytest.approx(
        count_real(with_eager_attention(loaded), inputs), rel=AGREES
    )


def test_a_tower_and_what_follows_it_are_told_apart() -> None:
    loaded, inputs = prepare("paligemma")
    counted = count_vision(loaded, inputs)
    assert not isinstance(counted, CostError)
    tokens = int((inputs.tensors["input_ids"] == loaded.model.config.image_token_id).sum())
    tower, text = loaded.model.config.vision_config, loaded.model.config.text_config
    assert counted.projector == 2 * tokens * tower.hidden_size * text.hidden_size
    assert counted.tower > counted.projector / 2


def test_inputs_of_the_same_sizes_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, inputs = prepare("paligemma")
    built = []
    monkeypatch.setattr(
        "vtprune.models.encoder_cost.build_skeleton",
        lambda config, attention: built.append(config) or build_skeleton(config, attention),
    )
    counter = EncoderCounter(loaded.model)
    first = counter.count(inputs.tensors)
    longer = {
        name: torch.cat([value, value[:, -1:]], dim=1) if value.dim() == 2 else value
        for name, value in inputs.tensors.items()
    }
    assert counter.count(longer) is first
    assert len(built) == 1


def test_an_encoder_whose_shapes_depend_on_weights_has_a_reason_and_no_flops() -> None:
    loaded, inputs = prepare("paligemma")
    model = build_skeleton(loaded.model.config, "eager")
    embed = model.get_input_embeddings()
    embed.register_forward_hook(lambda module, given, output: output[output.abs() > 1])
    counted = EncoderCounter(model).count(inputs.tensors)
    assert isinstance(counted, CostError)
    assert "the FLOPs of a vision encoder that does not run without weights" in counted.message


def test_a_tower_that_sees_fewer_steps_costs_their_share(tmp_path: Path) -> None:
    if "glm5_next" not in zoo.MODEL_TYPES:
        pytest.skip("this transformers has no such class")
    loaded = with_videos(load(str(tiny_processor.build("glm5_next", tmp_path))))
    noise = torch.randint(0, 256, (4, 3, 64, 96), dtype=torch.uint8)
    clip = noise[[0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]]
    question = ask(loaded, [(clip, 4.0)])
    whole = count_vision(loaded, question.inputs)
    assert not isinstance(whole, CostError)
    model = with_eager_attention(loaded)
    counter = FlopCounterMode(display=False)
    tower = model.get_submodule("model.visual")
    tower.register_forward_pre_hook(lambda *_: counter.__enter__() and None)
    tower.register_forward_hook(lambda *_: counter.__exit__(None, None, None))
    stages = [{"at": "pixels", "method": "scenes", "keep": 0.5}]
    with (
        torch.no_grad(),
        vtprune.pruning(model, {"stages": stages}, inputs=question.for_engine()) as trace,
    ):
        model(**question.tensors)
    counted = count_vision(loaded, question.inputs, trace)
    assert not isinstance(counted, CostError), counted
    assert trace.encoded[0]["video"][0] < int(question.tensors["video_grid_thw"][0, 0])
    assert counted.total == pytest.approx(counter.get_total_flops(), rel=AGREES)
    assert counted.total < 0.7 * whole.total
