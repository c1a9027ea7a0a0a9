"""The media of a prompt: opened, decoded and resized, also while a model's weights are loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from threading import Event
from typing import TypeAlias, TypeVar

import torch

from vtprune.disk_cache import DiskCache
from vtprune.errors import ModelError, VtpruneError
from vtprune.inference.downsampling import MediaView, shrink_media
from vtprune.inference.long_video import StreamPlan, plan_stream, unread_video
from vtprune.inference.media_cache import describe_preparation, read_through
from vtprune.media import Limits, Medium, Source, open_each, read, stop_reading
from vtprune.models import preprocess
from vtprune.models.base import Preparable, PreparedMedia, ReadPlan, Sampling
from vtprune.models.loading import Loaded, Opened, Progress
from vtprune.preset import Preset
from vtprune.tokens.units import FullSizeCounts

T = TypeVar("T")
Media: TypeAlias = "Medium | Sequence[Medium]"
"""A media item or several: paths, Pillow pictures, arrays, clips, bytes, open files."""
_POLL_SECONDS = 0.1  # seconds between two views at how far decoding is
THUMBNAIL = {"image": 900, "video": 320}
NARROW, LONG_STRIP = 0.4, 4
"""Pixels of the longer side of a thumbnail, by kind of media."""
DRAWN = 8  # frames without a file that are resized at once


@dataclass(frozen=True)
class PromptMedia:
    """All media of a question, read and resized.

    Args:
        items: one a file.
        decoders: that really ran, one a file.
        media_seconds: opening and decoding.
        resize_seconds: the family's resizing, and choosing how much to view at.
        sources: the files; of what was made smaller, as it was.
        full_size: token counts had the media not been made smaller; None where they were not.
        stream: how its video is to be encoded in segments, of which nothing is read yet; None
            where all is read.
    """

    items: tuple[PreparedMedia, ...]
    decoders: tuple[str, ...]
    warnings: tuple[str, ...]
    media_seconds: float
    resize_seconds: float
    sources: tuple[Source, ...] = ()
    full_size: FullSizeCounts | None = None
    stream: StreamPlan | None = None

    def with_progress(self, on_progress: Progress | None) -> PromptMedia:
        """Return the media with what gets the progress of a video that is encoded in segments."""
        if self.stream is None:
            return self
        return replace(self, stream=replace(self.stream, on_progress=on_progress))

    @property
    def read(self) -> list[PreparedMedia]:
        """The items, each with its file as it was."""
        pairs = zip(self.items, self.sources, strict=True)
        return [replace(item, source=source) for item, source in pairs]


@dataclass(frozen=True)
class MediaPlan:
    """What is to be read of opened files; nothing of it is decoded yet.

    Args:
        model: that prepares it.
        views: at each file.
        plans: for each of them.
        media_seconds, resize_seconds: spent on opening, and on choosing.
        full_size: token counts were the media not made smaller; None where they are not.
        thumbnails: keep a small copy of every frame, for drawing.
        cache: of what was decoded and resized; None for none.
        preparations: what says how each file is resized, for the cache.
        preset: that prunes; None: not known.
    """

    model: Preparable
    views: tuple[MediaView, ...]
    plans: tuple[ReadPlan, ...]
    media_seconds: float
    resize_seconds: float
    full_size: FullSizeCounts | None = None
    thumbnails: bool = False
    cache: DiskCache | None = None
    preparations: tuple[str, ...] = ()
    preset: Preset | None = None

    @property
    def asks_to_stream(self) -> bool:
        """Whether segments were asked for beside the preset, which may be for pictures too."""
        preset = self.preset
        if preset is None or preset.stream is None:
            return False
        return preset.name is None or "stream" in dict(preset.changed)


def plan_media(
    model: Preparable,
    paths: Sequence[Medium],
    sampling: Sampling,
    preset: Preset | None,
    limits: Limits,
) -> MediaPlan:
    """Open every file, and plan what to read of it; less where the preset downsamples.

    Raises:
        MediaError, ModelError, PresetError: all that can be found before decoding.
    """
    started = time.perf_counter()
    sources = open_all(model, paths, limits)
    opened = time.perf_counter()
    shrunk = None if preset is None else shrink_media(model, sources, sampling, preset)
    in_full = tuple(MediaView(source, sampling) for source in sources)
    views = in_full if shrunk is None else shrunk.views
    kinds = [source.kind for source in sources]
    plans = tuple(view.plan(model, kinds.count(view.source.kind)) for view in views)
    preparations: tuple[str, ...] = ()
    if model.cache is not None:
        preparations = tuple(
            describe_preparation(model, view, kinds.count(view.source.kind)) for view in views
        )
    spent = time.perf_counter() - opened
    full_size = None if shrunk is None else shrunk.full_size
    return MediaPlan(
        model, views, plans, opened - started, spent, full_size, cache=model.cache,
        preparations=preparations, preset=preset,
    )  # fmt: skip


def read_media(
    model: Preparable,
    paths: Sequence[Medium],
    sampling: Sampling,
    preset: Preset | None,
    limits: Limits,
    on_progress: Progress | None = None,
) -> PromptMedia:
    """Open, decode and resize every file, or less of it where the preset downsamples."""
    return read_planned(plan_media(model, paths, sampling, preset, limits), limits, on_progress)


def read_in_full(
    model: Preparable,
    paths: Sequence[Medium],
    sampling: Sampling,
    limits: Limits,
    on_progress: Progress | None = None,
) -> PromptMedia:
    """Open, decode and resize every file in full, in the family's way."""
    return read_media(model, paths, sampling, None, limits, on_progress)


