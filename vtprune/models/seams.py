"""Transformers' private names: arguments of forwards, caches and masks that pruning relies on.

Transformers promises to keep none of them, and a renamed one would make answers silently wrong:
5.24 renamed `past_key_values` to `cache`, and masks were then built as if there were no cache. So
all of these names are in this file, each is checked on the model's own objects when a block is
entered, and a model with an unknown name is refused.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from vtprune.device import send
from vtprune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DummyLayer,
        LinearAttentionCacheLayerMixin,
    )

    CacheLayer = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer

TESTED = ("5.17", "5.25")
"""The first release of transformers that is tested, and the first after those (pyproject.toml)."""
RANGE = f">={TESTED[0]},<{TESTED[1]}"
_PLACES = re.compile(r"\b(?:q|kv)_positions\b")
_FIRST = sys.modules.get("transformers")

Args = tuple[object, ...]
Kwargs = dict[str, object]
Current = Callable[[int], tuple[torch.Tensor, torch.Tensor]]

RENAMED = {"past_key_values": "cache"}
"""Former name -> name that the project uses, of arguments and of fields of outputs.

Up to 5.23 `past_key_values` is the name that transformers has, from 5.24 on the one that its
forwards still take from callers.
"""
ENCODED = {
    "pixel_values",
    "pixel_values_images",  # Video-LLaVA
    "pixel_values_videos",
    "pixel_attention_mask",  # Idefics3, SmolVLM
    "image_sizes",
    "image_grid_thw",
    "video_grid_thw",
    "batch_num_images",
    "image_token_pooling",  # Molmo2, as the next three
    "video_token_pooling",
    "image_grids",
    "video_grids",
    "image_position_ids",  # Gemma 4, as the next two
    "video_position_ids",
    "num_frames_per_video",
    "vision_aspect_ratio",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "output_hidden_states",  # in 5.17
}
"""What the encoders of the listed families take."""
BESIDE_PIXELS = {name for name in ENCODED if not name.startswith(("pixel", "vision", "output"))}
"""What of it says how many pictures the pixels are, their sizes and places."""


@dataclass(frozen=True)
class Forward:
    """The known arguments of one kind of forward.

    Args:
        needs: arguments that it must take, each with the names that it may have.
        may: arguments that it may take besides.
    """

    needs: tuple[tuple[str, ...], ...]
    may: frozenset[str] = frozenset()

    @property
    def known(self) -> frozenset[str]:
        """Names of all known arguments."""
        return self.may | {name for names in self.needs for name in names}


def _forward(needs: str, may: Iterable[str] = ()) -> Forward:
    return Forward(tuple(tuple(names.split("|")) for names in needs.split()), frozenset(may))


HEARD = {
    "input_features",
    "feature_attention_mask",
    "audio_feature_lengths",
    "use_audio_in_video",
    "video_second_per_grid",
}
"""What the multimodal model takes of sound, and of videos with sound (Qwen-Omni)."""
INNER = _forward(
    "input_ids attention_mask position_ids cache inputs_embeds",
    ENCODED
    | HEARD
    | {
        "use_cache",
        "labels",
        "logits_to_keep",
        "mm_encoder_outputs",  # from 5.20 on: generation encodes before the first forward
        "image_hidden_states",  # Idefics3 and SmolVLM, in 5.17
        "image_num_crops",
        "image_sizes_videos",
        "mm_token_type_ids",
        "token_type_ids",
        "second_per_grid_ts",
        "output_router_logits",  # of Qwen3-VL with experts: asks for more output
        "input_features",  # sound, in Gemma 4, as the next
        "input_features_mask",
        "per_layer_inputs",  # Gemma 4, beside inputs_embeds
    },
)
"""The multimodal model; an unlisted family may take more."""
OUTER = Forward((*INNER.needs, ("labels",)), INNER.may)
"""The model with its output head, of a listed family."""
PER_LAYER_INPUT = "per_layer_input"
"""The input of its own, (B, S, d), that a layer is given for every token (Gemma 4)."""
TOKEN_TYPES = "moe_mm_token_type_ids"
"""Which tokens are visual, (B, S), as the experts of ERNIE 4.5 VL are told."""
NGRAM_IDS = "ple_input_ids"
"""The ids of tokens, (B, S), of whose runs some layers add embeddings (Qwen4)."""
OF_TOKENS = {"per_layer_inputs": 1, TOKEN_TYPES: 1, NGRAM_IDS: 1}
"""What a decoder is given for every token beside embeddings, and the dimension of the tokens."""
OF_LAYERS_TOKENS = {PER_LAYER_INPUT: -2, TOKEN_TYPES: -1, NGRAM_IDS: -1, "block_states": -3}
"""What layers are given for every token beside states and positions, likewise."""
BLOCKS = "block_states"
"""The states of each token after earlier blocks of layers, (B, n, blocks, d) (Inkling 2)."""
SHARED = "shared_kv_states"
"""The keys and values that layers take from earlier ones, by the layer's type."""
MARKS, FEATURES = "vision_mask", "deepstack_features"
"""Which tokens are visual, (B, S, 1), and layer -> what is added to their states before it, (V, d).

A decoder reads them as in `reads_marks` (Granite 4 Vision, 5.17 to 5.24).
"""
CHOICE = "prev_topk_indices"
"""Which keys the layer before chose to see, (B, n, k), which some layers take over."""
REPEATED = "cache_offset"
"""How many layers of the cache lie between a layer's and those of its next run (Inkling 2 Loop)."""
DISTANCE = "relative_distance"
"""The distances of queries and keys, (n, K), by which attention is biased (Inkling 2, 5.24)."""
LAST_ROWS = "logits_to_keep"
"""How many last tokens a decoder goes on with from the layers on that keep no keys (5.20 on)."""
DECODER = _forward(
    "inputs_embeds attention_mask position_ids cache",
    [
        "input_ids",
        "use_cache",
        "visual_pos_masks",
        "deepstack_visual_embeds",
        *OF_TOKENS,
        LAST_ROWS,
        MARKS,
        FEATURES,
    ],
)
LAYER = _forward(
    "hidden_states attention_mask cache position_embeddings|position_ids",
    [
        "position_embeddings",
        "position_ids",
        "conv_mask",
        "use_cache",
        *OF_LAYERS_TOKENS,
        SHARED,
        CHOICE,
        DISTANCE,
        BLOCKS,
    ],
)
LAYER_BY_DISTANCE = Forward(LAYER.needs[:-1], LAYER.may)
"""A layer whose attention is biased by distances, and takes no position ids (Inkling)."""
ENCODER = _forward("pixel_values|pixel_values_images|pixel_values_videos", ENCODED)
"""An encoder of a listed family."""
MASK = _forward(
    "config inputs_embeds attention_mask cache layer_idx",
    [
        "position_ids",
        "or_mask_function",
        "and_mask_function",
        "block_sequence_ids",
        "allow_is_causal_skip",
    ],
)
"""The functions that make causal masks."""
KERNEL = _forward(
    "scaling attention_mask",
    [
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "position_ids",
        "position_bias",
    ],
)
"""What an attention kernel is given behind query, key and value."""
ROPE_INDEX = _forward(
    "input_ids mm_token_type_ids|attention_mask",
    [
        "mm_token_type_ids",
        "attention_mask",
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
        "second_per_grids",  # Qwen-Omni's, with those of sound
        "use_audio_in_video",
        "audio_seqlens",
        "target_sizes",  # MiniCPM-V 4.7's
        "target_sizes_videos",
        "downsample_mode",
    ],
)
"""The function that gives positions in time, row and column (mrope)."""
ROPE_INPUTS = {"video_second_per_grid": "second_per_grids"}
"""An input of the model -> what that function calls it."""
POSITIONS = "get_rope_index"
"""The method of the multimodal model that is that function."""
ROPE_DELTAS = "rope_deltas"
"""The attribute in which a model with mrope keeps its last prompt's shift of positions."""
PLACING = ("compute_3d_position_ids", "_prepare_position_ids_for_generation")
"""The methods of the multimodal model, and of the class that generates with it, that use it."""
PASSED_ON = {"image_sizes"}
"""Tensors that a model passes on to its layers, which do not read them."""
CUTTABLE = (
    *("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer"),
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionAndStaticFullAttentionLayer",
    "LinearAttentionAndStaticSlidingWindowAttentionLayer",
)
"""Layers of a cache (5.17 to 5.24) whose keys and values are all that they have of a token."""
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
"""Types of layers, as a decoder's config names them, that keep nothing but keys and values."""
STATE_METHODS = ("has_previous_state", "get_conv_state", "update_conv_state")
"""The methods of a cache by which layers with a state read and write it."""
BIAS = "rel_logits_proj"
"""The module of attention that gives its bias, by the places of queries and keys."""
BIAS_TAKES = ["relative_states", "query_positions", "key_positions"]
GIVEN_BIAS = "relative_position_bias"
"""The module that gives it by distances that its layer is given."""
GIVEN_BIAS_TAKES = ["hidden_states", DISTANCE, "position_ids"]
SCALING = ("attn_temperature_tuning", "use_rope", "floor_scale", "attn_scale")
"""What attention modules that scale queries by their place say of themselves."""
INDEX = {"hidden_states", "q_resid", "attention_mask", "cache"}
"""What the index of a layer takes that chooses its keys by it."""
MASKED_INDEX = INDEX | {"position_embeddings", "position_ids"}
"""What an index may take that is given the mask of its layer's keys."""
POOLED_INDEX = {"hidden_states", "position_embeddings", "attention_mask", "cache"}
"""What an index takes that pools such keys by the positions of all of them (Qwen4)."""
SHARING = ("is_kv_shared_layer", "store_full_length_kv")
"""What attention modules that can share keys say of themselves."""
CHECK = "_vtprune_check"
"""The attribute of a cache that is called before a layer of it is used past its own methods."""
CAPTURING = "transformers.utils.output_capturing"
"""The module whose hooks capture hidden states and attention."""
LAYER_NUMBERS = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx")
"""What modules call the number of the layer that they are in."""
ENCODERS = {"image": "get_image_features", "video": "get_video_features"}
"""Modality -> the method of the multimodal model that encodes it."""


