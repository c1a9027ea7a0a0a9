"""What the calls of one thread have left for those that follow, in one block."""

from __future__ import annotations

import threading

from vtprune.cuts import Batch
from vtprune.hooks import Hooks, this_thread

Kwargs = dict[str, object]


class ThreadState(threading.local):
    """What a block knows of the running thread's calls: every thread sees attributes of its own.

    Generation calls the encoders, then the model, then its decoder, all in one thread.

    Attributes:
        calls: modality -> the arguments of its encoder's last call by name, and under the name of
            the state what its tower attended to, if a method asks.
        encoding: whether an encoder runs.
        seconds: that all encoder calls since the last prefill took.
        batch: the prompts with visual tokens that the decoder is to be given; None: it is not.
        modalities: that were encoded for them.
        hooks: of the decoder's forward that runs.
    """

    def __init__(self) -> None:
        self.calls: dict[str, Kwargs] = {}
        self.encoding = False
        self.seconds = 0.0
        self.batch: Batch | None = None
        self.modalities: tuple[str, ...] = ()
        self.hooks = Hooks(this_thread())