def resize_drawn(
    model: Preparable,
    source: Source,
    draw: Callable[[Sequence[int]], torch.Tensor],
    sampling: Sampling,
    preset: Preset | None = None,
) -> PromptMedia:
    """Resize pixels that no file holds, in the family's way.

    Args:
        source: what a file of them would be.
        draw: frame numbers, (0,) of a picture, -> (n, 3, height, width) uint8.

    Raises:
        ModelError: the family does not take its kind.
    """
    media_plan = plan_media(model, [source], sampling, preset, Limits())
    view, plan = media_plan.views[0], media_plan.plans[0]
    parts, seconds = [], 0.0
    for start in range(0, len(plan.index), DRAWN):
        pixels = draw(plan.index[start : start + DRAWN])
        started = time.perf_counter()
        parts.append(plan.transform(pixels))
        seconds += time.perf_counter() - started
    times = tuple(source.timestamps[number] for number in plan.index) if source.timestamps else ()
    item = PreparedMedia(view.resized_source, torch.cat(parts), plan.index, times, plan.regions,
                         plan.transform)  # fmt: skip
    return PromptMedia((item,), ("none",), (), 0.0, seconds, (source,), media_plan.full_size)


def attempt(work: Callable[[], T]) -> T | VtpruneError:
    """Return what some work gives, or the error that a user can act on."""
    try:
        return work()
    except VtpruneError as error:
        return error


def open_all(model: Preparable, paths: Sequence[Medium], limits: Limits) -> list[Source]:
    """Open every file; of a file with pages, every page that the limits choose.

    Raises:
        MediaError: it can't be read.
        ModelError: the family does not take its kind.
    """
    sources = open_each(paths, limits)
    for source in sources:
        if source.kind not in model.family.modalities:
            takes = " and ".join(model.family.modalities)
            raise ModelError(
                f"{source.name}: {model.family.name} takes {takes} input, no {source.kind}",
                "choose another --model (vtprune models)",
            )
    return sources


