"""Which rows a comparison has."""

from __future__ import annotations

from typing import Any

import pytest

from vtprune.errors import PresetError
from vtprune.evaluation.variants import (
    MATCHED,
    Variant,
    counts_after_cuts,
    list_variants,
    matched_baselines,
)
from vtprune.inference.report import StageCount
from vtprune.preset import load_preset
from vtprune.preset.spec import Preset
from vtprune.pruners import BASELINES, METHODS, Method
from vtprune.tokens.schedule import Place
from vtprune.tokens.solver import solve


def rows(*args: Any, **options: Any) -> list[tuple[str, str, str, float | None]]:
    """(role, name, place, keep) of every row."""
    return [
        (one.role, one.name, one.at, one.keep) for one in list_variants(*args, **options).variants
    ]


def cut(
    layer: int, before: int, after: int, at: str | None = None, modality: str = "all"
) -> StageCount:
    """One stage of a report."""
    return StageCount(at=at or str(layer), layer=layer, modality=modality, method="entropy",
                      options={}, before=before, after=after)  # fmt: skip


def test_every_baseline_stands_at_every_keep() -> None:
    found = rows(["entropy"], [0.5, 0.3])
    for keep in (0.5, 0.3):
        own = {(role, name) for role, name, _, kept in found if kept == keep}
        assert own == {("asked", "entropy"), *(("baseline", name) for name in BASELINES)}


def test_baselines_that_can_cut_anywhere_stand_at_the_input() -> None:
    found = rows(["entropy"], [0.3])
    assert found[0] == ("asked", "entropy", "ecl", 0.3)
    assert {name: place for role, name, place, _ in found if name in MATCHED} == {
        "random": "input", "uniform": "input",
    }  # fmt: skip


def test_rows_come_keep_by_keep_in_the_order_asked_for() -> None:
    found = rows(["vtw", "entropy"], ["0.5", 0.1], ["balanced"])
    asked = [(name, keep) for role, name, _, keep in found if role == "asked"]
    assert asked == [
        ("vtw", 0.5), ("entropy", 0.5), ("balanced", 0.5),
        ("vtw", 0.1), ("entropy", 0.1), ("balanced", 0.1),
    ]  # fmt: skip


def test_a_baseline_that_was_asked_for_as_it_is_has_one_row() -> None:
    found = rows(["uniform", "random"], [0.3])
    assert [(role, place) for role, name, place, _ in found if name == "uniform"] == [
        ("asked", "input")
    ]
    assert [(role, place) for role, name, place, _ in found if name == "random"] == [
        ("asked", "horizon"), ("baseline", "input"),
    ]  # fmt: skip


def test_a_place_and_options_are_for_the_methods_alone() -> None:
    entries = list_variants(
        ["entropy", "vtw"], [0.3], ["entropy-horizon"], 3, {"norm": "row"}, 7
    ).variants
    places = {one.name: one.at for one in entries if one.role == "asked"}
    assert places == {
        "entropy (norm=row)": "3", "vtw": "3", "entropy-horizon": "ecl, horizon",
    }  # fmt: skip
    options = {
        one.name: [dict(stage.options) for stage in one.preset.stages_for("image")]
        for one in entries
    }
    assert options["entropy (norm=row)"] == [{"norm": "row", "states": "query"}]
    assert options["entropy-horizon"][0]["norm"] == "none"
    assert {one.preset.seed for one in entries} == {7}


def test_a_preset_that_says_all_its_keeps_has_one_row_and_a_note() -> None:
    fixed = {"stages": [{"at": 2, "method": "random", "keep": 0.25}]}
    found = list_variants(["entropy"], [0.5, 0.3], [fixed])
    assert [one.keep for one in found.variants if one.name == "custom"] == [None]
    assert "preset custom sets every stage's keep itself" in found.notes[0]


def test_a_method_that_can_not_cut_there_has_a_row_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = Method("vtprune.pruners.uniform:Uniform", "2", "reads attention", lowest=1)
    monkeypatch.setitem(METHODS, "reader", reads)
    entries = list_variants(["reader", "entropy"], [0.3], at="input").variants
    found = {one.name: one.error for one in entries if one.role == "asked"}
    assert found["entropy"] is None
    assert found["reader"] is not None
    assert "there is none at the input" in found["reader"].message


def test_all_rows_look_at_what_the_one_preset_that_says_so_looks_at() -> None:
    media = list_variants(["entropy"], [0.3], ["balanced", "long-video"]).media
    assert media.video.frames == load_preset("long-video").video.frames
    both = list_variants([], [0.3], ["document", "long-video"])
    assert (both.media.video.frames, both.media.image.max_tiles) == (None, None)
    assert "presets document, long-video sample different frames or tiles" in both.notes[0]


