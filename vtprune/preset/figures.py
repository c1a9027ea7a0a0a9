"""The figures that a preset rests on: measured here, or published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

LONGEST_NAME = 100  # characters of a model's or a paper's name


@dataclass(frozen=True)
class MeasuredFigure:
    """Right answers of a model that was asked with this project.

    Args:
        model: its name; "embedded" for the one in the package.
        questions: how many were asked.
        right: percent of right answers under the preset.
        source: page of the documentation, or command.
        unpruned: percent of right answers without pruning; None: not recorded.
        keep: the keep that was asked for; None: not recorded.
        note: what else is to be known.
        media: "pictures" or "clips" that it is of; None: both.
    """

    model: str
    questions: int
    right: float
    source: str
    unpruned: float | None = None
    keep: float | None = None
    note: str | None = None
    media: str | None = None

    kind = "measured"

    @property
    def score(self) -> str:
        """The figure, beside that of the unpruned model."""
        of_unpruned = "" if self.unpruned is None else f" of {self.unpruned:.1f}"
        return f"{self.right:.1f}{of_unpruned} %"

    @property
    def origin(self) -> str:
        """Who says so, in short."""
        return f"{self.questions:,} questions"


@dataclass(frozen=True)
class PublishedFigure:
    """Score of a model in a paper, relative to the unpruned model.

    Args:
        paper: "arXiv 2512.07580", or its title.
        model: the one that the paper asked.
        benchmark: the one that the score is of, or several.
        retained: percent of the unpruned score.
        keep: fraction of the tokens that the paper left; None: not said.
        note: what else is to be known, as where the preset differs.
        media: as of a measured figure.
    """

    paper: str
    model: str
    benchmark: str
    retained: float
    keep: float | None = None
    note: str | None = None
    media: str | None = None

    kind = "published"

    @property
    def score(self) -> str:
        """The figure, beside that of the unpruned model."""
        return f"{self.retained:.1f} of 100 %"

    @property
    def origin(self) -> str:
        """Who says so, in short."""
        return self.paper


Figure = MeasuredFigure | PublishedFigure


def figure_of(entry: Mapping[str, Any]) -> Figure:
    """Return what an entry of a checked preset's `evidence` says."""
    if "measured" in entry:
        return MeasuredFigure(**entry["measured"])
    return PublishedFigure(**entry["published"])


def to_entry(figure: Figure) -> dict[str, object]:
    """Return a figure in the preset schema."""
    values = {key: value for key, value in asdict(figure).items() if value is not None}
    return {figure.kind: values}
