"""Write files all or nothing, refuse early what can't be written, and lock files."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from io import BufferedReader, FileIO
from pathlib import Path
from typing import BinaryIO

from vtprune.errors import (
    BIDI_CONTROLS,
    VtpruneError,
    brief_path,
    list_faults,
    path_fault,
    path_hint,
)

TAG_BYTE = 2**62  # far past any file's end: a lock there keeps nobody from the content
LONGEST_LINE = 2**20  # bytes
MOST_LINES = 5  # wrong ones that are named
ESCAPED = re.compile(rf"[\x7f-\x9f\u2028\u2029{BIDI_CONTROLS}\ud800-\udfff]")
HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


def check_target(path: Path, option: str = "--save") -> None:
    """Refuse a place that a file can't be written to.

    Args:
        path: where the file is to be written.
        option: the flag that gave the path.

    Raises:
        VtpruneError: a directory, a device, a read-only file, a link into another folder, no such
            folder, a name too long, a loop of links, or no permission.
    """
    hint = f"give {option} a file in a folder that exists"
    try:
        target, mode = path.resolve(), None
        with suppress(FileNotFoundError, NotADirectoryError):
            mode = target.stat().st_mode  # also refuses a loop of links, from Python 3.13 on
    except (OSError, RuntimeError, ValueError) as error:
        raise VtpruneError(f"{path}: can't save there: {path_fault(error)}", hint) from error
    if mode is not None and stat.S_ISDIR(mode):
        raise VtpruneError(f"{path}: can't save there: it is a directory", hint)
    if mode is not None and not stat.S_ISREG(mode):
        raise VtpruneError(f"{path}: can't save there: not a regular file", hint)
    if leads_elsewhere(path):
        raise VtpruneError(
            f"{path}: can't save there: it is a link to {target}",
            f"give {option} that file itself, or remove the link",
        )
    if mode is not None and not mode & 0o222:  # root is refused too, who could write it
        raise VtpruneError(
            f"{path}: can't save there: the file is read-only",
            f"give {option} another file, or make this one writable (chmod u+w)",
        )
    if not target.parent.is_dir():
        raise VtpruneError(
            f"{path}: can't save there: no folder {target.parent}", path_hint(path.parent, hint)
        )
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        if mode is not None:
            with target.open("r+b"):
                pass
    except OSError as error:
        raise unwritable(path, error, option) from error


def leads_elsewhere(path: Path) -> bool:
    """Return whether a path is a link into another folder, where nobody asked to write."""
    return path.is_symlink() and path.resolve().parent != path.parent.resolve()


def save_file(path: Path, data: bytes, option: str = "--save") -> None:
    """Write a file, all or nothing.

    Raises:
        VtpruneError: it can't be written; what was there before is left as it was.
    """
    check_target(path, option)
    target = path.resolve()  # so that a link within the folder stays a link
    try:
        # A short name of its own: the target's may be as long as a name can be.
        part = target.with_name(f".vtprune-{os.getpid()}-{secrets.token_hex(4)}.part")
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                part.chmod(stat.S_IMODE(target.stat().st_mode))
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error, option) from error


def unwritable(path: Path, error: OSError, option: str) -> VtpruneError:
    """Return the error for a file that the system refuses to write."""
    hint = f"give {option} a file that can be written"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        hint = f"free some space, or give {option} a file on another disk"
    return VtpruneError(f"{path}: can't save there: {path_fault(error)}", hint)


def lock(file: BinaryIO | FileIO) -> int | None:
    """Lock an open file for this process, until it is closed or the process ends.

    Returns:
        None where the lock was free; else the id of the process that holds it, 0 if unknown.
    """
    if sys.platform == "win32":
        return _lock_on_windows(file)
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return _holder(file)
        if error.errno in (errno.ENOLCK, errno.ENOTSUP):
            return None  # a file system without locks
        raise
    with suppress(OSError):
        # flock doesn't tell who holds it. A record lock does, but it is lost as soon as this
        # process closes the file anywhere else: it only names the holder.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, TAG_BYTE)
    return None


def _holder(file: BinaryIO | FileIO) -> int:
    """Return the id of the process that holds the record lock at TAG_BYTE; 0 if unknown."""
    if sys.platform != "linux":
        return 0  # other systems lay out the answer in their own ways
    import fcntl

    layout = "hhqqi4x"  # struct flock: type, whence, start, length, pid
    request = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, TAG_BYTE, 1, 0)
    try:
        kind, _, _, _, pid = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, request))
    except (OSError, struct.error):
        return 0
    if kind == fcntl.F_UNLCK:  # held by this very process, which F_GETLK leaves out
        return os.getpid()
    return int(pid) if pid > 0 else 0


def _lock_on_windows(file: BinaryIO | FileIO) -> int | None:
    import msvcrt  # type: ignore[import-not-found, unused-ignore]

    place = file.tell()
    file.seek(TAG_BYTE)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno in HELD:
            return 0
        raise
    finally:
        file.seek(place)
    return None


# -- files of lines that a killed run goes on with -------------------------------------------------


class ResumableLines:
    """A file of lines that are handed to the disk one by one, and that a killed run goes on with.

    The file is this process's alone until `close`. Only half a line at the end, which a killed run
    left, is ever cut off.

    Args:
        path: the file, made where there is none.
        take: gets each line that the file holds, after the head; returns what is wrong with it, ""
            where nothing is.
        beginning: of every line but the head.
        what: the lines are, in the plural.
        head: the first line, the same in every run that may go on with the file; "" for none.
        others: what a file with another first line holds.

    Raises:
        VtpruneError: the file can't be written, is written to by another process, has another head,
            or lines that are wrong; it is left as it was.
    """

    def __init__(
        self,
        path: Path,
        take: Callable[[bytes], str],
        beginning: bytes,
        what: str,
        head: str = "",
        others: str = "",
    ) -> None:
        self.path, self.take, self.beginning, self.what = path, take, beginning, what
        self.file = open_unbuffered(path)
        try:
            self.resume(head, others)
        except BaseException:
            self.close()
            raise

    def resume(self, head: str, others: str) -> None:
        """Read the lines of the file, and leave it ready for the next one."""
        self.refuse_second_writer()
        first_line = head.encode() + b"\n" if head else b""
        begun = self.file.read(len(first_line)) or b""
        if not first_line.startswith(begun):
            raise VtpruneError(
                f"{self.path}: holds {others}, or something else",
                "give another file, or remove this one",
            )
        if begun != first_line:  # new, or all that a killed run could write
            self.file.seek(0)
            self.file.truncate()
            self.append(head)
            return
        end = self.read_lines(len(first_line), 2 if head else 1)
        self.file.seek(end)
        self.file.truncate()

    def refuse_second_writer(self) -> None:
        holder = lock(self.file)
        if holder is not None:
            name = f"process {holder}" if holder else "another process"
            raise VtpruneError(
                f"{self.path}: {name} is writing its answers there",
                "wait until it ends, or give another file",
            )

    def read_lines(self, start: int, first: int) -> int:
        """Take the lines after the head.

        Args:
            start: where they begin.
            first: number of the first of them.

        Returns:
            where the next line goes: the end, or the start of half a line at the end.
        """
        end, faults, line = start, Faults(self.path, self.what), b"\n"
        for number, line in enumerate(lines_of(self.file), first):
            fault = self.take(line)
            if fault and not line.endswith(b"\n") and is_torn(line, self.beginning):
                line = b"\n"
                break
            if fault:
                faults.add(number, fault)
            end += len(line)
        faults.refuse()
        if line.endswith(b"\n"):
            return end
        self.append("")  # a whole line, of which only the end is missing
        return end + 1

    def append(self, text: str, num_kept: int = 0) -> None:
        """Write lines at the end, or leave the file as it was.

        Args:
            num_kept: lines that count as answers, for the error.

        Raises:
            VtpruneError: the disk is full, or the file can't be written any more.
        """
        end, data = self.file.seek(0, os.SEEK_END), memoryview(text.encode() + b"\n")
        try:
            while data:
                data = data[self.file.write(data) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            with suppress(OSError):
                self.file.truncate(end)
            raise VtpruneError(
                f"{self.path}: can't be written: {path_fault(error)} "
                f"({kept_in(self.path, num_kept)})",
                "make room, then give the same command: it goes on from there",
            ) from error

    def close(self) -> None:
        """Close the file, and let other processes have it."""
        self.file.close()


def json_line(values: Mapping[str, object], allow_nan: bool = False) -> str:
    """Return values as JSON on one line, readable in any script.

    What could steer a terminal, and what no UTF-8 holds, such as bytes in a file's name, is
    written as an escape.

    Args:
        allow_nan: write NaN and infinity, which only Python reads back.
    """
    text = json.dumps(values, ensure_ascii=False, allow_nan=allow_nan)
    return ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def is_torn(line: bytes, beginning: bytes) -> bool:
    """Return whether a killed run, or a machine that lost power, could have left this end.

    Args:
        beginning: of every whole line.
    """
    return beginning.startswith(line[: len(beginning)]) or not line.strip(b"\0")


def kept_in(path: Path, number: int) -> str:
    """ "12 answers kept in answers.jsonl"."""
    return f"{number:,} answer{'' if number == 1 else 's'} kept in {path}"


class Faults:
    """Faults in the lines of a file, as one error.

    Args:
        what: the lines should be.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what, self.more = path, what, 0
        self.named: list[str] = []

    def add(self, line: int, fault: str) -> None:
        """Add a fault; beyond the first few they are only counted."""
        if len(self.named) < MOST_LINES:
            self.named.append(f"line {line}: {fault}")
        else:
            self.more += 1

    def refuse(self) -> None:
        """Raise all faults as one error.

        Raises:
            VtpruneError: one line or more is no record.
        """
        if self.named:
            raise VtpruneError(
                f"{brief_path(self.path)}: has lines that are no {self.what}: "
                f"{list_faults(self.named, self.more)}",
                "nothing was changed: mend or remove those lines, or give another file",
            )


def lines_of(file: FileIO) -> Iterator[bytes]:
    """Yield the lines from here on, of those that are too long the first part."""
    reader = BufferedReader(file)
    try:
        while line := reader.readline(LONGEST_LINE):
            yield line
            while len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                line = reader.readline(LONGEST_LINE)
    finally:
        reader.detach()  # closing it would close the file


def open_unbuffered(path: Path) -> FileIO:
    """Open a file to read and write, made where there is none, without touching what it holds.

    Raises:
        VtpruneError: it can't be written.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        if leads_elsewhere(path):
            raise OSError(errno.EINVAL, f"it is a link to {path.resolve()}")
        file = FileIO(os.open(path, flags, 0o666), "r+b")
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise OSError(errno.EINVAL, "not a regular file")
        return file
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, up to Python 3.12
        raise VtpruneError(
            f"{path}: can't be written: {path_fault(error)}", "give another file"
        ) from error