class Arguments:
    """The arguments of one forward, by the names that the project uses.

    Args:
        forward: of a module, or a function.
    """

    def __init__(self, forward: Callable[..., object]) -> None:
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = inspect.signature(forward).parameters.values()
        self.order = [parameter.name for parameter in parameters if parameter.kind not in kinds]
        self.names = {RENAMED.get(name, name): name for name in self.order}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def bind(self, args: Args, kwargs: Mapping[str, object]) -> Kwargs:
        """Return the arguments of a call by name; those past the last named one are left out."""
        named = {**dict(zip(self.order, args, strict=False)), **kwargs}
        values: Kwargs = {}
        for name, value in named.items():
            project_name = RENAMED.get(name, name)
            if value is not None or project_name not in values:
                values[project_name] = value
        return values

    def give(self, values: Mapping[str, object]) -> Kwargs:
        """Return what `bind` returned, by the names that the forward itself has."""
        return {self.names.get(name, name): value for name, value in values.items()}


@dataclass(frozen=True, eq=False)
class Seams:
    """The arguments of one model's parts.

    Args:
        inner: of the multimodal model.
        decoder: of its language model.
        layers: of each of the decoder's layers.
    """

    inner: Arguments
    decoder: Arguments
    layers: tuple[Arguments, ...]


