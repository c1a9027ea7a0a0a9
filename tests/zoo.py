"""Every class of transformers' image-text-to-text mapping, small; its encoders are not run.

The decoder of each is built from the class's own default config with few and narrow layers, one of
each kind at least, and random weights. Its encoder calls give made-up features, so that whatever a
class does around them (merging, positions, masks) runs, and towers of any size cost nothing.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import oracle
import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vtprune.errors import ModelError
from vtprune.models.skeleton import weights_on_meta
from vtprune.models.structure import Structure, find_structure

MODEL_TYPES = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
LAYERS, VISUAL, VOCABULARY = 4, 16, 2000
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
SMALL: dict[str, int] = {
    "vocab_size": VOCABULARY,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "dense_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "share_expert_dim"), 48),
    "shared_expert_intermediate_size": 32,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    "moe_num_shared_experts": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
GLM = {
    "text_config.head_dim": 128,
    "text_config.hidden_size": 512,
    "text_config.rope_parameters": MROPE,
}
PLACEHOLDERS = {"image_token_id": 5, "video_token_id": 6}
MISSING: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config.num_attention_heads": 16},
    "chameleon": {"vocabulary_map": {"<image>": 1000, "IMGIMGA": 1001}, "image_token_id": 1000},
    "cohere_compass": {
        "text_config.rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense"] + ["sparse"] * 31,
        "text_config.num_experts_per_tok": 2,
    },
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 48,
    },
    # Its layers with a window have sizes of their own.
    "dots3_note": {
        "text_config.per_layer_config": {
            n: {
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "q_lora_rank": 32,
                "kv_lora_rank": 24,
                "head_dim": 24,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
            }
            for n in range(2, 46)
            if n % 4 != 1
        }
    },
    "emu3": {
        "image_token_id": 1000,
        "vocabulary_map": {"<image>": 1000, "<|extra_200|>": 1002, "<|visual token 000001|>": 1001},
    },
    "fast_vlm": {"vision_config": {"model_type": "clip_vision_model"}},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    # Published ones choose keys by an index in every fourth layer; here some take over a choice.
    "glm5_next": {
        "text_config.num_hidden_layers": 48,
        "text_config.layer_types": [
            "linear_attention",
            *["full_attention"] * 2,
            "linear_attention",
        ]
        * 12,
        "text_config.indexer_types": ["full", "full", "shared", "full"] * 12,
        "text_config.mlp_layer_types": ["dense"] * 3 + ["sparse"] * 45,
    },
    "granite4_vision": {"deepstack_layer_map": [(0, 1), (1, 3)], "downsample_rate": "4/8"},
    "hunyuan_vl": {
        "text_config.head_dim": 64,
        "text_config.rope_parameters": {**ROPE, "mrope_section": [8, 8, 8, 8]},
    },
    # Published ones have convolutions, too; the default has attention alone.
    "lfm2_vl": {"text_config.layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "minimax_m3_vl": {"text_config.layer_types": ["full_attention", "minimax_m3_sparse"] * 30},
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), PLACEHOLDERS),
    "nemotron_h_omni": {
        **PLACEHOLDERS,
        "text_config.num_hidden_layers": 32,
        "text_config.layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 8,
    },
    "perception_lm": {"vision_config.model_args": {"embed_dim": 64}},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 4,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 256,
        "text_config.indexer_budget": 12,
        "text_config.indexer_compress_ratio": 4,
    },
    "step3p7": {"text_config.sliding_window": 512},
}
"""What the default config of a class leaves out."""
DELTA_NET = {
    "text_config.linear_num_key_heads": 2,
    "text_config.linear_num_value_heads": 4,
    "text_config.linear_key_head_dim": 32,
    "text_config.linear_value_head_dim": 32,
    "text_config.head_dim": 64,
    "text_config.hidden_size": 128,
    "text_config.rope_parameters": {
        **ROPE,
        "partial_rotary_factor": 1.0,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}
INDEXED = {
    "text_config.hidden_size": 64,
    "text_config.num_key_value_heads": 4,
    "text_config.kv_lora_rank": 24,
    "text_config.q_lora_rank": 32,
    "text_config.qk_nope_head_dim": 16,
    "text_config.qk_rope_head_dim": 16,
    "text_config.v_head_dim": 16,
    "text_config.index_head_dim": 16,
    "text_config.index_n_heads": 32,
    "text_config.index_topk": 8,
}
INKLING_2 = {
    "text_config.hidden_size": 64,
    "text_config.head_dim": 16,
    "text_config.swa_head_dim": 16,
    "text_config.swa_num_attention_heads": 4,
    "text_config.swa_num_key_value_heads": 2,
    "text_config.d_rel": 4,
    "text_config.rel_extent": 24,
    "text_config.sliding_window_size": 20,
    "text_config.n_layers_per_attn_res_block": 2,
    "text_config.unpadded_vocab_size": VOCABULARY,
    "vision_config.text_hidden_size": 64,
    "text_config.log_scaling_n_floor": 12,
}
NARROW: dict[str, dict[str, Any]] = {
    "gemma3n": {"text_config.num_kv_shared_layers": 0},
    "emu3": {"image_token_id": 1000},
    "apertus1p5": {
        "image_token_offset": 1100,
        "vision_config.codebook_size": 100,
        "audio_token_offset": 1200,
        "audio_config.codebook_size": 100,
        "text_config.output_vocab_size": 1000,
    },
    **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe", "glmga"), GLM),
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), DELTA_NET
    ),
    "glm5_next": {
        "text_config.hidden_size": 64,
        "text_config.num_key_value_heads": 4,
        "text_config.linear_num_heads": 2,
        "text_config.linear_head_dim": 16,
        "text_config.linear_lower_bound": -0.05,  # it remembers many tokens
        "text_config.kv_lora_rank": 24,
        "text_config.q_lora_rank": 32,
        "text_config.qk_nope_head_dim": 16,
        "text_config.v_head_dim": 16,
        "text_config.index_head_dim": 16,
        "text_config.index_n_heads": 32,  # of fewer, scores of 0 tie
        "text_config.index_kpool": 2,
        "text_config.index_topk": 8,
        "vision_config.out_hidden_size": 64,
    },
    # Few keys are seen, and scores of 0, which tie, are rare.
    "dots3_note": {
        **INDEXED,
        "text_config.qk_rope_head_dim": 8,
        "vision_config.adapter_out_dim": 64,
        "audio_config.adapter_out_dim": 64,
        "text_config.sliding_window": 20,
        "text_config.head_dim": 24,
    },
    "mistral_large4": INDEXED,
    "hy_v4_vl": {
        **INDEXED,
        "text_config.rope_parameters": {**ROPE, "mrope_section": [4, 2, 2]},
    },
    "inkling2": INKLING_2,
    "inkling2_loop": {
        **INKLING_2,
        "text_config.loop_layer_index_start": 2,
        "text_config.loop_layer_index_end": 4,
        "text_config.loop_num_passes": 2,
        "text_config.loop_gate_rank": 8,
    },
    "inkling_mm_model": {
        "text_config.hidden_size": 64,
        "text_config.head_dim": 16,
        **{
            f"text_config.swa_{name}": value
            for name, value in {
                "head_dim": 16,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            }.items()
        },
        "text_config.d_rel": 4,
        "text_config.rel_extent": 24,
        "text_config.sliding_window_size": 20,
        "text_config.logits_mup_width_multiplier": 1.0,
        "vision_config.text_hidden_size": 64,
        "vision_config.n_layers": 4,
    },
    "qwen3_omni_moe_thinker": {"text_config.head_dim": 128, "text_config.hidden_size": 512},
}
"""What fits a small decoder better."""
GRIDS = dict.fromkeys(("hunyuan_vl", "hy_v4_vl"), (4, 14))
"""Patches in the rows and columns of a picture where a row of tokens ends with a newline."""
GEMMA4: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 16,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "per_layer_config": {n: {"head_dim": 32, "num_key_value_heads": 1} for n in (1, 3, 5)},
    "sliding_window": 12,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "attention_k_eq_v": True,
    "use_bidirectional_attention": "vision",
}
GEMMA4_SMALL = {
    "attention_k_eq_v": False,
    "use_bidirectional_attention": None,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_hidden_layers": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "per_layer_config": {n: {"head_dim": 32} for n in (1, 3, 5, 7)},
    "num_kv_shared_layers": 4,
    "use_double_wide_mlp": True,
}
MIXES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4-31b": ("gemma4", GEMMA4),
    "gemma4-26b": (
        "gemma4",
        GEMMA4
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
        | {"moe_intermediate_size": 48},
    ),
    "gemma3n-e2b": (
        "gemma3n",
        {
            "hidden_size": 64,
            "head_dim": 16,
            "intermediate_size": [96] * 8,
            "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 6,
            "num_hidden_layers": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 4,
            "num_kv_shared_layers": 4,
            "sliding_window": 12,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "laurel_rank": 8,
        },
    ),
    "llama4-scout": (
        "llama4",
        {
            "hidden_size": 64,
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_hidden_layers": 8,
            "layer_types": [*["chunked_attention"] * 3, "full_attention"] * 2,
            "no_rope_layers": [1, 1, 1, 0] * 2,
            "moe_layers": [1, 3, 5, 7],
            "attention_chunk_size": 10,
            "attn_temperature_tuning": True,
            "floor_scale": 8,
            "attn_scale": 0.5,
        },
    ),
    "gemma4-e2b": ("gemma4", GEMMA4 | GEMMA4_SMALL),
}
"""Name -> class and the layers of its published checkpoints, which its default config lacks."""
SIZES = ((16, 16), (8, 32), (32, 8))
"""Patches in the rows and columns of pictures whose pixels do not tell their number."""
EAGER = (
    "apertus1p5",
    "got_ocr2",
    "hy_v4_vl",
    "inkling2",
    "inkling2_loop",
    "pp_chart2table",
)  # have no other attention


def build_config(name: str, small: bool, layers: int = LAYERS) -> PreTrainedConfig:
    """The default config of a class or of a mix, with a small decoder or as it is."""
    model_type, mix = MIXES.get(name, (name, {}))
    values: dict[str, Any] = CONFIG_MAPPING[model_type]().to_dict()
    _put(values, MISSING.get(model_type, {}))
    if small:
        values = _shrink(values, layers)
        _put(values, NARROW.get(model_type, {}))
        _put(values, {f"text_config.{field}": value for field, value in mix.items()})
    return CONFIG_MAPPING[model_type](**values)


def _put(values: dict[str, Any], fields: dict[str, Any]) -> None:
    for path, value in fields.items():
        node = values
        *parts, last = path.split(".")
        for part in parts:
            node = node[part]
        node[last] = value


def _shrink(values: dict[str, Any], layers: int) -> dict[str, Any]:
    nested = [name for name in TEXT_CONFIGS if isinstance(values.get(name), dict)]
    for name in nested:
        wide = values[name].get("hidden_size")
        values[name] = _shrink_text(values[name], layers)
        narrow = values[name].get("hidden_size")
        for part in values.values():  # a tower or projector that gives what the decoder takes
            if isinstance(part, dict) and part is not values[name]:
                for field, value in part.items():
                    gives = re.search(
                        "hidden.*out|out.*hidden|text.*hidden|adapter_out", str(field)
                    )
                    if value == wide and gives:
                        part[field] = narrow
    if not nested and isinstance(values.get("num_hidden_layers"), int):
        values = _shrink_text(values, layers)
    for number, (name, value) in enumerate(list(values.items())):
        if isinstance(value, int) and name.endswith(("token_id", "token_index", "patch_id")):
            values[name] = 0 if name == "pad_token_id" else 1000 + number
            for part in nested:
                if name in values[part] and name != "pad_token_id":
                    values[part][name] = values[name]
    return values


def _shrink_text(values: dict[str, Any], layers: int) -> dict[str, Any]:
    """A decoder's config with few narrow layers, of every kind that its lists name."""
    count = values.get("num_hidden_layers", 0)
    lists = {name: v for name, v in values.items() if isinstance(v, list) and len(v) == count}
    rows = [str([v[layer] for v in lists.values()]) for layer in range(count)]
    first = {row: layer for layer, row in reversed(list(enumerate(rows)))}
    chosen = sorted(first.values())[:layers]
    chosen += [layer for layer in range(count) if layer not in chosen][: layers - len(chosen)]
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name in lists:
            value = [SMALL.get(name, lists[name][layer]) for layer in sorted(chosen)]
        elif name in SMALL and isinstance(value, (int, list)):
            value = [SMALL[name]] * len(value) if isinstance(value, list) else SMALL[name]
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = None if value is None else 0
        elif name == "num_hidden_layers":
            value = len(chosen)
        elif name == "per_layer_config" and value:
            by_layer = {int(layer): sizes for layer, sizes in value.items()}
            value = {n: by_layer[at] for n, at in enumerate(sorted(chosen)) if at in by_layer}
        small[name] = value
    heads, width = values.get("num_attention_heads"), values.get("hidden_size")
    if isinstance(heads, int) and isinstance(width, int):
        small["hidden_size"] = 4 * (values.get("head_dim") or width // heads)
        if heads == values.get("num_key_value_heads"):
            small["num_key_value_heads"] = 4
    return small


@contextmanager
def towers_without_timm(model_type: str) -> Iterator[None]:
    """Inside, a class whose tower comes from the package timm, which is not there, gets none.

    And one whose tower is planned by the package scipy (Inkling) gets one of narrow layers.
    """
    name = CONFIG_MAPPING[model_type].__module__.replace("configuration_", "modeling_")
    module = sys.modules.get(name)
    if plan := getattr(module, "plan_out_scales", None):
        module.plan_out_scales = lambda *sizes: [(1, 1, 1, 3)] * (sizes[2] + 1)  # type: ignore[union-attr]
        try:
            yield
        finally:
            module.plan_out_scales = plan  # type: ignore[union-attr]
        return
    auto = getattr(module, "AutoModel", None)
    if auto is None:
        yield
        return

    class WithoutTimm:
        @staticmethod
        def from_config(config: PreTrainedConfig, **options: Any) -> nn.Module:
            timm = str(getattr(config, "model_type", "")).startswith(("timm", "gemma3n_vision"))
            return nn.Identity() if timm else auto.from_config(config, **options)

    module.AutoModel = WithoutTimm  # type: ignore[union-attr, assignment]
    try:
        yield
    finally:
        module.AutoModel = auto  # type: ignore[union-attr]


def is_broken(name: str) -> bool:
    """Whether a class or mix does not run in the transformers at hand.

    Llama 4 reads a field in 5.24.0 that the output of its language model does not have; the default
    config of Granite 4 Vision in 5.17.0 is not one that its decoder takes.
    """
    return (name[:6], transformers.__version__) in (("llama4", "5.24.0"), ("granit", "5.17.0"))


def skeleton(model_type: str) -> PreTrainedModel:
    """A class at its default size, without weights, to look at."""
    config = build_config(model_type, small=False)
    auto = AutoModelForImageTextToText
    auto._model_mapping[type(config)]  # imports its module
    with towers_without_timm(model_type), torch.device("meta"):
        return auto.from_config(config)


def build(name: str, layers: int = LAYERS) -> PreTrainedModel:
    """A class with a small decoder; the weights of its tower are zeros that take no memory."""
    config = build_config(name, small=True, layers=layers)
    model_type = config.model_type
    attention = "eager" if model_type in EAGER else "sdpa"
    AutoModelForImageTextToText._model_mapping[type(config)]
    with towers_without_timm(model_type), weights_on_meta(), initialization.no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    run = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    run.append(_projector_after_encoding(model))
    drawn = {id(weight) for part in run if part is not None for weight in part.parameters()}
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is None or weight.device.type != "meta":
                continue
            value = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            if id(weight) in drawn:
                value = _draw(module, name, weight, generator)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
    model.tie_weights()
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)
    return model.eval()


