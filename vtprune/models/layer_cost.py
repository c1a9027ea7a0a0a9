"""What a token costs in each layer of a decoder: read from the layer's own modules.

Every product with weights is counted from the module that holds them, so that a new kind of layer
needs nothing here. What depends on the sequence (attention, linear attention) follows from the
sizes that such modules name.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from torch import nn

from vtprune.models.cost import Chunks, DecoderShape, LayerCost, uncounted
from vtprune.models.seams import BIAS, GIVEN_BIAS, LAST_ROWS, layer_config, sharing_kind

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

QUERIES = ("q_proj", "q_b_proj", "qkv_proj", "query_key_value", "att_proj", "Wqkv", "qkv")
OUTPUTS = ("o_proj", "out_proj", "dense", "attn_out", "wo", "proj")
"""What transformers' attention modules call their first and last projections."""
ROUTER = re.compile(r"Router|Gate")
TEXT_EXPERTS, VISUAL_EXPERTS = "text_moe.", "vision_moe."
"""What layers call experts that text or visual tokens alone go through (ERNIE 4.5 VL)."""
ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_k",
          "moe_topk")  # fmt: skip
"""What configs call their number of experts that a token goes through."""
DELTA = ("num_v_heads", "head_k_dim", "head_v_dim")
"""Sizes that modules of gated linear attention (delta rule) name."""
CHUNK = 64
"""Tokens of a chunk of the delta rule, in transformers 5.17 to 5.24."""
CHANNELWISE = ("num_heads", "head_dim", "qkv_dim", "conv_kernel_size")
"""Sizes that modules of the delta rule name in which each channel fades by itself (GLM-5-next)."""
MAMBA = ("num_heads", "head_dim", "ssm_state_size", "chunk_size")
"""Sizes that modules of Mamba 2 name."""
INDEX = ("n_heads", "head_dim", "index_topk")
"""Sizes that modules name which choose the keys of attention by scores of their own."""
HYPER = ("fn", "hc_fn")
"""What modules call the weights that several states of a token are mixed by (hyper-connections)."""
INDEX_POOL, INDEX_GATE = "index_kpool", "index_kpool_compress_gate"
"""How many keys such a module scores as one, and with which weights it makes them (GLM-5-next)."""
UNKNOWN = re.compile(r"Mamba|SSM|Delta|Recurr|Retention|RWKV|Linear\w*Attention|Indexer|Compress")
"""Names of modules that do what is not counted here."""


def measure_decoder(model: PreTrainedModel) -> DecoderShape:
    """Return the shape of a model's language model, with or without its weights.

    Raises:
        CostError: its layers are of a kind that can't be counted.
    """
    from vtprune.models.structure import find_decoder

    if getattr(model.config, "is_encoder_decoder", False):
        raise uncounted(model.config, "an encoder-decoder")
    decoder = find_decoder(model) if getattr(model, "get_decoder", lambda: None)() else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise uncounted(model.config, "a decoder without a list of layers")
    assert decoder is not None
    config = cast("PreTrainedConfig", decoder.config)
    head = model.get_output_embeddings()
    vocab = getattr(config, "vocab_size", 0) if head is None else head.weight.shape[0]
    for module in decoder.modules():
        if "CrossAttention" in type(module).__name__:
            raise uncounted(config, f"{type(module).__name__} layers")
    windows, sources = cached_windows(config, len(layers)), key_sources(layers)
    sharing = next((number for number, source in enumerate(sources) if source is not None), None)
    # Gemma 4, from transformers 5.20 on.
    sliced = LAST_ROWS in inspect.signature(decoder.forward).parameters and "flash" not in str(
        getattr(config, "_attn_implementation", "")
    )
    inside = {*layers.modules(), *(() if head is None else head.modules())}
    return DecoderShape(
        hidden=int(config.hidden_size),
        heads=int(getattr(layer_config(config, 0), "num_attention_heads", 0) or 0),
        vocab=int(vocab),
        by_layer=tuple(
            replace(
                _measure_layer(layer, cast("PreTrainedConfig", layer_config(config, number))),
                window=windows[number if source is None else source],
                source=source,
            )
            for number, (layer, source) in enumerate(zip(layers, sources, strict=True))
        ),
        outside=2.0 * sum(_num_products(part) for part in decoder.modules() if part not in inside),
        last_from=sharing if sliced else None,
    )


