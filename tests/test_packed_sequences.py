"""Rows of different length in one batch, and masks that fit what is left."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from vtprune.engine.attention_mask import (
    gather_mask,
    held_columns,
    join_valid,
    sees,
    valid_columns,
    valid_past_columns,
)
from vtprune.engine.kv_cache import PrunedCache, fork_cache, pruned_cache
from vtprune.engine.late_checks import LateChecks
from vtprune.engine.packing import gather, gather_marked, pack, repack
from vtprune.engine.position_ids import refuse_inside_prompt
from vtprune.engine.sequence import SequenceState
from vtprune.errors import ModelError
from vtprune.models.seams import LayerMemory

ROWS = [torch.tensor([0, 2, 3, 5]), torch.tensor([1, 5])]
LOWEST = torch.finfo(torch.float32).min


def causal(batch: int, length: int, width: int | None = None) -> torch.Tensor:
    """(B, 1, S, W) bool: every position sees itself and those before it."""
    seen = torch.zeros(length, width or length, dtype=torch.bool)
    seen[:, :length] = torch.ones(length, length, dtype=torch.bool).tril()
    return seen.expand(batch, 1, -1, -1)


def additive(mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


# -- packing --------------------------------------------------------------------------------------


def test_ragged_rows_are_padded_on_the_left() -> None:
    packed = pack(ROWS)
    assert packed.length == 4
    assert packed.index.tolist() == [[0, 2, 3, 5], [0, 0, 1, 5]]
    assert packed.valid is not None
    assert packed.valid.tolist() == [[True] * 4, [False, False, True, True]]
    assert packed.index.dtype == torch.int64


def test_equal_rows_have_no_padding() -> None:
    packed = pack([torch.tensor([0, 2]), torch.tensor([1, 3])])
    assert packed.index.tolist() == [[0, 2], [1, 3]]
    assert packed.valid is None


def test_a_row_without_columns_is_all_padding() -> None:
    packed = pack([torch.tensor([4]), torch.zeros(0, dtype=torch.long)])
    assert packed.valid is not None
    assert packed.valid.tolist() == [[True], [False]]


def test_repacking_counts_in_the_slots_of_the_batch_before() -> None:
    before = pack(ROWS)
    after = pack([torch.tensor([2, 5]), torch.tensor([5])])
    again = repack(before, after)
    assert again.index.tolist() == [[1, 3], [0, 3]]
    assert again.valid is after.valid
    assert [row.tolist() for row in again.columns] == [[1, 3], [3]]


def test_cuts_one_after_the_other_are_one_cut() -> None:
    states = torch.arange(12.0).view(2, 6, 1)
    first = pack([torch.tensor([0, 1, 3, 4, 5]), torch.tensor([2, 3, 5])])
    second = pack([torch.tensor([0, 3, 5]), torch.tensor([5])])
    twice = gather(gather(states, first.index), repack(first, second).index)
    once = gather(states, second.index)
    assert second.valid is not None
    assert torch.equal(twice[second.valid], once[second.valid])


# -- gathering ------------------------------------------------------------------------------------


def test_gathering_takes_each_rows_own_slots() -> None:
    states = torch.arange(24.0).view(2, 6, 2)
    taken = gather(states, pack(ROWS).index)
    assert taken.shape == (2, 4, 2)
    assert torch.equal(taken[0], states[0, ROWS[0]])
    assert torch.equal(taken[1, 2:], states[1, ROWS[1]])


@pytest.mark.parametrize("batch", [1, 2])
def test_positions_of_three_axes_are_gathered_along_the_last(batch: int) -> None:
    positions = torch.arange(3 * batch * 6).view(3, batch, 6)
    taken = gather(positions, pack(ROWS).index, dim=2)
    assert taken.shape == (3, 2, 4)
    assert torch.equal(taken[:, 0], positions[:, 0, ROWS[0]])
    assert torch.equal(taken[:, 1, 2:], positions[:, batch - 1, ROWS[1]])


def test_one_row_of_positions_serves_the_whole_batch() -> None:
    assert gather(torch.arange(6)[None] * 10, pack(ROWS).index).tolist() == [
        [0, 20, 30, 50],
        [0, 0, 10, 50],
    ]


def test_marked_columns_that_are_left_have_their_rows_and_padding_has_none() -> None:
    marked = torch.tensor([[True, True, False, True], [True, False, False, False]])
    packed = pack([torch.tensor([1, 2, 3]), torch.tensor([0])])
    left, rows = gather_marked(marked, torch.arange(4.0)[:, None], packed, 3)
    assert left.tolist() == [[True, False, True], [False, False, True]]
    assert rows.flatten().tolist() == [1.0, 2.0, 3.0]


def test_a_token_at_the_last_position_of_a_prompt_is_inside_it() -> None:
    last, late = torch.tensor([5, 7]), LateChecks()
    refuse_inside_prompt(torch.tensor([[6], [8]]), last, late)
    with pytest.raises(ModelError, match="inside the prompt"):
        refuse_inside_prompt(torch.tensor([[6], [7]]), last, late)


# -- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
def test_a_mask_keeps_the_rows_and_columns_that_are_left(
    batch: int, heads: int, kind: torch.dtype
) -> None:
    full = causal(batch, 6).expand(-1, heads, -1, -1).clone()
    full[:, :, 3, 2] = False  # something that is not merely causal
    mask = full if kind == torch.bool else additive(full, kind)
    short = gather_mask(mask, pack(ROWS), 6, 4)
    assert isinstance(short, torch.Tensor)
    assert short.shape == (2, heads, 4, 4)
    assert short.dtype == kind
    seen = short if kind == torch.bool else short == 0
    first = full[0][:, ROWS[0]][:, :, ROWS[0]]
    assert torch.equal(seen[0], first)
    second = full[-1][:, ROWS[1]][:, :, ROWS[1]]
    assert torch.equal(seen[1, :, 2:, 2:], second)
    assert not seen[1, :, :, :2].any(), "padding is seen"


def test_windows_and_chunks_count_original_columns() -> None:
    queries, keys = torch.tensor([[3, 5, -1]]), torch.tensor([[2, 3, -1, 5]])
    found = sees(queries, keys, 3)  # the second sees columns 3 to 5
    assert found.tolist() == [[[True, True, False, False], [False, True, False, True], [False] * 4]]
    # Chunks from the first column on: 1 and 2, 3 and 4, 5 and 6.
    found = sees(queries, keys, 2, torch.tensor([1]))
    assert found[0, :2].tolist() == [[False, True, False, False], [False, False, False, True]]


def test_a_layer_holds_the_last_keys_or_all_and_free_slots() -> None:
    keys = torch.tensor([[4, 5]])
    assert held_columns(keys, 4).tolist() == [[4, 5, -1, -1]]
    assert held_columns(keys, 1).tolist() == [[5]]


@pytest.mark.parametrize(("width", "held"), [(10, 10), (6, 5)], ids=["full", "window"])
def test_what_is_past_the_end_of_a_static_cache_stays_masked(width: int, held: int) -> None:
    """A layer with a window of 5 has no free slots of 6 tokens, and one of 4."""
    for mask in (causal(2, 6, width=width), additive(causal(2, 6, width=width))):
        short = gather_mask(mask, pack(ROWS), 6, held)
        assert isinstance(short, torch.Tensor)
        assert short.shape == (2, 1, 4, held)
        seen = short if short.dtype == torch.bool else short == 0
        assert not seen[..., 4:].any()
        assert torch.equal(seen[0, 0, :, :4], torch.ones(4, 4, dtype=torch.bool).tril())
        assert torch.equal(seen[1, 0, 2:, 2:4], torch.ones(2, 2, dtype=torch.bool).tril())
        assert short.dtype == torch.bool or float(short.min()) == LOWEST


def test_a_mask_is_not_changed_in_place() -> None:
    mask = additive(causal(2, 6))
    before = mask.clone()
    gather_mask(mask, pack(ROWS), 6, 4)
    assert torch.equal(mask, before)


# -- which columns hold tokens --------------------------------------------------------------------


PADDED = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


def prepared(dtype: torch.dtype, width: int = 4) -> torch.Tensor:
    seen = causal(2, 4, width).clone()
    seen[..., :4] &= PADDED.bool()[:, None, None, :]
    return seen if dtype == torch.bool else additive(seen, dtype)


@pytest.mark.parametrize(
    "mask",
    [
        PADDED,
        PADDED.bool(),
        torch.cat([torch.zeros(2, 3, dtype=torch.long), PADDED], dim=1),  # three in the cache
        prepared(torch.bool),
        prepared(torch.float32),
        prepared(torch.bfloat16),
        prepared(torch.float32, width=9),
        {"full_attention": prepared(torch.bool), "sliding_attention": causal(2, 4) & False},
        {"sliding_attention": causal(2, 4) & False, "full_attention": prepared(torch.float32)},
        {"other": None, "more": PADDED},
    ],
)
def test_valid_columns_are_found_in_every_form_of_mask(mask: object) -> None:
    assert valid_columns(mask, 2, 4).tolist() == PADDED.bool().tolist()


@pytest.mark.parametrize("mask", [None, {}, {"full_attention": None}])
def test_without_a_mask_every_column_is_valid(mask: object) -> None:
    assert valid_columns(mask, 2, 3).tolist() == [[True] * 3] * 2


def test_a_mask_of_new_columns_alone_says_nothing_of_those_in_the_cache() -> None:
    valid = valid_past_columns(torch.tensor([[0, 1, 1, 1, 1]]), 2, 3)
    assert valid is not None
    assert valid.tolist() == [[False, True]]
    assert valid_past_columns(torch.tensor([[0, 1, 1]]), 2, 3) is None


def test_a_mask_for_one_row_serves_the_whole_batch() -> None:
    assert (
        valid_columns(prepared(torch.bool)[1:], 3, 4).tolist() == [[False, False, True, True]] * 3
    )


@pytest.mark.parametrize("past", [None, torch.tensor([[True, False, True]])])
@pytest.mark.parametrize("new", [None, torch.tensor([[False, True]])])
def test_validity_of_old_and_new_keys_is_joined(
    past: torch.Tensor | None, new: torch.Tensor | None
) -> None:
    joined = join_valid(past, 2, new, (1, 2))
    if past is None and new is None:
        assert joined is None
        return
    assert joined is not None
    assert joined.tolist() == [[
        *([True, True] if past is None else [True, False]),  # the third is past the end
        *([True, True] if new is None else [False, True]),
    ]]  # fmt: skip


def test_keys_that_were_decoded_since_a_cut_are_valid() -> None:
    past = torch.tensor([[False, True], [True, True]])
    joined = join_valid(past, 4, torch.tensor([[True], [False]]), (2, 1))
    assert joined is not None
    assert joined.tolist() == [[False, True, True, True, True], [True, True, True, True, False]]


# -- the cache after a cut ------------------------------------------------------------------------


def sequence_of(valid: torch.Tensor, past: PrunedCache | None = None) -> SequenceState:
    """A batch of prompts in a decoder of four layers."""
    memories = [LayerMemory(True, False)] * 4
    structure = SimpleNamespace(
        memories=memories, first_with_keys=0, key_layers=range(4), layers=memories
    )
    return SequenceState(structure, [], valid, past=past)  # type: ignore[arg-type]


def test_states_of_what_is_left_go_back_to_their_slots() -> None:
    sequence = sequence_of(torch.ones(2, 3, dtype=torch.bool))
    sequence.columns = [torch.tensor([1]), torch.tensor([0, 2])]
    sequence.end_cut(2, False, torch.device("cpu"))
    states = torch.tensor([[[9.0], [1.0]], [[2.0], [3.0]]])  # the first one is of padding
    full = sequence.to_prepared(states)
    assert full.squeeze(2).tolist() == [[0, 1, 0], [2, 0, 3]]


def test_a_layer_places_new_queries_after_the_keys_that_it_holds() -> None:
    past = PrunedCache(columns=7, lengths=(7, 7, 4, 4))
    sequence = sequence_of(torch.ones(1, 2, dtype=torch.bool), past)
    for layer, places in ((0, [[7, 8]]), (2, [[4, 5]])):
        columns, taken = sequence.query_places(layer)
        assert columns.tolist() == [[7, 8]]
        assert taken.tolist() == places


def test_a_further_turn_counts_chunks_from_where_its_conversation_began() -> None:
    """A row of the first turn was padded; its second turn has padding of its own."""
    valid = torch.tensor([[False, True], [True, True]])
    assert sequence_of(valid).starts.tolist() == [1, 0]
    past = PrunedCache(columns=5, starts=torch.tensor([0, 2]))
    assert sequence_of(valid, past).starts.tolist() == [0, 2]
    assert sequence_of(valid, PrunedCache(columns=5)).starts.tolist() == [0, 0]


def test_rows_of_a_cut_cache_are_taken_of_all_that_is_noted_of_each() -> None:
    cache, keys = DynamicCache(), torch.zeros(2, 1, 3, 2)
    cache.update(keys, keys, 0)
    PrunedCache(
        columns=3,
        valid=[torch.tensor([[False, True, True], [True, True, True]])],
        key_columns=[torch.tensor([[-1, 1, 2], [0, 1, 2]])],
        starts=torch.tensor([1, 0]),
        shifts=[torch.tensor([4, 5])],
        last_positions=torch.tensor([[7, 8]]),
    ).tie(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    taken = cache._vtprune  # type: ignore[attr-defined]
    assert taken.valid[0].tolist() == [[True] * 3, [False, True, True]]
    assert taken.key_columns[0].tolist() == [[0, 1, 2], [-1, 1, 2]]
    assert taken.starts.tolist() == [0, 1]
    assert taken.shifts[0].tolist() == [5, 4]
    assert taken.last_positions.tolist() == [[8, 7]]


def test_a_fork_of_a_cache_is_cut_as_that_is() -> None:
    cache, keys = DynamicCache(), torch.zeros(1, 1, 3, 2)
    cache.update(keys, keys, 0)
    assert pruned_cache(fork_cache(cache)) is None
    pruned = PrunedCache(columns=5, offset=2)
    pruned.tie(cache)
    fork = fork_cache(cache)
    assert pruned_cache(fork) == pruned
    assert (fork.get_seq_length(), fork.get_seq_length(0)) == (5, 3)


def test_a_crop_of_a_cut_cache_goes_back_to_the_last_token_that_is_left() -> None:
    cache, keys = DynamicCache(), torch.zeros(1, 1, 6, 2)
    cache.update(keys, keys, 0)
    PrunedCache(columns=6, last_positions=torch.tensor([[9]])).tie(cache)
    cache.crop(-2)
    assert cache.get_seq_length() == 4
    assert cache._vtprune.last_positions.tolist() == [[7]]  # type: ignore[attr-defined]


def test_layers_between_two_cuts_share_one_validity_of_their_keys() -> None:
    """So that each step of decoding makes one mask for all of them."""
    valid = torch.tensor([[False, True, True], [True, True, True]])
    sequence = sequence_of(valid)
    sequence.columns = [torch.tensor([1]), torch.tensor([0, 2])]
    sequence.end_cut(2, False, torch.device("cpu"))
    after = sequence.cache_after()
    assert after.lengths == (3, 3, 2, 2)
    assert after.first_cut == 2
    assert after.valid[0] is after.valid[1]
    assert after.valid[2] is after.valid[3]
    assert after.valid[0] is not None
    assert after.valid[0].tolist() == valid.tolist()
    assert after.valid[2] is not None
    assert after.valid[2].tolist() == [[False, True], [True, True]]
    assert not after.shifts
    assert after.key_columns[0].tolist() == [[-1, 1, 2], [0, 1, 2]]
    assert after.key_columns[2].tolist() == [[-1, 1], [0, 2]]


def test_a_mask_of_fewer_keys_than_queries_leaves_out_those_that_were_dropped_since() -> None:
    mask, rows = causal(2, 6), pack([row[:2] for row in ROWS])
    valid = torch.tensor([[True, False, True, False], [False, False, True, True]])
    short = gather_mask(mask, rows, 6, 4, pack(ROWS), valid)
    assert short.shape == (2, 1, rows.length, 4)
    assert not short[:, 0][~valid[:, None].expand(-1, rows.length, -1)].any()
    last = gather_mask(mask[:, :, -1:], rows, 6, 4, pack(ROWS), valid)  # of the last token alone
    assert last[:, 0, 0].tolist() == valid.tolist()
