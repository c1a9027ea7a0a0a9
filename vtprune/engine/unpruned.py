"""A model that can't be pruned, at keep 1: it runs as it is; its prompts are described as ever."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from vtprune.engine.attention_mask import read_prompts
from vtprune.engine.inputs import PreparedInputs
from vtprune.engine.trace import Trace
from vtprune.errors import ModelError
from vtprune.models import find_family
from vtprune.models.base import PIXELS, Family
from vtprune.models.batch_layout import lay_out_batch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Unpruned:
    """What the layout of a prompt needs of a model whose structure is not known."""

    family: Family
    config: PreTrainedConfig

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    def placeholders(self) -> dict[str, tuple[int, ...]]:
        return self.family.placeholders(self.config)


def describe_unpruned(
    trace: Trace, wrapped: nn.Module, inputs: PreparedInputs, reason: ModelError
) -> None:
    """Fill a trace with all that is known of prompts from which nothing is dropped.

    Args:
        wrapped: the model.
        reason: why it can't be pruned.
    """
    trace.warn(f"{reason.message}; so nothing is dropped, at keep 1 only")
    trace.unpruned = True
    config = cast("PreTrainedModel", wrapped).config
    if inputs.pixels is None:
        return
    tensors = inputs.pixels.tensors
    model = Unpruned(find_family(str(config.model_type)), config)
    if getattr(config, "is_encoder_decoder", False) or not model.placeholders():
        trace.warn(
            f"{model.model_type}: its prompts hold no placeholders of visual tokens, so these are "
            "not counted"
        )
        return
    ids, valid = read_prompts(tensors["input_ids"], tensors.get("attention_mask"))
    vision = {modality: tensors for name, modality in PIXELS.items() if name in tensors}
    trace.layouts, warnings = lay_out_batch(model, ids, valid, vision, None, inputs.media)
    trace.kept = list(trace.layouts)
    visual = [len(layout) for layout in trace.layouts]
    trace.text = (valid.sum(1) - torch.tensor(visual)).tolist()
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None) or 1
    trace.visual_by_layer = [[count] * layers for count in visual]
    trace.full_size = list(inputs.pixels.full_size)
    for warning in warnings:
        trace.warn(warning)
