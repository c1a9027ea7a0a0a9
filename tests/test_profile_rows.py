"""What the rows of a profile keep and cost, by counts alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from vtprune.errors import PresetError
from vtprune.evaluation.profiling.machine import Machine, peak_bytes
from vtprune.evaluation.profiling.prompts import ProfiledMedia, ProfiledPrompt, make_prompt
from vtprune.evaluation.profiling.result import count_flops, count_tokens
from vtprune.evaluation.profiling.rows import PlannedRow, is_preset, plan_row, profile_variants
from vtprune.evaluation.profiling.shapes import find_shape
from vtprune.inference.roofline import Ceilings, WeightBytes, decode_bound, prefill_bound
from vtprune.models import cost
from vtprune.models.base import Sampling
from vtprune.models.layer_cost import measure_decoder
from vtprune.models.loading import Loaded
from vtprune.models.skeleton import build_skeleton
from vtprune.preset import load_preset, preset_names

MACHINE = Machine("cpu", "a CPU", 1, "float32", 1e12, 1e10, 2**34)


def loaded(name: str) -> Loaded:
    shape = find_shape(name)
    return Loaded(name, build_skeleton(shape.config), shape.files, shape.family)


@pytest.fixture(scope="module")
def llava() -> Loaded:
    return loaded("llava-1.5-7b")


@pytest.fixture(scope="module")
def case(llava: Loaded) -> ProfiledPrompt:
    return make_prompt(llava, ProfiledMedia("image", 336, 336), Sampling(), 64)


def rows(
    model: Loaded, case: ProfiledPrompt, keeps: Sequence[float], **options: object
) -> list[PlannedRow]:
    wanted = profile_variants(keeps, [], **options)  # type: ignore[arg-type]
    return [plan_row(model, case, one) for one in wanted]


@pytest.mark.parametrize(
    ("average", "teraflops"),
    # Of the decoder's layers, as EntropyPrune counts them: cut at layer 2, 64 tokens of text.
    [(576, 8.504), (192, 3.350), (128, 2.511), (64, 1.665)],
)
def test_flops_of_the_layers_are_the_published_ones(
    llava: Loaded, case: ProfiledPrompt, average: int, teraflops: float
) -> None:
    row = rows(llava, case, [average / 576], methods=["entropy"], at="2")[-1]
    flops, _ = count_flops(llava, row, 1)
    layers = flops.prefill_by_layer
    assert sum(layers) / 1e12 == pytest.approx(teraflops, abs=6e-4)
    head = cost.head_flops(measure_decoder(llava.model))
    assert flops.prefill == pytest.approx(sum(layers) + head)


@pytest.mark.parametrize(("average", "megabytes"), [(576, 288), (192, 95.8), (64, 31.6)])
def test_the_cache_of_the_picture_is_the_published_one(
    llava: Loaded, case: ProfiledPrompt, average: int, megabytes: float
) -> None:
    row = rows(llava, case, [average / 576], methods=["entropy"], at="2")[-1]
    text = 2 * 2 * 4096 * 32 * 64  # keys and values of 64 tokens of text in 32 layers
    _, cache = count_flops(llava, row, 1)
    assert cache.kept is not None
    assert (cache.kept - text) / 2**20 == pytest.approx(megabytes, abs=0.06)


def test_counts_of_a_row_are_those_of_the_schedule(llava: Loaded, case: ProfiledPrompt) -> None:
    whole, row = rows(llava, case, [0.5], methods=["uniform"], at="8")
    assert whole.visual == (576,) * 32
    # (0.5 x 32 x 576 - 8 x 576) / 24 = 192
    assert row.visual == (576,) * 8 + (192,) * 24
    assert row.counts == tuple(count + 64 for count in row.visual)
    tokens = count_tokens(row, 32)
    assert tokens.keep_mean == pytest.approx(0.5)
    assert tokens.kept_after == 192
    assert tokens.by_modality == {"image": 192}
    (stage,) = tokens.stages
    assert (stage.layer, stage.before, stage.after) == (8, 576, 192)


def test_tower_and_projector_add_up_to_the_vision_part(llava: Loaded, case: ProfiledPrompt) -> None:
    flops, _ = count_flops(llava, rows(llava, case, [])[0], 32)
    assert flops.tower + flops.projector == pytest.approx(flops.vision)
    # 576 tokens through 1024 x 4096 and 4096 x 4096.
    assert flops.projector == 2 * 576 * (1024 * 4096 + 4096 * 4096)


def test_a_decoded_token_costs_what_one_step_does(llava: Loaded, case: ProfiledPrompt) -> None:
    flops, _ = count_flops(llava, rows(llava, case, [])[0], 3)
    shape = measure_decoder(llava.model)
    assert flops.decode == cost.decode_flops(shape, [640] * 32, 3)
    assert flops.decode_per_token == cost.decode_flops(shape, [640] * 32, 2)


def test_the_rows_are_the_keeps_and_then_every_preset() -> None:
    wanted = profile_variants()
    assert [one.keep for one in wanted[:5]] == [1.0, 0.5, 0.3, 0.2, 0.1]
    assert [one.name for one in wanted if is_preset(one)] == preset_names()
    assert [one.role for one in wanted[:2]] == ["unpruned", "asked"]


def test_the_unpruned_row_is_there_whatever_is_asked_for() -> None:
    assert [one.keep for one in profile_variants([0.3, 0.3], [])] == [1.0, 0.3]


def test_keeps_cut_like_the_first_preset_that_takes_one() -> None:
    stages = profile_variants([0.4], ["fast"])[1].preset.stages
    assert stages == load_preset("fast").stages
    assert profile_variants([0.4], [])[1].preset.stages == load_preset("balanced").stages
    assert profile_variants([0.4], None, base="fast")[1].preset.stages == stages


def test_a_preset_that_sets_every_keep_itself_leaves_the_keeps_to_balanced(tmp_path: Path) -> None:
    path = tmp_path / "fixed.yaml"
    path.write_text("stages: [{at: 2, method: random, keep: 0.5}]\n", encoding="utf-8")
    wanted = profile_variants([0.3], [str(path)])
    assert wanted[1].preset.stages == load_preset("balanced").stages
    assert (wanted[2].keep, wanted[2].name) == (None, "fixed")


def test_a_method_of_no_such_name_is_refused() -> None:
    with pytest.raises(PresetError, match="unknown method 'entropie'"):
        profile_variants([0.3], [], methods=["entropie"])


def test_a_row_that_can_not_be_cut_says_why(llava: Loaded, case: ProfiledPrompt) -> None:
    row = rows(llava, case, [0.1], methods=["uniform"], at="16")[-1]
    assert "the lowest reachable keep" in row.error


def test_rows_that_are_cut_alike_have_one_key(llava: Loaded, case: ProfiledPrompt) -> None:
    wanted = profile_variants([0.3], ["balanced", "fast"])
    plain, keep, balanced, fast = (plan_row(llava, case, one).key for one in wanted)
    assert keep == balanced
    assert len({plain, keep, fast}) == 3


def test_a_prompt_longer_than_a_window_is_pruned() -> None:
    model = loaded("gemma-3-4b")
    case = make_prompt(model, ProfiledMedia("image", 896, 896), Sampling(), 800)
    row = rows(model, case, [0.3])[-1]
    assert (len(row.visual), row.error) == (34, "")


def test_every_layer_takes_the_longer_of_arithmetic_and_reading() -> None:
    shape = cost.plain_decoder(2, 100, 10, 10, 10, 400, 1000)
    # One layer: 2 n (4 x 100^2 + 3 x 100 x 400) + 4 n^2 x 100 FLOPs.
    given = Ceilings(1e6, 1e6), shape, WeightBytes(total=0, layer=640_000, head=400_000), [10, 1], 4
    prefill, decode = prefill_bound(*given), decode_bound(*given)
    arithmetic = (2 * 10 * 160_000 + 4 * 100 * 100) / 1e6  # 3.24 s, more than reading
    reading = 640_000 / 1e6  # 0.64 s, more than the arithmetic of one token, 0.3204
    head = max(2 * 100 * 1000, 400_000) / 1e6
    assert prefill.seconds == pytest.approx(arithmetic + reading + head)
    assert prefill.arithmetic == pytest.approx(arithmetic + 0.3204 + 0.2)
    assert prefill.reading == pytest.approx(2 * reading + head)
    cached = 2 * 10 * 10 * 4
    steps = [(640_000 + cached * count) / 1e6 for count in (10, 1)]
    assert decode.seconds == pytest.approx(sum(steps) + head)
    assert (prefill.by, decode.by) == ("compute", "bandwidth")


def test_a_token_reads_the_experts_that_it_goes_through() -> None:
    dense = cost.plain_decoder(1, 100, 10, 10, 10, 400, 1000)
    weights = WeightBytes(
        total=0, layer=8 * 640_000, head=0
    )  # of which a token goes through an eighth
    reads = [
        prefill_bound(Ceilings(1e6, 1e6), dense, weights, [count], 4).reading
        for count in (1, 4, 90)
    ]
    assert reads == pytest.approx([0.64, 4 * 0.64, 8 * 0.64])


def test_the_peak_is_weights_cache_and_one_layers_states() -> None:
    shape = cost.plain_decoder(2, 100, 10, 5, 10, 400, 1000)
    weights = WeightBytes(total=5000, layer=0, head=0)
    cache = 2 * 5 * 10 * 2 * (7 + 3)
    states = 2 * 7 * (6 * 100 + 2 * (100 + 50) + 3 * 400)
    assert peak_bytes(shape, weights, [7, 3], 2) == 5000 + cache + states
    scores = (2 + 4) * 10 * 7**2
    assert peak_bytes(shape, weights, [7, 3], 2, eager=True) == 5000 + cache + states + scores


def test_the_row_of_a_preset_has_the_keep_of_the_media(llava: Loaded, case: ProfiledPrompt) -> None:
    variant = profile_variants([], ["published-video"])[-1]
    row = plan_row(llava, case, variant)  # of a picture
    assert (row.keep, variant.keep) == (0.5, 0.082)
    assert count_tokens(row, 1).keep_mean == pytest.approx(0.5, abs=2e-3)
