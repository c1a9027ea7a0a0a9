"""DivPrune, DART and CDPruner choose what their definitions say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import oracle
import pytest
import tiny
import torch
from conftest import shared_model
from torch.utils._python_dispatch import TorchDispatchMode

import vtprune
from vtprune.errors import ModelError
from vtprune.models.structure import find_structure
from vtprune.pruners import cdpruner, create, divprune, lazy_greedy, similarity
from vtprune.pruners.base import Budget, VisualTokens
from vtprune.pruners.cdpruner import text_relevance
from vtprune.pruners.contract import flat, tokens_of, video
from vtprune.pruners.similarity import Similarity, unit_rows

METHODS = ("divprune", "dart", "cdpruner")
GREEDY = {"divprune": {}, "cdpruner": {}, "no text": {"relevance": "none"}}


def directions(degrees: Sequence[float], lengths: Sequence[float] | None = None) -> torch.Tensor:
    """(n, 1, 2) states in a plane."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    length = torch.tensor(lengths or [1.0] * len(degrees), dtype=torch.float64)
    return (torch.stack([angle.cos(), angle.sin()], dim=1) * length[:, None]).float()[:, None]


def chosen(method: str, given: dict[str, torch.Tensor], count: int, **options: str) -> list[int]:
    """What a method keeps of tokens that are all in one group."""
    num = len(next(iter(given.values())))
    budget = Budget.share(count, torch.zeros(num, dtype=torch.long))
    pruner = create(method, options)
    return pruner.select(VisualTokens(flat(num), given), budget).index.tolist()


