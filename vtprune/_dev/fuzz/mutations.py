"""Damage done to bytes, and to values before they are written as JSON or YAML."""

from __future__ import annotations

import copy
import random
from typing import Any

EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
HEADER = 4096  # bytes in which half of the damage is done
TEXTS = (
    "", " ", "\n", "\0", "x" * 70_000, "9" * 5000, "\ud800", "\ufeff", "\u202egnp.exe",
    "\x1b[2J\x1b]0;x\x07", "[bold]x[/bold]", "<script>", "=1+1", "1e999", "../../etc/passwd",
    "/dev/zero", "http://127.0.0.1:9/x", "\U0001f469\u200d\U0001f467",
    "e\u0301" * 40, "{{ 1 }}", "%s%n", "null", "-", "~",
)  # fmt: skip
NUMBERS = (
    -1, 0, 1, 2, 3, 255, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**400, 0.5, -0.0,
    1e-320, 1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
CONTAINERS: tuple[object, ...] = ([], {}, [None], [[]], {"": None}, {"a": {"b": []}}, [0] * 5000)
DEEP = (1, 3, 30, 150)
"""Lists inside one another."""
BRACKETS = (1500, 100_000)
"""In a text, where nothing need write them."""
REFERENCES = (
    "&a [x]", "*a", "!!python/object/apply:os.system [id]", "!!binary x", "!!int ''", "? [a]",
    "<<: *a", "---", "%YAML 9", "!!timestamp x", "\t", "- - - -", "{", "]", "|", "'",
)  # fmt: skip
BOMB = "".join(
    ["a0: &a0 [x, x]\n", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))]
)


def damage_bytes(data: bytes, other: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return a damaged copy of a file, and in a word what was done to it.

    Args:
        other: another file, of which a part may be put in.
    """
    size = len(data)
    within = size if rng.random() < 0.5 else min(size, HEADER)
    start = rng.randrange(within)
    length = min(rng.choice((1, 4, 16, 188, 1024, 65536)), size - start)
    if size > 2 * HEADER and rng.random() < 0.2:  # an index often lies at the end
        start = size - 1 - rng.randrange(HEADER)
        length = min(length, size - start)
    changed = bytearray(data)
    damage = rng.choice(("bytes", "bits", "sizes", "cut", "zeros", "ones", "swap", "drop", "repeat",
                         "insert", "splice", "tail"))  # fmt: skip
    match damage:
        case "bytes":
            for _ in range(rng.choice((1, 2, 8, 64))):
                changed[rng.randrange(within)] = rng.randrange(256)
        case "bits":
            for _ in range(rng.choice((1, 2, 8, 64))):
                changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
        case "sizes":
            for _ in range(rng.choice((1, 2, 4))):
                width = rng.choice((1, 2, 4, 8))
                value = rng.choice(EDGES) % (1 << 8 * width)
                at = rng.randrange(within)
                changed[at : at + width] = value.to_bytes(width, rng.choice(("big", "little")))
        case "cut":
            del changed[start:]
        case "zeros" | "ones":
            changed[start : start + length] = (b"\0" if damage == "zeros" else b"\xff") * length
        case "swap":
            at = rng.randrange(size)
            part, away = data[start : start + length], data[at : at + length]
            changed[start : start + length], changed[at : at + length] = away, part
        case "drop":
            del changed[start : start + length]
        case "repeat":
            changed[start:start] = data[start : start + length] * rng.choice((1, 2, 16, 256))
        case "insert":
            changed[start:start] = rng.randbytes(length)
        case "splice":
            changed[start:] = other[rng.randrange(len(other)) :]
        case "tail":
            zeros = bytes(rng.choice((1, 1 << 10, 1 << 20, 32 << 20)))
            changed += rng.choice((zeros, other, rng.randbytes(1 << 20)))
    if damage not in ("cut", "tail") and rng.random() < 0.15:
        del changed[rng.randrange(1, len(changed) + 1) :]
    return damage, bytes(changed)


def damage_value(value: Any, rng: random.Random) -> tuple[str, Any]:
    """Return a changed copy of lists and mappings, and in words what was done to it."""
    changed, damages = copy.deepcopy(value), []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        places = list(_places(changed, 0))
        if not places:
            return "other", odd_value(rng)
        holder, key = rng.choice(places)
        damages.append(_damage_place(holder, key, places, rng))
    return " ".join(damages), changed


def _places(value: Any, depth: int) -> list[tuple[Any, Any]]:
    """Return each list and mapping with each of its keys."""
    keys = (
        list(value)
        if isinstance(value, dict)
        else list(range(len(value)))
        if isinstance(value, list)
        else []
    )
    if depth > 40 or len(keys) > 500:
        return []
    inside = [place for key in keys for place in _places(value[key], depth + 1)]
    return [*((value, key) for key in keys), *inside]


def _damage_place(holder: Any, key: Any, places: list[tuple[Any, Any]], rng: random.Random) -> str:
    damage = rng.choice(("drop", "type", "type", "odd", "near", "double", "swap", "key", "deep"))
    match damage:
        case "drop":
            del holder[key]
        case "type":
            holder[key] = rng.choice((None, True, 3, 0.5, "text", [holder[key]], {"a": 1}, []))
        case "odd":
            holder[key] = odd_value(rng)
        case "near" if isinstance(holder[key], (int, float)):
            holder[key] = holder[key] * rng.choice((-1, 0, 2, 1000, 0.1)) + rng.choice((0, 1, -1))
        case "near" if isinstance(holder[key], str):
            at = rng.randrange(len(holder[key]) + 1)
            holder[key] = holder[key][:at] + rng.choice(TEXTS) + holder[key][at:]
        case "double" if isinstance(holder, list):
            holder[key:key] = [copy.deepcopy(holder[key])] * rng.choice((1, 3, 100))
        case "swap":
            other, place = rng.choice(places)
            if key in _keys(holder) and place in _keys(other):
                holder[key] = copy.deepcopy(other[place])
        case "key" if isinstance(holder, dict):
            holder[rng.choice((str(key)[:-1], str(key).upper(), rng.choice(TEXTS)))] = holder[key]
        case _:
            deep: Any = holder[key]
            for _ in range(rng.choice(DEEP)):
                deep = [deep]
            holder[key] = deep
    return damage


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def odd_value(rng: random.Random) -> object:
    """Return a value that few programs expect."""
    return copy.deepcopy(rng.choice(rng.choice((TEXTS, NUMBERS, CONTAINERS))))


def damage_yaml(text: str, rng: random.Random) -> tuple[str, str]:
    """Return a YAML text with what YAML alone has: anchors, tags, further documents."""
    lines = text.splitlines()
    damage = rng.choice(("reference", "reference", "bomb", "line", "indent", "value"))
    at = rng.randrange(len(lines) + 1)
    if damage == "bomb":
        lines.insert(at, BOMB)
    elif damage == "reference":
        lines.insert(at, rng.choice(REFERENCES))
    elif damage == "line" and lines:
        lines.insert(at, rng.choice(lines))
    elif damage == "indent" and at < len(lines):
        lines[at] = " " * rng.randrange(1, 5) + lines[at]
    elif at < len(lines):
        key, colon, _ = lines[at].partition(":")
        lines[at] = f"{key}{colon} {rng.choice(REFERENCES)}"
    return damage, "\n".join(lines) + "\n"
