"""FLOPs and bytes of a model's forward pass, from sizes alone; no weights needed.

A multiply and an add are two FLOPs. Matrix products and convolutions are counted and nothing else
(no norms, softmax, rotary embedding, pooling by averages or activation), and attention as full
squares: neither the causal half nor a sliding window is saved in a prompt, because kernels differ
in whether they save it; a step of decoding sees the keys that are cached. Of a mixture of experts
the router, the shared experts and those that a token goes through are counted: all of them in a
class that runs all (Llama 4). torch's FlopCounterMode counts the same way, with eager attention on
any device and with sdpa on a GPU; sdpa on a CPU it leaves out.

EntropyPrune (arXiv 2602.17196) reports `layers_flops`: with as many key-value heads as heads it is
its 8 n d^2 + 4 n^2 d + 6 n d m a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from vtprune.errors import ModelError
from vtprune.models import find_family

# -- sizes in configs ------------------------------------------------------------------------------


class CostError(ModelError):
    """A model whose FLOPs can't be counted; its answers can be given all the same."""


def uncounted(config: object, what: str) -> CostError:
    """Return the error for layers that are not counted."""
    return CostError(
        f"{kind_of(config)}: the FLOPs of {what} are not counted",
        hint="ask, compare and evaluate work without them",
    )


def kind_of(config: object) -> str:
    """Return a config's model type; "" where it has none."""
    return str(getattr(config, "model_type", ""))


def size_of(config: object, name: str, default: int | None = None) -> int:
    """Return a size of a config; one side of it where it is given as a pair of equal sides.

    Raises:
        CostError: it has no such size, and there is no default.
    """
    value = _value(config, name, default)
    return int(cast(int, value[0] if isinstance(value, list | tuple) else value))


def list_of(config: object, name: str) -> Sequence[int]:
    """Return what a config lists, such as layers.

    Raises:
        CostError: it has no such list.
    """
    return cast("Sequence[int]", _value(config, name, None))


def _value(config: object, name: str, default: object) -> object:
    try:
        value = getattr(config, name, None)
    except RuntimeError as error:  # transformers: AmbiguousGlobalPerLayerAttributeError
        raise CostError(
            f"the layers of {kind_of(config)} differ in {name}",
            hint="its FLOPs can't be counted: this version takes layers of one size",
        ) from error
    value = default if value is None else value
    if value is None:
        raise CostError(
            f"the config of {kind_of(config) or type(config).__name__} has no {name}",
            hint="its FLOPs can't be counted without it",
        )
    return value


# -- language models ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunks:
    """What linear attention costs in a prompt, which it works on in whole chunks.

    Args:
        size: tokens of a chunk.
        token: FLOPs of each token.
        pair: FLOPs of each pair of chunks, the state before the first one counted as one.
        step: FLOPs of a step of decoding, which works on the state alone.
    """

    size: int = 1
    token: float = 0.0
    pair: float = 0.0
    step: float = 0.0

    def flops(self, tokens: int) -> float:
        """Return the FLOPs of a prompt, or of one step of decoding."""
        if tokens == 1:
            return self.step
        count = -(-tokens // self.size)
        return count * self.size * self.token + (count + 1) ** 2 * self.pair


@dataclass(frozen=True)
class LayerCost:
    """What one decoder layer costs.

    Args:
        token: FLOPs of each token by itself: its products with weights.
        pair: FLOPs of each query with each key that it sees; 0 where a layer does not attend.
        cached: values that the KV cache holds of a token.
        visual: FLOPs that a visual token takes more than one of text; less where negative.
        key: FLOPs of each cached key of a query: where the cache holds what keys are made of.
        window: keys that a query sees at most once they are cached; None: all.
        source: number of the layer whose keys it sees; None: its own.
        state: values that linear attention and Mamba hold of the sequence as a whole, whatever its
            length; in float32.
        conv: values that a causal convolution holds of the tokens before, in the model's dtype.
        chunks: of linear attention.
    """

    token: float
    pair: float
    cached: int
    state: int = 0
    conv: int = 0
    chunks: Chunks = Chunks()
    visual: float = 0.0
    key: float = 0.0
    window: int | None = None
    source: int | None = None


@dataclass(frozen=True)
class DecoderShape:
    """What a language model's cost depends on; `layer_cost.measure_decoder` reads it from a model.

    Args:
        hidden: width of the residual stream.
        heads: query heads a layer.
        vocab: rows of the output head.
        by_layer: what each layer costs.
        outside: FLOPs of each token in the decoder before and after its layers.
        last_from: the layer from which on only the last token of a prompt goes on, as all the
            layers from there see keys of earlier ones, unless one of them cuts; None: all go on.
    """

    hidden: int
    heads: int
    vocab: int
    by_layer: tuple[LayerCost, ...]
    outside: float = 0.0
    last_from: int | None = None

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.by_layer)


