"""Models without a checkpoint: their structure alone, or with random weights, whole or shallow."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from vtprune.models import find_family
from vtprune.models.upstream import loading_errors, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from vtprune.models.base import Family

BLOCK = 2**20  # random numbers that are drawn; more weights than that repeat them
SCALE = 0.02


def build_skeleton(config: PreTrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """Return a model whose weights have shapes and no values: on the "meta" device, in no memory.

    Raises:
        ModelError: the config can't be built, or not with this attention kernel.
    """
    from transformers import AutoModelForImageTextToText, initialization

    config = copy.deepcopy(config)
    options = {} if attention is None else {"attn_implementation": attention}
    with quiet(), loading_errors(str(config.model_type)):
        with weights_on_meta(), initialization.no_init_weights():
            model = AutoModelForImageTextToText.from_config(config, dtype=config.dtype, **options)
        model.tie_weights()
    model.generation_config.eos_token_id = None  # an answer never ends early
    model.generation_config.pad_token_id = 0
    return model.eval()


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Within it, modules get parameters without values; their buffers are computed as usual."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_random(
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None = None,
    own_layers: int | None = None,
) -> PreTrainedModel:
    """Return a model with random weights: as fast, and as large, as one that was trained.

    Weights repeat one block of random numbers, which takes seconds where drawing them all would
    take minutes; those of norms are 1, biases 0.

    Args:
        own_layers: decoder layers after so many use the weights of the first ones again.
    """
    config = copy.deepcopy(config)
    config.dtype = dtype
    model = build_skeleton(config, attention)
    layers = model.get_decoder().layers  # type: ignore[union-attr]
    for number in range(own_layers or len(layers), len(layers)):
        share_weights(layers[number], layers[number % (own_layers or 1)])
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(BLOCK, generator=generator) * SCALE).to(device, dtype)
    filled: dict[int, nn.Parameter] = {}
    with torch.no_grad():
        for module in model.modules():
            for name, param in list(module.named_parameters(recurse=False)):
                if id(param) not in filled:  # tied weights stay tied
                    values = torch.empty(param.shape, dtype=param.dtype, device=device)
                    fill(values, name, block)
                    filled[id(param)] = nn.Parameter(values, requires_grad=False)
                module.register_parameter(name, filled[id(param)])
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.to(device)
    return model


def share_weights(module: nn.Module, source: nn.Module) -> None:
    """Give a module the weights of another of its kind."""
    for part, other in zip(module.modules(), source.modules(), strict=True):
        for name, param in other.named_parameters(recurse=False):
            part.register_parameter(name, param)


def fill(values: torch.Tensor, name: str, block: torch.Tensor) -> None:
    """Give one weight its values, in place."""
    if values.dim() < 2 and name in ("weight", "bias"):
        values.fill_(1.0 if name == "weight" else 0.0)
        return
    flat = values.view(-1)
    for start in range(0, len(flat), BLOCK):
        part = flat[start : start + BLOCK]
        part.copy_(block[: len(part)])


def count_weights(module: nn.Module) -> int:
    """Return the number of parameters of a module, tied ones once."""
    return sum(weight.numel() for weight in module.parameters())


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """Return the kind of each decoder layer: "" where all are alike."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is None or len(set(kinds)) == 1:
        return [""] * int(text.num_hidden_layers)
    return [str(kind) for kind in kinds]


def tower_kinds(config: PreTrainedConfig) -> list[str]:
    """Return the kind of each layer of the vision tower: some have windows in most layers."""
    return family_of(config).tower_kinds(config)


def family_of(config: PreTrainedConfig) -> Family:
    family = find_family(str(config.model_type))
    assert family is not None, "only models of listed families are built"
    return family


def shallow_config(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """Return the config of a model with few layers, every kind of layer among them.

    Args:
        depth: of the decoder: the kinds follow each other, over and over. The tower gets one layer
            of each of its kinds, or as many as its features are taken from.
    """
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    kinds = list(dict.fromkeys(layer_kinds(config)))
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        cycle = kinds if len(kinds) > 1 else [text.layer_types[0]]
        text.layer_types = [cycle[number % len(cycle)] for number in range(depth)]
    if getattr(text, "rope_scaling_layers", None) is not None:
        text.rope_scaling_layers = list(range(depth))
    family_of(shallow).shorten_tower(shallow)
    return shallow
