"""Checks of what a device has still to work out, done without having the host wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from vtprune.device import Delivery
from vtprune.engine.hooks import this_thread

Check = Callable[[torch.Tensor], None]
"""Numbers on the CPU -> nothing; it raises what is wrong with them."""


class LateChecks:
    """The checks of one block that are begun and not done.

    A GPU has nothing to do while the host waits for it. So what is to be checked goes on its way to
    the host, which reads it in a later forward of the same thread, once it is here, or when the
    block is left.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: list[tuple[object, Delivery, Check]] = []

    def begin(self, numbers: torch.Tensor, check: Check) -> None:
        """Check numbers on any device: at once on a CPU, else as soon as they are here."""
        delivery = Delivery(numbers)
        if delivery.is_here:
            check(delivery.read())
            return
        with self._lock:
            self._begun.append((this_thread(), delivery, check))

    def do_ready(self) -> None:
        """Do those that the running thread began, as far as their numbers are here."""
        if self._begun:
            self._do(lambda thread, delivery: thread is this_thread() and delivery.is_here)

    def do_all(self) -> None:
        """Wait for all numbers, and check them."""
        self._do(lambda thread, delivery: True)

    def _do(self, is_due: Callable[[object, Delivery], bool]) -> None:
        due: list[tuple[object, Delivery, Check]] = []
        later: list[tuple[object, Delivery, Check]] = []
        with self._lock:
            for entry in self._begun:
                (due if is_due(entry[0], entry[1]) else later).append(entry)
            self._begun = later
        for _, delivery, check in due:
            check(delivery.read())
