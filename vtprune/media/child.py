"""A process of its own for files whose decoders may crash, hang, or write to stderr.

The parent asks (`open_pages`, `read_page`); the child, which is kept for the next file, answers.
Requests and answers are lines of JSON; the rows of a page follow as bytes.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from vtprune.errors import DamagedError, MediaError
from vtprune.media.sniff import Kind
from vtprune.media.source import Limits, Source, damaged, shown

_SECONDS = 15.0  # of one answer, and of every
_START_SECONDS = 30.0  # more, of the first one: from a cold disk, on a busy machine
_PIXELS_A_SECOND = 10e6
_MEMORY = 1 << 30  # bytes of address space of the child beside its pictures
_BYTES_A_PIXEL = 16
_NOISE = 1 << 20  # bytes that decoders may write to stderr
_TOTAL = 10  # pages together may have this many times the pixels of the largest one


def open_pages(path: Path, kind: Kind, limits: Limits) -> list[Source]:
    """Return what a PDF, TIFF or JPEG 2000 file holds: a picture a page.

    Raises:
        MediaError: it can't be read, a page is above the limit, or there are too many of them.
    """
    answer, _ = _CHILD.ask("open", path, kind, limits, {}, _SECONDS)
    sizes: list[list[int]] = answer["pages"]
    pixels = sum(width * height for _, width, height in sizes)
    if pixels > _TOTAL * limits.max_pixels:
        raise MediaError(
            f"{shown(path)}: {len(sizes)} pages of together {pixels:,} pixels are over the limit "
            f"of {_TOTAL * limits.max_pixels:,}",
            "choose fewer with --pages",
        )
    decoder = "pdfium" if kind.formats == ("PDF",) else "pillow"
    return [
        Source(path, "image", width, height, 1, (), 0.0, 0.0, decoder, (),
               page=number if answer["count"] > 1 else 0, _pictures=(path,))
        for number, width, height in sizes
    ]  # fmt: skip


def read_page(
    source: Source, kind: Kind, limits: Limits
) -> tuple[npt.NDArray[np.uint8], tuple[str, ...]]:
    """Return one page upright, (H, W, 3) RGB, and the warnings.

    Raises:
        MediaError: a page that doesn't decode, unless the limits allow a part of it.
    """
    seconds = _SECONDS + source.width * source.height / _PIXELS_A_SECOND
    arguments = {"page": source.page or 1, "pixels": source.width * source.height}
    answer, pixels = _CHILD.ask("read", source.path, kind, limits, arguments, seconds)
    if pixels is None or pixels.shape != (source.height, source.width, 3):
        raise damaged(source.path, "the file has changed since it was opened", limits)
    return pixels, tuple(answer["warnings"])


def stop_reading() -> None:
    """End the child: threads that wait for it get a MediaError at once."""
    _CHILD.close()


class _Child:
    """The child of this process; started when it is first needed, and again after it died."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):  # a fork has neither the child nor who holds the lock
            os.register_at_fork(after_in_child=self._forget)

    def ask(
        self,
        call: str,
        path: Path,
        kind: Kind,
        limits: Limits,
        arguments: dict[str, int],
        seconds: float,
    ) -> tuple[dict[str, Any], npt.NDArray[np.uint8] | None]:
        """Ask the child about a file, and wait so many seconds for its answer.

        Returns:
            The answer, and the pixels where there are some, (H, W, 3).

        Raises:
            MediaError: of the child, or because it died over this file, or took too long.
        """
        request = {
            "call": call,
            "path": os.fsencode(path).hex(),
            "folder": _working_folder(),
            "format": kind.formats[0],
            "limits": asdict(limits),
            "arguments": arguments,
        }
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
                seconds += _START_SECONDS
            process = self._process
            assert process is not None
            late = threading.Event()

            def stop() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(seconds, stop)
            timer.start()
            try:
                answer, pixels = _exchange(process, request)
            except (OSError, EOFError, ValueError) as error:  # it is dead, or was stopped half-way
                self.close()
                limit = seconds if late.is_set() else 0
                raise _died(path, process.returncode, limit) from error
            except BaseException:  # Ctrl-C: the rest of the answer is still on its way
                self.close()
                raise
            finally:
                timer.cancel()
        if "error" in answer:
            error_kind = DamagedError if answer["error"] == "DamagedError" else MediaError
            raise error_kind(answer["message"], answer["hint"])
        return answer, pixels

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _forget(self) -> None:
        self._lock, self._process = threading.RLock(), None

    def _start(self) -> None:
        self.close()
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # of numpy: it has no use
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-m", "vtprune.media.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **threads, "PYTHONPATH": path},
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
                start_new_session=True,  # Ctrl-C is for this process, which then ends the child
            )
        except OSError as error:
            raise MediaError(
                f"the process that decodes PDF and TIFF files does not start: {error.strerror}",
                f"check that {sys.executable} can be run",
            ) from error


_CHILD = _Child()


def _working_folder() -> str:
    """What relative paths are relative to, as hexadecimal bytes; empty where it is gone."""
    try:
        return os.fsencode(os.getcwd()).hex()
    except OSError:
        return ""


