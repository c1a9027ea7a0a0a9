"""The maps of an answer: shares of its evidence by token, and the places that they point at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from vtprune.inference.kept_tokens import KeptTokens, StageOfSample
from vtprune.inference.places import Box, TokenPlace, find_places
from vtprune.tokens.layout import Layout

SCHEMA = 1
"""Version of the JSON's schema."""
AROUND = 0.5
"""Share of its highest token's evidence that a token of a region has at least."""


@dataclass(frozen=True)
class EvidenceRegion:
    """The place that a map points at: a file, its frames, a tile, a box.

    Args:
        media: number of the file.
        frames, seconds: of the file, first to last; () for a picture.
        tile: of its highest token; 0 is the base picture.
        box: around the tokens there, in pixels of the file.
        share: of the evidence that lies in it.
    """

    media: int
    frames: tuple[int, ...]
    seconds: tuple[float, ...]
    tile: int
    box: Box
    share: float

    def to_dict(self) -> dict[str, object]:
        """Return it as the JSON has it."""
        return {
            "media": self.media,
            "frames": list(self.frames),
            "seconds": list(self.seconds),
            "tile": self.tile,
            "box": [round(edge, 2) for edge in self.box],
            "share": round(self.share, 4),
        }


@dataclass(frozen=True)
class Moment:
    """A step of a video, and its share of the evidence.

    Args:
        media: number of the file.
        frame: step in time.
        seconds: of its frames.
    """

    media: int
    frame: int
    seconds: tuple[float, ...]
    share: float

    def to_dict(self) -> dict[str, object]:
        """Return it as the JSON has it."""
        return {
            "media": self.media,
            "frame": self.frame,
            "seconds": list(self.seconds),
            "share": round(self.share, 4),
        }


@dataclass(frozen=True, eq=False)
class EvidenceMap:
    """How the evidence of one sentence or event of an answer is spread.

    Args:
        text: the part of the answer.
        probability: of its tokens, geometric mean; None where no pass was made for it.
        shares: (N,) float32, 0 or more; they add up to 1, or are 0 where nothing carries it.
    """

    text: str
    probability: float | None
    shares: torch.Tensor


def to_shares(values: torch.Tensor) -> torch.Tensor:
    """Return (N,) the positive part of a map as shares of its sum."""
    positive = values.float().nan_to_num(0.0, 0.0, 0.0).clamp_min(0)
    total = float(positive.sum())
    return positive / total if total > 0 else positive


@dataclass(frozen=True, eq=False)
class ExplainedRun:
    """The maps of one answer, of the unpruned model or under a preset.

    Args:
        kept: the tokens, and what pruning kept of them.
        name: how it was pruned, or "unpruned".
        keep_mean: layer average of the kept fraction.
        question, answer, model: of the run.
        maps: one a part of the answer.
        passes: forward passes beside the answer's own.
        seconds: that the maps took.
    """

    kept: KeptTokens
    name: str
    keep_mean: float
    question: str
    answer: str
    model: str
    maps: tuple[EvidenceMap, ...]
    passes: int
    seconds: float

    @cached_property
    def places(self) -> list[TokenPlace]:
        """Where each token lies, in the order of the prompt."""
        return find_places(self.kept)

    @property
    def files(self) -> list[str]:
        """The names of the files, without their folders."""
        return [Path(item.source.name).name for item in self.kept.media]

    def moments(self, evidence: EvidenceMap) -> list[Moment]:
        """Return the share of each step of the videos, in order."""
        shares: dict[tuple[int, int], float] = {}
        seconds: dict[tuple[int, int], tuple[float, ...]] = {}
        for place, share in zip(self.places, evidence.shares.tolist(), strict=True):
            if place.seconds:
                key = place.media, place.frame
                shares[key] = shares.get(key, 0.0) + share
                seconds[key] = place.seconds
        return [Moment(*key, seconds[key], share) for key, share in sorted(shares.items())]

    def unplaced(self, evidence: EvidenceMap) -> float:
        """Return the share of a map on tokens that show no place, such as ends of rows."""
        shares = evidence.shares.tolist()
        return sum(
            share for place, share in zip(self.places, shares, strict=True) if place.box is None
        )

    def region(self, evidence: EvidenceMap) -> EvidenceRegion | None:
        """Return the place around a map's highest token; None where nothing carries the part.

        In time it goes on over the steps next to it whose tokens in that box come near.
        """
        shares = evidence.shares.tolist()
        shown = [
            n for n, place in enumerate(self.places) if place.box is not None and shares[n] > 0
        ]
        if not shown:
            return None
        top = max(shown, key=lambda n: shares[n])
        peak = self.places[top]
        near = [
            n for n in shown
            if self.places[n].item == peak.item
            and (self.places[n].tile > 0) == (peak.tile > 0)
            and shares[n] >= AROUND * shares[top]
        ]  # fmt: skip
        inside = grow([self.places[n] for n in near], peak)
        boxes = [place.box for place in inside if place.box is not None]
        box = (
            min(b[0] for b in boxes), min(b[1] for b in boxes),
            max(b[2] for b in boxes), max(b[3] for b in boxes),
        )  # fmt: skip
        frames = sorted({frame for place in inside for frame in place.frames})
        seconds = sorted({second for place in inside for second in place.seconds})
        columns = {place.column for place in inside}
        share = sum(
            s for place, s in zip(self.places, shares, strict=True) if place.column in columns
        )
        return EvidenceRegion(peak.media, tuple(frames), tuple(seconds), peak.tile, box, share)

    def to_dict(self) -> dict[str, object]:
        """Return it as the JSON has it."""
        return {
            "name": self.name,
            "keep_mean": self.keep_mean,
            "answer": self.answer,
            "passes": self.passes,
            "seconds": self.seconds,
            "maps": [
                {
                    "text": evidence.text,
                    "probability": evidence.probability,
                    "region": None if region is None else region.to_dict(),
                    "moments": [moment.to_dict() for moment in self.moments(evidence)],
                    "tokens": [
                        place.to_dict() | {"share": round(share, 6)}
                        for place, share in zip(self.places, evidence.shares.tolist(), strict=True)
                    ],
                }
                for evidence, region in ((one, self.region(one)) for one in self.maps)
            ],
        }


