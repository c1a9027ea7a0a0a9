"""Plant needles: media of one's own with a small change in each, as sources that nobody stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vtprune.errors import MediaError, VtpruneError, brief
from vtprune.evaluation.needles.kinds import (
    FROM_OTHERS,
    KINDS,
    MAKERS,
    MOMENTS,
    OF_CLIPS,
    PLACES,
    Makers,
    NeedleDrawing,
    Spot,
)
from vtprune.inference.prompt_media import open_all, plan_media
from vtprune.inference.questions_file import Asked
from vtprune.media import Limits, Medium, Source, read
from vtprune.media.source import damaged
from vtprune.pictures.needles import Pixels, lay

if TYPE_CHECKING:
    from vtprune.inference.places import Box, TokenPlace
    from vtprune.models.base import Sampling
    from vtprune.models.loading import Loaded

SIZES = (0.05, 0.1, 0.2, 0.3)
COUNT = 20
"""Needles of each kind and size: of fewer files, intervals are rough."""


@dataclass(frozen=True)
class NeedlePlan:
    """Which needles are planted.

    Args:
        kinds: of KINDS; () for all that the files allow.
        sizes: their widths, as shares of the shorter side of the picture.
        count: of each kind and size, each in the next of the files.
        frames: of those that the model samples of a clip, how many a needle is in.
        seed: of what, where and when.
        makers: kind -> what makes it.

    Raises:
        VtpruneError: a kind that there is not, or a number out of its range.
    """

    kinds: tuple[str, ...] = ()
    sizes: tuple[float, ...] = SIZES
    count: int = COUNT
    frames: int = 1
    seed: int = 0
    makers: Makers = field(default_factory=lambda: MAKERS)

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise VtpruneError(
                    f"needle kind {brief(kind)} is unknown", f"choose from {', '.join(KINDS)}"
                )
        for name in ("kinds", "sizes"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise VtpruneError(f"needle {name} has one of them twice", "once is enough")
        for size in self.sizes:
            if not 0 < size <= 1:
                raise VtpruneError(
                    f"needle size {size:g} is out of range",
                    "a share of the shorter side, above 0, up to 1; 0.1 is usual",
                )
        for name in ("count", "frames"):
            if getattr(self, name) < 1:
                raise VtpruneError(f"needle {name} {getattr(self, name)} is out of range",
                                   "1 or more")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Needle:
    """A needle in a medium, and the question about it.

    Args:
        asked: the question; its file is the medium with the needle.
        kind: one of KINDS.
        size: its width as a share of the shorter side; None: it fills the frame.
        base: name of the file that it was planted in.
        box: in pixels of the file.
        frames: numbers of the first and the last frame that it is in; None: a picture.
    """

    asked: Asked
    kind: str
    size: float | None
    base: str
    box: Box
    frames: tuple[int, int] | None

    def meets(self, place: TokenPlace) -> bool:
        """Return whether a token shows a part of the needle, by boxes as `vtprune show` has them.

        They are rounded: edges that are the same but for the last digits have nothing between them.
        """
        if place.box is None:
            return False
        if self.frames is not None and not any(
            self.frames[0] <= number <= self.frames[1] for number in place.frames
        ):
            return False
        left, top, right, bottom = self.box
        x0, y0, x1, y1 = (round(edge, 2) for edge in place.box)
        return x0 < right and left < x1 and y0 < bottom and top < y1


class FrameReader:
    """Reads the frames of files; those of the file that was read last are kept."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._name, self._frames = "", dict[int, Pixels]()

    def frame(self, source: Source, number: int, index: Sequence[int] = ()) -> Pixels:
        """Return a frame, (H, W, 3) uint8, that nobody may change.

        Args:
            index: the frames that will be asked for too, which are decoded with it.

        Raises:
            DamagedError: the frame can't be decoded.
        """
        if source.name != self._name:
            self._name, self._frames = source.name, {}
        if number not in self._frames:
            wanted = [number, *(other for other in index if other not in self._frames)]
            frames = read(source, sorted(set(wanted)), limits=self.limits)
            pictures = frames.pictures.permute(0, 2, 3, 1).contiguous().numpy()
            self._frames |= dict(zip(frames.index, pictures, strict=True))
        if number not in self._frames:
            raise damaged(source.path, f"frame {number} does not decode", self.limits)
        return self._frames[number]


