"""The page of speed figures, made of what was measured."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from vtprune._dev.bench.results import Pass
from vtprune._dev.bench.sections import SECTIONS
from vtprune._dev.bench.tables import group

WIDTH = 120
INTRODUCTION = """# Speed

Every figure is made by the command above it, and this page by `python -m vtprune._dev.bench page`
from `docs/speed.jsonl`, which has every pass. Both run in a checkout only: the wheel does not have
them. Models have published shapes and random weights; times are ratios within one process. A
command that was stopped goes on where it ended.

`--device cuda --model llava-next --dtype bfloat16` measures the prefill on a GPU, with the GPU's
name and the time that the host waits for it. No GPU was at hand where this page was made, so it has
no such figures, and that way of measuring has not been run.
"""


def make_page(passes: Sequence[Pass], plot: str = "") -> str:
    """Markdown with a section for every part that was measured.

    Args:
        plot: the file of the chart of growth; empty for none.
    """
    parts, missing = [INTRODUCTION], []
    for part, section in SECTIONS.items():
        groups = group([run for run in passes if run.part == part])
        if groups:
            parts.append(section(groups))
        else:
            missing.append(part)
    if missing:
        parts.insert(1, f"Not measured here: {', '.join(missing)}.")
    drawn = f"![Cost against visual tokens and frames]({plot})" if plot else ""
    return filled("\n\n".join(parts).replace("PLOT", drawn))


def filled(text: str) -> str:
    """Markdown with its paragraphs in lines of even length."""
    blocks = [block.strip("\n") for block in text.split("\n\n")]
    filled_blocks = [
        block
        if block.startswith(("#", "|", " "))
        else textwrap.fill(block, WIDTH, break_long_words=False, break_on_hyphens=False)
        for block in blocks
        if block
    ]
    return "\n\n".join(filled_blocks) + "\n"
