"""Several methods on one question: what is run, what is measured, and what comes of refusals."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import save_noise

import vtprune
from vtprune import demo
from vtprune.errors import ModelError, PresetError
from vtprune.evaluation import compare as comparing
from vtprune.evaluation.comparison import COLUMNS, Comparison, ComparisonRow
from vtprune.evaluation.variants import counts_after_cuts
from vtprune.inference import compare
from vtprune.inference.answer_questions import answer_questions
from vtprune.inference.generate import Generation
from vtprune.models.layer_cost import measure_decoder
from vtprune.models.loading import Loaded
from vtprune.preset import override
from vtprune.pruners import BASELINES, METHODS

SHORT = Generation(max_new_tokens=4)
BLOCKS = {"tokens", "flops", "kv_cache_bytes", "answer", "same_answer"}
TIMES = {"media", "preprocess", "vision", "select", "prefill", "decode", "first_token",
         "total"}  # fmt: skip


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_noise(tmp_path_factory.mktemp("media") / "picture.png", 90, 150)


@pytest.fixture(scope="module")
def found(loaded: Loaded, picture: Path) -> Comparison:
    """Answers and counts of two methods, a preset and their baselines at two keeps."""
    return vtprune.compare_methods(
        loaded, picture, "what?", ["entropy", "vtw"], [0.5, 0.4], presets=["entropy-horizon"],
        generation=SHORT, repeats=0, at=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(loaded: Loaded, picture: Path) -> Comparison:
    return vtprune.compare_methods(
        loaded, picture, "what?", ["entropy"], [0.6], generation=SHORT, repeats=2, at=2
    )  # downsample can't leave less than 0.579 of this picture


def pick(found: Comparison, name: str, keep: float, at: str | None = None) -> ComparisonRow:
    """The one row of that name and keep."""
    rows = [one for one in found.rows if one.name == name and one.keep == keep]
    (row,) = [one for one in rows if at in (None, one.at)]
    return row


def test_the_embedded_model_is_compared_on_a_sample(tmp_path: Path) -> None:
    question = demo.write(tmp_path, num=1)[0]
    found = vtprune.compare_methods(
        None,
        tmp_path / question["file"],
        question["question"],
        ["entropy"],
        [0.3],
        repeats=1,
        generation=SHORT,
    )
    told = found.to_dict()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["model"]["name"] == "embedded"  # type: ignore[index]
    names = [(row.name, row.at) for row in found.rows]
    assert names[:4] == [("unpruned", ""), ("entropy", "ecl"), ("random", "2"), ("uniform", "2")]
    assert {name for name, _ in names[4:]} == set(BASELINES)
    assert all(row.compare for row in found.rows[1:])


def test_the_unpruned_model_comes_first_and_is_whole(found: Comparison) -> None:
    first = found.rows[0]
    assert (first.role, first.name, first.same_answer) == ("unpruned", "unpruned", True)
    assert first.tokens is not None
    assert first.flops is not None
    assert (first.tokens.keep_mean, first.tokens.stages) == (1.0, [])
    assert first.flops.reduction == 0


def test_every_row_is_what_it_would_be_alone(
    found: Comparison, loaded: Loaded, picture: Path
) -> None:
    shape = measure_decoder(loaded.model)
    for name, options in (("entropy", {"method": "entropy", "at": 2}), ("entropy-horizon", {})):
        preset = vtprune.load_preset("entropy-horizon")
        preset = override(preset, 0.4, **options)  # type: ignore[arg-type]
        alone = next(answer_questions(loaded, [picture], ["what?"], preset, generation=SHORT))
        row = pick(found, name, 0.4)
        assert row.answer == alone.answer
        assert row.tokens == alone.tokens
        assert row.flops == alone.flops
        assert row.kv_cache_bytes == alone.kv_cache_bytes
    tokens = pick(found, "vtw", 0.5).tokens
    assert tokens is not None
    assert tokens.stages[0].layer == shape.layers // 2


def test_random_and_uniform_follow_each_row_with_its_layers_and_counts(found: Comparison) -> None:
    rows = list(found.rows)
    for name in ("entropy", "entropy-horizon"):
        for keep in (0.5, 0.4):
            own = pick(found, name, keep)
            assert own.tokens is not None
            stages = own.tokens.stages
            beside = [one for one in rows if name in one.beside and one.keep == keep]
            assert [one.name for one in beside] == ["random", "uniform"]
            place = rows.index(own)
            assert rows[place + 1 : place + 3] == beside
            for one in beside:
                assert one.tokens is not None
                assert counts_after_cuts(one.tokens.stages) == counts_after_cuts(stages)
                assert one.tokens.keep_mean == own.tokens.keep_mean


def test_rows_that_are_there_already_are_not_run_again(loaded: Loaded, picture: Path) -> None:
    found = vtprune.compare_methods(
        loaded, picture, "what?", ["entropy", "random"], [0.4], at=2, generation=SHORT, repeats=0
    )
    names = [(row.name, row.at, row.beside) for row in found.rows if row.at == "2"]
    assert names == [
        ("entropy", "2", ()), ("uniform", "2", ("entropy", "random")), ("random", "2", ("entropy",))
    ]  # fmt: skip


def test_a_method_that_leaves_nothing_has_no_random_row_and_says_so(found: Comparison) -> None:
    assert not [row for row in found.rows if "vtw" in row.beside]
    assert sum("vtw keeps no token to choose" in one for one in found.warnings) == 1


def test_without_measuring_the_tower_runs_once_and_there_are_no_times(
    loaded: Loaded, picture: Path
) -> None:
    calls: list[int] = []
    handle = loaded.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    found = vtprune.compare_methods(
        loaded, picture, "what?", ["entropy"], [0.7, 0.6], generation=SHORT, repeats=0
    )
    handle.remove()
    assert len(calls) == 1 + 2  # once for all who look at the same picture; downsample's two
    assert found.pairs == 0
    for row in found.to_dict()["rows"]:  # type: ignore[attr-defined]
        assert row.keys() & {"seconds", "compare"} == set()
        assert row.keys() >= BLOCKS


def test_every_row_is_timed_beside_the_unpruned_model(measured: Comparison) -> None:
    assert measured.pairs == 2
    first, *others = measured.rows
    assert first.compare is None
    assert first.seconds is not None
    assert first.seconds.keys() == TIMES
    # Loading is the comparison's, and in the total of no row; this model was loaded before.
    assert measured.seconds.keys() == {"startup", "load", "total"}
    assert (measured.seconds["startup"], measured.seconds["load"]) == (0, 0)
    took = sum(row.seconds["total"] for row in measured.rows if row.seconds)
    assert measured.seconds["total"] > took
    for row in others:
        assert row.compare is not None
        assert row.seconds is not None
        assert row.flops is not None
        assert row.seconds.keys() == TIMES
        assert row.compare.answer == first.answer
        predicted = row.flops.prefill_full / row.flops.prefill
        assert row.compare.prefill_predicted == predicted
        speedup = row.compare.prefill_speedup
        assert row.compare.realised_fraction == pytest.approx(speedup / predicted)  # type: ignore[operator]


def test_the_tower_runs_in_every_timed_run(loaded: Loaded, picture: Path) -> None:
    calls: list[int] = []
    handle = loaded.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    found = vtprune.compare_methods(
        loaded, picture, "what?", ["uniform"], [0.6], generation=SHORT, repeats=1
    )
    handle.remove()
    assert [row.name for row in found.rows][-1] == "downsample"
    # Once for all answers and once for downsample's; 1 + 2 a row.
    assert len(calls) == 2 + 3 * (len(found.rows) - 1)


def test_downsample_is_timed_beside_the_whole_picture(
    loaded: Loaded, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    timed = compare.timed

    def noted(loaded: Loaded, side: compare.Side, *rest):  # type: ignore[no-untyped-def]
        seen.append((side.preset is not None, side.question.tensors["input_ids"].shape[1]))
        return timed(loaded, side, *rest)

    monkeypatch.setattr(compare, "timed", noted)
    found = vtprune.compare_methods(
        loaded, picture, "what?", ["downsample"], [0.6], generation=SHORT, repeats=1
    )
    row = pick(found, "downsample", 0.6)
    assert row.tokens is not None
    assert row.compare is not None
    whole, left = row.tokens.visual, row.tokens.kept_after
    lengths = {pruned: {length for own, length in seen[:3] if own == pruned} for pruned in
               (True, False)}  # fmt: skip
    assert max(lengths[False]) - max(lengths[True]) == whole - left  # type: ignore[operator]
    assert found.rows[0].tokens.visual == whole  # type: ignore[index]
    assert not row.beside


def test_pairs_are_in_abba_order_after_a_warm_up_and_forced_to_one_length(
    loaded: Loaded, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    lengths: set[int | None] = set()
    timed = compare.timed

    def noted(loaded: Loaded, side: compare.Side, generation: Generation, length: int | None):  # type: ignore[no-untyped-def]
        order.append("B" if side.preset else "A")
        lengths.add(length)
        return timed(loaded, side, generation, length)

    monkeypatch.setattr(compare, "timed", noted)
    vtprune.compare_methods(
        loaded, picture, "what?", ["uniform"], [0.3], generation=SHORT, repeats=3
    )
    rows = len("".join(order)) // 7
    assert "".join(order) == "BABBAAB" * rows
    assert lengths == {SHORT.max_new_tokens}


def test_seconds_and_speed_ups_are_medians() -> None:
    parts = ("vision", "select", "prefill", "decode", "first_token", "total")
    took = [(1.0, 2.0), (9.0, 3.0), (4.0, 1.0)]
    pairs = [
        compare.Pair(dict.fromkeys(parts, unpruned), dict.fromkeys(parts, pruned))
        for unpruned, pruned in took
    ]
    assert compare.medians(pair.unpruned for pair in pairs)["prefill"] == 4.0
    report: Any = SimpleNamespace(flops=SimpleNamespace(prefill_speedup=4.0))
    one: Any = SimpleNamespace(answer="red")
    told = compare.sum_up(pairs, "red", one, report, 3.5)
    assert told.prefill_speedup == median([0.5, 3.0, 4.0]) == 3.0
    assert told.realised_fraction == 0.75
    assert (told.same_answer, told.prefill_roofline) == (True, 3.5)


def test_few_repeats_are_warned_of(measured: Comparison) -> None:
    assert "every row was timed 2 times: medians of fewer than 5 pairs are rough" in (
        measured.warnings
    )


# What can't be run


def test_a_method_that_refuses_is_a_row_with_its_reason(
    loaded: Loaded, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = comparing.generate

    def refusing(loaded: Loaded, asked: Any, preset: Any, *rest: Any, **options: Any) -> Any:
        if preset.method == "entropy":
            raise ModelError("it reads what is not there", "choose another")
        return generate(loaded, asked, preset, *rest, **options)

    monkeypatch.setattr(comparing, "generate", refusing)
    found = vtprune.compare_methods(
        loaded, picture, "what?", ["entropy", "vtw"], [0.5], generation=SHORT, repeats=1
    )
    row = pick(found, "entropy", 0.5)
    assert row.error == "it reads what is not there (choose another)"
    assert row.to_dict().keys() == {"role", "method", "preset", "at", "keep", "error"}
    assert any(one.startswith("entropy at ecl keep 0.5: not run: it reads") for one in
               found.warnings)  # fmt: skip
    assert pick(found, "vtw", 0.5).compare


def test_a_method_for_videos_refuses_a_picture_in_its_row(loaded: Loaded, picture: Path) -> None:
    name = next(name for name, method in METHODS.items() if method.modalities == ("video",))
    found = vtprune.compare_methods(
        loaded, picture, "what?", [name], [0.5], generation=SHORT, repeats=0
    )
    assert f"{name} takes video input only" in str(pick(found, name, 0.5).error)
    assert pick(found, "uniform", 0.5).answer is not None


def test_a_keep_that_can_not_be_reached_is_a_row_with_the_lowest_that_can(
    loaded: Loaded, picture: Path
) -> None:
    found = vtprune.compare_methods(
        loaded, picture, "what?", ["entropy"], [0.8, 0.1], at=4, generation=SHORT, repeats=0
    )
    assert "lowest reachable keep" in str(pick(found, "entropy", 0.1).error)
    assert pick(found, "entropy", 0.8).error is None


def test_counts_that_a_baseline_did_not_meet_are_no_row_of_figures(
    loaded: Loaded, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "counts_after_cuts", lambda stages: ((1, 1),) if stages else ())
    found = vtprune.compare_methods(
        loaded, picture, "what?", ["entropy"], [0.5], at=2, generation=SHORT, repeats=0
    )
    errors = {row.error for row in found.rows if row.beside}
    assert errors == {
        f"{name} can't be given the counts of entropy" for name in ("random", "uniform")
    }


def test_what_the_unpruned_model_can_not_do_is_an_error(
    loaded: Loaded, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*args: Any, **options: Any) -> Any:
        raise ModelError("out of memory")

    monkeypatch.setattr(comparing, "generate", refusing)
    with pytest.raises(ModelError, match="out of memory"):
        vtprune.compare_methods(loaded, picture, "what?", ["vtw"], [0.5], generation=SHORT)


@pytest.mark.parametrize(
    ("given", "match"),
    [({"repeats": -1}, "repeats -1 is out of range"), ({"methods": ["no"]}, "unknown method 'no'")],
)
def test_what_is_not_valid_is_refused(
    loaded: Loaded, picture: Path, given: dict[str, Any], match: str
) -> None:
    with pytest.raises(PresetError, match=match):
        vtprune.compare_methods(loaded, picture, "what?", **{"methods": ["vtw"], **given})


# What comes out


def test_the_csv_has_a_line_a_row_and_says_what_the_json_says(measured: Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO(measured.to_csv())))
    assert tuple(lines[0]) == COLUMNS
    assert len(lines) == len(measured.rows)
    for line, row in zip(lines, measured.rows, strict=True):
        assert row.tokens is not None
        assert row.flops is not None
        assert line["method"] == row.method
        assert line["keep_mean"] == str(row.tokens.keep_mean)
        assert line["prefill_flops"] == str(row.flops.prefill)
        speedup = "" if row.compare is None else str(row.compare.prefill_speedup)
        assert line["prefill_speedup"] == speedup


def test_progress_goes_from_answers_to_times(loaded: Loaded, picture: Path) -> None:
    told: list[tuple[str, int, int]] = []
    vtprune.compare_methods(
        loaded, picture, "what?", ["uniform"], [0.3], generation=SHORT, repeats=1,
        on_progress=lambda *args: told.append(args),
    )  # fmt: skip
    stages = [stage for stage, _, _ in told]
    assert list(dict.fromkeys(stages)) == ["answering", "answering matched baselines", "measuring"]
    steps = [(done, total) for stage, done, total in told if stage == "measuring"]
    assert steps == [(number + 1, len(steps)) for number in range(len(steps))]
