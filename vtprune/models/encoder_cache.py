"""A cache on disk of what a model's vision encoders give, and what tells one model from another."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vtprune import __version__
from vtprune.disk_cache import DiskCache, digest
from vtprune.errors import ModelError
from vtprune.models.structure import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

THREADS = 8
ELSEWHERE = ("transformers_version", "architectures", "dtype", "torch_dtype", "quantization_config")
"""Fields of a config that a model's features and media do not follow from, or that loading adds."""


@dataclass(frozen=True)
class EncoderCache:
    """A cache, for the encoders of one model.

    Args:
        model: all of the model that features follow from, as a text.
    """

    disk: DiskCache
    model: str


def open_encoder_cache(disk: DiskCache, structure: Structure) -> EncoderCache:
    """Return a cache for the encoders of a model.

    Raises:
        ModelError: some of their weights are not in memory.
    """
    import transformers

    model, device = structure.model, structure.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    described = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": describe_config(model.config),
        "dtype": str(model.dtype),
        "attention": attention_kernels(model.config),
        "device": name,
        "precision": torch.get_float32_matmul_precision(),
        "versions": [__version__, torch.__version__, transformers.__version__],
        "weights": digest_weights(structure),
    }
    return EncoderCache(disk, json.dumps(described, sort_keys=True, default=str))


def digest_weights(structure: Structure) -> str:
    """Return a digest of all weights that features can follow from: those of no decoder layer.

    An adapter's are among them, and so are weights that were changed after loading.
    """
    left_out = {
        id(tensor) for tensor in (*structure.decoder.parameters(), *structure.decoder.buffers())
    }
    embeddings = getattr(structure.decoder, "get_input_embeddings", lambda: None)()
    if embeddings is not None:  # some encoders choose features among the embeddings of words
        left_out -= {id(tensor) for tensor in embeddings.parameters()}
    inner = structure.inner
    tensors = [
        (name, tensor)
        for name, tensor in (*inner.named_parameters(), *inner.named_buffers())
        if id(tensor) not in left_out
    ]
    if any(tensor.is_meta for _, tensor in tensors):
        raise ModelError(
            "--cache needs all weights of the vision tower in memory, and some are left on disk",
            "leave --cache out, or load the model on a device that holds it",
        )
    with ThreadPoolExecutor(THREADS) as pool:
        return " ".join(pool.map(lambda pair: digest(dict([pair])), tensors))


def describe_config(config: PreTrainedConfig) -> str:
    """Return what a config says of the model, without what differs between loading and loaded."""
    return json.dumps(_plain(config.to_dict()), sort_keys=True, default=str)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {
            str(name): _plain(inner)
            for name, inner in value.items()
            if not str(name).startswith("_") and name not in ELSEWHERE
        }
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def attention_kernels(config: PreTrainedConfig) -> list[str]:
    """Return the attention kernels of a model's parts."""
    parts = [config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}))]
    return [str(getattr(part, "_attn_implementation", None)) for part in parts]