def _projector_after_encoding(model: PreTrainedModel) -> nn.Module | None:
    """What projects features that an encoder gives unprojected (Llama 4)."""
    projector = getattr(model, "multi_modal_projector", None)
    return getattr(projector, "linear_1", None) if model.config.model_type == "llama4" else None


def _draw(
    module: nn.Module, name: str, weight: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    noise = torch.randn(weight.shape, generator=generator)
    if weight.ndim > 1:
        return noise * 0.9 / weight.shape[-1] ** 0.5
    if name.endswith("bias"):
        return noise * 0.1
    if name == "A_log":  # of linear attention: it remembers many tokens
        return noise * 0.1 - 3.0
    kind = type(module).__name__
    centred = any(part in kind for part in ("emma", "Centered", "Qwen3_5RMS", "Qwen3_5MoeRMS"))
    centred &= "Gated" not in kind
    return noise * 0.1 + (0.0 if centred else 1.0)


FORMS = ("list", "tensor", "batch", "split", "rows")
"""How an encoder's features may come: one tensor, a list of them, or a row for each picture."""


def fake_encoder(model: PreTrainedModel, structure: Structure, form: str) -> None:
    """Make a model's encoder give VISUAL features for each picture, without running its tower.

    The pixels of a picture are its number, so that it has the same features in every batch.
    """
    inner = structure.inner
    inner.__dict__.pop("get_image_features", None)
    encode = inner.get_image_features
    width = structure.hidden_size
    if (projector := _projector_after_encoding(model)) is not None:
        width = projector.in_features
    features = torch.randn(8 * VISUAL, width, generator=torch.Generator().manual_seed(3)) * 0.5
    deepstack = getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", 0)

    @functools.wraps(encode)
    def give(*args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        given = inspect.signature(encode).bind_partial(*args, **kwargs).arguments
        pixels = next(value for value in given.values() if isinstance(value, torch.Tensor))
        sizes = given.get("target_sizes")  # of pictures that are packed into one (MiniCPM-V)
        if sizes is None:
            numbers = pixels.flatten(1)[:, 0].long().tolist()
        else:
            numbers = [SIZES.index(tuple(size)) for size in sizes.tolist()]
        some = torch.cat([features[VISUAL * n : VISUAL * (n + 1)] for n in numbers])
        forms = {
            "list": [some],
            "tensor": some,
            "batch": some[None],
            "split": list(some.split(VISUAL)),
            "rows": some.view(-1, VISUAL, width),
            "tokens": some[:, None],
        }
        output = BaseModelOutputWithPooling(last_hidden_state=some, pooler_output=forms[form])
        object.__setattr__(output, "router_logits", None)  # granite_docling
        object.__setattr__(output, "visual_indicator_features", features[:4])  # ovis2
        if layers := getattr(model.config, "deepstack_layer_map", None):  # granite4_vision
            output["deepstack_features"] = [
                (layer, some * (0.5 + number)) for number, (_, layer) in enumerate(layers)
            ]
        if deepstack:
            output["deepstack_features"] = [[some * 0.3] for _ in deepstack]
        return output

    inner.get_image_features = give


def inputs(
    model: PreTrainedModel,
    structure: Structure,
    text: tuple[int, int],
    seed: int,
    pictures: int = 1,
) -> dict[str, torch.Tensor]:
    """Made-up inputs with pictures.

    Args:
        text: text tokens before and after them.
        seed: of the text; the number of the pictures.
    """
    config = model.config
    placeholder = next(iter(structure.placeholders().values()))[0]
    start, end = (getattr(config, f"vision_{side}_token_id", None) for side in ("start", "end"))
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.randint(10, 900, (n,), generator=generator).tolist() for n in text)
    around = [[token] if isinstance(token, int) else [] for token in (start, end)]
    picture = [*around[0], *[placeholder] * VISUAL, *around[1]]
    more = [*([] if around[1] else [10]), *picture]  # two runs, and not one of both
    ids = torch.tensor([[*before, *picture, *more * (pictures - 1), *after]])
    side = int(getattr(getattr(config, "vision_config", None), "spatial_merge_size", 2) or 2) * 4
    visual = (ids == placeholder).long()
    edge = torch.arange(12)  # 3 x 3 patches a token: 4 x 4 tokens
    every = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.full((pictures, 3, 28, 28), float(seed)),
        "high_res_pixel_values": torch.zeros(pictures, 3, 28, 28),
        "image_grid_thw": torch.tensor(
            [[1, *GRIDS.get(config.model_type, (side, side))]] * pictures
        ),
        "image_sizes": torch.tensor([[28, 28]] * pictures),
        "target_sizes": torch.tensor([SIZES[seed]] * pictures),
        "mm_token_type_ids": visual,
        "token_type_ids": visual,
        "moe_mm_token_type_ids": visual,
        "image_position_ids": torch.cartesian_prod(edge, edge).flip(-1)[None],
    }
    takes = {*inspect.signature(structure.inner.forward).parameters}
    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        takes -= {"token_type_ids"}  # Inkling's generation does not know it
    return {name: value for name, value in every.items() if name in takes}


