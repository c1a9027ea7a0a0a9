"""Methods that compare the visual tokens with the question: HAWK by its definition."""

from __future__ import annotations

import pytest
import torch

from vtprune.errors import ModelError
from vtprune.pruners import create, hawk
from vtprune.pruners.base import Budget, VisualTokens
from vtprune.pruners.contract import HEADS, flat, tokens_of


def whole(count: int, num: int) -> Budget:
    return Budget.share(count, torch.zeros(num, dtype=torch.long))


# -- hawk -----------------------------------------------------------------------------------------


def test_each_head_counts_alike_however_long_its_queries_are() -> None:
    # Two query heads on one key. Mean queries: (2, 0) and (0, 30). Products of the keys: 6, 8, 0, 0
    # and 0, 90, 120, 0; of unit length: 0.6, 0.8, 0, 0 and 0, 0.6, 0.8, 0. Their sums: 0.6, 1.4,
    # 0.8, 0; without the lengths the third token would come first, and the last stays last.
    keys = torch.tensor([[3.0, 0.0], [4.0, 3.0], [0.0, 4.0], [0.0, 0.0]])[:, None]
    queries = torch.tensor([[[1.0, 0.0], [0.0, 20.0]], [[3.0, 0.0], [0.0, 40.0]]])
    tokens = VisualTokens(flat(4), {"key": keys, "text_query": queries})
    kept = [create("hawk", {}).select(tokens, whole(k, 4)).index.tolist() for k in (1, 2, 3)]
    assert kept == [[1], [1, 2], [0, 1, 2]]
    scores = create("hawk", {}).select(tokens, whole(1, 4)).scores
    assert scores is not None
    torch.testing.assert_close(scores, torch.tensor([0.6, 1.4, 0.8, 0.0]))
    # By the weights 1 and 0: 0.6, 0.8, 0, 0.
    weighted = hawk.score(keys, queries, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(weighted, torch.tensor([0.6, 0.8, 0.0, 0.0]))


def test_query_heads_share_keys_in_the_order_of_grouped_attention() -> None:
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(9, 2, 8, generator=generator)
    queries = torch.randn(5, 6, 8, generator=generator)
    weights = torch.rand(6, generator=generator)
    total = torch.zeros(9)
    for head in range(6):
        products = keys[:, head // 3] @ queries[:, head].mean(0) / 8**0.5
        total += weights[head] * products / products.norm()
    torch.testing.assert_close(hawk.score(keys, queries, weights), total)


def test_published_weights_are_of_28_heads_and_of_no_other_number() -> None:
    weights = hawk.head_weights("qwen2.5-vl-7b", 28)
    assert weights.shape == (28,)
    assert float(weights.sum()) == pytest.approx(1.2616, abs=1e-4)
    assert weights.argmax() == 1
    with pytest.raises(ModelError, match=r"has 28 weights of heads .* this model has 4 query") as e:
        create("hawk", {"heads": "qwen2.5-vl-7b"}).select(tokens_of(flat(9)), whole(2, 9))
    assert e.value.hint == "-o heads=equal"
    states = tokens_of(flat(9)).states
    grown = {name: states[name].repeat(1, 28 // HEADS, 1) for name in ("key", "text_query")}
    chosen = create("hawk", {"heads": "qwen2.5-vl-7b"}).select(
        VisualTokens(flat(9), grown), whole(2, 9)
    )
    assert len(chosen.index) == 2


@pytest.mark.parametrize("state", ["key", "text_query"])
def test_states_that_are_not_finite_are_refused(state: str) -> None:
    tokens = tokens_of(flat(30))
    tokens.states[state][3, 0, 0] = torch.nan
    with pytest.raises(ModelError, match="states hold NaN or infinity, so hawk can't rank"):
        create("hawk", {}).select(tokens, whole(4, 30))
