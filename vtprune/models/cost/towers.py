"""The vision towers and projectors of the model families, read from their configs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from vtprune.models.cost.sizes import kind_of, list_of, size_of
from vtprune.models.cost.vision import VisionShape


def vision_shape(config: object, modality: str = "image") -> VisionShape | None:
    """The shape of a multimodal model's vision tower and projector, from its whole config.

    None where the family or its tower is not known here, so that its cost is left out, not guessed.

    Args:
        config: the model's transformers config.
        modality: "image" or "video": what goes through them; in some families it matters.

    Raises:
        CostError: a known tower's config lacks a size.
    """
    build = FAMILIES.get(kind_of(config))
    if modality == "video":
        build = VIDEOS.get(kind_of(config), build)
    return None if build is None else build(config)


def _tower(config: object, extra: int = 0) -> VisionShape:
    """A plain ViT, no projector yet."""
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


def _known_tower(config: object) -> VisionShape | None:
    """CLIP, SigLIP or a ViT; None for another tower of a family that takes any."""
    tower = getattr(config, "vision_config", None)
    kind = kind_of(tower)
    if kind in ("clip_vision_model", "vit"):
        return _tower(config, extra=1)
    if kind == "siglip_vision_model":
        # SiglipVisionModel takes a missing key for True.
        return replace(_tower(config), pooling=getattr(tower, "vision_use_head", True))
    return None


def _text_width(config: object) -> int:
    return size_of(getattr(config, "text_config", None), "hidden_size")


def _llava(config: object) -> VisionShape | None:
    """Two matrices, on the features of one layer or of several side by side."""
    shape = _known_tower(config)
    if shape is None:
        return None
    layer = getattr(config, "vision_feature_layer", -1)
    taken = 1 if isinstance(layer, int) else len(layer)
    out = _text_width(config)
    return replace(
        shape,
        projector=((taken * shape.hidden, out), (out, out)),
        projects_extra=getattr(config, "vision_feature_select_strategy", "default") == "full",
    )


def _llava_next_video(config: object) -> VisionShape | None:
    """Frames are pooled before they are projected, by a convolution if the config says so."""
    shape = _llava(config)
    if shape is None:
        return None
    stride, hidden = size_of(config, "spatial_pool_stride", 2), shape.hidden
    if getattr(config, "spatial_pool_mode", "average") == "conv":
        pooled = size_of(config, "spatial_pool_out_channels", hidden)
        shape = replace(shape, projector=((stride**2 * hidden, pooled), *shape.projector))
    return replace(shape, merge=stride)


def _video_llava_frames(config: object) -> VisionShape | None:
    """The CLS token of a frame is projected, whatever becomes of a picture's."""
    shape = _llava(config)
    return None if shape is None else replace(shape, projects_extra=True)


def _internvl(config: object) -> VisionShape:
    """CLS is dropped; blocks of patches side by side, then two matrices."""
    shape, out = _tower(config, extra=1), _text_width(config)
    merge = int(1 / getattr(config, "downsample_ratio", 0.5))
    return replace(shape, projector=((merge**2 * shape.hidden, out), (out, out)), merge=merge)


def _idefics3(config: object) -> VisionShape:
    """Blocks of patches side by side, then one matrix."""
    shape, merge = _tower(config), size_of(config, "scale_factor", 2)
    return replace(shape, projector=((merge**2 * shape.hidden, _text_width(config)),), merge=merge)


def _gemma3(config: object) -> VisionShape | None:
    """Averages over blocks of patches, then one matrix."""
    shape = _known_tower(config)
    if shape is None:
        return None
    side = size_of(getattr(config, "vision_config", None), "image_size") // shape.patch
    merge = side // math.isqrt(size_of(config, "mm_tokens_per_image", 256))
    return replace(shape, projector=((shape.hidden, _text_width(config)),), merge=merge)


def _packed(config: object, hidden: int, intermediate: int, out: int) -> VisionShape:
    """Qwen's towers: patches of two frames, any number of rows and columns, a merger of blocks."""
    tower = getattr(config, "vision_config", None)
    patch, merge = size_of(tower, "patch_size"), size_of(tower, "spatial_merge_size")
    frames, merged = size_of(tower, "temporal_patch_size", 2), merge**2 * hidden
    return VisionShape(
        layers=size_of(tower, "depth"),
        hidden=hidden,
        intermediate=intermediate,
        patch=patch,
        inputs=size_of(tower, "in_channels", 3) * frames * patch**2,
        projector=((merged, merged), (merged, out)),
        merge=merge,
    )


