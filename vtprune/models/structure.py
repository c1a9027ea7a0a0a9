"""The parts of a model that pruning touches, or the reason why it can't be pruned.

Dropping a token equals masking its key only where nothing but attention carries anything from one
token to another, and where attention takes positions from its arguments. Layers that keep a state
of all tokens in the cache (linear attention, convolutions) have no keys to mask: there a cut is
right where the layers from it on do to the shorter sequence what they do to any. Each of that is
looked for in the layers themselves: their arguments, the modules in them, what their attention
counts, what they keep in the cache.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from vtprune.errors import ModelError
from vtprune.models import FAMILIES, find_family
from vtprune.models.adapters import refuse_compiled, running_module, unwrap
from vtprune.models.base import Family
from vtprune.models.generic import placeholder_ids
from vtprune.models.seams import (
    BLOCKS,
    CHOICE,
    LAYER_TYPES,
    PER_LAYER_INPUT,
    POSITIONS,
    REPEATED,
    SHARED,
    LayerMemory,
    Seams,
    bias_module,
    carries_blocks,
    chooses_keys,
    counts_distances,
    find_seams,
    gates_queries,
    key_layers,
    layer_config,
    layer_memories,
    masks_choice,
    reads_marks,
    releases,
    scaled_module,
    scales_queries,
    scaling_floor,
    sees_all_positions,
    takes_over_choice,
    unknown,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DEEPSTACK = "_deepstack_process"
"""The decoder's method that adds visual features to the states after a layer, as in Qwen3-VL."""
DEEPSTACK_TAKES = ["hidden_states", "visual_pos_masks", "visual_embeds"]
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f", "norm_f")
"""What transformers' decoders call the norm after their last layer."""
ATTENTION_MODULES = ("self_attn", "mixer")
"""What transformers' layers call the module in which they attend."""
FIRST_NORMS = ("input_layernorm", "operator_norm")
"""What they call the norm before it."""
MASKED, LAYER_LOOP = "masked", "layer loop"
"""What pruning equals: the model with the dropped tokens masked as keys, or, where layers keep a
state of all tokens, a loop over its layers, each on the tokens that are left there."""
WAY_OUT = f"families: {', '.join(FAMILIES)}; others need the same structure (vtprune models)"
TYPE_REASONS = {
    "indexed": "choose by an index over all tokens which of them they see",
    "sparse": "choose the keys that they see by blocks of slots in the cache",
    "reference": "see some tokens by their place in the sequence",
}
"""Why layers of other types can't be cut."""
ARGUMENT_REASONS = {
    "encoder_hidden_states": "its layers can attend to another sequence than their own",
    "cross_attention": "its layers can attend to another sequence than their own",
    "image_encoder_embeddings": "its layers can attend to another sequence than their own",
    "topk_indices": "its layers can share a choice of the keys that they see",
    "block_states": "its layers read the states of earlier blocks of layers",
    "alibi": "its attention is biased by distances in the sequence",
    "cache_position": "its attention counts tokens by their place in the cache",
}
"""Why a layer or decoder with such an argument, or one whose name holds this, can't be cut."""
KEEPS_STATE = re.compile(
    r"Conv|Mamba|SSM|Delta|Recurr|Retention|RWKV|LinearAttention|LSTM|GRU|NGramEmbedding|PLELayer"
)
"""Names of modules that carry a state from token to token: a layer has to keep it in the cache."""
MIXES = {
    "Indexer": "chooses by an index over all tokens which of them are seen",
    "Compress": "makes one key of several tokens",
    "Relative": "biases attention by how many tokens lie between, which a cut makes fewer",
    "Engram": "reads runs of neighbouring tokens",
}
"""Names of other modules that carry something from token to token -> what they do."""
TOKEN_WISE = re.compile(
    r"Attention|Attn|Norm|MLP|Mlp|HyperConnection|FFN|FeedForward|MoE|Moe|Expert|Router|Gate|Linear|Dense|Projection|LogScale"
    r"|AltUp|Laurel|RotaryEmbedding|Activation|GELU|SiLU|SwiGLU|Softcap|ReLU|Sigmoid|Tanh|Softplus|Dropout|Identity|Clip"
    r"|SoftmaxScaling|GatedResidual|^Embedding$"
)
"""Names of modules that work on each token by itself, and of attention."""
MAKES_WINDOWS = ("sliding", "chunked", "create_masks_for_generate")
"""What the source of a decoder, or of the model around it, names if it makes masks with windows."""
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
"""Modules that do nothing themselves."""
COUNTS = re.compile(r"\b(arange|get_seq_length|cache_position|cumsum|topk)\b")
"""What an attention module calls that counts tokens or keys, which are fewer after a cut."""


