"""Changes to the whole process, made by the first thread that needs them, undone by the last."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


class ProcessWide:
    """A context manager for several threads, over one that changes what all threads share.

    Entered by one thread after the other, the latter would find what the former set, and would put
    it back in the end: the change would stay for good.

    Args:
        make: gives the context manager that makes the change and undoes it.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self.make = make
        self.lock = threading.Lock()
        self.num_inside = 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.num_inside:
                self.change = self.make()
                self.change.__enter__()
            self.num_inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.num_inside -= 1
            if not self.num_inside:
                self.change.__exit__(None, None, None)


@contextmanager
def _ignore_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


WARNINGS_OFF = ProcessWide(_ignore_warnings)
"""Python's warnings off: their filters are the process's, also in `warnings.catch_warnings`."""
