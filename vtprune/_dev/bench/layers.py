"""Single layers, timed and summed, beside the whole model."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch

from vtprune import __version__
from vtprune.evaluation.profiling.profile import ProfileOptions, profile
from vtprune.evaluation.profiling.prompts import ProfiledMedia
from vtprune.evaluation.profiling.result import Profile

PARTS = {
    "vision": "vision tower",
    "select": "selection",
    "prefill": "prefill",
    "decode_per_token": "decoded token",
    "first_token": "first token",
}


def measure_layers(
    model: str,
    shown: ProfiledMedia,
    keeps: Sequence[float],
    presets: Sequence[str],
    options: ProfileOptions,
    command: str,
) -> str:
    """A page: a profile of single layers, summed, beside one of the whole model.

    Args:
        command: that it was asked for by.
    """
    found = {}
    for how in ("layers", "whole"):

        def show(stage: str, done: int, total: int, how: str = how) -> None:
            sys.stderr.write(f"{how}: {stage} {done} of {total}\n")

        found[how] = profile(
            model, shown, keeps=keeps, presets=presets, options=replace(options, how=how),
            on_progress=show,
        )  # fmt: skip
    layers, whole = ([row.to_dict() for row in one.rows] for one in found.values())
    return head(found["whole"], command) + table(layers, whole)


def head(found: Profile, command: str) -> str:
    """What was run, where."""
    shown, machine = found.input, found.machine
    threads = f", {machine.threads} threads" if machine.threads else ""
    return (
        f"vtprune {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{machine.name}{threads}, {found.model.dtype}: {found.model.name}, "
        f"{shown.visual_tokens} visual tokens. "
        f"Command: `{command}`\n\n"
    )


def table(layers: Sequence[Mapping[str, object]], whole: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table: seconds of the whole model, and of the sum beside them."""
    lines = ["| row | part | layers summed, s | whole model, s | ratio |",
             "| --- | --- | ---: | ---: | ---: |"]  # fmt: skip
    for one, other in zip(layers, whole, strict=True):
        name = one["preset"] or f"keep {one['keep']:g}"
        if "error" in one or "error" in other:
            lines.append(f"| {name} | {one.get('error') or other['error']} | - | - | - |")
            continue
        for part, told in PARTS.items():
            summed, real = seconds_of(one, part), seconds_of(other, part)
            if real:
                lines.append(
                    f"| {name} | {told} | {summed:.4g} | {real:.4g} | {summed / real:.2f} |"
                )
        speedups = [figure(row, "compare", "prefill_speedup") for row in (one, other)]
        lines.append(
            f"| {name} | prefill speed-up | {speedups[0]:.2f} x | {speedups[1]:.2f} x | "
            f"{speedups[0] / speedups[1]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def seconds_of(row: Mapping[str, object], part: str) -> float:
    return figure(row, "seconds", part)


def figure(row: Mapping[str, object], block: str, name: str) -> float:
    return cast(float, cast("Mapping[str, object]", row[block])[name])
