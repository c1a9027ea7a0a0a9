"""The report's fields: their names are fixed, and none that is missing can be shown as 0."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import pytest
from conftest import save_noise
from reports import report_of
from test_console import COMPARE, REPORT

import vtprune
from vtprune.inference import report
from vtprune.inference.generate import Generation
from vtprune.models.loading import load

BLOCKS = {
    "model": "name family layers parameters device dtype attention pruned_equals",
    "input": "files modality frames tiles timestamps decoder duration width height sha256",
    "preset": "name description keep seed method changed evidence stages",
    "tokens": "visual text answer keep_mean kept_after by_modality stages by_frame by_tile",
    "flops": "vision prefill prefill_full decode decode_full reduction",
    "kv_cache_bytes": "kept full state",
    "memory_bytes": "weights peak",
    "seconds": "startup load media preprocess vision select prefill decode first_token total",
    "compare": "answer same_answer seconds prefill_speedup prefill_predicted prefill_roofline "
    "realised_fraction first_token_speedup total_speedup pairs",
    "version": "vtprune torch transformers",
    "host": "cpu cores gpus os python",
}
"""Every block of the JSON with its fields."""


@pytest.fixture(scope="module")
def answered(checkpoints, tmp_path_factory) -> report.Report:  # type: ignore[no-untyped-def]
    picture = save_noise(tmp_path_factory.mktemp("report") / "a.png", 60, 150)
    loaded = load(str(checkpoints("llava_onevision")))
    short = Generation(max_new_tokens=2)
    (found,) = vtprune.answer(
        loaded, [(picture, "what?")], "entropy-horizon", 0.4, generation=short, compare=True
    )
    return found


def test_the_json_has_these_fields_and_no_others(answered: report.Report) -> None:
    values = answered.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert set(values) == {"question", "answer", "warnings", *BLOCKS}
    for name, names in BLOCKS.items():
        block = values[name]
        assert isinstance(block, dict)
        assert set(block) == set(names.split()), name
    compare, preset, tokens = (values[name] for name in ("compare", "preset", "tokens"))
    assert set(compare["seconds"]) == {"vision", "prefill", "decode", "first_token", "total"}  # type: ignore[index]
    stage = "at layer modality method keep per split positions"
    assert set(preset["stages"][0]) == {*stage.split(), "norm", "states"}  # type: ignore[index]
    counts = "at layer modality method options before after"
    assert set(tokens["stages"][0]) == set(counts.split())  # type: ignore[index]


def test_what_is_not_there_is_left_out_of_the_json(answered: report.Report) -> None:
    assert "compare" not in replace(answered, compare=None).to_dict()
    assert answered.model.adapter is None
    named = replace(answered.model, adapter="mine").to_dict()
    assert list(named)[:2] == ["name", "adapter"]


def test_what_is_not_counted_is_null_in_the_json(answered: report.Report) -> None:
    uncounted = replace(answered.flops, vision=None, prefill=None)
    assert uncounted.to_dict()["vision"] is None
    assert uncounted.prefill_speedup is None


def test_a_field_that_is_missing_is_an_error_and_none_can_be_set(answered: report.Report) -> None:
    for name in BLOCKS:
        block = getattr(answered, name)
        assert is_dataclass(block)
        values = {one.name: getattr(block, one.name) for one in fields(block)}
        values.pop(fields(block)[0].name)
        with pytest.raises(TypeError, match="missing 1 required"):
            type(block)(**values)
        with pytest.raises(FrozenInstanceError):
            setattr(block, fields(block)[0].name, 0)


@pytest.mark.parametrize("values", [REPORT, {**REPORT, "compare": COMPARE}], ids=["", "compare"])
def test_a_report_gives_back_the_values_it_was_made_of(values: Mapping[str, object]) -> None:
    preset = {"description": "", "stages": [], **values["preset"]}  # type: ignore[dict-item]
    made = report_of(values)
    host = made.host.to_dict()
    assert made.to_dict() == {**values, "preset": preset, "host": host}
