"""What several tables say of a run: what was read, which model, whether pruning pays."""

from __future__ import annotations

import os
from itertools import groupby
from typing import cast

from vtprune.cli.console.terminal import printable
from vtprune.cli.console.values import Values, duration, list_in, number_in, si
from vtprune.inference.wording import counted


def asked_fact(source: Values) -> str:
    """How many questions, and about how many files."""
    questions, files = (int(number_in(source, what)) for what in ("questions", "files"))
    return f"{counted(questions, 'question')} about {counted(files, 'file')}"


def read_fact(source: Values) -> str:
    """The files, and what was looked at of them."""
    files = _file_names([str(file) for file in list_in(source, "files")])
    names = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    parts = [f"{names}: {source['modality']}"]
    if len(list_in(source, "files")) == 1:
        parts[0] += f" {source['width']} x {source['height']}"
    if source["duration"]:
        parts.append(duration(number_in(source, "duration")))
    if source["frames"]:
        parts.append(_frames(source))
    tiles = number_in(source, "tiles")
    if tiles > 1:
        parts.append(f"{tiles:.0f} tiles")
    return f"{', '.join(parts)} ({source['decoder']})"


def _file_names(files: list[str]) -> list[str]:
    """The names of files without their folders; of the pages of one file its name once."""
    names: list[str] = []
    for path, group in groupby(files, lambda file: file.partition("#page=")[0]):
        pages = [file.partition("#page=")[2] for file in group]
        name = printable(os.path.basename(path) or path)
        if not pages[0]:
            names += [name] * len(pages)
            continue
        more = f" and {len(pages) - 8} more" if len(pages) > 8 else ""
        names.append(f"{name} page{'s' if len(pages) > 1 else ''} {' '.join(pages[:8])}{more}")
    return names


def model_fact(model: Values, kernel: bool = True) -> str:
    """A model's name and size, and what it runs on.

    Args:
        kernel: say which attention kernel, too.
    """
    parameters = si(number_in(model, "parameters")).replace("G", "B").strip()  # a billion
    name = printable(str(model["name"]))
    if "adapter" in model:
        name += f" with {printable(str(model['adapter']))}"
    told = (
        f"{name}: {parameters} parameters, {model['layers']} layers, "
        f"{model['device']}, {model['dtype']}"
    )
    return f"{told}, {model['attention']}" if kernel else told


def _frames(source: Values) -> str:
    """How many frames, and where they are where that is one clip."""
    told = f"{source['frames']} frame{'s' if source['frames'] != 1 else ''}"
    times = [f"{time:.1f}" for time in cast("list[float]", source["timestamps"])]
    if len(list_in(source, "files")) > 1 or not times:
        return told
    shown = ", ".join(times) if len(times) <= 3 else f"{times[0]}, {times[1]} ... {times[-1]}"
    return f"{told} at {shown} s"
