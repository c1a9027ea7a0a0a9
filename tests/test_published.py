"""The schedules of arXiv 2512.07580 come out as published, count for count."""

from __future__ import annotations

import math

import oracle
import pytest
import tiny
import torch
from conftest import shared_model
from test_cuts import by_hand, recorded

import vtprune
from vtprune.engine.trace import Trace
from vtprune.tokens.schedule import Place
from vtprune.tokens.solver import solve

LAYERS, TOKENS = 32, 576  # LLaVA-1.5-7B

# (layer, tokens left) of the two stages, and the average over the layers; 0 tokens is VTW.
PUBLISHED = {
    "DART + random, 192": ((2, 252), (20, 38), 192.0),
    "DART + random, 64": ((1, 60), (20, 27), 63.75),
    "DivPrune + random, 192": ((0, 284), (20, 38), 191.75),
    "DivPrune + random, 64": ((0, 96), (20, 10), 63.75),
    "DART + VTW, 192": ((2, 260), (21, 0), 190.375),
    "DART + VTW, 64": ((1, 60), (26, 0), 64.875),
    "DivPrune + VTW, 192": ((0, 284), (20, 0), 177.5),
    "DivPrune + VTW, 64": ((0, 98), (21, 0), 64.3125),
}
SHOWN = dict(zip(PUBLISHED, (192.0, 63.75, 191.75, 63.75, 190.4, 64.9, 177.5, 64.3), strict=True))


def place(layer: int, count: int | None, drops_all: bool = False) -> Place:
    return Place(str(layer), layer, None if count is None else count / TOKENS, drops_all)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_schedule_has_its_counts_and_its_layer_average(name: str) -> None:
    first, second, average = PUBLISHED[name]
    places = [place(*first), place(*second, drops_all=not second[1])]
    solved = solve(places, None, LAYERS, TOKENS)
    assert [(cut.layer, cut.count) for cut in solved.cuts] == [first, second]
    assert solved.keep_mean() * TOKENS == average
    assert average == pytest.approx(SHOWN[name], abs=0.05)
    assert solved.warnings == ()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_layer_average_gives_the_published_count_of_a_free_stage(name: str) -> None:
    first, second, average = PUBLISHED[name]
    places = [place(first[0], None), place(*second, drops_all=not second[1])]
    solved = solve(places, average / TOKENS, LAYERS, TOKENS)
    assert [(cut.layer, cut.count) for cut in solved.cuts] == [first, second]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "VTW" in name])
def test_a_layer_average_gives_the_published_layer_of_the_withdrawal(name: str) -> None:
    first, second, average = PUBLISHED[name]
    free = Place("horizon", 24, None, drops_all=True)
    solved = solve([place(*first), free], average / TOKENS, LAYERS, TOKENS)
    assert [(cut.layer, cut.count) for cut in solved.cuts] == [first, second]


def scaled(name: str, num_layers: int, positions: str = "keep") -> list[dict[str, object]]:
    """The same fractions of a small model's layers and tokens.

    Args:
        positions: of the second stage.
    """
    (early, most), (late, least), _ = PUBLISHED[name]
    first = {
        "at": math.ceil(early / LAYERS * num_layers) or "input",
        "method": name.split()[0].lower(),
        "keep": most / TOKENS,
    }
    second = {
        "at": round(late / LAYERS * num_layers),
        "method": "random" if least else "vtw",
        "keep": least / TOKENS,
        "positions": positions,
    }
    return [first, second]


def assert_as_solved(trace: Trace, stages: list[dict[str, object]], num_layers: int) -> None:
    """The counts of both stages, and the average over the layers, of a batch of one."""
    num = len(trace.layouts[0])
    keeps = [float(str(stage["keep"])) for stage in stages]
    counts = [max(int(keep * num + 1e-6), int(keep > 0)) for keep in keeps]
    assert [record.after for record in trace.stages] == [[count] for count in counts]
    layers = [0 if stage["at"] == "input" else int(str(stage["at"])) for stage in stages]
    spent = layers[0] * num + (layers[1] - layers[0]) * counts[0]
    spent += (num_layers - layers[1]) * counts[1]
    assert trace.keep_mean() == pytest.approx(spent / (num_layers * num))


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_schedule_runs_in_a_model_as_it_was_solved(name: str, kind: str) -> None:
    model = shared_model("llava_onevision")
    num_layers = len(model.get_decoder().layers)
    stages = scaled(name, num_layers)
    inputs = tiny.inputs("llava_onevision", model, kind)
    with vtprune.pruning(model, {"stages": stages}) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=3)
    assert_as_solved(trace, stages, num_layers)
    oracle.assert_masked(model, inputs, trace, tokens, logits)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_schedule_whose_second_stage_renumbers_equals_a_hand_written_loop(
    name: str, kind: str
) -> None:
    model = shared_model("llava_onevision")
    num_layers = len(model.get_decoder().layers)
    stages = scaled(name, num_layers, "renumber")
    inputs = tiny.inputs("llava_onevision", model, kind)
    embeds = recorded(model, lambda: oracle.generate(model, inputs, steps=1))
    with vtprune.pruning(model, {"stages": stages}) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=3)
    assert_as_solved(trace, stages, num_layers)
    assert [record.positions for record in trace.stages] == ["keep", "renumber"]
    with torch.no_grad():
        expected = by_hand(model, inputs, embeds, stages, trace, tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    with vtprune.pruning(model, {"stages": scaled(name, num_layers)}):
        other = oracle.generate(model, inputs, steps=3, force=tokens)[1]
    apart = (other - logits).abs().amax(dim=-1)  # (1, steps)
    assert apart.min() > 1e-4, "the check would not notice the positions"
