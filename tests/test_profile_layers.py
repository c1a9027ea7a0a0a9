"""Seconds of layers, towers and heads, and how they are summed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import tiny
import torch
from conftest import shared_model
from torch import nn

from vtprune.evaluation.profiling.build import build_random, build_skeleton, shallow_config
from vtprune.evaluation.profiling.cases import UNPRUNED
from vtprune.evaluation.profiling.clock import Lap, LayerClock, tower_paths
from vtprune.evaluation.profiling.heads import FEW, small_head, time_head
from vtprune.evaluation.profiling.inputs import Case, make_case
from vtprune.evaluation.profiling.probes import at_depth, preset_of, probe_count, probe_row
from vtprune.evaluation.profiling.rows import Planned, Step, plan_row, want_rows
from vtprune.evaluation.profiling.samples import Samples, sum_layers
from vtprune.evaluation.profiling.shapes import find_shape
from vtprune.evaluation.profiling.shown import Shown
from vtprune.evaluation.profiling.times import Pass, RowTimes
from vtprune.evaluation.profiling.towers import whole_tower
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded
from vtprune.preset import StageSpec


def samples(*passes: dict[tuple[str, int], list[float]]) -> Samples:
    return Samples(lambda tokens: float(tokens), list(passes))


def test_a_count_that_was_timed_has_the_median_of_its_times() -> None:
    made = samples({("", 10): [1.0, 2.0]}, {("", 10): [9.0]})
    assert made.at("", 10) == 2.0
    assert made.at("", 10, number=1) == 9.0
    assert not made.scaled


def test_a_count_that_was_not_timed_is_scaled_by_the_pace_around_it() -> None:
    made = samples({("", 10): [10.0], ("", 30): [90.0]})  # 1 and 3 seconds a token
    assert made.at("", 20) == pytest.approx(20 * 2)
    assert made.at("", 5) == pytest.approx(5 * 1)
    assert made.at("", 60) == pytest.approx(60 * 3)
    assert made.scaled == {("", 20), ("", 5), ("", 60)}


def test_a_pass_that_lacks_a_count_takes_it_from_the_others() -> None:
    made = samples({("", 10): [1.0]}, {("", 20): [5.0]})
    assert made.at("", 10, number=1) == 1.0
    assert not made.scaled


def test_all_layers_are_summed_by_their_kinds_and_counts() -> None:
    made = samples({("a", 10): [1.0], ("b", 10): [2.0], ("a", 4): [0.5]})
    assert sum_layers(made, ["a", "b", "a", "a"], [10, 10, 4, 4]) == 1.0 + 2.0 + 0.5 + 0.5


def test_a_whole_tower_has_as_many_layers_of_each_kind_as_it_has() -> None:
    laps = [Lap(0, 7, 2.0, 0.0), Lap(1, 7, 5.0, 0.0)]
    kinds = ["", "", "full", ""]
    # 8 seconds, 7 of them in the layers, of which there are three of 2 and one of 5.
    assert whole_tower(8.0, [laps], ["", "full"], kinds) == pytest.approx(1.0 + 3 * 2.0 + 5.0)


class Slow(nn.Module):
    def forward(self, hidden: torch.Tensor, seconds: float) -> torch.Tensor:
        time.sleep(seconds)
        return hidden


def test_the_clock_notes_every_layer_and_the_gaps_and_leaves_them_as_they_were() -> None:
    layers = [Slow(), Slow()]
    clock = LayerClock(torch.device("cpu"))
    with clock.on(layers):
        for _ in range(2):
            layers[0](torch.zeros(1, 5, 2), 0.01)
            time.sleep(0.02)
            layers[1](torch.zeros(1, 3, 2), seconds=0.03)
    first, second = clock.forwards()
    assert [lap.tokens for lap in first] == [5, 3]
    assert [lap.layer for lap in second] == [0, 1]
    assert first[0].gap == 0
    assert 0.01 <= first[0].seconds < first[1].seconds
    assert 0.02 <= first[1].gap < 0.2
    assert all("forward" not in layer.__dict__ for layer in layers)
    assert clock.forwards() == []


def test_the_clock_comes_off_after_an_exception() -> None:
    layer = Slow()
    with (
        pytest.raises(TypeError),
        LayerClock(torch.device("cpu")).on([layer]),
    ):
        layer()
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_vision_towers_layers_are_found(name: str) -> None:
    model = build_skeleton(tiny.config(name))
    inner = model.model
    found = tower_paths(inner, model.get_decoder())
    assert len(found) == (2 if name == "video_llava" else 1)
    tower = model.config.vision_config
    depth = getattr(tower, "depth", None) or tower.num_hidden_layers
    assert all(len(inner.get_submodule(path)) == depth for path in found)


# -- short runs ----------------------------------------------------------------------------------


def case_of(name: str) -> tuple[Loaded, Case]:
    shape = find_shape(name)
    loaded = Loaded(name, build_skeleton(shape.config), shape.files, shape.family)
    return loaded, make_case(loaded, Shown("image", 336, 336), Sampling(), 64, UNPRUNED)


def planned(loaded: Loaded, case: Case, keep: float, names: Sequence[str]) -> list[Planned]:
    return [plan_row(loaded, case, one) for one in want_rows([keep], names)]


def test_a_rows_short_run_has_a_layer_for_every_stretch_and_one_more() -> None:
    loaded, case = case_of("llava-1.5-7b")
    whole, row, fast = planned(loaded, case, 0.3, ["fast"])
    assert probe_row(whole, 1).counts == (640, 640)
    assert probe_row(whole, 1).preset is None
    # `fast` cuts at the input and at the horizon.
    first, last = fast.steps
    assert probe_row(fast, 1).counts == (64 + first.after, 64 + last.after, 64 + last.after)
    stages = probe_row(fast, 1).preset.stages  # type: ignore[union-attr]
    assert [stage.at for stage in stages or ()] == ["input", "1"]
    assert row.steps[0].layer == 0


def test_with_layers_of_two_kinds_every_stretch_has_both() -> None:
    loaded, case = case_of("llava-1.5-7b")
    row = planned(loaded, case, 0.3, ["entropy-horizon"])[-1]
    entropy, horizon = row.steps
    counts = (640, 640, *[64 + entropy.after] * 2, *[64 + horizon.after] * 3)
    assert probe_row(row, 2).counts == counts


def test_a_short_run_keeps_as_many_tokens_as_the_row() -> None:
    step = Step(StageSpec("ecl", "random"), "image", 2, 2928, 958, 2928)
    preset = preset_of([(step, 1)])
    (stage,) = preset.image.stages  # type: ignore[misc]
    assert stage.at == "1"
    assert int(stage.keep * 2928 + 1e-6) == 958


def test_a_run_at_a_count_drops_the_others_at_the_input() -> None:
    loaded, case = case_of("llava-1.5-7b")
    row = planned(loaded, case, 0.3, [])[-1]
    probe = probe_count(row, 64 + 100, 1)
    assert probe.counts == (164,)
    assert [stage.at for stage in probe.preset.stages or ()] == ["input"]  # type: ignore[union-attr]
    none = probe_count(row, 64, 1).preset
    assert none is not None
    assert none.stages is not None
    assert (none.stages[0].method, none.stages[0].keep) == ("vtw", 0)


def test_a_shallower_decoder_is_as_deep_as_before_afterwards() -> None:
    model = shared_model("gemma3")
    decoder = model.get_decoder()
    layers, types = decoder.layers, list(decoder.config.layer_types)
    with at_depth(model, 2):
        assert len(decoder.layers) == 2
        assert decoder.config.layer_types == types[:2]
    assert decoder.layers is layers
    assert decoder.config.layer_types == types
    assert decoder.config.num_hidden_layers == tiny.LAYERS


def test_a_small_head_has_few_rows_and_grows_back() -> None:
    model = shared_model("llava")
    weight = model.get_output_embeddings().weight
    with small_head(model):
        assert model.get_output_embeddings().weight.shape == (FEW, weight.shape[1])
    assert model.get_output_embeddings().weight is weight
    seconds = time_head(model, 20, budget=60.0)
    assert seconds.prefill > 0
    assert seconds.decode > 0


def test_speed_ups_are_those_of_the_passes() -> None:
    plain = RowTimes(0.1, 1.0, 0.0, 8.0, 0.2, 0.01, (Pass(8.0, 10.0, 0.5),) * 3)
    passes = Pass(2.0, 4.0, 0.1), Pass(4.0, 5.0, 0.2), Pass(2.0, 4.0, 0.1)
    times = RowTimes(0.1, 1.0, 0.05, 2.0, 0.2, 0.01, passes)
    found = times.speedups(plain, lambda one: one.prefill)
    assert (found.passes, found.median, found.spread) == ((4.0, 2.0, 4.0), 4.0, [2.0, 4.0])
    whole = times.speedups(plain, lambda one: one.total(11))
    assert whole.passes == (15 / 5, 15 / 7, 15 / 5)
    with pytest.raises(ValueError, match="zip"):  # of other passes
        times.speedups(replace(plain, passes=plain.passes[:2]), lambda one: one.prefill)
    assert times.first_token == pytest.approx(0.1 + 1.0 + 2.0 + 0.2)
    assert times.total(11) == pytest.approx(3.3 + 10 * 0.01)


def test_a_shallow_model_runs() -> None:
    config = shallow_config(tiny.config("qwen2_5_vl"), 3)
    model = build_random(config, torch.device("cpu"), torch.float32)
    inputs = tiny.inputs("qwen2_5_vl", tiny.model("qwen2_5_vl"), "video")
    assert model(**inputs).logits.isfinite().all()