def _qwen2(config: object) -> VisionShape:
    tower = getattr(config, "vision_config", None)
    hidden = size_of(tower, "embed_dim")
    intermediate = int(hidden * getattr(tower, "mlp_ratio", 4))
    return _packed(config, hidden, intermediate, size_of(tower, "hidden_size"))


def _qwen2_5(config: object) -> VisionShape:
    """Windows in most layers, full attention in some."""
    tower = getattr(config, "vision_config", None)
    hidden, intermediate = size_of(tower, "hidden_size"), size_of(tower, "intermediate_size")
    shape = _packed(config, hidden, intermediate, size_of(tower, "out_hidden_size"))
    full = list_of(tower, "fullatt_block_indexes")
    return replace(
        shape,
        gated=True,
        # As the model rounds it: windows of whole merged tokens.
        window=size_of(tower, "window_size") // shape.merge // shape.patch * shape.merge,
        full_layers=len({index for index in full if index < shape.layers}),
    )


def _qwen3(config: object) -> VisionShape:
    """A merger of its own for every layer whose features go to the decoder (deepstack)."""
    tower = getattr(config, "vision_config", None)
    hidden, intermediate = size_of(tower, "hidden_size"), size_of(tower, "intermediate_size")
    shape = _packed(config, hidden, intermediate, size_of(tower, "out_hidden_size"))
    deep = {index for index in list_of(tower, "deepstack_visual_indexes") if index < shape.layers}
    return replace(shape, projector=shape.projector * (1 + len(deep)))


def _glm4v(config: object) -> VisionShape:
    """A convolution makes blocks one token; then a matrix and a gated MLP.

    The tower's own MLPs are as wide as its output; `intermediate_size` is the merger's.
    """
    tower = getattr(config, "vision_config", None)
    hidden, inner = size_of(tower, "hidden_size"), size_of(tower, "intermediate_size")
    out = size_of(tower, "out_hidden_size")
    shape = _packed(config, hidden, out, out)
    merger = ((shape.merge**2 * hidden, out), (out, out), (out, 2 * inner), (inner, out))
    return replace(shape, gated=True, projector=merger)


def _molmo2(config: object, merge: int = 2) -> VisionShape | None:
    """One query for each block of patches attends to them; then a gated MLP.

    Blocks are of 2 x 2 patches in pictures and of 3 x 3 in frames, as the checkpoints' processor
    makes them: the config does not say. Those that are filled up cost as much as whole ones.
    """
    tower, adapter = getattr(config, "vision_config", None), getattr(config, "adapter_config", None)
    shape = _tower(config)
    heads, wide = size_of(tower, "num_attention_heads"), size_of(tower, "head_dim")
    if heads * wide != shape.hidden or size_of(tower, "num_key_value_heads", heads) != heads:
        return None  # of no published checkpoint
    hidden, inner = size_of(adapter, "hidden_size"), size_of(adapter, "intermediate_size")
    heads, wide = size_of(adapter, "num_attention_heads"), size_of(adapter, "head_dim")
    kv_heads = size_of(adapter, "num_key_value_heads", heads)
    features, block = hidden * len(list_of(adapter, "vision_feature_layer")), merge**2
    attention = (
        (features, heads * wide),  # query
        (block * features, 2 * kv_heads * wide),  # keys and values
        (block, 2 * heads * wide),  # scores and their sum
        (heads * wide, hidden),
    )
    mlp = ((hidden, 2 * inner), (inner, size_of(adapter, "text_hidden_size")))
    return replace(shape, projector=(*attention, *mlp), merge=merge, overlapping=True)


def _molmo2_frames(config: object) -> VisionShape | None:
    return _molmo2(config, merge=3)


FAMILIES: dict[str, Callable[[object], VisionShape | None]] = {
    "llava_onevision": _llava,
    "llava_next": _llava,
    "llava": _llava,
    "llava_next_video": _llava,
    "video_llava": _llava,
    "internvl": _internvl,
    "smolvlm": _idefics3,
    "idefics3": _idefics3,
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
    "qwen3_vl_moe": _qwen3,
    "gemma3": _gemma3,
    "glm4v": _glm4v,
    "molmo2": _molmo2,
}
"""`config.model_type` -> how to read the shape of its tower and projector."""
VIDEOS: dict[str, Callable[[object], VisionShape | None]] = {
    "llava_next_video": _llava_next_video,
    "video_llava": _video_llava_frames,
    "molmo2": _molmo2_frames,
}
"""Where a video's frames go another way than pictures."""