def plain_decoder(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocab: int,
    gated: bool = True,
) -> DecoderShape:
    """Return the shape of a decoder whose layers are all attention and an MLP.

    Args:
        head_dim: width of a head; heads x head_dim need not be `hidden`.
        gated: whether the MLP has a gate (three matrices) or not (two).
    """
    wide, narrow = heads * head_dim, kv_heads * head_dim
    weights = 2 * hidden * (wide + narrow) + (3 if gated else 2) * hidden * intermediate
    layer = LayerCost(token=2.0 * weights, pair=4.0 * wide, cached=2 * narrow)
    return DecoderShape(hidden, heads, vocab, (layer,) * layers)


def layer_flops(shape: DecoderShape, queries: int, keys: int, layer: int = -1) -> float:
    """Return the FLOPs of a decoder layer for `queries` tokens that see `keys` keys.

    Keys include those of the tokens themselves.

    Args:
        layer: its number; it matters where layers differ.
    """
    cost = shape.by_layer[layer]
    return queries * cost.token + float(queries) * keys * cost.pair + cost.chunks.flops(queries)


def activations(shape: DecoderShape) -> int:
    """Return an estimate of the values that the costliest layer holds of a token while it runs.

    Its states, and what each of its matrices makes of them.
    """
    largest = max(cost.token for cost in shape.by_layer)
    return 6 * shape.hidden + int(largest / (2 * shape.hidden))


def head_flops(shape: DecoderShape) -> float:
    """Return the FLOPs of the output head at one position."""
    return 2.0 * shape.hidden * shape.vocab


def flops_by_layer(
    shape: DecoderShape, tokens_by_layer: Sequence[int], text: int | None = None
) -> list[float]:
    """Return the FLOPs of each decoder layer over a prompt, what is around them with the first.

    Args:
        shape: the language model's shape.
        tokens_by_layer: tokens that each layer sees, text included, one number a layer.
        text: those that are not visual; it matters where visual tokens have experts of their own.

    Raises:
        ValueError: not one number a layer.
    """
    _check_depth(shape, tokens_by_layer)
    first, flops = shape.last_from, []
    cut_late = first is not None and len({*tokens_by_layer[max(first - 1, 0) :]}) > 1
    for layer, (cost, tokens) in enumerate(zip(shape.by_layer, tokens_by_layer, strict=True)):
        queries = 1 if first is not None and layer >= first and not cut_late else tokens
        keys = tokens if cost.source is None else tokens_by_layer[cost.source]
        visual = tokens - text if text is not None and queries == tokens else 0
        flops.append(layer_flops(shape, queries, keys, layer) + visual * cost.visual)
    flops[0] += tokens_by_layer[0] * shape.outside
    return flops


def layers_flops(
    shape: DecoderShape, tokens_by_layer: Sequence[int], text: int | None = None
) -> float:
    """Return the FLOPs of the decoder over a prompt, without the output head.

    Args:
        shape, tokens_by_layer, text: as of `flops_by_layer`.
    """
    return sum(flops_by_layer(shape, tokens_by_layer, text))


def prefill_flops(
    shape: DecoderShape, tokens_by_layer: Sequence[int], text: int | None = None
) -> float:
    """Return `layers_flops` with the output head at the prompt's last position."""
    return layers_flops(shape, tokens_by_layer, text) + head_flops(shape)


