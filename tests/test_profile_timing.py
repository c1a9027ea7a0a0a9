"""Seconds of layers, towers and heads, and how they are summed."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import tiny
import torch
from conftest import shared_model
from torch import nn

from vtprune.evaluation.profiling.model_runs import (
    HEAD_ROWS,
    LayerClock,
    LayerTime,
    at_depth,
    count_run,
    short_run,
    small_head,
    time_head,
    whole_tower,
)
from vtprune.evaluation.profiling.prompts import ProfiledMedia, ProfiledPrompt, make_prompt
from vtprune.evaluation.profiling.row_times import LayerSamples, PassTimes, RowTimes
from vtprune.evaluation.profiling.rows import PlannedRow, plan_row, profile_variants
from vtprune.evaluation.profiling.shapes import (
    build_random,
    find_shape,
    shallow_config,
)
from vtprune.models.base import Sampling
from vtprune.models.encoder_cost import tower_paths
from vtprune.models.loading import Loaded
from vtprune.models.skeleton import build_skeleton


def samples(*passes: dict[tuple[str, int], list[float]]) -> LayerSamples:
    return LayerSamples(
        lambda tokens: float(tokens),
        [[(*key, one) for key, seconds in timed.items() for one in seconds] for timed in passes],
    )


def test_a_count_that_was_timed_has_the_median_of_its_times() -> None:
    timed = samples({("", 10): [1.0, 2.0, 6.0]}, {("", 10): [9.0]})
    assert timed.seconds("", 10, 0) == 2.0
    assert timed.seconds("", 10, 1) == 9.0
    assert not timed.scaled


def test_a_count_that_was_not_timed_is_scaled_by_the_pace_around_it() -> None:
    timed = samples({("", 10): [10.0], ("", 30): [90.0]})  # 1 and 3 seconds a token
    assert timed.seconds("", 20, 0) == pytest.approx(20 * 2)
    assert timed.seconds("", 5, 0) == pytest.approx(5 * 1)
    assert timed.seconds("", 60, 0) == pytest.approx(60 * 3)
    assert timed.scaled == {20, 5, 60}


def test_a_pass_that_lacks_a_count_takes_it_from_the_others() -> None:
    timed = samples({("", 10): [1.0]}, {("", 20): [5.0]})
    assert timed.seconds("", 10, 1) == 1.0
    assert not timed.scaled


def test_all_layers_are_summed_by_their_kinds_and_counts() -> None:
    timed = samples({("a", 10): [1.0], ("b", 10): [2.0], ("a", 4): [0.5]})
    assert timed.total(["a", "b", "a", "a"], [10, 10, 4, 4], 0) == 1.0 + 2.0 + 0.5 + 0.5


def test_a_whole_tower_has_as_many_layers_of_each_kind_as_it_has() -> None:
    times = [LayerTime(0, 7, 2.0), LayerTime(1, 7, 5.0)]
    kinds = ["", "", "full", ""]
    # 8 seconds, 7 of them in the layers, of which there are three of 2 and one of 5.
    assert whole_tower(8.0, [times], ["", "full"], kinds) == pytest.approx(1.0 + 3 * 2.0 + 5.0)


class Slow(nn.Module):
    def forward(self, hidden: torch.Tensor, seconds: float) -> torch.Tensor:
        time.sleep(seconds)
        return hidden


def test_the_clock_notes_every_layer_and_leaves_them_as_they_were() -> None:
    layers = [Slow(), Slow()]
    clock = LayerClock(torch.device("cpu"))
    with clock.on(layers):
        for _ in range(2):
            layers[0](torch.zeros(1, 5, 2), 0.01)
            layers[1](torch.zeros(1, 3, 2), seconds=0.2)
    first, second = clock.forwards()
    assert [one.tokens for one in first] == [5, 3]
    assert [one.layer for one in second] == [0, 1]
    assert 0.01 <= first[0].seconds < first[1].seconds
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


def case_of(name: str) -> tuple[Loaded, ProfiledPrompt]:
    shape = find_shape(name)
    loaded = Loaded(name, build_skeleton(shape.config), shape.files, shape.family)
    return loaded, make_prompt(loaded, ProfiledMedia("image", 336, 336), Sampling(), 64)


def planned(
    loaded: Loaded, case: ProfiledPrompt, keep: float, names: Sequence[str]
) -> list[PlannedRow]:
    return [plan_row(loaded, case, one) for one in profile_variants([keep], names)]


def test_a_rows_short_run_has_a_layer_between_any_two_cuts() -> None:
    loaded, case = case_of("llava-1.5-7b")
    whole, row, fast = planned(loaded, case, 0.3, ["fast"])
    assert short_run(whole, 1).counts == (640,)
    assert short_run(whole, 1).preset is None
    # `fast` cuts at the input and at the horizon.
    first, last = fast.cuts
    assert short_run(fast, 1).counts == (64 + first.after, 64 + last.after)
    stages = short_run(fast, 1).preset.stages  # type: ignore[union-attr]
    assert [stage.at for stage in stages or ()] == ["input", "1"]
    assert row.cuts[0].layer == 0


def test_with_layers_of_two_kinds_there_are_both_between_any_two_cuts() -> None:
    loaded, case = case_of("llava-1.5-7b")
    row = planned(loaded, case, 0.3, ["entropy-horizon"])[-1]
    entropy, horizon = row.cuts
    counts = (640, 640, *[64 + entropy.after] * 2, *[64 + horizon.after] * 2)
    assert short_run(row, 2).counts == counts


def test_a_short_run_keeps_as_many_tokens_as_the_row() -> None:
    loaded, case = case_of("llava-1.5-7b")
    row = planned(loaded, case, 0.3, ["entropy-horizon"])[-1]
    stages = short_run(row, 1).preset.stages  # type: ignore[union-attr]
    assert [stage.at for stage in stages or ()] == ["1", "2"]
    assert [int((stage.keep or 0) * 576 + 1e-6) for stage in stages or ()] == [
        step.after for step in row.cuts
    ]


def test_a_run_at_a_count_drops_the_others_at_the_input() -> None:
    loaded, case = case_of("llava-1.5-7b")
    row = planned(loaded, case, 0.3, [])[-1]
    run = count_run(row, 64 + 100, 1)
    assert run.counts == (164,)
    assert [stage.at for stage in run.preset.stages or ()] == ["input"]  # type: ignore[union-attr]
    none = count_run(row, 64, 1).preset
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
        assert model.get_output_embeddings().weight.shape == (HEAD_ROWS, weight.shape[1])
    assert model.get_output_embeddings().weight is weight
    assert min(time_head(model, 20, long=1.0)) > 0
    assert min(time_head(model, 20, long=0.0)) > 0


def times(*passes: tuple[float, float, float]) -> RowTimes:
    """Seconds of the prefill, of all else to the first token, and of a decoded token."""
    return RowTimes(tuple(PassTimes(0.1, rest - 0.1, 0.0, prefill, 0.0, decode)
                          for prefill, rest, decode in passes), ())  # fmt: skip


def test_speed_ups_are_those_of_the_passes() -> None:
    unpruned = times(*[(8.0, 2.0, 0.5)] * 3)
    pruned = times((2.0, 2.0, 0.1), (4.0, 1.0, 0.2), (2.0, 2.0, 0.1))
    assert pruned.speedups(unpruned, lambda one: one.prefill) == (4.0, 2.0, 4.0)
    total = pruned.speedups(unpruned, lambda one: one.total(11))
    assert total == pytest.approx((15 / 5, 15 / 7, 15 / 5))
    with pytest.raises(ValueError, match="zip"):  # of other passes
        pruned.speedups(times((8.0, 2.0, 0.5)), lambda one: one.prefill)
    assert pruned.typical == PassTimes(0.1, 1.9, 0.0, 2.0, 0.0, 0.1)
    assert pruned.typical.first_token == pytest.approx(4.0)
    assert pruned.typical.total(11) == pytest.approx(5.0)


def test_a_shallow_model_runs() -> None:
    config = shallow_config(tiny.config("qwen2_5_vl"), 3)
    model = build_random(config, torch.device("cpu"), torch.float32)
    inputs = tiny.inputs("qwen2_5_vl", tiny.model("qwen2_5_vl"), "video")
    assert model(**inputs).logits.isfinite().all()
