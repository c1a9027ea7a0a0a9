"""Where figures come from: the machine, and the content of the media. Without torch at import."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Iterable
from pathlib import Path


@functools.cache
def machine_facts() -> dict[str, object]:
    """Return the names of CPU and GPUs, the cores, the system and Python's version."""
    import torch

    from vtprune.device import cpu_name

    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        gpus.append("Apple GPU")
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "gpus": gpus,
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def file_digests(files: Iterable[str | Path]) -> dict[str, str | None]:
    """Return the SHA-256 of each file's bytes; None where it is no file, or can't be read."""
    return {str(file): _digest_of(str(file).partition("#page=")[0]) for file in files}


def _digest_of(file: str) -> str | None:
    try:
        status = os.stat(file)
        return _file_digest(file, status.st_size, status.st_mtime_ns)
    except (OSError, ValueError):
        return None


@functools.lru_cache(maxsize=4096)
def _file_digest(file: str, size: int, changed: int) -> str:
    """Return the SHA-256 of a file, read once as long as its size and time are the same."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
