"""Errors that a user can act on, and how their messages show values."""

from __future__ import annotations

import errno
import json
import os
import re
import reprlib
import unicodedata
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

LONGEST, LONGEST_HINT = 1800, 600  # columns of message and hint; with their labels 80 x 24 hold it
LONGEST_LIST = 1380  # of a list of faults, beside a file's name and a hint
MOST_FAULTS = 20
MOST_NAMES = 10_000  # of a folder that are compared with a wrong one
LONGEST_VALUE = 60
LONGEST_PATH = 100
CUT = "..."
BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that reorder the text around them: `exe.png` may be shown for `gnp.exe`."""
CONTROLS = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029{BIDI_CONTROLS}]")
"""What could steer a terminal, or end a line of a file: all controls but tab and newline."""
LINE_END = re.compile(r"\s*[\t\n\v\f\r]\s*")


class VtpruneError(Exception):
    """An error that a user can act on.

    Args:
        message: what is wrong, with the offending value and the rule, on one line. What is longer
            than a screen is cut in the middle; what could steer a terminal is escaped.
        hint: the way out, on one line; empty where there is none.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        self.hint = one_line(hint, LONGEST_HINT)
        self.message = one_line(message, LONGEST - len(self.hint))
        super().__init__(self.message)


class MediaError(VtpruneError):
    """A file that can't be read, or is larger than the limits allow."""


class DamagedError(MediaError):
    """A file that opens, but of which at most a part can be decoded."""


class PresetError(VtpruneError):
    """A preset, schedule or option that is not valid, or can't be reached."""


class ModelError(VtpruneError):
    """A model that can't be loaded, or that this project can't prune."""


def one_line(text: str, most: int) -> str:
    """Return text on one line of at most `most` columns, without what could steer a terminal.

    A line's end becomes a space, any other unprintable character its escape.
    """
    if len(text) > 4 * most:  # columns of a megabyte need not be counted
        text = text[: 2 * most] + text[-2 * most :]
    text = LINE_END.sub(" ", text).strip(" ")
    return shorten("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text), most)


def shorten(text: str, most: int) -> str:
    """Cut text in the middle to at most `most` columns."""
    if 2 * len(text) <= most or sum(map(_columns, text)) <= most:
        return text
    half = (most - len(CUT)) // 2
    return _first_columns(text, half) + CUT + _first_columns(text[::-1], half)[::-1]


def _first_columns(text: str, most: int) -> str:
    """Return as much of the start of a text as `most` columns hold."""
    width = 0
    for number, character in enumerate(text):
        width += _columns(character)
        if width > most:
            return text[:number]
    return text


def _columns(character: str) -> int:
    """Return how many columns of a terminal a character takes."""
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class _Values(reprlib.Repr):
    """`repr` of at most LONGEST_VALUE characters or so, whatever the value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = LONGEST_VALUE
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxset = 2, 3, 3, 3, 3

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 4 * LONGEST_VALUE:  # Python refuses to write out thousands of digits
            return f"a number of about {int(x.bit_length() * 0.30103) + 1:,} digits"
        return repr(x)


_VALUES = _Values()


def quote(value: object) -> str:
    """Return a value's `repr` for a message, cut in the middle if it is long."""
    return shorten(_VALUES.repr(value), LONGEST_VALUE)


def brief(value: object) -> str:
    """Return a value for a message: as `quote`, but text without quotation marks."""
    return one_line(value, LONGEST_VALUE) if isinstance(value, str) else quote(value)


def brief_path(path: object) -> str:
    """Return a path for a message, cut in the middle if it is long."""
    return one_line(str(path), LONGEST_PATH)


def nearest_path(path: str | Path, folder: str | Path = ".") -> str:
    """Return the path that a missing one was probably meant to be; "" where none is like it.

    The first part of it that is not there, a folder or the file, is what was misspelt.

    Args:
        folder: that a relative path is relative to.
    """
    wanted = missing = Path(path)
    try:
        if os.path.lexists(folder / wanted):  # it is there, and something else is wrong with it
            return ""
        while missing != missing.parent and not os.path.exists(folder / missing.parent):
            missing = missing.parent
        with os.scandir(folder / missing.parent) as entries:
            names = [entry.name for entry in islice(entries, MOST_NAMES)]
        close = get_close_matches(missing.name, names, n=1, cutoff=0.7)
        if not close:
            return ""
        nearest = missing.parent / close[0] / wanted.relative_to(missing)
        return str(nearest) if os.path.exists(folder / nearest) else ""
    except (OSError, ValueError):  # ValueError: what is no name, such as a NUL in it
        return ""


def path_hint(path: str | Path, otherwise: str = "check the path") -> str:
    """Return the way out where there is no such file: the nearest path, or else something else."""
    nearest = nearest_path(path)
    return f"did you mean {brief_path(nearest)}?" if nearest else otherwise


def path_fault(error: Exception) -> str:
    """Return why the system, or Python before it, refuses a path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RuntimeError):  # pathlib's for a loop of links, up to Python 3.12
        return os.strerror(errno.ELOOP)
    if isinstance(error, ValueError):  # a NUL, or half of a surrogate pair; its words differ
        return "not a file's name"  # from one release of Python to the next
    return str(error) or type(error).__name__


def format_bytes(count: float) -> str:
    """Return bytes with three digits and their unit: "13.4 MB", "1.25 GB"."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    size, unit = next((pair for pair in units if count >= 0.9995 * pair[0]), units[-1])
    return f"{count / size:#.3g}".rstrip(".") + f" {unit}"


def json_fault(error: ValueError | RecursionError) -> str:
    """Return what is wrong with text or bytes that Python can't read as JSON."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        return "not JSON: not UTF-8 text"
    if isinstance(error, RecursionError):
        return "not JSON: nested too deep"
    return "not JSON: a number with too many digits"


def list_faults(faults: Sequence[str], more: int = 0) -> str:
    """Join faults to one text: at most MOST_FAULTS, each cut to fit, and the number of the others.

    Args:
        more: faults that are not in the list.
    """
    unique = list(dict.fromkeys(faults))
    more += len(unique[MOST_FAULTS:])
    unique = unique[:MOST_FAULTS]
    room = most = LONGEST_LIST
    lengths = sorted(len(fault) + 2 for fault in unique)
    for number, length in enumerate(lengths):  # long faults get the room that short ones leave
        most = room // (len(lengths) - number)
        if length > most:
            break
        most, room = LONGEST_LIST, room - length
    texts = [
        fault if len(fault) + 2 <= most else fault[: most - 2 - len(CUT)] + CUT for fault in unique
    ]
    return "; ".join([*texts, f"and {more:,} more"] if more else texts)
