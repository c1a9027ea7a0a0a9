"""What a model's forward pass costs: FLOPs and bytes, from shapes alone; no model needed.

A multiply and an add are two FLOPs. Matrix products and convolutions are counted and nothing else
(no norms, softmax, rotary embedding, pooling by averages or activation), and attention as full
squares: neither the causal half nor a sliding window is saved, because kernels differ in whether
they save it. torch's FlopCounterMode counts the same way, with eager attention on any device and
with sdpa on a GPU; sdpa on a CPU it leaves out.
"""

from vtprune.cost.decoder import (
    DecoderShape,
    decode_flops,
    decoder_shape,
    head_flops,
    kv_bytes,
    layer_flops,
    layers_flops,
    prefill_flops,
)
from vtprune.cost.towers import vision_shape
from vtprune.cost.vision import (
    VisionShape,
    projector_flops,
    tile_units,
    tower_flops,
    vision_flops,
)

__all__ = [
    "DecoderShape",
    "VisionShape",
    "decode_flops",
    "decoder_shape",
    "head_flops",
    "kv_bytes",
    "layer_flops",
    "layers_flops",
    "prefill_flops",
    "projector_flops",
    "tile_units",
    "tower_flops",
    "vision_flops",
    "vision_shape",
]