def made_up(
    count: int = 60, heads: int = 4, width: int = 16, seed: int = 3
) -> dict[str, torch.Tensor]:
    """States around one direction, as hidden states are."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(1, heads, width, generator=generator)
    states = {
        name: mean + torch.randn(count, heads, width, generator=generator)
        for name in ("hidden", "key")
    }
    states["text_hidden"] = mean + torch.randn(7, heads, width, generator=generator)
    # The final norm's weights change directions.
    weight = torch.rand(heads, width, generator=generator) * 2
    for name in ("hidden", "text_hidden"):
        states[name.replace("hidden", "normed")] = states[name] * weight
    states["text_key"] = torch.randn(7, heads, width, generator=generator)
    return states


def double_rows(states: torch.Tensor) -> np.ndarray:
    rows = states.flatten(1).double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# -- divprune -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "kept"), [(1, [3]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])]
)
def test_divprune_of_a_case_worked_out_by_hand(count: int, kept: list[int]) -> None:
    # Directions 0, 10, 60, 200 degrees. The nearest neighbour of 200 is 140 away, of 60 it is 50:
    # 200 is first. From it 0 is 160 away, 10 is 170, 60 is 140: then 10. From {200, 10}, 0 is 10
    # away, 60 is 50: then 60. Lengths do not count.
    states = directions([0, 10, 60, 200], [9.0, 0.1, 3.0, 1.0])
    assert chosen("divprune", {"hidden": states}, count) == kept


def farthest(rows: np.ndarray, count: int) -> list[int]:
    distance = 1 - rows @ rows.T
    np.fill_diagonal(distance, np.inf)
    kept = [int(distance.min(axis=1).argmax())]
    while len(kept) < count:
        nearest = distance[:, kept].min(axis=1)
        nearest[kept] = -1
        kept.append(int(nearest.argmax()))
    return sorted(kept)


@pytest.mark.parametrize("count", [1, 2, 5, 20, 59])
def test_divprune_is_its_definition(count: int) -> None:
    for seed in range(5):
        states = made_up(seed=seed)
        assert chosen("divprune", states, count) == farthest(double_rows(states["hidden"]), count)


def test_divprune_says_how_far_each_choice_was_from_those_before_it() -> None:
    rows = unit_rows(directions([0, 10, 60, 200]))
    order, distance = divprune.farthest_first(rows[None], 4)
    assert order.tolist() == [[3, 1, 2, 0]]
    expected = [1 - math.cos(math.radians(angle)) for angle in (170, 50, 10)]
    torch.testing.assert_close(distance[0], torch.tensor([math.inf, *expected]))


def test_divprune_reads_the_states_that_are_asked_for() -> None:
    states = made_up()
    assert create("divprune", {"states": "key"}).needs == ("key",)
    kept = chosen("divprune", states, 9, states="key")
    assert kept == farthest(double_rows(states["key"]), 9)
    assert kept != chosen("divprune", states, 9)


def test_divprune_keeps_no_copy_before_everything_is_in() -> None:
    states = made_up(20)["hidden"]
    copies = torch.cat([states, 0.2 * states, 5 * states])
    for count in (5, 13, 20):
        kept = chosen("divprune", {"hidden": copies}, count)
        assert len({token % 20 for token in kept}) == count
    assert chosen("divprune", {"hidden": torch.cat([states[:1]] * 9)}, 4) == [0, 1, 2, 3]


# -- dart -----------------------------------------------------------------------------------------


def by_hand() -> dict[str, torch.Tensor]:
    # The third key is the longest in L1 (3 + 3), the sixth in L2 (5 + 0); of the text the first.
    keys = torch.ones(7, 1, 2)
    keys[2], keys[5] = torch.tensor([3.0, -3.0]), torch.tensor([5.0, 0.0])
    return {
        "normed": directions([0, 20, 70, 90, 140, 180, 190]),
        "key": keys,
        "text_normed": directions([0, 300]),
        "text_key": torch.tensor([[[2.0, 2.0]], [[1.0, 1.0]]]),
    }


@pytest.mark.parametrize(
    ("count", "kept"),
    [(1, [2]), (2, [2, 6]), (3, [2, 5, 6]), (4, [2, 4, 5, 6]), (5, [2, 3, 4, 5, 6])],
)
def test_dart_of_a_case_worked_out_by_hand(count: int, kept: list[int]) -> None:
    # Pivots: the third token, at 70 degrees, and the text's at 0. The third is kept; the rest of
    # the count is shared: 0, 1 + 0, 1 + 1, 2 + 1, 2 + 2. The others are 70, 50, 20, 70, 110 and
    # 120 away from the first pivot, which takes 190, then 180; and 0, 20, 90, 140, 180 and 170
    # from the second, which takes the farthest of what is left: 180, or else 140, then 90.
    assert chosen("dart", by_hand(), count, visual_pivots="1", text_pivots="1") == kept


def test_dart_without_text_pivots_reads_no_text() -> None:
    assert create("dart", {"text_pivots": "0"}).needs == ("key", "normed")
    states = {name: by_hand()[name] for name in ("normed", "key")}
    # 120, 110, and of the two at 70 degrees the earlier.
    kept = chosen("dart", states, 4, visual_pivots="1", text_pivots="0")
    assert kept == [0, 2, 5, 6]


def least_like(states: dict[str, torch.Tensor], count: int, visual: int, text: int) -> list[int]:
    rows, words = double_rows(states["normed"]), double_rows(states["text_normed"])
    norms = {
        name: np.abs(states[name].flatten(1).double().numpy()).sum(axis=1)
        for name in ("key", "text_key")
    }
    own = np.argsort(-norms["key"])[:visual]
    pivots = [*rows[own], *words[np.argsort(-norms["text_key"])[:text]]]
    kept = [int(token) for token in own[:count]]
    rest = count - len(kept)
    for number, pivot in enumerate(pivots):
        share = rest // len(pivots) + (number < rest % len(pivots))
        free = [token for token in np.argsort(rows @ pivot) if token not in kept]
        kept += [int(token) for token in free[:share]]
    return sorted(kept)


@pytest.mark.parametrize(("visual", "text"), [("4", "4"), ("1", "2"), ("8", "1"), ("16", "16")])
@pytest.mark.parametrize("count", [1, 3, 9, 23, 59])
def test_dart_is_its_definition(count: int, visual: str, text: str) -> None:
    states = made_up()
    kept = chosen("dart", states, count, visual_pivots=visual, text_pivots=text)
    assert kept == least_like(states, count, int(visual), int(text))


def test_dart_keeps_the_pivots_as_far_as_their_frame_allows() -> None:
    layout = video(frames=3, rows=1, cols=5, newline=False)
    keys = torch.ones(15, 1, 2)
    keys[[0, 1, 2, 7]] = torch.tensor([9.0, 8.0, 7.0, 6.0])[:, None, None]
    states = {"normed": made_up(15)["normed"], "key": keys}
    for count, held in ((6, {0, 1, 7}), (9, {0, 1, 2, 7}), (1, set())):
        budget = Budget.share(count, layout.groups("frame"))
        pruner = create("dart", {"text_pivots": "0"})
        kept = pruner.select(VisualTokens(layout, states), budget).index
        assert (
            torch.bincount(layout.grid.frame[kept], minlength=3).tolist() == budget.quota.tolist()
        )
        assert held <= set(kept.tolist())
        assert set(kept.tolist()) & {0, 1, 2, 7} == held or count == 1
    assert kept.tolist() == [7]  # one token: the middle frame's, and it has a pivot


@pytest.mark.parametrize(("weight", "kept"), [((1.0, 0.25), [0, 1]), ((1.0, 1.0), [0, 2])])
def test_dart_compares_after_the_final_norm(weight: tuple[float, float], kept: list[int]) -> None:
    # Cosines with the first: -1/sqrt(10) and -1/sqrt(2); with a quarter of the second channel
    # (1, 1/4), (-1, 1/2) and (0, -1/4): -0.76 and -0.24.
    norm = torch.nn.RMSNorm(2)
    norm.weight.data = torch.tensor(weight)
    states = torch.tensor([[1.0, 1.0], [-1.0, 2.0], [0.0, -1.0]])
    keys = torch.tensor([3.0, 1.0, 2.0])[:, None, None]
    given = {"normed": norm(states).detach()[:, None], "key": keys}
    assert chosen("dart", given, 2, visual_pivots="1", text_pivots="0") == kept


@pytest.mark.parametrize("at", ["input", 2])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_dart_reads_states_after_the_final_norm_of_every_family(name: str, at: str | int) -> None:
    model = shared_model(name)
    decoder, layer = model.get_decoder(), 0 if at == "input" else 2
    norm = find_structure(model).final_norm
    kind = "image" if "image" in tiny.KINDS[name] else "video"
    inputs = tiny.inputs(name, model, kind)
    entering: list[torch.Tensor] = []
    keys: list[torch.Tensor] = []

    def enter(
        module: torch.nn.Module, args: tuple[torch.Tensor], kwargs: dict[str, object]
    ) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        assert isinstance(states, torch.Tensor)
        entering.append(states)

    # Without the norm's weights another choice comes out of the same states.
    saved = [one.detach().clone() for one in norm.parameters()]
    generator = torch.Generator().manual_seed(0)
    for one in norm.parameters():
        one.data = torch.randn(one.shape, generator=generator).to(one.dtype) * 3
    hooks = [
        decoder.layers[layer].register_forward_pre_hook(enter, with_kwargs=True),
        decoder.layers[max(0, layer - 1)].self_attn.k_proj.register_forward_hook(
            lambda *args: keys.append(args[2])
        ),
    ]
    try:
        oracle.generate(model, inputs, steps=1)
        states, key = entering[0][0], keys[0][0]
        for hook in hooks:
            hook.remove()
        stage = {"at": at, "method": "dart", "keep": 0.4}
        with vtprune.pruning(model, {"stages": [stage]}) as trace:
            oracle.generate(model, inputs, steps=1)
        with torch.no_grad():
            normed = norm(states[None])[0]
    finally:
        for one, value in zip(norm.parameters(), saved, strict=True):
            one.data = value
    columns = trace.layouts[0].columns
    text = torch.arange(int(columns[-1]) + 1, len(states))
    given = {
        "normed": normed[columns][:, None], "text_normed": normed[text][:, None],
        "key": key[columns][:, None], "text_key": key[text][:, None],
    }  # fmt: skip
    expected = columns[least_like(given, len(trace.stages[0].kept[0]), 4, 4)]
    assert trace.stages[0].kept[0] == expected.tolist()


# -- cdpruner -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("relevance", "count", "kept"),
    [
        ("text", 1, [0]), ("text", 2, [0, 1]), ("text", 3, [0, 1, 2]),
        ("none", 1, [0]), ("none", 2, [0, 2]), ("none", 3, [0, 1, 2]),
    ],
)  # fmt: skip
def test_cdpruner_of_a_case_worked_out_by_hand(relevance: str, count: int, kept: list[int]) -> None:
    # Directions 0, 60, 90, 180 degrees; the text is at 0. Cosines with it: 1, 1/2, 0, -1; scaled
    # to (0, 1]: 1, 3/4, 1/2, 0. The first token has gain 1. Of the others' squares 3/4, 1 and 0
    # are left; x relevance squared: 27/64, 1/4, 0: then the second. Without relevance the third
    # adds most. Two directions span the plane: then the more relevant, or earlier, comes first.
    states = {"hidden": directions([0, 60, 90, 180]), "text_hidden": directions([0, 0], [1, 4])}
    assert chosen("cdpruner", states, count, relevance=relevance) == kept


def test_relevance_is_the_mean_cosine_with_the_text_scaled_to_one() -> None:
    rows = unit_rows(directions([0, 90, 180, 270]))
    # Text at 0 and 90 degrees: mean cosines 1/2, 1/2, -1/2, -1/2.
    found = text_relevance(rows, directions([0, 90], [3, 1]))
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 1e-6, 1e-6]))
    found = text_relevance(rows[:1].repeat(5, 1), directions([77]))
    assert found.tolist() == [1.0] * 5


def largest_determinant(kernel: np.ndarray, count: int) -> list[int]:
    kept: list[int] = []
    for _ in range(count):
        volumes = {
            token: np.linalg.slogdet(kernel[np.ix_([*kept, token], [*kept, token])])[1]
            for token in range(len(kernel))
            if token not in kept
        }
        kept.append(max(volumes, key=lambda token: volumes[token]))
    return sorted(kept)


@pytest.mark.parametrize("relevance", ["text", "none"])
@pytest.mark.parametrize("count", [1, 2, 5, 20, 55])
def test_cdpruner_is_its_definition(count: int, relevance: str) -> None:
    for seed in range(3):
        states = made_up(seed=seed)  # 60 tokens of width 64
        rows = double_rows(states["hidden"])
        weight = np.ones(len(rows))
        if relevance == "text":
            mean = rows @ double_rows(states["text_hidden"]).mean(axis=0)
            weight = (mean - mean.min() + 1e-6) / (mean.max() - mean.min() + 1e-6)
        cosines = rows @ rows.T
        np.fill_diagonal(cosines, 1.0)  # a tie of all at the first step
        kernel = weight[:, None] * cosines * weight
        expected = largest_determinant(kernel, count)
        assert chosen("cdpruner", states, count, relevance=relevance) == expected


def test_cdpruner_goes_on_by_relevance_where_the_states_are_spanned() -> None:
    states = made_up(40, heads=1, width=6)
    kept = chosen("cdpruner", states, 30)
    relevance = text_relevance(unit_rows(states["hidden"]), states["text_hidden"])
    first = chosen("cdpruner", states, 6)
    rest = [token for token in relevance.argsort(descending=True).tolist() if token not in first]
    assert kept == sorted(first + rest[:24])


def test_cdpruner_keeps_what_the_question_asks_for() -> None:
    states = made_up()
    for token in (5, 41):
        states["text_hidden"] = states["hidden"][token : token + 1]
        assert chosen("cdpruner", states, 1) == [token]
    assert chosen("cdpruner", states, 9, relevance="none") == chosen(
        "cdpruner", made_up(), 9, relevance="none"
    )


# -- what they share ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_length_of_a_state_does_not_count(method: str) -> None:
    states = made_up()
    length = torch.rand(60, generator=torch.Generator().manual_seed(1)).mul(9).add(0.1)
    scaled = {name: states[name] * length[:, None, None] for name in ("hidden", "normed")}
    scaled = {**states, **scaled}
    assert chosen(method, scaled, 20) == chosen(method, states, 20)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_tokens_does_not_count(method: str) -> None:
    states = made_up()
    mixed = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    shuffled = states | {name: states[name][mixed] for name in ("hidden", "normed", "key")}
    kept = sorted(mixed[chosen(method, shuffled, 20)].tolist())
    assert kept == chosen(method, states, 20)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_that_is_zero_is_kept_last(method: str) -> None:
    states = made_up(20)
    for name in ("hidden", "normed", "key"):
        states[name][[0, 7, 8]] = 0
    kept = chosen(method, states, 18)
    assert set(range(20)) - set(kept) == {7, 8}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_states_with_nan_are_refused(
    method: str, held: bool, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not held:
        monkeypatch.setattr(similarity, "may_hold", lambda pairs, device: False)
    states = made_up()
    for name in ("hidden", "normed"):
        states[name][3, 1, 2] = bad
    with pytest.raises(ModelError, match=f"NaN or infinity, so {method} can't rank") as caught:
        chosen(method, states, 9)
    assert "--dtype" in caught.value.hint


@pytest.mark.parametrize("options", GREEDY.values(), ids=GREEDY)
def test_a_smaller_budget_keeps_some_of_the_same(options: dict[str, str]) -> None:
    method = "cdpruner" if "relevance" in options else "divprune"
    states = made_up()
    kept = [set(chosen(method, states, count, **options)) for count in range(1, 60, 7)]
    assert all(fewer < more for fewer, more in pairwise(kept))


@pytest.mark.parametrize("method", ["divprune", "cdpruner"])
def test_each_frame_is_chosen_from_by_itself(method: str) -> None:
    layout = video(frames=4, rows=3, cols=5)  # and a newline: groups of two sizes
    tokens = tokens_of(layout)
    group = layout.groups("frame")
    budget = Budget(group, torch.tensor([3, 15, 0, 7]))
    options = {"relevance": "none"} if method == "cdpruner" else {}
    pruner = create(method, options)
    kept = pruner.select(tokens, budget).index
    for number, quota in enumerate(budget.quota.tolist()):
        own = (group == number).nonzero().squeeze(1)
        states = {name: tokens.states[name][own] for name in pruner.needs}
        alone = own[chosen(method, states, quota, **options)] if quota else own[:0]
        assert kept[group[kept] == number].tolist() == alone.tolist()


@pytest.mark.parametrize("held", [0, 100, 15**2, 15**2 * 2])
@pytest.mark.parametrize("method", ["divprune", "cdpruner"])
def test_what_is_held_at_once_changes_nothing(
    method: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokens_of(video(frames=4))
    budgets = [Budget.share(count, tokens.layout.groups("frame")) for count in (5, 20, 50)]
    whole = [create(method, {}).select(tokens, budget).index for budget in budgets]
    monkeypatch.setattr(similarity, "ANYWAY", held)
    monkeypatch.setattr(similarity, "HELD", held)
    monkeypatch.setattr(similarity, "FEW", held)
    monkeypatch.setattr(similarity, "BLOCK", 4)
    monkeypatch.setattr(lazy_greedy, "ACTIVE", 7)
    monkeypatch.setattr(divprune, "TOGETHER", 3)
    for budget, expected in zip(budgets, whole, strict=True):
        assert torch.equal(create(method, {}).select(tokens, budget).index, expected)


def test_more_are_held_only_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    whole: int | None = 2**33
    monkeypatch.setattr(similarity, "total_memory", lambda device: whole)
    most = 2**33 // (similarity.BYTES * similarity.SHARE)
    assert similarity.ANYWAY < most < similarity.HELD
    device = torch.device("cuda")
    assert similarity.may_hold(most, device)
    assert not similarity.may_hold(most + 1, device)
    whole = None
    assert similarity.may_hold(similarity.ANYWAY, device)
    assert not similarity.may_hold(similarity.ANYWAY + 1, device)
    whole = 2**60
    assert similarity.may_hold(similarity.HELD, device)
    assert not similarity.may_hold(similarity.HELD + 1, device)
    assert similarity.may_hold(similarity.FEW, torch.device("cpu"))
    assert not similarity.may_hold(similarity.FEW + 1, torch.device("cpu"))


@pytest.mark.parametrize("method", ["divprune", "spread", "cdpruner"])
@pytest.mark.parametrize("active", [50, 1024])
def test_a_lazy_choice_is_that_of_all(
    active: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokens_of(video(frames=30, rows=6, cols=6))
    tokens.states["hidden"][100:160] = tokens.states["hidden"][:60]  # copies
    tokens.states["hidden"][[5, 700]] = 0
    budget = Budget.share(330, torch.zeros(len(tokens), dtype=torch.long))
    whole = create(method, {}).select(tokens, budget).index
    products = []

    def counted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        products.append(left.shape[-2] * right.shape[-2])
        return similarity_cosines(left, right)

    similarity_cosines = similarity.cosines
    for module in (similarity, divprune, cdpruner):
        monkeypatch.setattr(module, "cosines", counted)
    monkeypatch.setattr(similarity, "may_hold", lambda pairs, device: False)
    monkeypatch.setattr(similarity, "BLOCK", 64)
    monkeypatch.setattr(lazy_greedy, "ACTIVE", active)
    assert torch.equal(create(method, {}).select(tokens, budget).index, whole)
    assert max(products) <= max(active, 64) * len(tokens) < len(tokens) ** 2  # so much memory


def test_tokens_like_one_chosen_are_not_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.randn(2400, 32, generator=torch.Generator().manual_seed(0))
    states[1200:] = states[7]
    rows = unit_rows(states)
    products = []

    def counted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        products.append(left.shape[-2] * right.shape[-2])
        return similarity_cosines(left, right)

    similarity_cosines = divprune.cosines
    monkeypatch.setattr(divprune, "cosines", counted)
    monkeypatch.setattr(lazy_greedy, "ACTIVE", 64)
    order, distance = divprune.farthest_first(rows[None], 600)
    assert len(order[0].unique()) == 600
    assert (distance.diff() <= 0).all()
    assert int(((order == 7) | (order >= 1200)).sum()) == 1
    assert sum(products) < 600 * len(rows) * 0.75


@pytest.mark.parametrize("method", ["divprune", "spread", "cdpruner"])
def test_segments_choose_by_themselves(method: str) -> None:
    tokens = tokens_of(video(frames=5, rows=6, cols=6))
    group = torch.zeros(len(tokens), dtype=torch.long)
    pruner, whole = create(method, {"segment": 64.0}), create(method, {})
    for count in (3, 31, len(tokens) - 1):
        kept = pruner.select(tokens, Budget.share(count, group)).index
        assert len(kept) == count
        assert (kept.diff() > 0).all()
    pruner, budget = create(method, {"segment": float(len(tokens))}), Budget.share(31, group)
    assert torch.equal(pruner.select(tokens, budget).index, whole.select(tokens, budget).index)


def test_a_segment_with_more_to_tell_keeps_more() -> None:
    angles = [0.1 * number for number in range(64)] + [0.0, 90.0, 180.0, 270.0] + [0.0] * 60
    rows = directions(angles)
    budget = Budget.share(6, torch.zeros(128, dtype=torch.long))
    tokens = VisualTokens(
        video(frames=128, rows=1, cols=1, newline=False), {"hidden": rows[:, None]}
    )
    kept = create("divprune", {"segment": 64.0}).select(tokens, budget).index.tolist()
    assert len(kept) == 6
    assert {64, 65, 66, 67} <= set(kept)


@pytest.mark.parametrize("hold", [True, False])
def test_the_nearest_neighbour_of_a_token_is_never_itself(
    hold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "BLOCK", 3)
    rows = unit_rows(directions([0, 60, 180, 240, 250]))[None]
    expected = [math.cos(math.radians(angle)) for angle in (60, 60, 60, 10, 10)]
    nearest = Similarity(rows, hold).nearest()[0]
    torch.testing.assert_close(nearest, torch.tensor(expected), atol=1e-6, rtol=0)
    assert Similarity(rows[:, :1], hold).nearest().tolist() == [[-math.inf]]


def test_of_tokens_that_are_as_alone_the_first_is_chosen() -> None:
    assert int(similarity.most_alone(torch.eye(5), torch.zeros(5, dtype=torch.bool))) == 0


class HostReads(TorchDispatchMode):
    """Counts the operations that make a device wait for the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "unique", "_unique2", "masked_select"):
            self.names.append(name)
        return out