@dataclass(frozen=True, eq=False)
class Structure:
    """The parts of one model that pruning touches.

    Args:
        model: the transformers model, without what was wrapped around it.
        inner: the multimodal model whose forward takes input_ids and pixel values.
        decoder: its language model.
        layers: the decoder's layers.
        seams: the arguments of these parts.
        memories: what every layer has in the cache, its own or an earlier layer's.
        key_layers: for every layer the one whose keys and values it sees, itself or an earlier one.
        family: its family.
        num_heads: of its first layer.
    """

    model: PreTrainedModel
    inner: nn.Module
    decoder: nn.Module
    layers: tuple[nn.Module, ...]
    seams: Seams
    key_layers: tuple[int, ...]
    family: Family
    config: PreTrainedConfig
    model_type: str
    num_heads: int
    hidden_size: int
    attention: str
    two_way: bool
    memories: tuple[LayerMemory, ...]

    @property
    def device(self) -> torch.device:
        """The device of the decoder's first weights."""
        return next(self.decoder.parameters()).device

    @functools.cached_property
    def first_with_keys(self) -> int:
        """The first layer that keeps keys, whose length transformers takes for the cache's."""
        return next(n for n, memory in enumerate(self.memories) if memory.keys)

    def keeps_state(self, first: int = 0) -> bool:
        """Return whether any layer from `first` on keeps a state, or an index, of all tokens."""
        return any(memory.of_all_tokens for memory in self.memories[first:])

    @functools.cached_property
    def cut_layers(self) -> tuple[int, ...]:
        """The layers before which tokens can be dropped.

        Not before those that take over which slots the layer before sees, and not between a layer
        and one that chooses by an index among its keys: the index has those of its own layer.
        Where an index has the positions of all that the decoder was given, only at the input.
        """
        if any(map(sees_all_positions, self.layers)):
            return (0,)
        choosing = [n for n, layer in enumerate(self.layers) if masks_choice(layer)]
        return tuple(
            n
            for n, layer in enumerate(self.layers)
            if not takes_over_choice(layer)
            and all(self.key_layers[later] >= n for later in choosing if later >= n)
        )

    @functools.cached_property
    def reads_masks(self) -> bool:
        """Whether layers choose keys by their masks, and so have one where nothing is hidden."""
        return any(map(masks_choice, self.layers))

    @functools.cached_property
    def first_sharing(self) -> int:
        """The first layer that sees the keys and values of an earlier one; else their number."""
        sharing = (n for n, source in enumerate(self.key_layers) if source != n)
        return next(sharing, len(self.layers))

    def scaling_layers(self, columns: int) -> list[int]:
        """Return the layers that scale queries by their place, which so many columns reach."""
        return [layer for layer, first in self._scales_from.items() if columns >= first]

    @functools.cached_property
    def _scales_from(self) -> dict[int, float]:
        """Layer -> the number of columns from which on it scales queries."""
        modules = [getattr(layer, "self_attn", None) for layer in self.layers]
        floors = {n: scaling_floor(module) for n, module in enumerate(modules)}
        return {n: floor for n, floor in floors.items() if floor is not None}

    def scaled_queries(self, layer: int) -> nn.Module:
        """Return the module whose output is the queries of a layer that it scales by their place.

        It is (B, n, H x D), or (B, n, H, D).
        """
        return scaled_module(self.attention_module(layer)) or self.projection(layer, "query")

    @functools.cached_property
    def carries_blocks(self) -> bool:
        """Whether the decoder adds states of all tokens to those of earlier blocks of layers."""
        return carries_blocks(self.decoder, self.layers)

    @functools.cached_property
    def distance_layers(self) -> tuple[int, ...]:
        """The layers whose attention is biased by the distances of tokens (Inkling)."""
        return tuple(n for n, layer in enumerate(self.layers) if counts_distances(layer))

    def head_dim(self, layer: int) -> int:
        """Return the width of a head of a layer; layers of one decoder may differ in it.

        Of queries made of a latent the attention module says it: their config's is of the part with
        positions alone (DeepSeek, Mistral Large 4).
        """
        width = getattr(getattr(self.layers[layer], "self_attn", None), "qk_head_dim", None)
        if isinstance(width, int):
            return width
        default = self.hidden_size // self.heads_in(layer)
        return _size(self.model_type, layer_config(self.decoder_config, layer), "head_dim", default)

    def heads_in(self, layer: int) -> int:
        """Return the number of heads of a layer; layers of one decoder may differ in it."""
        config = layer_config(self.decoder_config, layer)
        return _size(self.model_type, config, "num_attention_heads", self.num_heads)

    def projection(self, layer: int, state: str) -> nn.Module:
        """Return the module whose output is the query, key or value of a layer.

        Raises:
            ModelError: this model computes them together.
        """
        if state == "value" and self._shares_key_projection(layer):
            state = "key"
        # Of queries that are made of a latent, the projection after it (DeepSeek, GLM-5-next).
        names = ("q_proj", "q_b_proj") if state == "query" else (f"{state[0]}_proj",)
        return self._part(
            layer,
            (f"{module}.{name}" for module in ATTENTION_MODULES for name in names),
            f"separate {state} projection to read",
            "use a method without states, such as random or uniform",
        )

    def _shares_key_projection(self, layer: int) -> bool:
        """Return whether a layer's values are its keys before their norm (Gemma 4)."""
        return getattr(getattr(self.layers[layer], "self_attn", None), "v_proj", self) is None

    def without_gate(self, layer: int, state: str, output: torch.Tensor) -> torch.Tensor:
        """Return what a projection gives without a gate beside each head's query, (..., H x D).

        Raises:
            ModelError: it gives more than queries, in an unknown order.
        """
        num_heads = self.heads_in(layer)
        if state != "query" or output.shape[-1] != 2 * num_heads * self.head_dim(layer):
            return output
        if not gates_queries(self.attention_module(layer)):
            raise ModelError(
                f"{self.model_type}: the query projection of layer {layer} gives more than queries",
                "use a method without states, such as random or uniform",
            )
        return output.unflatten(-1, (num_heads, 2, -1))[..., 0, :].flatten(-2)

    def attention_module(self, layer: int) -> nn.Module:
        """Return the module in which a layer attends."""
        module = self._part(
            layer,
            ATTENTION_MODULES,
            "self_attn to read attention from",
            "use a method that reads no attention, such as entropy, dart or random",
        )
        return running_module(module)

    def norm(self, layer: int) -> nn.Module:
        """Return the norm that a layer applies before attention."""
        return self._part(
            layer,
            FIRST_NORMS,
            "input_layernorm to read states after",
            "cut at a layer number instead of the input, or use random or uniform",
        )

    @functools.cached_property
    def final_norm(self) -> nn.Module:
        """The norm that the decoder applies after its last layer.

        Raises:
            ModelError: none can be told from the decoder's other parts.
        """
        for name in FINAL_NORMS:
            module = getattr(self.decoder, name, None)
            if isinstance(module, nn.Module):
                return module
        norms = [module for module in self.decoder.children() if self._is_norm(module)]
        if len(norms) != 1:
            raise ModelError(
                f"{self.model_type}: its decoder has {len(norms)} norms beside its layers, so the "
                "final one to read states after is not known",
                "use a method that reads no normed states, such as entropy, divprune or random",
            )
        return norms[0]

    def _is_norm(self, module: nn.Module) -> bool:
        """Return whether a module holds one weight a channel, and at most a bias beside it."""
        shapes = {name: tuple(weight.shape) for name, weight in module.named_parameters()}
        shape = (self.hidden_size,)
        return shapes in ({"weight": shape}, {"weight": shape, "bias": shape})

    def apply_final_norm(self, states: torch.Tensor) -> torch.Tensor:
        """(n, d) states after the decoder's final norm, on their own device.

        A decoder spread over devices has its final norm on the last one.
        """
        weight = next(self.final_norm.parameters(), None)
        device = states.device
        if weight is not None and weight.device.type != "meta":  # else its own hook moves both
            device = weight.device
        return self.final_norm(states[None].to(device))[0].to(states.device)

    def _part(self, layer: int, paths: Iterable[str], lacks: str, way_out: str) -> nn.Module:
        """Return a module inside a layer, by the first of its possible paths that is there."""
        for path in paths:
            part: object = self.layers[layer]
            for name in path.split("."):
                part = getattr(part, name, None)
            if isinstance(part, nn.Module):
                return part
        raise ModelError(f"{self.model_type}: layer {layer} has no {lacks}", way_out)

    @property
    def one_dimensional(self) -> bool:
        """Whether a position id is one number, and not a time, a row and a column (mrope)."""
        return not hasattr(self.inner, POSITIONS)

    @property
    def num_positions(self) -> int | None:
        """Positions that the decoder was made for; None where its config does not say.

        Rotary embeddings that are stretched by a factor reach further than those of its training:
        "linear" and "dynamic" ones from `max_position_embeddings` on, "yarn" from a number of its
        own. Where each kind of layer has its own embedding (Gemma 3), the config's number is the
        stretched one.
        """
        count = getattr(self.decoder_config, "max_position_embeddings", None)
        if not isinstance(count, int) or count <= 0:
            return None
        rope = getattr(self.decoder_config, "rope_parameters", None) or {}
        kind, begin = rope.get("rope_type"), count
        if kind == "yarn":
            begin = rope.get("original_max_position_embeddings") or count
        elif kind not in ("linear", "dynamic"):
            return count
        return max(count, int(begin * (rope.get("factor") or 1)))

    def rope_type(self, layer: int) -> str:
        """Return the name of a layer's rotary embedding, where layers have different ones; else "".

        Molmo2 scales those of some layers; Gemma 3's differ by the layer's type.
        """
        types = getattr(self.decoder, "rope_types", None)
        if types is None:
            types = getattr(self.decoder_config, "layer_types", None)
        return str(types[layer]) if types else ""

    def first_of_type(self, name: str) -> int:
        """Return the first layer of a type; 0 where there is none."""
        types = list(getattr(self.decoder_config, "layer_types", None) or ())
        return types.index(name) if name in types else 0

    def rotary(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> object:
        """Return the position embeddings of a layer, for position ids (B, n)."""
        rotary: Callable[..., object] = self.decoder.rotary_emb  # type: ignore[assignment]
        if self.rope_type(layer) == "unscaled":
            rotary = self.decoder.rotary_emb_unscaled  # type: ignore[assignment]
        takes = inspect.signature(self.decoder.rotary_emb.forward).parameters  # type: ignore[arg-type, union-attr]
        if "layer_type" in takes:
            return rotary(hidden, positions, self.decoder_config.layer_types[layer])
        return rotary(hidden, positions)

    def placeholders(self) -> Mapping[str, tuple[int, ...]]:
        """Return modality -> token ids that stand for its features."""
        return self.family.placeholders(self.config)

    def placeholder_ids(self) -> set[int]:
        """Return all token ids that stand for visual features."""
        return set().union(*self.placeholders().values())

    def window(self, layer: int) -> int | None:
        """Return the width of a layer's window or chunks; None where it sees everything."""
        if not self._makes_windows:
            return None
        config = layer_config(self.decoder_config, layer)
        if self.is_chunked(layer):
            return int(config.attention_chunk_size)  # type: ignore[attr-defined]
        types = getattr(self.decoder_config, "layer_types", None)
        if types is not None and "sliding" not in str(types[layer]):
            return None
        uses = getattr(config, "use_sliding_window", True)
        window = getattr(config, "sliding_window", None)
        return int(window) if uses and window else None

    def is_chunked(self, layer: int) -> bool:
        """Return whether the tokens of a layer see those of their own chunk alone (Llama 4)."""
        types = getattr(self.decoder_config, "layer_types", None) or ()
        return bool(types) and "chunked" in str(types[layer])

    @functools.cached_property
    def _makes_windows(self) -> bool:
        """Whether masks are made with the window that the config names, which some decoders ignore.

        Qwen3-VL's makes causal masks alone (5.17 to 5.24).
        """
        sources = [_source(type(module)) for module in (self.decoder, self.inner)]  # type: ignore[arg-type]
        return any(name in source for source in sources for name in MAKES_WINDOWS)

    def window_within(self, layer: int, columns: int) -> int | None:
        """Return the window of a layer that is narrower than so many columns; None: it is not."""
        window = self.windows[layer]
        return window if window is not None and columns > window else None

    def first_windowed(self, columns: int) -> int | None:
        """Return the first layer whose window is narrower than so many columns; None: none is."""
        if self.narrowest_window is None or columns <= self.narrowest_window:
            return None
        layers = range(len(self.layers))
        return next(n for n in layers if self.window_within(n, columns) is not None)

    @functools.cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The width of every layer's sliding window; None where it sees everything."""
        return tuple(self.window(layer) for layer in range(len(self.layers)))

    @functools.cached_property
    def narrowest_window(self) -> int | None:
        """The smallest sliding window of the decoder's layers; None where all see everything."""
        return min((window for window in self.windows if window), default=None)

    @property
    def decoder_config(self) -> PreTrainedConfig:
        return self.decoder.config  # type: ignore[return-value]


def pruned_equals(model: nn.Module) -> str | None:
    """Return what a pruned answer of a model equals; None: it can't be pruned."""
    try:
        structure = find_structure(model)
    except ModelError:
        return None
    return LAYER_LOOP if structure.keeps_state() else MASKED


def find_structure(wrapped: nn.Module) -> Structure:
    """Find the parts of a model that pruning touches.

    Args:
        wrapped: a transformers model, or what holds one: a PEFT model, a module with `.module`.

    Raises:
        ModelError: a model that can't be pruned, with the reason.
    """
    model = cast("PreTrainedModel", unwrap(wrapped))
    model_type = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if not hasattr(model, "get_decoder") or not hasattr(model, "config"):
        raise ModelError(
            f"{model_type}: not a transformers model with a decoder ({releases()})", WAY_OUT
        )
    refuse_encoder(model_type, model.config, WAY_OUT)
    refuse_other_generation(model_type, type(model), WAY_OUT)
    if isinstance(getattr(model, "thinker", None), nn.Module):  # Qwen-Omni
        raise ModelError(
            f"{model_type}: several models in one, of which the thinker reads the prompt",
            "prune that one: vtprune.pruning(model.thinker, ...), and generate as before",
        )
    _refuse_own_pruning(model_type, model)
    decoder, layers = find_decoder(model), decoder_layers(model)
    family = find_family(model_type)
    check_types(model_type, decoder, list(layers))
    sources = key_layers(model_type, list(layers))
    own = layer_memories(model_type, decoder.config, len(layers))  # type: ignore[arg-type]
    memories = tuple(
        # What an index has of a masked key is masked with it.
        replace(own[source], index=own[source].index and not masks_choice(layer))
        for source, layer in zip(sources, layers, strict=True)
    )
    check_decoder(model_type, decoder, layers, memories, WAY_OUT)
    _check_deepstack(model_type, decoder)
    config = decoder.config
    num_heads = _size(model_type, layer_config(config, 0), "num_attention_heads")
    hidden_size = _size(model_type, config, "hidden_size")
    attention = str(getattr(config, "_attn_implementation", "eager"))
    if attention not in ("sdpa", "eager") and not attention.startswith("flash_attention"):
        raise ModelError(
            f"attention {attention!r} prepares masks that can't be cut",
            "load the model with attention sdpa, eager or flash_attention_2",
        )
    inner = _find_inner(model)
    # Feed-forward networks may be compiled: nothing is hooked or read inside of them.
    attending = [getattr(layer, "self_attn", None) for layer in layers]
    inside = [part for module in attending if module is not None for part in module.modules()]
    refuse_compiled((model, inner, decoder, *layers, *inside))
    seams = find_seams(model_type, model, inner, decoder, layers, family.listed)
    if not placeholder_ids(model.config):
        raise ModelError(f"{model_type}: its config names no image or video token", WAY_OUT)
    return Structure(
        model=model,
        inner=inner,
        decoder=decoder,
        layers=tuple(layers),
        seams=seams,
        key_layers=sources,
        family=family,
        config=model.config,
        model_type=model_type,
        num_heads=num_heads,
        hidden_size=hidden_size,
        attention=attention,
        two_way=_sees_two_ways(model, inner, config)
        and any(memory.keys and not memory.index for memory in memories),
        memories=memories,
    )


def _refuse_own_pruning(model_type: str, model: PreTrainedModel) -> None:
    """Refuse a model that drops tokens of videos itself, between its tower and its decoder.

    As Nemotron-H Omni can: which of its columns are left, only its own forward knows.
    """
    rate = getattr(model, "video_pruning_rate", 0)
    if rate:
        raise ModelError(
            f"{model_type}: it drops {rate:.0%} of a video's tokens itself (video_pruning_rate "
            f"{rate})",
            "set video_pruning_rate to 0 in its config.json (model.video_pruning_rate = 0 in "
            "Python), and let vtprune drop them",
        )


def _sees_two_ways(model: PreTrainedModel, inner: nn.Module, config: object) -> bool:
    """Return whether tokens of a picture may see later ones of it."""
    if getattr(config, "use_bidirectional_attention", "") is None:  # the smaller models of Gemma 4
        return False
    prepares_masks = "create_masks_for_generate" in vars(type(model))
    # Inkling's inner model takes them, but is never given any.
    takes = [inspect.signature(module.forward).parameters for module in (model, inner)]
    return prepares_masks or all("token_type_ids" in names for names in takes)


def _find_inner(model: PreTrainedModel) -> nn.Module:
    for module in (getattr(model, "model", None), model):
        if isinstance(module, nn.Module):
            takes = inspect.signature(module.forward).parameters
            if any(name.startswith("pixel_values") for name in takes):
                return module
    raise ModelError(f"{type(model).__name__} takes no pixel values ({releases()})", WAY_OUT)


def _check_deepstack(model_type: str, decoder: nn.Module) -> None:
    """Refuse decoders that add visual features to several layers in an unknown way."""
    takes = inspect.signature(decoder.forward).parameters
    if not any("deepstack" in name for name in takes):
        return
    if reads_marks(_source(type(decoder))):  # type: ignore[arg-type]
        return
    process = getattr(decoder, DEEPSTACK, None)
    if process is None or list(inspect.signature(process).parameters) != DEEPSTACK_TAKES:
        raise ModelError(
            f"{model_type}: visual features enter several of its layers (deepstack), but not as in "
            "Qwen3-VL, so they can't be cut",
            WAY_OUT,
        )


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """Return the language model that has the layers; some classes return one with a head around."""
    decoder: nn.Module = model.get_decoder()
    while not hasattr(decoder, "layers"):
        inside = [getattr(decoder, name, None) for name in ("model", "decoder")]  # OPT has both
        decoders = [module for module in inside if isinstance(module, nn.Module)]
        if not decoders:
            break
        decoder = decoders[0]
    return decoder


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of a model's decoder.

    Raises:
        ModelError: it has no list of them.
    """
    layers = getattr(find_decoder(model), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ModelError(
            f"{model.config.model_type}: its decoder has no list of layers to cut between "
            f"({releases()})",
            WAY_OUT,
        )
    return layers


def _size(model_type: str, config: object, name: str, default: int = 0) -> int:
    """Return a size of the decoder's config, or the default.

    Raises:
        ModelError: it has none, or its layers differ in it.
    """
    try:
        value = getattr(config, name, None)
    except RuntimeError as error:  # transformers: AmbiguousGlobalPerLayerAttributeError
        raise ModelError(f"{model_type}: its layers differ in {name}", WAY_OUT) from error
    size = value if isinstance(value, int) and value else default
    if not size:
        raise ModelError(f"{model_type}: its decoder's config has no {name}", WAY_OUT)
    return size


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


def refuse_other_generation(model_type: str, kind: type, way_out: str) -> None:
    """Refuse a class that does not write answers token by token (diffusion).

    Raises:
        ModelError: it is one.
    """
    from transformers import GenerationConfig

    if getattr(kind, "generation_config_class", GenerationConfig) is not GenerationConfig:
        raise ModelError(
            f"{model_type}: {kind.__name__} does not write its answers token by token, but in a "
            "way of its own",
            way_out,
        )


def check_types(model_type: str, decoder: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Refuse a decoder with layers of a type that can't be cut.

    Raises:
        ModelError: names what such layers do.
    """
    types = getattr(decoder.config, "layer_types", None) or ()
    for name, layer in zip(types, layers, strict=False):
        for part, why in TYPE_REASONS.items():
            if part in str(name) and not (chooses_keys(layer) or masks_choice(layer)):
                raise ModelError(
                    f"{model_type}: layers of type {name} {why}, which dropping tokens would "
                    "change",
                    WAY_OUT,
                )


def check_decoder(
    model_type: str,
    decoder: nn.Module,
    layers: Iterable[nn.Module],
    memories: Sequence[LayerMemory],
    way_out: str,
) -> None:
    """Refuse a decoder in which layers do to a shorter sequence something else than to any.

    Args:
        memories: what every layer keeps in the cache.

    Raises:
        ModelError: names what its layers do.
    """
    types = [str(name) for name in getattr(decoder.config, "layer_types", None) or ()]
    layers = list(layers)
    for name, layer, memory in zip(types, layers, memories, strict=False):
        known = name in LAYER_TYPES or masks_choice(layer)
        if memory.keys and not memory.of_all_tokens and not known:
            raise unknown(f"{model_type}: its decoder has layers of type {name}")
    if reason := find_reason(decoder, layers, memories):
        raise ModelError(f"{model_type}: {reason}", way_out)


def find_reason(
    decoder: nn.Module, layers: Sequence[nn.Module], memories: Sequence[LayerMemory]
) -> str:
    """Return why a decoder can't be cut; empty where it can."""
    text = decoder.config
    takes = {name for layer in layers for name in inspect.signature(layer.forward).parameters}
    if getattr(text, "num_kv_shared_layers", 0) and SHARED not in takes:
        return f"its layers share keys and values, but are not given them as {SHARED}"
    if getattr(text, "hidden_size_per_layer_input", 0) and PER_LAYER_INPUT not in takes:
        return (
            f"its layers take an input of their own for every token, but not as {PER_LAYER_INPUT}"
        )
    known = {BLOCKS} if carries_blocks(decoder, layers) else set()
    if all(chooses_keys(at) for at, memory in zip(layers, memories, strict=True) if memory.index):
        known.add(CHOICE)
    if REPEATED in takes:
        return (
            f"some of its layers run several times, with keys of their own each time ({REPEATED})"
        )
    if not getattr(text, "is_causal", True):
        return "its tokens see all later ones"
    for module in (decoder, *layers):
        for name in inspect.signature(module.forward).parameters:
            for part, why in ARGUMENT_REASONS.items():
                if part in name and name not in known:
                    return f"{why} ({name})"
    if not any(memory.keys for memory in memories):
        return "none of its layers attends"
    return next(filter(None, map(_layer_reason, layers, memories)), "")


def _layer_reason(layer: nn.Module, memory: LayerMemory) -> str:
    """Return what one layer does beside attention, token-wise work and the state that it keeps.

    Empty for nothing.
    """
    known = _known_modules(layer, memory)
    for module in layer.modules():
        kind = type(module)
        if isinstance(module, CONTAINERS) or kind.__module__.split(".")[0] == "peft":
            continue  # adapters are checked as such
        if module in known:
            continue
        for part, what in MIXES.items():
            if part in kind.__name__:
                return f"{kind.__name__} in its layers {what}"
        if KEEPS_STATE.search(kind.__name__):
            if not memory.state:
                return f"{kind.__name__} in its layers mixes tokens, and nothing of it is cached"
            continue
        if module is not layer and not TOKEN_WISE.search(kind.__name__):
            return f"vtprune does not know whether {kind.__name__} in its layers mixes tokens"
        if "attention" not in kind.__name__.lower():
            continue
        if not memory.keys:
            return f"{kind.__name__} in its layers keeps no keys in the cache"
        if COUNTS.search(_source(kind)) and not scales_queries(module):  # type: ignore[arg-type]
            return f"{kind.__name__} counts the tokens of the sequence, which a cut makes fewer"
    return ""


def _known_modules(layer: nn.Module, memory: LayerMemory) -> list[nn.Module]:
    """Return a layer's modules that count tokens, or tell them apart, in a way that is known."""
    attention = getattr(layer, "self_attn", None)
    if masks_choice(layer) or (memory.index and chooses_keys(layer)):
        return [attention, attention.indexer]  # type: ignore[list-item, union-attr]
    if counts_distances(layer):
        return [attention, bias_module(layer)]  # type: ignore[list-item]
    return []


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
