"""What every table and sentence tells in the same way."""

from __future__ import annotations

PAYS = 1.05
"""A measured speed-up below this is none."""


def counted(number: int, what: str) -> str:
    """ "1 file", "2 files"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
