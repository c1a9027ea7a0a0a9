"""Many questions in one process: files, threads and hooks stay as they are.

`python tests/test_many_questions.py 500` prints what 500 of them leave, memory too.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
from conftest import save_noise

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


def watch(count: int) -> None:
    """Ask many questions, and print what the process holds after every hundred."""
    loaded, process = vtprune.load(), psutil.Process()
    with tempfile.TemporaryDirectory() as name:
        pictures = [save_noise(Path(name, f"{n}.png"), 70, 90 + 10 * n) for n in range(4)]
        for number in range(1, count + 1):
            way = WAYS[number % 2]
            question = f"what is number {number % 7}?"
            vtprune.ask(loaded, pictures[number % 4], question, generation=SHORT, **way)  # type: ignore[arg-type]
            if number % min(100, count) == 0:
                values = {**held(loaded), "objects": len(gc.get_objects())}
                text = ", ".join(f"{value} {what}" for what, value in values.items())
                memory = process.memory_info().rss / 1e6
                sys.stdout.write(f"{number}: {text}, {memory:.0f} MB\n")
                sys.stdout.flush()


if __name__ == "__main__":
    watch(int(sys.argv[1]))
