"""A layer-average budget, spent on breadth (tokens) or depth (layers): which split loses least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vtprune.engine import pruning
from vtprune.engine.inputs import FeatureCache, PreparedInputs
from vtprune.errors import ModelError, PresetError
from vtprune.evaluation.calibrate.horizon import Change, Gap, quality, relative_change, relative_gap
from vtprune.evaluation.variants import split_options
from vtprune.inference.answers import Prompt, Score, score_forced
from vtprune.inference.questions_file import Asked
from vtprune.inference.wording import with_options
from vtprune.preset.calibration import Calibration
from vtprune.pruners import METHODS, find_method
from vtprune.tokens.schedule import SLACK

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded

SELECTORS = ("spread", "entropy", "random", "uniform")
DEPTHS = (1 / 4, 1 / 2, 3 / 4)  # between the depth where all tokens use the budget up, and the end
LEFT = 1 / 6  # of the budget that random keeps past the horizon, as in `entropy-horizon`
SEED = 0


@dataclass(frozen=True)
class Schedule:
    """One way to spend a budget.

    Args:
        name: as in the table.
        stages: in the preset schema; one is free, and meets the budget.
    """

    name: str
    stages: tuple[Mapping[str, object], ...]


@dataclass(frozen=True)
class Tried:
    """What a schedule did.

    Args:
        schedule: which.
        keep_mean: layer average of what was really kept, over the questions.
        change: of quality against the unpruned model; one entry.
        behind: the best schedule's change less this one's, and its interval.
        apart: whether that interval has no 0 in it.
        exact: share of the answers that are what greedy decoding gives.
        unreachable: why the budget can't be met; the rest says nothing then.
    """

    schedule: Schedule
    keep_mean: float = 0.0
    change: Change | None = None
    behind: Gap | None = None
    apart: bool = False
    exact: float = 0.0
    unreachable: str = ""

    @property
    def mean(self) -> float:
        """The change of quality, by which schedules are ranked."""
        return self.change.mean[0] if self.change else -np.inf


def schedules(
    keep: float,
    num_layers: int,
    calibration: Calibration,
    selectors: Sequence[str] = SELECTORS,
    options: Mapping[str, str] | None = None,
) -> list[Schedule]:
    """A few splits of a budget, from one cut at the start to all tokens until it is used up.

    Every selector by its own schedule, if it has one; at one place alone; with random past the
    horizon; and with everything dropped at the horizon and at depths between; last, no selector:
    all tokens to the depth that the budget pays for.

    Args:
        options: of every selector that has such an option.

    Raises:
        PresetError: a selector is no method that chooses tokens, or an option is none of theirs.
    """
    found = []
    own = split_options([name for name in selectors if name in METHODS], options or {})
    horizon, paid = calibration.horizon, keep * num_layers
    depths = {round(paid + part * (num_layers - paid)): False for part in DEPTHS}
    depths[horizon] = True
    for name in selectors:
        method = find_method(name)
        if not method.chooses:
            choosing = [other for other, one in METHODS.items() if one.chooses]
            raise PresetError(
                f"method {name} chooses no tokens: all schedules end with it or without it",
                f"choose from {', '.join(choosing)}",
            )
        told = with_options(name, own[name])
        if method.schedule:
            stage = {"at": "schedule", "method": name, **own[name]}
            found.append(Schedule(f"{told}, its own schedule", (stage,)))
            if method.lowest:  # it can't cut at the input, and any other one place is a guess
                continue
        at = "ecl" if method.at == "ecl" or method.lowest else "input"
        first: dict[str, object] = {"at": at, "method": name, **own[name]}
        start = calibration.ecl if at == "ecl" else 0
        found.append(Schedule(f"{told} at {at}", (first,)))
        if start < horizon < num_layers:
            last = {"at": "horizon", "method": "random", "keep": round(LEFT * keep, 4)}
            found.append(Schedule(f"{told} at {at}, random at horizon", (first, last)))
        for depth, named in sorted(depths.items()):
            if max(start, paid) < depth < num_layers:
                place = "horizon" if named else depth
                last = {"at": place, "method": "vtw", "keep": 0}
                shown = f"horizon ({depth})" if named else f"layer {depth}"
                found.append(Schedule(f"{told} at {at}, none from {shown}", (first, last)))
    if (last_paid := int(paid + SLACK)) >= 1:
        whole = {"at": last_paid, "method": "vtw"}
        found.append(Schedule(f"all, none from layer {last_paid}", (whole,)))
    return found


class Search:
    """Tries schedules on one prompt after the other.

    Args:
        loaded: the model.
        keep: the layer average.
        calibration: where `ecl` and `horizon` are.
        candidates: what to try.
    """

    def __init__(
        self, loaded: Loaded, keep: float, calibration: Calibration, candidates: Sequence[Schedule]
    ) -> None:
        self.loaded, self.keep, self.calibration = loaded, keep, calibration
        self.candidates = candidates
        self.scores: list[list[Score]] = [[] for _ in candidates]
        self.kept: list[list[float]] = [[] for _ in candidates]
        self.unreachable: dict[int, str] = {}

    def prompt(self, prompt: Prompt, encoded: FeatureCache) -> None:
        """Scores a prompt's answer under every schedule that still meets the budget."""
        for number, one in enumerate(self.candidates):
            if number in self.unreachable:
                continue
            block = pruning(
                self.loaded.model,
                {"stages": list(one.stages)},
                self.keep,
                SEED,
                threads="own",
                calibration=self.calibration,
                inputs=PreparedInputs(prompt.media, encoded),
            )
            try:
                with block as trace:
                    self.scores[number].append(score_forced(self.loaded, prompt))
            except (PresetError, ModelError) as error:
                self.unreachable[number] = error.message
                continue
            self.kept[number].append(trace.keep_mean())

    def table(self, before: Sequence[Score], asked: Sequence[Asked]) -> list[Tried]:
        """All schedules, the best first.

        Args:
            before: the unpruned model's scores of the same prompts.
            asked: the question of each.
        """
        worth = {
            number: np.array([[quality(*one)] for one in zip(asked, scores, strict=True)])
            for number, scores in enumerate(self.scores)
            if number not in self.unreachable
        }
        unpruned = [quality(*one) for one in zip(asked, before, strict=True)]
        files = [str(one.file) for one in asked]
        tried = [
            Tried(
                self.candidates[number],
                float(np.mean(self.kept[number])),
                relative_change(unpruned, values, files),
                exact=float(np.mean([one.greedy for one in self.scores[number]])),
            )
            for number, values in worth.items()
        ]
        if tried:
            best = list(worth.values())[int(np.argmax([one.mean for one in tried]))]
            gaps = [relative_gap(unpruned, best, values, files) for values in worth.values()]
            tried = [
                replace(one, behind=gap, apart=gap.low is not None and gap.low > 0)
                for one, gap in zip(tried, gaps, strict=True)
            ]
        tried.sort(key=lambda one: -one.mean)
        return tried + [
            Tried(self.candidates[number], unreachable=why)
            for number, why in self.unreachable.items()
        ]
