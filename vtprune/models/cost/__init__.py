"""What a model's forward pass costs: FLOPs and bytes, from shapes alone; no model needed.

A multiply and an add are two FLOPs. Matrix products and convolutions are counted and nothing else
(no norms, softmax, rotary embedding, pooling by averages or activation), and attention as full
squares: neither the causal half nor a sliding window is saved, because kernels differ in whether
they save it. Of a mixture of experts the router, the shared experts and those that a token goes
through are counted. torch's FlopCounterMode counts the same way, with eager attention on any device
and with sdpa on a GPU; sdpa on a CPU it leaves out.
"""

from vtprune.models.cost.decoder import (
    DecoderShape,
    Experts,
    decode_flops,
    decoder_shape,
    head_flops,
    kv_bytes,
    layer_flops,
    layers_flops,
    mlp_width,
    prefill_flops,
)
from vtprune.models.cost.sizes import CostError
from vtprune.models.cost.towers import vision_shape
from vtprune.models.cost.vision import (
    VisionShape,
    projector_flops,
    tile_units,
    tower_flops,
    vision_flops,
)

__all__ = [
    "CostError",
    "DecoderShape",
    "Experts",
    "VisionShape",
    "decode_flops",
    "decoder_shape",
    "head_flops",
    "kv_bytes",
    "layer_flops",
    "layers_flops",
    "mlp_width",
    "prefill_flops",
    "projector_flops",
    "tile_units",
    "tower_flops",
    "vision_flops",
    "vision_shape",
]