def read_planned(
    media_plan: MediaPlan, limits: Limits, on_progress: Progress | None = None
) -> PromptMedia:
    """Decode and resize what was planned of opened files.

    Args:
        on_progress: hears of every chunk of frames, and of every one of several pictures.
    """
    started = time.perf_counter()
    items: list[PreparedMedia] = []
    decoders: list[str] = []
    warnings: list[str] = []
    clock = _Clock()
    num_pictures = sum(view.source.kind == "image" for view in media_plan.views)
    stream = plan_stream(media_plan, media_plan.preset, limits, on_progress)
    if stream is None and media_plan.asks_to_stream:
        warnings.append("--stream changes nothing: no video is among the media")
    cache = None if media_plan.thumbnails else media_plan.cache  # it has no thumbnails
    for number, (view, plan) in enumerate(zip(media_plan.views, media_plan.plans, strict=True)):
        if stream is not None and view.source.kind == "video":
            items.append(unread_video(stream, view.resized_source))
            decoders.append(view.source.decoder)
            warnings += plan.warnings
            continue
        read_this = partial(
            read_one, view.source, plan, limits, clock, on_progress, media_plan.thumbnails
        )
        if cache is None:
            item, decoder, notes = read_this()
        else:
            preparation = media_plan.preparations[number]
            item, decoder, notes = read_through(
                cache, preparation, view.source, plan, limits, read_this
            )
        items.append(replace(item, source=view.resized_source))
        decoders.append(decoder)
        warnings += (*plan.warnings, *notes)
        if on_progress and view.source.kind == "image" and num_pictures > 1:
            done = sum(item.source.kind == "image" for item in items)
            on_progress("reading pictures", done, num_pictures)
    total = time.perf_counter() - started
    return PromptMedia(
        tuple(items),
        tuple(decoders),
        tuple(warnings),
        media_plan.media_seconds + total - clock.seconds,
        media_plan.resize_seconds + clock.seconds,
        tuple(view.source for view in media_plan.views),
        media_plan.full_size,
        stream,
    )


@dataclass
class _Clock:
    seconds: float = 0.0


def read_one(
    source: Source,
    plan: ReadPlan,
    limits: Limits,
    clock: _Clock,
    on_progress: Progress | None,
    thumbnails: bool = False,
) -> tuple[PreparedMedia, str, tuple[str, ...]]:
    """Read one file, each chunk of it resized right after it is decoded."""

    small: list[torch.Tensor] = []

    def resize(pixels: torch.Tensor) -> torch.Tensor:
        if thumbnails or source.in_memory:  # which no drawing can read again
            small.append(shrink(pixels, THUMBNAIL[source.kind]))
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
                        plan.regions, plan.transform,
                        torch.cat(small) if small else None)  # fmt: skip
    return prepared, frames.decoder, frames.warnings


def shrink(pixels: torch.Tensor, edge: int) -> torch.Tensor:
    """(n, 3, H, W) uint8 -> the same pictures with their longer side at most `edge`.

    Of long strips, such as scrolled pages, the longer side may have up to LONG_STRIP times as
    much, so that the shorter one has NARROW of it.
    """
    height, width = pixels.shape[-2:]
    longer, shorter = max(height, width), min(height, width)
    scale = max(edge / longer, min(NARROW * edge / shorter, LONG_STRIP * edge / longer))
    scale = min(scale, 1.0)
    return preprocess.resize(
        pixels, (max(round(height * scale), 1), max(round(width * scale), 1)), preprocess.BILINEAR
    )


# -- while the model's weights are loaded ----------------------------------------------------------


def load_with_media(
    opened: Opened,
    paths: Sequence[Medium],
    sampling: Sampling,
    preset: Preset,
    limits: Limits,
    on_progress: Progress | None = None,
    thumbnails: bool = False,
) -> tuple[Loaded, PromptMedia]:
    """Load a model, and meanwhile read the media of one prompt, as `load_with_each_media` does.

    Args:
        thumbnails: keep a small copy of every frame, for drawing.

    Raises:
        MediaError, ModelError, PresetError: of both, the model's first.
    """
    loaded, (media,) = load_with_each_media(
        opened, [paths], sampling, preset, limits, on_progress, thumbnails
    )
    if isinstance(media, VtpruneError):
        raise media
    return loaded, media


