"""Models whose weights have shapes and no values."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from vtprune.models.transformers_messages import loading_errors, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

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


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Within it, modules of this thread get parameters without values, and buffers with theirs."""
    register, thread = nn.Module.register_parameter, threading.get_ident()

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        in_thread = threading.get_ident() == thread
        if param is not None and in_thread and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
