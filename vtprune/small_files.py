"""Names of files that a user gives, and small texts, read whole up to a bound."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path


def read_small(path: Path, most: int) -> bytes:
    """Return the bytes of a file, of a larger one `most` + 1 of them.

    A pipe or a device, whose end may never come, is not waited for.

    Raises:
        OSError: it can't be read, or is no regular file.
        ValueError: there is no such name, such as one with a NUL.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "a device, pipe or socket, not a file")
        return file.read(most + 1)


def system_name(name: str) -> str:
    """Return a file's name from a text, so that the system is asked for its UTF-8 bytes.

    In a locale without its characters, such as C, Python could not name the file otherwise.
    """
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        with suppress(UnicodeEncodeError):  # half of a surrogate pair, which no name has
            return os.fsdecode(name.encode("utf-8", "surrogateescape"))
    return name


def _open_at_once(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # else a pipe waits for its writer
