"""The registry's entry of a method: what can be said without importing it, so without torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from vtprune.errors import quote

Value = str | float
"""Of an option: one of its choices, or a number."""


@dataclass(frozen=True)
class MethodOption:
    """One option of a method: its values and what it is for.

    Args:
        default: a choice or a number.
        choices: the words it takes; empty for a number.
        low, high: the lowest and the highest number, both allowed; None where there is no bound.
            With choices and a bound, it takes a number besides.
    """

    name: str
    default: Value
    choices: tuple[str, ...]
    help: str
    low: float | None = None
    high: float | None = None

    @property
    def values(self) -> str:
        """Return the values as a reader sees them: "row | none", or "a number from 0 to 255"."""
        if not self.takes_number:
            return " | ".join(self.choices)
        bounds = [] if self.low is None else [f"from {self.low:g}"]
        bounds += [] if self.high is None else [f"to {self.high:g}"]
        return " | ".join([*self.choices, " ".join(["a number", *bounds])])

    @property
    def takes_number(self) -> bool:
        """Whether a number is one of its values."""
        return not self.choices or self.low is not None or self.high is not None

    def format_value(self, value: Value) -> str:
        """Return a value as a preset or a command line has it."""
        return value if isinstance(value, str) else f"{value:g}"

    def check(self, value: object) -> Value | None:
        """Return a value as the method takes it; None where the option can't be that."""
        text = value if isinstance(value, str) else quote(value)
        if text in self.choices:
            return text
        if not self.takes_number:
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            return None
        low = -sys.float_info.max if self.low is None else self.low
        high = sys.float_info.max if self.high is None else self.high
        return number if low <= number <= high else None


@dataclass(frozen=True)
class Method:
    """A method: the path of its class, and the facts that are known without importing it.

    Args:
        path: "module:Class".
        at: the place it cuts at where the user names none.
        summary: what it keeps, in at most 47 characters.
        paper: where it was published; empty for a baseline.
        drops_all: it leaves nothing; without a keep, the budget says from which layer on.
        exact: it meets its budget exactly; otherwise it may keep fewer.
        lowest: the first layer that it can cut at; 1 where it reads what the layer before did.
        modalities: what it can cut.
        schedule: "module:function" of a schedule of its own, for the place `at`: see
            `vtprune.tokens.schedule.CutProfile`.
        later: the method of the schedule's cuts after the first, and its options, where that is
            another one.
        units: it drops whole frames and tiles before the vision tower, and acts at `pixels` alone.
        patches: of these it drops single patches too.
        media: it makes the media themselves smaller, and acts at `pixels` alone.
        reads_question: what it keeps depends on the text that follows the visual tokens, the
            question.
        blind: the option and its value with which it does not, although it reads the question.
    """

    path: str
    at: str
    summary: str
    paper: str = ""
    options: tuple[MethodOption, ...] = ()
    drops_all: bool = False
    exact: bool = True
    lowest: int = 0
    modalities: tuple[str, ...] = ("image", "video")
    schedule: str = ""
    later: tuple[str, Mapping[str, Value]] | None = None
    units: bool = False
    patches: bool = False
    media: bool = False
    reads_question: bool = False
    blind: tuple[str, str] | None = None

    @property
    def before_tower(self) -> bool:
        """Whether it acts before the vision tower, at `pixels` alone."""
        return self.units or self.media

    @property
    def chooses(self) -> bool:
        """Whether it selects some of the tokens that it is given."""
        return not (self.drops_all or self.before_tower)
