"""Another attention kernel in a loaded model, and its own again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vtprune.errors import ModelError
from vtprune.evaluation.checking.oracle import KERNEL

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def kernel_of(model: PreTrainedModel) -> str:
    """Return the attention kernel of a model's decoder."""
    return str(getattr(model.get_decoder().config, KERNEL, "eager"))


def other_kernel(model: PreTrainedModel) -> str:
    """Return an attention kernel that a model's decoder does not use."""
    return "sdpa" if kernel_of(model) == "eager" else "eager"


@contextmanager
def attention_kernel(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run all parts of a model with another attention kernel.

    Raises:
        ModelError: a part has no such kernel.
    """
    from transformers import PreTrainedModel

    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    before = [getattr(part.config, KERNEL) for part in parts]
    try:
        try:
            model.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            raise ModelError(f"attention {name!r} does not run here: {error}") from error
        if kernel_of(model) != name:  # transformers only warns where a model can't change it
            raise ModelError(f"{type(model).__name__} can't change its attention kernel")
        yield
    finally:
        for part, own in zip(parts, before, strict=True):  # a part after what it is a part of
            part.set_attn_implementation(own)
