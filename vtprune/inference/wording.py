"""What every table and sentence tells in the same way."""

from __future__ import annotations

from collections.abc import Mapping

PAYS = 1.05
"""A measured speed-up below this is none."""


def counted(number: int, what: str, several: str = "") -> str:
    """ "1 file", "2 files".

    Args:
        several: where that is not `what` with an "s".
    """
    return f"{number:,} {what if number == 1 else several or what + 's'}"


def with_options(method: str, options: Mapping[str, object]) -> str:
    """ "entropy", "entropy (norm=none)"."""
    pairs = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{method} ({pairs})" if pairs else method
