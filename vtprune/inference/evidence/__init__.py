"""What an answer rests on: how much each visual token carries its probability.

Where to look: `ask` answers and notes what maps are made of, `probe` asks again with other visual
tokens, a method a file makes a map of that, `explanation` says which places it points at, and
`explain` is the chain over all of them.
"""

from __future__ import annotations

from vtprune.errors import VtpruneError

METHODS = {
    "attention": "the answer's attention to each token, mean over layers and heads; no pass more",
    "gradient": "the slope of the answer's probability towards the mean token; 3 passes a part",
    "relevance": "attention weighted by that slope; 3 passes a part",
    "occlusion": "what the answer loses without a window of tokens",
    "information": "how probable the answer is from a window of tokens alone",
    "mask": "small learned masks of several sizes under which the answer stays",
    "hierarchical": "coarse regions first, finer ones inside those that carry the answer",
}
"""Name -> what the map says; each is a function of its name in a module of that name."""
DEFAULT = "relevance"
READS_ATTENTION = ("attention", "relevance")
PASSES = 256
"""Forward passes that a map may take."""


def check_method(by: str, passes: int) -> None:
    """Refuse a method that does not exist, and a number of passes that is none.

    Raises:
        VtpruneError: with the methods.
    """
    if by not in METHODS:
        raise VtpruneError(f"explain by {by!r} is unknown", f"choose from {', '.join(METHODS)}")
    if not passes >= 1:
        raise VtpruneError(f"passes is {passes}, but must be at least 1", f"{PASSES} is usual")