def find_seams(
    model_type: str,
    outer: nn.Module,
    inner: nn.Module,
    decoder: nn.Module,
    layers: Iterable[nn.Module],
    listed: bool,
) -> Seams:
    """Return the arguments of one model's parts, after a check that all are known.

    Args:
        listed: whether the model is of a listed family; others may take more.

    Raises:
        ModelError: an argument of an unknown name, a known one that is missing, or a release of
            transformers that is not tested.
    """
    check_version()
    check_caches()
    for function in mask_functions():
        check_arguments(f"transformers: {function.__name__}", function, MASK)
    arguments = Seams(
        check_arguments(f"{model_type}: the inner model", inner.forward, INNER, closed=listed),
        check_arguments(f"{model_type}: its decoder", decoder.forward, DECODER),
        tuple(
            check_arguments(
                f"{model_type}: decoder layer {number}",
                layer.forward,
                LAYER_BY_DISTANCE if counts_distances(layer) else LAYER,
            )
            for number, layer in enumerate(layers)
        ),
    )
    if listed:
        check_arguments(f"{model_type}: the model", outer.forward, OUTER)
    encoders = [name for name in ENCODERS.values() if hasattr(inner, name)]
    if listed and not encoders:
        raise unknown(f"{model_type}: the model has no {' or '.join(ENCODERS.values())}")
    for name in encoders if listed else ():
        check_arguments(f"{model_type}: {name}", getattr(inner, name), ENCODER)
    return arguments


def check_version() -> None:
    """Refuse a release of transformers that is not tested.

    Raises:
        ModelError: with the range that is, and what installs one of it.
    """
    from packaging.version import Version

    first, after = (Version(version).release for version in TESTED)
    for version in _versions():
        if not first <= Version(version).release < after:
            raise ModelError(
                f"transformers {version} is not one that vtprune is tested with ({RANGE}): names "
                "inside it may have moved, and answers would be wrong",
                f"pip install 'transformers{RANGE}'",
            )


def check_arguments(
    what: str, forward: Callable[..., object], accepted: Forward, closed: bool = True
) -> Arguments:
    """Return the arguments of a forward, after a check that they are known.

    Args:
        what: names the forward in the message.
        closed: whether it may take nothing else.

    Raises:
        ModelError: one is missing, or not known.
    """
    arguments = Arguments(forward)
    for names in accepted.needs:
        if not any(name in arguments for name in names):
            others = sorted(set(arguments.names) - accepted.known)
            instead = f" (but {', '.join(others)})" if others else ""
            raise unknown(f"{what} takes no {' or '.join(names)}{instead}")
    if closed and (others := [name for name in arguments.names if name not in accepted.known]):
        raise unknown(f"{what} takes {', '.join(others)}")
    return arguments


def check_values(
    what: str, arguments: Mapping[str, object], accepted: Forward, more: Iterable[str] = ()
) -> None:
    """Refuse tensors and caches that a call gives by unknown names.

    Such a tensor may hold a row for each column of the prompt, which would not fit a shorter one,
    or be an argument that pruning reads, by a new name.

    Args:
        more: further names that are taken.

    Raises:
        ModelError: there are some.
    """
    names = accepted.known | PASSED_ON | {*more}
    for name, value in arguments.items():
        if name not in names and _holds_tensors(value):
            raise unknown(f"{what} is given {name}")


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor) or is_cache(value)


def turns_by_position(attention: nn.Module) -> bool:
    """Return whether an attention module turns queries and keys by the position embeddings given.

    Those of some decoders that see all tokens do not (5.17 to 5.24: SmolLM3 and Llama 4 say so;
    Cohere 2 turns where its attention slides).
    """
    if type(attention).__name__ == "Cohere2Attention":
        return getattr(attention, "sliding_window", None) is not None
    return bool(getattr(attention, "use_rope", True))


def rotary_rows(embeddings: object, width: int, turns: bool) -> torch.Tensor:
    """Return (B or 1, n, R + 1) float32 rows whose products are those of ones at rotary positions.

    A pair of ones turned by its angle is (cos - sin, cos + sin), so that the product of two is
    twice cos cos + sin sin, whichever places of a head are a pair. Places that are not turned add
    one each to all products: their number's root is the last of each row.

    Args:
        embeddings: a layer's position embeddings; transformers (5.17 to 5.24) gives cosines and
            sines, (B or 1, n, R / 2) each, of most models both places of each pair.
        width: places of a head.
        turns: whether the layer turns any.

    Raises:
        ModelError: they are of another form.
    """
    known = (
        isinstance(embeddings, tuple)
        and len(embeddings) == 2
        and all(isinstance(part, torch.Tensor) and part.dim() == 3 for part in embeddings)
    )
    if not known:
        raise ModelError(
            "what rotary positions alone say can't be read: a layer is not given cosines and sines",
            "use a method that does not read it, such as sparsevlm or fastv",
        )
    cos, sin = (part.detach().float() for part in cast("tuple[torch.Tensor, ...]", embeddings))
    rows, half = torch.cat([cos, sin], dim=-1), cos.shape[-1] // 2
    turned = rows.new_full((), 2.0)  # places by each cosine that is given: a pair, or one of it
    if not cos.shape[-1] % 2:
        halves, pairs = cos[..., :half] == cos[..., half:], cos[..., ::2] == cos[..., 1::2]
        turned = torch.where(halves.all() | pairs.all(), 1.0, turned)
    turned = turned * turns
    unturned = (width - turned * cos.shape[-1]).clamp_min(0).sqrt()
    return torch.cat([rows * turned.sqrt(), unturned.expand(*rows.shape[:-1], 1)], dim=-1)


