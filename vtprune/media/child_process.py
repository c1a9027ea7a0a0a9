"""The child process that decodes files: started when one needs it, kept, ended when it hangs.

FFmpeg, decord, libtiff, OpenJPEG and PDFium are C libraries, and files are of strangers. In a
process of their own they can neither end this one, nor keep it from answering Ctrl-C, nor write
into its terminal, nor take all memory.

The parent writes a `Call` to the child's stdin. The child answers on its stdout: ("alive",) now and
then; ("picture", number, shape) and ("piece", length, place) for each picture that the function
sends, whose bytes go through shared memory; at the end ("done", result) or ("failed", error).
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
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from vtprune.errors import VtpruneError

Pixels = npt.NDArray[np.uint8]
"""A picture, (H, W, 3), RGB."""

_FREE = "free"  # the parent's word that a piece has been taken out of the shared memory
_SLOTS, _SLOT_BYTES = 2, 8 << 20  # of the shared memory; a frame of 1080p fits into one
_TICK = 0.1  # seconds between two looks at whether somebody still waits
_SIGN_OF_LIFE = 1.0  # seconds from one to the next
_PATIENCE = 20.0  # seconds without a sign of life after which the child counts as hung
_START_PATIENCE = 120.0  # from a cold disk, on a busy machine
_MOST_IDLE = 4
_NOISE = 1 << 20  # bytes that decoders may write to a file that catches their stderr


def _working_folder() -> str:
    """Return the working directory, or "" where it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return ""


@dataclass(frozen=True)
class Call:
    """A function for the child to run.

    Args:
        function: "module:name"; it gets a `Caller` and the arguments.
        arguments: of the function, and its result: plain values, or this package's own classes.
        memory: bytes that the child may take meanwhile.
        seconds: how long it may take; None: as long as it gives signs of life.
    """

    function: str
    arguments: tuple[object, ...]
    memory: int
    seconds: int | None = None
    folder: str = field(default_factory=_working_folder)


class ChildFailedError(Exception):
    """The child ended, hung, or met an error that its function did not foresee."""


def run(
    call: Call, on_wait: Callable[[], None] | None = None
) -> Generator[tuple[int, Pixels], None, object]:
    """Yield the pictures that a function of the child sends, with their numbers; return its result.

    Args:
        on_wait: called ten times a second while an answer is waited for; it may raise.

    Raises:
        VtpruneError: of the function, or because the child does not start.
        ChildFailedError: the child ended or hung, or the function raised anything else.
    """
    with CHILDREN.borrow() as child:
        return (yield from child.run(call, on_wait))


def run_to_end(call: Call) -> tuple[Pixels | None, Any]:
    """Return the last picture that a function of the child sends, and its result; as `run`."""
    pictures, picture = run(call), None
    while True:
        try:
            _, picture = next(pictures)
        except StopIteration as end:
            return picture, end.value


class _Answers(pickle.Unpickler):
    """A reader of answers that creates no objects but the known ones, whatever the child sends."""

    def find_class(self, module: str, name: str) -> type:
        ours = module == "vtprune.errors" or module.startswith("vtprune.media.")
        if ours or module.partition(".")[0] == "pathlib":
            value = getattr(import_module(module), name, None)
            if isinstance(value, type) and value.__module__.partition(".")[0] in (
                "vtprune",
                "pathlib",
            ):
                return value
        raise pickle.UnpicklingError(f"{module}.{name} is no answer")


