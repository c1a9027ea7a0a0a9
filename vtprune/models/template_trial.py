"""A chat template's first run on each form of conversation, in a process that has bounds.

A template is code of whoever made the checkpoint. jinja2's sandbox, in which transformers runs it,
keeps it from files and other objects; it does not keep it from running for ever (`9**(9**9)`) or
from filling the memory (`"x" * 10**10`).
"""

from __future__ import annotations

import os
import select
import signal
import threading
import warnings
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path

from vtprune.errors import ModelError

LONGEST_SECONDS = 10.0
MOST_MEMORY = 2**30  # bytes beyond what the process holds
MOST_CHARACTERS = 2**24
MOST_TRIED = 10_000  # forms that are remembered, which clients of a server choose
RENDERED, TOO_LARGE, TOO_LONG = b"0", b"1", b"2"

_tried: set[int] = set()  # hashes, as clients choose how long a form is
_trial = threading.Lock()


def try_template(case: Hashable, render: Callable[[], str]) -> None:
    """Render a conversation with bounds, the first time that a case is met.

    A case is a template with a form of conversation: what a template does for the first turn says
    nothing of a second one. Of what depends on the words of a conversation it says nothing either.
    Threads that meet it at once wait for the first of them. What the template itself raises is
    left to the rendering that follows. Without `os.fork` (on Windows) nothing is bounded; where the
    system takes no limit of memory (macOS), time alone is.

    Raises:
        ModelError: rendering takes too much time or memory, or writes too much text.
    """
    key = hash(case)
    if key in _tried or not hasattr(os, "fork"):
        return
    # From Python 3.12 on, filelock (of the hub's client) refuses a fork while another one begins.
    with _trial:
        if key not in _tried:
            _try_once(render)
            if len(_tried) >= MOST_TRIED:
                _tried.clear()
            _tried.add(key)


def _forget_trial() -> None:
    """Let a process that was forked during a trial have trials of its own."""
    global _trial
    _trial = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_trial)


def _try_once(render: Callable[[], str]) -> None:
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads: the child uses none of them
        child = os.fork()
    if not child:
        _render_bounded(render, writer)
    verdict = b""
    try:
        os.close(writer)
        if select.select([reader], [], [], LONGEST_SECONDS)[0]:
            verdict = os.read(reader, 1) or TOO_LARGE  # ended by the system, which had no memory
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    faults = {
        b"": f"runs for more than {LONGEST_SECONDS:.0f} seconds",
        TOO_LARGE: f"needs more than {MOST_MEMORY / 2**30:.0f} GiB of memory",
        TOO_LONG: f"writes more than {MOST_CHARACTERS:,} characters",
    }
    if verdict in faults:
        raise ModelError(
            f"the checkpoint's chat template {faults[verdict]}",
            "take the chat template of the model's own repository",
        )


def _render_bounded(render: Callable[[], str], writer: int) -> None:
    """Render, write the verdict, and end this process at once."""
    verdict = TOO_LARGE
    try:
        _limit_memory()
        verdict = RENDERED if len(render()) <= MOST_CHARACTERS else TOO_LONG
    except MemoryError:
        pass
    except BaseException:  # the process that asked meets it too, and says it
        verdict = RENDERED
    finally:
        os.write(writer, verdict)
        os._exit(0)


def _limit_memory() -> None:
    import resource

    with suppress(OSError, ValueError):
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (held + MOST_MEMORY, hard))
