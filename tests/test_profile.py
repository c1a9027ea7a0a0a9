"""Whole profiles: their figures, their verdict, their tables and their chart."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image
from rich.console import Console
from transformers import CONFIG_MAPPING

import vtprune
from vtprune.cli.console.profile import show_profile, show_warnings
from vtprune.errors import ModelError
from vtprune.evaluation.profiling import profile as module
from vtprune.evaluation.profiling.chart import draw_profile
from vtprune.evaluation.profiling.machine import Machine
from vtprune.evaluation.profiling.model_runs import ModelRunner, PlannedRun, RunTimes
from vtprune.evaluation.profiling.profile import ProfileOptions, profile
from vtprune.evaluation.profiling.prompts import ProfiledMedia
from vtprune.evaluation.profiling.result import (
    FailedRow,
    MeasuredSpeedups,
    MediaAmount,
    PredictedSpeedups,
    Profile,
    ProfileFlops,
    ProfileRow,
    ProfileSeconds,
    PromptInfo,
    RooflineSeconds,
    ShapeInfo,
)
from vtprune.evaluation.profiling.row_times import MeasurementInfo, PassTimes, TimeBudget
from vtprune.evaluation.profiling.verdict import VerdictFindings, VerdictRow, judge
from vtprune.inference.report import (
    CompareSeconds,
    KvCacheBytes,
    MemoryBytes,
    StageCount,
    TokenCounts,
    Versions,
)
from vtprune.models.base import Sampling
from vtprune.models.names import aliases
from vtprune.pruners import METHODS
from vtprune.pruners.entropy import Entropy

KNOWN = [one.name for one in aliases() if one.model_type in CONFIG_MAPPING]
MACHINE = Machine("cpu", "a CPU", 2, "float32", 1e12, 1e10, 2**36)
SMALL = ProfiledMedia("image", 448, 336)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose ceilings take no time to measure."""
    monkeypatch.setattr(module, "measure_machine", lambda device, dtype: MACHINE)


CLIP = ProfiledMedia("video", 60, 60, 8)
"""8 frames of 4 tokens and a newline in the tiny LLaVA-OneVision: 33 tokens."""


def measured(
    name: str, folder: Path, shown: ProfiledMedia | None = None, how: str = "layers", **asked: Any
) -> Profile:
    """A tiny model, timed once."""
    options = ProfileOptions(how=how, repeats=1, dtype="float32", text_tokens=48)
    asked = {"presets": [], "options": options, **asked}
    return profile(tiny.describe(name, folder), shown, **asked)


def counted(name: str, shown: ProfiledMedia | None = SMALL, **options: Any) -> Profile:
    return profile(name, shown, options=ProfileOptions(timed=False, **options))


@pytest.mark.parametrize("name", KNOWN)
def test_every_alias_is_profiled_without_weights_or_a_network(name: str) -> None:
    found = counted(name).to_dict()
    json.dumps(found)
    rows: Any = found["rows"]
    assert [row["keep"] for row in rows[:5]] == [1.0, 0.5, 0.3, 0.2, 0.1]
    good = [row for row in rows if "error" not in row]
    late = any("a cut there makes them run all that are kept" in w for w in found["warnings"])
    assert late == (name in ("gemma-4-e2b", "gemma-4-e4b"))
    assert len(good) > 4, [row.get("error") for row in rows]
    for row in good:
        kept, flops = row["tokens"]["keep_mean"], row["flops"]
        assert kept <= (row["keep"] or 1) + 1e-9
        assert flops["tower"] > 0
        assert flops["projector"] > 0
        if not late:
            assert flops["prefill"] <= flops["prefill_full"]
            assert row["compare"]["prefill_predicted"] >= 1
        assert row["seconds"] is None
        assert row["memory_bytes"]["peak"] > row["memory_bytes"]["weights"]
    assert found["verdict"]