def unknown(message: str) -> ModelError:
    """Return the error for an unknown name, with transformers' version and the tested range."""
    return ModelError(
        f"{message}, which vtprune does not know ({releases()})",
        "use a model class of a tested transformers as it is, or the model without pruning",
    )


def releases() -> str:
    """Return the version of transformers, and the tested range, as messages name them."""
    return f"transformers {_versions()[-1]}; tested: {RANGE}"


def _versions() -> list[str]:
    """Return the versions that the loaded transformers gives.

    It runs its package a second time when it loads its processors (`direct_transformers_import`),
    so the module that callers hold may be another one than that of `sys.modules`.
    """
    import transformers

    return [module.__version__ for module in (_FIRST, transformers) if module is not None]


# -- caches -------------------------------------------------------------------------------------


def is_cache(value: object) -> bool:
    """Return whether it is a cache of transformers."""
    from transformers.cache_utils import Cache

    return isinstance(value, Cache)


def check_caches() -> None:
    """Refuse cache classes without the methods and fields that pruning needs.

    Raises:
        ModelError: what is missing.
    """
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

    asks = ("get_seq_length", "update", "get_mask_sizes")
    for name in asks:
        method = getattr(Cache, name, None)
        if method is None or "layer_idx" not in inspect.signature(method).parameters:
            raise unknown(f"transformers: a cache has no {name}(layer_idx)")
    if not hasattr(Cache, "reset"):
        raise unknown("transformers: a cache has no reset()")
    check_cache(DynamicCache())
    layer = DynamicLayer()
    for name in ("keys", "values", "get_seq_length"):
        if not hasattr(layer, name):
            raise unknown(f"transformers: a layer of a cache has no {name}")


@dataclass(frozen=True)
class LayerMemory:
    """What one layer keeps in the cache of the tokens before.

    Args:
        keys: keys and values, one for each token.
        state: a state of one size, made of all tokens, as linear attention and convolutions do.
        index: an index over the keys, by which each token chooses those that it sees.
    """

    keys: bool
    state: bool
    index: bool = False

    @property
    def of_all_tokens(self) -> bool:
        """Whether a token that is masked as a key still changes what later ones see."""
        return self.state or self.index


def layer_memories(
    model_type: str, config: PreTrainedConfig, num_layers: int
) -> tuple[LayerMemory, ...]:
    """Return what every layer of a decoder keeps in the cache, by the cache made for its config.

    Layers past those of the cache, and those without attention or state, keep nothing.

    Raises:
        ModelError: transformers has no cache for a type of layers.
    """
    from transformers.cache_utils import DynamicCache

    try:
        cache = DynamicCache(config=config)
    except KeyError as error:
        raise unknown(f"{model_type}: its decoder has layers of type {error.args[0]}") from error
    memories = [_memory(layer) for layer in cache.layers[:num_layers]]
    if not memories:  # a cache that is to grow by such layers
        return (LayerMemory(keys=True, state=False),) * num_layers
    nothing = LayerMemory(keys=False, state=False)
    return (*memories, *[nothing] * (num_layers - len(memories)))


def _memory(cache_layer: object) -> LayerMemory:
    from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

    return LayerMemory(
        keys=isinstance(cache_layer, CacheLayerMixin),
        state=isinstance(cache_layer, LinearAttentionCacheLayerMixin),
        index=hasattr(cache_layer, "update_indexer"),
    )


def token_mask(memory: LayerMemory) -> str:
    """Return which argument of a layer masks the tokens that its state, or index, is of, (B, n)."""
    return "conv_mask" if memory.keys and not memory.index else "attention_mask"


def layer_length(cache: object, layer: int) -> int:
    """Return how many keys one layer of a cache holds; 0 for one that keeps none."""
    layers = getattr(cache, "layers", ())
    if layer >= len(layers) or not _memory(layers[layer]).keys:
        return 0
    return int(layers[layer].get_seq_length())


def grows(cache: object) -> bool:
    """Return whether all keys in a cache are plain growing tensors."""
    from transformers.cache_utils import DynamicLayer

    layers = [layer for layer in getattr(cache, "layers", ()) if _memory(layer).keys]
    return bool(layers) and all(isinstance(layer, DynamicLayer) for layer in layers)


def fork_layer(cache_layer: CacheLayer) -> CacheLayer:
    """Return a layer of a growing cache that goes on by itself from where another one is.

    Keys and values are shared until one of them grows, which makes new tensors; states are copied,
    since transformers (5.17 to 5.24) writes new ones into the same tensor.
    """
    fork = copy.copy(cache_layer)
    if _memory(cache_layer).state:
        for name, value in vars(fork).items():
            if isinstance(value, dict):  # of states, by number
                setattr(fork, name, {number: _cloned(state) for number, state in value.items()})
    return fork