def load_with_each_media(
    opened: Opened,
    prompts: Sequence[Sequence[Medium] | VtpruneError],
    sampling: Sampling,
    preset: Preset,
    limits: Limits,
    on_progress: Progress | None = None,
    thumbnails: bool = False,
) -> tuple[Loaded, list[PromptMedia | VtpruneError]]:
    """Read a model's weights, and meanwhile, in a thread, the media of some prompts.

    Files that can't be opened, that the model does not take, or that do not fit the preset are
    refused before the first weight is read. The thread has ended when this returns or raises.

    Args:
        prompts: the media of each, as for `read_media`, or why there are none.
        thumbnails: as of `load_with_media`.

    Returns:
        the model, and for each prompt its media, or why they can't be read.

    Raises:
        ModelError: the model can't be loaded.
        MediaError, ModelError, PresetError: no prompt's media can be read; before loading.
    """
    plans = [
        paths
        if isinstance(paths, VtpruneError)
        else attempt(partial(plan_media, opened, paths, sampling, preset, limits))
        for paths in prompts
    ]
    errors = [plan for plan in plans if isinstance(plan, VtpruneError)]
    if errors and len(errors) == len(plans):
        raise errors[0]
    if thumbnails:
        plans = [
            plan if isinstance(plan, VtpruneError) else replace(plan, thumbnails=True)
            for plan in plans
        ]
    reader = _BackgroundReader(plans, limits)
    with ThreadPoolExecutor(1, "media") as pool:
        reading = pool.submit(reader.read)
        try:
            loaded = opened.load()
            media = _wait(reading, reader, on_progress)
            return loaded, [
                item
                if isinstance(item, VtpruneError) or isinstance(plan, VtpruneError)
                else fit_to_device(loaded, plan, item, limits).with_progress(on_progress)
                for item, plan in zip(media, plans, strict=True)
            ]
        except BaseException:  # Ctrl-C too is not kept waiting by a page that takes long
            reader.stopped.set()
            stop_reading()
            raise
        finally:
            reader.stopped.set()


def fit_to_device(
    loaded: Loaded, media_plan: MediaPlan, media: PromptMedia, limits: Limits
) -> PromptMedia:
    """Return media as they fit beside the weights that were read meanwhile.

    On a GPU, of whose memory the weights have taken a part, a video may have to be streamed.
    """
    if media.stream is not None or loaded.device.type != "cuda":
        return media
    media_plan = replace(media_plan, model=loaded)
    if plan_stream(media_plan, media_plan.preset, limits, None) is None:
        return media
    return read_planned(media_plan, limits)


def _wait(
    reading: Future[list[PromptMedia | VtpruneError]],
    reader: _BackgroundReader,
    on_progress: Progress | None,
) -> list[PromptMedia | VtpruneError]:
    """Return the media as soon as they are read; show the thread's progress from this one."""
    while True:
        try:
            return reading.result(timeout=_POLL_SECONDS)
        except TimeoutError:
            if reading.done():  # a file that took too long for its system, not for us
                raise
        if on_progress and reader.reached:
            on_progress(*reader.reached)


class _BackgroundReader:
    """Reads the media of every prompt, until it is stopped."""

    def __init__(self, plans: Sequence[MediaPlan | VtpruneError], limits: Limits) -> None:
        self.plans, self.limits = plans, limits
        self.stopped = Event()
        self.reached: tuple[str, int, int] | None = None

    def read(self) -> list[PromptMedia | VtpruneError]:
        return [
            plan
            if isinstance(plan, VtpruneError)
            else attempt(partial(read_planned, plan, self.limits, self.note))
            for plan in self.plans
        ]

    def note(self, stage: str, done: int, total: int) -> None:
        """Note how far it is; stop when nobody waits for the media."""
        if self.stopped.is_set():
            raise _StoppedError
        self.reached = stage, done, total


class _StoppedError(Exception):
    """The model could not be loaded, or the user gave up: the media are not needed."""
