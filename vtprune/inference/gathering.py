"""From files to what is shown of them: opened, decoded, resized, and no more of them than asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from vtprune.errors import ModelError, VtpruneError
from vtprune.inference.downsampling import Look, shrink
from vtprune.media import Limits, Source, open_each, read
from vtprune.models.base import Preparable, PreparedMedia, ReadPlan, Sampling
from vtprune.models.loading import Progress
from vtprune.preset import Preset
from vtprune.tokens.units import FullSizeCounts

T = TypeVar("T")
DRAWN = 8  # frames without a file that are resized at once


@dataclass(frozen=True)
class Gathered:
    """All media of a question, read and resized.

    Args:
        items: one a file.
        decoders: that really ran, one a file.
        media_seconds: opening and decoding.
        resize_seconds: the family's resizing, and choosing how much to look at.
        sources: the files; of what was made smaller, as it was.
        whole: what a prompt would hold if nothing had been made smaller; None where nothing was.
    """

    items: tuple[PreparedMedia, ...]
    decoders: tuple[str, ...]
    warnings: tuple[str, ...]
    media_seconds: float
    resize_seconds: float
    sources: tuple[Source, ...] = ()
    whole: FullSizeCounts | None = None

    @property
    def read(self) -> list[PreparedMedia]:
        """The items, each with its file as it was."""
        pairs = zip(self.items, self.sources, strict=True)
        return [replace(item, source=source) for item, source in pairs]


@dataclass(frozen=True)
class Chosen:
    """What is to be read of opened files; nothing of it is decoded yet.

    Args:
        looks: at each file.
        plans: for each of them.
        media_seconds, resize_seconds: spent on opening, and on choosing.
        whole: what a prompt would hold if nothing were made smaller; None where nothing is.
    """

    looks: tuple[Look, ...]
    plans: tuple[ReadPlan, ...]
    media_seconds: float
    resize_seconds: float
    whole: FullSizeCounts | None = None


def choose(
    known: Preparable,
    paths: Sequence[str | Path | Source],
    sampling: Sampling,
    preset: Preset | None,
    limits: Limits,
) -> Chosen:
    """Opens every file, and says what to read of it; less where the preset downsamples.

    Raises:
        MediaError, ModelError, PresetError: all that can be told before decoding.
    """
    started = time.perf_counter()
    sources = open_all(known, paths, limits)
    opened = time.perf_counter()
    shrunk = None if preset is None else shrink(known, sources, sampling, preset)
    looks = tuple(Look(one, sampling) for one in sources) if shrunk is None else shrunk.looks
    kinds = [one.kind for one in sources]
    plans = tuple(look.plan(known, kinds.count(look.source.kind)) for look in looks)
    spent = time.perf_counter() - opened
    whole = None if shrunk is None else shrunk.whole
    return Chosen(looks, plans, opened - started, spent, whole)


def gather_for(
    known: Preparable,
    paths: Sequence[str | Path | Source],
    sampling: Sampling,
    preset: Preset | None,
    limits: Limits,
    on_progress: Progress | None = None,
) -> Gathered:
    """Opens, decodes and resizes every file; as little of it as a preset that downsamples wants."""
    return read_all(choose(known, paths, sampling, preset, limits), limits, on_progress)


def gather(
    known: Preparable,
    paths: Sequence[str | Path | Source],
    sampling: Sampling,
    limits: Limits,
    on_progress: Progress | None = None,
) -> Gathered:
    """Opens, decodes and resizes every file, in the family's way."""
    return gather_for(known, paths, sampling, None, limits, on_progress)


def gather_drawn(
    known: Preparable,
    source: Source,
    draw: Callable[[Sequence[int]], torch.Tensor],
    sampling: Sampling,
    preset: Preset | None = None,
) -> Gathered:
    """Resizes pixels that no file holds, in the family's way.

    Args:
        source: what a file of them would be.
        draw: frame numbers, (0,) of a picture, -> (n, 3, height, width) uint8.

    Raises:
        ModelError: the family does not take its kind.
    """
    chosen = choose(known, [source], sampling, preset, Limits())
    look, plan = chosen.looks[0], chosen.plans[0]
    parts, seconds = [], 0.0
    for start in range(0, len(plan.index), DRAWN):
        pixels = draw(plan.index[start : start + DRAWN])
        started = time.perf_counter()
        parts.append(plan.transform(pixels))
        seconds += time.perf_counter() - started
    times = tuple(source.timestamps[number] for number in plan.index) if source.timestamps else ()
    item = PreparedMedia(look.seen, torch.cat(parts), plan.index, times, plan.regions)
    return Gathered((item,), ("none",), (), 0.0, seconds, (source,), chosen.whole)


def attempt(work: Callable[[], T]) -> T | VtpruneError:
    """Return what some work gives, or the error that a user can act on."""
    try:
        return work()
    except VtpruneError as error:
        return error


def open_all(
    known: Preparable, paths: Sequence[str | Path | Source], limits: Limits
) -> list[Source]:
    """Open every file; of a file with pages, every page that the limits choose.

    Raises:
        MediaError: it can't be read.
        ModelError: the family does not take its kind.
    """
    sources: list[Source] = []
    for one in paths:
        sources += [one] if isinstance(one, Source) else open_each([one], limits)
    for source in sources:
        if source.kind not in known.family.modalities:
            takes = " and ".join(known.family.modalities)
            raise ModelError(
                f"{source.name}: {known.family.name} takes {takes} input, no {source.kind}",
                "choose another --model (vtprune models)",
            )
    return sources


def read_all(chosen: Chosen, limits: Limits, on_progress: Progress | None = None) -> Gathered:
    """Decodes and resizes what was chosen of opened files.

    Args:
        on_progress: hears of every chunk of frames, and of every one of several pictures.
    """
    started = time.perf_counter()
    items: list[PreparedMedia] = []
    decoders: list[str] = []
    warnings: list[str] = []
    clock = _Clock()
    num_pictures = sum(look.source.kind == "image" for look in chosen.looks)
    for look, plan in zip(chosen.looks, chosen.plans, strict=True):
        item, decoder, notes = read_one(look.source, plan, limits, clock, on_progress)
        items.append(replace(item, source=look.seen))
        decoders.append(decoder)
        warnings += notes
        if on_progress and look.source.kind == "image" and num_pictures > 1:
            done = sum(one.source.kind == "image" for one in items)
            on_progress("reading pictures", done, num_pictures)
    total = time.perf_counter() - started
    return Gathered(
        tuple(items),
        tuple(decoders),
        tuple(warnings),
        chosen.media_seconds + total - clock.seconds,
        chosen.resize_seconds + clock.seconds,
        tuple(look.source for look in chosen.looks),
        chosen.whole,
    )


@dataclass
class _Clock:
    seconds: float = 0.0


def read_one(
    source: Source, plan: ReadPlan, limits: Limits, clock: _Clock, on_progress: Progress | None
) -> tuple[PreparedMedia, str, tuple[str, ...]]:
    """One file, each chunk of it resized right after it is decoded."""

    def resize(pixels: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        resized = plan.transform(pixels)
        clock.seconds += time.perf_counter() - started
        return resized

    def show(done: int, total: int) -> None:
        if on_progress:
            on_progress(f"decoding {source.path.name}", done, total)

    frames = read(source, plan.index, resize, limits, show if source.kind == "video" else None)
    prepared = PreparedMedia(source, frames.pictures, frames.index,
                        frames.timestamps if source.kind == "video" else (),
                        plan.regions)  # fmt: skip
    return prepared, frames.decoder, frames.warnings
