"""Passes of the same kind together, their medians, and tables of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from vtprune._dev.bench.prefill import UNPRUNED
from vtprune._dev.bench.results import Pass


def group(passes: Iterable[Pass]) -> list[list[Pass]]:
    """Passes of the same settings together."""
    found: dict[str, list[Pass]] = {}
    for one in passes:
        found.setdefault(json.dumps(one.settings), []).append(one)
    return list(found.values())


def where(groups: Sequence[Sequence[Pass]]) -> str:
    """On what they were measured, and what else ran there."""
    machines = [one.machine for some in groups for one in some]
    names = sorted({f"{one['name']}{threads(one)}, {one['versions']}" for one in machines})
    loads = [one["load"] for one in machines]
    ahead = all(one.get("ahead") for one in machines)
    before = ", which this process ran ahead of" if ahead else ""
    return f"{'; '.join(names)}; system load {min(loads):g} to {max(loads):g}{before}."


def threads(machine: Mapping[str, Any]) -> str:
    count = machine["threads"]
    return f", {count} thread{'s' * (count > 1)}" if count else ""


def spread(values: Sequence[float], digits: str = ".2f") -> str:
    """A median, and the least and greatest beside it."""
    return f"{median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


def number_of(passes: Sequence[Pass]) -> str:
    return f"{len(passes)} pass{'es' * (len(passes) > 1)}"


def ratios(passes: Sequence[Pass], name: str, figure: str, base: str = UNPRUNED) -> list[float]:
    """How many times as fast as `base` something is, in every pass."""
    return [one.sides[base][figure] / one.sides[name][figure] for one in passes]


def middle(passes: Sequence[Pass], name: str, figure: str) -> float:
    return median(one.sides[name][figure] for one in passes)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, the first column to the left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
