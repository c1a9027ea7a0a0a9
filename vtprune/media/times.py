"""Times as people write them: seconds, mm:ss or h:mm:ss."""

from __future__ import annotations

import re

from vtprune.errors import MediaError, brief

TIME = re.compile(r"(?:(?:([0-9]{1,6}):)?([0-9]{1,6}):)?([0-9]{1,9}(?:\.[0-9]*)?)", re.ASCII)


def parse_time(text: str) -> float:
    """Return the seconds that a time means.

    Raises:
        MediaError: it is none.
    """
    match = TIME.fullmatch(text.strip())
    if match and match[2]:
        hours, minutes, seconds = int(match[1] or 0), int(match[2]), float(match[3])
        if seconds < 60 and (minutes < 60 or not match[1]):
            return 3600 * hours + 60 * minutes + seconds
    elif match:
        return float(match[3])
    raise MediaError(f"{brief(text)} is no time: seconds, mm:ss or h:mm:ss")
