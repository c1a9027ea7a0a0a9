"""Every method keeps its budget; entropy computes what the paper and its code compute."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import sys

import numpy as np
import pytest
import torch

from vtprune.errors import ModelError, PresetError
from vtprune.preset.spec import check_place
from vtprune.pruners import (
    METHODS,
    MethodOption,
    check_options,
    create,
    find_method,
    reads_question,
)
from vtprune.pruners.base import (
    Budget,
    Selection,
    VisualTokens,
    depends_on_question,
    keep_best,
    merge,
)
from vtprune.pruners.contract import CONTRACT, Subject, flat, layouts, tokens_of, video
from vtprune.pruners.entropy import CHUNK, token_entropy
from vtprune.tokens.layout import Layout, box, lay_out

CUTTING = [name for name in METHODS if not METHODS[name].before_tower]
"""Methods that choose tokens; those that act before the vision tower have a file of their own."""
KEEPING = [name for name in CUTTING if not METHODS[name].drops_all]
LAYOUTS = layouts()


def choose(method: str, layout: Layout, count: int, per: str = "all", seed: int = 0) -> Selection:
    budget = Budget.share(count, layout.groups(per))
    return create(method, {}).select(tokens_of(layout, seed), budget)


# -- the registry ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_options_of_the_registry_are_the_fields_of_the_class(name: str) -> None:
    pruner = create(name, {})
    assert dataclasses.is_dataclass(pruner)
    fields = {field.name: field.default for field in dataclasses.fields(pruner)}
    assert fields == {option.name: option.default for option in METHODS[name].options}
    assert pruner == type(pruner)()
    assert type(pruner).__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", METHODS)
def test_the_file_is_named_as_the_method(name: str) -> None:
    module, cls = METHODS[name].path.split(":")
    assert module == "vtprune.pruners." + name.replace("-", "_")
    assert inspect.isclass(getattr(importlib.import_module(module), cls))


@pytest.mark.parametrize("name", METHODS)
def test_a_docstring_says_what_a_reader_asks_in_this_order(name: str) -> None:
    text = importlib.import_module(METHODS[name].path.split(":")[0]).__doc__ or ""
    heads = ("\nIdea: ", "\nWhy it works: ", "\nPaper: ", "\nOfficial code: ", "\nDifferences: ",
             "\nOptions:")  # fmt: skip
    found = [text.find(head) for head in heads]
    assert -1 not in found
    assert found == sorted(found)
    options = text[found[-1] :]
    for option in METHODS[name].options:
        assert f"{option.name}: " in options
        default = f'"{option.default}"' if option.choices else option.format_value(option.default)
        assert f"{default} (default)" in options
        assert all(f'"{choice}"' in options for choice in option.choices)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_a_real_place_and_says_what_it_does(name: str) -> None:
    assert len(METHODS[name].summary) <= 47, "a line of `vtprune methods` has 80 columns"
    method = METHODS[name]
    assert check_place(method.at) == method.at
    assert method.summary
    for option in method.options:
        assert option.check(option.default) == option.default
        assert option.help


@pytest.mark.parametrize("name", METHODS)
def test_every_value_of_every_option_is_taken(name: str) -> None:
    for option in METHODS[name].options:
        for choice in option.choices:
            assert getattr(create(name, {option.name: choice}), option.name) == choice
        for bound in (option.low, option.high):
            if bound is not None:
                made = create(name, {option.name: f"{bound:g}"})
                assert getattr(made, option.name) == bound


def settings_of(name: str) -> list[dict[str, str]]:
    """The defaults, and each choice of each option by itself."""
    return [{}, *({option.name: choice} for option in METHODS[name].options
                  for choice in option.choices)]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].before_tower])
def test_the_registry_knows_which_methods_read_the_question(name: str) -> None:
    for options in settings_of(name):
        pruner, later = create(name, options), METHODS[name].later
        reads = depends_on_question(pruner.needs)
        assert reads_question(name, options) == reads, options
        if later:
            assert depends_on_question(create(*later).needs)
            assert reads_question(name, options, "schedule"), options


NUMBER = MethodOption("share", 0.25, (), "of something", 0, 1)


@pytest.mark.parametrize(
    ("value", "number"), [(0, 0.0), ("0.5", 0.5), (1.0, 1.0), (" 1e-3 ", 1e-3)]
)
def test_a_number_within_its_bounds_is_taken_as_a_number(value: object, number: float) -> None:
    checked = NUMBER.check(value)
    assert (checked, type(checked)) == (number, float)


@pytest.mark.parametrize(
    "value", [-0.1, 1.1, "nan", float("inf"), "-inf", True, None, "", "half", [0.5], "9" * 400]
)
def test_what_is_no_number_within_the_bounds_is_none(value: object) -> None:
    assert NUMBER.check(value) is None


def test_a_number_without_bounds_is_any_finite_one() -> None:
    free = MethodOption("shift", 0.0, (), "by how much")
    assert free.check("-1e300") == -1e300
    assert free.check("inf") is None
    assert (NUMBER.values, free.values) == ("a number from 0 to 1", "a number")
    assert NUMBER.format_value(0.25) == "0.25"


@pytest.mark.parametrize("value", ["-1", "256", "some", "nan"])
def test_a_number_out_of_range_is_refused_with_the_range(value: str) -> None:
    with pytest.raises(PresetError, match=f"tolerance: {value} is not a value of") as caught:
        check_options("predictable", {"tolerance": value})
    assert caught.value.hint == "give a number from 0 to 255"


@pytest.mark.parametrize("name", METHODS)
def test_an_option_that_a_method_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(PresetError, match=f"method {name} has no option 'depth'"):
        check_options(name, {"depth": "1"})


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(PresetError, match="unknown method 'fastvtw'") as caught:
        find_method("fastvtw")
    assert all(name in caught.value.hint for name in METHODS)


# -- what every method keeps to -------------------------------------------------------------------


@pytest.mark.parametrize("check", CONTRACT)
@pytest.mark.parametrize("name", CUTTING)
def test_a_method_keeps_to_the_contract(name: str, check: str) -> None:
    method = METHODS[name]
    subject = Subject(lambda: create(name, {}), method.exact, method.drops_all, thorough=True)
    CONTRACT[check](subject)


def test_the_best_of_each_group_are_kept_and_ties_go_to_the_earlier() -> None:
    scores = torch.tensor([1.0, 3.0, 3.0, 2.0, 5.0, 5.0, 5.0, 0.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    budget = Budget(group, torch.tensor([2, 2, 1]))
    assert keep_best(scores, budget).tolist() == [1, 2, 4, 5, 7]
    budget = Budget(group, torch.tensor([1, 0, 0]))
    assert keep_best(scores, budget).tolist() == [1]


def test_the_best_are_found_where_groups_are_interleaved() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    budget = Budget(torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([1, 2]))
    assert keep_best(scores, budget).tolist() == [3, 4, 5]


def test_what_is_merged_into_no_token_is_in_no_sum() -> None:
    weight = torch.ones(3)
    selection = Selection(torch.tensor([1]), torch.tensor([-1, 0, -1]), weight)
    states = torch.tensor([[5.0], [2.0], [7.0]])
    assert merge(states, selection).tolist() == [[2.0]]


# -- uniform --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "step"), [(144, 2), (64, 3), (36, 4), (16, 6), (9, 8)])
def test_uniform_keeps_a_regular_sub_grid(count: int, step: int) -> None:
    layout = lay_out({"image": torch.arange(576)}, {"image": [box(1, 24, 24)]})
    grid = layout.take(choose("uniform", layout, count).index).grid
    for values in (grid.row.unique(), grid.col.unique()):
        assert len(values) ** 2 == count
        assert set(values.diff().tolist()) <= {step}


@pytest.mark.parametrize("count", [1, 7, 50, 98, 166, 300, 575])
def test_uniform_leaves_no_part_of_a_picture_out(count: int) -> None:
    layout = lay_out({"image": torch.arange(576)}, {"image": [box(1, 24, 24)]})
    grid = layout.take(choose("uniform", layout, count).index).grid
    for values in (grid.row, grid.col):
        assert 9 <= values.double().mean() <= 14
        held = torch.bincount(values // 6, minlength=4)
        assert count < 50 or held.min() > 0.1 * count


def test_uniform_has_about_as_many_rows_as_tokens_in_a_row() -> None:
    layout = lay_out({"image": torch.arange(16)}, {"image": [box(1, 4, 4)]})
    kept = choose("uniform", layout, 7).index  # the root of 7 is nearer to 3 than to 2
    assert (kept // 4).unique().tolist() == [0, 2, 3]


def test_uniform_spreads_over_the_frames() -> None:
    layout = video(frames=8, rows=4, cols=4, newline=False)
    index = choose("uniform", layout, 32).index
    assert torch.bincount(layout.grid.frame[index]).tolist() == [4] * 8
    index = choose("uniform", layout, 4).index  # fewer than frames
    assert layout.grid.frame[index].tolist() == [1, 3, 5, 7]


def test_uniform_takes_the_middle_where_it_can_keep_one() -> None:
    layout = lay_out({"image": torch.arange(25)}, {"image": [box(1, 5, 5)]})
    assert choose("uniform", layout, 1).index.tolist() == [12]


def test_uniform_of_a_flat_run_is_evenly_spaced() -> None:
    gaps = choose("uniform", flat(1000), 30).index.diff()
    assert int(gaps.max() - gaps.min()) <= 1


# -- random ---------------------------------------------------------------------------------------


def test_random_gives_every_token_the_same_chance() -> None:
    layout, draws = flat(12), 3000
    hits = torch.zeros(12)
    for seed in range(draws):
        hits[choose("random", layout, 4, seed=seed).index] += 1
    expected, spread = draws / 3, math.sqrt(draws * (1 / 3) * (2 / 3))
    assert float((hits - expected).abs().max()) < 4.5 * spread


def test_random_gives_every_pair_the_same_chance() -> None:
    layout, draws = flat(6), 3000
    pairs: dict[tuple[int, ...], int] = {}
    for seed in range(draws):
        pair = tuple(choose("random", layout, 2, seed=seed).index.tolist())
        pairs[pair] = pairs.get(pair, 0) + 1
    assert len(pairs) == 15
    assert max(abs(hits - 200) for hits in pairs.values()) < 4.5 * math.sqrt(200 * 14 / 15)


def test_random_of_another_seed_is_another_draw() -> None:
    layout = LAYOUTS["video"]
    draws = {tuple(choose("random", layout, 10, seed=seed).index.tolist()) for seed in range(20)}
    assert len(draws) == 20


def test_random_draws_what_it_drew_in_every_release() -> None:
    assert choose("random", flat(10), 4, seed=0).index.tolist() == [2, 5, 7, 8]


# -- entropy: the score ---------------------------------------------------------------------------


def reference(states: torch.Tensor, norm: str, primal: bool = False) -> np.ndarray:
    """The score of every token from its definition, one token at a time, in float64."""
    scores = []
    for token in states.double().numpy():
        num_heads = len(token)
        rows = token - token.mean(axis=0)
        if norm == "row":
            rows = np.array([row / np.sqrt((row**2).sum()) for row in rows])
        gram = (rows.T @ rows if primal else rows @ rows.T) / num_heads
        values = np.maximum(np.linalg.eigvalsh(gram), 1e-10)
        scores.append(-(values * np.log(values)).sum() / np.log(num_heads))
    return np.array(scores)


def random_states(kind: str, count: int = 200, heads: int = 8, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(count, heads, width, generator=generator)
    if kind == "random":
        return noise
    if kind == "low rank":
        basis = torch.randn(3, width, generator=generator)
        return torch.randn(count, heads, 3, generator=generator) @ basis + 0.05 * noise
    # structured: a head's own direction, a token's own strength, and outlying channels
    heads_own = torch.randn(1, heads, width, generator=generator) * 3
    strength = torch.rand(count, 1, 1, generator=generator) * 4
    states = heads_own + strength * noise
    states[:, :, :2] += 40
    return states


def test_entropy_of_a_case_worked_out_by_hand() -> None:
    # Heads (2, 0), (0, 2), (-2, -2) have mean zero. Gram / 3 = [[4, 0, -4], [0, 4, -4],
    # [-4, -4, 8]] / 3 has eigenvalues 0, 4/3 and 4.
    states = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [-2.0, -2.0]]])
    by_hand = -(4 / 3 * math.log(4 / 3) + 4 * math.log(4)) / math.log(3)
    assert float(token_entropy(states, "none", double=True)) == pytest.approx(by_hand, abs=1e-8)
    # Unit rows a, b and c = -(a + b) / sqrt 2: the trace is 1. On a + b the eigenvalue is
    # (2 x 1/2 + 1) / 3 = 2/3, on a - b it is 1/3.
    by_hand = (math.log(3) - 2 / 3 * math.log(2)) / math.log(3)
    assert float(token_entropy(states, "row", double=True)) == pytest.approx(by_hand, abs=1e-8)


def test_entropy_does_not_see_what_all_heads_share() -> None:
    states = random_states("random", 20).double()
    moved = states + 7 * torch.randn(20, 1, 32, dtype=torch.float64)
    for norm in ("row", "none"):
        torch.testing.assert_close(
            token_entropy(states, norm, double=True), token_entropy(moved, norm, double=True)
        )


@pytest.mark.parametrize("kind", ["random", "low rank", "structured"])
@pytest.mark.parametrize("norm", ["row", "none"])
def test_entropy_is_its_definition(kind: str, norm: str) -> None:
    states = random_states(kind, 40)
    expected = torch.from_numpy(reference(states, norm))
    torch.testing.assert_close(token_entropy(states, norm, double=True), expected)
    single_precision = token_entropy(states, norm)
    assert single_precision.dtype == torch.float32
    torch.testing.assert_close(single_precision.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["row", "none"])
def test_entropy_has_the_spectrum_of_the_primal_gram_up_to_the_clamp(norm: str) -> None:
    heads, width = 8, 32
    states = random_states("random", 20, heads, width)
    primal = torch.from_numpy(reference(states, norm, primal=True))
    clamped = (width - heads) * -1e-10 * math.log(1e-10) / math.log(heads)
    difference = primal - token_entropy(states, norm, double=True)
    torch.testing.assert_close(difference, torch.full_like(difference, clamped), rtol=1e-3, atol=0)


def test_the_clamp_difference_at_32_heads_of_128_is_what_is_published() -> None:
    assert (128 - 32) * 1e-10 * -math.log(1e-10) == pytest.approx(2.2e-7, rel=0.01)
    states = random_states("random", 5, 32, 128)
    difference = torch.from_numpy(reference(states, "row", primal=True)) - token_entropy(
        states, "row", double=True
    )
    assert float(difference.mean()) * math.log(32) == pytest.approx(2.21e-7, rel=0.01)


@pytest.mark.parametrize("norm", ["row", "none"])
def test_rotary_positions_do_not_change_entropy(norm: str) -> None:
    states = random_states("structured", 30).double()
    half = states.shape[-1] // 2
    angles = torch.outer(torch.arange(30.0), 10000 ** (-torch.arange(half) / half)).double()
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = states[..., :half], states[..., half:]
    rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    torch.testing.assert_close(
        token_entropy(rotated, norm, double=True), token_entropy(states, norm, double=True)
    )


def test_equal_heads_have_no_entropy_but_that_of_the_clamp() -> None:
    states = torch.randn(5, 1, 16).expand(5, 32, 16)
    scores = token_entropy(states, "none", double=True)
    assert scores.tolist() == pytest.approx([2.126e-8] * 5, rel=1e-3)
    rows = token_entropy(states, "row", double=True)
    assert bool(rows.isfinite().all())


@pytest.mark.parametrize("heads", [3, 28, 32, 40])
@pytest.mark.parametrize("norm", ["row", "none"])
def test_equal_heads_are_finite_and_last(norm: str, heads: int) -> None:
    states = torch.randn(6, heads, 16)
    states[2] = states[2, :1]
    states[4] = 0
    scores = token_entropy(states, norm)
    assert bool(scores.isfinite().all())
    if norm == "row":
        assert sorted(scores.argsort()[:2].tolist()) == [2, 4]


def test_one_head_equal_to_the_mean_is_no_nan() -> None:
    states = random_states("random", 4)
    states[:, 0] = states[:, 1:].mean(dim=1)
    assert bool(token_entropy(states, "row", double=True).isfinite().all())


@pytest.mark.parametrize("factor", [1e-6, 0.3, 17.0, 1e6])
def test_row_entropy_is_the_same_for_a_token_times_a_positive_factor(factor: float) -> None:
    states = random_states("structured", 30)
    torch.testing.assert_close(
        token_entropy(factor * states, "row", double=True),
        token_entropy(states, "row", double=True),
    )
    assert not torch.allclose(token_entropy(7 * states, "none"), token_entropy(states, "none"))


def test_row_entropy_is_the_same_for_every_head_times_its_own_positive_factor() -> None:
    centred = random_states("random", 20).double()
    centred -= centred.mean(dim=1, keepdim=True)
    weights = torch.tensor([1.0, 1.0, 2.0, 2.0, 5.0, 5.0, 1.0, 1.0], dtype=torch.float64)
    # Pairs of opposite rows keep the mean at zero whatever their length.
    centred[:, 1::2] = -centred[:, ::2]
    torch.testing.assert_close(
        token_entropy(centred * weights[:, None], "row", double=True),
        token_entropy(centred, "row", double=True),
    )


def test_row_entropy_lies_between_zero_and_that_of_all_directions_alike() -> None:
    for kind in ("random", "low rank", "structured"):
        scores = token_entropy(random_states(kind), "row", double=True)
        assert float(scores.min()) >= 0
        assert float(scores.max()) <= math.log(7) / math.log(8) + 1e-7


def test_norms_can_rank_tokens_in_opposite_order() -> None:
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(6, 8, 32, generator=generator)
    # The more directions, the longer: past a trace of about e^(S - 1) the score falls.
    rank = torch.stack([torch.cat([one[: i + 2], one[:1].expand(6 - i, -1)]) for i, one in
                        enumerate(directions)])  # fmt: skip
    states = rank * torch.arange(1, 7)[:, None, None]
    row, none = (token_entropy(states, norm, double=True).argsort() for norm in ("row", "none"))
    assert row.tolist() == none.flip(0).tolist()


def test_without_norm_the_score_is_that_of_the_trace_and_the_von_neumann_entropy() -> None:
    states = random_states("random", 10).double()
    centred = states - states.mean(dim=1, keepdim=True)
    gram = centred @ centred.transpose(1, 2) / 8
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    values = torch.linalg.eigvalsh(gram / trace[:, None, None]).clamp_min(1e-300)
    entropy = -(values * values.log()).sum(1)
    expected = (trace * entropy - trace * trace.log()) / math.log(8)
    torch.testing.assert_close(token_entropy(states, "none", double=True), expected)


@pytest.mark.parametrize("kind", ["random", "low rank", "structured"])
@pytest.mark.parametrize("norm", ["row", "none"])
def test_float32_chooses_the_tokens_that_float64_chooses(kind: str, norm: str) -> None:
    states = random_states(kind, 300, heads=16, width=32)
    budget = Budget.share(90, torch.zeros(300, dtype=torch.long))
    chosen = [
        keep_best(token_entropy(states, norm, double=double), budget) for double in (False, True)
    ]
    assert chosen[0].tolist() == chosen[1].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["row", "none"])
def test_half_precision_is_raised_before_anything_is_computed(
    dtype: torch.dtype, norm: str
) -> None:
    states = random_states("structured", 50).to(dtype)
    scores = token_entropy(states, norm)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, token_entropy(states.float(), norm))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    states = random_states("random", 23)
    whole = token_entropy(states, "row")
    solve, solved = torch.linalg.eigvalsh, []
    monkeypatch.setattr(sys.modules["vtprune.pruners.entropy"], "CHUNK", 5)
    monkeypatch.setattr(sys.modules["vtprune.pruners.entropy"], "AT_ONCE", 20)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: solved.append(gram) or solve(gram))
    torch.testing.assert_close(token_entropy(states, "row"), whole)
    assert [len(gram) for gram in solved] == [20, 3]


def test_more_tokens_than_a_chunk_are_scored() -> None:
    states = torch.randn(3, 4, 4).repeat(CHUNK // 2, 1, 1)
    scores = token_entropy(states, "row")
    assert len(scores) == CHUNK // 2 * 3
    torch.testing.assert_close(scores[-3:], scores[:3])


# -- entropy: what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["one value", "one token", "all"])
@pytest.mark.parametrize("norm", ["row", "none"])
def test_states_with_nan_are_refused(bad: float, where: str, norm: str) -> None:
    tokens = tokens_of(flat(30))
    states = tokens.states["query"]
    if where == "one value":
        states[3, 1, 2] = bad
    else:
        states[3 if where == "one token" else slice(None)] = bad
    budget = Budget.share(4, torch.zeros(30, dtype=torch.long))
    with pytest.raises(ModelError, match="states hold NaN or infinity") as caught:
        create("entropy", {"norm": norm}).select(tokens, budget)
    assert "--dtype" in caught.value.hint


def test_a_token_beside_one_with_nan_has_its_score() -> None:
    states = random_states("random", 5)
    expected = token_entropy(states, "row")
    states[2, 0, 0] = float("nan")
    scores = token_entropy(states, "row")
    assert scores.isnan().tolist() == [False, False, True, False, False]
    torch.testing.assert_close(scores[3:], expected[3:])


@pytest.mark.parametrize(("heads", "norm"), [(1, "row"), (2, "row"), (1, "none")])
def test_too_few_heads_are_refused(heads: int, norm: str) -> None:
    tokens = VisualTokens(flat(9), {"key": torch.randn(9, heads, 8)})
    pruner = create("entropy", {"norm": norm, "states": "key"})
    with pytest.raises(ModelError, match=rf"needs at least \d heads; this model has {heads}"):
        pruner.select(tokens, Budget.share(3, torch.zeros(9, dtype=torch.long)))


def test_two_heads_are_all_alike_under_row_norm_and_not_without() -> None:
    states = torch.randn(20, 2, 16, dtype=torch.float64)
    assert float(token_entropy(states, "row", double=True).std()) < 1e-9
    assert float(token_entropy(states, "none", double=True).std()) > 1e-2


def test_the_state_that_is_asked_for_is_scored() -> None:
    tokens = tokens_of(flat(40))
    budget = Budget.share(8, torch.zeros(40, dtype=torch.long))
    for name in ("query", "key", "value", "hidden"):
        pruner = create("entropy", {"states": name})
        assert pruner.needs == (name,)
        best = token_entropy(tokens.states[name], "none").argsort(descending=True)[:8].sort().values
        assert pruner.select(tokens, budget).index.tolist() == best.tolist()