def decode_flops(
    shape: DecoderShape,
    tokens_by_layer: Sequence[int],
    answer_tokens: int,
    cuts: Sequence[tuple[int, Sequence[int]]] = (),
) -> float:
    """Return the FLOPs of the steps that follow the prefill, output head included.

    The first answer token comes from the prefill, so there are `answer_tokens` - 1 steps; step s
    (from 1) has one query and tokens + s keys in a layer that saw `tokens` of the prompt.

    Args:
        shape: the language model's shape.
        tokens_by_layer: prompt tokens in each layer's cache, text included.
        answer_tokens: tokens of the answer, the end-of-text token included.
        cuts: (steps before it, prompt tokens in each layer's cache from there on) of each cut of
            the cache while decoding.

    Raises:
        ValueError: not one number a layer.
    """
    steps = max(answer_tokens - 1, 0)
    spans = [(0, tokens_by_layer), *((step, left) for step, left in cuts if step < steps)]
    ends = [*(first for first, _ in spans[1:]), steps]
    attention = 0.0
    for (first, by_layer), end in zip(spans, ends, strict=True):
        _check_depth(shape, by_layer)
        for cost, tokens in zip(shape.by_layer, by_layer, strict=True):
            before = tokens if cost.source is None else by_layer[cost.source]
            keys = _decoded_keys(before, end, cost.window)
            keys -= _decoded_keys(before, first, cost.window)
            attention += cost.pair * keys + cost.key * (keys - (end - first))
    linear = sum(layer_flops(shape, 1, 0, layer) for layer in range(shape.layers))
    return steps * (linear + shape.outside + head_flops(shape)) + attention


def _decoded_keys(tokens: int, steps: int, window: int | None) -> int:
    """Return the keys that the queries of all decode steps see together, themselves included."""
    wide = steps if window is None else min(max(window - tokens, 0), steps)
    return wide * tokens + wide * (wide + 1) // 2 + (steps - wide) * (window or 0)


def kv_bytes(shape: DecoderShape, tokens_by_layer: Sequence[int], bytes_per_value: int) -> int:
    """Return the bytes of the keys and values of the tokens in each layer's cache.

    Raises:
        ValueError: not one number a layer.
    """
    layers = zip(shape.by_layer, cached_by_layer(shape, tokens_by_layer), strict=True)
    return bytes_per_value * sum(cost.cached * tokens for cost, tokens in layers)


def cached_by_layer(shape: DecoderShape, tokens_by_layer: Sequence[int]) -> list[int]:
    """Return the cached tokens that the next token sees in each layer, in its own or another's.

    Raises:
        ValueError: not one number a layer.
    """
    _check_depth(shape, tokens_by_layer)
    cached = []
    for cost, own in zip(shape.by_layer, tokens_by_layer, strict=True):
        tokens = own if cost.source is None else tokens_by_layer[cost.source]
        cached.append(tokens if cost.window is None else min(tokens, cost.window - 1))
    return cached


def state_bytes(shape: DecoderShape, bytes_per_value: int) -> int:
    """Return the bytes that layers hold of the sequence as a whole, whatever its length."""
    return sum(4 * cost.state + bytes_per_value * cost.conv for cost in shape.by_layer)


def _check_depth(shape: DecoderShape, tokens_by_layer: Sequence[int]) -> None:
    if len(tokens_by_layer) != shape.layers:
        raise ValueError(
            f"{len(tokens_by_layer)} token counts for {shape.layers} layers; give one a layer"
        )


