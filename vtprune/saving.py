"""Write files all or nothing, refuse early what can't be written, and lock files."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import struct
import sys
import tempfile
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from vtprune.errors import VtpruneError

TAG_BYTE = 2**62  # far past any file's end: a lock there keeps nobody from the content
HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


def explain(error: Exception) -> str:
    """Return the system's message for an error about a path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(
        error, RuntimeError
    ):  # what pathlib raises for a loop of links, up to Python 3.12
        return os.strerror(errno.ELOOP)
    return str(error) or type(error).__name__


def check_target(path: Path, option: str = "--save") -> None:
    """Refuse a place that a file can't be written to.

    Args:
        path: where the file is to be written.
        option: the flag that gave the path.

    Raises:
        VtpruneError: a directory, a device, a read-only file, no such folder, a name too long, a
            loop of links, or no permission.
    """
    hint = f"give {option} a file in a folder that exists"
    try:
        target = path.resolve()
        mode = target.stat().st_mode if target.exists() else None
    except (OSError, RuntimeError, ValueError) as error:
        raise VtpruneError(f"{path}: can't save there: {explain(error)}", hint) from error
    if mode is not None and stat.S_ISDIR(mode):
        raise VtpruneError(f"{path}: can't save there: it is a directory", hint)
    if mode is not None and not stat.S_ISREG(mode):
        raise VtpruneError(f"{path}: can't save there: not a regular file", hint)
    if mode is not None and not mode & 0o222:  # root is refused too, who could write it
        raise VtpruneError(
            f"{path}: can't save there: the file is read-only",
            f"give {option} another file, or make this one writable (chmod u+w)",
        )
    if not target.parent.is_dir():
        raise VtpruneError(f"{path}: can't save there: no folder {target.parent}", hint)
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        if mode is not None:
            with target.open("r+b"):
                pass
    except OSError as error:
        raise unwritable(path, error, option) from error


def save_file(path: Path, data: bytes, option: str = "--save") -> None:
    """Write a file, all or nothing.

    Raises:
        VtpruneError: it can't be written; what was there before is left as it was.
    """
    check_target(path, option)
    target = path.resolve()  # so that a link stays a link
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
    return VtpruneError(f"{path}: can't save there: {explain(error)}", hint)


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
