"""From files to what is shown of them: opened, decoded, resized, and no more of them than asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vtprune.downsampling import Look, shrink
from vtprune.errors import ModelError
from vtprune.loading import Loaded, Progress
from vtprune.media import Limits, Source, open_source, read
from vtprune.models.base import Plan, Prepared, Sampling
from vtprune.preset import Preset
from vtprune.units import Whole


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

    items: tuple[Prepared, ...]
    decoders: tuple[str, ...]
    warnings: tuple[str, ...]
    media_seconds: float
    resize_seconds: float
    sources: tuple[Source, ...] = ()
    whole: Whole | None = None

    @property
    def read(self) -> list[Prepared]:
        """The items, each with its file as it was."""
        pairs = zip(self.items, self.sources, strict=True)
        return [replace(item, source=source) for item, source in pairs]


def gather_for(
    loaded: Loaded,
    paths: Sequence[str | Path | Source],
    sampling: Sampling,
    preset: Preset,
    limits: Limits,
    on_progress: Progress | None = None,
) -> Gathered:
    """Opens, decodes and resizes every file; as little of it as a preset that downsamples wants."""
    started = time.perf_counter()
    sources = open_all(loaded, paths, limits)
    opened = time.perf_counter()
    shrunk = shrink(loaded, sources, sampling, preset)
    if shrunk is None:
        gathered = gather(loaded, sources, sampling, limits, on_progress)
    else:
        chosen = time.perf_counter() - opened
        gathered = read_all(loaded, shrunk.looks, limits, on_progress)
        gathered = replace(
            gathered, resize_seconds=gathered.resize_seconds + chosen, whole=shrunk.whole
        )
    return replace(gathered, media_seconds=gathered.media_seconds + opened - started)


def gather(
    loaded: Loaded,
    paths: Sequence[str | Path | Source],
    sampling: Sampling,
    limits: Limits,
    on_progress: Progress | None = None,
) -> Gathered:
    """Opens, decodes and resizes every file, in the family's way."""
    started = time.perf_counter()
    sources = open_all(loaded, paths, limits)
    opened = time.perf_counter() - started
    gathered = read_all(loaded, [Look(one, sampling) for one in sources], limits, on_progress)
    return replace(gathered, media_seconds=gathered.media_seconds + opened)


def open_all(loaded: Loaded, paths: Sequence[str | Path | Source], limits: Limits) -> list[Source]:
    """Every file, opened.

    Raises:
        MediaError: it can't be read.
        ModelError: the family does not take its kind.
    """
    sources = [one if isinstance(one, Source) else open_source(one, limits) for one in paths]
    for source in sources:
        if source.kind not in loaded.family.modalities:
            takes = " and ".join(loaded.family.modalities)
            raise ModelError(
                f"{source.path}: {loaded.family.name} takes {takes} input, no {source.kind}",
                "choose another --model (vtprune models)",
            )
    return sources


def read_all(
    loaded: Loaded, looks: Sequence[Look], limits: Limits, on_progress: Progress | None = None
) -> Gathered:
    """Decodes and resizes opened files, each looked at as it is said."""
    started = time.perf_counter()
    kinds = [look.source.kind for look in looks]
    items: list[Prepared] = []
    decoders: list[str] = []
    warnings: list[str] = []
    clock = _Clock()
    for look in looks:
        plan = look.plan(loaded, kinds.count(look.source.kind))
        item, decoder, notes = read_one(look.source, plan, limits, clock, on_progress)
        items.append(replace(item, source=look.seen))
        decoders.append(decoder)
        warnings += notes
    total = time.perf_counter() - started
    return Gathered(
        tuple(items),
        tuple(decoders),
        tuple(warnings),
        total - clock.seconds,
        clock.seconds,
        tuple(look.source for look in looks),
    )


@dataclass
class _Clock:
    seconds: float = 0.0


def read_one(
    source: Source, plan: Plan, limits: Limits, clock: _Clock, on_progress: Progress | None
) -> tuple[Prepared, str, tuple[str, ...]]:
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
    prepared = Prepared(source, frames.pictures, frames.index,
                        frames.timestamps if source.kind == "video" else (),
                        plan.regions)  # fmt: skip
    return prepared, frames.decoder, frames.warnings
