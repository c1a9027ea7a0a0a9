"""How right a caption is by its references (CIDEr-D), and how different several are."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # words of difference in length that the penalty bears
SCALE = 10.0

Ngram = tuple[str, ...]
Vector = Mapping[Ngram, float]


def words(text: str) -> list[str]:
    """Return the words in lower case, without punctuation; nothing is left out or stemmed."""
    return re.findall(r"[^\W_]+(?:['.,-][^\W_]+)*", text.lower())


def ngrams(text: str, length: int) -> Counter[Ngram]:
    """Return how often each n-gram of so many words is in a text."""
    found = words(text)
    return Counter(zip(*(found[start:] for start in range(length)), strict=False))


class Cider:
    """CIDEr (arXiv 1411.5726): texts compared by their n-grams, the rarer the heavier.

    An n-gram that is in the texts of `d` of D documents weighs log(D / max(d, 1)) each time.

    As the COCO evaluation has it, words are not stemmed, and what is called CIDEr is CIDEr-D.

    Args:
        documents: the texts of each, such as the references of each picture.
    """

    def __init__(self, documents: Iterable[Sequence[str]]) -> None:
        self._documents: Counter[Ngram] = Counter()
        self.num_documents = 0
        for texts in documents:
            self.num_documents += 1
            self._documents.update(
                {
                    ngram
                    for text in texts
                    for n in range(1, LONGEST + 1)
                    for ngram in ngrams(text, n)
                }
            )

    def vector(self, text: str, length: int) -> dict[Ngram, float]:
        """Return the weights of a text's n-grams of so many words."""
        return {
            ngram: count * math.log(self.num_documents / max(self._documents[ngram], 1))
            for ngram, count in ngrams(text, length).items()
        }

    def score(self, caption: str, references: Sequence[str]) -> float:
        """Return CIDEr-D of a caption, from 0 to 10: the mean over references and n-gram lengths.

        Repeating a word of a reference gains nothing (weights are clipped to the reference's), and
        another length costs by a Gaussian of SIGMA words.
        """
        total = 0.0
        for reference in references:
            gap = len(words(caption)) - len(words(reference))
            penalty = math.exp(-(gap**2) / (2 * SIGMA**2))
            similar = sum(
                _cosine(self.vector(caption, n), self.vector(reference, n), clipped=True)
                for n in range(1, LONGEST + 1)
            )
            total += penalty * similar / LONGEST
        return SCALE * total / len(references)

    def self_cider(self, captions: Sequence[str]) -> float:
        """Return how different captions of one picture are: 0 alike, 1 without a word in common.

        It is the spread of the eigenvalues of the matrix of their CIDEr, of m captions
        -log_m(sqrt(l_1) / sum sqrt(l_i)) (arXiv 1903.12020).
        """
        vectors = [[self.vector(text, n) for n in range(1, LONGEST + 1)] for text in captions]
        kernel = np.array(
            [[sum(map(_cosine, left, right)) / LONGEST for right in vectors] for left in vectors]
        )
        roots = np.sqrt(np.clip(np.linalg.eigvalsh(kernel), 0.0, None))
        if roots.sum() < 1e-9:  # no words, or none that tells documents apart
            return 0.0
        return max(-math.log(roots.max() / roots.sum()) / math.log(len(captions)), 0.0)


def _cosine(left: Vector, right: Vector, clipped: bool = False) -> float:
    """Return the cosine of two vectors.

    Args:
        clipped: of `left`, no weight above that of `right` counts in the product.
    """
    norm = math.sqrt(sum(w**2 for w in left.values()) * sum(w**2 for w in right.values()))
    if not norm:
        return 0.0
    shared = left.keys() & right.keys()
    return sum(
        (min(left[ngram], right[ngram]) if clipped else left[ngram]) * right[ngram]
        for ngram in shared
    ) / norm  # fmt: skip


def distinct(captions: Sequence[str], length: int) -> float:
    """Return distinct-n of captions of one picture: different n-grams, as a share of all words.

    As of arXiv 1510.03055; 0 where there are no words.
    """
    total = sum(len(words(text)) for text in captions)
    different = {ngram for text in captions for ngram in ngrams(text, length)}
    return len(different) / total if total else 0.0