def cached_windows(config: PreTrainedConfig, num_layers: int) -> list[int | None]:
    """Return how many keys a query sees of each layer's cache; None: all.

    transformers itself says it: the cache that `generate` makes.
    """
    from transformers import DynamicCache

    windows = [
        getattr(layer, "sliding_window", None)
        # Unlimited OCR's keeps the whole prompt: its window is of the answer alone.
        if getattr(layer, "is_sliding", False) and not hasattr(layer, "prefill_keys")
        else None
        for layer in DynamicCache(config=config).layers[:num_layers]
    ]
    return windows + [None] * (num_layers - len(windows))


def key_sources(layers: Iterable[nn.Module]) -> list[int | None]:
    """Return for every layer the earlier one whose keys it takes; None: its own."""
    sources: list[int | None] = []
    stored: dict[object, int] = {}
    for number, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", None)
        kind = sharing_kind(attention)
        shares = bool(getattr(attention, "is_kv_shared_layer", False))
        sources.append(stored.get(kind) if shares else None)
        if getattr(attention, "store_full_length_kv", not shares):
            stored[kind] = number
    return sources


def _measure_layer(layer: nn.Module, config: PreTrainedConfig) -> LayerCost:
    attention = [module for module in layer.modules() if _is_attention(module)]
    pair, cached, state, chunks = 0.0, 0, 0, Chunks()
    for module in attention:
        widths, values = _attention_sizes(module, config)
        pair += 2.0 * widths
        cached += values
    for module in layer.modules():
        if _has_sizes(module, DELTA):
            chunks, values = _delta_rule(*(_int(module, name) for name in DELTA))
            state += values
        elif _is_channelwise(module):
            chunks, values = _channelwise_delta_rule(module)
            state += values
        elif _has_sizes(module, MAMBA):
            chunks, values = _mamba(*(_int(module, name) for name in MAMBA))
            state += values
        elif _has_sizes(module, INDEX):
            products, values = _index(module)
            pair += products
            cached += values
        elif UNKNOWN.search(type(module).__name__) and not isinstance(module, nn.Conv1d):
            raise uncounted(config, f"{type(module).__name__} layers")
    token, visual, conv = 2.0 * sum(map(_bias_products, attention)), 0.0, 0
    for name, module, share in _with_shares(layer, config):
        flops = 0.0 if _is_unused(name, layer) else 2.0 * share * _num_products(module)
        if VISUAL_EXPERTS in name:
            visual += flops
            continue
        token += flops
        visual -= flops if TEXT_EXPERTS in name else 0.0
        conv += _conv_state(module)
    return LayerCost(
        token=token,
        pair=pair,
        cached=cached,
        state=state,
        conv=conv,
        chunks=chunks,
        visual=visual,
        key=2.0 * sum(map(_expanded_keys, attention)),
    )


def _expanded_keys(module: nn.Module) -> int:
    """Return the products that make a key and value of what the cache holds of both."""
    expand = _child(module, ("kv_b_proj",))
    return _num_products(expand) if expand is not None and _cached_latent(module) else 0


def _cached_latent(module: nn.Module) -> int:
    """Return the width of what keys and values are made of, where the cache holds that; else 0.

    GLM-5-next's holds keys and values themselves in 5.17.
    """
    rank = _int(module, "kv_lora_rank")
    return 0 if rank and _caches_keys(type(module)) else rank  # type: ignore[arg-type]


@functools.cache
def _caches_keys(kind: type[nn.Module]) -> bool:
    return ".update(key_states, value_states" in inspect.getsource(kind.forward)


