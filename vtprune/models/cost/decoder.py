"""What a language model costs: FLOPs of prefill and decoding, bytes of its cache.

EntropyPrune (arXiv 2602.17196) reports `layers_flops`: with as many key-value heads as heads it is
its 8 n d^2 + 4 n^2 d + 6 n d m a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from vtprune.models.cost.sizes import kind_of, list_of, size_of, uncounted

# Decoders whose MLP is two matrices, up and down; everything else has a gate as well.
UNGATED = frozenset({"gpt_neox", "nemotron", "persimmon", "phi", "starcoder2"})
# What configs call their number of experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class _Mixture:
    """Where a model type's config has the sizes of its mixture of experts.

    Args:
        width: name of an expert's width.
        shared: name of the shared experts' width together; "" where there are none.
        num_shared: name of their number, where each is as wide as an expert.
        shared_gate: whether one output of a matrix weighs the shared experts.
    """

    width: str = "moe_intermediate_size"
    shared: str = ""
    num_shared: str = ""
    shared_gate: bool = False


# Mixtures of experts whose count was held against torch's; any other is not counted.
MIXTURES = {
    **dict.fromkeys(("gpt_oss", "granitemoe", "mixtral", "olmoe", "phimoe"),
                    _Mixture("intermediate_size")),
    **dict.fromkeys(("qwen3_moe", "qwen3_vl_moe_text"), _Mixture()),
    **dict.fromkeys(("dots1", "glm4_moe", "glm4v_moe_text"),
                    _Mixture(num_shared="n_shared_experts")),
    "ernie4_5_moe": _Mixture(num_shared="moe_num_shared_experts"),
    "granitemoeshared": _Mixture("intermediate_size", shared="shared_intermediate_size"),
    "qwen2_moe": _Mixture(shared="shared_expert_intermediate_size", shared_gate=True),
}  # fmt: skip


@dataclass(frozen=True)
class Experts:
    """The sizes of a mixture of experts in place of a layer's MLP.

    Args:
        num_experts: rows of the router.
        active: experts that a token goes through.
        intermediate: width of an expert.
        sparse: for every layer, whether it has experts; the others have an MLP.
        shared: width of what every token goes through besides.
        shared_gate: whether one output of a matrix weighs the shared experts.
    """

    num_experts: int
    active: int
    intermediate: int
    sparse: tuple[bool, ...]
    shared: int = 0
    shared_gate: bool = False


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
        experts: in some or all of the layers; None: every layer has an MLP.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gated: bool = True
    experts: Experts | None = None


def decoder_shape(text_config: object) -> DecoderShape:
    """The shape of a language model, from its transformers config (`config.get_text_config()`).

    Raises:
        CostError: a size is missing, or this kind of layer is not counted.
    """
    if getattr(text_config, "kv_lora_rank", None):
        raise uncounted(text_config, "multi-head latent attention")
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
        experts=_experts(text_config),
    )


def _experts(config: object) -> Experts | None:
    names = MIXTURES.get(kind_of(config))
    numbers = [getattr(config, name, None) or 0 for name in EXPERTS]
    if names is None:
        if max(numbers) > 1:
            raise uncounted(config, "this kind of mixture of experts")
        return None
    width = size_of(config, names.width)
    shared = size_of(config, names.shared, 0) if names.shared else 0
    if names.num_shared:
        shared = width * size_of(config, names.num_shared, 0)
    return Experts(
        num_experts=max(numbers),
        active=size_of(config, "num_experts_per_tok"),
        intermediate=width,
        sparse=_sparse_layers(config),
        shared=shared,
        shared_gate=names.shared_gate and shared > 0,
    )


def _sparse_layers(config: object) -> tuple[bool, ...]:
    """For every layer, whether it has experts: each model type's own rule."""
    layers = range(size_of(config, "num_hidden_layers"))
    if getattr(config, "mlp_layer_types", None):
        kinds = cast("Sequence[str]", list_of(config, "mlp_layer_types"))
        return tuple(kind != "dense" for kind in kinds)
    if getattr(config, "decoder_sparse_step", None):
        step, dense = size_of(config, "decoder_sparse_step"), getattr(config, "mlp_only_layers", ())
        return tuple(layer not in (dense or ()) and (layer + 1) % step == 0 for layer in layers)
    if getattr(config, "moe_layer_interval", None):
        step, end = size_of(config, "moe_layer_interval"), size_of(config, "moe_layer_end_index")
        start = size_of(config, "moe_layer_start_index")
        last = end if end >= 0 else len(layers) - 1
        return tuple((layer + 1) % step == 0 and start <= layer <= last for layer in layers)
    first = size_of(config, "first_k_dense_replace", 0)
    return tuple(layer >= first for layer in layers)


def layer_flops(shape: DecoderShape, queries: int, keys: int, layer: int = -1) -> float:
    """FLOPs of a decoder layer for `queries` tokens that see `keys` keys, their own included.

    Args:
        layer: its number; it matters where some layers have experts and some an MLP.
    """
    heads = shape.heads * shape.head_dim
    kv_heads = shape.kv_heads * shape.head_dim
    mlp = (3 if shape.gated else 2) * shape.hidden * mlp_width(shape, layer)
    if shape.experts is not None and shape.experts.sparse[layer]:
        mlp += shape.hidden * (shape.experts.num_experts + shape.experts.shared_gate)
    linear = 2.0 * queries * (2 * shape.hidden * heads + 2 * shape.hidden * kv_heads + mlp)
    return linear + 4.0 * queries * keys * heads


def mlp_width(shape: DecoderShape, layer: int = -1) -> int:
    """Width of what a token goes through in a layer's MLP, or in its active and shared experts."""
    experts = shape.experts
    if experts is None or not experts.sparse[layer]:
        return shape.intermediate
    return experts.active * experts.intermediate + experts.shared


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
    return sum(
        layer_flops(shape, tokens, tokens, layer) for layer, tokens in enumerate(tokens_by_layer)
    )


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
    linear = sum(layer_flops(shape, 1, 0, layer) for layer in range(shape.layers))
    return steps * (linear + head_flops(shape)) + attention


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