def _exchange(
    process: subprocess.Popen[bytes], request: dict[str, Any]
) -> tuple[dict[str, Any], npt.NDArray[np.uint8] | None]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    answer = json.loads(process.stdout.readline())
    if "shape" not in answer:
        return answer, None
    pixels = np.empty(answer["shape"], np.uint8)
    left = memoryview(pixels.data).cast("B")
    while left:
        num = process.stdout.readinto(left)  # type: ignore[attr-defined]
        if not num:
            raise EOFError
        left = left[num:]
    return json.loads(process.stdout.readline()), pixels


def _died(path: Path, status: int | None, seconds: float) -> MediaError:
    """The error for a file over which the child died, or was ended after so many seconds."""
    again = "copy or download it again, or convert it, for example to PNG"
    if seconds:
        return DamagedError(f"{shown(path)}: not decoded within {seconds:.0f} s", again)
    return DamagedError(f"{shown(path)}: its decoder crashed (exit status {status})", again)


# The child's side.


def serve() -> None:
    """Answer requests until the parent is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    if hasattr(os, "memfd_create"):
        noise: Any = open(os.memfd_create("noise"), "w+b", buffering=0)  # noqa: SIM115
    else:
        noise = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    os.dup2(noise.fileno(), 1)
    os.dup2(noise.fileno(), 2)

    def said() -> str:
        size = noise.seek(0, os.SEEK_END)
        noise.seek(0)
        text: str = noise.read(size).decode("utf-8", "replace")
        noise.seek(0)
        noise.truncate()
        return text

    for line in sys.stdin.buffer:
        request = json.loads(line)
        path = Path(os.fsdecode(bytes.fromhex(request["path"])))
        if request["folder"]:
            os.chdir(os.fsdecode(bytes.fromhex(request["folder"])))
        limits = Limits(**request["limits"])
        _bound(request["arguments"].get("pixels", 0))
        try:
            if request["call"] == "open":
                _send(answers, _open(path, request["format"], limits))
            else:
                _read(path, request["format"], request["arguments"]["page"], limits, said, answers)
        except MediaError as error:
            _send(answers, {"error": type(error).__name__, "message": error.message,
                            "hint": error.hint})  # fmt: skip
        said()


def _open(path: Path, kind: str, limits: Limits) -> dict[str, Any]:
    """Return the sizes of a file's pages."""
    if kind == "PDF":
        from vtprune.media import pdf

        pages, count = pdf.list_pages(path, limits)
    elif kind == "TIFF":
        from vtprune.media import tiff

        pages, count = tiff.list_pages(path, limits)
    else:
        from vtprune.media import still

        source = still.open_picture(path, (kind,), limits)
        assert source is not None, "a still picture"
        pages, count = [(number, source.width, source.height)
                        for number in limits.select_pages(path, 1)], 1  # fmt: skip
    return {"pages": pages, "count": count}


def _read(
    path: Path, kind: str, page: int, limits: Limits, said: Callable[[], str], answers: BinaryIO
) -> None:
    """Send the pixels of a page, and the warnings."""
    warnings: tuple[str, ...] = ()
    if kind == "PDF":
        from vtprune.media import pdf

        with pdf.draw(path, page, limits) as (rows, size):
            blank = _send_rows(answers, rows, size)
            if blank:
                warnings = (f"{path.name}: nothing is drawn on page {page}: all of it is white",)
    elif kind == "TIFF":
        warnings = _read_tiff(path, page, limits, said, answers)
    else:
        from vtprune.media import still

        pixels, warnings = still.picture(path, (kind,), limits)
        _send_rows(answers, [pixels], (pixels.shape[1], pixels.shape[0]))
    _send(answers, {"warnings": warnings})


def _read_tiff(
    path: Path, page: int, limits: Limits, said: Callable[[], str], answers: BinaryIO
) -> tuple[str, ...]:
    from vtprune.media import tiff

    warnings: tuple[str, ...] = ()
    for partial in (False, True):
        try:
            with tiff.decode(path, page, limits, partial, said) as (converted, size):
                _send_rows(answers, converted.rows, size)
                return (*warnings, *(f"{path.name}: {note}" for note in converted.warnings))
        except MediaError:
            if partial or not limits.allow_partial:
                raise
            warnings = (f"{path.name}: damaged, only a part of the picture is there",)
    raise AssertionError


def _send(answers: BinaryIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


def _send_rows(
    answers: BinaryIO, bands: Iterable[npt.NDArray[np.uint8]], size: tuple[int, int]
) -> bool:
    """Send a picture from the top to the bottom; return whether all of it is white."""
    blank = True
    _send(answers, {"shape": (size[1], size[0], 3)})
    try:
        for rows in bands:
            blank = blank and bool((rows == 255).all())
            answers.write(np.ascontiguousarray(rows).data)
    except Exception:  # half of the picture is sent: nothing else can be said any more
        os._exit(1)
    return blank


def _bound(pixels: int) -> None:
    """Bound what the next answer may take, where the system can: memory, time, files.

    Time is bounded by the parent too; this one holds when the parent is gone.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, used + _MEMORY + _BYTES_A_PIXEL * pixels)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = usage.ru_utime + usage.ru_stime + _SECONDS + pixels / _PIXELS_A_SECOND
    _limit(resource.RLIMIT_CPU, int(seconds) + 1)
    _limit(resource.RLIMIT_FSIZE, _NOISE)
    _limit(resource.RLIMIT_CORE, 0)


def _limit(kind: int, value: int) -> None:
    import resource

    _, most = resource.getrlimit(kind)
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(kind, (value, most))


if __name__ == "__main__":
    serve()
