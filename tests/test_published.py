"""The schedules of arXiv 2512.07580 come out as published, count for count."""

from __future__ import annotations

import math

import oracle
import pytest
import tiny
from conftest import shared_model

import vtprune
from vtprune.schedule import Place
from vtprune.solving import solve

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


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_schedule_runs_in_a_model_as_it_was_solved(name: str, kind: str) -> None:
    """The same fractions of a small model's layers and tokens."""
    model = shared_model("llava_onevision")
    num_layers = len(model.get_decoder().layers)
    (early, most), (late, least), _ = PUBLISHED[name]
    stages = [
        {
            "at": math.ceil(early / LAYERS * num_layers) or "input",
            "method": name.split()[0].lower(),
            "keep": most / TOKENS,
        },
        {
            "at": round(late / LAYERS * num_layers),
            "method": "random" if least else "vtw",
            "keep": least / TOKENS,
        },
    ]
    inputs = tiny.inputs("llava_onevision", model, kind)
    with vtprune.pruning(model, {"stages": stages}) as trace:
        tokens, logits = oracle.generate(model, inputs, steps=3)
    num = len(trace.layouts[0])
    counts = [int(most / TOKENS * num + 1e-6), int(least / TOKENS * num + 1e-6)]
    if least:
        counts[1] = max(counts[1], 1)
    assert [record.after for record in trace.stages] == [[count] for count in counts]
    layers = [0 if stage["at"] == "input" else int(str(stage["at"])) for stage in stages]
    spent = layers[0] * num + (layers[1] - layers[0]) * counts[0]
    spent += (num_layers - layers[1]) * counts[1]
    assert trace.keep_mean() == pytest.approx(spent / (num_layers * num))
    oracle.assert_masked(model, inputs, trace, tokens, logits)
