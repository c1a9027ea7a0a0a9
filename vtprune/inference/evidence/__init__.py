"""What an answer rests on: how much each visual token carries its probability.

Where to look: `ask` answers and notes what maps are made of, `probe` asks again with other visual
tokens, a method a file makes a map of that, `explanation` says which places it points at, and
`explain` is the chain over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

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
WINDOWS = {"occlusion": 2, "information": 1}
"""The methods that try windows of tokens, and the rows and columns of their windows."""


@dataclass(frozen=True)
class MapSettings:
    """How the maps of an answer are made.

    Args:
        by: the method.
        passes: forward passes that the maps of an answer may take.
        window: rows and columns of a window of tokens; None: the method's, or as large as the
            passes ask for.
        stride: rows and columns from one window to the next; None: one, or as the passes ask for.
        from_layer: the first layer in which `information` leaves tokens out.

    Raises:
        VtpruneError: a method that does not exist, a number out of range, or one that the method
            does not use.
    """

    by: str = DEFAULT
    passes: int = PASSES
    window: int | None = None
    stride: int | None = None
    from_layer: int = 0

    def __post_init__(self) -> None:
        by = self.by
        if by not in METHODS:
            raise VtpruneError(f"explain by {by!r} is unknown", f"choose from {', '.join(METHODS)}")
        for name, value in (("passes", self.passes), ("window", self.window),
                            ("stride", self.stride)):  # fmt: skip
            if value is not None and not value >= 1:
                raise VtpruneError(f"{name} is {value}, but must be at least 1")
        if by not in WINDOWS and self.chooses_windows:
            name = "stride" if self.window is None else "window"
            raise VtpruneError(
                f"--{name} changes nothing by {by}, which tries no windows",
                f"explain by {' or '.join(WINDOWS)}, or leave it out",
            )
        if by != "information" and self.from_layer:
            raise VtpruneError(
                f"--from-layer changes nothing by {by}, which leaves no tokens out",
                "explain by information, or leave it out",
            )
        if self.stride is not None and self.stride > self.window_size:
            raise VtpruneError(
                f"windows of {self.window_size} at stride {self.stride} leave tokens between them",
                "give a stride of at most the window",
            )

    @property
    def chooses_windows(self) -> bool:
        """Whether windows are set, and not left to the method and the passes."""
        return self.window is not None or self.stride is not None

    @property
    def window_size(self) -> int:
        """Rows and columns of a window."""
        return self.window if self.window is not None else WINDOWS.get(self.by, 1)
