"""What the calls of one thread have left for those that follow, in one block."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import nn

from vtprune.engine.cuts import Batch
from vtprune.engine.hooks import Hooks, this_thread
from vtprune.models.seams import PLACING, ROPE_DELTAS

Kwargs = dict[str, object]
_PLACING = threading.RLock()
"""Held while a model places tokens: blocks that are open at once wait for each other."""


class ThreadState(threading.local):
    """What a block knows of the running thread's calls: every thread sees attributes of its own.

    Generation calls the encoders, then the model, then its decoder, all in one thread.

    Attributes:
        calls: modality -> the arguments of its encoder's last call by name, and under the name of
            the state what its tower attended to, if a method asks.
        encoding: whether an encoder runs.
        seconds: that all encoder calls since the last prefill took.
        batch: the prompts with visual tokens that the decoder is to be given; None: it is not.
        modalities: that were encoded for them, here or before the block.
        uncached: (B, S) ids of the last prompt, if that was given no cache.
        hooks: of the decoder's forward that runs.
    """

    def __init__(self) -> None:
        self.calls: dict[str, Kwargs] = {}
        self.encoding = False
        self.seconds = 0.0
        self.batch: Batch | None = None
        self.modalities: tuple[str, ...] = ()
        self.uncached: torch.Tensor | None = None
        self.hooks = Hooks(this_thread())


class RopeDeltas(threading.local):
    """What a model with positions in time, row and column (mrope) notes of its last prompt.

    Transformers (5.17 to 5.24) keeps it on the model, where further turns and hand-written decoding
    find it: the prompt of another thread would have replaced it. So every thread gets its own back.
    All threads' calls are watched, also where the block is about one thread's.

    Args:
        inner: the multimodal model.
    """

    def __init__(self, inner: nn.Module) -> None:
        self.inner = inner

    def attach(self, model: nn.Module, hooks: Hooks) -> None:
        """Watch the methods that read or write it.

        Args:
            model: `inner`, or what it is a part of.
            hooks: of all threads.
        """
        if not hasattr(self.inner, ROPE_DELTAS):
            return
        for module in model.modules():
            if module is self.inner or module._modules.get("model") is self.inner:
                for name in PLACING:
                    if hasattr(module, name):
                        hooks.replace(module, name, self.place)

    def place(self, original: Callable[..., object], *args: object, **kwargs: object) -> object:
        """Place tokens by the last prompt of the running thread."""
        with _PLACING:
            if hasattr(self, "deltas"):
                setattr(self.inner, ROPE_DELTAS, self.deltas)
            try:
                return original(*args, **kwargs)
            finally:
                self.deltas: object = getattr(self.inner, ROPE_DELTAS)
