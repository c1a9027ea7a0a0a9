"""Ask about needles under every variant: which of their tokens, and which answers, are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vtprune.evaluation.damaged import DamagedFiles
from vtprune.evaluation.evaluate import (
    answer_all,
    default_places,
    rough_intervals,
    settings_head,
)
from vtprune.evaluation.needles.planting import Needle
from vtprune.evaluation.needles.result import NeedleTest, make_rows
from vtprune.evaluation.records import AnswersFile, NeedleKept
from vtprune.evaluation.runner import AskSettings
from vtprune.evaluation.variants import Variant
from vtprune.inference.evidence.explanation import evidence_kept
from vtprune.inference.kept_tokens import KeptTokens
from vtprune.inference.measuring import describe_model, describe_versions
from vtprune.inference.places import find_places
from vtprune.inference.questions_file import Asked
from vtprune.media import AskedMedia

if TYPE_CHECKING:
    from vtprune.models.loading import Loaded, Progress


class NeedleTokens:
    """Count how much of a needle's tokens a run kept.

    A token is the needle's where its box and frames meet the needle's. A token that was merged
    into another counts as dropped. Where a run gets other tokens, of smaller media, those that
    meet the needle count as a share of the unpruned model's, at most 1.
    """

    def __init__(self, needles: Sequence[Needle]) -> None:
        self.needles = {needle.asked.file: needle for needle in needles}
        self._shares: dict[tuple[AskedMedia, int], torch.Tensor] = {}
        self._tokens: dict[AskedMedia, int] = {}

    def __call__(self, asked: Asked, kept: KeptTokens) -> NeedleKept | None:
        """Return what a run kept of a needle; None where no token shows it.

        The first run of a question has to be that of the unpruned model.
        """
        needle = self.needles[asked.file]
        key = asked.file, len(kept.layout)
        if key not in self._shares:
            meets = [float(needle.meets(place)) for place in find_places(kept)]
            self._shares[key] = torch.tensor(meets)
        shares = self._shares[key]
        tokens = self._tokens.setdefault(asked.file, int(shares.sum()))
        if not tokens:
            return None
        part = min(float(shares.sum()) / tokens, 1.0)
        share = evidence_kept(shares, kept.layout, kept.stages, kept.num_layers)
        longest = _longest(kept, shares > 0)
        return NeedleKept(tokens, part * share.mean, part * share.after, longest)


def _longest(kept: KeptTokens, meets: torch.Tensor) -> float:
    """Return the share of the layers that some of the tokens (N,), a mask, are in."""
    for stage in kept.stages:
        columns = kept.layout.columns[meets].tolist()
        if not any(column in stage.kept for column in columns):
            return stage.layer / kept.num_layers
    return 1.0


def measure_needles(
    loaded: Loaded,
    needles: Sequence[Needle],
    variants: Sequence[Variant],
    settings: AskSettings,
    path: Path | None = None,
    on_progress: Progress | None = None,
    notes: Sequence[str] = (),
) -> NeedleTest:
    """Ask about every needle under every variant.

    Args:
        path: where the answers are kept, as of `evaluate`.
        notes: warnings of the list of variants, and of planting.

    Raises:
        VtpruneError: of any kind, with the way out.
    """
    settings = replace(settings, needle=NeedleTokens(needles))
    asked = [needle.asked for needle in needles]
    damaged = DamagedFiles()  # those that a needle is taken from
    with AnswersFile(path, settings_head(loaded, asked, settings), len(asked), asked) as answers:
        answer_all(loaded, asked, variants, answers, settings, damaged, on_progress)
    left_out = damaged.warnings(asked, "needle")
    needles = [needle for needle in needles if needle.asked.file not in damaged.errors]
    _, records = damaged.without_damaged(asked, answers.records)
    bases = list(dict.fromkeys(needle.base for needle in needles))
    warnings = [*loaded.warnings, *notes, *default_places(loaded, variants), *left_out,
                *rough_intervals(len(bases))]  # fmt: skip
    return NeedleTest(
        model=describe_model(loaded),
        rows=tuple(make_rows(needles, variants, records)),
        needles=len(needles),
        version=describe_versions(),
        warnings=tuple(dict.fromkeys(warnings)),
        media=bases,
    )
