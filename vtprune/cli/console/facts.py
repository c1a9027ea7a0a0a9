"""What several tables say of a run: what was read, which model, whether pruning pays."""

from __future__ import annotations

import os
from itertools import groupby
from typing import TYPE_CHECKING

from vtprune.cli.console.terminal import printable
from vtprune.cli.console.values import duration, si
from vtprune.errors import LONGEST_PATH, one_line
from vtprune.inference.wording import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtprune.inference.report import InputInfo, ModelInfo


def asked_fact(questions: int, files: int) -> str:
    """Return how many questions were asked, and about how many files."""
    return f"{counted(questions, 'question')} about {counted(files, 'file')}"


def read_fact(media: InputInfo) -> str:
    """Return the files, and how much of them was read."""
    files = _file_names(media.files)
    names = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    parts = [f"{names}: {media.modality}"]
    if len(media.files) == 1:
        parts[0] += f" {media.width} x {media.height}"
    if media.duration:
        parts.append(duration(media.duration))
    if media.frames:
        parts.append(_frames(media))
    if media.tiles > 1:
        parts.append(f"{media.tiles} tiles")
    return f"{', '.join(parts)} ({media.decoder})"


def _file_names(files: Sequence[str]) -> list[str]:
    """Return the files' names without their folders; of the pages of one file its name once."""
    names: list[str] = []
    for path, group in groupby(files, lambda file: file.partition("#page=")[0]):
        pages = [file.partition("#page=")[2] for file in group]
        name = one_line(os.path.basename(path) or path, LONGEST_PATH)
        if not pages[0]:
            names += [name] * len(pages)
            continue
        more = f" and {len(pages) - 8} more" if len(pages) > 8 else ""
        names.append(f"{name} page{'s' if len(pages) > 1 else ''} {' '.join(pages[:8])}{more}")
    return names


def model_fact(model: ModelInfo, kernel: bool = True) -> str:
    """Return a model's name and size, and what it runs on.

    Args:
        kernel: name the attention kernel, too.
    """
    parameters = si(model.parameters).replace("G", "B").strip()  # a billion
    name = printable(model.name)
    if model.adapter is not None:
        name += f" with {printable(model.adapter)}"
    text = f"{name}: {parameters} parameters, {model.layers} layers, {model.device}, {model.dtype}"
    return f"{text}, {model.attention}" if kernel else text


def _frames(media: InputInfo) -> str:
    """Return how many frames were read and, of a single file, at which times."""
    text = f"{media.frames} frame{'s' if media.frames != 1 else ''}"
    times = [f"{time:.1f}" for time in media.timestamps]
    if len(media.files) > 1 or not times:
        return text
    listed = ", ".join(times) if len(times) <= 3 else f"{times[0]}, {times[1]} ... {times[-1]}"
    return f"{text} at {listed} s"
