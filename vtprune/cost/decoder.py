"""What a language model costs: FLOPs of prefill and decoding, bytes of its cache.

EntropyPrune (arXiv 2602.17196) reports `layers_flops`: with as many key-value heads as heads it is
its 8 n d^2 + 4 n^2 d + 6 n d m a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vtprune.cost.sizes import kind_of, size_of
from vtprune.errors import ModelError

# Decoders whose MLP is two matrices, up and down; everything else has a gate as well.
UNGATED = frozenset({"gpt_neox", "nemotron", "persimmon", "phi", "starcoder2"})
# What configs call their number of experts; a mixture's cost depends on the router, not the shape.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a language model that its cost depends on.

    Args:
        layers: number of decoder layers.
        hidden: width of the residual stream.
        heads: query heads a layer.
        kv_heads: key-value heads a layer.
        head_dim: width of a head; heads x head_dim need not be `hidden`.
        intermediate: width of the MLP.
        vocab: rows of the output head.
        gated: whether the MLP has a gate (three matrices) or not (two).
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gated: bool = True


def decoder_shape(text_config: object) -> DecoderShape:
    """The shape of a language model, from its transformers config (`config.get_text_config()`).

    Raises:
        ModelError: a size is missing, or the MLPs are a mixture of experts.
    """
    for name in EXPERTS:
        if (getattr(text_config, name, None) or 0) > 1:
            raise ModelError(
                f"{kind_of(text_config)}: the FLOPs of a mixture of experts are not counted",
                hint="use a dense model of the same family",
            )
    hidden = size_of(text_config, "hidden_size")
    heads = size_of(text_config, "num_attention_heads")
    return DecoderShape(
        layers=size_of(text_config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=size_of(text_config, "num_key_value_heads", heads),
        head_dim=size_of(text_config, "head_dim", hidden // heads),
        intermediate=size_of(text_config, "intermediate_size"),
        vocab=size_of(text_config, "vocab_size"),
        gated=kind_of(text_config) not in UNGATED,
    )


def layer_flops(shape: DecoderShape, queries: int, keys: int) -> float:
    """FLOPs of one decoder layer for `queries` tokens that see `keys` keys, their own included."""
    heads = shape.heads * shape.head_dim
    kv_heads = shape.kv_heads * shape.head_dim
    mlp = (3 if shape.gated else 2) * shape.hidden * shape.intermediate
    linear = 2.0 * queries * (2 * shape.hidden * heads + 2 * shape.hidden * kv_heads + mlp)
    return linear + 4.0 * queries * keys * heads


def head_flops(shape: DecoderShape) -> float:
    """FLOPs of the output head at one position."""
    return 2.0 * shape.hidden * shape.vocab


def layers_flops(shape: DecoderShape, tokens_by_layer: Sequence[int]) -> float:
    """FLOPs of the decoder layers over a prompt, without the output head.

    Args:
        shape: the language model's shape.
        tokens_by_layer: tokens that each layer sees, text included, one number a layer.

    Raises:
        ValueError: not one number a layer.
    """
    _check_depth(shape, tokens_by_layer)
    return sum(layer_flops(shape, tokens, tokens) for tokens in tokens_by_layer)


def prefill_flops(shape: DecoderShape, tokens_by_layer: Sequence[int]) -> float:
    """`layers_flops`, and the output head at the prompt's last position."""
    return layers_flops(shape, tokens_by_layer) + head_flops(shape)


def decode_flops(shape: DecoderShape, tokens_by_layer: Sequence[int], answer_tokens: int) -> float:
    """FLOPs of the steps that follow the prefill, output head included.

    The first answer token comes from the prefill, so there are `answer_tokens` - 1 steps; step s
    (from 1) has one query and tokens + s keys in a layer that saw `tokens` of the prompt.

    Args:
        shape: the language model's shape.
        tokens_by_layer: prompt tokens in each layer's cache, text included.
        answer_tokens: tokens of the answer, the end-of-text token included.

    Raises:
        ValueError: not one number a layer.
    """
    _check_depth(shape, tokens_by_layer)
    steps = max(answer_tokens - 1, 0)
    keys = sum(steps * tokens + steps * (steps + 1) // 2 for tokens in tokens_by_layer)
    attention = 4.0 * keys * shape.heads * shape.head_dim
    return steps * (shape.layers * layer_flops(shape, 1, 0) + head_flops(shape)) + attention


def kv_bytes(shape: DecoderShape, tokens_by_layer: Sequence[int], bytes_per_value: int) -> int:
    """Bytes of the keys and values of the tokens in each layer's cache.

    Raises:
        ValueError: not one number a layer.
    """
    _check_depth(shape, tokens_by_layer)
    return 2 * shape.kv_heads * shape.head_dim * bytes_per_value * sum(tokens_by_layer)


def _check_depth(shape: DecoderShape, tokens_by_layer: Sequence[int]) -> None:
    if len(tokens_by_layer) != shape.layers:
        raise ValueError(
            f"{len(tokens_by_layer)} token counts for {shape.layers} layers; give one a layer"
        )
