"""The packaged catalog, and calibration files."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtprune.errors import PresetError
from vtprune.models import catalog
from vtprune.models.cost import DecoderShape

GOOD = """\
model_type: llava_onevision
layers: 8
hidden_size: 64
ecl: 2
horizon: 6
horizon_text: 8
sources:
  ecl: "measured: 50 pictures, CPU"
  horizon: "measured: 50 pictures, CPU"
"""
ALIASES = {alias.name: alias for alias in catalog.aliases()}
# Their configs say how wide a head is; elsewhere it is the width of the model over the heads.
OWN_HEAD_DIM = ("gemma-3", "internvl3.5", "molmo2", "qwen3-vl")
# Parameters of vision tower, projector and a separate input embedding, where a name counts them and
# they are a large part of it.
BESIDE = {
    "qwen2-vl-2b": 0.67e9,
    "internvl3-1b": 0.44e9,
    "internvl3-2b": 0.54e9,
    "internvl3-38b": 5.5e9,
    "internvl3.5-1b": 0.46e9,
    "internvl3.5-38b": 5.5e9,
    "smolvlm2-256m": 0.12e9,
    "smolvlm2-500m": 0.15e9,
    "smolvlm2-2.2b": 0.53e9,
}


def write(folder: Path, text: str) -> Path:
    path = folder / "calibration.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_stands_for_a_hub_id_in_any_case(name: str) -> None:
    hub_id = ALIASES[name].hub_id
    assert hub_id.count("/") == 1
    assert catalog.resolve(name) == catalog.resolve(name.upper()) == hub_id


@pytest.mark.parametrize("name", ["llava-hf/llava-1.5-7b-hf", "./Model", "gpt", ""])
def test_what_is_no_alias_stays_as_it_is(name: str) -> None:
    assert catalog.resolve(name) == name


def test_llava_next_alone_is_the_7b_vicuna_model() -> None:
    assert catalog.resolve("llava-next") == "llava-hf/llava-v1.6-vicuna-7b-hf"


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_has_a_whole_decoder_shape(name: str) -> None:
    shape = DecoderShape(**ALIASES[name].decoder, gated=True)
    if not name.startswith(OWN_HEAD_DIM):
        assert shape.heads * shape.head_dim == shape.hidden
    assert shape.heads % shape.kv_heads == 0


@pytest.mark.parametrize("name", ALIASES)
def test_a_decoder_shape_has_about_the_parameters_that_its_name_says(name: str) -> None:
    alias = ALIASES[name]
    shape = DecoderShape(**alias.decoder, gated=True)
    attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    layer = attention + 3 * shape.hidden * shape.intermediate
    parameters = shape.layers * layer + shape.vocab * shape.hidden + BESIDE.get(name, 0)
    size = float(alias.parameters[:-1]) * {"B": 1e9, "M": 1e6}[alias.parameters[-1]]
    assert parameters == pytest.approx(size, rel=0.15)


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_shows_a_calibration_with_a_source_for_each_figure(name: str) -> None:
    alias = ALIASES[name]
    found = alias.calibration
    layers = alias.decoder["layers"]
    assert 0 < found.ecl <= layers // 2
    assert found.ecl < found.horizon < layers
    shown = {"ecl", "horizon"} | ({"horizon_text"} if found.horizon_text is not None else set())
    assert set(found.sources) == shown
    kinds = ("paper (arXiv ", "released code (arXiv ", "third party (on arXiv ", "default")
    assert all(source.startswith(kinds) for source in found.sources.values())


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("llava-nxt", "llava-next"),
        ("qwen2.5vl-7b", "qwen2.5-vl-7b"),
        ("Qwen/Qwen2.5-VL-7B", "qwen2.5-vl-7b"),
        ("llava-hf/llava-1.5-7b", "llava-1.5-7b"),
        ("LLaVA-OneVision-05b", "llava-onevision-0.5b"),
        ("qwen3vl-8b", "qwen3-vl-8b"),
        ("OpenGVLab/InternVL3-14B", "internvl3-14b"),
        ("OpenGVLab/InternVL3_5-8B", "internvl3.5-8b"),
        ("OpenGVLab/InternVL3_5-38B", "internvl3.5-38b"),
        ("lmms-lab/llava-next-72b", "llava-next-72b"),
        ("lmms-lab/LLaVA-NeXT-Video-34B", "llava-next-video-34b"),
        ("gemma3-4b", "gemma-3-4b"),
        ("THUDM/GLM-4.1V-9B-Thinking", "glm-4.1v-9b"),
        ("mistralai/Voxtral", None),
        ("", None),
    ],
)
def test_a_misspelt_name_gets_the_alias_that_was_meant(misspelt: str, meant: str | None) -> None:
    assert catalog.suggest(misspelt) == meant


@pytest.mark.parametrize(
    ("model", "figures"),
    [
        (("llava", 32, 4096), (2, 16, 24)),
        (("qwen2_5_vl", 28, 3584), (1, 20, 27)),
    ],
)
def test_a_published_model_is_calibrated_without_a_warning(
    model: tuple[str, int, int], figures: tuple[int, int, int]
) -> None:
    found, warnings = catalog.find_calibration(*model)
    assert (found.ecl, found.horizon, found.horizon_text) == figures
    assert found.sources["ecl"].startswith("released code (arXiv 2602.17196")
    assert found.sources["horizon"].startswith("third party")
    assert found.origin == "packaged"
    assert warnings == []


def test_a_figure_that_nobody_published_is_a_default_and_said() -> None:
    found, warnings = catalog.find_calibration("llava_next", 32, 4096)
    assert (found.ecl, found.horizon, found.horizon_text) == (2, 24, None)
    assert found.sources["ecl"].startswith("released code")
    assert found.sources["horizon"] == "default"
    assert found.origin == "packaged"
    assert len(warnings) == 1
    assert warnings[0].startswith("horizon 24 by default, not measured")


def test_an_unknown_model_gets_the_defaults_and_a_warning() -> None:
    found, warnings = catalog.find_calibration("internvl", 28, 3584)
    assert (found.ecl, found.horizon, found.horizon_text) == (2, 21, None)
    assert found.sources == {"ecl": "default", "horizon": "default"}
    assert found.origin == "default"
    assert len(warnings) == 1
    assert warnings[0].startswith("ecl 2 and horizon 21 by default, not measured")
    assert "internvl with 28 layers of width 3584" in warnings[0]


@pytest.mark.parametrize(
    ("layers", "ecl", "horizon"), [(1, 0, 0), (2, 1, 1), (3, 1, 2), (4, 2, 3), (6, 2, 4)]
)
def test_defaults_stay_inside_a_tiny_model(layers: int, ecl: int, horizon: int) -> None:
    found, _ = catalog.find_calibration("llava", layers, 64)
    assert (found.ecl, found.horizon) == (ecl, horizon)
    assert 0 <= found.ecl <= layers - 1


def test_a_calibration_file_is_read_with_its_sources(tmp_path: Path) -> None:
    found = catalog.read_calibration(
        write(tmp_path, GOOD), 8, model_type="llava_onevision", hidden=64
    )
    assert (found.ecl, found.horizon, found.horizon_text) == (2, 6, 8)
    assert found.sources["ecl"] == "measured: 50 pictures, CPU"
    assert found.sources["horizon_text"].startswith("file ")
    assert found.origin == "file"


def test_a_calibration_file_can_leave_the_text_heavy_horizon_out(tmp_path: Path) -> None:
    text = "model_type: a\nlayers: 8\nhidden_size: 64\necl: 0\nhorizon: 0\n"
    found = catalog.read_calibration(write(tmp_path, text), 8)
    assert (found.ecl, found.horizon, found.horizon_text) == (0, 0, None)
    assert set(found.sources) == {"ecl", "horizon"}


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("ecl: 2", "ecl: 8", r"calibration\.yaml:4: ecl is 8, not a layer from 0 to 7"),
        ("ecl: 2", "ecl: -1", r":4: ecl is -1, not a layer"),
        ("ecl: 2", "ecl: true", r":4: ecl is True, not a layer"),
        ("ecl: 2", "ecl: 2.5", r":4: ecl is 2\.5, not a layer"),
        ("ecl: 2", "ecl:", r":4: ecl is None, not a layer"),
        ("horizon: 6", "horizon: 9", r":5: horizon is 9, not a layer from 0 to 8"),
        ("horizon: 6", "horizon: deep", r":5: horizon is 'deep', not a layer"),
        ("horizon_text: 8", "horizon_text: 99", r":6: horizon_text is 99, not a layer"),
        ("ecl: 2", "elc: 2", r":1: ecl is missing; .*:4: unknown key 'elc'"),
        ("layers: 8", "layers: 32", r":2: layers is 32, but the model's is 8"),
        ("layers: 8", "layers: many", r":2: layers is 'many', not a positive number"),
        ("llava_onevision", "llava", r":1: model_type is 'llava', but the model's is llava_one"),
        ("llava_onevision", "[1]", r":1: model_type is \[1\], not a name"),
        ("hidden_size: 64", "hidden_size: 65", r":3: hidden_size is 65, but the model's is 64"),
        ('  ecl: "', '  elc: "', r":7: sources is .*, not a text for each of ecl, horizon"),
        ('"measured: 50 pictures, CPU"', "5", r":7: sources is .*, not a text"),
        ("ecl: 2", "ecl: 2 3: 4", r", line 4: not valid YAML"),
        ("ecl: 2", "ecl: !!python/name:os.system", r", line 4: not valid YAML"),
        ("ecl: 2", "ecl: 2020-13-45", r", line 4: not valid YAML: 2020-13-45 is not a value of"),
        ("ecl: 2", 'ecl: "\\x00\x01"', r", line 4: not valid YAML: the character U\+0001 is not"),
        ("ecl: 2", "ecl: " + "[" * 5000, r"nested more than 20 deep"),
        (GOOD, "", r":1: a calibration is a mapping"),
        (GOOD, "- 1\n", r":1: a calibration is a mapping"),
        (GOOD, "1: 2\n", r":1: a calibration is a mapping"),
    ],
)
def test_a_bad_calibration_file_is_refused_with_its_line(
    tmp_path: Path, good: str, bad: str, message: str
) -> None:
    path = write(tmp_path, GOOD.replace(good, bad, 1))
    with pytest.raises(PresetError, match=message) as caught:
        catalog.read_calibration(path, 8, model_type="llava_onevision", hidden=64)
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_all_that_is_wrong_in_a_calibration_file_is_said_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("ecl: 2", "ecl: 20").replace("horizon: 6", "horizon: 60"))
    with pytest.raises(PresetError, match=r":4: ecl is 20.*; .*:5: horizon is 60"):
        catalog.read_calibration(path, 8)


def test_a_merged_yaml_mapping_is_no_reason_to_crash(tmp_path: Path) -> None:
    path = write(tmp_path, "<<: {ecl: 90}\n" + GOOD.replace("ecl: 2\n", ""))
    with pytest.raises(PresetError, match="ecl is 90"):
        catalog.read_calibration(path, 8)


def test_a_missing_calibration_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match=r"none\.yaml: can't be read: No such file"):
        catalog.read_calibration(tmp_path / "none.yaml", 8)


def test_a_folder_is_no_calibration_file(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match=r"can't be read: Is a directory"):
        catalog.read_calibration(tmp_path, 8)


def test_a_binary_file_is_no_calibration_file(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x9d")
    with pytest.raises(PresetError, match="not UTF-8 text"):
        catalog.read_calibration(path, 8)
