"""The start time of this process."""

from __future__ import annotations

import os
import time
from pathlib import Path


def process_start() -> float:
    """Return the value that `time.perf_counter` had when this process began.

    Linux says when, in steps of 10 ms; a shell that `exec`s a command after other work hands its
    own start on to it. Elsewhere it is now: then the interpreter's own start, some hundredths of a
    second, is left out.
    """
    return time.perf_counter() - _process_age()


def _process_age() -> float:
    """Return the seconds since the system made this process; 0 where it does not say."""
    try:
        # Fields after the name, which is in parentheses and may hold blanks; the 22nd of all is
        # the start in clock ticks since boot (man 5 proc).
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
