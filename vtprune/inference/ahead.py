"""Media that are decoded while a model's weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event

from vtprune.errors import VtpruneError
from vtprune.inference.gathering import Chosen, Gathered, attempt, choose, read_all
from vtprune.media import Limits, Source, stop_reading
from vtprune.models.base import Sampling
from vtprune.models.loading import Loaded, Opened, Progress
from vtprune.preset import Preset

_LOOK_AGAIN = 0.1  # seconds between two looks at how far decoding is


def load_and_gather(
    opened: Opened,
    paths: Sequence[str | Path | Source],
    sampling: Sampling,
    preset: Preset,
    limits: Limits,
    on_progress: Progress | None = None,
) -> tuple[Loaded, Gathered]:
    """Load a model, and meanwhile read the media of one prompt, as `load_and_gather_each` does.

    Raises:
        MediaError, ModelError, PresetError: of both, the model's first.
    """
    loaded, (media,) = load_and_gather_each(opened, [paths], sampling, preset, limits, on_progress)
    if isinstance(media, VtpruneError):
        raise media
    return loaded, media


def load_and_gather_each(
    opened: Opened,
    prompts: Sequence[Sequence[str | Path | Source]],
    sampling: Sampling,
    preset: Preset,
    limits: Limits,
    on_progress: Progress | None = None,
) -> tuple[Loaded, list[Gathered | VtpruneError]]:
    """Reads a model's weights, and meanwhile, in a thread, the media of some prompts.

    Files that can't be opened, that the model does not take, or that do not fit the preset are told
    before the first weight is read. The thread has ended when this returns or raises.

    Args:
        prompts: the media of each, as for `gather_for`.

    Returns:
        the model, and for each prompt its media, or why they can't be read.

    Raises:
        ModelError: the model can't be loaded.
        MediaError, ModelError, PresetError: no prompt's media can be read; before loading.
    """
    chosen = [
        attempt(partial(choose, opened, paths, sampling, preset, limits)) for paths in prompts
    ]
    errors = [one for one in chosen if isinstance(one, VtpruneError)]
    if errors and len(errors) == len(chosen):
        raise errors[0]
    reader = _Reader(chosen, limits)
    with ThreadPoolExecutor(1, "media") as pool:
        reading = pool.submit(reader.read)
        try:
            loaded = opened.load()
            return loaded, _wait(reading, reader, on_progress)
        except BaseException:  # Ctrl-C too is not kept waiting by a page that takes long
            reader.stopped.set()
            stop_reading()
            raise
        finally:
            reader.stopped.set()


def _wait(
    reading: Future[list[Gathered | VtpruneError]], reader: _Reader, on_progress: Progress | None
) -> list[Gathered | VtpruneError]:
    """The media, as soon as they are there; what the thread has told is shown from this one."""
    while True:
        try:
            return reading.result(timeout=_LOOK_AGAIN)
        except TimeoutError:
            if reading.done():  # a file that took too long for its system, not for us
                raise
        if on_progress and reader.reached:
            on_progress(*reader.reached)


class _Reader:
    """Reads the media of every prompt, until it is stopped."""

    def __init__(self, chosen: Sequence[Chosen | VtpruneError], limits: Limits) -> None:
        self.chosen, self.limits = chosen, limits
        self.stopped = Event()
        self.reached: tuple[str, int, int] | None = None

    def read(self) -> list[Gathered | VtpruneError]:
        return [
            one
            if isinstance(one, VtpruneError)
            else attempt(partial(read_all, one, self.limits, self.note))
            for one in self.chosen
        ]

    def note(self, stage: str, done: int, total: int) -> None:
        """Notes how far it is; goes no further when nobody waits for it."""
        if self.stopped.is_set():
            raise _StoppedError
        self.reached = stage, done, total


class _StoppedError(Exception):
    """The model could not be loaded, or the user gave up: the media are not needed."""
