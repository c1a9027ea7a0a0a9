"""The process that reads videos: started when a file needs it, kept, ended when it hangs.

FFmpeg and decord are C libraries, and files are of strangers. Apart from this process, they can
neither end it, nor keep it from answering Ctrl-C, nor write into its terminal, nor take all memory.
"""

from __future__ import annotations

import atexit
import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from vtprune.errors import MediaError, VtpruneError
from vtprune.media.source import Limits, Source, damaged, unreadable

FREE = "free"  # a request: a piece of a frame has been taken out of the shared memory
SLOTS, SLOT_BYTES = 2, 8 << 20  # of the shared memory; a frame of 1080p fits into one
_TICK = 0.1  # seconds between two looks at whether somebody still waits
_PATIENCE = 20.0  # seconds without a sign of life after which the process counts as hung
_START_PATIENCE = 120.0  # from a cold disk, on a busy machine
_MOST_IDLE = 4


def _working_folder() -> str:
    """What relative paths are relative to; empty where that folder is gone."""
    try:
        return os.getcwd()
    except OSError:
        return ""


@dataclass(frozen=True)
class OpenRequest:
    """What does the file hold?"""

    path: Path
    limits: Limits
    folder: str = field(default_factory=_working_folder)

    def error(self, reason: str) -> MediaError:
        """The error for a file that can't be opened."""
        return unreadable(self.path, reason)


@dataclass(frozen=True)
class ReadRequest:
    """The frames `index` (ascending) of a source, through PyAV or decord."""

    source: Source
    index: tuple[int, ...]
    limits: Limits
    decoder: str
    folder: str = field(default_factory=_working_folder)

    def error(self, reason: str) -> MediaError:
        """The error for a file that can't be decoded."""
        return damaged(self.source.path, reason, self.limits)


class ProcessEndedError(Exception):
    """The process ended, or had to be ended, while it worked on a request."""


def open_video(path: Path, limits: Limits) -> Source:
    """Return what a video holds.

    Raises:
        MediaError: for a file that can't be read.
    """
    request = OpenRequest(path, limits)
    try:
        with _borrowed() as process:
            for kind, *values in process.ask(request):
                if kind == "done":
                    return cast("Source", values[0])
    except ProcessEndedError as error:
        raise request.error(str(error)) from error
    raise AssertionError("a request is answered with 'done' or an error")


