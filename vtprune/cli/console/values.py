"""Numbers with three digits at the scale that they have."""

from __future__ import annotations

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def left_of(left: float, total: float, unit: str) -> str:
    """Return "2,212 of 6,272", or with a unit "33.5 of 106 TFLOP", at the scale of the total."""
    if not unit:
        return f"{left:,.0f} of {total:,.0f}"
    size, prefix = scale(total)
    return f"{digits(left / size)} of {digits(total / size)} {prefix}{unit}"


def si(number: float) -> str:
    """Return three digits and a prefix: "3.35 T"."""
    size, prefix = scale(number)
    return f"{digits(number / size)} {prefix}"


def scale(number: float) -> tuple[float, str]:
    """Return the size and the letter of a number's unit prefix: 1e9 and "G"."""
    for size, prefix in PREFIXES:
        if number >= 0.9995 * size:
            return size, prefix
    return 1.0, ""


def digits(number: float) -> str:
    """Return three significant digits."""
    return "0" if number == 0 else f"{number:#.3g}".rstrip(".")


def duration(seconds: float) -> str:
    """Return seconds at the scale that they have: "0.3 ms", "41 ms", "2.31 s"."""
    if seconds >= 0.0995:
        return f"{seconds:.2f} s"
    milliseconds = seconds * 1000
    return f"{milliseconds:.0f} ms" if milliseconds >= 9.95 else f"{milliseconds:.1f} ms"
