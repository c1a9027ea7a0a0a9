"""The trainer's forward pass: many questions about one picture read in one pass of the decoder.

Each question sees the visual tokens and itself, never another question, and its positions go on
from the last visual token. So every question costs only its own tokens, and what is learned is
exactly the prompt of inference: one picture, one question. Several short questions share a row. The
parameters are those of the stock layers, used in place; `tests/test_demo_architectures.py` holds
this pass equal to the stock one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaModel, Qwen2_5_VLTextModel, Qwen2Model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

Decoder = LlamaModel | Qwen2Model | Qwen2_5_VLTextModel
DecoderLayer = LlamaDecoderLayer | Qwen2DecoderLayer | Qwen2_5_VLDecoderLayer
LayerWeights = tuple[Tensor, ...]


class Seen(NamedTuple):
    """What tokens see: cosine and sine of their positions, and `apart` as in `decoder_layer`."""

    cos: Tensor
    sin: Tensor
    apart: Tensor


def layer_weights(layer: DecoderLayer | nn.Module) -> LayerWeights:
    """The parameters of a Llama or Qwen2 layer, for `decoder_layer`; biases may be missing."""
    assert isinstance(layer, DecoderLayer)
    attention, mlp = layer.self_attn, layer.mlp
    queries, keys, values = (
        (part.weight, part.weight.new_zeros(part.out_features) if part.bias is None else part.bias)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return (
        layer.input_layernorm.weight,
        *queries, *keys, *values,
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last axis, in float32."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * weight).to(torch.bfloat16 if x.dtype == torch.bfloat16 else x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x (B, L, H, head width); cos and sin are (B or 1, L, 1, head width)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def decoder_layer(
    x: Tensor,
    weights: LayerWeights,
    cos: Tensor,
    sin: Tensor,
    num_prefix: int,
    num_rows: int,
    apart: Tensor,
    heads: int,
    kv_heads: int,
    eps: float,
) -> Tensor:
    """One decoder layer over x (B, prefix + rows x length, D), questions kept apart.

    `apart` (B, rows, length, length) says which tokens of its row a token does not see.
    """
    norm1, wq, bq, wk, bk, wv, bv, wo, norm2, w_gate, w_up, w_down = weights
    batch, total, _ = x.shape
    group, head = heads // kv_heads, wq.shape[0] // heads
    length = (total - num_prefix) // num_rows
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    y = rms_norm(x, norm1, eps).to(dtype)
    q = rotate(F.linear(y, wq, bq).view(batch, total, heads, head), cos, sin)
    k = rotate(F.linear(y, wk, bk).view(batch, total, kv_heads, head), cos, sin)
    v = F.linear(y, wv, bv).view(batch, total, kv_heads, head)
    # (B, KV, group, L, head): the query heads of one key head together, so keys are never repeated.
    q = q.view(batch, total, kv_heads, group, head).permute(0, 2, 3, 1, 4) * head**-0.5
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, KV, L, head)
    q_prefix, q_question = q[..., :num_prefix, :], q[..., num_prefix:, :]
    k_prefix, k_question = k[:, :, :num_prefix], k[:, :, num_prefix:]
    v_prefix, v_question = v[:, :, :num_prefix], v[:, :, num_prefix:]

    rows = q_prefix.reshape(batch, kv_heads, group * num_prefix, head)
    scores = (rows @ k_prefix.transpose(-1, -2)).view(
        batch, kv_heads, group, num_prefix, num_prefix
    )
    causal = torch.ones(num_prefix, num_prefix, dtype=torch.bool, device=x.device).tril()
    weight = scores.float().masked_fill(~causal, -torch.inf).softmax(-1).to(dtype)
    out_prefix = weight.view(batch, kv_heads, group * num_prefix, num_prefix) @ v_prefix
    out_prefix = out_prefix.view(batch, kv_heads, group, num_prefix, head)

    rest = num_rows * length
    rows = q_question.reshape(batch, kv_heads, group * rest, head)
    seen = (rows @ k_prefix.transpose(-1, -2)).view(
        batch, kv_heads, group, num_rows, length, num_prefix
    )
    blocks = q_question.reshape(batch, kv_heads, group, num_rows, length, head)
    k_blocks = k_question.reshape(batch, kv_heads, 1, num_rows, length, head)
    v_blocks = v_question.reshape(batch, kv_heads, 1, num_rows, length, head)
    own = blocks @ k_blocks.transpose(-1, -2)  # (B, KV, group, rows, length, length)
    own = own.float().masked_fill(apart[:, None, None], -torch.inf)
    # One softmax over both parts, without laying them side by side.
    seen = seen.float()
    top = torch.maximum(seen.amax(-1, keepdim=True), own.amax(-1, keepdim=True)).detach()
    seen, own = (seen - top).exp(), (own - top).exp()
    total_weight = seen.sum(-1, keepdim=True) + own.sum(-1, keepdim=True)
    from_prefix = seen.to(dtype).view(batch, kv_heads, group * rest, num_prefix) @ v_prefix
    from_own = own.to(dtype) @ v_blocks
    share = total_weight.reciprocal().reshape(batch, kv_heads, group, rest, 1)
    shape = (batch, kv_heads, group, rest, head)
    out_question = ((from_prefix.view(shape).float() + from_own.reshape(shape).float()) * share).to(
        dtype
    )
    out = torch.cat((out_prefix, out_question), dim=3)  # (B, KV, group, L, head)
    out = out.permute(0, 3, 1, 2, 4).reshape(batch, total, heads * head)
    x = x + F.linear(out, wo)
    y = rms_norm(x, norm2, eps).to(dtype)
    return x + F.linear(F.silu(F.linear(y, w_gate)) * F.linear(y, w_up), w_down)


def attention_to_prefix(
    x: Tensor,
    layer: DecoderLayer | nn.Module,
    seen: Seen,
    key_head: int,
    asked: Tensor,
) -> Tensor:
    """How much of its attention one key head's queries give the prefix: logarithms (n, G, P).

    Args:
        x: what goes into the layer, (B, P + R x L, D).
        asked: of which of the questions' tokens, (B, R, L) bool.
    """
    assert isinstance(layer, DecoderLayer)
    attention, width = layer.self_attn, layer.self_attn.head_dim
    group = attention.num_key_value_groups
    batch, row, _ = place = asked.nonzero(as_tuple=True)
    num_prefix = x.shape[1] - asked[0].numel()
    y = rms_norm(x, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)
    cos, sin = (value.expand(len(x), *value.shape[1:]) for value in (seen.cos, seen.sin))
    part = slice(key_head * width, (key_head + 1) * width)
    keys = F.linear(y, attention.k_proj.weight[part], attention.k_proj.bias[part])
    keys = rotate(keys[:, :, None], cos, sin)[:, :, 0].float()
    own = keys[:, num_prefix:].unflatten(1, asked.shape[1:])[batch, row]  # (n, L, head width)
    asking, cos, sin = (
        value[:, num_prefix:].unflatten(1, asked.shape[1:])[place] for value in (y, cos, sin)
    )
    part = slice(part.start * group, part.stop * group)
    q = F.linear(asking, attention.q_proj.weight[part], attention.q_proj.bias[part])
    q = rotate(q.unflatten(-1, (group, width)), cos, sin).float() * width**-0.5
    of_prefix = torch.einsum("ngd,npd->ngp", q, keys[batch, :num_prefix])
    of_row = torch.einsum("ngd,nld->ngl", q, own)
    of_row = of_row.masked_fill(seen.apart[place][:, None], -torch.inf)
    return torch.cat((of_prefix, of_row), dim=-1).log_softmax(-1)[..., :num_prefix]


def read_packed(
    decoder: Decoder,
    prefix: Tensor,
    rows: Tensor,
    positions: tuple[Tensor, Tensor],
    segments: Tensor,
    layer: Callable[..., Tensor] = decoder_layer,
    watch: Callable[[int, Tensor, Seen], None] | None = None,
) -> Tensor:
    """The decoder's last states (B, R, L, D) at the tokens of questions that share a prefix.

    Args:
        decoder: a Llama, Qwen2 or Qwen2.5-VL one (the language model of the checkpoint).
        prefix: embeddings (B, P, D) of everything before a question, visual tokens in place.
        rows: embeddings (B, R, L, D) of rows of questions with their answers, padded on the right.
        positions: of the prefix, (P,) or (3, P), and of the rows' tokens, (B, R, L).
        segments: (B, R, L): tokens of one question have one number.
        layer: `decoder_layer`, or a compiled version of it.
        watch: is given the number of each layer, what goes into it, (B, P + R x L, D), and what its
            tokens see.
    """
    config = decoder.config
    batch, num_prefix, width = prefix.shape
    num_rows, length = rows.shape[1:3]
    before, after = positions
    after = after.flatten(1)
    if before.ndim == 2:  # time, height and width
        after = after.expand(len(before), *after.shape)
    before = before.unsqueeze(-2).expand(*after.shape[:-1], num_prefix)
    x = torch.cat((prefix, rows.flatten(1, 2)), dim=1)
    cos, sin = decoder.rotary_emb(x.float(), torch.cat((before, after), dim=-1))
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    apart = ~(causal & (segments[..., :, None] == segments[..., None, :]))
    for number, module in enumerate(decoder.layers):
        if watch is not None:
            watch(number, x, Seen(cos, sin, apart))
        x = layer(
            x,
            layer_weights(module),
            cos,
            sin,
            num_prefix,
            num_rows,
            apart,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.rms_norm_eps,
        )
    x = rms_norm(x[:, num_prefix:], decoder.norm.weight, config.rms_norm_eps)
    return x.view(batch, num_rows, length, width)
