"""Models whose weights have shapes and no values."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vtprune.models.transformers_messages import loading_errors, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LARGE = 2**24
"""Values of a tensor that is no buffer."""
# While it builds a model, transformers 5 replaces functions that all models share: `tie_weights` of
# their class, torch's initialisation. Of two threads, the second one would put them back too late.
BUILDING = threading.RLock()


def build_skeleton(config: PreTrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """Return a model whose weights have shapes and no values: on the "meta" device, in no memory.

    Raises:
        ModelError: the config can't be built, or not with this attention kernel.
    """
    from transformers import AutoModelForImageTextToText, initialization

    config = copy.deepcopy(config)
    options = {} if attention is None else {"attn_implementation": attention}
    with BUILDING, quiet(), loading_errors(str(config.model_type)):
        with weights_on_meta(), initialization.no_init_weights():
            model = AutoModelForImageTextToText.from_config(config, dtype=config.dtype, **options)
        model.tie_weights()
    model.generation_config.eos_token_id = None  # an answer never ends early
    model.generation_config.pad_token_id = 0
    return model.eval()


class _LargeOnMeta(TorchFunctionMode):
    """Makes large tensors of zeros without values: weights of many experts, in a class's code."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func in (torch.zeros, torch.ones, torch.empty, torch.randn):
            size = args[0] if args and not isinstance(args[0], int) else args
            if math.prod(options.get("size", size)) > LARGE:
                options["device"] = "meta"
        return func(*args, **options)


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Give new modules of this thread parameters without values, and buffers with theirs."""
    register, thread = nn.Module.register_parameter, threading.get_ident()

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        in_thread = threading.get_ident() == thread
        if param is not None and in_thread and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
