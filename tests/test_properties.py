"""What holds for any layout, schedule, preset and batch, and after an exception at any point."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import tiny
import torch
from conftest import shared_model
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtprune
from vtprune.engine.trace import Trace
from vtprune.errors import PresetError
from vtprune.models.seams import ROPE_DELTAS
from vtprune.preset import Preset, load_preset
from vtprune.tokens.layout import CLS, MODALITIES, NEWLINE, Grid, Layout, box, join, lay_out, single
from vtprune.tokens.quotas import quotas, weighted_quotas
from vtprune.tokens.schedule import Place, fixed_count
from vtprune.tokens.solver import solve

Batch = dict[str, torch.Tensor]
FAMILIES = ("llava_onevision", "qwen2_5_vl")
METHODS = ("random", "uniform", "entropy", "divprune", "dart", "scope")
AT_LAYERS = ("fastv", "v2drop")
KEEPS = st.floats(0.02, 1.0, allow_nan=False)


def holds(examples: int) -> Callable[..., Any]:
    """The same examples in every run, however slow the machine is."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# -- layouts and quotas ---------------------------------------------------------------------------


@st.composite
def grids(draw: st.DrawFn, modality: str) -> Grid:
    """One media item: frames of patches, some with newlines, or a picture with a CLS and tiles."""
    rows, cols = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if modality == "video":
        frames = [box(1, rows, cols).at_frame(t) for t in range(draw(st.integers(1, 4)))]
        if draw(st.booleans()):
            frames.append(single(NEWLINE, len(frames) - 1, 0, rows - 1, cols))
        return join(frames)
    tiles = [box(1, rows, cols, tile) for tile in range(draw(st.integers(1, 3)))]
    return join([single(CLS), *tiles] if draw(st.booleans()) else tiles)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Media items of both kinds in any order, with text between them."""
    items = draw(st.lists(st.sampled_from(MODALITIES), max_size=4))
    columns: dict[str, list[int]] = {name: [] for name in MODALITIES}
    media: dict[str, list[Grid]] = {name: [] for name in MODALITIES}
    at = 0
    for name in items:
        at += draw(st.integers(0, 3))
        grid = draw(grids(name))
        media[name].append(grid)
        columns[name] += range(at, at + len(grid))
        at += len(grid)
    return lay_out({name: torch.tensor(row).long() for name, row in columns.items()}, media)


@holds(100)
@given(layouts(), st.data())
def test_a_layout_is_ascending_and_every_part_of_it_is_its_tokens(
    layout: Layout, data: st.DataObject
) -> None:
    assert torch.equal(layout.columns, layout.columns.unique())
    chosen = data.draw(st.sets(st.integers(0, max(len(layout) - 1, 0)), max_size=len(layout)))
    index = torch.tensor(sorted(chosen if len(layout) else ())).long()
    part = layout.take(index)
    assert part.columns.tolist() == [layout.columns.tolist()[i] for i in index.tolist()]
    of_both = [layout.columns[layout.of_modality(name)].tolist() for name in MODALITIES]
    assert sorted(itertools.chain(*of_both)) == layout.columns.tolist()
    for one in (layout, part):
        numbers = {}
        for per in ("all", "frame", "tile"):
            groups = one.groups(per).tolist()
            numbers[per] = groups
            assert set(groups) == set(range(len(set(groups))))  # from 0, none empty
            assert groups == sorted(groups)  # in prompt order
        for i, j in itertools.pairwise(range(len(one))):
            same = one.media[i] == one.media[j] and one.grid.frame[i] == one.grid.frame[j]
            assert (numbers["frame"][i] == numbers["frame"][j]) == bool(same)
            same &= one.grid.tile[i] == one.grid.tile[j]
            assert (numbers["tile"][i] == numbers["tile"][j]) == bool(same)


@holds(100)
@given(layouts())
def test_the_previous_token_is_found_as_a_search_by_hand_finds_it(layout: Layout) -> None:
    grid, item = layout.grid, layout.items().tolist()
    fields = (layout.items(), grid.tile, grid.row, grid.col, grid.kind)
    places = torch.stack(fields, dim=1).tolist()
    frames = grid.frame.tolist()
    for i, found in enumerate(layout.previous().tolist()):
        earlier = [j for j, p in enumerate(places) if p == places[i] and frames[j] < frames[i]]
        assert found == max(earlier, key=lambda j: frames[j], default=-1)
    both = list(zip(item, frames, strict=True))
    first = [(own, frame) for own, frame in both if all((own, t) not in both for t in range(frame))]
    assert layout.in_first_frame().tolist() == [pair in first for pair in both]


def exact_shares(count: int, sizes: list[int], weights: list[float]) -> list[float]:
    """What each group gets of `count` where parts of tokens could be shared: water filling."""
    full: set[int] = set()
    while True:
        left = [i for i in range(len(sizes)) if i not in full]
        total = sum(weights[i] for i in left)
        room = count - sum(sizes[i] for i in full)
        exact = {i: room * weights[i] / total if total else room / len(left) for i in left}
        more = {i for i in left if exact[i] > sizes[i]}
        if not more:
            return [float(sizes[i]) if i in full else exact[i] for i in range(len(sizes))]
        full |= more


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=8)


@holds(200)
@given(SIZES, st.data())
def test_quotas_are_the_exact_shares_rounded_with_remainders_to_the_earlier(
    sizes: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, sum(sizes)))
    shares = quotas(count, sizes)
    assert sum(shares) == count
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    if count < len(sizes):
        assert set(shares) <= {0, 1}  # spread evenly: no two gaps differ by more than one
        at = [-1, *(i for i, share in enumerate(shares) if share), len(sizes)]
        gaps = [b - a for a, b in itertools.pairwise(at)][1:-1]
        assert not gaps or max(gaps) - min(gaps) <= 1
        return
    assert min(shares) >= 1
    exact = exact_shares(count, sizes, [1.0] * len(sizes))
    assert all(abs(s - e) < 1 - 1e-9 for s, e in zip(shares, exact, strict=True))
    open_shares = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    assert open_shares == sorted(open_shares, reverse=True)  # ties to the earlier


@holds(200)
@given(SIZES, st.booleans(), st.data())
def test_weighted_quotas_are_within_one_token_of_the_exact_shares(
    sizes: list[int], at_least_one: bool, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, sum(sizes)))
    weights = data.draw(
        st.lists(st.floats(0, 1e3), min_size=len(sizes), max_size=len(sizes)), label="weights"
    )
    shares = weighted_quotas(count, sizes, weights, int(at_least_one))
    assert sum(shares) == count
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    if at_least_one:
        assert min(shares) >= (count >= len(sizes))
        return
    assume(min(weights) > 0)
    exact = exact_shares(count, sizes, weights)
    assert all(abs(s - e) < 1 + 1e-6 for s, e in zip(shares, exact, strict=True))


# -- schedules ------------------------------------------------------------------------------------


@st.composite
def places(draw: st.DrawFn, num_layers: int, free: bool) -> list[Place]:
    """Stages at increasing layers whose keeps fall; one of them without a keep where `free`."""
    layers = sorted(draw(st.sets(st.integers(0, num_layers - 1), min_size=1, max_size=4)))
    keeps = sorted((draw(KEEPS) for _ in layers), reverse=True)
    which = draw(st.integers(0, len(layers) - 1)) if free else None
    return [
        Place(draw(st.sampled_from(["ecl", "horizon", str(n)])), n, None if i == which else keep)
        for i, (n, keep) in enumerate(zip(layers, keeps, strict=True))
    ]


@holds(150)
@given(st.integers(1, 40), st.integers(1, 3000), st.data())
def test_stages_with_keeps_leave_the_floor_of_their_share(
    num_layers: int, num_tokens: int, data: st.DataObject
) -> None:
    stages = data.draw(places(num_layers, free=False))
    schedule = solve(stages, None, num_layers, num_tokens)
    counts = [max(1, math.floor(place.keep * num_tokens + 1e-6)) for place in stages]  # type: ignore[operator]
    assert [(cut.layer, cut.count) for cut in schedule.cuts] == [
        (place.layer, count) for place, count in zip(stages, counts, strict=True)
    ]
    seen, left = [], num_tokens
    for layer in range(num_layers):
        left = next((cut.count for cut in schedule.cuts if cut.layer == layer), left)
        seen.append(left)
    assert schedule.tokens_by_layer() == seen
    assert schedule.keep_mean() == pytest.approx(sum(seen) / (num_layers * num_tokens))


@holds(200)
@given(st.integers(1, 40), st.integers(1, 3000), KEEPS, st.data())
def test_a_free_stage_spends_the_budget_up_to_one_token_in_its_layers(
    num_layers: int, num_tokens: int, keep: float, data: st.DataObject
) -> None:
    stages = data.draw(places(num_layers, free=True))
    try:
        schedule = solve(stages, keep, num_layers, num_tokens)
    except PresetError as error:
        assert "reachable keep is" in error.message  # noqa: PT017
        return
    counts = [num_tokens, *(cut.count for cut in schedule.cuts)]
    assert all(a >= b >= 1 for a, b in itertools.pairwise(counts))
    if keep == 1:
        assert schedule.cuts == ()
        return
    free = next(i for i, place in enumerate(stages) if place.keep is None)
    left = keep * num_layers * num_tokens - sum(schedule.tokens_by_layer())
    assert -1e-4 <= left < num_layers - schedule.cuts[free].layer
    if not schedule.warnings:  # nothing moved: DESIGN's floor over the layers of the free stage
        bounds = [*(cut.layer for cut in schedule.cuts), num_layers]
        others = bounds[0] * num_tokens + sum(
            cut.count * (bounds[i + 1] - bounds[i])
            for i, cut in enumerate(schedule.cuts)
            if i != free
        )
        floor = (keep * num_layers * num_tokens - others) / (bounds[free + 1] - bounds[free])
        before = schedule.cuts[free - 1].count if free else num_tokens
        assert schedule.cuts[free].count == min(math.floor(floor + 1e-6), before)


# -- presets --------------------------------------------------------------------------------------


@st.composite
def stage_lists(draw: st.DrawFn, num_layers: int = tiny.LAYERS) -> list[dict[str, object]]:
    """One to three stages of any method for pictures and videos, each with its own keep."""
    layers = sorted(draw(st.sets(st.integers(0, num_layers - 1), min_size=1, max_size=3)))
    keeps = sorted((draw(st.floats(0.05, 0.95)) for _ in layers), reverse=True)
    return [
        {
            "at": layer or "input",
            "method": draw(st.sampled_from(METHODS if layer == 0 else METHODS + AT_LAYERS)),
            "keep": keep,
            "per": draw(st.sampled_from(["all", "frame", "tile"])),
        }
        for layer, keep in zip(layers, keeps, strict=True)
    ]


@st.composite
def presets(draw: st.DrawFn) -> dict[str, object]:
    made: dict[str, object] = {"stages": draw(stage_lists()), "seed": draw(st.integers(0, 9))}
    if draw(st.booleans()):
        made["image"] = {"stages": draw(stage_lists()), "max_tiles": draw(st.integers(1, 9))}
    if draw(st.booleans()):
        made["video"] = {"stages": draw(stage_lists()), "frames": draw(st.integers(1, 64))}
    if draw(st.booleans()):
        made["decode"] = {"every": draw(st.integers(1, 9)), "keep": draw(KEEPS)}
    return made


@holds(60)
@given(presets())
def test_a_preset_is_the_same_after_its_mapping_is_read_again(data: dict[str, object]) -> None:
    given_data = copy.deepcopy(data)
    preset = load_preset(data)
    assert data == given_data  # what is the caller's stays as it is
    again = Preset.from_dict(preset.to_dict(), preset.name)
    assert again.to_dict() == preset.to_dict()
    for modality in MODALITIES:
        assert again.stages_for(modality) == preset.stages_for(modality)
    for stage in preset.every_stage():
        with pytest.raises(AttributeError):
            stage.keep = 0.5  # type: ignore[misc]


# -- models ---------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> tuple[PreTrainedModel, Batch]:
    """A tiny model and one prompt, or two of different length, of any media."""
    name = draw(st.sampled_from(FAMILIES))
    model = shared_model(name)
    kind = draw(st.sampled_from(["image", "several", "video", "mixed"]))
    num_frames = draw(st.sampled_from([2, 4]))
    side = st.integers(2, 9).map(lambda n: n * tiny.PATCH)
    made = [
        tiny.inputs(
            name,
            model,
            kind,
            seed=draw(st.integers(0, 9)),
            sizes=[(draw(side), draw(side)) for _ in range(2)],
            frames=num_frames,
            text=draw(st.integers(1, 7)),
        )
        for _ in range(draw(st.integers(1, 2)))
    ]
    return model, made[0] if len(made) == 1 else tiny.left_pad(name, made)


def check_counts(trace: Trace, stages: list[dict[str, object]]) -> None:
    """Counts, order, quotas and layer averages of a trace are those of its preset and layouts."""
    averages = []
    for row, layout in enumerate(trace.layouts):
        left = [len(layout)] * tiny.LAYERS
        present = layout.columns.tolist()
        for stage, record in zip(stages, trace.stages, strict=True):
            count = fixed_count(stage["keep"], len(layout))  # type: ignore[arg-type]
            assert (record.before[row], record.after[row]) == (len(present), count)
            kept = record.kept[row]
            assert kept == sorted(set(kept))
            assert set(kept) <= set(present)
            assert len(kept) == count
            before = layout.take(torch.isin(layout.columns, torch.tensor(present)).nonzero()[:, 0])
            groups = before.groups(str(stage["per"]))
            stays = torch.isin(before.columns, torch.tensor(kept))
            sizes = groups.bincount().tolist()
            assert groups[stays].bincount(minlength=len(sizes)).tolist() == quotas(count, sizes)
            left[record.layer :] = [count] * (tiny.LAYERS - record.layer)
            present = kept
        assert trace.visual_by_layer[row] == left
        assert trace.kept[row].columns.tolist() == present
        averages.append(sum(left) / (tiny.LAYERS * len(layout)))
    assert trace.keep_mean(0) == pytest.approx(averages[0])


@holds(15)
@given(batches(), stage_lists())
def test_pruned_equals_masked_for_any_media_stages_and_batch(
    case: tuple[PreTrainedModel, Batch], stages: list[dict[str, object]]
) -> None:
    model, inputs = case
    with vtprune.pruning(model, {"stages": stages}) as trace:
        tokens, logits = oracle.generate(model, inputs, 3)
    check_counts(trace, stages)
    oracle.assert_masked(model, inputs, trace, tokens, logits)


# -- exceptions -----------------------------------------------------------------------------------


class Stop(BaseException):
    """Nothing catches it by accident."""


class RaiseAt(TorchFunctionMode):
    """Counts the operations of torch, and raises in place of one of them."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.number, self.count = number, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.count == self.number:
            self.number = None  # once: what is put back afterwards may use torch
            raise Stop
        self.count += 1
        return func(*args, **(kwargs or {}))