@dataclass(frozen=True, eq=False)
class PlantedFrames(Sequence[Pixels]):
    """The frames of a medium with a needle, which are made when they are asked for.

    Args:
        sampled: the frames that the model gets.
        drawing: the needle.
        top, left: where it lies.
        first, last: the frames that it is in.
    """

    reader: FrameReader
    source: Source
    sampled: tuple[int, ...]
    drawing: NeedleDrawing
    top: int
    left: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.source.num_frames

    def __getitem__(self, number: int) -> Pixels:  # type: ignore[override]
        frame = self.reader.frame(self.source, number, self.sampled)
        if not self.first <= number <= self.last:
            return frame
        return lay(frame, self.drawing.draw(), self.top, self.left)


def plant_needles(
    loaded: Loaded,
    files: Sequence[Medium],
    plan: NeedlePlan,
    sampling: Sampling,
    limits: Limits,
) -> tuple[list[Needle], list[str]]:
    """Return the needles, those in one file after each other, and what the reader should know.

    Args:
        files: pictures and clips; one that does not open, or whose frames can't be decoded, is left
            out, and named in a note.
        sampling: frames and tiles that the model gets of them.

    Raises:
        VtpruneError: no file that can be read, or kinds that the files don't allow.
    """
    sources, unread = _open(loaded, files, sampling, limits)
    kinds, notes = _possible_kinds(sources, plan)
    notes = [*unread, *notes]
    planter = _Planter(loaded, sources, plan, sampling, limits)
    order = np.random.default_rng(plan.seed).permutation(len(sources)).tolist()
    wanted: list[tuple[int, str, float | None, int]] = []
    for kind in kinds:
        fitting = [number for number in order if _fits(kind, sources[number])]
        sizes = (None,) if kind in OF_CLIPS else plan.sizes
        cells = [(size, count) for size in sizes for count in range(plan.count)]
        wanted += [
            (fitting[turn % len(fitting)], kind, size, count)
            for turn, (size, count) in enumerate(cells)
        ]
    # by file, so that each is decoded once
    return [planter.plant(*each) for each in sorted(wanted, key=lambda each: each[0])], notes