@pytest.mark.parametrize("method", METHODS)
def test_no_step_reads_from_the_device(method: str) -> None:
    tokens = tokens_of(flat(120))
    reads = []
    for count in (5, 60):
        budget = Budget.share(count, tokens.layout.groups("all"))
        with HostReads() as mode:
            create(method, {}).select(tokens, budget)
        reads.append(mode.names)
    assert reads[0] == reads[1]
    assert reads[0].count("_local_scalar_dense") <= 3  # a quota, the last check


# -- in a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"), [("dart", {"text_pivots": "0"}), ("cdpruner", {"relevance": "none"})]
)
def test_a_method_that_reads_text_needs_some_after_the_pictures(
    method: str, options: dict[str, str]
) -> None:
    model = shared_model("llava")
    inputs = tiny.inputs("llava", model, "image")
    last = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[-1]) + 1
    inputs = up_to(inputs, last)
    stage = {"at": 2, "method": method, "keep": 0.3}
    with (
        pytest.raises(ModelError, match="no text follows the pictures"),
        vtprune.pruning(model, {"stages": [stage]}),
    ):
        oracle.generate(model, inputs, steps=1)
    with vtprune.pruning(model, {"stages": [{**stage, **options}]}) as trace:
        oracle.generate(model, inputs, steps=1)
    assert trace.stages[0].after == [4]


def up_to(inputs: dict[str, torch.Tensor], last: int) -> dict[str, torch.Tensor]:
    """A prompt up to column `last`."""
    return {
        key: value[:, :last] if key in ("input_ids", "attention_mask") else value
        for key, value in inputs.items()
    }


def test_another_question_keeps_other_tokens() -> None:
    model = shared_model("llava_onevision")
    inputs = tiny.inputs("llava_onevision", model, "image")
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -6:] = torch.tensor([60, 61, 62, 63, 64, 65])
    kept = {}
    for method in ("cdpruner", "divprune"):
        for number, given in enumerate((inputs, other)):
            with vtprune.pruning(model, method=method, keep=0.3) as trace:
                oracle.generate(model, given, steps=1)
            kept[method, number] = trace.stages[0].kept[0]
    assert kept["cdpruner", 0] != kept["cdpruner", 1]
    assert kept["divprune", 0] == kept["divprune", 1]