@pytest.mark.parametrize("how", ["whole", "layers"])
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_a_tiny_model_is_measured(name: str, how: str, tmp_path: Path) -> None:
    options = ProfileOptions(how=how, repeats=2, dtype="float32", text_tokens=20, answer_tokens=5)
    found = measured(name, tmp_path, keeps=[0.5], presets=["fast"], options=options).to_dict()
    told: Any = found["measured"]
    assert (told["how"], told["passes"]) == (how, 2)
    assert told["seconds"] > 0
    rows: Any = found["rows"]
    assert [row["preset"] or row["keep"] for row in rows] == [1, 0.5, "fast"]
    for row in rows:
        check_measured(row)
    assert rows[0]["compare"]["prefill_speedup"] == pytest.approx(1, abs=0.05)
    assert rows[1]["seconds"]["select"] > 0
    assert found["findings"]["best"] == "preset fast"  # type: ignore[index]


def check_measured(row: dict[str, Any]) -> None:
    """The figures of one row belong together."""
    seconds, compare = row["seconds"], row["compare"]
    assert min(seconds[part] for part in ("vision", "prefill", "decode", "first_token")) > 0
    assert seconds["first_token"] > seconds["vision"] + seconds["prefill"]
    assert seconds["decode"] == pytest.approx(4 * seconds["decode_per_token"])
    assert seconds["total"] == pytest.approx(seconds["first_token"] + seconds["decode"])
    assert compare["realised_fraction"] == pytest.approx(
        compare["prefill_speedup"] / compare["prefill_predicted"]
    )
    low, high = compare["prefill_spread"]
    assert low <= compare["prefill_speedup"] <= high
    for part in ("first_token", "total"):
        low, high = compare[f"{part}_spread"]
        assert low <= compare[f"{part}_speedup"] <= high
    assert row["measured"] == "run"


def test_layers_of_two_kinds_are_timed_both(tmp_path: Path) -> None:
    found = measured("gemma3", tmp_path, keeps=[0.4], methods=["uniform"])
    assert [row.seconds.prefill > 0 for row in found.rows] == [True, True]


# What `repeated` drops is in several pictures, and one is measured.
@pytest.mark.parametrize("method", [name for name in METHODS if name != "repeated"])
def test_every_method_is_measured(method: str, tmp_path: Path) -> None:
    own = METHODS[method]
    video = own.modalities == ("video",) or own.units or own.media
    shown = CLIP if video else None
    found = measured("llava_onevision", tmp_path, shown, keeps=[0.6], methods=[method])
    plain, pruned = found.rows
    assert isinstance(pruned, ProfileRow), pruned
    assert pruned.tokens.kept_after < plain.tokens.visual
    assert pruned.seconds.prefill > 0