def read_video(
    request: ReadRequest, problems: list[str], on_wait: Callable[[], None] | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield frames with their numbers, each (H, W, 3) uint8 RGB; warnings go to `problems`.

    Args:
        on_wait: called ten times a second while a frame is waited for; it may raise.

    Raises:
        MediaError: for a frame that doesn't decode, unless the limits allow a part of the file.
        ProcessEndedError: decord ended or hung.
        DecordUnfitError: decord doesn't give these frames.
    """
    try:
        with _borrowed() as process:
            frame, number, filled = np.empty(0, np.uint8), 0, 0
            for kind, *values in process.ask(request, on_wait):
                if kind == "done":
                    problems += cast("list[str]", values[0])
                elif kind == "frame":
                    number, filled = cast("int", values[0]), 0
                    frame = np.empty(cast("tuple[int, ...]", values[1]), np.uint8)
                else:
                    filled = process.take(values[0], memoryview(frame.data).cast("B"), filled)
                    if filled == frame.size:
                        yield number, frame
    except ProcessEndedError as error:
        if request.decoder == "decord":
            raise
        raise request.error(str(error)) from error


class _Process:
    """A running process, and the one conversation with it."""

    def __init__(self) -> None:
        descriptor, self.memory = _shared_memory()
        kept = () if descriptor is None else (descriptor,)
        script = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from vtprune.media.worker import main; main({descriptor!r})"
        )
        try:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=kept,
                start_new_session=True,  # the terminal's Ctrl-C is ours
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        finally:
            for number in kept:
                os.close(number)
        self.requests = cast("BinaryIO", self.popen.stdin)
        self.inbox: queue.SimpleQueue[tuple[object, ...] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.busy = True
        self._next(_START_PATIENCE, None)
        self.busy = False

    def _listen(self) -> None:
        with suppress(Exception), cast("BinaryIO", self.popen.stdout) as answers:
            while True:
                self.inbox.put(pickle.load(answers))
        self.inbox.put(None)

    def ask(
        self, request: OpenRequest | ReadRequest, on_wait: Callable[[], None] | None = None
    ) -> Iterator[tuple[object, ...]]:
        """Yield the answers to a request, the last of which is "done".

        Raises:
            Exception: that the process answers with.
            ProcessEndedError: it ended, or gave no sign of life for too long.
        """
        self.busy = True
        self._say(request)
        while self.busy:
            answer = self._next(_PATIENCE, on_wait)
            self.busy = answer[0] not in ("done", "failed")
            if answer[0] == "failed":
                raise cast("Exception", answer[1])
            if answer[0] != "alive":
                yield answer

    def take(self, piece: object, target: memoryview, filled: int) -> int:
        """Copy a piece of a frame to where `target` is not filled yet; return up to where it is."""
        if isinstance(piece, bytes):
            end = filled + len(piece)
            target[filled:end] = piece
        else:
            assert self.memory is not None
            end = min(filled + SLOT_BYTES, len(target))
            at = cast("int", piece)
            target[filled:end] = self.memory[at : at + end - filled]
        self._say(FREE)
        return end

    def kill(self) -> None:
        """End the process, whatever it does."""
        self.popen.kill()
        self.popen.wait()
        with suppress(OSError):
            self.requests.close()

    def _say(self, request: object) -> None:
        try:
            pickle.dump(request, self.requests, pickle.HIGHEST_PROTOCOL)
            self.requests.flush()
        except OSError as error:
            raise self._ended() from error

    def _next(self, patience: float, on_wait: Callable[[], None] | None) -> tuple[object, ...]:
        waited = 0.0  # by the ticks: the clock also runs while this process is stopped
        while waited < patience:
            try:
                answer = self.inbox.get(timeout=_TICK)
            except queue.Empty:
                waited += _TICK
                if on_wait is not None:
                    on_wait()
                continue
            if answer is None:
                raise self._ended()
            return answer
        raise ProcessEndedError(f"the decoder did not come back within {patience:.0f} s")

    def _ended(self) -> ProcessEndedError:
        self.popen.kill()  # for the case that it only talks nonsense; the exit code is of before
        code = self.popen.wait()
        how = f"exit code {code}"
        if code < 0:
            with suppress(ValueError):
                how = signal.Signals(-code).name
        return ProcessEndedError(f"the decoder ended with {how}")


class _Kept:
    """The processes that wait for a next request."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.idle: list[_Process] = []

    def take(self) -> _Process | None:
        """One that is still there, if any."""
        with self.lock:
            while self.idle:
                process = self.idle.pop()
                if process.popen.poll() is None:
                    return process
                process.kill()
        return None

    def put(self, process: _Process) -> None:
        """Keep one, unless there are enough."""
        with self.lock:
            if len(self.idle) < _MOST_IDLE:
                self.idle.append(process)
                return
        process.kill()

    def end(self) -> None:
        """End all."""
        while process := self.take():
            process.kill()

    def forget(self) -> None:
        """Leave them to the process that this one was forked from."""
        self.__init__()  # type: ignore[misc]


_KEPT = _Kept()
atexit.register(_KEPT.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_KEPT.forget)


@contextmanager
def _borrowed() -> Iterator[_Process]:
    """A process for one request; it is ended where the request is not answered to its end."""
    try:
        process = _KEPT.take() or _Process()
    except (OSError, ProcessEndedError) as error:
        raise VtpruneError(
            f"the process that reads videos does not start ({error})",
            f"check that this works: {sys.executable} -c 'import av'",
        ) from error
    try:
        yield process
    finally:
        if process.busy:
            process.kill()
        else:
            _KEPT.put(process)


def _shared_memory() -> tuple[int | None, mmap.mmap | None]:
    """Memory that the other process gets by its file descriptor; none where the system has none.

    Not multiprocessing.shared_memory: before Python 3.13 that starts a further process on either
    side, and in a container it is often smaller than a few frames.
    """
    if not hasattr(os, "memfd_create"):
        return None, None
    try:
        descriptor = os.memfd_create("vtprune")
    except OSError:
        return None, None
    try:
        os.ftruncate(descriptor, SLOTS * SLOT_BYTES)
        return descriptor, mmap.mmap(descriptor, SLOTS * SLOT_BYTES)
    except OSError:
        os.close(descriptor)
        return None, None