def _cloned(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else value


def stored_keys(cache_layer: CacheLayer) -> int:
    """Return how many keys a layer of a cache has in memory, free slots left out.

    They are the last ones of those that it has had where it has a window.
    """
    layer = cast("Any", cache_layer)
    held, keys = int(layer.get_seq_length()), layer.keys
    return min(held, 0 if keys is None else keys.shape[-2])


def can_drop_keys(cache_layer: object) -> bool:
    """Return whether `drop_keys` knows this kind of layer; of others it may hold more than keys."""
    from transformers import cache_utils

    kinds = [getattr(cache_utils, name, None) for name in CUTTABLE]
    return type(cache_layer) in kinds


def drop_keys(cache_layer: CacheLayer, index: torch.Tensor) -> None:
    """Leave in a layer of a cache the keys and values in some of its slots, in their order.

    Args:
        index: (B, m) int64 slots.
    """
    count, layer = index.shape[1], cast("Any", cache_layer)
    for name in ("keys", "values"):
        states = getattr(layer, name)  # (B, KV, n, D)
        at = send(index, states.device)
        if len(at) == 1:
            left = states.index_select(2, at[0])
        else:
            left = states.gather(2, at[:, None, :, None].expand(*states.shape[:2], count,
                                                                states.shape[3]))  # fmt: skip
        if layer.is_compileable:  # a static layer: its tensors stay where they are
            states[:, :, :count] = left
            states[:, :, count:] = 0
        else:
            setattr(layer, name, left)
    # Of static layers a tensor, and one that slides has a number beside it (5.17 to 5.24).
    if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
        layer.cumulative_length.fill_(count)
    elif hasattr(layer, "cumulative_length"):
        layer.cumulative_length = count
    if hasattr(layer, "cumulative_length_int"):
        layer.cumulative_length_int = count


def check_cache(cache: object) -> None:
    """Refuse a cache without a list of layers.

    Raises:
        ModelError: it has none.
    """
    if cache is None:
        return
    if not is_cache(cache) or not isinstance(getattr(cache, "layers", None), list):
        raise unknown(f"a cache of type {type(cache).__name__} has no list of layers")


def find_cache(what: str, arguments: Mapping[str, object]) -> Cache | None:
    """Return the cache among the arguments of a call; None where there is none.

    Args:
        what: names the forward in the message.
        arguments: as `Arguments.bind` gave them.

    Raises:
        ModelError: a cache by a name that is not known, or one that is not known.
    """
    for name, value in arguments.items():
        if name != "cache" and is_cache(value):
            raise unknown(f"{what} is given its cache as {name}")
    cache = arguments.get("cache")
    check_cache(cache)
    return cast("Cache | None", cache)


def output_cache(output: object) -> Cache | None:
    """Return the cache in the output of a model or decoder, whatever its name; None for none.

    Args:
        output: a ModelOutput, or a tuple of its values.
    """
    values = output.values() if isinstance(output, Mapping) else output
    caches = [value for value in values if is_cache(value)] if isinstance(values, Iterable) else []
    return caches[0] if caches else None


def keep_last_rows(output: object, count: int) -> None:
    """Leave in a decoder's output the states of the last tokens alone.

    A model whose decoder is asked for them takes states as they come where they are not of all its
    input_ids (Gemma 4, from 5.20 on), and after a cut they are fewer.

    Args:
        count: of tokens; 0: all.
    """
    if count and isinstance(output, MutableMapping):
        output["last_hidden_state"] = output["last_hidden_state"][:, -count:]


def change_states(output: object, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace the last states in a decoder's output.

    Raises:
        ModelError: it is a tuple, which can't be changed.
    """
    if not isinstance(output, MutableMapping):
        raise unknown("the output of the decoder is a tuple")
    output["last_hidden_state"] = change(output["last_hidden_state"])


def cache_made(output: object) -> Cache:
    """Return the cache in the output of a model that was asked for one.

    Raises:
        ModelError: there is none.
    """
    cache = output_cache(output)
    if cache is None:
        raise unknown(f"{type(output).__name__}: the output of the model holds no cache")
    return cache


def cache_argument(module: nn.Module, cache: object) -> Kwargs:
    """Return the keyword argument that gives a cache to a model."""
    return Arguments(module.forward).give({"cache": cache})


def makes_cache(decoder: nn.Module) -> bool:
    """Return whether a decoder that is asked for a cache and given none makes one.

    Granite 4 Vision's leaves that to generation (5.17 to 5.24).
    """
    return "Cache(" in inspect.getsource(type(decoder).forward)


# -- attention modules --------------------------------------------------------------------------


def gates_queries(attention: nn.Module) -> bool:
    """Return whether an attention module projects queries and gates at once, head by head.

    As in Qwen3.5 (5.17 to 5.24): the projection's output is (..., H, 2 D), halved at the end.
    """
    source = inspect.getsource(type(attention).forward)
    return "self.head_dim * 2" in source and "torch.chunk" in source


def scales_queries(attention: object) -> bool:
    """Return whether attention scales its queries by how many keys are before them.

    Its own places are those in the cache (5.17 to 5.24): Llama 4, Inkling.
    """
    return scaling_floor(attention) is not None


def scaling_floor(attention: Any) -> float | None:
    """Return from how many keys on attention scales its queries; None where it never does."""
    if all(hasattr(attention, name) for name in SCALING):
        return float(attention.floor_scale)
    if not isinstance(attention, nn.Module) or not _scales_by_place(type(attention)):  # type: ignore[arg-type]
        return None
    floor: float | None = attention.config.log_scaling_n_floor  # type: ignore[assignment, union-attr]
    return None if floor is None or attention.is_sliding else float(floor)


@functools.cache
def _scales_by_place(kind: type[nn.Module]) -> bool:
    """Return whether attention scales by the places that it counts itself (Inkling).

    Inkling 2 takes position ids for it.
    """
    return "effective_n = (q_positions + 1).float()" in inspect.getsource(kind.forward)


def query_scale(attention: Any, places: torch.Tensor) -> torch.Tensor:
    """Return by what attention scales the queries of tokens at these places, in float32."""
    if hasattr(attention, "floor_scale"):
        if not attention.attn_temperature_tuning or attention.use_rope:
            return torch.ones(places.shape, device=places.device)
        steps = torch.floor((places.float() + 1.0) / attention.floor_scale)
        return torch.log1p(steps) * attention.attn_scale + 1.0
    floor = scaling_floor(attention)
    if floor is None:
        return torch.ones(places.shape, device=places.device)
    steps = ((places.float() + 1.0) / floor).clamp_min(1.0)
    return 1.0 + attention.config.log_scaling_alpha * steps.log()


def scaled_module(attention: nn.Module) -> nn.Module | None:
    """Return the module of Inkling's attention that gives the queries before they are scaled."""
    return getattr(attention, "q_norm", None) if hasattr(attention, BIAS) else None


def counts_distances(layer: nn.Module) -> bool:
    """Return whether a layer's attention is biased by distances, which one module is told.

    As in Inkling (5.17 to 5.24) and Inkling 2 (5.23): it counts the places of queries and keys in
    its own cache, and nothing but that module and the scale of queries depends on them. Layers of
    Inkling 2 in 5.24 are given the distances.
    """
    attention: Any = getattr(layer, "self_attn", None)
    module = getattr(attention, GIVEN_BIAS, None)
    if isinstance(module, nn.Module) and DISTANCE in Arguments(layer.forward):
        return Arguments(module.forward).order == GIVEN_BIAS_TAKES
    module = getattr(attention, BIAS, None)
    if not isinstance(module, nn.Module) or Arguments(module.forward).order != BIAS_TAKES:
        return False
    kind = type(attention)
    uses = len(_PLACES.findall(inspect.getsource(kind.forward)))
    # Made, given to the module, and to the scale.
    return uses == 4 + _scales_by_place(kind)  # type: ignore[arg-type]


def bias_module(layer: nn.Module) -> nn.Module:
    """Return the module that gives the bias of a layer whose attention is biased by distances."""
    attention: Any = layer.self_attn
    return cast("nn.Module", getattr(attention, GIVEN_BIAS, None) or getattr(attention, BIAS))


def distance_bias(
    give: Callable[..., torch.Tensor],
    states: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
) -> torch.Tensor:
    """Return the bias of attention, (B, H, n, K), for queries and keys at places of their own.

    Args:
        give: the forward of the module, for one set of places.
        states: (B, n, H, r) its relative states.
        queries: (B, n) places.
        keys: (B, K) places.
    """
    if bool((queries == queries[:1]).all()) and bool((keys == keys[:1]).all()):
        return give(states, queries[0], keys[0])
    rows = zip(states.split(1), queries, keys, strict=True)
    return torch.cat([give(row, query, key) for row, query, key in rows])


def layer_config(config: object, layer: int) -> object:
    """Return the config of one layer of a decoder, whose layers may differ in sizes."""
    if not getattr(config, "is_heterogeneous", False):
        return config
    return cast("Mapping[int, object]", config.per_layer_config)[layer]  # type: ignore[attr-defined]


# -- outputs that transformers captures ----------------------------------------------------------


def captured_by(hook: Callable[..., object]) -> str | None:
    """Return which output of a model a forward hook of transformers' captures; None: not one.

    A model that was asked once for hidden states or attention (5.17 to 5.24) keeps such hooks on
    its layers and attention modules; they do nothing where their output is not asked for.
    """
    if getattr(hook, "__module__", None) != CAPTURING:
        return None
    key = inspect.getclosurevars(hook).nonlocals.get("key")
    return key if isinstance(key, str) else None


def outputs_asked() -> Iterable[str]:
    """Return the outputs that the running forward of this thread is to capture."""
    collector = getattr(sys.modules.get(CAPTURING), "_active_collector", None)
    if collector is None:
        raise unknown("transformers' capturing of outputs")
    return cast("Iterable[str]", collector.get() or ())


# -- states of earlier blocks of layers -----------------------------------------------------------


def carries_blocks(decoder: nn.Module, layers: Sequence[nn.Module]) -> bool:
    """Return whether a decoder carries each token's states after earlier blocks of layers along.

    As Inkling 2 (5.23 and 5.24): at a block's first layer it adds what entered that layer to them,
    so all that layers give it has to be as long as what it was given.
    """
    source = inspect.getsource(type(decoder).forward)
    known = f"{BLOCKS} = torch.cat([{BLOCKS}.to(hidden_states.device), hidden_states.unsqueeze(-2)]"
    named = all(hasattr(layer, "is_block_boundary") for layer in layers)
    return named and known in source and "for decoder_layer in self.layers:" in source


# -- layers that choose their keys by an index ----------------------------------------------------


def chooses_keys(layer: nn.Module) -> bool:
    """Return whether a layer chooses its keys by an index over the tokens in its own cache.

    As in GLM-5-next (5.17 to 5.24): the index is given a mask of tokens, (B, n), and no positions,
    and makes the layer's attention mask, so that nothing but the order of the tokens counts.
    """
    attention: Any = getattr(layer, "self_attn", None)
    if not hasattr(attention, "skip_topk") or not hasattr(
        attention, "build_attention_mask_from_topk"
    ):
        return False
    if attention.indexer is None:
        return CHOICE in Arguments(layer.forward)
    return set(Arguments(attention.indexer.forward).names) == INDEX


def masks_choice(layer: nn.Module) -> bool:
    """Return whether a layer chooses its keys by an index, among those that its mask lets it see.

    As in Dots 3 Note, Mistral Large 4 and HY V4 VL (5.23 and 5.24): the index scores each key by
    itself, with the positions that it is given, and the mask of queries and keys takes those that
    are not to be seen out of the choice. So a dropped key is one that is masked.
    """
    attention: Any = getattr(layer, "self_attn", None)
    if sees_all_positions(layer):
        return True
    if not hasattr(attention, "indexer") or not _gives_mask(type(attention)):  # type: ignore[arg-type]
        return False
    if attention.indexer is None:
        return takes_over_choice(layer) and CHOICE in Arguments(layer.forward)
    takes = set(Arguments(attention.indexer.forward).names)
    return takes <= MASKED_INDEX and _chooses_by_mask(type(attention.indexer))  # type: ignore[arg-type]


@functools.cache
def _gives_mask(kind: type[nn.Module]) -> bool:
    """Return whether attention gives its index the mask of queries and keys, (B, n, K)."""
    given = r"self\.indexer\([^)]*attention_mask\[:, 0(, :, :)?\]"
    return re.search(given, inspect.getsource(kind.forward)) is not None


@functools.cache
def _chooses_by_mask(kind: type[nn.Module]) -> bool:
    """Return whether an index takes the keys that a mask hides out of its choice."""
    return _forward_has(
        kind,
        'index_scores = index_scores.masked_fill(~attention_mask, float("-inf"))',
        "index_scores = index_scores + attention_mask",
        "index_scores.topk(topk, dim=-1)",
    )


def _forward_has(kind: type[nn.Module], *parts: str) -> bool:
    """Return whether all these parts are in the source of a module's forward."""
    source = inspect.getsource(kind.forward)
    return all(part in source for part in parts)


def sees_all_positions(layer: nn.Module) -> bool:
    """Return whether the index of a layer is given the positions of all keys, cached ones too.

    As in Qwen4 (5.17 to 5.24): it pools the keys that its mask lets a query see, some in a row, and
    the decoder keeps the positions of all that it was given, for all of its layers.
    """
    index: Any = getattr(getattr(layer, "self_attn", None), "indexer", None)
    if index is None or set(Arguments(index.forward).names) != POOLED_INDEX:
        return False
    return _pools_visible(type(index))  # type: ignore[arg-type]


@functools.cache
def _pools_visible(kind: type[nn.Module]) -> bool:
    """Return whether an index takes the keys that a mask hides for not there."""
    return _forward_has(
        kind,
        "full_cos[:, -seq_length:, :], full_sin[:, -seq_length:, :]",
        "attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0",
        "visible_token_indices[batch_idx, 0, query_idx]",
        "cos=full_cos[batch_idx].index_select(0, group_starts)",
    )


def takes_over_choice(layer: nn.Module) -> bool:
    """Return whether a layer sees the keys that the layer before chose, by their slots."""
    return bool(getattr(getattr(layer, "self_attn", None), "skip_topk", False))


# -- keys and values that layers share ------------------------------------------------------------


def key_layers(model_type: str, layers: Sequence[nn.Module]) -> tuple[int, ...]:
    """Return for every layer the one whose keys and values it sees: itself, or an earlier one.

    Raises:
        ModelError: layers that take those of others in a way that is not known.
    """
    sources: list[int] = []
    stored: dict[object, int] = {}
    for number, layer in enumerate(layers):
        if SHARED not in Arguments(layer.forward):
            sources.append(number)
            continue
        attention: Any = getattr(layer, "self_attn", None)
        for name in SHARING:
            if not hasattr(attention, name):
                raise unknown(f"{model_type}: the attention of layer {number} has no {name}")
        kind = sharing_kind(attention)
        if kind is None:
            raise unknown(
                f"{model_type}: layer {number} shares keys by a key that it does not name"
            )
        if attention.is_kv_shared_layer:
            if kind not in stored:
                raise unknown(f"{model_type}: layer {number} shares keys that no layer stores")
            sources.append(stored[kind])
        else:
            sources.append(number)
        if attention.store_full_length_kv:
            stored[kind] = number
    return tuple(sources)


def sharing_kind(attention: Any) -> str | None:
    """Return the key by which a layer stores keys and values for others, or takes theirs.

    The layer's type; in Mistral Large 4 (5.23 and 5.24) whether it has rotary embeddings.
    """
    if hasattr(attention, "layer_type"):
        return str(attention.layer_type)
    return None if not hasattr(attention, "use_rope") else "rope" if attention.use_rope else "nope"


def shared_width(given: Mapping[str, object], layer: nn.Module, source: int) -> int:
    """Return how many keys a layer sees that takes those of an earlier one.

    Args:
        given: its arguments, by name.
        source: the earlier layer. Its keys are given by its type; in 5.17's Gemma 3n by its number.
    """
    shared = given.get(SHARED)
    if isinstance(shared, Mapping):
        for key in (sharing_kind(layer.self_attn), source):
            if key in shared:
                return int(shared[key][0].shape[-2])
    raise unknown(f"{type(layer).__name__} is given no shared keys of layer {source}")


# -- features added before layers ----------------------------------------------------------------


def reads_marks(source: str) -> bool:
    """Return whether a decoder, by its source, asks for marks and features when a layer's turn is.

    Then what it is given can be of the tokens that are there at that time.
    """
    asks = ("layer_idx in deepstack_features", "deepstack_features[layer_idx].to(")
    return all(text in source for text in (*asks, "vision_mask.to("))


class CurrentMarks:
    """The marks of visual tokens, of those that are there when a decoder asks.

    Args:
        current: gives the marks, (B, n, 1), and the features of a layer.
        layer: any that features are added before.
    """

    def __init__(self, current: Current, layer: int) -> None:
        self.current, self.layer = current, layer

    def to(self, *args: object, **kwargs: object) -> torch.Tensor:
        """Return the marks on a device."""
        return self.current(self.layer)[0].to(*args, **kwargs)  # type: ignore[call-overload, no-any-return]


class CurrentFeatures(dict[int, torch.Tensor]):
    """Layer -> the features of the visual tokens that are there when a decoder asks.

    Args:
        features: of all of them.
        current: as for CurrentMarks.
    """

    def __init__(self, features: Mapping[int, torch.Tensor], current: Current) -> None:
        super().__init__(features)
        self.current = current

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self.current(layer)[1]


# -- several states a token -----------------------------------------------------------------------


def fold_streams(hidden: torch.Tensor, config: object) -> torch.Tensor:
    """Return several states a token as one: (B, n, A x d).

    They come as (A, B, n, d) in Gemma 3n, as (B, n, A, d) in GLM-5-next (hyper-connections).

    Args:
        config: of the decoder.
    """
    if hidden.dim() == 3:
        return hidden
    return (hidden if _hyper_streams(config) else hidden.permute(1, 2, 0, 3)).flatten(2)


def unfold_streams(hidden: torch.Tensor, config: object) -> torch.Tensor:
    """Return what `fold_streams` folded as it was."""
    if count := _hyper_streams(config):
        return hidden.unflatten(-1, (count, -1))
    count = getattr(config, "altup_num_inputs", 1)
    return hidden if count == 1 else hidden.unflatten(-1, (count, -1)).permute(2, 0, 1, 3)


def main_stream(hidden: torch.Tensor, config: object) -> torch.Tensor:
    """Return of folded states that one which layers attend with, (..., d).

    Of hyper-connections, which each layer mixes by itself, the mean, as the decoder's end takes it.
    """
    if hidden.shape[-1] == config.hidden_size:  # type: ignore[attr-defined]
        return hidden
    if count := _hyper_streams(config) or getattr(config, "hc_count", 0):
        return hidden.unflatten(-1, (count, -1)).mean(-2)
    streams = hidden.unflatten(-1, (config.altup_num_inputs, -1))  # type: ignore[attr-defined]
    return streams[..., config.altup_active_idx, :]  # type: ignore[attr-defined]


def _hyper_streams(config: object) -> int:
    """Return the number of states a token that hyper-connections mix; 0 for none."""
    return int(getattr(config, "hc_mult", 0) or 0)


# -- masks --------------------------------------------------------------------------------------


def held_keys(cache: Cache | None, layer: int, length: int) -> int:
    """Return how many keys a layer sees in a forward of `length` tokens, before it ran.

    It is more than its cache has tokens where the cache is static, fewer where it has a window.
    """
    return length if cache is None else int(cache.get_mask_sizes(length, layer)[0])


def mask_functions() -> tuple[Callable[..., object], Callable[..., object]]:
    """Return the functions that make causal masks: of a full layer, and of one with a window."""
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    return create_causal_mask, create_sliding_window_causal_mask


def make_mask(
    windowed: bool,
    config: object,
    hidden: torch.Tensor,
    valid: torch.Tensor | None,
    cache: object,
    layer: int,
    always: bool,
) -> object:
    """Return a causal mask for one layer, in the form that its attention takes.

    Args:
        windowed: whether the layer has a sliding window.
        hidden: (B, n, d) of this forward.
        valid: (B, past + n) bool of the layer's keys, None where all are valid.
        cache: sized by this layer's own length.
        always: make it also where attention without a mask would see the same.
    """
    create = mask_functions()[windowed]
    arguments = {
        "config": config,
        "inputs_embeds": hidden,
        "attention_mask": valid,
        "cache": cache,
        "layer_idx": layer,
    }
    if always:
        arguments["allow_is_causal_skip"] = False
    return create(**Arguments(create).give(arguments))


def feed_forward(layer: nn.Module) -> nn.Module | None:
    """Return the feed-forward network of a layer, (B, S, d) to (B, S, d), each column apart.

    None where it is not the usual one: of experts, or by another name.
    """
    network = getattr(layer, "mlp", None)
    usual = isinstance(getattr(network, "down_proj", None), nn.Linear)
    return network if usual else None


def norms(layer: nn.Module) -> list[nn.Module]:
    """Return the norms of a layer's states, (B, S, d) to (B, S, d), each column apart."""
    return [
        module
        for module in layer.children()
        if type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
        and len(Arguments(module.forward).order) == 1
    ]


def prompt_positions(
    model: PreTrainedModel, inner: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return the position ids that generation gives a prompt: (1, S), or (4, 1, S) of mrope.

    Args:
        tensors: the model's inputs by name, on the CPU or the model's device.

    Raises:
        ModelError: the model's class does not say how it makes them.
    """
    ids = tensors["input_ids"]
    if not hasattr(inner, POSITIONS):
        return torch.arange(ids.shape[1])[None]
    prepare = getattr(model, "_prepare_position_ids_for_generation", None)  # 5.17 to 5.24
    if prepare is None:
        raise unknown("a model with positions of three numbers that does not prepare them")
    positions = prepare(ids, dict(tensors))
    if not isinstance(positions, torch.Tensor) or positions.dim() != 3:
        raise unknown("position ids of a prompt that are not a time, a row and a column")
    return positions