def left_pad(batch: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One ragged left-padded batch."""
    longest = max(row["input_ids"].shape[1] for row in batch)
    padded = {}
    for name in batch[0]:
        parts = [row[name] for row in batch]
        if name.endswith(("ids", "attention_mask")) and "position" not in name:
            parts = [nn.functional.pad(p, (longest - p.shape[1], 0)) for p in parts]
        padded[name] = torch.cat(parts)
    return padded


class CannotRunError(Exception):
    """A class that is accepted, but that these made-up inputs do not fit."""


def ready(name: str, layers: int = LAYERS) -> tuple[PreTrainedModel, list[dict[str, torch.Tensor]]]:
    """A small model of a class or mix whose encoder is faked, one input and a ragged batch for it.

    Raises:
        ModelError: the class is refused.
        CannotRunError: it runs in none of the forms.
    """
    model = build(name, layers)
    for token in ("vision_start_token_id", "audio_start_token_id"):
        if "omni" in name and not hasattr(model.config, token):
            setattr(model.config, token, 990)
    structure = find_structure(model)
    if not hasattr(structure.inner, "get_image_features"):
        raise CannotRunError("it has no get_image_features")
    two = [inputs(model, structure, text, seed) for seed, text in enumerate([(5, 7), (3, 12)])]
    batches = [two[0], left_pad(two)]
    failures = []
    for form in ["tokens"] if name == "inkling_mm_model" else FORMS:
        fake_encoder(model, structure, form)
        try:
            with torch.no_grad():
                for batch in batches:
                    model(**batch)
        except Exception as error:
            failures.append(f"{form}: {error!r}")
        else:
            return model, batches
    raise CannotRunError("; ".join(failures))


def masked(
    model: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    drops: Sequence[tuple[int, Sequence[Sequence[int]]]],
    force: torch.Tensor,
) -> torch.Tensor:
    """Logits (B, steps, V) of the unpruned model with eager attention, dropped columns masked.

    The masks are the model's own, whatever they say of pictures, with the columns taken away.
    """
    with oracle.masking(model, drops, find_structure(model).layers):
        return oracle.generate(model, batch, force.shape[1], force)[1]


def outcome(model_type: str) -> str:
    """What pruning says of a class at its own size: "" where it is accepted, else the reason.

    Raises:
        Exception: the check crashed.
    """
    try:
        find_structure(skeleton(model_type))
    except ModelError as error:
        return error.message
    return ""