def _open(
    loaded: Loaded, files: Sequence[Medium], sampling: Sampling, limits: Limits
) -> tuple[list[Source], list[str]]:
    """Return the files that can be read, each once, and a note for each of the others."""
    sources: dict[str, Source] = {}
    faults: list[MediaError] = []
    for file in files:
        try:
            opened = open_all(loaded, [file], limits)
        except MediaError as error:
            faults.append(error)
            continue
        for source in opened:
            if source.name in sources:
                continue
            try:
                index = _sampled_frames(loaded, source, sampling, limits)
                # Needles lie in what is sampled, and are taken from a file's middle.
                FrameReader(limits).frame(source, source.num_frames // 2, index)
            except MediaError as error:
                faults.append(error)
            else:
                sources[source.name] = source
    if faults and not sources:
        raise faults[0]
    return list(sources.values()), [f"left out: {error.message}" for error in faults]


def _sampled_frames(
    loaded: Loaded, source: Source, sampling: Sampling, limits: Limits
) -> tuple[int, ...]:
    """Return the numbers of the frames that the model gets of a file."""
    return plan_media(loaded, [source], sampling, None, limits).plans[0].index


def _fits(kind: str, source: Source) -> bool:
    return kind not in OF_CLIPS or source.kind == "video"


def _possible_kinds(sources: Sequence[Source], plan: NeedlePlan) -> tuple[list[str], list[str]]:
    """Return the kinds that the files allow, and what is left out.

    Raises:
        VtpruneError: one that was asked for is not possible.
    """
    reasons = {}
    for kind in plan.kinds or KINDS:
        if kind in FROM_OTHERS and len(sources) < 2:
            reasons[kind] = "it is taken from another file, and there is one"
        elif not any(_fits(kind, source) for source in sources):
            reasons[kind] = "it is of clips, and there is none among the files"
    for kind, reason in reasons.items():
        if kind in plan.kinds:
            raise VtpruneError(
                f"needle kind {kind}: {reason}", "give more files, or other --needle-kinds"
            )
    notes = [f"no needles of kind {kind}: {reason}" for kind, reason in reasons.items()]
    return [kind for kind in plan.kinds or KINDS if kind not in reasons], notes


class _Planter:
    """Plants one needle after another."""

    def __init__(
        self,
        loaded: Loaded,
        sources: Sequence[Source],
        plan: NeedlePlan,
        sampling: Sampling,
        limits: Limits,
    ) -> None:
        self.loaded, self.sources, self.plan = loaded, sources, plan
        self.sampling, self.limits = sampling, limits
        self.reader, self.donors = FrameReader(limits), FrameReader(limits)
        self._indices: dict[int, tuple[int, ...]] = {}

    def plant(self, number: int, kind: str, size: float | None, count: int) -> Needle:
        """Plant a needle in the file of a number."""
        source = self.sources[number]
        words = f"{self.plan.seed}/{kind}/{size}/{count}"
        rng = np.random.default_rng(list(words.encode()))
        index = self._sampled(number)
        first, last = self._frames(rng, index, source.num_frames)
        height, width = source.height, source.width
        side = min(height, width)
        if size is not None:
            side = min(max(round(size * side), 2), side)
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        moment = MOMENTS[min(int(3 * (first + last) / 2 / source.num_frames), 2)]
        cell = [min(int(3 * (start + side / 2) / length), 2)
                for start, length in ((top, height), (left, width))]  # fmt: skip
        donor = self._donor(rng, number)
        spot = Spot(
            rng,
            self.reader.frame(source, first, index),
            top,
            left,
            side,
            PLACES[3 * cell[0] + cell[1]],
            moment,
            source.kind == "video",
            lambda: self.donors.frame(donor, donor.num_frames // 2),
        )
        drawing = self.plan.makers[kind](spot)
        tall, wide = drawing.size or (height, width)
        top, left = (
            (top + (side - tall) // 2, left + (side - wide) // 2) if drawing.size else (0, 0)
        )
        extent = "" if size is None else f" of {size:g}"
        frames = f" in frames {first}-{last}" if source.kind == "video" else ""
        label = f"{Path(source.name).name} with {kind}{extent} at {left},{top}{frames} ({count})"
        planted = replace(
            source,
            label=label,
            page=0,
            decoder="memory",
            _track=None,
            _pictures=(),
            _frames=PlantedFrames(
                self.reader, source, index, drawing, top, left, first, last
            ),
        )  # fmt: skip
        return Needle(
            Asked(planted, drawing.question, drawing.answer, drawing.choices, kind),
            kind,
            size,
            source.name,
            (float(left), float(top), float(left + wide), float(top + tall)),
            (first, last) if source.kind == "video" else None,
        )

    def _sampled(self, number: int) -> tuple[int, ...]:
        """Return the frames that the model gets of a file."""
        if number not in self._indices:
            self._indices[number] = _sampled_frames(
                self.loaded, self.sources[number], self.sampling, self.limits
            )
        return self._indices[number]

    def _frames(
        self, rng: np.random.Generator, index: Sequence[int], num_frames: int
    ) -> tuple[int, int]:
        """Return the first and the last frame of a stretch of as many sampled ones as planned."""
        count = min(self.plan.frames, len(index))
        start = int(rng.integers(len(index) - count + 1))
        end = start + count
        return index[start], index[end] - 1 if end < len(index) else num_frames - 1

    def _donor(self, rng: np.random.Generator, number: int) -> Source:
        """Return another file; the same where there is no other."""
        others = [source for other, source in enumerate(self.sources) if other != number]
        return others[int(rng.integers(len(others)))] if others else self.sources[number]
