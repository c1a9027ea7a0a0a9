"""torch's own count of FLOPs, and models on which a wrong count shows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from vtprune.inference.measuring import compute_vision_flops
from vtprune.models import find_family
from vtprune.models.anyres import best_resolution, count_tiles
from vtprune.models.base import Files, Inputs
from vtprune.models.cost import VisionShape
from vtprune.models.loading import Loaded

LLAVA_TOWER = VisionShape(
    layers=24,
    hidden=1024,
    intermediate=4096,
    patch=14,
    inputs=588,
    projector=((1024, 4096), (4096, 4096)),
    extra=1,
)
"""Tower and projector of LLaVA-1.5-7B."""
AGREES = 1e-3
"""transformers 5.17 has a matrix product in its rotary embedding; 5.23 agrees exactly."""
WIDE_HEADS = ("qwen3_vl", "gemma3", "molmo2", "llava_next_mistral")
"""Models whose heads together need not be as wide as the decoder."""
ADAPTER = {"num_attention_heads": 4, "head_dim": 6, "num_key_value_heads": 2,
           "intermediate_size": 40, "vision_feature_layer": [1, 0, 1]}  # fmt: skip


@functools.cache
def uneven(name: str) -> PreTrainedModel:
    """A tiny model with few widths alike, so that none stands in for another.

    Its attention is eager: the counter does not know sdpa on a CPU.
    """
    fields = tiny.FAMILIES[name].config(partial(tiny.token, name))
    changed: dict[str, Any] = {}
    if name in WIDE_HEADS:
        changed["text_config"] = fields["text_config"] | {"head_dim": 24}
    if name == "qwen3_vl":
        rope = {"rope_type": "default", "mrope_section": [4, 4, 4]}
        changed["text_config"] |= {"rope_parameters": rope}
    if name == "qwen2_5_vl":  # rounded down to windows of 2 x 2 merged tokens
        changed["vision_config"] = fields["vision_config"] | {"window_size": 5 * tiny.PATCH}
    if name == "molmo2":
        changed["adapter_config"] = fields["adapter_config"] | ADAPTER
    return tiny.model(name, attention="eager", **changed)


def count(run: Callable[[], object]) -> int:
    """FLOPs of everything that `run` does, as torch counts them."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def loaded(model: PreTrainedModel) -> Loaded:
    """As much of a loaded model as its figures need."""
    return Loaded("tiny", model, cast(Files, None), find_family(str(model.config.model_type)))


def as_encoded(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> Inputs:
    """Made-up inputs, with the number of tiles that each picture really has."""
    tiles: tuple[int, ...] = ()
    if "image_sizes" in tensors:
        sizes = tensors["image_sizes"].tolist()
        resolutions = [best_resolution(size, tiny.PINPOINTS) for size in sizes]
        tiles = tuple(1 + count_tiles(resolution, tiny.TILE) for resolution in resolutions)
        if model.config.model_type == "llava_onevision" and len(sizes) > 1:
            tiles = (1,) * len(sizes)
    return Inputs(dict(tensors), "", tiles)


def vision_flops(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> float:
    """The FLOPs that a report would give for tower and projector."""
    return compute_vision_flops(loaded(model), as_encoded(model, tensors))