# What was asked wrongly


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"methods": ["entropi"]}, "unknown method 'entropi'"),
        ({"methods": [""]}, "unknown method ''"),
        ({"methods": ["entropy", "entropy"]}, "method entropy is named 2 times"),
        ({"presets": ["balanced", "balanced"]}, "preset balanced is named 2 times"),
        ({"presets": ["balance"]}, "no preset 'balance'"),
        ({"keeps": [1.5]}, r"keep 1.5 is not a fraction in \(0, 1\]"),
        ({"keeps": ["0.30", 0.3]}, r"keep 0\.3 is named 2 times"),
        ({"keeps": []}, "no keep to compare at"),
        ({"at": "nowhere"}, "at: nowhere is not a place"),
        ({"options": {"nrm": "row"}}, "none of entropy has the option nrm"),
        ({"options": {"norm": "x"}}, "norm: x is not a value of method entropy"),
        ({"seed": -1}, "seed -1 is not a whole number"),
        ({"methods": []}, "nothing to compare"),
    ],
)
def test_what_is_not_valid_is_refused_with_a_way_out(given: dict[str, Any], match: str) -> None:
    with pytest.raises(PresetError, match=match) as raised:
        list_variants(**{"methods": ["entropy"], "keeps": [0.3], **given})
    assert raised.value.hint


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(PresetError) as raised:
        list_variants(["entropi", "vtw", "vtw"], [0.3, 7], ["balance"], "nowhere", {"x": "1"})
    for told in ("entropi", "vtw is named 2 times", "keep 7", "'balance'", "nowhere", "option x"):
        assert told in raised.value.message
    for hint in ("did you mean entropy?", "did you mean balanced?"):
        assert hint in raised.value.hint


# Beside a row that cuts past the input

ASKED = Variant("asked", "entropy", Preset(name="entropy", seed=3), 0.3, "ecl")


def test_random_and_uniform_repeat_the_layers_and_the_counts() -> None:
    stages = [cut(2, 129, 75), cut(12, 75, 6)]
    for entry, name in zip(matched_baselines(ASKED, stages), MATCHED, strict=True):
        assert (entry.role, entry.method, entry.keep, entry.at) == ("baseline", name, 0.3, "2, 12")
        assert entry.counts == ((2, 75), (12, 6))
        assert entry.preset.seed == 3
        specs = entry.preset.stages_for("image")
        assert [(one.at, one.method) for one in specs] == [("2", name), ("12", name)]


@pytest.mark.parametrize("total", [7, 129, 2880, 7290])
def test_a_repeated_count_comes_out_of_the_schedule_as_it_was(total: int) -> None:
    for left in range(1, total, max(1, total // 50)):
        stage = matched_baselines(ASKED, [cut(2, total, left)])[0].preset.stages_for("image")[0]
        places = [Place(stage.at, 2, stage.keep)]
        assert [one.count for one in solve(places, None, 16, total).cuts] == [left]


@pytest.mark.parametrize(
    "stages",
    [[], [cut(0, 129, 30)], [cut(0, 129, 60, at="pixels"), cut(0, 60, 30)], [cut(8, 129, 0)]],
    ids=["no cut", "input", "pixels and input", "nothing left"],
)
def test_nothing_stands_beside_where_there_is_nothing_to_choose(
    stages: list[StageCount],
) -> None:
    assert matched_baselines(ASKED, stages) == []


def test_a_cut_to_nothing_after_another_stays_one() -> None:
    entry = matched_baselines(ASKED, [cut(2, 100, 40), cut(9, 40, 0)])[0]
    specs = entry.preset.stages_for("image")
    assert [(one.method, one.keep) for one in specs] == [("random", 0.4), ("vtw", 0.0)]


def test_modalities_with_cuts_of_their_own_keep_them() -> None:
    stages = [cut(2, 50, 10, modality="image"), cut(4, 200, 40, modality="video")]
    preset = matched_baselines(ASKED, stages)[0].preset
    assert [(one.at, one.keep) for one in preset.stages_for("image")] == [("2", 0.2)]
    assert [(one.at, one.keep) for one in preset.stages_for("video")] == [("4", 0.2)]
    only = matched_baselines(ASKED, stages[:1])[0].preset
    assert (only.keep_for("image"), only.keep_for("video")) == (None, 1.0)


def test_of_several_cuts_at_one_place_the_last_counts() -> None:
    assert counts_after_cuts([cut(0, 9, 6), cut(0, 6, 4), cut(2, 4, 1)]) == ((0, 4), (2, 1))
