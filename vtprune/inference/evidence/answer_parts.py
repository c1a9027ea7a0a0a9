"""The sentences or events of an answer, and which of its tokens spell each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDS = re.compile(r"(?<=[.!?;])\s+|\n+|,?\s+then\s+", re.IGNORECASE)
"""What stands between two of them."""
THEN = re.compile(r",?\s+then$", re.IGNORECASE)
MOST_PARTS = 12


@dataclass(frozen=True)
class AnswerPart:
    """A sentence or event of an answer.

    Args:
        text: as it was answered.
        first, end: its tokens, among those of the answer.
    """

    text: str
    first: int
    end: int


def split_answer(
    tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, most: int = MOST_PARTS
) -> list[AnswerPart]:
    """Return the parts of an answer, at least one; of more than `most`, the last holds the rest.

    Args:
        ids: (m,) int64, the end of the turn included.
    """
    tokens = ids.tolist()
    special = set(tokenizer.all_special_ids)
    length = next((n for n, token in enumerate(tokens) if token in special), len(tokens))
    if not length:  # an empty answer: the token that ended it
        return [AnswerPart("", 0, max(len(tokens), 1))]
    ends = [len(_text(tokenizer, tokens[: n + 1])) for n in range(length)]
    text = _text(tokenizer, tokens[:length])
    breaks = [match.end() for match in ENDS.finditer(text)][: most - 1]
    edges = [0, *(at for at in breaks if text[at:].strip()), len(text)]
    parts, first = [], 0
    for start, stop in pairwise(edges):
        # A token belongs to the part that it begins in; a blank before a word is the word's.
        end = length if stop == len(text) else sum(e <= stop for e in ends)
        if end > first and text[start:stop].strip():
            parts.append(AnswerPart(THEN.sub("", text[start:stop].strip()), first, end))
            first = end
    return parts or [AnswerPart(text.strip(), 0, length)]


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
