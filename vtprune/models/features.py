"""What a decoder's layers do: attention over keys of their own and token-wise work, or refused.

Dropping a token equals masking its key only where nothing but attention carries anything from one
token to another, and where attention takes positions from its arguments. Each of that is looked for
in the layers themselves: their arguments, the modules in them, what their attention counts.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable
from contextlib import suppress

from torch import nn

from vtprune.errors import ModelError
from vtprune.models.seams import LAYER_TYPES, unknown

TYPE_REASONS = {
    "linear_attention": "carry a state over all tokens",
    "conv": "mix neighbouring tokens",
    "mamba": "carry a state over all tokens",
    "recurrent": "carry a state over all tokens",
    "chunked": "attend within chunks of the sequence",
    "hybrid": "mix neighbouring tokens",
    "indexed": "choose by an index over all tokens which of them they see",
    "sparse": "choose by an index over all tokens which of them they see",
    "reference": "see some tokens by their place in the sequence",
}
"""Why layers of other types can't be cut."""
ARGUMENT_REASONS = {
    "encoder_hidden_states": "its layers can attend to another sequence than their own",
    "cross_attention": "its layers can attend to another sequence than their own",
    "shared_kv_states": "its layers can hand keys and values to one another",
    "per_layer_input": "its layers can take an input of their own for every token",
    "topk_indices": "its layers can share a choice of the keys that they see",
    "conv_mask": "its layers mix neighbouring tokens (convolution)",
    "block_states": "its layers read the states of earlier blocks of layers",
    "moe_mm_token_type_ids": "its experts are told by column what is a picture",
    "alibi": "its attention is biased by distances in the sequence",
    "cache_position": "its attention counts tokens by their place in the cache",
}
"""Why a layer or decoder with such an argument, or one whose name holds this, can't be cut."""
MIXES = re.compile(
    r"Conv|Mamba|SSM|Delta|Recurr|Retention|RWKV|Indexer|Compress|Relative|Engram|LSTM|GRU"
)
"""Names of modules that carry something from token to token beside attention."""
TOKEN_WISE = re.compile(
    r"Attention|Attn|Norm|MLP|Mlp|FFN|FeedForward|MoE|Moe|Expert|Router|Gate|Linear|Dense"
    r"|RotaryEmbedding|Activation|GELU|SiLU|ReLU|Sigmoid|Tanh|Softplus|Dropout|Identity|Clip"
)
"""Names of modules that work on each token by itself, and of attention."""
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
"""Modules that do nothing themselves."""
COUNTS = re.compile(r"\b(arange|get_seq_length|cache_position|cumsum|topk)\b")
"""What an attention module calls that counts tokens or keys, which are fewer after a cut."""


def refuse_encoder(model_type: str, config: object, way_out: str) -> None:
    """Refuse an encoder-decoder by its config.

    Raises:
        ModelError: it is one.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{model_type}: an encoder-decoder: its pictures go to the encoder, and its decoder "
            "holds no visual tokens",
            way_out,
        )


def check_features(
    model_type: str, decoder: nn.Module, layers: Iterable[nn.Module], way_out: str
) -> None:
    """Refuse a decoder in which dropping keys is not masking them.

    Raises:
        ModelError: names what its layers do.
    """
    types = [str(name) for name in getattr(decoder.config, "layer_types", None) or ()]
    for name in types:
        if name not in LAYER_TYPES and not any(part in name for part in TYPE_REASONS):
            raise unknown(f"{model_type}: its decoder has layers of type {name}")
    if reason := find_reason(decoder, list(layers)):
        raise ModelError(f"{model_type}: {reason}", way_out)


def find_reason(decoder: nn.Module, layers: list[nn.Module]) -> str:
    """Return why a decoder can't be cut; empty where it can."""
    text = decoder.config
    for name in getattr(text, "layer_types", None) or ():
        if str(name) not in LAYER_TYPES:
            why = next(TYPE_REASONS[key] for key in TYPE_REASONS if key in str(name))
            return f"layers of type {name} {why}, which dropping tokens would change"
    if getattr(text, "num_kv_shared_layers", 0):
        return "its layers share keys and values"
    if getattr(text, "hidden_size_per_layer_input", 0):
        return "its layers take an input of their own for every token"
    for module in (decoder, *layers):
        for name in inspect.signature(module.forward).parameters:
            for part, why in ARGUMENT_REASONS.items():
                if part in name:
                    return f"{why} ({name})"
    return next(filter(None, map(_layer_reason, layers)), "")


def _layer_reason(layer: nn.Module) -> str:
    """Return what one layer does beside attention and token-wise work; empty for nothing."""
    for module in layer.modules():
        kind = type(module)
        if isinstance(module, CONTAINERS) or kind.__module__.split(".")[0] == "peft":
            continue  # adapters are checked as such
        if MIXES.search(kind.__name__):
            return f"{kind.__name__} in its layers mixes tokens beside attention"
        if module is not layer and not TOKEN_WISE.search(kind.__name__):
            return f"vtprune does not know whether {kind.__name__} in its layers mixes tokens"
        if "attention" in kind.__name__.lower() and COUNTS.search(_source(kind)):  # type: ignore[arg-type]
            return f"{kind.__name__} counts the tokens of the sequence, which a cut makes fewer"
    return ""


@functools.cache
def _source(kind: type[nn.Module]) -> str:
    """Return the source of the methods of a module's class; empty where there is none to read.

    Not that of the class: up to Python 3.12 `inspect` parses the file for it, and parsing raises
    SystemError where several threads do it at once.
    """
    sources = []
    for method in vars(kind).values():
        if inspect.isfunction(method):
            with suppress(OSError, TypeError):
                sources.append(inspect.getsource(method))
    return "".join(sources)
