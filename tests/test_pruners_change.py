"""V2Drop by its definition, and its published cuts."""

from __future__ import annotations

import pytest
import torch
from test_pruners_attention import scheduled

from vtprune.errors import ModelError
from vtprune.pruners import create
from vtprune.pruners.base import Budget, VisualTokens
from vtprune.pruners.contract import flat, tokens_of


def test_the_tokens_that_change_most_are_kept() -> None:
    hidden = torch.tensor([[3.0, 4.0], [9.0, 9.0], [0.0, 1.0], [2.0, 2.0]])[:, None]
    previous = torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.0, -1.0], [2.0, 4.0]])[:, None]
    tokens = VisualTokens(flat(4), {"hidden": hidden, "previous": previous})
    group = torch.zeros(4, dtype=torch.long)
    changes = [5.0, 0.0, 2.0, 2.0]
    for count, kept in ((1, [0]), (2, [0, 2]), (3, [0, 2, 3])):  # ties: the earlier
        selection = create("v2drop", {}).select(tokens, Budget.share(count, group))
        assert selection.index.tolist() == kept
        assert selection.scores is not None
        assert selection.scores.tolist() == changes


def test_the_published_cuts_are_a_layer_average_of_0_352() -> None:
    # (3 x 576 + 14 x 288 + 5 x 144 + 10 x 1) / (32 x 576)
    assert scheduled("v2drop", 6490 / 18432, 32, 576) == [(3, 288), (17, 144), (22, 1)]


def test_other_budgets_keep_the_ratio_or_rise_to_all() -> None:
    # Below: 3 + 14 t + 2.5 t = 32 x 0.2, without the last token. Above: 3 + 14 t + 5 (1.5 t - 0.5)
    # + 10 (2 t - 1) = 32 x 0.7 at t = 0.7687.
    assert scheduled("v2drop", 0.2, 32, 10000) == [(3, 2060), (17, 1030), (22, 1)]
    assert scheduled("v2drop", 0.7, 32, 10000) == [(3, 7687), (17, 6530), (22, 5373)]


@pytest.mark.parametrize("state", ["hidden", "previous"])
def test_states_that_are_not_finite_are_refused(state: str) -> None:
    tokens = tokens_of(flat(30))
    tokens.states[state][3, 0, 0] = torch.inf
    with pytest.raises(ModelError, match="states hold NaN or infinity, so v2drop can't rank"):
        create("v2drop", {}).select(tokens, Budget.share(4, torch.zeros(30, dtype=torch.long)))
