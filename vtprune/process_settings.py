"""Settings of the whole process, changed for a time and put back."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager


class ProcessSetting:
    """A context manager, for several threads, over one that changes a setting of the process.

    The first thread that enters makes the change, the last one that leaves undoes it. With a plain
    context manager, the second thread would save the value that the first one set, and put that
    back in the end: the change would stay for good.

    Args:
        make: returns the context manager that makes the change and undoes it.
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
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Give the process, and those that it starts, environment variables.

    For one thread at a time; for several, in a ProcessSetting.
    """
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _ignore_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


WARNINGS_OFF = ProcessSetting(_ignore_warnings)
"""Python's warnings off: their filters are the process's, also in `warnings.catch_warnings`."""
