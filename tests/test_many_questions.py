"""Many questions in one process: files, threads and hooks stay as they are."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import psutil
import pytest

import vtprune

SHORT = vtprune.Generation(max_new_tokens=4)
WAYS = (
    {"preset": "balanced", "keep": 0.2},
    {"preset": "fast", "keep": 0.5},
    {"method": "fastv", "at": "2", "keep": 0.4},
    {"method": "visionzip", "keep": 0.3},
    {"keep": 1.0},
)


def held(loaded: vtprune.Loaded) -> dict[str, int]:
    """What a question could leave behind: files, threads, hooks and attributes."""
    gc.collect()
    modules = list(loaded.model.modules())
    return {
        "handles": psutil.Process().num_fds() if os.name == "posix" else 0,
        "threads": threading.active_count(),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "attributes": sum(len(vars(module)) for module in modules),
    }


def test_many_questions_leave_nothing_behind(loaded: vtprune.Loaded, picture: Path) -> None:
    def ask(count: int) -> None:
        for number in range(count):
            way = WAYS[number % len(WAYS)]
            vtprune.ask(loaded, picture, f"what is number {number}?", generation=SHORT, **way)  # type: ignore[arg-type]
            with pytest.raises(vtprune.VtpruneError):
                vtprune.ask(loaded, picture.parent / "missing.png", "what?", keep=0.5)

    ask(len(WAYS))
    before = held(loaded)
    ask(3 * len(WAYS))
    assert held(loaded) == before
