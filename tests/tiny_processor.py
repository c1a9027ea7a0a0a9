"""Tiny checkpoints in the hub's format of any class, with the class's own processor.

One builder for all of them: a small decoder and a small tower from the class's default config, a
byte-level tokenizer with the special tokens that its processor names, the class's own preparation
files. The table below holds what differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

TOWER: Mapping[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "depth", "n_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "num_heads", "num_key_value_heads", "attention_heads"), 2
    ),
    "hidden_size": 64,
    "embed_dim": 64,
    "intermediate_size": 96,
    "head_dim": 32,
}
WIDTHS = ("out_hidden_size", "projection_dim", "text_hidden_size", "adapter_out_dim")
"""Widths of what a tower or projector gives the decoder."""
TEMPLATE = (
    "{{% for message in messages %}}{{{{ '<|' + message['role'] + '|>' }}}}"
    "{{% for part in message['content'] %}}{{% if part['type'] == 'text' %}}{{{{ part['text'] }}}}"
    "{{% else %}}{{{{ {media}[part['type']] }}}}{{% endif %}}{{% endfor %}}"
    "{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|assistant|>' }}}}{{% endif %}}"
)
"""Roles in tokens of their own, and a placeholder where a picture or video is."""


@dataclass(frozen=True)
class Kind:
    """What differs of one class.

    Args:
        tokens: attribute of the tokenizer or field of the config -> text of a special token.
        special: further special tokens.
        config: fields of the config, by their paths.
        image: fields of preprocessor_config.json.
        video: fields of video_preprocessor_config.json.
        processor: fields of processor_config.json.
        image_class, processor_class: where transformers' mapping names none.
        template: whether the checkpoint has a chat template.
        marker: what the template writes for a picture, where it is not its token.
        around, around_video: texts before and after a placeholder in its template; () for those
            of pictures.
        second: whether there is a tokenizer for a Q-Former, too.
        named: whether the tokenizer has attributes for its special tokens.
    """

    tokens: Mapping[str, str] = field(default_factory=dict)
    special: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    image: Mapping[str, Any] = field(default_factory=dict)
    video: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    image_class: str = ""
    processor_class: str = ""
    template: bool = True
    marker: str = ""
    around: tuple[str, str] = ("", "")
    around_video: tuple[str, ...] = ()
    second: bool = False
    named: bool = True


PADS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
VISION = {**PADS, "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
QWEN = ("<|vision_start|>", "<|vision_end|>")
BEGUN = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
GLM = Kind(
    tokens={
        "image_token": "<|image|>",
        "video_token": "<|video|>",
        **dict(
            zip(
                (
                    f"{kind}_{side}_token"
                    for kind in ("image", "video")
                    for side in ("start", "end")
                ),
                BEGUN,
                strict=True,
            )
        ),
    },
    around=BEGUN[:2],
    around_video=BEGUN[2:],
    image_class="Glm46VImageProcessor",
    processor_class="Glm46VProcessor",
)
EDGE = {"height": 56, "width": 56}
PINPOINTS = [[384, 768], [768, 384], [768, 768]]
PATCH_16 = {"patch_size": 16}
SLICES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
ERNIE = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
COMPASS = {
    "image_token": "<|IMAGE_PAD|>",
    "video_token": "<|VIDEO_PAD|>",
    "vision_start_token": "<|VISION_START|>",
    "vision_end_token": "<|VISION_END|>",
}
PATCHES = {"image_token": "<|patch|>", "video_token": "<|video|>"}
MUSE = (
    "<|image_start|>",
    "<|image_end|>",
    "<|vid_start|>",
    "<|vid_end|>",
    "<|vid_frame_separator|>",
)
BLIP = {
    "image_token_index": 1500,
    "text_config.num_hidden_layers": 2,
    "text_config.hidden_size": 64,
    "text_config.num_attention_heads": 2,
    "text_config.ffn_dim": 96,
    "text_config.word_embed_proj_dim": 64,
    "qformer_config.encoder_hidden_size": 64,
    "num_query_tokens": 8,
}
INSTRUCT_BLIP = Kind(
    tokens={"image_token": "<image>"},
    template=False,
    config=BLIP,
    processor={"num_query_tokens": 8},
    second=True,
    named=False,
)
T5 = {
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
}
KOSMOS = {
    "text_config.vocab_size": 3200,
    "text_config.layers": 2,
    "text_config.embed_dim": 64,
    "text_config.ffn_dim": 96,
    "text_config.attention_heads": 2,
}
MARKED = Kind(tokens={"image_token": "<imgpad>"}, special=("<img>", "</img>"))

KINDS: dict[str, Kind] = {
    "apertus1p5": Kind(
        tokens={
            "image_token": "<|image|>",
            "audio_token": "<|audio|>",
            "boi_token": "<|img_start|>",
            "eoi_token": "<|img_end|>",
            "image_wrapper_token": "<|img_token_start|>",
            "eol_token": "<|img_end_of_row|>",
            "boa_token": "<|audio_start|>",
            "eoa_token": "<|audio_end|>",
        },
        config={
            "vision_config.base_channels": 32,
            "vision_config.embed_dim": 256,
            "audio_config.hidden_size": 64,
            "audio_config.codebook_dim": 64,
        },
        processor={
            "feature_extractor": {
                "feature_extractor_type": "WavTokenizerFeatureExtractor",
                "sampling_rate": 24000,
            }
        },
    ),
    "aria": Kind(config={"vision_config.image_size": 490, "vision_config.patch_size": 14}),
    "chameleon": Kind(
        tokens={"boi_token": "<racm3:break>", "eoi_token": "<eoss>"},
        config={
            "vq_config.base_channels": 32,
            "vq_config.num_embeddings": 4,
            "vocabulary_map": {
                "<image>": 1000,
                **{f"IMGIMG{letter}Z": 1001 + n for n, letter in enumerate("ABCD")},
            },
            "image_token_id": 1000,
        },
    ),
    "cohere2_vision": Kind(
        tokens={
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
    ),
    "cohere_compass": Kind(
        tokens=COMPASS, image=PATCH_16, around=("<|VISION_START|>", "<|VISION_END|>")
    ),
    "cosmos3_edge": Kind(tokens=VISION, around=QWEN),
    "cosmos3_omni": Kind(
        tokens=VISION, around=QWEN, image=PATCH_16, processor_class="Qwen3VLProcessor"
    ),
    **dict.fromkeys(
        ("deepseek_vl", "deepseek_vl_hybrid"),
        Kind(
            tokens={"image_token": "<image_placeholder>"}, config={"vision_config.image_size": 384}
        ),
    ),
    "deepseek_ocr2": Kind(
        config={"vision_config.sam_config.downsample_channels": [64, 64]},
    ),
    "diffusion_gemma": Kind(
        tokens={"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"},
        image_class="Gemma4ImageProcessor",
    ),
    "dots3_note": Kind(
        tokens={"image_token": "<|imgpad|>", "video_token": "<|video_pad|>"},
        special=("<|audio_comp_pad|>", "<|img|>", "<|endofimg|>"),
        config={
            "vision_config.adapter_in_dim": 64,
            "vision_config.mlp_layer_types": ["dense", "sparse"],
            "vision_config.per_layer_config": {},
            "vision_config.num_local_experts": 4,
            "audio_config.adapter_input_size": 64,
        },
        image={"temporal_patch_size": 1},
    ),
    "emu3": Kind(
        config={
            "vq_config.base_channels": 32,
            "vq_config.hidden_size": 128,
            "vq_config.codebook_size": 4,
            "image_token_id": 1000,
            "vocabulary_map": {
                "<image>": 1000,
                "<|extra_200|>": 1002,
                **{f"<|visual token {n:06}|>": 1010 + n for n in range(4)},
            },
        },
        tokens={
            "boi_token": "<|image start|>",
            "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>",
            "eof_token": "<|extra_201|>",
        },
    ),
    "ernie4_5_vl_moe": Kind(
        tokens=ERNIE,
        around=("<|IMAGE_START|>", "<|IMAGE_END|>"),
        around_video=("<|VIDEO_START|>", "<|VIDEO_END|>"),
        video={
            "video_processor_type": "Ernie4_5_VLMoeVideoProcessor",
            "temporal_patch_size": 2,
            "draw_on_frames": False,  # published ones bring a font
        },
    ),
    "exaone4_5": Kind(tokens=VISION, around=QWEN),
    "fast_vlm": Kind(
        config={
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "fastvit_t8",
                "do_pooling": False,
                "hidden_size": 768,
                "image_size": 256,
            }
        },
        image={
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 256, "width": 256},
        },
        processor={"patch_size": 32, "vision_feature_select_strategy": "full"},
        image_class="CLIPImageProcessor",
        processor_class="LlavaProcessor",
    ),
    "florence2": Kind(
        template=False,
        image={
            "image_seq_length": 50,
            "size": {"height": 224, "width": 224},
            "crop_size": {"height": 224, "width": 224},
        },
        config={
            "text_config.encoder_layers": 2,
            "text_config.decoder_layers": 2,
            "vision_config.depths": [1, 1, 1, 1],
        },
    ),
    "fuyu": Kind(
        tokens={"image_token": "|SPEAKER|"},
        special=("|NEWLINE|", "<0x04>", "<s>", "</s>"),
        template=False,
    ),
    **dict.fromkeys(("glm46v", "glm4v_moe", "glm5_next", "glmga", "glm_ocr"), GLM),
    "got_ocr2": MARKED,
    "gemma3n": Kind(
        tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
            "boa_token": "<start_of_audio>",
            "eoa_token": "<end_of_audio>",
            "audio_token": "<audio_soft_token>",
        },
        marker="<start_of_image>",
        config={
            "vision_config.hidden_size": 2048,
            "text_config.vocab_size_per_layer_input": zoo.VOCABULARY,
        },
    ),
    "granite4_vision": Kind(
        config={
            "vision_config": {
                **{"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 16},
                **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
                "intermediate_size": 96,
            },
            "image_grid_pinpoints": PINPOINTS,
            "vision_feature_select_strategy": "full",
        },
        image={"image_grid_pinpoints": PINPOINTS},
        processor={
            "patch_size": 16,
            "vision_feature_select_strategy": "full",
            "downsample_rate": "4/8",
        },
    ),
    "hunyuan_vl": Kind(
        tokens={"image_start_token": "<img>", "image_end_token": "</img>"},
        around=("<img>", "</img>"),
    ),
    "hyperclovax_vision_v2": Kind(tokens=VISION, around=QWEN),
    "idefics2": Kind(
        tokens={"image_boundary_token": "<fake_token_around_image>"},
        config={"vision_config.image_size": 980, "vision_config.patch_size": 14},
    ),
    "janus": Kind(
        tokens={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        }
    ),
    "kimi_k25": Kind(tokens=PADS, config={"projection_hidden_size": 64}),
    "kosmos-2": Kind(
        config={**KOSMOS, "latent_query_num": 64},
        tokens={"unk_token": "<unk>"},
        processor={"num_patch_index_tokens": 16},
        image_class="CLIPImageProcessor",
        processor_class="Kosmos2Processor",
        template=False,
    ),
    "kosmos-2.5": Kind(
        config={**KOSMOS, "latent_query_num": 8, "vision_config.patch_embed_hidden_size": 768},
        tokens={"boi_token": "<image>", "eoi_token": "</image>", "image_token": "<s>"},
        processor={"num_image_tokens": 8},
        image_class="Kosmos2_5ImageProcessor",
        processor_class="Kosmos2_5Processor",
        template=False,
    ),
    "lfm3_vl": Kind(
        tokens=VISION,
        around=QWEN,
        image=PATCH_16,
        config={"vision_config.layer_types": ["conv", "full_attention"]},
    ),
    "lighton_ocr": Kind(
        tokens={
            "image_token": "<|image_pad|>",
            "image_break_token": "<|vision_pad|>",
            "image_end_token": "<|vision_end|>",
        }
    ),
    **dict.fromkeys(
        ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"),
        Kind(
            tokens=SLICES,
            image=PATCH_16,
            config={"image_token_id": 1012, "video_token_id": 1013},
        ),
    ),
    "llama4": Kind(
        tokens={"image_token": "<|patch|>"},
        special=(
            "<|image|>",
            "<|image_start|>",
            "<|image_end|>",
            "<|tile_x_separator|>",
            "<|tile_y_separator|>",
        ),
        marker="<|image|>",
        config={
            "vision_config.intermediate_size": 256,
            **{
                f"vision_config.{name}": 64
                for name in ("projector_input_dim", "projector_output_dim", "vision_output_dim")
            },
        },
        processor={
            "image_token": "<|image|>",
            "patch_token": "<|patch|>",
            "fake_image_token": "<|image|>",
        },
    ),
    "minimax_m3_vl": Kind(
        tokens={"image_token": "]<]image[>[", "video_token": "]<]video[>["},
        special=("]<]start of image[>[", "]<]end of image[>["),
    ),
    **dict.fromkeys(
        ("mistral3", "mistral_large4"),
        Kind(
            tokens={"image_token": "[IMG]"},
            special=("[IMG_BREAK]", "[IMG_END]"),
            processor={"patch_size": 14, "spatial_merge_size": 2},
        ),
    ),
    "mllama": Kind(
        tokens={"image_token": "<|image|>"},
        special=("<|python_tag|>",),
        image={"size": EDGE, "max_image_tiles": 4},
        config={
            "vision_config.image_size": 56,
            "vision_config.num_global_layers": 2,
            "vision_config.intermediate_layers_indices": [0, 1],
            "vision_config.vision_output_dim": 192,
        },
    ),
    "muse_glimmer": Kind(
        tokens=PATCHES,
        special=MUSE,
        config={"out_hidden_size": 256, "projector_hidden_size": 64},
    ),
    "muse_spark": Kind(
        tokens=PATCHES,
        special=(*MUSE, "<|audio|>", "<|soft_audio_start|>", "<|soft_audio_end|>"),
        config={
            "audio_config.num_hidden_layers": 4,
            "out_hidden_size": 256,
            "projector_hidden_size": 64,
        },
    ),
    "nemotron_h_omni": Kind(
        special=("<img>", "</img>", "<so_start>", "<so_end>"),
        config={"vision_hidden_size": 64, "projector_hidden_size": 64},
        video={
            "video_processor_type": "NemotronH_Omni_Reasoning_V3VideoProcessor",
            "norm_mean": [0.48, 0.46, 0.41],
            "norm_std": [0.27, 0.26, 0.28],
        },
    ),
    "ovis2": Kind(
        tokens={"image_token": "<IMG_ATOM>"},
        marker="<image>",
        special=("<image>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
        config={"visual_indicator_token_ids": [1504, 1505, 1506, 1507, 1508]},
    ),
    "paddleocr_vl": Kind(
        tokens={"image_token": "<|IMAGE_PLACEHOLDER|>"},
        special=("<|IMAGE_START|>", "<|IMAGE_END|>"),
        around=("<|IMAGE_START|>", "<|IMAGE_END|>"),
    ),
    "paligemma": Kind(
        template=False, image={"image_seq_length": 256}, config={"projection_dim": 1024}
    ),
    "perception_lm": Kind(
        tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
        config={
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "vit_pe_core_tiny_patch16_384",
                "do_pooling": True,
                "num_classes": 0,
                "model_args": {
                    "embed_dim": 64,
                    "depth": 2,
                    "num_heads": 2,
                    "img_size": [64, 64],
                    "global_pool": "",
                    "use_post_transformer_norm": False,
                },
            },
            "projector_pooling_ratio": 2,
            "vision_use_cls_token": True,
        },
        image={"tile_size": 64, "max_num_tiles": 4},
        video={
            "video_processor_type": "PerceptionLMVideoProcessor",
            "size": {"height": 64, "width": 64},
        },
        processor={"patch_size": 16, "pooling_ratio": 2},
    ),
    "pp_chart2table": Kind(tokens={"image_token": "<imgpad>"}, marker="<imgpad>" * 256),
    "qianfan_ocr": Kind(
        tokens={
            "image_token": "<IMG_CONTEXT>",
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
        },
        special=("<image>",),
        marker="<image>",
    ),
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_moe", "qwen4_exp"), Kind(tokens=VISION, around=QWEN, image=PATCH_16)
    ),
    "shieldgemma2": Kind(
        tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    ),
    "step3p7": Kind(
        tokens={"image_token": "<im_patch>"},
        special=("<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"),
    ),
    "t5gemma2": Kind(
        template=False,
        image={"size": {"height": 224, "width": 224}},
        processor={"image_seq_length": 49},
        tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        config={
            **{
                f"{part}.{name}": value
                for part in ("encoder.text_config", "decoder")
                for name, value in {
                    "hidden_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "head_dim": 32,
                    "intermediate_size": 96,
                    "vocab_size": zoo.VOCABULARY,
                    "layer_types": ["sliding_attention", "full_attention"],
                }.items()
            },
            "vocab_size": zoo.VOCABULARY,
            "eoi_token_index": 1601,
            "encoder.boi_token_index": 1600,
            "encoder.eoi_token_index": 1601,
            "encoder.mm_tokens_per_image": 49,
        },
    ),
    "udop": Kind(template=False, config={**T5, "vocab_size": zoo.VOCABULARY}),
    "video_llama_3": Kind(tokens=PADS, image=PATCH_16),
    "vipllava": Kind(
        processor={
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
        config={"vision_feature_layer": [-1, -2]},
    ),
    "blip": Kind(template=False),
    "blip-2": Kind(template=False, config=BLIP, processor={"num_query_tokens": 8}, named=False),
    "instructblip": INSTRUCT_BLIP,
    "instructblipvideo": replace(
        INSTRUCT_BLIP,
        tokens={"video_token": "<video>"},
        config={
            name.replace("image_token_index", "video_token_index"): n for name, n in BLIP.items()
        },
        image_class="BlipImageProcessor",
    ),
    "pix2struct": Kind(
        template=False,
        config={
            **{f"text_config.{name}": value for name, value in {**T5, "hidden_size": 64}.items()},
            "vision_config.d_ff": 96,
            "vision_config.d_kv": 32,
        },
    ),
    "vision-encoder-decoder": Kind(
        template=False, image_class="ViTImageProcessor", processor_class="TrOCRProcessor"
    ),
}


def config(model_type: str) -> PreTrainedConfig:
    """The config of a tiny model."""
    values = zoo.build_config(model_type, small=True).to_dict()
    text = next(
        (values[name] for name in zoo.TEXT_CONFIGS if isinstance(values.get(name), dict)), {}
    )
    for name, part in values.items():
        if name.endswith("config") and name not in zoo.TEXT_CONFIGS and isinstance(part, dict):
            _shrink(part, text.get("hidden_size"))
    if isinstance(values.get("hidden_size"), int) and text:
        values["hidden_size"] = text["hidden_size"]
    zoo._put(values, dict(KINDS.get(model_type, Kind()).config))
    return CONFIG_MAPPING[model_type](**values)


def _shrink(tower: dict[str, Any], width: int | None) -> None:
    """Few narrow layers, and an output as wide as the decoder."""
    for name, value in list(tower.items()):
        if name == "per_layer_config" and value:
            tower[name] = {int(at): one for at, one in value.items() if int(at) < TOWER["depth"]}
        elif isinstance(value, dict):
            _shrink(value, width)
        elif isinstance(value, int) and not isinstance(value, bool):
            tower[name] = TOWER.get(name, value)
            if name in WIDTHS and width:
                tower[name] = width
        elif name == "layer_types" and isinstance(value, list):
            tower[name] = value[: TOWER["depth"]]
        elif name == "global_attn_indexes":
            tower[name] = [1]


def tokenizer(model_type: str, made: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens of a class at the ids of its config."""
    kind = KINDS.get(model_type, Kind())
    tokens = {"image_token": "<image>", "video_token": "<video>", **kind.tokens}
    texts: dict[int, str] = {0: "<pad>", 1: "<bos>", 2: "<eos>"}
    for name, text in tokens.items():
        ids = [getattr(made, f"{name}_{end}", None) for end in ("id", "index")]
        if name == "image_token":
            ids.append(getattr(made, "image_patch_id", None))
        place = next((number for number in ids if isinstance(number, int)), None)
        if text not in texts.values():
            texts[place if place is not None else _free(texts)] = text
    for text in ("<|user|>", "<|assistant|>", "<|system|>", *kind.special):
        if text not in texts.values():
            texts[_free(texts)] = text
    vocabulary = dict.fromkeys(texts.values(), 0)
    vocabulary = {text: number for number, text in texts.items()}
    letters = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    for number in range(zoo.VOCABULARY):
        if number not in texts:
            vocabulary[next(letters, f"<unused{number}>")] = number
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(text, special=True) for text in texts.values()])
    template = None
    if kind.template:
        media = {
            "image": (kind.marker or tokens["image_token"]).join(kind.around),
            "video": tokens["video_token"].join(kind.around_video or kind.around),
        }
        template = TEMPLATE.format(media=json.dumps(media))
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        padding_side="left",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=template,
        extra_special_tokens=dict(tokens) if kind.named else {},
    )


