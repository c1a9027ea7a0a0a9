"""Calibrations: packaged ones, defaults, and calibration files."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtprune.errors import PresetError
from vtprune.preset.calibration import find_calibration, read_calibration

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


def write(folder: Path, text: str) -> Path:
    path = folder / "calibration.yaml"
    path.write_text(text)
    return path


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
    found, warnings = find_calibration(*model)
    assert (found.ecl, found.horizon, found.horizon_text) == figures
    assert found.sources["ecl"].startswith("released code (arXiv 2602.17196")
    assert found.sources["horizon"].startswith("third party")
    assert found.origin == "packaged"
    assert warnings == []


def test_a_figure_that_nobody_published_is_a_default_and_said() -> None:
    found, warnings = find_calibration("llava_next", 32, 4096)
    assert (found.ecl, found.horizon, found.horizon_text) == (2, 24, None)
    assert found.sources["ecl"].startswith("released code")
    assert found.sources["horizon"] == "default"
    assert found.origin == "packaged"
    assert len(warnings) == 1
    assert warnings[0].startswith("horizon 24 by default, not measured")


def test_an_unknown_model_gets_the_defaults_and_a_warning() -> None:
    found, warnings = find_calibration("internvl", 28, 3584)
    assert (found.ecl, found.horizon, found.horizon_text) == (2, 21, None)
    assert found.sources == {"ecl": "default", "horizon": "default"}
    assert found.origin == "default"
    assert [warning.split(",")[0] for warning in warnings] == [
        "ecl 2 by default",
        "horizon 21 by default",
    ]
    assert all("internvl with 28 layers of width 3584" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("layers", "ecl", "horizon"), [(1, 0, 0), (2, 1, 1), (3, 1, 2), (4, 2, 3), (6, 2, 4)]
)
def test_defaults_stay_inside_a_tiny_model(layers: int, ecl: int, horizon: int) -> None:
    found, _ = find_calibration("llava", layers, 64)
    assert (found.ecl, found.horizon) == (ecl, horizon)
    assert 0 <= found.ecl <= layers - 1


def test_a_calibration_file_is_read_with_its_sources(tmp_path: Path) -> None:
    found = read_calibration(write(tmp_path, GOOD), 8, model_type="llava_onevision", hidden=64)
    assert (found.ecl, found.horizon, found.horizon_text) == (2, 6, 8)
    assert found.sources["ecl"] == "measured: 50 pictures, CPU"
    assert found.sources["horizon_text"].startswith("file ")
    assert found.origin == "file"


def test_a_calibration_file_can_leave_the_text_heavy_horizon_out(tmp_path: Path) -> None:
    text = "model_type: a\nlayers: 8\nhidden_size: 64\necl: 0\nhorizon: 0\n"
    found = read_calibration(write(tmp_path, text), 8)
    assert (found.ecl, found.horizon, found.horizon_text) == (0, 0, None)
    assert set(found.sources) == {"ecl", "horizon"}


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("ecl: 2", "ecl: 8", r"calibration\.yaml: line 4: ecl: 8 is not a layer from 0 to 7"),
        ("ecl: 2", "ecl: -1", r": line 4: ecl: -1 is not a layer"),
        ("ecl: 2", "ecl: true", r": line 4: ecl: True is not a layer"),
        ("ecl: 2", "ecl: 2.5", r": line 4: ecl: 2\.5 is not a layer"),
        ("ecl: 2", "ecl:", r": line 4: ecl: None is not a layer"),
        ("horizon: 6", "horizon: 9", r": line 5: horizon: 9 is not a layer from 0 to 8"),
        ("horizon: 6", "horizon: deep", r": line 5: horizon: 'deep' is not a layer"),
        ("horizon_text: 8", "horizon_text: 99", r": line 6: horizon_text: 99 is not a layer"),
        (
            "ecl: 2",
            "elc: 2",
            r": line 1: ecl is missing; line 4: unknown key 'elc'",
        ),
        ("layers: 8", "layers: 32", r": line 2: layers: 32, but the model's is 8"),
        ("layers: 8", "layers: many", r": line 2: layers: 'many' is not a whole number from 1 on"),
        (
            "llava_onevision",
            "llava",
            r": line 1: model_type: 'llava', but the model's",
        ),
        ("llava_onevision", "[1]", r": line 1: model_type: \[1\] is not text"),
        ("hidden_size: 64", "hidden_size: 65", r": line 3: hidden_size: 65, but the model's is 64"),
        ('  ecl: "', '  elc: "', r": line 8: unknown key 'elc', did you mean ecl"),
        ('"measured: 50 pictures, CPU"', "5", r": line 8: ecl: 5 is not text"),
        ("ecl: 2", "ecl: 2 3: 4", r", line 4: not valid YAML"),
        ("ecl: 2", "ecl: !!python/name:os.system", r", line 4: not valid YAML"),
        ("ecl: 2", "ecl: 2020-13-45", r", line 4: not valid YAML: 2020-13-45 is not a value of"),
        ("ecl: 2", 'ecl: "\\x00\x01"', r", line 4: not valid YAML: the character U\+0001 is not"),
        ("ecl: 2", "ecl: " + "[" * 5000, r"nested more than 20 deep"),
        (GOOD, "", r"a calibration must be a mapping of keys"),
        (GOOD, "- 1\n", r": line 1: a calibration must be a mapping of keys"),
        (GOOD, "1: 2\n", r"line 1: unknown key 1 "),
    ],
)
def test_a_bad_calibration_file_is_refused_with_its_line(
    tmp_path: Path, good: str, bad: str, message: str
) -> None:
    path = write(tmp_path, GOOD.replace(good, bad, 1))
    with pytest.raises(PresetError, match=message) as caught:
        read_calibration(path, 8, model_type="llava_onevision", hidden=64)
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_all_that_is_wrong_in_a_calibration_file_is_said_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("ecl: 2", "ecl: 20").replace("horizon: 6", "horizon: 60"))
    with pytest.raises(PresetError, match=r": line 4: ecl: 20 .*; line 5: horizon: 60 is"):
        read_calibration(path, 8)


def test_a_merged_yaml_mapping_is_no_reason_to_crash(tmp_path: Path) -> None:
    path = write(tmp_path, "<<: {ecl: 90}\n" + GOOD.replace("ecl: 2\n", ""))
    with pytest.raises(PresetError, match="ecl: 90 is not a layer"):
        read_calibration(path, 8)


def test_a_missing_calibration_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match=r"none\.yaml: can't be read: No such file"):
        read_calibration(tmp_path / "none.yaml", 8)


def test_a_folder_is_no_calibration_file(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match=r"can't be read: Is a directory"):
        read_calibration(tmp_path, 8)


def test_a_binary_file_is_no_calibration_file(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x9d")
    with pytest.raises(PresetError, match="not UTF-8 text"):
        read_calibration(path, 8)
