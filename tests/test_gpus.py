"""Predictions for a card that is not here: its data sheet, its name, what is printed."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from conftest import assert_refused
from rich.console import Console

from vtprune.cli import cli
from vtprune.cli.console.profile import show_profile
from vtprune.errors import ModelError
from vtprune.evaluation.profiling import profile as module
from vtprune.evaluation.profiling.gpus import find_gpu, gpu_names
from vtprune.evaluation.profiling.profile import ProfileOptions, dtype_on, profile
from vtprune.evaluation.profiling.result import Profile


@pytest.mark.parametrize("name", gpu_names())
def test_every_card_has_its_figures_and_their_source(name: str) -> None:
    gpu = find_gpu(name)
    assert gpu.name.endswith(name)
    assert 10e9 < gpu.memory < 300e9
    assert 200e9 < gpu.bandwidth < 10e12
    assert 5e12 < gpu.peak["float32"] < gpu.peak["float16"] < 3e15
    assert "https://" in gpu.source


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("h100 sxm", "NVIDIA H100 SXM"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 SXM 80GB"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA RTX 4090"),
        ("rtx4090", "NVIDIA RTX 4090"),
        ("4090", "NVIDIA RTX 4090"),
        ("Tesla T4", "NVIDIA T4"),
        ("AMD Instinct MI300X", "AMD MI300X"),
        ("H200", "NVIDIA H200 SXM"),
        ("a6000", "NVIDIA RTX A6000"),
    ],
)
def test_a_card_is_found_by_the_names_that_people_and_drivers_use(name: str, full: str) -> None:
    assert find_gpu(name).name == full


@pytest.mark.parametrize(
    ("name", "hint"),
    [("RTX 4900", "RTX 4090"), ("H100", "H100 SXM, H100 PCIe"), ("zzz", "B200")],
)
def test_a_wrong_card_is_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ModelError) as caught:
        find_gpu(name)
    assert hint in str(caught.value.hint)


def predicted(name: str) -> Profile:
    options = ProfileOptions(gpu=name)
    return profile(None, keeps=[0.3], presets=[], options=options)


def test_a_prediction_is_marked_and_has_both_bounds() -> None:
    result = predicted("RTX 4090")
    values = json.loads(json.dumps(result.to_dict()))
    assert values["machine"] == {
        "device": "data sheet", "name": "NVIDIA RTX 4090", "threads": 0, "dtype": "bfloat16",
        "flops_per_second": 165.2e12, "bytes_per_second": 1008e9, "free_bytes": 24 * 10**9,
        "predicted": True, "source": find_gpu("RTX 4090").source,
    } | {"dtype": values["machine"]["dtype"], "flops_per_second":
         values["machine"]["flops_per_second"]}  # fmt: skip
    row = values["rows"][1]
    roofline = row["roofline"]
    assert (values["measured"], row["seconds"], row["fits"]) == (None, None, True)
    assert roofline["decode_bound"] == "bandwidth"
    assert roofline["prefill"] >= max(roofline["prefill_compute"], roofline["prefill_bandwidth"])
    assert values["verdict"].startswith("Predicted from the data sheet of NVIDIA RTX 4090")
    assert any("no run reaches its peaks" in warning for warning in values["warnings"])
    assert "NVIDIA RTX 4090,True" in result.to_csv()


def test_the_table_says_that_it_is_predicted() -> None:
    file = io.StringIO()
    show_profile(predicted("H100 SXM"), Console(file=file, width=80))
    assert "NVIDIA H100 SXM, data sheet:" in file.getvalue()
    assert "3.35 TB/s, 80.0 GB" in file.getvalue()
    assert "nothing; predicted from:" in file.getvalue()
    assert "glennklockwood.com/garden/processors/h100" in file.getvalue().replace("\n", "")
    assert max(map(len, file.getvalue().splitlines())) <= 80


def test_a_decoded_token_takes_as_long_as_reading_takes() -> None:
    slow, fast = (predicted(name).good_rows[0].roofline for name in ("L4", "MI300X"))
    assert slow.decode_bandwidth / fast.decode_bandwidth == pytest.approx(5300 / 300)


def test_a_model_that_is_too_large_for_the_card_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = replace(find_gpu("L4"), memory=1000)
    monkeypatch.setattr(module, "find_gpu", lambda name: small)
    result = predicted("L4")
    assert not any(row.fits for row in result.good_rows)
    assert any("no row fits the memory of NVIDIA L4" in warning for warning in result.warnings)


def test_a_card_without_bfloat16_is_predicted_in_float16() -> None:
    gpu = find_gpu("T4")
    assert dtype_on(gpu, torch.bfloat16) == torch.float16
    assert dtype_on(gpu, torch.float32) == torch.float32
    with pytest.raises(ModelError, match="no peak of bfloat16"):
        gpu.peak_of("bfloat16")


def test_a_card_and_a_device_exclude_each_other() -> None:
    result = CliRunner().invoke(cli, ["profile", "--gpu", "T4", "--device", "cpu"])
    assert_refused(result, "Error: --gpu and --device exclude each other")