class _Child:
    """A running child, and the one call that it works on."""

    def __init__(self) -> None:
        self.call: Call | None = None
        descriptor, self.memory = _shared_memory()
        kept = () if descriptor is None else (descriptor,)
        paths = [path or _working_folder() for path in sys.path]
        script = (
            f"import sys; sys.path[:] = {paths!r}\n"
            f"from vtprune.media.child_process import serve; serve({descriptor!r})"
        )
        try:
            self.popen = subprocess.Popen(
                # Without Python's warnings: on stderr they would look like libtiff's.
                [sys.executable, "-P", "-W", "ignore", "-c", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=kept,
                start_new_session=True,  # the terminal's Ctrl-C is for the parent
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        finally:
            for number in kept:
                os.close(number)
        self.requests = cast("BinaryIO", self.popen.stdin)
        self.answers: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            self._receive(_START_PATIENCE, None)
        except BaseException:
            self.kill()
            raise

    def _listen(self) -> None:
        with suppress(Exception), cast("BinaryIO", self.popen.stdout) as answers:
            while True:
                self.answers.put(_Answers(answers).load())
        self.answers.put(None)

    def run(
        self, call: Call, on_wait: Callable[[], None] | None
    ) -> Generator[tuple[int, Pixels], None, object]:
        """As the function `run`; `call` stays set where it is not answered to its end."""
        self.call = call
        self._send(call)
        number, filled, picture = 0, 0, np.empty(0, np.uint8)
        while True:
            kind, *values = self._receive(call.seconds or _PATIENCE, on_wait)
            if kind == "picture":
                number, filled, picture = values[0], 0, np.empty(values[1], np.uint8)
            elif kind == "piece":
                target = memoryview(picture.data).cast("B")[filled:]
                filled += self._take(values[0], values[1], target)
                if filled == picture.size:
                    yield number, picture
            elif kind != "alive":
                self.call = None
                if kind == "done":
                    return values[0]
                raise values[0] if isinstance(values[0], Exception) else ChildFailedError(values[0])

    def _take(self, length: int, place: int | bytes, target: memoryview) -> int:
        """Copy a piece of a picture to the start of `target`; return its length."""
        if isinstance(place, bytes):
            target[:length] = place
        else:
            assert self.memory is not None
            target[:length] = self.memory[place : place + length]
        self._send(_FREE)
        return length

    def kill(self) -> None:
        """End the child, whatever it does."""
        self.popen.kill()
        self.popen.wait()
        with suppress(OSError):
            self.requests.close()

    def _send(self, request: object) -> None:
        try:
            pickle.dump(request, self.requests, pickle.HIGHEST_PROTOCOL)
            self.requests.flush()
        except OSError as error:
            raise self._ended() from error

    def _receive(self, patience: float, on_wait: Callable[[], None] | None) -> tuple[Any, ...]:
        waited = 0.0  # by the ticks: the clock also runs while this process is stopped
        while waited < patience:
            try:
                answer = self.answers.get(timeout=_TICK)
            except queue.Empty:
                waited += _TICK
                if on_wait is not None:
                    on_wait()
                continue
            if answer is None:
                raise self._ended()
            return answer
        raise ChildFailedError(f"the decoder did not come back within {patience:.0f} s")

    def _ended(self) -> ChildFailedError:
        self.popen.kill()  # for the case that it only talks nonsense; the exit code is of before
        code = self.popen.wait()
        how = f"exit code {code}"
        if code < 0:
            with suppress(ValueError):
                how = signal.Signals(-code).name
        return ChildFailedError(f"the decoder ended with {how}")


class _Children:
    """The children of this process: those at work, and those kept for a next call."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.idle: list[_Child] = []
        self.at_work: set[_Child] = set()

    @contextmanager
    def borrow(self) -> Iterator[_Child]:
        """Give a child for one call; it is ended where the call is not answered to its end."""
        try:
            child = self._take_idle() or _Child()
        except (OSError, ChildFailedError) as error:
            raise VtpruneError(
                f"the process that decodes files does not start ({error})",
                f"check that this works: {sys.executable} -c 'import numpy'",
            ) from error
        with self.lock:
            self.at_work.add(child)
        try:
            yield child
        finally:
            with self.lock:
                self.at_work.discard(child)
                keep = child.call is None and len(self.idle) < _MOST_IDLE
                if keep:
                    self.idle.append(child)
            if not keep:
                child.kill()

    def _take_idle(self) -> _Child | None:
        with self.lock:
            while self.idle:
                child = self.idle.pop()
                if child.popen.poll() is None:
                    return child
                child.kill()
        return None

    def stop(self, module: str) -> None:
        """End the children at work on functions of a module: who waits for them gets an error."""
        with self.lock:
            for child in self.at_work:
                if child.call is not None and child.call.function.partition(":")[0] == module:
                    child.popen.kill()

    def end(self) -> None:
        """End the children that wait for a call."""
        while child := self._take_idle():
            child.kill()

    def forget(self) -> None:
        """Leave all to the process that this one was forked from."""
        self.__init__()  # type: ignore[misc]


CHILDREN = _Children()
atexit.register(CHILDREN.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=CHILDREN.forget)


def _shared_memory() -> tuple[int | None, mmap.mmap | None]:
    """Memory that the child gets by its file descriptor; none where the system has none.

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
        os.ftruncate(descriptor, _SLOTS * _SLOT_BYTES)
        return descriptor, mmap.mmap(descriptor, _SLOTS * _SLOT_BYTES)
    except OSError:
        os.close(descriptor)
        return None, None


# The child's side.


class Caller:
    """The parent, as a function in the child sees it."""

    def __init__(self, incoming: BinaryIO, answers: BinaryIO, memory: mmap.mmap | None) -> None:
        self._incoming, self._answers, self._memory = incoming, answers, memory
        self.calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._free = threading.Semaphore(_SLOTS)
        self._num_pieces = 0
        self._spoke = time.monotonic()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                request = pickle.load(self._incoming)
                if request == _FREE:
                    self._free.release()
                else:
                    self.calls.put(request)
        finally:  # the parent has ended: nobody wants what is being decoded
            os._exit(0)

    def answer(self, *values: object) -> None:
        """Write one answer."""
        pickle.dump(values, self._answers, pickle.HIGHEST_PROTOCOL)
        self._answers.flush()
        self._spoke = time.monotonic()

    def alive(self) -> None:
        """Tell the parent, at intervals, that the work goes on."""
        if time.monotonic() - self._spoke > _SIGN_OF_LIFE:
            self.answer("alive")

    def send(self, number: int, shape: tuple[int, ...], bands: Iterable[Pixels]) -> None:
        """Send a picture of this number, given from the top to the bottom."""
        self.answer("picture", number, shape)
        for band in bands:
            step = max(1, _SLOT_BYTES // band[0].nbytes)  # rows, so that no band is copied at once
            for top in range(0, len(band), step):
                rows = memoryview(np.ascontiguousarray(band[top : top + step]).data).cast("B")
                for start in range(0, len(rows), _SLOT_BYTES):
                    self._send_piece(rows[start : start + _SLOT_BYTES])

    def _send_piece(self, piece: memoryview) -> None:
        self._free.acquire()
        if self._memory is None:
            self.answer("piece", len(piece), bytes(piece))
        else:
            place = self._num_pieces % _SLOTS * _SLOT_BYTES
            self._memory[place : place + len(piece)] = piece
            self.answer("piece", len(piece), place)
        self._num_pieces += 1


def serve(descriptor: int | None) -> None:
    """Run calls until the parent ends.

    Args:
        descriptor: the file descriptor of the shared memory; None: pictures go through the pipe.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    memory = None if descriptor is None else mmap.mmap(descriptor, _SLOTS * _SLOT_BYTES)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_FSIZE", _NOISE)
    caller = Caller(sys.stdin.buffer, answers, memory)
    caller.answer("ready")
    while True:
        call = caller.calls.get()
        try:
            if call.folder:
                os.chdir(call.folder)
            _limit("RLIMIT_DATA", call.memory)
            cpu_seconds = call.seconds and call.seconds + int(time.process_time()) + 1
            _limit("RLIMIT_CPU", cpu_seconds)  # it holds when the parent is gone, too
            module, _, name = call.function.partition(":")
            result = getattr(import_module(module), name)(caller, *call.arguments)
        except VtpruneError as error:
            caller.answer("failed", error)
        except MemoryError:
            reason = "it takes more memory than a file of its frame size should"
            caller.answer("failed", reason)
        except Exception as error:  # of a library, over whatever the file holds
            text = " ".join(str(error).split())[:100]
            caller.answer("failed", f"{type(error).__name__}: {text}")
        else:
            caller.answer("done", result)


def _limit(name: str, value: int | None) -> None:
    """Set a limit of the system's on this process, where it has it; None: as far as it may go."""
    if sys.platform == "win32":
        return
    import resource

    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    if value is None or (hard != resource.RLIM_INFINITY and value > hard):
        value = hard
    with suppress(OSError, ValueError):
        resource.setrlimit(kind, (value, hard))