# -- vision towers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision tower and its projector that their cost depends on.

    Args:
        layers: number of tower layers that run.
        hidden: width of the tower; its heads together are as wide.
        intermediate: width of its MLP.
        patch: pixels along a side of a patch.
        inputs: values that make one patch: channels x (frames x) height x width.
        projector: (in, out) of each matrix that a projected token goes through, whatever merges
            its patches included.
        gated: whether the MLP has a gate.
        merge: patches along a side of the block that makes one projected token; what is left over
            at the edges is dropped.
        extra: tokens of the tower beside the patches (CLS), one set for each frame or tile.
        projects_extra: whether the projector takes those too.
        window: patches along a side of a window of local attention; 0 for none.
        full_layers: layers with full attention, where the others have windows.
        pooling: whether an attention-pooling head runs (its output is not used).
        overlapping: whether projected tokens are taken from tiles that overlap, so that the
            number of tiles does not say how many there are.
    """

    layers: int
    hidden: int
    intermediate: int
    patch: int
    inputs: int
    projector: tuple[tuple[int, int], ...]
    gated: bool = False
    merge: int = 1
    extra: int = 0
    projects_extra: bool = False
    window: int = 0
    full_layers: int = 0
    pooling: bool = False
    overlapping: bool = False


def vision_shape(config: object, modality: str = "image") -> VisionShape | None:
    """Return the shape of a model's vision tower and projector, from its whole config.

    None where the family or its tower is not known here, so that its cost is left out, not guessed.

    Args:
        config: the model's transformers config.
        modality: "image" or "video": what goes through them; in some families it matters.

    Raises:
        CostError: a known tower's config lacks a size.
    """
    return find_family(kind_of(config)).vision_shape(config, modality)


def plain_tower(config: object, extra: int = 0) -> VisionShape:
    """Return the shape of a plain ViT, no projector yet.

    Args:
        extra: as in VisionShape.
    """
    tower = getattr(config, "vision_config", None)
    hidden, patch = size_of(tower, "hidden_size"), size_of(tower, "patch_size")
    return VisionShape(
        layers=size_of(tower, "num_hidden_layers"),
        hidden=hidden,
        intermediate=size_of(tower, "intermediate_size"),
        patch=patch,
        inputs=size_of(tower, "num_channels", 3) * patch**2,
        projector=(),
        extra=extra,
    )


def clip_or_siglip(config: object) -> VisionShape | None:
    """Return the shape of a CLIP, SigLIP or plain ViT tower, no projector yet; None for another."""
    tower = getattr(config, "vision_config", None)
    kind = kind_of(tower)
    if kind in ("clip_vision_model", "vit"):
        return plain_tower(config, extra=1)
    if kind == "siglip_vision_model":
        # SiglipVisionModel takes a missing key for True.
        return replace(plain_tower(config), pooling=getattr(tower, "vision_use_head", True))
    return None


def text_width(config: object) -> int:
    """Return the width of the language model."""
    return size_of(getattr(config, "text_config", None), "hidden_size")


def tile_units(
    shape: VisionShape, pixels: Sequence[int], num_units: int | None = None
) -> list[tuple[int, int, int]]:
    """Return the units of `vision_flops` for tiles or frames of one size, each encoded on its own.

    Args:
        shape: the tower's shape.
        pixels: shape of the pixel values, (..., 3, H, W).
        num_units: tiles really encoded, where the tensor is padded with empty ones, which models
            leave out; None for all.
    """
    *leading, _, height, width = pixels
    count = math.prod(leading) if num_units is None else num_units
    return [(1, height // shape.patch, width // shape.patch)] * count


def vision_flops(
    shape: VisionShape, units: Sequence[Sequence[int]], tokens: int | None = None
) -> float:
    """Return the FLOPs of vision tower and projector.

    Args:
        shape: their shape.
        units: one (frames, rows, columns) of patches for each thing encoded: `tile_units` of the
            pixel values' shape, or Qwen's `image_grid_thw.tolist()`, `video_grid_thw.tolist()`.
            Attention stays within one frame of one unit.
        tokens: projected tokens; needed where tiles overlap.

    Raises:
        ValueError: tiles overlap, and the number of tokens is not given.
    """
    return tower_flops(shape, units) + projector_flops(shape, units, tokens)


def tower_flops(shape: VisionShape, units: Sequence[Sequence[int]]) -> float:
    """Return `vision_flops` of the tower alone."""
    return sum(frames * _frame_flops(shape, rows, cols) for frames, rows, cols in units)


def projector_flops(
    shape: VisionShape, units: Sequence[Sequence[int]], tokens: int | None = None
) -> float:
    """Return `vision_flops` of the projector alone."""
    if tokens is None:
        if shape.overlapping:
            raise ValueError("tiles overlap; give the number of projected tokens")
        extra = shape.extra if shape.projects_extra else 0
        tokens = sum(
            frames * ((rows // shape.merge) * (cols // shape.merge) + extra)
            for frames, rows, cols in units
        )
    return 2.0 * tokens * sum(width * out for width, out in shape.projector)


def _frame_flops(shape: VisionShape, rows: int, cols: int) -> float:
    """Return the FLOPs of the tower for one frame or tile of rows x cols patches."""
    patches = rows * cols
    tokens = patches + shape.extra
    hidden, mlp = shape.hidden, (3 if shape.gated else 2) * shape.hidden * shape.intermediate
    embedding = 2.0 * patches * shape.inputs * hidden
    linear = 2.0 * tokens * (4 * hidden**2 + mlp) * shape.layers
    full = shape.full_layers if shape.window else shape.layers
    pairs = full * tokens**2
    if shape.window:
        pairs += (shape.layers - full) * _squares(rows, shape.window) * _squares(cols, shape.window)
    pooling = 0.0
    if shape.pooling:  # one learned query attends to all tokens, then an MLP
        pooling = 2.0 * (2 * hidden**2 + 2 * tokens * hidden**2 + mlp) + 4.0 * tokens * hidden
    return embedding + linear + 4.0 * pairs * hidden + pooling


def _squares(length: int, window: int) -> int:
    """Return the sum of the squared lengths of windows along a side, the last perhaps shorter."""
    full, last = divmod(length, window)
    return full * window**2 + last**2