def _has_sizes(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Return whether a module names all of these sizes."""
    return all(_int(module, name) for name in names)


def _delta_rule(heads: int, keys: int, values: int) -> tuple[Chunks, int]:
    """Return the products of the delta rule over chunks, and the values of its state.

    In each chunk keys with keys, queries with keys, both with the state, the state's change, and
    what is read within the chunk. The triangular system is solved, not multiplied.
    """
    token = 2.0 * heads * (CHUNK * (2 * keys + values) + 3 * keys * values)
    return Chunks(CHUNK, token), heads * keys * values


def _is_channelwise(module: nn.Module) -> bool:
    return _has_sizes(module, CHANNELWISE) and hasattr(module, "forget_gate")


def _channelwise_delta_rule(module: nn.Module) -> tuple[Chunks, int]:
    """Return the products of the delta rule where each channel fades by itself, and its state.

    In each chunk both keys and values with the inverse of the triangular system, queries and keys
    with the state, the state's change, and what is read within the chunk. Keys with keys and
    queries with keys are summed channel by channel, which torch does not count.
    """
    heads, width = _int(module, "num_heads"), _int(module, "head_dim")
    token = 2.0 * heads * (CHUNK * 3 * width + 3 * width * width)
    return Chunks(CHUNK, token), heads * width * width


def _mamba(heads: int, width: int, states: int, size: int) -> tuple[Chunks, int]:
    """Return the products of Mamba 2 over chunks, and the values of its state."""
    token = 2.0 * heads * (size * (states + width) + 2 * states * width)
    pair = 2.0 * heads * width * states
    return Chunks(size, token, pair, step=pair), heads * width * states


def _index(module: nn.Module) -> tuple[float, int]:
    """Return the FLOPs of a query's score of a key, and the values cached of a token for it.

    Scores of each head, and their sum with weights.
    """
    heads, width = _int(module, "n_heads"), _int(module, "head_dim")
    products, values = 2.0 * heads * (width + 1), width
    if hasattr(module, INDEX_GATE):  # beside each key a gate, and whether it is of a token
        values += width + 1
    return products / (_int(module, INDEX_POOL) or 1), values


def _bias_products(attention: nn.Module) -> int:
    """Return the weights that a token's bias by distances is made with, of all heads (Inkling)."""
    for name in (BIAS, GIVEN_BIAS):
        profiles = getattr(getattr(attention, name, None), "proj", None)
        if isinstance(profiles, nn.Parameter):
            return _int(attention, "num_heads") * profiles.numel()
    return 0


def _is_attention(module: nn.Module) -> bool:
    """Return whether a module attends: it has projections of queries and of its output."""
    projects = _child(module, QUERIES) is not None and _child(module, OUTPUTS) is not None
    return projects and not _is_channelwise(module)


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """Return the projection of a module that has one of these names."""
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module) and hasattr(child, "out_features"):
            return child
    return None


def _attention_sizes(module: nn.Module, config: PreTrainedConfig) -> tuple[int, int]:
    """Return the widths of queries and values together, and the values cached of a token."""
    output = _child(module, OUTPUTS)
    assert output is not None
    values = int(output.in_features)  # type: ignore[arg-type]
    heads = _int(module, "num_heads") or _int(config, "num_attention_heads")
    queries = heads * _int(module, "qk_head_dim") or values
    if getattr(module, "is_kv_shared_layer", False):
        return queries + values, 0
    key = _child(module, ("k_proj",))
    value = _child(module, ("v_proj",))
    if key is not None:
        keys = int(key.out_features)  # type: ignore[arg-type]
        return queries + values, keys + (keys if value is None else int(value.out_features))  # type: ignore[arg-type]
    fused = _child(module, QUERIES)
    if rank := _cached_latent(module):
        return queries + values, rank + _int(module, "qk_rope_head_dim")
    if _int(module, "kv_lora_rank"):
        return queries + values, queries + values
    assert fused is not None
    return queries + values, int(fused.out_features) - queries  # type: ignore[arg-type]


def _int(holder: object, name: str) -> int:
    value = getattr(holder, name, 0)
    return value if isinstance(value, int) else 0