def grow(places: Sequence[TokenPlace], peak: TokenPlace) -> list[TokenPlace]:
    """Return the places connected to the peak by steps of one in time, row or column."""
    at = {(place.frame, place.row, place.col): place for place in places}
    waiting, inside = [(peak.frame, peak.row, peak.col)], {}
    while waiting:
        key = waiting.pop()
        if key in inside or key not in at:
            continue
        inside[key] = at[key]
        for axis in range(3):
            for step in (-1, 1):
                waiting.append(tuple(n + step * (a == axis) for a, n in enumerate(key)))  # type: ignore[arg-type]
    return list(inside.values())


@dataclass(frozen=True)
class EvidenceKept:
    """The share of the unpruned answer's evidence that lies on tokens which pruning kept.

    Args:
        mean: average over the decoder's layers, as `keep` counts tokens.
        after: after the last cut.
    """

    mean: float
    after: float

    def to_dict(self) -> dict[str, float]:
        """Return it as the JSON has it."""
        return {"mean": round(self.mean, 4), "after": round(self.after, 4)}


def evidence_kept(
    shares: torch.Tensor, layout: Layout, stages: Sequence[StageOfSample], num_layers: int
) -> EvidenceKept:
    """Return how much of a map's evidence pruning kept.

    Args:
        shares: (N,) of the tokens of the layout.
        stages: in the order of the cuts; tokens that they merged count as dropped.
    """
    by_layer = [1.0] * num_layers
    kept = 1.0
    total = max(float(shares.sum()), 1e-12)
    for stage in stages:
        present = torch.tensor([column in stage.kept for column in layout.columns.tolist()])
        kept = float(shares[present].sum()) / total
        by_layer[stage.layer :] = [kept] * (num_layers - stage.layer)
    return EvidenceKept(sum(by_layer) / max(num_layers, 1), kept)


@dataclass(frozen=True, eq=False)
class Explanation:
    """What an answer rests on.

    Args:
        by: the method of the maps.
        runs: the unpruned model's, then the pruned one's where it was asked for.
        kept: what pruning kept of the unpruned answer's evidence; None without pruning, or where
            the pruned model gets other tokens.
    """

    by: str
    runs: tuple[ExplainedRun, ...]
    kept: EvidenceKept | None = None
    warnings: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The answer of the model as it was asked for: the pruned one's where there is one."""
        return self.runs[-1].answer

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON has it; docs/explain.md has the schema."""
        from vtprune import __version__

        first = self.runs[0]
        return {
            "schema": SCHEMA,
            "version": __version__,
            "by": self.by,
            "question": first.question,
            "model": first.model,
            "media": [
                {
                    "file": item.source.name,
                    "kind": item.source.kind,
                    "width": item.source.width,
                    "height": item.source.height,
                }
                for item in first.kept.media
            ],
            "runs": [run.to_dict() for run in self.runs],
            "evidence_kept": None if self.kept is None else self.kept.to_dict(),
            "warnings": list(self.warnings),
        }
