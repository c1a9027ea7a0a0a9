"""Errors for running out of memory, with a keep or a number of frames that would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from vtprune.device import free_memory
from vtprune.errors import ModelError, VtpruneError
from vtprune.models import cost

if TYPE_CHECKING:
    from vtprune.engine.trace import Trace
    from vtprune.models.loading import Loaded
    from vtprune.preset import Preset

HEADROOM = 0.8  # of the free memory; the rest is fragmentation and other users
FEWER = "give fewer frames (--frames 8) or tiles (--max-tiles 4)"
SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "defaultcpuallocator")


class OutOfMemoryError(ModelError):
    """A prompt, or a batch of them, that the device's memory does not hold."""


@contextmanager
def explain_out_of_memory(loaded: Loaded, preset: Preset, trace: Trace) -> Iterator[None]:
    """Turn running out of memory into an error that names what would fit."""
    with as_memory_error(lambda: explain(loaded, preset, trace)):
        yield


@contextmanager
def as_memory_error(tell: Callable[[], tuple[str, str]]) -> Iterator[None]:
    """Turn running out of memory into an error.

    Args:
        tell: its message and hint.
    """
    try:
        yield
    except VtpruneError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(*tell()) from error


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error is one of memory, on any device."""
    certain = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return certain or any(sign in str(error).lower() for sign in SIGNS)


def explain(loaded: Loaded, preset: Preset, trace: Trace) -> tuple[str, str]:
    """Return message and hint for a prompt that did not fit."""
    device = loaded.model.device
    begun = trace.begun or trace
    visual = len(begun.layouts[0]) if begun.layouts else 0
    if not visual:
        return (
            f"out of memory on {device} while the vision tower encoded the media",
            FEWER,
        )
    frames = len(set(begun.layouts[0].grid.frame.tolist()))
    fitting = fit_tokens(loaded, begun.text[0])
    share = 0.5 if fitting is None else min(fitting / visual, 0.5)
    asked = preset.keep_for("video" if frames > 1 else "image") or 1.0
    keep = max(0.01, round(min(share, asked / 2), 2))
    hint = f"try --keep {keep:g}"
    if frames > 1:
        hint += f" or --frames {max(1, int(frames * share))}"
    return f"out of memory on {device} with {visual} visual tokens", hint


def fit_tokens(loaded: Loaded, text: int) -> int | None:
    """Return how many visual tokens should fit in the free memory; None: not known."""
    shape = loaded.measured_decoder
    if isinstance(shape, cost.CostError):
        return None
    size = loaded.model.dtype.itemsize
    cached = cost.kv_bytes(shape, [1] * shape.layers, size)
    activations = size * cost.activations(shape)
    return max(0, int(HEADROOM * free_memory(loaded.model.device) / (cached + activations)) - text)
