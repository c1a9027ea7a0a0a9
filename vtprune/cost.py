"""What a model's forward pass costs: FLOPs and bytes of its key-value cache, from shapes alone.

A multiply and an add are two FLOPs. Matrix products are counted and nothing else (no norms,
softmax, rotary embedding or activation), and attention as full squares: neither the causal half
nor a sliding window is saved, because kernels differ in whether they save it. torch's
FlopCounterMode counts the same way.

EntropyPrune (arXiv 2602.17196) reports `layers_flops`: with as many key-value heads as heads it is
its 8 n d^2 + 4 n^2 d + 6 n d m a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
                f"{_kind(text_config)}: the FLOPs of a mixture of experts are not counted",
                hint="use a dense model of the same family",
            )
    hidden = _size(text_config, "hidden_size")
    heads = _size(text_config, "num_attention_heads")
    return DecoderShape(
        layers=_size(text_config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=_size(text_config, "num_key_value_heads", heads),
        head_dim=_size(text_config, "head_dim", hidden // heads),
        intermediate=_size(text_config, "intermediate_size"),
        vocab=_size(text_config, "vocab_size"),
        gated=_kind(text_config) not in UNGATED,
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


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision tower and its projector that their cost depends on.

    Args:
        layers: number of tower layers that run.
        hidden: width of the tower.
        intermediate: width of its MLP.
        patch: pixels along a side of a patch.
        inputs: values that make one patch: channels x (frames x) height x width.
        projector: (in, out) of each of the projector's matrices.
        gated: whether the MLP has a gate.
        merge: patches along a side of the block that makes one projected token.
        extra: tokens of the tower beside the patches (CLS), one set for each frame or tile.
        projects_extra: whether the projector takes those too.
        window: patches along a side of a window of local attention; 0 for none.
        full_layers: layers with full attention, where the others have windows.
        pooling: whether an attention-pooling head runs (its output is not used).
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


def vision_shape(config: object) -> VisionShape | None:
    """The shape of a multimodal model's vision tower and projector, from its whole config.

    None where the family or its tower is not known here, so that its cost is left out, not guessed.

    Raises:
        ModelError: a known tower's config lacks a size.
    """
    build = VISION.get(_kind(config))
    return None if build is None else build(config)


def tile_units(
    shape: VisionShape, pixels: Sequence[int], num_units: int | None = None
) -> list[tuple[int, int, int]]:
    """The units of `vision_flops` for tiles or frames of one size, each encoded on its own.

    Args:
        shape: the tower's shape.
        pixels: shape of the pixel values, (..., 3, H, W).
        num_units: tiles really encoded, where the tensor is padded with empty ones, which models
            leave out; None for all.
    """
    *leading, _, height, width = pixels
    count = math.prod(leading) if num_units is None else num_units
    return [(1, height // shape.patch, width // shape.patch)] * count


def vision_flops(shape: VisionShape, units: Sequence[Sequence[int]]) -> float:
    """FLOPs of vision tower and projector.

    Args:
        shape: their shape.
        units: one (frames, rows, columns) of patches for each thing encoded: `tile_units` of the
            pixel values' shape, or Qwen's `image_grid_thw.tolist()`, `video_grid_thw.tolist()`.
            Attention stays within one frame of one unit.
    """
    return sum(frames * _frame_flops(shape, rows, cols) for frames, rows, cols in units)


def _frame_flops(shape: VisionShape, rows: int, cols: int) -> float:
    """FLOPs of one frame or tile of rows x cols patches."""
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
    projected = patches // shape.merge**2 + (shape.extra if shape.projects_extra else 0)
    projector = 2.0 * projected * sum(width * out for width, out in shape.projector)
    return embedding + linear + 4.0 * pairs * hidden + pooling + projector


def _squares(length: int, window: int) -> int:
    """Sum of the squared lengths of the windows along a side; the last one may be shorter."""
    whole, rest = divmod(length, window)
    return whole * window**2 + rest**2


def _llava_vision(config: object) -> VisionShape | None:
    """CLIP, SigLIP or a plain ViT, then two matrices."""
    tower, text = getattr(config, "vision_config", None), getattr(config, "text_config", None)
    kind = _kind(tower)
    if kind not in ("clip_vision_model", "siglip_vision_model", "vit"):
        return None
    hidden, patch = _size(tower, "hidden_size"), _size(tower, "patch_size")
    layer = getattr(config, "vision_feature_layer", -1)
    taken = 1 if isinstance(layer, int) else len(layer)  # their features side by side
    out = _size(text, "hidden_size")
    return VisionShape(
        layers=_size(tower, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_size(tower, "intermediate_size"),
        patch=patch,
        inputs=_size(tower, "num_channels", 3) * patch**2,
        projector=((taken * hidden, out), (out, out)),
        extra=0 if kind == "siglip_vision_model" else 1,
        projects_extra=getattr(config, "vision_feature_select_strategy", "default") == "full",
        # SiglipVisionModel takes a missing key for True.
        pooling=kind == "siglip_vision_model" and getattr(tower, "vision_use_head", True),
    )


def _qwen2_5_vision(config: object) -> VisionShape:
    """Windows in most layers, full attention in some; a merger of 2 x 2 patches."""
    tower = getattr(config, "vision_config", None)
    hidden, patch = _size(tower, "hidden_size"), _size(tower, "patch_size")
    layers, merge = _size(tower, "depth"), _size(tower, "spatial_merge_size")
    full = getattr(tower, "fullatt_block_indexes", ())
    merged = merge**2 * hidden
    return VisionShape(
        layers=layers,
        hidden=hidden,
        intermediate=_size(tower, "intermediate_size"),
        patch=patch,
        inputs=_size(tower, "in_channels", 3) * _size(tower, "temporal_patch_size", 2) * patch**2,
        projector=((merged, merged), (merged, _size(tower, "out_hidden_size"))),
        gated=True,
        merge=merge,
        # As the model rounds it: windows of whole merged tokens.
        window=_size(tower, "window_size") // merge // patch * merge,
        full_layers=len({index for index in full if index < layers}),
    )


VISION: dict[str, Callable[[object], VisionShape | None]] = {
    "llava": _llava_vision,
    "llava_next": _llava_vision,
    "llava_onevision": _llava_vision,
    "qwen2_5_vl": _qwen2_5_vision,
}
"""`config.model_type` -> how to read the shape of its tower and projector."""


def _check_depth(shape: DecoderShape, tokens_by_layer: Sequence[int]) -> None:
    if len(tokens_by_layer) != shape.layers:
        raise ValueError(
            f"{len(tokens_by_layer)} token counts for {shape.layers} layers; give one a layer"
        )


def _kind(config: object) -> str:
    return str(getattr(config, "model_type", ""))


def _size(config: object, name: str, default: int | None = None) -> int:
    """A size of a config; one side of it where it is given as a pair of equal sides."""
    value = getattr(config, name, None)
    if value is None:
        value = default
    if value is None:
        raise ModelError(
            f"the config of {_kind(config) or type(config).__name__} has no {name}",
            hint="its FLOPs can't be counted without it",
        )
    return int(value[0] if isinstance(value, list | tuple) else value)
