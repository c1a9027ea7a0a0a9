"""A tokenizer for a model of which only the shape is there: words are all alike."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORD = "word"
FIRST = 100
"""Ids below may end or pad a text."""


def stand_in_tokenizer(special: Mapping[str, int | None]) -> PreTrainedTokenizerFast:
    """A tokenizer that gives every word one and the same id, and special tokens their own.

    Args:
        special: text of a special token -> its id; None: any that is not taken.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    taken = {one for one in special.values() if one is not None}
    free = (number for number in itertools.count(FIRST) if number not in taken)
    words = {WORD: next(free)}
    words |= {text: next(free) if one is None else one for text, one in special.items()}
    made = Tokenizer(models.WordLevel(words, unk_token=WORD))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(text, special=True) for text in special])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=WORD, padding_side="left")