@pytest.mark.parametrize("how", ["whole", "layers"])
def test_what_goes_before_the_vision_tower_spares_it_work(how: str, tmp_path: Path) -> None:
    found = measured("llava_onevision", tmp_path, CLIP, how, keeps=[0.5], methods=["predictable"])
    plain, pruned = found.rows
    # Half of the 33 tokens are 3 frames of 4, and the newline.
    assert pruned.tokens.stages[0].at == "pixels"
    left = pruned.tokens.kept_after
    assert pruned.flops.tower == pytest.approx(plain.flops.tower * (left // 4) / 8)
    assert left < plain.tokens.visual
    assert pruned.seconds.vision > 0
    assert any("the pixels are random" in note for note in found.warnings)


@pytest.mark.parametrize("how", ["whole", "layers"])
def test_fewer_frames_are_held_against_all_of_them(how: str, tmp_path: Path) -> None:
    found = measured("llava_onevision", tmp_path, CLIP, how, keeps=[0.5], methods=["downsample"])
    plain, fewer = found.rows
    # Half of the 33 tokens are 3 frames of 4, and the newline.
    assert fewer.tokens.visual == 33
    assert fewer.tokens.kept_after == 13
    (stage,) = fewer.tokens.stages
    assert (stage.at, stage.before, stage.after) == ("pixels", 33, 13)
    flops = fewer.flops
    assert flops.prefill_full == plain.flops.prefill_full
    assert flops.tower == pytest.approx(plain.flops.tower * 3 / 8)
    before = fewer.compare.seconds.prefill
    assert before == plain.seconds.prefill


@pytest.mark.parametrize("how", ["whole", "layers"])
def test_a_row_that_fails_when_it_runs_has_its_reason(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise ModelError("no such states here")

    monkeypatch.setattr(Entropy, "select", refuse)
    found = measured("llava_onevision", tmp_path, how=how, keeps=[0.5],
                     presets=["entropy-horizon", "fast"], methods=["uniform"])  # fmt: skip
    errors = [getattr(row, "error", None) for row in found.rows]
    assert errors == [None, None, "no such states here", None]


@pytest.mark.parametrize("name", [name for name in tiny.MODELS if "video" in tiny.KINDS[name]])
def test_a_video_is_measured_in_every_family_that_takes_one(name: str, tmp_path: Path) -> None:
    found = measured(name, tmp_path, CLIP, keeps=[0.4])
    assert found.input.frames == 8
    assert found.rows[1].seconds.prefill > 0


def test_where_the_budget_is_short_layers_are_scaled_and_it_is_said(tmp_path: Path) -> None:
    options = ProfileOptions(how="layers", seconds=1e-3, repeats=3, dtype="float32", text_tokens=20)
    found = profile(str(tiny.describe("llava_onevision", tmp_path)), options=options)
    assert found.measured is not None
    assert found.measured.passes == 1
    assert any("scaled" in note for note in found.warnings), found.warnings
    assert all(row.seconds.prefill > 0 for row in found.rows if isinstance(row, ProfileRow))


def note_runs(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[PlannedRun, RunTimes], RunTimes]
) -> None:
    """Give every timed run other seconds."""
    run = ModelRunner.run

    def timed(runner: ModelRunner, planned: PlannedRun) -> RunTimes:
        return change(planned, run(runner, planned))

    monkeypatch.setattr(ModelRunner, "run", timed)


@pytest.mark.parametrize("how", ["whole", "layers"])
def test_a_pass_that_there_is_no_time_for_is_not_begun(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[PlannedRun] = []

    def note(planned: PlannedRun, times: RunTimes) -> RunTimes:
        runs.extend([planned] * planned.has_cuts)
        return times

    note_runs(monkeypatch, note)
    budget = property(lambda self: 1e9 if len(runs) < 3 else 0.0)  # nothing left after one pass
    monkeypatch.setattr(TimeBudget, "left", budget)
    options = ProfileOptions(how=how, repeats=3, dtype="float32", text_tokens=20)
    found = measured("llava", tmp_path, keeps=[0.6, 0.4], options=options)
    assert found.measured is not None
    assert found.measured.passes == 1
    assert len(runs) == 3
    assert [row.measured for row in found.rows] == ["run"] * 3
    note_ = "there was time for one pass only, and for none to warm up before it"
    assert (note_ in found.warnings) is (how == "whole")


def test_rows_that_were_measured_in_different_ways_are_said_to_be(tmp_path: Path) -> None:
    options = ProfileOptions(how="layers", seconds=1e-3, repeats=3, dtype="float32", text_tokens=20)
    found = measured("llava", tmp_path, keeps=[0.6, 0.4], presets=["fast"], options=options)
    ways = {row.preset or row.keep: row.measured for row in found.rows}
    other = [name for name, way in ways.items() if way != "run"]
    assert other
    assert len(other) < len(ways)
    (note,) = (one for one in found.warnings if "summed or scaled from layers of other rows" in one)
    for name in ways:
        label = f"preset {name}" if isinstance(name, str) else f"keep {name:g}"
        assert (label in note) is (name in other)


@pytest.mark.parametrize("slow", [1.0, 2.0])
def test_a_busy_machine_is_noticed_by_the_unpruned_row(
    slow: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = itertools.count()

    def timed(planned: PlannedRun, times: RunTimes) -> RunTimes:
        unpruned = planned.has_cuts and not planned.row.cuts
        late = unpruned and next(passes) == 2  # its last pass
        return replace(times, prefill=slow if late else 1.0)

    note_runs(monkeypatch, timed)
    options = ProfileOptions(how="whole", repeats=2, dtype="float32", text_tokens=20)
    found = measured("llava", tmp_path, keeps=[0.5], options=options)
    busy = [note for note in found.warnings if "the machine was busy" in note]
    assert bool(busy) is (slow > 1)
    compare = found.rows[1].compare
    assert compare.prefill_spread == [1.0, slow]
    assert compare.prefill_speedup == (1 + slow) / 2


def test_a_lower_keep_that_was_measured_slower_is_said_to_be_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {None: 9.0, 0.6: 3.0, 0.4: 3.1, 0.2: 1.0}

    def timed(planned: PlannedRun, times: RunTimes) -> RunTimes:
        row = planned.row
        return replace(times, prefill=seconds[row.variant.keep if row.cuts else None])

    note_runs(monkeypatch, timed)
    options = ProfileOptions(how="whole", repeats=2, dtype="float32", text_tokens=20)
    found = measured("llava", tmp_path, keeps=[0.6, 0.4, 0.2], methods=["uniform", "random"],
                     options=options)  # fmt: skip
    slower = [note for note in found.warnings if "was measured slower" in note]
    assert slower == [
        f"{name} at keep 0.4 was measured slower than {name} at keep 0.6, which keeps more: they "
        "differ by less than the noise"
        for name in ("uniform", "random")
    ]
    assert any(note.startswith("2 passes can't tell rows apart, 5 can") for note in found.warnings)


def test_a_model_that_does_not_fit_is_measured_by_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 1.3 times the weights are free; the whole model and its states need more than 0.8 of that.
    weights = counted(str(tiny.describe("llava", tmp_path)), None).good_rows[0].memory_bytes.weights
    small = Machine("cpu", "a CPU", 2, "float32", 1e12, 1e10, int(1.3 * weights))
    monkeypatch.setattr(module, "measure_machine", lambda device, dtype: small)
    options = ProfileOptions(repeats=1, dtype="float32", text_tokens=20)
    found = profile(str(tmp_path), keeps=[0.5], presets=[], options=options)
    assert found.measured is not None
    assert found.measured.how == "layers"
    none = Machine("cpu", "a CPU", 2, "float32", 1e12, 1e10, 1000)
    monkeypatch.setattr(module, "measure_machine", lambda device, dtype: none)
    with pytest.raises(ModelError, match="not even a few of its layers fit in memory"):
        profile(str(tmp_path), keeps=[0.5], presets=[], options=options)


def test_a_preset_that_takes_fewer_tiles_has_an_input_of_its_own() -> None:
    found = counted("llava-onevision-7b", ProfiledMedia("image", 1536, 1536))
    rows = {row.preset or row.keep: row for row in found.rows}
    assert rows[1.0].tokens.visual == 7371
    # `document` takes 9 of the 16 tiles: the tower encodes 10 pictures, not 17.
    assert rows["document"].flops.tower == pytest.approx(rows[1.0].flops.tower * 10 / 17)


def test_frames_that_are_asked_for_go_before_a_presets() -> None:
    found = counted("llava-onevision-0.5b", ProfiledMedia("video", 448, 448, 16))
    assert {row.tokens.visual for row in found.rows} == {16 * 196 + 1}


def test_a_media_file_is_read_and_sampled(tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    Image.new("RGB", (672, 672), "white").save(path)
    found = counted("llava-next", ProfiledMedia(paths=(str(path),)))
    assert found.input.files == [str(path)]
    assert found.input.visual_tokens == 2928
    few = counted("llava-next", ProfiledMedia(paths=(str(path),)), sampling=Sampling(max_tiles=2))
    assert few.input.visual_tokens < 2928


def test_the_default_input_is_the_largest_picture() -> None:
    found = counted("llava-next", None)
    assert (found.input.width, found.input.height) == (672, 672)


def test_a_row_that_can_not_be_cut_has_its_reason_and_the_others_go_on() -> None:
    options = ProfileOptions(timed=False)
    found = profile("llava-1.5-7b", SMALL, keeps=[0.3, 0.9], presets=[], methods=["uniform"],
                    at="16", options=options)  # fmt: skip
    errors = [getattr(row, "error", None) for row in found.rows]
    assert errors[:2] == [None, None]
    assert "the lowest reachable keep is" in str(errors[2])


def test_a_device_map_is_refused() -> None:
    with pytest.raises(ModelError, match="a profile is of one device"):
        counted("llava-1.5-7b", device="map")


def test_the_profile_is_part_of_the_library() -> None:
    assert vtprune.profile is profile


# -- the verdict ---------------------------------------------------------------------------------


def judged_row(
    name: str, pruned: bool = True, preset: bool = False, **changes: float
) -> VerdictRow:
    """A row with an answer of 33 tokens, and by default 6.2 seconds in all."""
    parts = {"preprocess": 0.1, "vision": 1.0, "select": 0.0, "prefill": 4.0, "around": 0.1}
    parts |= {key: value for key, value in changes.items() if key in parts}
    times = PassTimes(**parts, decode_per_token=changes.get("decode", 1.0) / 32)
    return VerdictRow(
        name, times, 33, speedup=changes.get("speedup", 6.2 / times.total(33)),
        prefill_speedup=changes.get("prefill_speedup", 4.0 / parts["prefill"]), predicted=4.0,
        roofline=changes.get("roofline", 4.0), frames=int(changes.get("frames", 0)),
        tiles=int(changes.get("tiles", 0)), is_pruned=pruned, is_preset=preset,
    )  # fmt: skip


UNPRUNED_ROW = judged_row("keep 1", pruned=False)


@pytest.mark.parametrize(
    ("changes", "limit", "text"),
    [
        ({"prefill": 1.0, "vision": 3.0}, "vision", "the vision tower limits: 58% of the time"),
        ({"prefill": 1.0, "decode": 5.0}, "decode", "decoding 33 tokens limits"),
        ({"prefill": 2.0, "select": 0.5}, "selection", "selecting the tokens limits: it takes 25%"),
        ({"prefill": 2.0}, "launch overhead", "the prefill gets 2.00 x faster, where its FLOPs"),
        ({"prefill": 2.0, "roofline": 2.1}, "prefill", "the decoder's prefill limits"),
        ({"prefill": 1.0, "preprocess": 3.0}, "preprocess", "preparing the pixels limits"),
    ],
)
def test_the_verdict_names_what_limits(changes: dict[str, float], limit: str, text: str) -> None:
    row = judged_row("keep 0.3", **changes)
    verdict, findings = judge([UNPRUNED_ROW, row], row)
    assert findings.limited_by == limit
    assert text in verdict


@pytest.mark.parametrize(("speedup", "pays"), [(1.5, True), (1.02, False)])
def test_the_verdict_says_whether_pruning_pays(speedup: float, pays: bool) -> None:
    row = judged_row("keep 0.3", prefill=1.0, speedup=speedup)
    verdict, findings = judge([UNPRUNED_ROW, row], row)
    assert findings.pays is pays
    assert ("Pruning pays here" in verdict) is pays
    assert ("Pruning does not pay here" in verdict) is not pays


def test_the_verdict_names_the_preset_that_pays_most() -> None:
    row = judged_row("keep 0.3", prefill=2.0)
    fast, slow = (judged_row(f"preset {name}", preset=True, prefill=took)
                  for name, took in (("fast", 1.0), ("document", 3.0)))  # fmt: skip
    verdict, findings = judge([UNPRUNED_ROW, row, slow, fast], row)
    assert findings.best == "preset fast"
    # 6.2 s unpruned, 3.2 s with it; 5.2 s and 2.2 s to the first token.
    assert "Preset fast would pay more: 1.94 x on the whole, 2.36 x to the first" in verdict


@pytest.mark.parametrize(
    ("others", "text"),
    [
        # In each of five passes, which chance does once in 32 times.
        ((5.0, 5.1, 5.2, 4.9, 5.0), "Preset fast would pay more: "),
        ((5.0, 5.1, 5.2, 4.9), "but 4 passes can't tell it apart from keep 0.3."),
        ((5.0, 5.1, 2.0, 4.9, 5.0), "but 5 passes can't tell it apart from keep 0.3."),
    ],
)
def test_the_verdict_says_that_one_row_is_faster_only_where_the_passes_tell(
    others: tuple[float, ...], text: str
) -> None:
    row = replace(judged_row("keep 0.3", prefill=2.0), totals=others)
    fast = replace(judged_row("preset fast", preset=True, prefill=1.0), totals=(3.2,) * len(others))
    verdict, findings = judge([UNPRUNED_ROW, row, fast], row)
    assert text in verdict
    assert findings.best == "preset fast"
    assert findings.best_told_apart is ("would pay more" in text)


def test_whether_pruning_pays_is_left_open_where_single_passes_are_on_both_sides() -> None:
    row = judged_row("keep 0.3", prefill=3.0, speedup=1.2)
    noisy = replace(row, gains=(0.9, 1.2, 1.4))
    verdict, _ = judge([UNPRUNED_ROW, noisy], noisy)
    assert "Whether pruning pays here is lost in the noise" in verdict
    assert "0.90 to 1.40 x in single passes" in verdict
    clear = replace(row, gains=(1.1, 1.2, 1.4))
    assert "Pruning pays here" in judge([UNPRUNED_ROW, clear], clear)[0]


def test_the_verdict_says_where_a_preset_is_shown_less() -> None:
    row = judged_row("keep 0.3", prefill=2.0, tiles=10)
    fewer = judged_row("preset document", preset=True, prefill=1.0, tiles=5)
    verdict, _ = judge([replace(UNPRUNED_ROW, tiles=10), row, fewer], row)
    assert "to the first token, of 5 tiles where the unpruned model is given 10." in verdict


def test_where_the_tower_limits_fewer_frames_are_said_to_pay() -> None:
    row = judged_row("keep 0.3", prefill=1.0, vision=4.0, frames=32)
    plain = judged_row("keep 1", pruned=False, vision=4.0, frames=32)
    # 6.2 s, of which pixels, tower and prefill, 5.1 s, are halved: 3.65 s; unpruned 9.2 s.
    assert "16 frames would make the whole about 2.52 x as fast" in judge([plain, row], row)[0]
    tiles = judged_row("keep 0.3", prefill=1.0, vision=4.0, tiles=13)
    assert "--max-tiles 6 would" in judge([plain, tiles], tiles)[0]


# -- tables and chart ----------------------------------------------------------------------------


def row(keep: float, preset: str | None, stages: list[tuple[int, int]], prefill: float,
        timed: bool = True, **values: Any) -> ProfileRow:  # fmt: skip
    predicted: dict[str, float] = {
        "prefill_predicted": 40e12 / prefill, "prefill_roofline": 39e12 / prefill,
        "first_token_roofline": 2.0,
    }  # fmt: skip
    spread = [1.0, 3.0]
    seconds = {"preprocess": 0.03, "vision": 2.0, "prefill": prefill / 1e12, "decode": 1.0,
               "first_token": 3 + prefill / 1e12, "total": 4 + prefill / 1e12}  # fmt: skip
    compare = MeasuredSpeedups(
        **predicted,
        seconds=CompareSeconds(
            **{part: seconds[part] for part in seconds if part != "preprocess"},
        ),
        prefill_speedup=36e12 / prefill, prefill_spread=spread, realised_fraction=0.9,
        first_token_speedup=1.5, first_token_spread=spread, total_speedup=1.2, total_spread=spread,
    )  # fmt: skip
    one = ProfileRow(
        keep=keep, preset=preset, method=None, options={},
        stages_of=None if preset or not stages else "balanced",
        input=MediaAmount(frames=0, tiles=5, visual_tokens=2928),
        measured="run" if timed else None,
        tokens=TokenCounts(
            visual=2928, text=64, answer=32, keep_mean=keep, kept_after=9, by_modality={},
            stages=[
                StageCount(at=str(layer), layer=layer, modality="all", method="random", options={},
                           before=2928, after=after)
                for layer, after in stages
            ],
            by_frame=[], by_tile=[],
        ),
        flops=ProfileFlops(
            vision=2e12, tower=1.9e12, projector=0.1e12, prefill=prefill, prefill_full=40e12,
            reduction=1 - prefill / 40e12, decode=0.4e12, decode_full=0.4e12,
            decode_per_token=13e9, decode_per_token_full=13e9,
            prefill_by_layer=[1.3e12, 1.3e12 if not stages else prefill / 40],
        ),
        kv_cache_bytes=KvCacheBytes(kept=int(1.5e9 * keep), full=int(1.5e9)),
        memory_bytes=MemoryBytes(weights=int(14e9), peak=int(16e9)),
        seconds=ProfileSeconds(**seconds, media=0.0, select=0.01, decode_per_token=0.032)
        if timed else None,
        fits=True,
        roofline=RooflineSeconds(
            vision=2.0,
            prefill=3.0,
            prefill_compute=3.0,
            prefill_bandwidth=1.0,
            prefill_bound="compute",
            decode_per_token=0.5,
            decode_compute=0.1,
            decode_bandwidth=0.5,
            decode_bound="bandwidth",
            first_token=5.0,
        ),
        compare=compare if timed else PredictedSpeedups(**predicted),
    )  # fmt: skip
    return replace(one, **values)


def example(timed: bool = True, *more: ProfileRow) -> Profile:
    failed = FailedRow(keep=0.05, preset=None, method=None, stages_of=None, options={},
                       error="keep 0.05 can't be reached")  # fmt: skip
    return Profile(
        model=ShapeInfo(
            name="llava-next", family="llava_next", parameters=7_063_431_168, layers=32,
            device="cpu", dtype="bfloat16", attention="sdpa", source="packaged",
        ),
        machine=Machine("cpu", "a CPU", 2, "bfloat16", 9e11, 7e9, 2**36),
        input=PromptInfo(
            files=["672x672"], modality="image", frames=0, tiles=5, timestamps=[], decoder="none",
            duration=0, width=672, height=672, visual_tokens=2928, text_tokens=64,
        ),
        rows=[
            row(1.0, None, [], 40e12, timed),
            row(0.3, None, [(2, 958), (24, 146)], 13e12, timed),
            row(0.15, "fast", [(0, 556), (24, 87)], 7e12, timed),
            failed,
            *more,
        ],
        verdict="Pruning pays here.",
        findings=VerdictFindings(limited_by="prefill", pays=True, best="preset fast",
                                 best_told_apart=True),
        measured=MeasurementInfo(how="layers", passes=2, seconds=41.0, scaled="")
        if timed else None,
        warnings=["a note"],
        version=Versions(vtprune="1", torch="2", transformers="5"),
    )  # fmt: skip


def rendered(found: Profile) -> str:
    file = io.StringIO()
    show_profile(found, Console(file=file, width=80, highlight=False, markup=False))
    return "\n".join(line.rstrip() for line in file.getvalue().split("\n"))


def test_a_profile_at_80_columns() -> None:
    assert (
        rendered(example())
        == """\
model     llava-next: 7.06 B parameters, 32 layers, cpu, bfloat16, sdpa
input     a picture of 672 x 672 in 5 tiles: 2,928 visual tokens, 64 of text
machine   a CPU, 2 threads: 900 GFLOP/s, 7.00 GB/s
measured  single layers with random weights, summed over all 32, 2 passes in
          41.00 s
rows      at every keep: the stages of preset balanced

                      prefill      KV   first prefill    in the roof-    of
         layer:kept     FLOPs   cache   token  faster    passes  line FLOPs
keep 1   all 2,928     40.0 T 1.50 GB 43.00 s   0.90x 1.00-3.00 0.97x   90%
keep 0.3 2:958 24:146  13.0 T  450 MB 16.00 s   2.77x 1.00-3.00 3.00x   90%
fast     0:556 24:87   7.00 T  225 MB 10.00 s   5.14x 1.00-3.00 5.57x   90%
          keep 0.05: keep 0.05 can't be reached
          prefill faster: speed-up over no pruning, median of the passes; in the
          passes: lowest and highest; roofline: the speed-up that this machine's
          FLOP/s and bytes/s allow; of FLOPs: the measured speed-up as a share
          of the one by FLOPs

               FLOPs         keep 0.3  seconds  keep 0.3
preprocess                               30 ms     30 ms  █░░░░░░░░░░░░░
vision tower  1.90 T           1.90 T   2.00 s    2.00 s  █░░░░░░░░░░░░░
  projector    100 G            100 G
prefill       40.0 T           13.0 T  40.00 s   13.00 s  ████░░░░░░░░░░
  a layer     1.30 T  325 G to 1.30 T
  selection                              10 ms     10 ms
decode         400 G            400 G   1.00 s    1.00 s  █░░░░░░░░░░░░░
  a token     13.0 G           13.0 G    32 ms     32 ms

memory    weights 14.0 GB; peak, estimated without what the vision tower holds:
          16.0 GB, keep 0.3 16.0 GB

verdict   Pruning pays here.
"""
    )


def test_rows_that_are_not_comparable_are_marked() -> None:
    amount = MediaAmount(frames=64, tiles=0, visual_tokens=12544)
    text = rendered(example(
        True,
        row(0.2, "long-video", [(0, 500)], 6e12, input=amount),
        row(0.1, None, [(0, 90)], 4e12, measured="scaled"),
    ))  # fmt: skip
    assert "long-video* 0:500" in text
    told = " ".join(text.split())
    assert ("* long-video is given 64 frames, 12,544 visual tokens, and is compared with the "
            "unpruned model on that") in told  # fmt: skip
    assert "~9.00x" in text
    assert "~ not run itself: summed or scaled from layers of other rows" in told
    plain = rendered(example())
    assert "*" not in plain
    assert "~" not in plain


def test_a_method_in_the_rows_of_the_keeps_is_named_with_its_options() -> None:
    text = rendered(example(
        True,
        row(0.3, None, [(2, 958)], 13e12, method="entropy", options={"norm": "none"},
            stages_of=None),
        row(0.3, None, [(2, 958)], 13e12, method="dart", stages_of=None),
    ))  # fmt: skip
    assert "entropy" in text
    assert "(norm=none) 0.3" in text
    assert "\ndart 0.3" in text


def test_without_measuring_the_tables_show_what_the_ceilings_allow() -> None:
    text = rendered(example(timed=False))
    assert "measured  nothing; speed-ups are what the peak" in text
    assert "faster" not in text
    assert "keep 0.3 2:958 24:146 13.0 T 450 MB 3.00x 3.00 s c 0.50 s b" in " ".join(text.split())
    assert "roofline  keep 0.3" in text


def test_warnings_are_told_apart() -> None:
    file = io.StringIO()
    show_warnings(example(), Console(file=file, width=80))
    assert file.getvalue().split() == ["warning", "a", "note"]


@pytest.mark.parametrize("timed", [True, False])
def test_the_chart_is_a_picture(timed: bool) -> None:
    picture = Image.open(io.BytesIO(draw_profile(example(timed))))
    assert picture.format == "PNG"
    assert picture.size == (800, 500)


def test_the_chart_has_the_lines_for_flops_and_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, list[float]] = {}
    plot = Axes.plot

    def note(axes: Axes, *args: Any, **kwargs: Any) -> Any:
        drawn[str(kwargs.get("label"))] = [float(one) for one in args[1]]
        return plot(axes, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", note)
    found = example()
    draw_profile(replace(found, rows=found.rows[:2]))
    assert drawn["by FLOPs"] == pytest.approx([40 / 13, 1.0])
    assert drawn["roofline of this machine"] == pytest.approx([39 / 13, 39 / 40])
    assert drawn["prefill, measured"] == pytest.approx([36 / 13, 36 / 40])