def _with_shares(
    layer: nn.Module, config: PreTrainedConfig
) -> Iterator[tuple[str, nn.Module, float]]:
    """Yield the modules of a layer with the share of a token's way that goes through each.

    A token goes through a few of the experts, and through everything else.
    """
    adapted = [
        f"{name}." for name, module in layer.named_modules() if hasattr(module, "base_layer")
    ]
    for name, module in layer.named_modules():
        if any(name + "." == around or (name.startswith(around) and
               not name.startswith(f"{around}base_layer")) for around in adapted):  # fmt: skip
            continue  # an adapter, which is merged into what it adapts
        experts = _num_experts(name, module, layer)
        share = _active(layer, config) / experts if experts and not _runs_all(module) else 1.0
        yield name, module, share


def _runs_all(module: nn.Module) -> bool:
    """Return whether experts take every token, weighed beforehand, and not those routed to each."""
    takes = len(inspect.signature(module.forward).parameters)
    return takes < 2 and any(weight.dim() == 3 for weight in module.parameters(recurse=False))


def _num_experts(name: str, module: nn.Module, layer: nn.Module) -> int:
    """Return the number of experts that a module is one of, or holds; 0 for none.

    Shared ones are no choice: every token goes through all of them.
    """
    if "Expert" in type(module).__name__ and _int(module, "n_shared_experts"):
        return 0
    if "Expert" in type(module).__name__ and any(
        weight.dim() == 3 for weight in module.parameters(recurse=False)
    ):
        return max(len(weight) for weight in module.parameters(recurse=False) if weight.dim() == 3)
    parts = name.split(".")
    for end in range(1, len(parts)):
        if parts[end - 1].endswith("experts") and parts[end].isdecimal():
            holder = layer.get_submodule(".".join(parts[:end]))
            if isinstance(holder, nn.ModuleList):
                return len(holder)
    return 0


def _active(layer: nn.Module, config: PreTrainedConfig) -> int:
    """Return how many experts a token goes through.

    Raises:
        CostError: nothing says so.
    """
    for holder in (config, *layer.modules()):
        for name in (*ACTIVE, "top_k"):
            if (count := _int(holder, name)) > 0 and (
                holder is config or ROUTER.search(type(holder).__name__)
            ):
                return count
    raise uncounted(config, "this kind of mixture of experts")


def _is_unused(name: str, layer: nn.Module) -> bool:
    """Return whether a projection of keys or values is there but does not run."""
    holder, _, last = name.rpartition(".")
    if last not in ("k_proj", "v_proj"):
        return False
    return bool(getattr(layer.get_submodule(holder), "is_kv_shared_layer", False))


def _num_products(module: nn.Module) -> int:
    """Return the weights that a token is multiplied with in a module, its parts left out."""
    if isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features"):
        return int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
    if isinstance(module, nn.Conv1d):
        return module.weight.numel()
    if isinstance(gate := getattr(module, INDEX_GATE, None), nn.Parameter):
        return gate.numel()
    for name in HYPER:
        if isinstance(mixes := getattr(module, name, None), nn.Parameter):
            return mixes.numel() + _mixed_streams(module, mixes)
    streams = getattr(module, "prediction_coefs", None)  # of Gemma 3n, which mixes them
    if isinstance(streams, nn.Linear):
        return int(module.config.hidden_size) * streams.out_features  # type: ignore[union-attr, arg-type]
    kind = type(module).__name__
    dims = 3 if "Expert" in kind else 2 if ROUTER.search(kind) else 0
    weights = [weight for weight in module.parameters(recurse=False) if weight.dim() == dims]
    return sum(weight.numel() for weight in weights) if dims else 0


def _mixed_streams(module: nn.Module, mixes: nn.Parameter) -> int:
    """Return the products that mix a token's N states with each other, by N x N of its weights.

    GLM-5-next makes N to read, N to write and N x N to mix by, and mixes in a matrix product.
    """
    count = _int(module, "hc_mult")
    if not count or len(mixes) != (2 + count) * count:
        return 0
    return count * mixes.shape[1]


def _conv_state(module: nn.Module) -> int:
    """Return the values that a causal convolution keeps of the tokens before."""
    taps = getattr(module, "static_weight", None)  # of Inkling 2, (kernel, channels)
    if isinstance(taps, nn.Parameter) and _int(module, "conv_kernel_size") == len(taps):
        return taps.numel()
    if not isinstance(module, nn.Conv1d):
        return 0
    return module.out_channels * module.kernel_size[0]
