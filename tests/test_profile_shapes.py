"""Shapes of models by name, and the models that are built from them."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import tiny
import tiny_processor
import torch
from transformers import CONFIG_MAPPING

from vtprune.errors import ModelError
from vtprune.evaluation.profiling.profile import ProfileOptions, profile
from vtprune.evaluation.profiling.prompts import ProfiledMedia, make_prompt
from vtprune.evaluation.profiling.shapes import (
    WORD,
    build_random,
    find_shape,
    has_config,
    layer_kinds,
    shallow_config,
    stand_in_tokenizer,
    tower_kinds,
)
from vtprune.inference.measuring import count_vision
from vtprune.inference.roofline import count_weights
from vtprune.models import FAMILIES
from vtprune.models.base import Sampling
from vtprune.models.cost import CostError
from vtprune.models.loading import Loaded
from vtprune.models.names import aliases
from vtprune.models.skeleton import build_skeleton
from vtprune.preset.calibration import packaged_models

# Parameters of the published checkpoints, as their safetensors files count them.
PUBLISHED = {
    "llava-1.5-7b": 7_063_427_072,
    "llava-next-7b-mistral": 7_566_747_648,
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2-vl-72b": 73_405_560_320,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen2.5-vl-72b": 73_410_777_344,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "internvl3-1b": 938_193_024,
    "internvl3-8b": 7_944_373_760,
    "internvl3-38b": 38_388_164_992,
    "internvl3-78b": 78_408_318_336,
    "smolvlm2-256m": 256_484_928,
    "smolvlm2-500m": 507_482_304,
    "smolvlm2-2.2b": 2_246_784_880,
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-27b": 27_432_406_640,
    "glm-4.1v-9b": 10_292_777_472,
    "llama-4-scout": 108_641_793_536,
    "llama-4-maverick": 401_583_781_376,
    "mistral-small-3.1-24b": 24_011_361_280,
}
# Of these, only a rounded figure was at hand: of the model card, or else of the hub's collections.
ROUNDED = {
    "llava-next-8b": "8B",
    "llava-next-34b": "35B",
    "llava-next-72b": "73B",
    "llava-next-110b": "112B",
    "llava-onevision-72b": "73B",
    "llava-next-video-34b": "35B",
    "internvl3.5-1b": "1.1B",
    "internvl3.5-2b": "2.3B",
    "internvl3.5-4b": "4.7B",
    "internvl3.5-8b": "8.5B",
    "internvl3.5-14b": "15.1B",
    "internvl3.5-38b": "38.4B",
}
LISTED = {alias.name: alias.weights for alias in aliases()}
KNOWN = [one for one in aliases() if one.model_type in CONFIG_MAPPING]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_packaged_shape_has_the_published_number_of_parameters(name: str) -> None:
    weights = count_weights(build_skeleton(find_shape(name).config))
    assert weights == PUBLISHED[name] == LISTED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_a_packaged_shape_rounds_to_the_published_size(name: str) -> None:
    weights = count_weights(build_skeleton(find_shape(name).config))
    assert weights == LISTED[name]
    places = len(ROUNDED[name].partition(".")[2].rstrip("B"))
    assert f"{weights / 1e9:.{places}f}B" == ROUNDED[name]


@pytest.mark.parametrize("alias", KNOWN, ids=lambda one: one.name)
def test_every_alias_has_a_whole_shape_with_the_decoder_of_the_catalog(alias: object) -> None:
    shape = find_shape(alias.name)  # type: ignore[attr-defined]
    text = shape.config.get_text_config()
    decoder = alias.decoder  # type: ignore[attr-defined]
    assert (text.num_hidden_layers, text.hidden_size) == (decoder["layers"], decoder["hidden"])
    assert (text.vocab_size, text.intermediate_size) == (decoder["vocab"], decoder["intermediate"])
    assert shape.family.name
    assert shape.source == "packaged"
    height, width = shape.family.largest(shape.files)
    assert min(height, width) >= 224


def test_a_hub_id_of_a_published_model_needs_no_network() -> None:
    assert find_shape("Qwen/Qwen2.5-VL-7B-Instruct").source == "packaged"


def test_the_packaged_model_has_a_shape_by_name_too() -> None:
    named, unnamed = find_shape("embedded"), find_shape()
    assert (named.name, named.source) == (unnamed.name, unnamed.source)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_directory_is_read_with_its_preparation_files(name: str, tmp_path: Path) -> None:
    shape = find_shape(str(tiny.describe(name, tmp_path)))
    assert shape.config.model_type == tiny.config(name).model_type
    assert dict(shape.files.image) == tiny.FILES[name]["preprocessor_config.json"]
    assert not shape.warnings


def test_a_config_file_alone_is_prepared_like_the_family_and_says_so(tmp_path: Path) -> None:
    tiny.config("llava").save_pretrained(tmp_path)
    shape = find_shape(str(tmp_path / "config.json"))
    assert shape.files.image["crop_size"] == {"height": tiny.TILE, "width": tiny.TILE}
    assert "no preprocessor_config.json" in shape.warnings[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "no model_type"), ('{"a": 1}', "no model_type")],
)
def test_a_file_that_is_no_config_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        find_shape(str(path))


def test_a_model_of_no_known_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"transformers has no class for llama that takes pictu"):
        find_shape(str(tmp_path))


def test_a_directory_of_any_other_family_is_prepared_by_its_own_processor(tmp_path: Path) -> None:
    directory = tiny_processor.build("paligemma", tmp_path)
    shape = find_shape(str(directory))
    assert shape.files.assembled is not None
    result = profile(str(directory), options=ProfileOptions(timed=False))
    assert result.input.visual_tokens == 16 * 16
    assert result.good_rows[0].flops.tower > 0
    with pytest.raises(ModelError, match="own processor, which a config alone does not have"):
        find_shape(str(directory / "config.json"))


# Tiles of pictures (the small one of the whole picture included) and tokens, as the processors of
# these models make them: one tile is one tile, four have a fifth, and no more than fit.
SIZES = {
    ("llama4", 336, 336): (1, 144),
    ("llama4", 672, 672): (5, 5 * 144),
    ("llama4", 1344, 1344): (17, 17 * 144),
    ("llama4", 300, 640): (3, 3 * 144),
    ("mistral-small-3.1-24b", 1540, 1540): (1, 55 * 55),
    ("mistral-small-3.1-24b", 3080, 1540): (1, 55 * 28),
    ("paligemma2-3b-448", 900, 100): (1, 32 * 32),
    ("command-a-vision", 1024, 512): (3, 3 * 256),
}


@functools.cache
def published(name: str) -> Loaded:
    shape = find_shape(name)
    return Loaded(name, build_skeleton(shape.config), shape.files, shape.family)


@pytest.mark.parametrize(("name", "width", "height"), SIZES)
def test_pictures_of_published_models_become_tiles_and_tokens(
    name: str, width: int, height: int
) -> None:
    loaded = published(name)
    prompt = make_prompt(loaded, ProfiledMedia("image", width, height), Sampling(), 64)
    tiles, tokens = SIZES[name, width, height]
    assert (sum(prompt.inputs.tiles), len(prompt.layout)) == (tiles, tokens)


def test_the_tower_of_a_published_model_is_counted() -> None:
    loaded = published("paligemma2-3b-448")
    prompt = make_prompt(loaded, ProfiledMedia("image", 448, 448), Sampling(), 64)
    counted = count_vision(loaded, prompt.inputs)
    assert not isinstance(counted, CostError), counted
    assert counted.projector == 2 * 1024 * 1152 * 2304
    layer = 4 * 1152**2 + 2 * 1152 * 4304
    expected = 2 * 1024 * (588 * 1152 + 27 * layer) + 27 * 4 * 1024**2 * 1152
    assert counted.tower == pytest.approx(expected, rel=1e-6)


def test_a_misspelt_name_is_told_the_nearest() -> None:
    with pytest.raises(ModelError) as caught:
        find_shape("llava-nxt")
    assert "llava-next" in caught.value.hint


def test_words_are_alike_and_special_tokens_keep_their_ids() -> None:
    tokenizer = stand_in_tokenizer({"<image>": 300, "<a>": None})
    word, image, other = tokenizer.convert_tokens_to_ids([WORD, "<image>", "<a>"])
    assert image == 300
    assert len({word, image, other}) == 3
    assert tokenizer("one two<image><image>!")["input_ids"] == [word, word, 300, 300, word]


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_random_model_is_as_large_as_a_real_one_and_gives_numbers(name: str) -> None:
    config = tiny.config(name)
    model = build_random(config, torch.device("cpu"), torch.float32)
    assert count_weights(model) == count_weights(tiny.model(name))
    assert all(weight.device.type == "cpu" for weight in model.parameters())
    inputs = tiny.inputs(name, tiny.model(name), "image")
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        logits = model(**inputs).logits
    assert made.shape[1] == inputs["input_ids"].shape[1] + 2
    assert bool(logits.isfinite().all())
    assert float(logits.std()) > 0


def test_a_skeleton_takes_no_memory() -> None:
    model = build_skeleton(find_shape("qwen2.5-vl-72b").config)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


def test_tied_weights_are_one() -> None:
    config = tiny.config("llava_onevision", tie_word_embeddings=True)
    config.get_text_config().tie_word_embeddings = True
    model = build_random(config, torch.device("cpu"), torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_shallow_model_has_every_kind_of_layer(name: str) -> None:
    config = tiny.config(name)
    short = shallow_config(config, 4)
    assert set(layer_kinds(short)) == set(layer_kinds(config))
    assert set(tower_kinds(short)) == set(tower_kinds(config))
    assert short.get_text_config().num_hidden_layers == 4
    assert len(tower_kinds(short)) <= len(tower_kinds(config))
    assert config.get_text_config().num_hidden_layers == tiny.LAYERS  # left as it was


def test_layers_beyond_the_first_use_their_weights_where_memory_is_short() -> None:
    config = tiny.config("llava")
    model = build_random(config, torch.device("cpu"), torch.float32, distinct_layers=1)
    layers = model.get_decoder().layers
    assert layers[5].mlp.up_proj.weight is layers[0].mlp.up_proj.weight
    assert count_weights(layers) == count_weights(layers[0])


def test_every_published_model_is_of_a_family_and_has_a_packaged_config() -> None:
    families = packaged_models()["families"]
    sized = {name for name, entry in families.items() if "pictures" in entry}
    assert {one.model_type for one in aliases()} <= set(FAMILIES) | sized
    assert not sized & set(FAMILIES)
    assert all(map(has_config, aliases()))