def _free(texts: Mapping[int, str]) -> int:
    """An id that no special token has."""
    return next(number for number in range(1500, zoo.VOCABULARY) if number not in texts)


def build(model_type: str, directory: Path) -> Path:
    """A tiny checkpoint in `directory`, which is returned."""
    kind = KINDS.get(model_type, Kind())
    made = config(model_type)
    torch.manual_seed(0)
    attention = "eager" if model_type in zoo.EAGER else "sdpa"
    try:
        model = AutoModelForImageTextToText.from_config(made, attn_implementation=attention)
    except ValueError:  # it has no other
        model = AutoModelForImageTextToText.from_config(made, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.ndim > 1:
                weight.copy_(
                    torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
                )
    if type(getattr(model, "generation_config", None)) is GenerationConfig:  # diffusion has another
        start = 1 if made.is_encoder_decoder else None
        model.generation_config = GenerationConfig(
            pad_token_id=0, do_sample=False, decoder_start_token_id=start
        )
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer(model_type, made).save_pretrained(directory)
    if kind.second:
        tokenizer(model_type, made).save_pretrained(directory / "qformer_tokenizer")
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    image_class = kind.image_class or names.get("torchvision") or names.get("pil")
    processor_class = kind.processor_class or PROCESSOR_MAPPING_NAMES.get(model_type)
    pillow = getattr(transformers, f"{image_class}Pil", None)
    found = pillow or getattr(transformers, str(image_class), None)
    try:
        values = json.loads(found(**kind.image).to_json_string()) if found else {}
    except ImportError:
        values = dict(kind.image)
    side = getattr(getattr(made, "vision_config", None), "image_size", None)
    side = side[0] if isinstance(side, (list, tuple)) else side
    fixed = isinstance(values.get("size"), dict) and {"height", "width"} <= set(values["size"])
    if isinstance(side, int) and fixed and "size" not in kind.image:
        values["size"] = {"height": side, "width": side}
    if isinstance(side, int) and "crop_size" in values:
        values |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if image_class:
        values |= {"image_processor_type": image_class}
        (directory / "preprocessor_config.json").write_text(json.dumps(values, indent=2))
    if kind.video:
        path = directory / "video_preprocessor_config.json"
        path.write_text(json.dumps(kind.video, indent=2))
    processor = {"processor_class": processor_class, **kind.processor}
    (directory / "processor_config.json").write_text(json.dumps(processor, indent=2))
    return directory