def state_of(model: PreTrainedModel) -> dict[str, object]:
    """Everything that a block could leave behind: hooks, attributes, methods, configs, kernels."""
    marks = {
        name: {
            key: dict(value) if key.endswith("_hooks") else id(value)
            for key, value in vars(module).items()
            if key != ROPE_DELTAS  # transformers notes it anew in every prompt, pruned or not
        }
        for name, module in model.named_modules()
    }
    configs = {name: str(m.config) for name, m in model.named_modules() if hasattr(m, "config")}
    return {
        "modules": marks,
        "configs": configs,
        "generation": str(model.generation_config),
        "kernels": dict(ALL_ATTENTION_FUNCTIONS.items()),
        "gradients": torch.is_grad_enabled(),
        "weights": [(id(w), w._version) for w in model.state_dict(keep_vars=True).values()],
    }


TOWER = {"at": "input", "method": "visionzip", "keep": 0.6}
BROKEN: dict[str, dict[str, object]] = {
    "fastv": {"stages": [TOWER, {"at": 2, "method": "fastv", "keep": 0.3}]},
    "decode": {
        "stages": [{"at": 3, "method": "entropy", "keep": 0.4}],
        "decode": {"every": 1, "keep": 0.5},
    },
    "v2drop": {"stages": [{"at": 3, "method": "v2drop", "keep": 0.4}]},
}


@functools.cache
def operations(name: str, preset: str) -> int:
    """How many operations of torch a pruned generation takes."""
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "image")
    oracle.generate(model, inputs, 3)  # a first run leaves marks of its own
    with vtprune.pruning(model, BROKEN[preset]), RaiseAt() as counting:
        oracle.generate(model, inputs, 3)
    return counting.count


@pytest.mark.parametrize(
    ("name", "preset"), list(zip((*FAMILIES, FAMILIES[0]), BROKEN, strict=True))
)
def test_the_model_is_as_before_after_an_exception_at_any_point(name: str, preset: str) -> None:
    model = shared_model(name)
    inputs = tiny.inputs(name, model, "image")
    expected = oracle.generate(model, inputs, 2)
    before = state_of(model)
    total = operations(name, preset)

    @holds(10)
    @given(st.integers(0, total - 1))
    def check(number: int) -> None:
        with pytest.raises(Stop), RaiseAt(number), vtprune.pruning(model, BROKEN[preset]):
            oracle.generate(model, inputs, 3)
        assert state_of(model) == before

    check()
    tokens, logits = oracle.generate(model, inputs, 2)
    assert torch.equal(tokens, expected[0])
    assert torch.equal(logits, expected[1])
